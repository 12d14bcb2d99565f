"""Pseudo-labelling of one unit of a dataset: rows in, windows to the teacher, labelled rows out, in order."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TypeVar

import torch
from transformers.models.whisper.tokenization_whisper import TASK_IDS

from distil_whisper import packing
from distil_whisper.alignment import Errors, utterance_errors, worst
from distil_whisper.audio import AudioError, Window, decode, decoded_size, encode, rate_of, stack
from distil_whisper.decoding import NOT_FINITE, Decoded, Decoder
from distil_whisper.earlier_rows import EarlierRows
from distil_whisper.errors import UserError
from distil_whisper.mixing import batched
from distil_whisper.models import LoadedWhisper
from distil_whisper.normalisation import Normaliser, is_spaceless
from distil_whisper.packing import Utterance, WindowAudio
from distil_whisper.prefetch import prefetch
from distil_whisper.reading import Source
from distil_whisper.resuming import pass_over
from distil_whisper.tokens import compression_ratio, plain_text

RUN_BATCHES = 8  # the windows of so many batches are sorted by what they cost, and then put back in order
RUN_WINDOWS = 512  # but not of more: up to three runs are in memory
SAME_S = 1e-3  # durations that differ by less are equal


@dataclass(frozen=True)
class Columns:
    """The columns of the source by their role; None where there is none."""

    audio: str
    text: str | None = None
    id: str | None = None
    speaker: str | None = None
    recording: str | None = None
    language: str | None = None
    task: str | None = None

    @property
    def owner(self) -> str | None:
        """What tells whose utterance it is: the recording, else the speaker."""
        return self.recording or self.speaker

    def kept_in_windows(self) -> list[str]:
        """The columns that packed and cut windows keep, beside those that labelling writes."""
        names = (self.audio, self.text, self.id, self.speaker, self.recording)
        return list(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True)
class LabellingSettings:
    """How windows are made and what is written of them. language and task are for rows that do not name their own."""

    language: str | None
    task: str | None
    concatenate: bool
    split_long: bool
    decode_token_ids: bool
    batch_size: int
    num_workers: int
    run_batches: int = RUN_BATCHES
    draft_from_text: bool = False
    max_window_seconds: float | None = None  # of packed and split windows; None: all that the model takes


@dataclass
class Tally:
    """What became of a unit's rows: windows labelled and their seconds; rows read, and those skipped; of the last
    window of each recording what the teacher was told and its tokens, null where it was truncated. left_out: windows
    that the teacher could not label, whose rows were skipped. kept: the labelled rows, where an earlier run labelled
    them. earlier: rows that were labelled before, of which the whole ones stay; decoded_seconds: of the windows that
    did not."""

    rows: int = 0
    seconds: float = 0.0
    read: int = 0
    skipped: list[dict] = field(default_factory=list)
    previous: dict[str, list | None] = field(default_factory=dict)
    left_out: int = 0
    kept: Iterable[dict] = field(default=(), compare=False)
    earlier: EarlierRows = EarlierRows()
    decoded_seconds: float = field(default=0.0, compare=False)

    def skip(self, reason: str, **row: str | None) -> None:
        """Note a row that cannot be labelled, and what is known of it."""
        self.skipped.append({**{name: value for name, value in row.items() if value is not None}, "reason": reason})

    def progress(self) -> dict:
        """What it takes to go on behind the windows that are labelled; the rest is found again by reading."""
        found = {"rows": self.rows, "seconds": self.seconds, "previous": self.previous, "left_out": self.left_out}
        return {**found, "skipped": [row for row in self.skipped if row["reason"] == NOT_FINITE]}


def most_frequent(skipped: Iterable[dict]) -> str:
    """The reasons for which most of the rows were skipped, without what is particular to each row."""
    kinds = Counter(re.split(r"[:(]", row["reason"])[0].strip() for row in skipped)
    return ", ".join(f"{count:,} x {kind}" for kind, count in kinds.most_common(3))


def expected_lengths(windows: Sequence[WindowAudio], texts: Sequence[str | None]) -> list[float]:
    """What the lengths of labels go with: those of the transcripts, where there is none as much as its audio lets
    expect, at the rate of the others."""
    known = [(len(text), len(window.samples)) for text, window in zip(texts, windows, strict=True) if text]
    rate = sum(length for length, _ in known) / sum(samples for _, samples in known) if known else 1
    return [len(text or "") or rate * len(window.samples) for text, window in zip(texts, windows, strict=True)]


def decode_windows(
    decoder: Decoder,
    windows: Sequence[WindowAudio],
    lengths: Sequence[float],
    size: Window,
    batch_size: int,
    texts: Sequence[str | None] | None = None,
) -> list[Decoded]:
    """What the teacher says of each window: those told the same thing and of like expected length go together.

    texts: what they probably say, for a decoder that reads drafts.
    """
    results: dict[int, Decoded] = {}
    order = sorted(range(len(windows)), key=lambda place: (windows[place].told, lengths[place]))
    for told, places in groupby(order, key=lambda place: windows[place].told):
        for batch in batched(places, batch_size):
            samples = [windows[place].samples for place in batch]
            waveforms = stack(samples, size, pinned=torch.cuda.is_available())
            drafts = {} if texts is None else {"texts": [texts[place] for place in batch]}
            results.update(zip(batch, decoder(waveforms, *told, **drafts), strict=True))
    return [results[place] for place in range(len(windows))]


class UnitLabeller:
    """Labels units of a source with a teacher. Batches, packing and prompts never cross a unit, so neither the number
    of processes nor a resume changes a row."""

    def __init__(
        self,
        whisper: LoadedWhisper,
        decoder: Decoder,
        columns: Columns,
        settings: LabellingSettings,
        normalisers: Callable[[str | None], Normaliser],
        renamed: dict[str, str],
    ):
        self.whisper = whisper
        self.decoder = decoder
        self.columns = columns
        self.settings = settings
        self.normalisers = normalisers
        self.renamed = renamed

    def runs(self, source: Source, unit: int, tally: Tally) -> Iterator[list[WindowAudio]]:
        """The windows of a unit in order, some batches at a time; rows that are left out are noted in tally.

        A tally that has labelled windows makes it begin after them. Raises OtherWindows if those are others now.
        """
        left_out = [row.get("row_id") for row in tally.skipped]
        windows = tally.earlier.beside(self.windows(source, unit, tally), self._is_row_of)
        pass_over(windows, tally.rows + tally.left_out, tally.kept, left_out, self._is_row_of)
        ready = prefetch(self._with_file, windows, self.settings.num_workers)
        return batched(ready, self.settings.run_batches * self.settings.batch_size)

    def rows(self, run: Sequence[WindowAudio], results: Sequence[Decoded], tally: Tally) -> list[dict]:
        """The labelled rows of the next run of a unit, which are counted in tally; results are of what was decoded."""
        rows, results = [], iter(results)
        for window in run:
            prompt = self._prompt(window, tally)
            if window.is_labelled:
                rows.append({**window.earlier, "condition_on_prev": prompt})
                tally.previous.pop(window.recording_id, None)  # what it is to the next window, it was before
                continue
            result = next(results)
            if result.problem is not None:
                self._leave_out(window, result.problem, tally)
                continue
            rows.append(self.row(window, result, prompt))
            tally.decoded_seconds += rows[-1]["duration"]
            if self.columns.owner or window.cut:
                spoken = [list(window.told), self.decoder.grammar.spoken(result.ids)]
                tally.previous[window.recording_id] = None if result.truncated else spoken
        tally.rows += len(rows)
        tally.seconds += sum(row["duration"] for row in rows)
        return rows

    def _prompt(self, window: WindowAudio, tally: Tally) -> list[int] | None:
        """The tokens of the window before, of the same recording; None where they are no prompt of this one."""
        before, recording = tally.previous, window.recording_id
        if window.after_gap:
            return None
        if recording not in before and window.earlier is not None:
            return window.earlier["condition_on_prev"]  # nothing before it has changed
        at_the_end = {} if window.in_between else tally.earlier.previous
        told, said = before.get(recording, at_the_end.get(recording)) or (None, None)
        return said if told == list(window.told) else None

    def _is_row_of(self, row: dict, window: WindowAudio) -> bool:
        """Whether a labelled row is of a window: of the same utterances, and as long."""
        seconds = len(window.samples) / self.whisper.window.sampling_rate
        same = row["row_id"] == window.row_id and row["utterance_ids"] == self._utterance_ids(window)
        return same and abs(row["duration"] - seconds) < SAME_S

    def _leave_out(self, window: WindowAudio, problem: str, tally: Tally) -> None:
        """Skip the rows of a window that the teacher could not label; the next window has no prompt."""
        tally.left_out += 1
        tally.previous[window.recording_id] = None
        for part in window.parts:
            tally.skip(problem, row_id=part.row_id, **self._identity(part.row))

    def _identity(self, row: dict) -> dict[str, str | None]:
        """What names a row beside its place: its id and its file, as far as it has them."""
        identity = self.columns.id
        return {"id": str(row[identity]) if identity else None, "file": row[self.columns.audio].get("path")}

    def decoded(self, run: Sequence[WindowAudio]) -> list[Decoded]:
        """What the teacher says of each window whose label is not there."""
        run = [window for window in run if not window.is_labelled]
        texts = [self._spoken_text(window) for window in run]
        drafts = texts if self.settings.draft_from_text else None
        lengths = expected_lengths(run, texts)
        return decode_windows(self.decoder, run, lengths, self.whisper.window, self.settings.batch_size, drafts)

    def _spoken_text(self, window: WindowAudio) -> str | None:
        """The transcript of what is to be written of a window, if there is one."""
        known = window.told[1] != "translate" and all(isinstance(text, str) for text in self._texts(window))
        return self._joined_text(window) if known else None

    def windows(self, source: Source, unit: int, tally: Tally) -> Iterator[WindowAudio]:
        """The windows that a unit's rows make."""
        size, rate = self.whisper.window.samples, self.whisper.window.sampling_rate
        if self.settings.max_window_seconds is not None:
            size = min(size, int(self.settings.max_window_seconds * rate))
        utterances = self.utterances(source, unit, tally)
        if self.settings.split_long:
            cut = (packing.split(u, size, rate) if len(u.samples) > size else [packing.single(u)] for u in utterances)
            if not self.settings.concatenate:
                return chain.from_iterable(cut)
            return self._packed_between_long(utterances, size, rate)
        return packing.pack(utterances, size) if self.settings.concatenate else map(packing.single, utterances)

    def _packed_between_long(self, utterances: Iterable[Utterance], size: int, rate: int) -> Iterator[WindowAudio]:
        """Short utterances packed; a long one closes the windows before it and is cut."""
        for fits, run in groupby(utterances, lambda utterance: len(utterance.samples) <= size):
            if fits:
                yield from packing.pack(run, size)
                continue
            for utterance in run:
                yield from packing.split(utterance, size, rate)

    def utterances(self, source: Source, unit: int, tally: Tally) -> Iterator[Utterance]:
        """A unit's rows with their audio decoded, in order; rows that cannot be labelled are noted and left out.

        Threads decode ahead: soundfile and soxr do not hold the interpreter's lock.
        """
        gaps: set[str] = set()
        rows = ((source.row_id(unit, number), row) for number, row in enumerate(source.rows(unit)))
        workers = self.settings.num_workers
        for row_id, row, samples, told, problem in prefetch(self._decoded, rows, workers, self._size):
            tally.read += 1
            recording = self._recording(row) or row_id
            if problem is not None:
                tally.skip(problem, row_id=row_id, **self._identity(row))
                gaps.add(recording)
                continue
            yield Utterance(row_id, recording, row, samples, told, recording in gaps)
            gaps.discard(recording)

    def _size(self, item: tuple[str, dict]) -> int:
        """About how many bytes a row takes that is decoded."""
        return decoded_size(item[1][self.columns.audio], self.whisper.window.sampling_rate)

    def _recording(self, row: dict) -> str | None:
        """The recording or speaker of a row; None where nobody is named: null, NaN or nothing but spaces."""
        value = row[self.columns.owner] if self.columns.owner else None
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        return str(value) if str(value).strip() else None

    def _decoded(self, item: tuple[str, dict]) -> tuple:
        """A row's id, the row, its samples, what the teacher is told, and why it cannot be labelled, if so."""
        row_id, row = item
        window = self.whisper.window
        try:
            told = self._told(row)
            samples = decode(row[self.columns.audio], window.sampling_rate)
        except (AudioError, UserError) as error:
            return row_id, row, None, None, str(error)
        if len(samples) > window.samples and not self.settings.split_long:
            found = f"{len(samples) / window.sampling_rate:.2f} s of audio, the window is {window.seconds:g} s"
            return row_id, row, None, None, f"longer than the window: {found}"
        return row_id, row, samples, told, None

    def _told(self, row: dict) -> tuple[str | None, str | None]:
        """The language and the task of a row: its own, else those of the run. Raises UserError where it has none."""
        language, task = (row[name] if name else None for name in (self.columns.language, self.columns.task))
        language = self.decoder.grammar.language_code(language) if language else self.settings.language
        if language is None and self.decoder.grammar.multilingual:
            raise UserError(f"no language in column {self.columns.language}")
        if task and task not in TASK_IDS:
            raise UserError(f"the task {task!r} is not one of {', '.join(sorted(TASK_IDS))}")
        return language, task or self.settings.task

    def row(self, window: WindowAudio, decoded: Decoded, prompt: list[int] | None) -> dict:
        """One row of the hand-off dataset."""
        grammar = self.decoder.grammar
        transcript = grammar.decode(decoded.ids)
        spoken = plain_text(transcript)
        return {
            **self._kept(window),
            "whisper_transcript": transcript,
            "whisper_token_ids": None if self.settings.decode_token_ids else grammar.spoken(decoded.ids),
            "tokenizer_fingerprint": grammar.fingerprint,
            "condition_on_prev": prompt,
            "language": window.told[0],
            "task": window.told[1],
            "detected_language": decoded.language,
            "row_id": window.row_id,
            "recording_id": window.recording_id,
            "window_start": window.window_start,
            **self._parts(window),
            "truncated": decoded.truncated,
            **self._errors(window, spoken),
            "avg_logprob": round(decoded.avg_logprob, 4),
            "no_speech_prob": round(decoded.no_speech_prob, 4),
            "compression_ratio": round(compression_ratio(spoken), 4),
            "duration": round(len(window.samples) / self.whisper.window.sampling_rate, 4),
        }

    def _with_file(self, window: WindowAudio) -> WindowAudio:
        """The window with its audio as FLAC, where it was joined or cut and is to be labelled."""
        if window.is_labelled or (not window.cut and not self.settings.concatenate):
            return window
        return replace(window, flac=encode(window.samples, self.whisper.window.sampling_rate))

    def _kept(self, window: WindowAudio) -> dict:
        """The columns of the source. Audio is the bytes that came, where they were not joined or cut."""
        first = window.parts[0].row
        if window.flac is None:
            return {
                self.renamed[name]: _stored(value) if name == self.columns.audio else value
                for name, value in first.items()
                if name in self.renamed
            }
        columns = self.columns
        kept = {self.renamed[name]: first[name] for name in columns.kept_in_windows() if name in self.renamed}
        kept[self.renamed[columns.audio]] = {"bytes": window.flac, "path": None}
        if columns.text is not None:
            kept[self.renamed[columns.text]] = self._joined_text(window)
        return kept

    def _texts(self, window: WindowAudio) -> list[str | None]:
        """The transcript of each part; of a cut recording nobody knows which words are in which window."""
        known = self.columns.text is not None and not window.cut
        return [part.row[self.columns.text] if known else None for part in window.parts]

    def _joined_text(self, window: WindowAudio) -> str | None:
        texts = self._texts(window)
        return None if None in texts else ("" if is_spaceless(window.told[0]) else " ").join(texts)

    def _utterance_ids(self, window: WindowAudio) -> list[str] | None:
        """The ids of the parts of a packed window, None for another window."""
        if not self.settings.concatenate or window.cut:
            return None
        id_column = self.columns.id
        return [str(part.row[id_column]) if id_column else part.row_id for part in window.parts]

    def _parts(self, window: WindowAudio) -> dict:
        ids, rate = self._utterance_ids(window), self.whisper.window.sampling_rate
        if ids is None:
            return {"utterance_ids": None, "utterance_starts": None, "utterance_texts": None}
        starts = [start / rate for start in window.starts]  # not rounded: each gives back its sample
        return {"utterance_ids": ids, "utterance_starts": starts, "utterance_texts": self._texts(window)}

    def _errors(self, window: WindowAudio, spoken: str) -> dict:
        """Word errors of the teacher, null without a transcript and for a translation."""
        texts = self._texts(window)
        names = ("wer", "errors", "reference_words", "utterance_wer", "normalizer")
        language, task = window.told
        if None in texts or task == "translate":
            return dict.fromkeys(names)
        normaliser = self.normalisers(language)
        pairs = utterance_errors(texts, spoken, normaliser)
        whole = sum(pairs, Errors(0, 0))
        rates = [round(pair.rate, 4) for pair in pairs] if self.settings.concatenate else None
        return dict(
            zip(
                names,
                (round(worst(pairs).rate, 4), whole.errors, whole.reference_words, rates, normaliser.name),
                strict=True,
            )
        )


