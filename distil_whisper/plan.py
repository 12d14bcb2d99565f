"""What labelling will take, from a short trial: rows, hours of audio, time and disk."""

import io
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import soundfile
from datasets import Features

from distil_whisper.handoff import shard_writer
from distil_whisper.labelling import Tally, UnitAtWork, UnitLabeller, label_units
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

    def lines(self, processes: int, overhead: float) -> list[str]:
        """The plan in words, for so many processes that each need some seconds before and after the work."""
        work = overhead + self.seconds / max(self.shards, 1) * math.ceil(self.shards / processes)
        return [
            f"{self.label}: {self.rows:,} rows, {self.hours:,.2f} hours of audio, {self.shards:,} shards",
            f"  about {_duration(work)} with {processes} process{'es' if processes > 1 else ''}, "
            f"{self.bytes / 1e6:,.1f} MB of disk",
            f"  {self.truncated} of {self.windows} labels truncated in the trial "
            f"({100 * self.truncated / max(self.windows, 1):.1f}%)",
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
    heard, took, size, labelled = _trial(source, chosen, labeller, features)
    if not heard:
        return Plan(source.label, rows, units, 0.0, 0.0, 0.0)
    lengths = [seconds for unit in chosen for seconds in _lengths(source, source.units[unit], labeller.columns.audio)]
    audio_seconds = statistics.fmean(lengths or [0.0]) * rows
    times = audio_seconds / heard
    tried = len(labelled), sum(labelled)
    return Plan(source.label, rows, units, audio_seconds / 3600, took * times, size * times, *tried)


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
) -> tuple[float, float, int, list[bool]]:
    """Label the first windows of units: seconds of audio, the seconds that took, the bytes of the rows, and whether
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
        size = path.stat().st_size if path.exists() else 0
        return sum(unit.tally.seconds for unit in trials), took, size, truncated


def _lengths(source: Source, unit: Unit, audio_column: str) -> Iterator[float]:
    """Seconds of rows of a unit, from the headers of their files; those that cannot be read have none.

    The rows are spread over the unit where that does not mean to fetch what lies between them.
    """
    step = 1 if source.streaming else max(math.ceil((unit.rows or 0) / ROWS_LOOKED_AT), 1)
    for row in islice(source.rows(unit.index, [audio_column], step=step), ROWS_LOOKED_AT):
        audio = row[audio_column]
        try:
            yield soundfile.info(io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"]).duration
        except (RuntimeError, TypeError, OSError):
            yield 0.0


def _duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
