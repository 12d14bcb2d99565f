"""Evaluation on transcribed speech: recordings are transcribed, scored and timed, split by split."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from distil_whisper import progress
from distil_whisper.alignment import word_errors
from distil_whisper.arguments import MOST_BEAMS, option
from distil_whisper.errors import UserError
from distil_whisper.metrics import RATES, score
from distil_whisper.mixing import workers
from distil_whisper.models import LoadedWhisper, load_whisper
from distil_whisper.normalisation import Normaliser, normaliser
from distil_whisper.reading import Source
from distil_whisper.recordings import LANGUAGE_COLUMN, TOO_LONG, Place, Recording, Recordings, RowShare, TextColumns
from distil_whisper.sources import columns_of, open_sources
from distil_whisper.tokens import language_and_task
from distil_whisper.transcribers import Transcript


@dataclass
class EvaluationFields:
    """What both kinds of evaluation are told."""

    model_name_or_path: str = option("", "The model to evaluate: a folder or a name on the Hub.")
    dataset_name: str = option("", "Datasets, separated by +: names on the Hub, folders or manifests.")
    dataset_config_name: str | None = option(None, "Their configurations, separated by +.")
    dataset_split_name: str = option("test", "Their splits, separated by +.")
    text_column_name: str = option("text", "Columns that hold their transcripts, separated by +.")
    per_device_eval_batch_size: int = option(8, "Windows that a process decodes at once.", at_least=1)
    generation_max_length: int | None = option(
        None, "The most tokens that a window is given. Default: as the decoder allows.", at_least=1
    )
    generation_num_beams: int = option(
        1, "Beams when decoding.", aliases=["--num_beams"], at_least=1, at_most=MOST_BEAMS
    )
    return_timestamps: bool = option(False, "Decode with timestamps, and keep them in the predictions.")
    max_samples: int | None = option(None, "Evaluate only so many rows of each dataset.", at_least=1)
    push_to_hub: bool = option(False, "Add the figures to the card of the model on the Hugging Face Hub.")
    hub_model_id: str | None = option(None, "The model's repository on the Hub. Default: the name of the model.")


@dataclass(frozen=True)
class EvaluationSet:
    """One split to evaluate on, and what the model is told of its language.

    one_language: every row must be of that language, because it was taken from the rows.
    """

    source: Source
    columns: TextColumns
    language: str | None
    task: str | None
    normaliser: Normaliser
    one_language: bool


class Transcriber(Protocol):
    """What is evaluated: recordings in, transcripts out."""

    def is_full(self, waveforms: list[np.ndarray]) -> bool:
        """Whether so many recordings are worth a call."""

    def __call__(self, waveforms: list[np.ndarray], language: str | None, task: str | None) -> list[Transcript]:
        """One transcript for each recording."""


@dataclass
class Tally:
    """What was found in a split. calls: seconds of audio and of compute of each batch."""

    predictions: list[tuple[Place, dict]] = field(default_factory=list)
    problems: list[tuple[Place, str, str]] = field(default_factory=list)
    calls: list[tuple[float, float]] = field(default_factory=list)


def check_arguments(args) -> None:
    """Raise UserError for what an evaluation lacks."""
    for name, what in (("model_name_or_path", "the model"), ("dataset_name", "the data")):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing; name {what} to evaluate")


def load_model(args, accelerator: Accelerator) -> LoadedWhisper:
    """The model to evaluate, on this process's device."""
    return load_whisper(
        args.model_name_or_path,
        dtype=args.dtype,
        attn_type=args.attn_type,
        cache_dir=args.cache_dir,
        device=accelerator.device,
    )


def open_sets(args, whisper: LoadedWhisper) -> list[EvaluationSet]:
    """The splits to evaluate on, in the order of the + list. Raises UserError for what they lack."""
    sources = open_sources(args, "dataset")
    texts = columns_of(args, "dataset", sources, "text_column_name")
    return [_open_set(args, whisper, source, text) for source, text in zip(sources, texts, strict=True)]


def _open_set(args, whisper: LoadedWhisper, source: Source, text: str | None) -> EvaluationSet:
    """A split with its language: that of the flag, else of its first row, else of the generation config."""
    if text is None:
        raise UserError(f"--text_column_name names no column for {source.label}; name the one with its transcripts")
    grammar, config = whisper.grammar, whisper.model.generation_config
    of_rows = _language_of_rows(source) if args.language is None and grammar.multilingual else None
    language, task = language_and_task(args.language or of_rows, args.task, grammar, config)
    if grammar.multilingual and language is None:
        raise UserError(f"--language is missing: the model is multilingual, and {source.label} names no language")
    spoken = "en" if task == "translate" else language  # translations are English
    return EvaluationSet(
        source,
        TextColumns(args.audio_column_name, text),
        language,
        task,
        normaliser(args.normalizer, spoken, whisper.tokenizer),
        one_language=of_rows is not None,
    )


def _language_of_rows(source: Source) -> str | None:
    if LANGUAGE_COLUMN not in source.column_names or not source.units:
        return None
    return next((row[LANGUAGE_COLUMN] for row in source.rows(0, [LANGUAGE_COLUMN])), None)


