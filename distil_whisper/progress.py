"""Progress bars are for people: they show on the main process, where stderr is a terminal."""

import os
import sys
import time

import datasets
import transformers
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from distil_whisper.engine import Turns


def shown() -> bool:
    """Whether this process shows progress bars."""
    return os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()


def bar(iterable=None, **options) -> tqdm:
    """A tqdm bar that shows where bars are shown."""
    return tqdm(iterable, disable=not shown(), dynamic_ncols=True, **options)


class Pace:
    """How far the processes of a run have come together, and how fast; total: the rows that there were to label,
    None where only reading tells."""

    def __init__(self, turns: Turns, total: int | None):
        self.turns = turns
        self.began = time.monotonic()
        self.bar = bar(total=total, unit="row")
        self.rows, self.seconds = 0, 0.0

    def __enter__(self) -> "Pace":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def add(self, rows: int, seconds: float, name: str) -> None:
        """Count rows that were read and seconds of audio that were labelled; name is what is worked on."""
        self.rows = self.turns.count("rows", rows)
        self.seconds = self.turns.count("milliseconds", round(1000 * seconds)) / 1000
        self.bar.set_description(name, refresh=False)
        self.bar.set_postfix_str(f"{self.speed:,.0f} s of audio a second", refresh=False)
        self.bar.update(self.rows - self.bar.n)

    @property
    def speed(self) -> float:
        """Seconds of audio a second."""
        return self.seconds / (time.monotonic() - self.began)

    def metrics(self) -> dict[str, float]:
        """For the trackers."""
        return {"rows": self.rows, "audio_hours": self.seconds / 3600, "audio_seconds_per_second": self.speed}

    def __str__(self) -> str:
        rows = f"{self.rows:,} rows" if self.bar.total is None else f"{self.rows:,} of {self.bar.total:,} rows"
        return f"{rows}, {self.seconds / 3600:,.2f} hours of audio, {self.speed:,.0f} s of audio a second"


def quiet_libraries() -> None:
    """Keep the bars of the libraries away where ours are, and let their warnings through on the main process only."""
    if not shown():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        disable_progress_bars()
    if os.environ.get("RANK", "0") != "0":
        transformers.utils.logging.set_verbosity_error()
        datasets.utils.logging.set_verbosity_error()