@dataclass
class UnitAtWork:
    """A unit while it is labelled, or so many runs of it."""

    labeller: UnitLabeller
    source: Source
    index: int
    tally: Tally
    most_runs: int | None = None
    problem: str | None = None  # why the rest of it cannot be read

    def runs(self) -> Iterator[list[WindowAudio]]:
        """What is to be decoded of it."""
        return islice(self.labeller.runs(self.source, self.index, self.tally), self.most_runs)


AnyUnit = TypeVar("AnyUnit", bound=UnitAtWork)


def label_units(
    units: Iterable[AnyUnit], write: Callable[[AnyUnit, list[dict] | None], object], workers: int
) -> Iterator[AnyUnit]:
    """Label units in order; yields a unit after each of its runs and at its end.

    write is given a unit and the rows of a run, and None at the unit's end, which may be a problem. With workers,
    reading and writing have threads beside the decoding: of the run that comes next, of the next unit too, and of
    the run before. Closed early, it waits for what is being written.
    """

    def finish(unit: AnyUnit, run: list[WindowAudio] | None, results: list[Decoded]) -> None:
        write(unit, None if run is None else unit.labeller.rows(run, results, unit.tally))

    def read() -> Iterator[tuple[AnyUnit, list[WindowAudio] | None]]:
        for unit in units:
            try:
                for run in unit.runs():
                    yield unit, run
            except UserError as error:
                unit.problem = str(error)
            yield unit, None

    with _Behind(workers) as behind:
        for unit, run in _one_ahead(read(), workers):
            behind(finish, unit, run, [] if run is None else unit.labeller.decoded(run))
            yield unit


