"""A shard while it is made: its rows go to disk in parts, so that little is lost when the process is killed."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from distil_whisper.errors import UserError
from distil_whisper.handoff import ROWS_PER_GROUP, ShardFile, shard_writer
from distil_whisper.outputs import RECORDS, OutputFolder, atomic_path, remove, write_text

PARTS = f"{RECORDS}/parts"  # below the output folder


class ShardInProgress:
    """The rows of one unit as they come, and those that an earlier run kept of it.

    `progress` is what was kept last, {} at first; what was kept of other contents of the unit is dropped. Leaving the
    block with an error drops the rows written since then.
    """

    def __init__(self, folder: OutputFolder, shard: ShardFile, features: Features, contents: str | None = None):
        self.folder = folder
        self.shard = shard
        self.features = features
        self.contents = contents
        self.path = folder / f"{PARTS}/{shard.stem}"
        state = self.path / "state.json"
        kept = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {"contents": contents}
        if kept.get("contents") != contents:
            self.forget()
            kept = {}
        kept = {"parts": 0, "progress": {}, **kept}
        self.parts: int = kept["parts"]
        self.progress: dict = kept["progress"]
        self._open = contextlib.ExitStack()
        self._write = None

    def __enter__(self) -> "ShardInProgress":
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    def write(self, row: dict) -> None:
        """Add a row to the part that is open."""
        if self._write is None:
            self._write = self._open.enter_context(shard_writer(self._part(self.parts), self.features))
        self._write(row)

    def keep(self, progress: dict) -> None:
        """End the part: its rows and the progress with them survive a kill from now on."""
        if self._write is not None:
            self._open.close()
            self._write = None
            self.parts += 1
        self.progress = progress
        state = {"contents": self.contents, "parts": self.parts, "progress": progress}
        write_text(self.path / "state.json", json.dumps(state))

    def finish(self, progress: dict) -> None:
        """Join the parts into the shard's file, the same one wherever they end; there is none without rows."""
        self.keep(progress)
        if not self.parts:
            return
        path = self.folder / self.shard.name
        if self.parts == 1:  # it is what joining it would give
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # it was moved before the run was killed
                os.replace(self._part(0), path)
            return
        files = [pq.ParquetFile(self._part(number)) for number in range(self.parts)]
        tables = (pa.Table.from_batches([batch]) for file in files for batch in file.iter_batches(ROWS_PER_GROUP))
        schema = self.features.arrow_schema
        with atomic_path(path) as beside, pq.ParquetWriter(beside, schema) as writer:
            for group in _regrouped(tables, ROWS_PER_GROUP):
                writer.write_table(group.cast(schema).combine_chunks())  # pages end where chunks do

    def drop(self) -> None:
        """Remove all that was written."""
        with contextlib.suppress(UserError), self._open:
            raise UserError("what is not finished is removed as after an error")
        self._write = None
        self.forget()

    def forget(self) -> None:
        """Remove the parts."""
        remove(self.path)

    def _part(self, number: int):
        return self.path / f"{number:05d}.parquet"


def _regrouped(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The rows of tables in tables of so many rows; the last may have fewer."""
    waiting = None
    for table in tables:
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        while waiting.num_rows >= size:
            yield waiting.slice(0, size)
            waiting = waiting.slice(size)
    if waiting is not None and waiting.num_rows:
        yield waiting
