"""Rows that were labelled with a smaller --max_label_length: whole labels stay, truncated ones are made again."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq

from distil_whisper.packing import WindowAudio

_ROWS_AT_ONCE = 20  # with their audio


@dataclass(frozen=True)
class EarlierRows:
    """The labelled rows of a shard's first windows, in files, in order.

    previous: as `Tally.previous` after the last of them; a finished shard, after which nothing comes, needs none.
    """

    paths: tuple[Path, ...] = ()
    previous: dict[str, list | None] = field(default_factory=dict)

    def beside(
        self, windows: Iterable[WindowAudio], is_row_of: Callable[[dict, WindowAudio], bool]
    ) -> Iterator[WindowAudio]:
        """The windows, each with the row that was labelled of it, if there is one."""
        files = [pq.ParquetFile(path) for path in self.paths]
        ids = chain.from_iterable(file.read(["row_id"])["row_id"].to_pylist() for file in files)
        numbers = {row_id: number for number, row_id in enumerate(ids)}
        batches = (batch.to_pylist() for file in files for batch in file.iter_batches(_ROWS_AT_ONCE))
        rows = enumerate(chain.from_iterable(batches))
        number, row = -1, None
        for window in windows:
            wanted = numbers.get(window.row_id)
            while wanted is not None and number < wanted:
                number, row = next(rows)
            if number == wanted and is_row_of(row, window):
                yield replace(window, earlier=row)
            else:
                yield replace(window, in_between=wanted is not None or number < len(numbers) - 1)
