"""A shard while it is made: its rows go to disk in parts, so that little is lost when the process is killed."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from distil_whisper.earlier_rows import EarlierRows
from distil_whisper.handoff import LIMIT, ROWS_PER_GROUP, ShardFile, lacks_rows, read_manifest, shard_writer
from distil_whisper.outputs import RECORDS, OutputFolder, atomic_path, remove, write_text
from distil_whisper.reading import is_same_contents

PARTS = f"{RECORDS}/parts"  # below the output folder
STATE = "state.json"


class ShardInProgress:
    """The rows of one unit as they come, and those that an earlier run kept of it.

    `progress` is what was kept last, {} at first. What was kept of other contents of the unit is dropped. Rows that
    were kept, or finished, with a smaller limit of tokens are `earlier`: all are to be written again, and stay where
    they are until the shard is finished. An error inside the block drops the rows since `keep`.
    """

    def __init__(
        self, folder: OutputFolder, shard: ShardFile, features: Features, contents: str | None, max_label_length: int
    ):
        self.folder = folder
        self.shard = shard
        self.features = features
        self.contents = contents
        self.max_label_length = max_label_length
        self.path = folder / f"{PARTS}/{shard.stem}"
        self._before = folder / f"{PARTS}/{shard.stem}.before"
        kept = self._kept(self.path)
        if kept.get(LIMIT, max_label_length) < max_label_length:
            self._set_aside()
            kept = {}
        self.parts: int = kept.get("parts", 0)
        self.progress: dict = kept.get("progress", {})
        self.earlier = self._earlier()
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
        state = {"contents": self.contents, "parts": self.parts, "progress": progress, LIMIT: self.max_label_length}
        write_text(self.path / STATE, json.dumps(state))

    def finish(self, progress: dict) -> None:
        """Join the parts into the shard's file, the same one wherever they end; there is none without rows."""
        self.keep(progress)
        path = self.folder / self.shard.name
        if not self.parts:
            remove(path)  # of a unit that is labelled again, and had rows before
            return
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

    def kept_rows(self) -> Iterator[dict]:
        """The rows that were kept, as far as they tell of which windows they are."""
        for path in self._files(self.path, self.parts):
            for batch in pq.ParquetFile(path).iter_batches(columns=["row_id", "utterance_ids", "duration"]):
                yield from batch.to_pylist()

    def restart(self) -> None:
        """Remove the parts that were kept, but not the earlier rows."""
        (self.path / STATE).unlink(missing_ok=True)  # first, as in `forget`
        remove(self.path)
        self.parts, self.progress = 0, {}

    def forget(self) -> None:
        """Remove the parts."""
        for path in (self.path, self._before):
            (path / STATE).unlink(missing_ok=True)  # first, so that none says that there are parts
            remove(path)

    def _kept(self, path: Path) -> dict:
        """What an earlier run noted of the parts in a folder; nothing, and no parts, if they are of something else."""
        state = path / STATE
        kept = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
        if not is_same_contents(kept.get("contents"), self.contents):
            self.forget()
            return {}
        return kept

    def _set_aside(self) -> None:
        """Make the parts the earlier rows, unless these are being made again: then begin that anew."""
        if (self._before / STATE).exists() or read_manifest(self.folder, self.shard) is not None:
            remove(self.path)
        else:
            remove(self._before)
            os.replace(self.path, self._before)

    def _earlier(self) -> EarlierRows:
        finished, manifest = self.folder / self.shard.name, read_manifest(self.folder, self.shard)
        if manifest is not None:  # where rows come in between, other windows and prompts would belong to the others
            return EarlierRows((finished,) if finished.exists() and not lacks_rows(manifest) else ())
        kept = self._kept(self._before)
        paths = tuple(self._files(self._before, kept.get("parts", 0)))
        return EarlierRows(paths, kept.get("progress", {}).get("previous", {}))

    def _files(self, path: Path, parts: int) -> list[Path]:
        """The files of the parts in a folder; a single one may have become the shard's just before a kill."""
        files = [path / self._part(number).name for number in range(parts)]
        return [file if file.exists() else self.folder / self.shard.name for file in files]

    def _part(self, number: int) -> Path:
        return self.path / f"{number:05d}.parquet"


def note_limit(folder: OutputFolder, shard: ShardFile, max_label_length: int) -> None:
    """Note the limit of tokens of what was labelled of a shard, where versions before this one did not."""
    for path in (folder / shard.manifest, folder / f"{PARTS}/{shard.stem}/{STATE}"):
        if path.exists():
            facts = json.loads(path.read_text(encoding="utf-8"))
            write_text(path, json.dumps({LIMIT: max_label_length, **facts}, ensure_ascii=False))


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
