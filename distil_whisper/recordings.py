"""The recordings of an evaluation: rows with transcripts, shared among processes, read by workers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from distil_whisper.audio import Audio, AudioError, decode, decoded_size
from distil_whisper.errors import UserError
from distil_whisper.prefetch import prefetch
from distil_whisper.reading import Source

LANGUAGE_COLUMN = "language"
TOO_LONG = "longer than the window"
Place = tuple[int, int]  # unit of the source, and row in it


@dataclass(frozen=True)
class TextColumns:
    """Where a split keeps its audio and its transcripts."""

    audio: str
    text: str

    def in_source(self, source: Source) -> list[str]:
        """The columns to read, with the one that names the language, if there is one."""
        wanted = (self.audio, self.text, LANGUAGE_COLUMN)
        return [name for name in dict.fromkeys(wanted) if name in source.column_names]


@dataclass(frozen=True)
class Recording:
    """A row that was read: its place, transcript and audio, as stored or as samples (mono), or the problem for which
    there are none."""

    place: Place
    row_id: str
    reference: str = ""
    language: str | None = None
    audio: Audio | None = None
    samples: np.ndarray | None = None
    problem: str | None = None


@dataclass(frozen=True)
class RowShare:
    """Which part of the rows a process takes, the most rows of a split (None: all), and those that need not be read
    again, in this share or in another."""

    rank: int
    processes: int
    limit: int | None = None
    done: frozenset[Place] = frozenset()


class Recordings(IterableDataset):
    """The recordings of one process in order, with their audio as stored, read in the DataLoader's workers.

    What makes the whole split unusable comes as a UserError in place of a recording: a DataLoader would wrap its words
    in a traceback.
    """

    def __init__(self, source: Source, columns: TextColumns, share: RowShare):
        self.source = source
        self.columns = columns
        self.share = share

    def __iter__(self) -> Iterator[Recording | UserError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        known = self.source.num_rows is not None
        try:
            for place, row in self._known_rows(worker, workers) if known else self._streamed_rows(worker, workers):
                yield self._recording(place, row)
        except UserError as error:
            yield error

    def _known_rows(self, worker: int, workers: int) -> Iterator[tuple[Place, dict]]:
        """A run of the rows that are left, where it is known how many there are."""
        share = self.share
        part, parts = share.rank * workers + worker, share.processes * workers
        places = chain.from_iterable(((unit.index, row) for row in range(unit.rows)) for unit in self.source.units)
        left = [place for place in islice(places, share.limit) if place not in share.done]
        mine = left[len(left) * part // parts : len(left) * (part + 1) // parts]
        for unit, of_unit in groupby(mine, key=lambda place: place[0]):
            wanted = [row for _, row in of_unit]
            yield from self._left(self._rows_of(unit, wanted[0], wanted[-1] + 1))

    def _streamed_rows(self, worker: int, workers: int) -> Iterator[tuple[Place, dict]]:
        """Units of its own for every worker; where there are fewer units than processes (or a limit, which counts
        rows of all units), every process reads all rows with one worker and takes those of its turn."""
        share, units = self.share, range(len(self.source.units))
        if share.limit is None and len(units) >= share.processes:
            mine = units[share.rank :: share.processes][worker::workers]
            yield from self._left(chain.from_iterable(map(self._rows_of, mine)))
        elif worker == 0:
            rows = islice(chain.from_iterable(map(self._rows_of, units)), share.limit)
            yield from islice(self._left(rows), share.rank, None, share.processes)

    def _rows_of(self, unit: int, first: int = 0, end: int | None = None) -> Iterator[tuple[Place, dict]]:
        columns = self.columns.in_source(self.source)
        rows = islice(self.source.rows(unit, columns, first), None if end is None else end - first)
        for row, values in enumerate(rows, first):
            yield (unit, row), values

    def _left(self, rows: Iterable[tuple[Place, dict]]) -> Iterator[tuple[Place, dict]]:
        return (row for row in rows if row[0] not in self.share.done)

    def _recording(self, place: Place, row: dict) -> Recording:
        row_id = self.source.row_id(*place)
        reference = row[self.columns.text]
        if not isinstance(reference, str):
            return Recording(place, row_id, problem=f"no transcript in column {self.columns.text}")
        return Recording(place, row_id, reference, row.get(LANGUAGE_COLUMN), row[self.columns.audio])


def decoded(
    recordings: Iterable[Recording | UserError], sampling_rate: int, longest: int | None, workers: int
) -> Iterator[Recording | UserError]:
    """The recordings with their samples, decoded ahead on threads, as many as memory allows.

    sampling_rate in hertz; longest: samples that a recording may have, None for any length.
    """

    def decode_one(recording: Recording | UserError) -> Recording | UserError:
        if isinstance(recording, UserError) or recording.problem is not None:
            return recording
        try:
            samples = decode(recording.audio, sampling_rate)
        except AudioError as error:
            return Recording(recording.place, recording.row_id, problem=str(error))
        if longest is not None and len(samples) > longest:
            return Recording(recording.place, recording.row_id, problem=TOO_LONG)
        return replace(recording, audio=None, samples=samples)

    def size_of(recording: Recording | UserError) -> int:
        return decoded_size(getattr(recording, "audio", None), sampling_rate)

    return prefetch(decode_one, recordings, workers, size_of)
