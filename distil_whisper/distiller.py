"""The training step: a batch goes in, the losses come out. DDP and FSDP wrap the whole of it."""

import torch
from torch import nn
from transformers import WhisperForConditionalGeneration

from distil_whisper.audio import LogMel
from distil_whisper.augmentation import SpecAugment
from distil_whisper.losses import LossWeights, distillation_loss
from distil_whisper.models import encoder_states


class Distiller(nn.Module):
    """Student and teacher on one batch. The teacher is held outside of the module tree: it is never trained, wrapped,
    synchronised or saved.

    A frozen student encoder that equals the teacher's runs once, for both decoders.
    """

    def __init__(
        self,
        student: WhisperForConditionalGeneration,
        log_mel: LogMel,
        weights: LossWeights,
        teacher: WhisperForConditionalGeneration | None = None,
        freeze_encoder: bool = False,
        spec_augment: SpecAugment | None = None,
    ):
        super().__init__()
        self.student = student
        self.log_mel = log_mel
        self.weights = weights
        self._teacher = (teacher,)
        self.freeze_encoder = freeze_encoder
        self.spec_augment = spec_augment
        if freeze_encoder:
            student.model.encoder.requires_grad_(False)
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        self.shares_encoder = freeze_encoder and teacher is not None and same_encoder(student, teacher)

    @property
    def teacher(self) -> WhisperForConditionalGeneration | None:
        """The teacher, None when there is no KL term."""
        return self._teacher[0]

    @property
    def layerdrop(self) -> float:
        """The largest share of the layers of a part of the student that a training step drops by chance."""
        config = self.student.config
        return max(config.decoder_layerdrop, 0 if self.freeze_encoder else config.encoder_layerdrop)

    def train(self, mode: bool = True) -> "Distiller":
        """A frozen encoder stays in evaluation mode: its dropout would make it another encoder than the teacher's."""
        super().train(mode)
        if self.freeze_encoder:
            self.student.model.encoder.eval()
        return self

    def forward(
        self,
        waveforms: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        labels: torch.Tensor,
        valid_positions: torch.Tensor,
        encoder_states: torch.Tensor | None = None,
        teacher_hidden: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sums over the valid tokens of the batch: loss (with gradient), ce, kl, tokens; and `blamed` [batch], the
        rows that are to blame for a loss that is not finite.

        waveforms is [batch, samples] float32, decoder_input_ids and labels are [batch, length], valid_positions
        [tokens] of the flattened labels. Both decoders get the same decoder_input_ids. Padding stands to the right,
        where causal attention never looks. Where they were kept, encoder_states [batch, positions, width] and
        teacher_hidden [batch, length, width] are not computed.
        """
        teacher_states = encoder_states
        if encoder_states is None:
            encoder_states, teacher_states = self.encode(waveforms)
        if teacher_hidden is None and self.teacher is not None:
            teacher_hidden = self.teacher_decoder(decoder_input_ids, teacher_states)
        student_hidden = self.student.model.decoder(
            input_ids=decoder_input_ids, encoder_hidden_states=encoder_states, use_cache=False
        ).last_hidden_state
        sums = distillation_loss(
            student_hidden,
            self.student.proj_out.weight,
            labels,
            valid_positions,
            self.weights,
            teacher_hidden,
            None if self.teacher is None else self.teacher.proj_out.weight,
        )
        hidden = [student_hidden] if teacher_hidden is None else [student_hidden, teacher_hidden]
        blamed = blamed_rows(sums.loss, hidden)
        return {"loss": sums.loss, "ce": sums.ce, "kl": sums.kl, "tokens": sums.tokens, "blamed": blamed}

    def encode(self, waveforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encoder states for the student and for the teacher: the same ones where the encoder is shared."""
        features = self.log_mel(waveforms)
        if self.spec_augment is not None and self.training:
            features = self.spec_augment(features)  # before both encoders: student and teacher hear the same
        teacher_states = None
        if self.teacher is not None:
            with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
                teacher_states = encoder_states(self.teacher.model.encoder, features.to(self.teacher.dtype))
        if self.shares_encoder:
            return teacher_states, teacher_states
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            return self.student.model.encoder(features).last_hidden_state, teacher_states

    def teacher_decoder(self, decoder_input_ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The teacher's last decoder states [batch, length, width], in its own dtype."""
        with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
            return self.teacher.model.decoder(
                input_ids=decoder_input_ids, encoder_hidden_states=states, use_cache=False
            ).last_hidden_state


def blamed_rows(loss: torch.Tensor, hidden: list[torch.Tensor]) -> torch.Tensor:
    """The rows [batch] to blame for a loss that is not finite: those whose hidden states [batch, length, width] are
    not, or all where all of those are."""
    finite = torch.stack([states.isfinite().flatten(1).all(1) for states in hidden]).all(0)
    return ~loss.isfinite() & (~finite | finite.all())


def same_encoder(student: WhisperForConditionalGeneration, teacher: WhisperForConditionalGeneration) -> bool:
    """Whether two encoders are equal: the same layers and, in the teacher's dtype, the same weights."""
    ours, theirs = student.model.encoder.state_dict(), teacher.model.encoder.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape and torch.equal(ours[name].to(theirs[name]), theirs[name])
        for name in ours
    )
