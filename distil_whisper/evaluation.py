"""Evaluation on transcribed speech: recordings are transcribed and timed, split by split, and kept batch by batch."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from distil_whisper import progress
from distil_whisper.arguments import MOST_BEAMS, DataFields, RunFields, option, split_plus
from distil_whisper.batch_log import BatchLog, Timing
from distil_whisper.engine import share_folder
from distil_whisper.errors import UserError
from distil_whisper.mixing import workers
from distil_whisper.models import LoadedWhisper, load_whisper, weights_digest
from distil_whisper.normalisation import Normaliser, normaliser
from distil_whisper.outputs import RECORDS, OutputFolder, check_apart
from distil_whisper.reading import Source
from distil_whisper.recordings import LANGUAGE_COLUMN, Place, Recording, Recordings, RowShare, TextColumns, decoded
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
    hub_model_id: str | None = option(
        None, "The model's repository on the Hub. Default: the name of the model.", only_with={"push_to_hub": True}
    )


NO_FIGURE = {  # arguments that decide no transcript and no timing, or that a split knows better
    *(argument.name for argument in (*fields(RunFields), *fields(DataFields)) if argument.name != "seed"),
    *("push_to_hub", "hub_model_id", "cache_dir", "normalizer", "model_name_or_path", "language", "task"),
    *("dataset_name", "dataset_config_name", "dataset_split_name", "text_column_name"),
}


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

    def __call__(
        self, waveforms: list[np.ndarray], language: str | None, task: str | None, names: list[str]
    ) -> list[Transcript]:
        """One transcript for each recording, by the names (row ids) of the recordings the same again."""


def check_arguments(args) -> None:
    """Raise UserError for what an evaluation lacks, and for an output folder in a dataset's."""
    for name, what in (("model_name_or_path", "the model"), ("dataset_name", "the data")):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing; name {what} to evaluate")
    check_apart(args.output_dir, split_plus(args.dataset_name))


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


def model_digest(whisper: LoadedWhisper) -> str:
    """A digest of all of a checkpoint that decides what it writes."""
    settings = whisper.model.generation_config.to_json_string() + whisper.feature_extractor.to_json_string()
    parts = (weights_digest(whisper.model), whisper.grammar.fingerprint, settings)
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()


def evaluation_key(args, model: str, split: EvaluationSet, device: str) -> str:
    """What tells apart evaluations of which the transcripts or the speed may differ; model is its digest."""
    source = split.source
    known = {
        "arguments": {name: value for name, value in asdict(args).items() if name not in NO_FIGURE},
        "model": model,
        "device": device,
        "data": [
            source.location,
            source.config,
            source.split,
            *(source.contents(unit.index) for unit in source.units),
        ],
        "columns": asdict(split.columns),
        "told": [split.language, split.task],
    }
    return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=8).hexdigest()


def device_name(accelerator: Accelerator) -> str:
    """What the figures of speed hold for."""
    return torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"


def open_logs(
    args, folder: OutputFolder, accelerator: Accelerator, whisper: LoadedWhisper, splits: list[EvaluationSet]
) -> list[BatchLog]:
    """What was transcribed of each split before, by the same model in the same way. Every process calls it."""
    keys: list = [None] * len(splits)
    if accelerator.is_main_process:
        model, device = model_digest(whisper), device_name(accelerator)
        keys = [evaluation_key(args, model, split, device) for split in splits]
    keys = broadcast_object_list(keys)
    for key, split in zip(keys, splits, strict=True):
        if keys.count(key) > 1:
            raise UserError(f"--dataset_name lists {split.source.label} {keys.count(key)} times; leave the others out")
    batches = folder / f"{RECORDS}/{folder.stage}.batches"
    folder.claim(str(batches.relative_to(folder.path)))
    logs = [BatchLog(batches / key, accelerator.process_index) for key in keys]
    accelerator.wait_for_everyone()  # all have read what there is before one writes
    share_folder(folder, accelerator)
    return logs


class Evaluator:
    """Transcribes one split after another, the share of this process of what is left of each.

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

    def __call__(self, split: EvaluationSet, log: BatchLog) -> None:
        """Transcribe what the log has not of a split, and add it.

        Raises UserError if the split cannot be read, or holds several languages where only its rows name one.
        """
        if log.is_finished:
            return
        done, problems = log.before.done, []
        shown = {"total": split.source.num_rows, "initial": len(done), "desc": split.source.label}
        with progress.bar(**shown, unit="row", leave=False) as bar:
            for batch in self._batches(split, done, problems):
                rows, failed, timing = self._transcribe(batch, split)
                problems += failed
                log.append(rows, problems, timing)
                problems.clear()
                bar.update(len(batch) * self.share.processes)
        if problems:
            log.append([], problems)

    def _batches(self, split: EvaluationSet, done: frozenset[Place], problems: list) -> Iterator[list[Recording]]:
        """Recordings that can be transcribed, as many as are worth a call; the others go to the problems."""
        rate = self.whisper.window.sampling_rate
        recordings = Recordings(split.source, split.columns, replace(self.share, done=done))
        rows = DataLoader(recordings, batch_size=None, **workers(self.num_workers))
        batch: list[Recording] = []
        for recording in decoded(rows, rate, self.longest, self.num_workers):
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

    def _transcribe(self, batch: list[Recording], split: EvaluationSet) -> tuple[list, list, Timing]:
        """The rows of a batch with what was heard, the problems of those where nothing was, and what that took."""
        waveforms = [recording.samples for recording in batch]
        names = [recording.row_id for recording in batch]
        began = self._now()
        transcripts = self.transcriber(waveforms, split.language, split.task, names)
        took = self._now() - began
        seconds = [len(waveform) / self.whisper.window.sampling_rate for waveform in waveforms]
        timing = Timing(sum(seconds), took, warm_up=not self.is_warm)
        self.is_warm = True
        pairs = list(zip(batch, transcripts, seconds, strict=True))
        rows = [(of.place, transcribed(of, heard, duration)) for of, heard, duration in pairs if not heard.problem]
        failed = [(of.place, of.row_id, heard.problem) for of, heard, _ in pairs if heard.problem]
        return rows, failed, timing

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def transcribed(recording: Recording, transcript: Transcript, seconds: float) -> dict:
    """A row as the log keeps it: what was said, what was heard and what else is known of it."""
    heard = {"row_id": recording.row_id, "reference": recording.reference, "prediction": transcript.text}
    return {**heard, **transcript.details, "seconds": round(seconds, 3)}
