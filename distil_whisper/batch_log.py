"""What an evaluation has transcribed: a line for each batch, so that a killed run loses the batch in work alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distil_whisper.outputs import write_text
from distil_whisper.recordings import TOO_LONG, Place

FINISHED = "finished"


@dataclass(frozen=True)
class Timing:
    """What a batch took. warm_up: it was the first of its process."""

    audio_seconds: float
    compute_seconds: float
    warm_up: bool = False


@dataclass
class Transcribed:
    """What is known of a split's rows, by their places: transcripts; row id and reason of those that have none."""

    rows: dict[Place, dict] = field(default_factory=dict)
    problems: dict[Place, tuple[str, str]] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)

    @property
    def done(self) -> frozenset[Place]:
        """The rows that need not be read again. One that could not be read may be mended by now."""
        return frozenset((*self.rows, *(place for place, (_, why) in self.problems.items() if why == TOO_LONG)))

    def add(self, batch: dict) -> None:
        """Take in a line of the log."""
        self.rows |= {tuple(place): row for place, row in batch["rows"]}
        for place, row_id, reason in batch["problems"]:
            self.problems[tuple(place)] = row_id, reason
        if batch["timing"] is not None:
            self.timings.append(Timing(**batch["timing"]))


class BatchLog:
    """The batches of one split as one model transcribes them, below a folder of their own.

    Every process appends to a file of its own, and reads those of all. `before` is what earlier runs had transcribed
    when this one began, with any number of processes.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder = folder
        self.path = folder / f"{rank}.jsonl"
        self.is_finished = (folder / FINISHED).exists()
        self.before = Transcribed() if self.is_finished else self.read()

    @property
    def key(self) -> str:
        """What tells this evaluation of a split apart from others."""
        return self.folder.name

    def append(self, rows: Sequence[tuple[Place, dict]], problems: Sequence[tuple[Place, str, str]], timing=None):
        """Write a batch: its rows, the rows that were left out since the one before, and its Timing.

        A line begins with its line break, so that what a killed run left half written stays a line of its own.
        """
        timing = None if timing is None else vars(timing)
        line = json.dumps({"rows": rows, "problems": problems, "timing": timing}, ensure_ascii=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + line)

    def read(self) -> Transcribed:
        """What all processes have written, this run's included; a line that was left half written is passed over."""
        found = Transcribed()
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open(encoding="utf-8", errors="replace") as lines:
                for batch in filter(None, map(_whole, lines)):
                    found.add(batch)
        found.problems = {place: why for place, why in found.problems.items() if place not in found.rows}
        return found

    def finish(self) -> None:
        """Note that there is nothing left to transcribe."""
        write_text(self.folder / FINISHED, "")


def _whole(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