class Evaluator:
    """Evaluates a model on one split after another. Every process calls it, the main one gets the figures.

    longest: samples that a recording may have, None for any length; limit: rows of a split, None for all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        whisper: LoadedWhisper,
        transcriber: Transcriber,
        num_workers: int,
        longest: int | None = None,
        limit: int | None = None,
    ):
        self.accelerator = accelerator
        self.whisper = whisper
        self.transcriber = transcriber
        self.num_workers = num_workers
        self.longest = longest
        self.share = RowShare(accelerator.process_index, accelerator.num_processes, limit)
        self.is_warm = False

    def __call__(self, split: EvaluationSet) -> tuple[dict, list[dict]]:
        """Figures of a split, and its predictions in the order of the rows; both are empty but on the main process.

        Raises UserError if the split cannot be read, or holds several languages where only its rows name one.
        """
        tally = Tally()
        with progress.bar(total=split.source.num_rows, desc=split.source.label, unit="row", leave=False) as shown:
            for batch in self._batches(split, tally.problems):
                self._transcribe(batch, split, tally)
                shown.update(len(batch) * self.share.processes)
        cold = not self.is_warm and len(tally.calls) > 0
        self.is_warm = self.is_warm or cold
        timed = tally.calls[1:] if cold and len(tally.calls) > 1 else tally.calls
        found = Tally(gather_object(tally.predictions), gather_object(tally.problems), gather_object(timed))
        if not self.accelerator.is_main_process:
            return {}, []
        rows = [row for _, row in sorted(found.predictions, key=lambda entry: entry[0])]
        return figures(split, rows, found), rows

    def _batches(self, split: EvaluationSet, problems: list) -> Iterator[list[Recording]]:
        """Recordings that can be transcribed, as many as are worth a call; the others go to the problems."""
        rate = self.whisper.window.sampling_rate
        recordings = Recordings(split.source, split.columns, rate, self.longest, self.share)
        batch: list[Recording] = []
        for recording in DataLoader(recordings, batch_size=None, **workers(self.num_workers)):
            if isinstance(recording, UserError):
                raise recording
            if recording.problem is not None:
                problems.append((recording.place, recording.row_id, recording.problem))
                continue
            if split.one_language:
                self._check_language(recording, split)
            batch.append(recording)
            if self.transcriber.is_full([entry.samples for entry in batch]):
                yield batch
                batch = []
        if batch:
            yield batch

    def _check_language(self, recording: Recording, split: EvaluationSet) -> None:
        found = self.whisper.grammar.language_code(recording.language) if recording.language else None
        if found != split.language:
            raise UserError(
                f"{split.source.label} holds several languages ({split.language}, but {found} in {recording.row_id}); "
                "give --language to take them all as one, or evaluate them apart"
            )

    def _transcribe(self, batch: list[Recording], split: EvaluationSet, tally: Tally) -> None:
        waveforms = [recording.samples for recording in batch]
        began = self._now()
        transcripts = self.transcriber(waveforms, split.language, split.task)
        took = self._now() - began
        seconds = [len(waveform) / self.whisper.window.sampling_rate for waveform in waveforms]
        tally.calls.append((sum(seconds), took))
        for recording, transcript, duration in zip(batch, transcripts, seconds, strict=True):
            row = prediction(recording, transcript, split.normaliser)
            tally.predictions.append((recording.place, {**row, "seconds": round(duration, 3)}))

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def prediction(recording: Recording, transcript: Transcript, normalise: Normaliser) -> dict:
    """One line of the predictions: what was said, what was heard, and the normalised word errors."""
    errors = word_errors(normalise(recording.reference), normalise(transcript.text))
    return {
        "row_id": recording.row_id,
        "reference": recording.reference,
        "prediction": transcript.text,
        "errors": errors.errors,
        "reference_words": errors.reference_words,
        "wer": round(errors.rate, 4),
        **transcript.details,
    }


def figures(split: EvaluationSet, rows: list[dict], found: Tally) -> dict:
    """What is reported of a split: rates in percent, counts, what was skipped and why, seconds and RTFx."""
    rates = score([row["prediction"] for row in rows], [row["reference"] for row in rows], split.normaliser)
    audio, compute = (sum(column) for column in zip(*found.calls, strict=True)) if found.calls else (0.0, 0.0)
    skipped = [entry for entry in sorted(found.problems) if entry[2] != TOO_LONG]
    return {
        "dataset": split.source.name,
        "config": split.source.config,
        "split": split.source.split,
        "label": split.source.label,
        "language": split.language,
        "task": split.task,
        **{name: round(value, 4) if name in RATES and value is not None else value for name, value in rates.items()},
        "truncated": sum(row.get("truncated", False) for row in rows),
        "too_long": len(found.problems) - len(skipped),
        "skipped": len(skipped),
        "skipped_rows": [{"row_id": row_id, "reason": reason} for _, row_id, reason in skipped],
        "audio_seconds": round(sum(row["seconds"] for row in rows), 2),
        "timed_audio_seconds": round(audio, 2),
        "timed_compute_seconds": round(compute, 3),
        "rtfx": round(audio / compute, 2) if compute else None,
    }
