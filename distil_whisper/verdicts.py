"""What the filters say of the rows of map-style datasets: found once by one process, kept, and read by all.

At millions of rows finding it takes hours. It is kept by all that decides it: the data's fingerprint, the arguments,
the tokenizer, the normaliser and the code.
"""

import functools
import hashlib
import importlib.metadata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import Accelerator
from datasets import Dataset

from distil_whisper.engine import Turns
from distil_whisper.errors import UserError
from distil_whisper.filtering import RowFilter, is_kept
from distil_whisper.outputs import OutputFolder, atomic_path
from distil_whisper.progress import bar

FOLDER = "verdicts"  # below the output folder
ROWS_PER_TASK = 5_000
_KEY = b"distil_whisper.key"  # in the metadata of a file of verdicts
_LIBRARIES = ("datasets", "rapidfuzz", "tokenizers", "transformers")  # whose versions may decide a verdict


class Verdicts:
    """What the filters say of each row of a dataset, in order: a table of reasons and, if asked for, lengths."""

    def __init__(self, table: pa.Table):
        reasons = table["reason"].cast(pa.string())
        self.reasons = Counter({found["values"]: found["counts"] for found in pc.value_counts(reasons).to_pylist()})
        keeping = pa.array([reason for reason in self.reasons if is_kept(reason)], pa.string())
        self.kept = np.flatnonzero(pc.is_in(reasons, value_set=keeping))
        self.lengths: np.ndarray | None = None
        if "lengths" in table.column_names:
            lengths = table["lengths"].combine_chunks().flatten().to_numpy().reshape(-1, 2, 2)
            self.lengths = lengths[self.kept]


class VerdictFiles:
    """The verdicts on the datasets of a training, kept in its output folder. Every process makes it and calls it."""

    def __init__(self, folder: OutputFolder, accelerator: Accelerator):
        self.folder = folder
        self._turns = Turns(accelerator)  # whose wait has no limit

    def __call__(self, number: int, rows: Dataset, row_filter: RowFilter, num_proc: int, lengths: bool) -> Verdicts:
        """The verdicts on a dataset of that number (without its audio): those that are kept, else found now."""
        path = self.folder / FOLDER / f"{number}.parquet"
        if self.folder.main:
            key = key_of(rows, row_filter, lengths)
            if _kept_key(path) != key:
                self.folder.claim(FOLDER)
                table = judge(rows, row_filter, num_proc, lengths).replace_schema_metadata({_KEY: key})
                with atomic_path(path) as beside:
                    pq.write_table(table, beside, compression="zstd", write_page_checksum=True)
        self._turns.wait_at(f"{FOLDER} {number}")
        return Verdicts(_read(path))


def judge(rows: Dataset, row_filter: RowFilter, num_proc: int, lengths: bool = False) -> pa.Table:
    """The reason of each row of a dataset (without its audio) and, if asked for, its lengths (see lengths_of).

    Several processes are spawned, not forked: a fork after torch has started its threads can hang for ever.
    """
    spans = [(start, min(start + ROWS_PER_TASK, len(rows))) for start in range(0, len(rows), ROWS_PER_TASK)]
    tasks = [(rows, row_filter, lengths, span) for span in spans]
    workers = min(num_proc, len(tasks))
    options = {"total": len(tasks), "desc": "filtering", "unit": f" x {ROWS_PER_TASK} rows"}
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            parts = list(bar(pool.map(_judge_span, tasks), **options))
    else:
        parts = list(bar(map(_judge_span, tasks), **options))
    reasons = pa.array([reason for part, _ in parts for reason in part], pa.string())
    columns = {"reason": reasons.dictionary_encode()}
    if lengths:
        found = [row for _, part in parts for row in part]
        columns["lengths"] = pa.array(found, pa.list_(pa.int32(), 4))
    return pa.table(columns)


def _judge_span(task) -> tuple[list[str], list[list[int]]]:
    rows, row_filter, lengths, (start, end) = task
    reasons, found = [], []
    for row in rows.select(range(start, end)):
        reasons.append(row_filter(row))
        if lengths:
            found.append(lengths_of(row, row_filter) if is_kept(reasons[-1]) else [0] * 4)
    return reasons, found


def lengths_of(row: dict, row_filter: RowFilter) -> list[int]:
    """The decoder positions that a row takes: without and with timestamps, of each without and with its prompt.

    0 for what trains nothing.
    """
    labeller, columns = row_filter.labeller, row_filter.columns
    row = row_filter.trimmed(row)
    try:
        target = labeller.target(row, columns)
    except UserError:  # of a label that cannot be read
        return [0] * 4
    kinds = [(timestamps, prompted) for timestamps in (False, True) for prompted in (False, True)]
    sequences = [labeller.variant(row, columns, target, *kind) for kind in kinds]
    return [len(sequence.labels) if sequence else 0 for sequence in sequences]


def key_of(rows: Dataset, row_filter: RowFilter, lengths: bool) -> str:
    """A digest of all that decides the verdicts on a dataset."""
    grammar = row_filter.labeller.grammar
    decides = [rows._fingerprint, len(rows), row_filter.settings, row_filter.columns, row_filter.normalisers.name]
    decides += [grammar.fingerprint, grammar.multilingual, grammar.max_positions, lengths, code_version()]
    return hashlib.blake2b(repr(decides).encode(), digest_size=16).hexdigest()


@functools.cache
def code_version() -> str:
    """A digest of this package's sources, and the versions of the libraries that it decides with."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    return f"{digest.hexdigest()}, {versions}"


def _kept_key(path: Path) -> str | None:
    """The key of a file of verdicts, None where there is none that can be read to its end."""
    try:
        return _read(path).schema.metadata[_KEY].decode()
    except (OSError, pa.ArrowInvalid, TypeError, KeyError):
        return None


def _read(path: Path) -> pa.Table:
    return pq.read_table(path, page_checksum_verification=True)
