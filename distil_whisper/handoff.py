"""The hand-off dataset: Parquet files with one schema, and a README.md that lists what is there.

`load_dataset` reads the folder at any time, with any number of shards finished.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Audio, Features, List, Value

from distil_whisper import ffmpeg
from distil_whisper.errors import UserError
from distil_whisper.outputs import RECORDS, OutputFolder, atomic_path, write_text

ROWS_PER_GROUP = 100
LIMIT = "max_label_length"  # in what is noted of a shard: the most tokens of its labels
SLICE_MARKS = {"[": "_", "]": "", ":": "to", "%": "pct"}
TEXT, REAL = Value("string"), Value("float64")
WRITTEN = {  # the columns that labelling adds
    "whisper_transcript": TEXT,
    "whisper_token_ids": List(Value("int32")),
    "tokenizer_fingerprint": TEXT,
    "condition_on_prev": List(Value("int32")),
    "language": TEXT,
    "task": TEXT,
    "detected_language": TEXT,
    "row_id": TEXT,
    "recording_id": TEXT,
    "window_start": REAL,
    "utterance_ids": List(TEXT),
    "utterance_starts": List(REAL),
    "utterance_texts": List(TEXT),
    "utterance_wer": List(REAL),
    "truncated": Value("bool"),
    "wer": REAL,
    "errors": Value("int32"),
    "reference_words": Value("int32"),
    "normalizer": TEXT,
    "avg_logprob": REAL,
    "no_speech_prob": REAL,
    "compression_ratio": REAL,
    "duration": REAL,
}
MEANINGS = {
    "whisper_transcript": "the teacher's text; `<|1.20|>` marks are timestamps in seconds",
    "whisper_token_ids": "its tokens as generated, without prefix and end token",
    "tokenizer_fingerprint": "whose token ids these are",
    "condition_on_prev": "the tokens of the window before, of the same recording or speaker",
    "language": "the language that the teacher was told",
    "task": "the task that it was told",
    "detected_language": "the language that it would have guessed",
    "row_id": "the row of the source",
    "recording_id": "the recording or the speaker",
    "window_start": "where the window begins in a cut recording, in seconds",
    "utterance_ids": "the parts of a packed window",
    "utterance_starts": "where they begin, in seconds",
    "utterance_texts": "their transcripts",
    "utterance_wer": "their word error rates in percent, from one alignment of the window",
    "truncated": "the teacher did not come to its end token",
    "wer": "word error rate against the transcript in percent (of a packed window its worst utterance's)",
    "errors": "word errors of the window",
    "reference_words": "words of its transcript",
    "normalizer": "the text normaliser of these figures",
    "avg_logprob": "mean log-probability of the teacher's tokens",
    "no_speech_prob": "its probability of no speech",
    "compression_ratio": "of the text; repetitions make it large",
    "duration": "seconds",
}


def require_kinds(features: Features, columns: Iterable[str], label: str) -> None:
    """Raise UserError for a column of a labelled dataset that holds another kind of values than labelling writes."""
    for name in columns:
        if name not in features:
            continue
        found, wanted = (Features({name: of[name]}).arrow_schema.field(name).type for of in (features, WRITTEN))
        if not _is_kind(found, wanted):
            raise UserError(f"column {name} of {label} holds {found}; it must hold {wanted}")


def _is_kind(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of a type can be read as another: of any width, and integers as reals."""
    kinds = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating)
    if pa.types.is_null(found):
        return True
    if pa.types.is_list(wanted):
        lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        return any(is_list(found) for is_list in lists) and _is_kind(found.value_type, wanted.value_type)
    if pa.types.is_string(wanted):
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    return any(kind(wanted) and kind(found) for kind in kinds) or (
        pa.types.is_floating(wanted) and pa.types.is_integer(found)
    )


@dataclass(frozen=True)
class ShardFile:
    """One output file: a unit of one split of one configuration.

    `datasets` takes only letters, digits and _ in the name of a split: the slice train[:100] is called train_to100. A
    configuration is one folder: a/b is called a_b.
    """

    config: str
    split: str
    index: int
    of: int

    @property
    def stem(self) -> str:
        """Its configuration, split and number."""
        split = re.sub(r"\W", lambda found: SLICE_MARKS.get(found.group(), "_"), self.split)
        return f"{self.config.replace('/', '_')}/{split}-{self.index:05d}-of-{self.of:05d}"

    @property
    def name(self) -> str:
        """Its path below the output folder."""
        return f"{self.stem}.parquet"

    @property
    def manifest(self) -> str:
        """What is said of the finished unit, even if it left no row."""
        return f"{RECORDS}/shards/{self.stem}.json"