class _Behind:
    """Calls functions in order, each on a thread while the caller goes on to the next; without workers, at once.

    An error comes out of the next call, or at the end of the block.
    """

    def __init__(self, workers: int):
        self._pool = ThreadPoolExecutor(1) if workers > 0 else None
        self._last: Future | None = None

    def __call__(self, function: Callable, *arguments) -> None:
        if self._pool is None:
            function(*arguments)
            return
        self._wait()
        self._last = self._pool.submit(function, *arguments)

    def __enter__(self) -> "_Behind":
        return self

    def __exit__(self, kind, *_) -> None:
        if self._pool is None:
            return
        with self._pool:
            if kind in (None, GeneratorExit):
                self._wait()

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _one_ahead(items: Iterator, workers: int) -> Iterator:
    """The items, each one got ready by a thread while the one before it is worked on; without workers, none is."""
    if workers < 1:
        yield from items
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _stored(audio: dict) -> dict:
    """Audio as a row of the dataset keeps it: its bytes, and the name of its file without the folders; samples as a
    FLAC file at their rate."""
    if audio.get("array") is not None:
        rate = rate_of(audio)
        return {"bytes": encode(decode(audio, rate), rate), "path": None}
    data = audio["bytes"] if audio["bytes"] is not None else Path(audio["path"]).read_bytes()
    return {"bytes": data, "path": Path(audio["path"]).name if audio["path"] else None}
