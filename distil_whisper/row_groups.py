"""Parquet files of any file system, read from any row on: the end of a file tells where its row groups are."""

import bisect
import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

_BYTES_AT_ONCE = 1 << 20  # read of a column; a whole row group of recordings may be very large


def count_rows(path: str) -> int:
    """The rows of a file; none of them is read."""
    filesystem, inside = url_to_fs(path)
    with filesystem.open(inside, "rb") as file:
        return pq.read_metadata(file).num_rows


def tables(path: str, columns: list[str], start: int, size: int) -> Iterator[pa.Table]:
    """The rows of a file from one on, in tables of at most so many; row groups that end before it are not read."""
    filesystem, inside = url_to_fs(path)
    with filesystem.open(inside, "rb") as file, pq.ParquetFile(file, buffer_size=_BYTES_AT_ONCE) as parquet:
        groups = range(parquet.num_row_groups)
        ends = list(itertools.accumulate(parquet.metadata.row_group(group).num_rows for group in groups))
        first = bisect.bisect_right(ends, start)
        start -= ends[first - 1] if first else 0
        for batch in parquet.iter_batches(size, row_groups=list(groups[first:]), columns=columns):
            if start < batch.num_rows:
                yield pa.Table.from_batches([batch]).slice(start).select(columns)
            start = max(start - batch.num_rows, 0)
