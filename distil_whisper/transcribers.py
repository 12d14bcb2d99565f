"""Waveforms to text: recordings that fit the window, and longer ones in chunks. sequential.py is the third way."""

import logging
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AutomaticSpeechRecognitionPipeline, LogitsProcessor

from distil_whisper.audio import stack
from distil_whisper.decoding import NOT_FINITE, Decoded, Decoder
from distil_whisper.errors import UserError
from distil_whisper.models import LoadedWhisper
from distil_whisper.tokens import Grammar, plain_text

# Of chunks that end within a word, which are joined by their words then.
NOISE = "Whisper did not predict an ending timestamp"
logging.getLogger("transformers.models.whisper.tokenization_whisper").addFilter(
    lambda record: not record.msg.startswith(NOISE)
)
LONGEST_PREFIX = 4  # <|startoftranscript|>, language, task, <|notimestamps|>


@dataclass(frozen=True)
class Transcript:
    """The text of one recording, and what else is known of it (timestamps, whether the length limit was met); problem:
    why it is none."""

    text: str
    details: dict = field(default_factory=dict)
    problem: str | None = None


class ShortForm:
    """Transcribes recordings that fit the window, a batch at once."""

    def __init__(self, decoder: Decoder, whisper: LoadedWhisper, batch_size: int):
        self.decoder = decoder
        self.window = whisper.window
        self.batch_size = batch_size

    def is_full(self, waveforms: list[np.ndarray]) -> bool:
        """Whether so many recordings make a batch."""
        return len(waveforms) >= self.batch_size

    def __call__(
        self, waveforms: list[np.ndarray], language: str | None, task: str | None, names: list[str]
    ) -> list[Transcript]:
        """Transcribe recordings (mono at the model's rate). Raises ValueError for one longer than the window."""
        decoded = self.decoder(stack(waveforms, self.window), language, task)
        return [self._transcript(row) for row in decoded]

    def _transcript(self, row: Decoded) -> Transcript:
        text = self.decoder.grammar.decode(row.ids)
        marked = {"timestamped": text} if self.decoder.return_timestamps else {}
        return Transcript(plain_text(text), {**marked, "truncated": row.truncated}, row.problem)


class Chunked:
    """Transcribes recordings of any length in overlapping chunks of seconds, by transformers' pipeline.

    stride_length_s is the overlap at either side of a chunk, by default a sixth of it. Raises UserError for chunks
    longer than the window (they would be cut silently), and for strides that leave nothing of a chunk.
    """

    def __init__(
        self,
        whisper: LoadedWhisper,
        batch_size: int,
        chunk_length_s: float,
        stride_length_s: float | None = None,
        num_beams: int = 1,
        max_label_length: int | None = None,
        return_timestamps: bool = False,
    ):
        window = whisper.window
        stride_length_s = chunk_length_s / 6 if stride_length_s is None else stride_length_s
        if not 0 < chunk_length_s <= window.seconds:
            raise UserError(
                f"--chunk_length_s is {chunk_length_s:g}; it must be above 0 and at most {window.seconds:g}, the "
                "window of the model"
            )
        if not 0 <= 2 * stride_length_s < chunk_length_s:
            raise UserError(
                f"--stride_length_s is {stride_length_s:g}; it must be at least 0 and less than half of "
                f"--chunk_length_s ({chunk_length_s:g})"
            )
        self.batch_size = batch_size
        self.whisper = whisper
        self.step = (chunk_length_s - 2 * stride_length_s) * window.sampling_rate
        self.options = {"num_beams": num_beams, "max_new_tokens": new_tokens(whisper, max_label_length)}
        self.return_timestamps = return_timestamps
        self.pipeline = AutomaticSpeechRecognitionPipeline(
            model=whisper.model,
            tokenizer=whisper.tokenizer,
            feature_extractor=whisper.feature_extractor,
            device=whisper.model.device,
            chunk_length_s=chunk_length_s,
            stride_length_s=stride_length_s,
            ignore_warning=True,
        )

    def is_full(self, waveforms: list[np.ndarray]) -> bool:
        """Whether the chunks of so many recordings fill a batch."""
        return sum(math.ceil(len(waveform) / self.step) for waveform in waveforms) >= self.batch_size

    def __call__(
        self, waveforms: list[np.ndarray], language: str | None, task: str | None, names: list[str]
    ) -> list[Transcript]:
        """Transcribe recordings (mono at the model's rate), the chunks of all of them in common batches."""
        self.pipeline.call_count = 0  # it is given whole batches, and would warn after ten that it is not
        check, told_of = FiniteLogits(), told(self.whisper.grammar, language, task)
        outputs = self.pipeline(
            waveforms,
            batch_size=self.batch_size,
            return_timestamps=self.return_timestamps,
            generate_kwargs={**self.options, **told_of, "logits_processor": [check]},
        )
        if not check.failed:
            return [self._transcript(output) for output in outputs]
        if len(waveforms) == 1:
            return [Transcript("", problem=NOT_FINITE)]
        alone = zip(waveforms, names, strict=True)  # which of them it was
        return [self([waveform], language, task, [name])[0] for waveform, name in alone]

    def _transcript(self, output: dict) -> Transcript:
        if not self.return_timestamps:
            return Transcript(" ".join(output["text"].split()))
        segments = [
            {"start": chunk["timestamp"][0], "end": chunk["timestamp"][1], "text": chunk["text"].strip()}
            for chunk in output["chunks"]
        ]
        return Transcript(" ".join(output["text"].split()), {"segments": segments})


class FiniteLogits(LogitsProcessor):
    """Changes nothing, and takes note of logits that are NaN."""

    def __init__(self):
        self.failed = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.failed = self.failed | scores.isnan().any()
        return scores


def new_tokens(whisper: LoadedWhisper, max_label_length: int | None, prompted: bool = False) -> int:
    """The most new tokens of a window: the limit, or what prefix and prompt leave of the decoder's positions."""
    positions = whisper.grammar.max_positions
    left = positions - LONGEST_PREFIX - (positions // 2 if prompted else 0)
    return left if max_label_length is None else min(left, max_label_length)


def told(grammar: Grammar, language: str | None, task: str | None) -> dict:
    """What generate is told of language and task: nothing for an English-only model."""
    return {"language": language, "task": task} if grammar.multilingual else {}
