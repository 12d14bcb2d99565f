"""Decoding of windows: one encoder pass and one search for a batch, with the model's confidence in its words."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from distil_whisper.attention import for_any_length
from distil_whisper.audio import LogMel
from distil_whisper.drafts import AT_ONCE, drafted_search
from distil_whisper.errors import UserError
from distil_whisper.greedy import greedy_search
from distil_whisper.models import LoadedWhisper, encoder_states
from distil_whisper.rules import Rules
from distil_whisper.steps import DecoderSteps
from distil_whisper.tokens import Grammar

# Whisper's own generate sets these off with its inner call, whatever it is given (transformers 5.23): it passes a
# generation config together with two of its fields, and fills in a max_length beside our max_new_tokens
NOISE = ("Passing `generation_config` together with generation-related", "Both `max_new_tokens` (=")
logging.getLogger("transformers.generation.utils").addFilter(lambda record: not record.msg.startswith(NOISE))


NOT_FINITE = "the model's logits are not finite"  # so that what it chose means nothing


@dataclass(frozen=True)
class Decoded:
    """What a model says of one window.

    ids: the tokens as generated, timestamps included, without prefix and end token.
    truncated: the length limit came before the end token.
    avg_logprob: mean log-probability of the tokens, the end token included, after the rules of decoding (suppressed
    tokens, timestamps), as in openai/whisper, which divides by the number of tokens and one, truncated or not.
    no_speech_prob: probability of <|nospeech|> after <|startoftranscript|>.
    language: the code of the likeliest language there, whatever the model was told; None for an English-only model.
    """

    ids: list[int]
    truncated: bool
    avg_logprob: float
    no_speech_prob: float
    language: str | None = None

    @property
    def problem(self) -> str | None:
        """Why this is no transcript, None if it is one."""
        return None if math.isfinite(self.avg_logprob) else NOT_FINITE


class Decoder:
    """Decodes batches of windows, greedily or with beams, on the device and in the type of the model.

    max_label_length: the most tokens after the prefix; the decoder's positions limit it in any case.
    cuda_graphs: where there is a GPU, launch each step of a greedy search as one graph, which is kept for the next
    batches, as the caches are. Raises UserError for numbers below 1.
    """

    def __init__(
        self,
        whisper: LoadedWhisper,
        *,
        num_beams: int = 1,
        max_label_length: int | None = None,
        return_timestamps: bool = False,
        cuda_graphs: bool = False,
    ):
        for name, value in (("number of beams", num_beams), ("maximum label length", max_label_length)):
            if value is not None and value < 1:
                raise UserError(f"the {name} is {value}; it must be 1 or more")
        self.cuda_graphs = cuda_graphs and whisper.model.device.type == "cuda"
        self._steps: DecoderSteps | None = None  # with the graphs
        self.model = whisper.model
        self.grammar = grammar = whisper.grammar
        self.log_mel = LogMel(whisper.feature_extractor).to(whisper.model.device)
        self.num_beams = num_beams
        self.max_label_length = max_label_length or grammar.max_positions
        self.return_timestamps = return_timestamps
        config, vocabulary = whisper.model.generation_config, whisper.model.config.vocab_size
        device = whisper.model.device
        self.rules = Rules(config, vocabulary, grammar.end, grammar.no_timestamps, return_timestamps, device)

    @torch.no_grad()
    def __call__(
        self, waveforms: torch.Tensor, language: str | None, task: str | None, texts: list[str | None] | None = None
    ) -> list[Decoded]:
        """Decode waveforms [B, samples] (float32, the window's length, on any device), one result a row.

        language is a code; both are None for an English-only model. texts: what is probably said, for a greedy search
        that reads it as a draft. Raises UserError if a multilingual model has no language.
        """
        prefix = self.grammar.prefix(language, task, self.return_timestamps)
        features = self.log_mel(waveforms.to(self.model.device, non_blocking=True)).to(self.model.dtype)
        encoded = encoder_states(self.model.get_encoder(), features)
        if self.num_beams == 1:
            drafts = [self._draft(text, language) if text else [] for text in texts or ()]
            return self._greedy(encoded, prefix, drafts)
        return self._beams(encoded, prefix, language, task)

    def _greedy(self, encoded: torch.Tensor, prefix: list[int], drafts: list[list[int]]) -> list[Decoded]:
        most = min(self.max_label_length, self.grammar.max_positions - len(prefix))
        decode = self._steps_of(encoded, len(prefix) + most + AT_ONCE)
        if any(drafts):
            found = drafted_search(decode, prefix, most, drafts, self.grammar.opening)
        else:
            found = greedy_search(decode, prefix, most)
        return decoded(self.grammar, found.tokens, found.logprobs, found.first_logits)

    def _steps_of(self, encoded: torch.Tensor, most: int) -> DecoderSteps:
        """The decoder at its beginning: the one before, if there are graphs of it and the batch is no larger."""
        graphs = self.cuda_graphs and not torch.is_autocast_enabled(encoded.device.type)  # whose copies of weights go
        if graphs and self._steps is not None and len(encoded) <= self._steps.room:
            self._steps.begin(encoded)
            return self._steps
        self._steps = None  # its memory is needed
        steps = DecoderSteps(self.model, self.rules, encoded, most, graphs)
        if graphs:
            self._steps = steps
        return steps

    def _draft(self, text: str, language: str | None) -> list[int]:
        """What a label would be if a transcript was right; no label is in capitals throughout."""
        return self.grammar.encode_transcript(text.lower() if text.isupper() else text, language)

    @for_any_length()
    def _beams(
        self, encoded: torch.Tensor, prefix: list[int], language: str | None, task: str | None
    ) -> list[Decoded]:
        scores = SearchScores(self.num_beams)
        with first_logits(self.model) as captured:
            # transformers adds the prefix to max_length, up to the decoder's positions
            output = self.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                attention_mask=torch.ones(encoded.shape[:2], dtype=torch.long, device=encoded.device),
                force_unique_generate_call=True,
                return_dict_in_generate=True,
                return_timestamps=self.return_timestamps,
                num_beams=self.num_beams,
                max_length=self.max_label_length,
                logits_processor=[scores],
                **({"language": language, "task": task} if self.grammar.multilingual else {}),
            )
        generated = output.sequences[:, len(prefix) :]
        if output.sequences[0, : len(prefix)].tolist() != prefix:
            raise RuntimeError(f"generate began with {output.sequences[0].tolist()}, expected {prefix}")
        logprobs = scores.of_tokens(generated, output.beam_indices)
        return decoded(self.grammar, generated.tolist(), logprobs.tolist(), captured[0][:: self.num_beams, 0].float())


def decoded(
    grammar: Grammar, tokens: list[list[int]], logprobs: list[list[float]], first: torch.Tensor
) -> list[Decoded]:
    """Results from tokens and their log-probabilities by row, and the logits behind <|startoftranscript|>."""
    no_speech = first.softmax(-1)[:, grammar.no_speech].tolist()
    codes, ids = list(grammar.languages), list(grammar.languages.values())
    languages = [codes[place] for place in first[:, ids].argmax(-1).tolist()] if codes else [None] * len(first)
    rows = zip(tokens, logprobs, no_speech, languages, strict=True)
    return [_until_end(grammar.end, *row) for row in rows]


def _until_end(
    end: int, tokens: list[int], logprobs: list[float], no_speech_prob: float, language: str | None
) -> Decoded:
    truncated = end not in tokens
    ids = tokens if truncated else tokens[: tokens.index(end)]
    counted = len(ids) + 1  # with the end token: openai/whisper divides by it even where none came
    return Decoded(ids, truncated, sum(logprobs[:counted]) / counted, no_speech_prob, language)


class SearchScores(LogitsProcessor):
    """Changes nothing, and keeps the log-probabilities of the tokens that a beam search can take at each step: one of
    the best 2 * num_beams of a beam, so that nothing of the size of the vocabulary is kept."""

    def __init__(self, num_beams: int):
        self.keep = 2 * num_beams
        self.steps: list[tuple[torch.Tensor, torch.Tensor]] = []  # values and tokens, [B * num_beams, keep]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        values, tokens = scores.float().topk(self.keep)
        self.steps.append((values - scores.float().logsumexp(-1, keepdim=True), tokens))
        return scores

    def of_tokens(self, generated: torch.Tensor, beam_indices: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [B, T] of generated tokens [B, T]; what follows an end token has no meaning.

        beam_indices [B, T] says in which row each token was found, as `generate` returns it.
        """
        steps = self.steps[: generated.shape[1]]
        values = torch.stack([step[0] for step in steps], dim=1)
        tokens = torch.stack([step[1] for step in steps], dim=1)
        rows = beam_indices[:, : len(steps)].clamp(min=0)
        steps_of = torch.arange(len(steps), device=rows.device)
        values, tokens = values[rows, steps_of], tokens[rows, steps_of]
        # a token that is not among those kept is level with the last of them
        return torch.where(tokens == generated[..., None], values, values[..., -1:]).amax(-1)


@contextlib.contextmanager
def first_logits(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Capture the logits [B, prefix, vocabulary] of the first call of a model, which spares a decoder pass."""
    captured: list[torch.Tensor] = []

    def keep(_module, _inputs, output):
        if not captured:
            captured.append(output.logits)

    handle = model.register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()
