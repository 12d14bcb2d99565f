"""Progress bars are for people: they show on the main process, where stderr is a terminal."""

import os
import sys

import datasets
import transformers
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm


def shown() -> bool:
    """Whether this process shows progress bars."""
    return os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()


def bar(iterable=None, **options) -> tqdm:
    """A tqdm bar that shows where bars are shown."""
    return tqdm(iterable, disable=not shown(), dynamic_ncols=True, **options)


def quiet_libraries() -> None:
    """Keep the bars of the libraries away where ours are, and let their warnings through on the main process only."""
    if not shown():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        disable_progress_bars()
    if os.environ.get("RANK", "0") != "0":
        transformers.utils.logging.set_verbosity_error()
        datasets.utils.logging.set_verbosity_error()
