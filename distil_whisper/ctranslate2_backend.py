"""Decoding of windows by CTranslate2, behind the interface of `Decoder`: for machines where it is the faster one."""

import tempfile

import ctranslate2
import torch
from ctranslate2.converters import TransformersConverter

from distil_whisper.audio import LogMel
from distil_whisper.decoding import Decoded
from distil_whisper.errors import UserError
from distil_whisper.models import LoadedWhisper


class CTranslate2Decoder:
    """Decodes batches of windows with a converted copy of a model, in the model's type.

    max_label_length: the most tokens after the prefix. CTranslate2 tells English-only from multilingual models by the
    size of Whisper's own vocabularies: of others `Decoded.language` is None. Raises UserError where it cannot run.
    """

    def __init__(
        self,
        whisper: LoadedWhisper,
        *,
        num_beams: int = 1,
        max_label_length: int | None = None,
        return_timestamps: bool = False,
        device: torch.device | str = "cpu",
    ):
        self.grammar = whisper.grammar
        self.device = torch.device(device)
        self.log_mel = LogMel(whisper.feature_extractor).to(self.device)
        self.num_beams = num_beams
        self.max_label_length = max_label_length or whisper.grammar.max_positions
        self.return_timestamps = return_timestamps
        config = whisper.model.generation_config
        self.suppressed = list(config.suppress_tokens or [])
        self.suppressed_at_first = bool(config.begin_suppress_tokens)
        self.last_first_timestamp = getattr(config, "max_initial_timestamp_index", None) or 1500
        dtype = str(whisper.model.dtype).removeprefix("torch.")
        with tempfile.TemporaryDirectory() as folder:
            original, converted = f"{folder}/original", f"{folder}/converted"
            for part in (whisper.model, whisper.tokenizer, whisper.feature_extractor):
                part.save_pretrained(original)
            TransformersConverter(original).convert(converted, quantization=dtype)
            self.model = ctranslate2.models.Whisper(
                converted,
                device=self.device.type,
                device_index=self.device.index or 0,
                compute_type=dtype,
                intra_threads=torch.get_num_threads(),
            )

    def __call__(self, waveforms: torch.Tensor, language: str | None, task: str | None) -> list[Decoded]:
        """Decode waveforms [B, samples] (float32, the window's length), one result a row."""
        prefix = self.grammar.prefix(language, task, self.return_timestamps)
        features = self.log_mel(waveforms.to(self.device, non_blocking=True)).contiguous().cpu().numpy()
        try:
            encoded = self.model.encode(ctranslate2.StorageView.from_array(features), to_cpu=False)
        except RuntimeError as error:  # such as a library of CUDA that is missing, for which it looks now
            raise UserError(f"--backend ctranslate2 cannot be used here: {error}; use --backend torch") from error
        most = min(self.max_label_length, self.grammar.max_positions - len(prefix))
        found = self.model.generate(
            encoded,
            [prefix] * len(waveforms),
            beam_size=self.num_beams,
            max_length=max(2 * most, len(prefix) + most - 1),  # it allows half of it, and what the prefix leaves of it
            return_scores=True,
            return_no_speech_prob=True,
            suppress_blank=self.suppressed_at_first,
            suppress_tokens=self.suppressed,
            max_initial_timestamp_index=self.last_first_timestamp,
        )
        languages = self._languages(encoded) if self.model.is_multilingual else [None] * len(found)
        return [self._decoded(result, code, most) for result, code in zip(found, languages, strict=True)]

    def _languages(self, encoded) -> list[str]:
        return [ranked[0][0].strip("<|>") for ranked in self.model.detect_language(encoded)]

    def _decoded(self, result, language: str | None, most: int) -> Decoded:
        ids = result.sequences_ids[0]
        truncated = len(ids) == most  # an end token within the limit leaves fewer
        total = result.scores[0] * len(ids)  # a score is a mean that does not count the end token
        return Decoded(ids, truncated, total / (len(ids) + 1), result.no_speech_prob, language)
