"""What labelling will take, from a short trial: rows, hours of audio, time and disk."""

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from datasets import Features

from distil_whisper.audio import AudioError, duration
from distil_whisper.errors import UserError
from distil_whisper.handoff import shard_writer
from distil_whisper.labelling import Tally, UnitAtWork, UnitLabeller, label_units, most_frequent
from distil_whisper.reading import Source, Unit

TRIAL_UNITS, TRIAL_RUNS, ROWS_LOOKED_AT = 4, 2, 200


@dataclass(frozen=True)
class Plan:
    """Of a split: rows and shards to label, hours of audio, and what one process needs: seconds and bytes of disk; of
    the trial, windows and how many of their labels were truncated."""

    label: str
    rows: int
    shards: int
    hours: float
    seconds: float
    bytes: float
    windows: int = 0
    truncated: int = 0
    unusable: str = ""  # what there was of that among the rows that were looked at

    def lines(self, processes: int, overhead: float) -> list[str]:
        """The plan in words, for so many processes that each need some seconds before and after the work."""
        work = overhead + self.seconds / max(self.shards, 1) * math.ceil(self.shards / processes)
        return [
            f"{self.label}: {self.rows:,} rows, {self.hours:,.2f} hours of audio, {self.shards:,} shards",
            f"  about {_duration(work)} with {processes} process{'es' if processes > 1 else ''}, "
            f"{self.bytes / 1e6:,.1f} MB of disk",
            f"  {self.truncated} of {self.windows} labels truncated in the trial "
            f"({100 * self.truncated / max(self.windows, 1):.1f}%)",
            *([f"  {self.unusable}"] if self.unusable else []),
        ]


def total(plans: list[Plan]) -> Plan:
    """The plan of several splits together."""
    names = ("rows", "shards", "hours", "seconds", "bytes", "windows", "truncated")
    return Plan("in all", *(sum(getattr(plan, name) for plan in plans) for name in names))


def estimate(source: Source, labeller: UnitLabeller, features: Features) -> Plan:
    """Label a few windows of units spread over the source, and reckon from them what all of it takes.

    Where only reading tells how many rows a unit has (streaming), those units are counted, and the others are taken to
    have as many for their size.
    """
    units = len(source.units)
    chosen = sorted({number * units // TRIAL_UNITS for number in range(TRIAL_UNITS)} - {units})
    rows = source.num_rows if source.num_rows is not None else _rows_by_size(source, chosen)
    tallies, took, size, labelled = _trial(source, chosen, labeller, features)
    heard, skipped = sum(t.seconds for t in tallies), [row for tally in tallies for row in tally.skipped]
    if not heard:
        if skipped:
            raise UserError(f"no row of {source.label} that was tried can be labelled ({most_frequent(skipped)})")
        return Plan(source.label, rows, units, 0.0, 0.0, 0.0)
    found = [row for unit in chosen for row in _lengths(source, source.units[unit], labeller.columns.audio)]
    lengths = [row for row in found if isinstance(row, float)]
    audio_seconds = sum(lengths) / max(len(found), 1) * rows
    times = audio_seconds / heard
    unread = [{"reason": row} for row in found if isinstance(row, str)]
    skips = (
        f"{len(unread):,} of {len(found):,} rows looked at cannot be read ({most_frequent(unread)})" if unread else ""
    )
    tried = len(labelled), sum(labelled)
    return Plan(source.label, rows, units, audio_seconds / 3600, took * times, size * times, *tried, skips)


def _rows_by_size(source: Source, chosen: list[int]) -> int:
    """About how many rows there are, from those of some units and the sizes of all; without sizes, all are alike."""
    names = [name for name in source.column_names if name != source.audio_column]
    counted = sum(sum(1 for _ in source.rows(unit, names)) for unit in chosen)
    sizes = [unit.size for unit in source.units]
    if None in sizes or not sum(sizes[unit] for unit in chosen):
        return round(counted * len(sizes) / max(len(chosen), 1))
    return round(counted * sum(sizes) / sum(sizes[unit] for unit in chosen))


def _trial(
    source: Source, units: list[int], labeller: UnitLabeller, features: Features
) -> tuple[list[Tally], float, int, list[bool]]:
    """Label the first windows of units: what became of them, the seconds that took, the bytes of the rows, and whether
    each label was truncated.

    The first of all warm the machine up and are done twice.
    """
    workers = labeller.settings.num_workers
    warm_up = [UnitAtWork(labeller, source, unit, Tally(), most_runs=1) for unit in units[:1]]
    list(label_units(warm_up, lambda *_: None, workers))
    trials = [UnitAtWork(labeller, source, unit, Tally(), most_runs=TRIAL_RUNS) for unit in units]
    truncated: list[bool] = []
    with tempfile.TemporaryDirectory() as folder:
        path, began = Path(folder) / "trial.parquet", time.perf_counter()
        with shard_writer(path, features) as write:

            def keep(_, rows: list[dict] | None) -> None:
                for row in rows or ():
                    write(row)
                    truncated.append(row["truncated"])

            list(label_units(trials, keep, workers))
        took = time.perf_counter() - began
        return [unit.tally for unit in trials], took, path.stat().st_size if path.exists() else 0, truncated


def _lengths(source: Source, unit: Unit, audio_column: str) -> Iterator[float | str]:
    """Seconds of rows of a unit, from the headers of their files, or why they cannot be read.

    The rows are spread over the unit where that does not mean to fetch what lies between them.
    """
    step = 1 if source.streaming else max(math.ceil((unit.rows or 0) / ROWS_LOOKED_AT), 1)
    for row in islice(source.rows(unit.index, [audio_column], step=step), ROWS_LOOKED_AT):
        try:
            yield float(duration(row[audio_column]))
        except AudioError as error:
            yield str(error)


def _duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
