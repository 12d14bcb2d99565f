"""Resuming a shard in progress: the windows that were labelled before are passed over, if they are the same ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from distil_whisper.packing import WindowAudio


class OtherWindows(Exception):
    """The input gives other windows than those that were labelled."""


def pass_over(
    windows: Iterator[WindowAudio],
    count: int,
    kept: Iterable[dict],
    left_out: Sequence[str],
    is_row_of: Callable[[dict, WindowAudio], bool],
) -> None:
    """Take the first count windows: each has the next of the kept rows, or its parts are the next ones left out.

    left_out: ids of input rows. Raises OtherWindows where that is not so: rows can be read that could not be, or the
    reverse.
    """
    rows = iter(kept)
    row, taken, passed = next(rows, None), 0, 0
    for window in islice(windows, count):
        parts = [part.row_id for part in window.parts]
        if row is not None and is_row_of(row, window):
            row = next(rows, None)
        elif parts == list(left_out[taken : taken + len(parts)]):
            taken += len(parts)
        else:
            raise OtherWindows
        passed += 1
    if passed < count:
        raise OtherWindows