def schema(
    source: Features, kept: list[str] | None, audio_column: str, text_column: str | None
) -> tuple[Features, dict]:
    """The features of the hand-off dataset, and how clashing columns of the source are called in it.

    kept: the columns to keep, None for all. A column of the source that has the name of one of ours is kept as
    `source_<name>`, with one more `source_` for each time that it was labelled before.
    """
    names = list(source) if kept is None else [name for name in kept if name in source]
    renamed = {name: name for name in names}
    for name in (name for name in names if name in WRITTEN and name != text_column):
        while renamed[name] in names:
            renamed[name] = f"source_{renamed[name]}"
    features = {renamed[name]: Audio() if name == audio_column else source[name] for name in names}
    return Features({**features, **WRITTEN}), renamed


@contextlib.contextmanager
def shard_writer(path: Path, features: Features) -> Iterator[Callable[[dict], None]]:
    """Write rows into a Parquet file that appears when the block ends well, unless no row came.

    Rows go to disk in groups, so memory is bounded.
    """
    arrow_schema = features.arrow_schema
    rows: list[dict] = []
    with contextlib.ExitStack() as stack:
        writer = None

        def flush() -> None:
            nonlocal writer
            if writer is None:
                beside = stack.enter_context(atomic_path(path))
                writer = stack.enter_context(pq.ParquetWriter(beside, arrow_schema))
            writer.write_table(pa.Table.from_pylist(rows, schema=arrow_schema))
            rows.clear()

        def write(row: dict) -> None:
            rows.append(row)
            if len(rows) >= ROWS_PER_GROUP:
                flush()

        yield write
        if rows:
            flush()


def finish_shard(folder: OutputFolder, shard: ShardFile, facts: dict) -> None:
    """Note that a unit is done: how many rows it has, and which were skipped."""
    write_text(folder / shard.manifest, json.dumps(facts, ensure_ascii=False))


def read_manifest(folder: OutputFolder, shard: ShardFile) -> dict | None:
    """What was noted of a finished unit, None if it is not finished."""
    path = folder / shard.manifest
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def lacks_rows(manifest: dict) -> bool:
    """Whether rows of a finished unit were skipped for want of FFmpeg where there is one now."""
    return any(row["reason"].startswith(ffmpeg.NEEDED) for row in manifest["skipped"]) and ffmpeg.is_there()


def is_finished(folder: OutputFolder, shard: ShardFile, max_label_length: int) -> bool:
    """Whether a unit is done, lacks no rows, and none of its labels was truncated by a smaller limit of tokens."""
    return is_labelled(folder, shard, max_label_length) and not lacks_rows(read_manifest(folder, shard))


def is_labelled(folder: OutputFolder, shard: ShardFile, max_label_length: int) -> bool:
    """Whether a unit is done, and none of its labels was truncated by a smaller limit of tokens than this."""
    manifest = read_manifest(folder, shard)
    if manifest is None or manifest.get(LIMIT, max_label_length) >= max_label_length:
        return manifest is not None
    return not any(row["truncated"] for row in labelled_rows(folder, [shard], ["truncated"]))


def labelled_rows(folder: OutputFolder, shards: Iterable[ShardFile], columns: list[str]) -> Iterator[dict]:
    """Columns of the rows of finished shards."""
    for path in (folder / shard.name for shard in shards):
        if path.exists():  # a unit of which no row was left has none
            for batch in pq.ParquetFile(path).iter_batches(columns=columns):
                yield from batch.to_pylist()


def write_readme(folder: OutputFolder, body: str) -> None:
    """Rewrite README.md so that its `configs:` lists the files that are there. Any process may do it at any time.

    Before there is one it names files that are missing: `load_dataset` would else read other files of the folder.
    """
    found: dict[str, set[str]] = {}
    written: dict[str, list[str]] = {}
    for path in sorted((folder / f"{RECORDS}/shards").glob("*/*.json")):
        if json.loads(path.read_text(encoding="utf-8"))["rows"]:
            found.setdefault(path.parent.name, set()).add(path.name.rsplit("-of-", 1)[0].rsplit("-", 1)[0])
            written.setdefault(path.parent.name, []).append(f"{path.name} {path.stat().st_mtime_ns}")
    configs = [
        {
            "config_name": config,
            # `datasets` caches a local folder by the configs of its README alone: they must change with the files.
            "description": hashlib.blake2b("\n".join(written[config]).encode(), digest_size=8).hexdigest(),
            **({"default": True} if position == 0 else {}),
            "data_files": [{"split": split, "path": f"{config}/{split}-[0-9]*.parquet"} for split in sorted(splits)],
        }
        for position, (config, splits) in enumerate(sorted(found.items()))
    ]
    configs = configs or [{"config_name": "default", "data_files": [{"split": "train", "path": "*.parquet"}]}]
    head = yaml.safe_dump({"configs": configs}, sort_keys=False, allow_unicode=True)
    write_text(folder / "README.md", f"---\n{head}---\n\n{body}")
