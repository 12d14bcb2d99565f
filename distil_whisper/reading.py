"""One reader of audio for every stage: Hub, folders, manifests; streamed or not, in the same units and rows."""

import bisect
import contextlib
import glob
import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import multiprocess
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Audio,
    Dataset,
    DatasetDict,
    DownloadMode,
    Features,
    IterableDataset,
    LargeList,
    List,
    ReadInstruction,
    Value,
    get_dataset_config_names,
    load_dataset_builder,
    load_from_disk,
)
from datasets import (
    config as datasets_config,
)
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.table import cast_table_to_features
from fsspec.core import url_to_fs
from httpx2 import HTTPError, TransportError

from distil_whisper import row_groups
from distil_whisper.errors import UserError, nearest, refuse_missing_path
from distil_whisper.manifests import (
    MANIFEST_SUFFIXES,
    is_audio_folder,
    read_audio_folder,
    read_manifest,
    splits_of_audio_folder,
)

_ROWS_AT_ONCE = 16  # rows taken from a file together; each is unpacked on its own, recordings may be long
_ROWS_OF_PARQUET = 100  # that `datasets` reads at once; by default as many as the first row group has, also if none
_ROWS_HEARD, _BYTES_HEARD = 8, 1 << 20  # of a source and of each of these rows, to tell it from another one
_FILES_AT_ONCE = 32  # of which the rows are counted
_PARQUET = ".parquet"
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes
_UNREACHABLE = (ConnectionError, TransportError)
_UNREADABLE = (DatasetsError, OSError, ValueError, ImportError, RuntimeError, HTTPError)


@dataclass(frozen=True)
class Unit:
    """A part of a source that is read in order, by one process: an input file, or a run of rows.

    rows is None where only reading tells; file and size (in bytes) where they are not known.
    """

    index: int
    of: int
    rows: int | None
    file: str | None = None
    size: int | None = None


class Source:
    """One split of a dataset, never decoded: its rows unit by unit, the same ones whether it is streamed or not.

    label names the source in row ids and messages, without a path of this machine. features describes the rows;
    num_rows and a unit's rows are None where only reading tells. dataset is the whole as a map-style dataset, or
    None if streaming. parquet_files are the units of a streamed source of Parquet. Can be pickled.
    """

    def __init__(
        self,
        name,
        config,
        split,
        audio_column,
        data: Dataset | IterableDataset,
        units,
        streaming: bool,
        parquet_files: list[str] | None = None,
    ):
        self.name: str = name
        self.config: str = config
        self.split: str = split
        self.audio_column: str = audio_column
        self.streaming = streaming
        self.units: list[Unit] = units
        self.label = f"{_basename(name)}/{config}/{split}"
        self.features: Features = data.features
        self._data = data
        self._parquet_files = parquet_files
        self._sample_type = _sample_type(self.features[audio_column])
        self._starts = list(itertools.accumulate((unit.rows or 0 for unit in units), initial=0))

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    @property
    def num_rows(self) -> int | None:
        return None if any(unit.rows is None for unit in self.units) else self._starts[-1]

    @property
    def dataset(self) -> Dataset | None:
        return None if self.streaming else self._data

    def rows(self, unit_index: int, columns: list[str] | None = None, start: int = 0, step: int = 1) -> Iterator[dict]:
        """The rows of one unit in order, every step-th from row start on; audio is {"bytes", "path"}, as stored.

        Raises UserError for a file that cannot be read.
        """
        wanted = 0  # the next row, in the table that comes
        try:
            for table in self._tables(unit_index, columns or self.column_names, start):
                for index in range(wanted, table.num_rows, step):
                    yield self._with_audio(table.slice(index, 1).to_pylist()[0])
                wanted = (wanted - table.num_rows) % step
        except _UNREADABLE as error:
            name = self.units[unit_index].file or f"unit {unit_index}"
            raise UserError(f"{name} of {self.label} cannot be read: {_reason(error)}") from error

    def row(self, index: int) -> dict:
        """A row of `dataset`, audio as in `rows`."""
        return self._with_audio(self._data[index])

    def _with_audio(self, row: dict) -> dict:
        """A row whose audio is a dict, also where there is none, and whose samples have the type that they have."""
        if self.audio_column in row:
            audio = row[self.audio_column] or {"bytes": None, "path": None}
            if isinstance(audio, str):
                audio = {"bytes": None, "path": audio}
            if audio.get("array") is not None:
                audio = {**audio, "array": self._samples(audio["array"])}
            row[self.audio_column] = audio
        return row

    def _samples(self, values: list) -> np.ndarray:
        """The samples of a row in the type of the column; NaN where some are null, or channels differ in length."""
        try:
            return np.asarray(values, self._sample_type)
        except (TypeError, ValueError):
            return np.array([np.nan])

    def count_rows(self) -> list[int | None]:
        """How many rows each unit has; for streamed Parquet the ends of all files are read.

        Raises UserError for a file that cannot be.
        """
        if self._parquet_files is None:
            return [unit.rows for unit in self.units]
        try:
            with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
                return list(pool.map(row_groups.count_rows, self._parquet_files))
        except _UNREADABLE as error:
            raise UserError(f"the rows of {self.label} cannot be counted: {_reason(error)}") from error

    def take_counts(self, rows: list[int | None]) -> None:
        """Take what `count_rows` found, here or in another process: units are then read from any row on at once."""
        self.units = [replace(unit, rows=count) for unit, count in zip(self.units, rows, strict=True)]
        self._starts = list(itertools.accumulate((count or 0 for count in rows), initial=0))

    def contents(self, unit_index: int) -> str | None:
        """What tells whether a unit is the one that it was: its file's name and size, or digests of its rows without
        their audio and of the names of the audio files; None where that is not known. What it was in earlier versions
        is how it begins."""
        unit = self.units[unit_index]
        if unit.file is not None:
            return unit.file if unit.size is None else f"{unit.file}, {unit.size:,} bytes"
        if not isinstance(self._data, Dataset):
            return None
        digest, audio = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
        for table in self._tables(unit_index, self.column_names, 0):
            digest.update(repr(table.drop_columns(self.audio_column).to_pylist()).encode())
            audio.update(repr(self._file_names(table[self.audio_column])).encode())
        return f"rows {digest.hexdigest()} of files {audio.hexdigest()}"

    def _file_names(self, audio: pa.ChunkedArray) -> list[str | None]:
        """The paths of the files in a column as far as they are below the source's folder, which may be moved."""
        if not pa.types.is_struct(audio.type) or audio.type.get_field_index("path") < 0:
            return []
        folder = self.location if os.path.isdir(self.location) else os.path.dirname(self.location)
        paths = pc.struct_field(audio, "path").to_pylist()
        return [path and os.path.normpath(path).removeprefix(folder + os.sep) for path in paths]

    @property
    def location(self) -> str:
        """Where the data is: another one may have the same label."""
        return os.path.abspath(self.name) if os.path.exists(self.name) else self.name

    def audio_digest(self) -> str:
        """What tells how the first rows sound, a digest of their audio as it is stored; "" if they cannot be read."""
        digest = hashlib.blake2b(digest_size=8)
        rows = itertools.chain.from_iterable(self.rows(unit.index, [self.audio_column]) for unit in self.units)
        try:
            for row in itertools.islice(rows, _ROWS_HEARD):
                digest.update(_stored(row[self.audio_column]))
        except (UserError, OSError):  # which are said when these rows are labelled
            return ""
        return digest.hexdigest()

    def as_text(self, column: str) -> None:
        """Take a column of whole numbers (a CSV of spoken digits), or of nothing but nulls, as text.

        Raises UserError for one that is no text: of a number such as 1.50 nobody knows any more how it was written.
        """
        feature = self.features[column]
        kind = str(getattr(feature, "dtype", feature))
        if kind in ("string", "large_string"):
            return
        if not kind.startswith(("int", "uint", "null")):
            raise UserError(
                f"column {column} of {self.label} holds no text, but {kind}; store the transcripts as strings, or "
                "name their column with --text_column_name"
            )
        self._data = self._data.cast_column(column, Value("string"))
        self.features = self._data.features

    def row_id(self, unit_index: int, row: int) -> str:
        """The identity of a row, the same in every run and on every machine."""
        return f"{self.label}/{unit_index:05d}-{row:08d}"

    def locate(self, global_index: int) -> tuple[int, int]:
        """The unit and the row in it of a row of `dataset`. Raises IndexError beyond the last row."""
        if not 0 <= global_index < self._starts[-1]:
            raise IndexError(f"row {global_index} of {self._starts[-1]} rows")
        unit_index = bisect.bisect_right(self._starts, global_index) - 1
        return unit_index, global_index - self._starts[unit_index]

    def _tables(self, unit_index: int, columns: list[str], start: int):
        if isinstance(self._data, Dataset):
            data = self._data.with_format("arrow", columns=columns)
            first, last = self._starts[unit_index] + start, self._starts[unit_index + 1]
            for begin in range(first, last, _ROWS_AT_ONCE):
                yield data[begin : min(begin + _ROWS_AT_ONCE, last)]
            return
        if self._parquet_files is not None and self.units[unit_index].rows is not None:
            features = Features({name: self.features[name] for name in columns})
            for table in row_groups.tables(self._parquet_files[unit_index], columns, start, _ROWS_AT_ONCE):
                yield cast_table_to_features(table, features)
            return
        shard = self._data.shard(num_shards=len(self.units), index=unit_index).select_columns(columns)
        # Not iter(shard): in a DataLoader's worker that would take only the worker's share of the unit.
        for table in shard.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
            if start < table.num_rows:
                yield table.slice(start)
            start = max(start - table.num_rows, 0)


def is_same_contents(was: str | None, now: str | None) -> bool:
    """Whether `Source.contents` may be of the same unit, also where an earlier version knew less, or nothing."""
    return was is None or (now or "").startswith(was)


def open_source(
    name: str,
    config: str | None = None,
    split: str = "train",
    *,
    streaming: bool = False,
    cache_dir: str | None = None,
    num_proc: int = 1,
    audio_column: str = "audio",
    exact: Collection[str] = (),
    rows_per_unit: int = 1000,
) -> Source:
    """Open a split of a Hub dataset, a Parquet file or a folder of them (also by a URL such as s3://, with the
    configuration as a folder in it), a save_to_disk folder, a manifest or an audio folder.

    exact: columns of a CSV whose numbers are to be told apart as they are written (1.5 and 1.50).
    A unit is an input file where `datasets` reads the files, else rows_per_unit rows (as for a slice, train[:100]).
    Raises UserError for a source, config, split or audio column that is not there, naming the nearest one.
    """
    parquet_files = None
    local = None if _is_url(name) else _open_local(name, split, audio_column, exact)
    if local is not None:
        data, lengths, config, files = _sliced(local, split), None, "default", []
    else:
        is_file = not _is_url(name) and os.path.isfile(name)
        opened = _builder_of_file if is_file else _builder_of_url if _is_url(name) else _builder
        builder = opened(name, config, split, cache_dir)
        config = "default" if is_file else config if _is_url(name) and config else builder.config.name
        if isinstance(builder, Parquet):
            builder.config.batch_size = _ROWS_OF_PARQUET
        # Without the Hub a dataset comes from the cache, whose files are not the units: it is on this disk anyway.
        if streaming and not isinstance(builder, Cache):
            data, lengths = _stream(builder, split), None
        else:
            data, lengths = _prepared(builder, split, num_proc)
        files = [] if "[" in split else _files(builder, split)
        if isinstance(data, IterableDataset) and isinstance(builder, Parquet):
            parquet_files = [str(file) for file in builder.config.data_files[split]]
    if audio_column not in data.features:
        found = nearest(audio_column, data.features)
        raise UserError(f"--audio_column_name {audio_column} is not a column of {name} {found}")
    data = _undecoded(data, audio_column, name)
    units = _units(data, lengths, rows_per_unit, files)
    return Source(name, config, split, audio_column, data, units, streaming, parquet_files)


def require_columns(source: Source, **columns: str | None) -> None:
    """Check that columns exist, given as argument=column (None: not asked for). Raises UserError naming the first."""
    for argument, column in columns.items():
        if column is not None and column not in source.features:
            allowed = nearest(column, source.column_names)
            raise UserError(f"--{argument} {column} is not a column of {source.label} {allowed}")
        if column is not None and column == source.audio_column:
            others = [name for name in source.column_names if name != column]
            raise UserError(
                f"--{argument} {column} is the column of {source.label} that holds the audio {nearest(column, others)}"
            )


def _open_local(name: str, split: str, audio_column: str, exact: Collection[str]) -> Dataset | None:
    """What is read without a builder of `datasets`, or None for what is left to one."""
    path = Path(name)
    if path.is_dir():
        return _open_folder(path, split, audio_column, exact)
    if path.is_file():
        if path.suffix == _PARQUET:
            return None
        if path.suffix not in MANIFEST_SUFFIXES:
            allowed = ", ".join(MANIFEST_SUFFIXES)
            raise UserError(f"{name} is not a manifest: the name of one ends in {allowed} (or {_PARQUET})")
        return read_manifest(path, audio_column, exact)
    refuse_missing_path(name, (*MANIFEST_SUFFIXES, _PARQUET))
    return None


def _open_folder(path: Path, split: str, audio_column: str, exact: Collection[str]) -> Dataset | None:
    if any((path / name).is_file() for name in _SAVED):
        return _saved(path, split)
    if next(path.rglob("*.parquet"), None) is not None:
        return None
    for suffix in MANIFEST_SUFFIXES:  # such as train.tsv, test.tsv and dev.tsv of Common Voice
        manifest = path / f"{split.partition('[')[0]}{suffix}"
        if manifest.is_file():
            return read_manifest(manifest, audio_column, exact)
    if is_audio_folder(path):
        splits = splits_of_audio_folder(path)
        return read_audio_folder(path, splits[_known_split(split, splits, str(path))], exact)
    return None


def _saved(path: Path, split: str) -> Dataset:
    try:
        saved = load_from_disk(str(path))
    except _UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    if isinstance(saved, DatasetDict):
        return saved[_known_split(split, saved, str(path))]
    _known_split(split, [str(saved.split or split.partition("[")[0])], str(path))
    return saved


def _known_split(split: str, splits, name: str) -> str:
    base = split.partition("[")[0]
    if base not in splits:
        raise UserError(f"{name} has no split {base} {nearest(base, splits)}")
    return base


def _sliced(dataset: Dataset, split: str) -> Dataset:
    """The rows that a split such as train[:100] asks for."""
    if "[" not in split:
        return dataset
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: len(dataset)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{split} is not a slice of a split: {_reason(error)}") from error
    first, last = part.from_, min(part.to, len(dataset))
    if first >= last:
        raise UserError(f"the slice {split} is empty: there are {len(dataset):,} rows")
    return dataset.select(range(first, last))


def require_no_pattern(folder: str) -> None:
    """Raise UserError for a folder whose files `datasets` would not find."""
    if glob.has_magic(os.path.realpath(folder)):
        raise UserError(
            f"the path of the folder {folder} has one of the characters * ? [ in it, which `datasets` takes for "
            "patterns; rename the folder"
        )


def _builder(name: str, config: str | None, split: str, cache_dir: str | None):
    if os.path.isdir(name):
        require_no_pattern(name)
    try:
        builder = load_dataset_builder(name, config, cache_dir=cache_dir)
        if os.path.isdir(name):
            builder = load_dataset_builder(name, builder.config.name, cache_dir=_cache_of_files(builder, cache_dir))
    except DatasetNotFoundError as error:
        raise UserError(
            f"there is no dataset {name}: no such folder, and none on the Hub that you may read"
        ) from error
    except _UNREACHABLE as error:
        raise UserError(
            f"there is no folder {name}, and the Hub cannot be reached for a dataset of that name"
        ) from error
    except _UNREADABLE as error:
        raise _config_error(name, config, error) from error
    if isinstance(builder, AudioFolder):
        raise UserError(
            f"{name} holds audio files that are not on this disk, or packed; fetch or unpack them (hf download {name} "
            "--repo-type dataset --local-dir FOLDER) and give the folder"
        )
    _known_split(split, builder.config.data_files or builder.info.splits or [], name)
    return builder


def _builder_of_file(path: str, config: str | None, split: str, cache_dir: str | None):
    """A builder of one Parquet file on this disk, which is whatever split is asked for."""
    if config not in (None, "default"):
        raise UserError(f"{path} is a file and has no config {config}; leave its config out")
    files = {split.partition("[")[0]: [glob.escape(os.path.abspath(path))]}
    try:
        builder = load_dataset_builder("parquet", data_files=files, cache_dir=cache_dir)
        return load_dataset_builder("parquet", data_files=files, cache_dir=_cache_of_files(builder, cache_dir))
    except _UNREADABLE as error:
        raise UserError(f"{path} cannot be read as a dataset: {_reason(error)}") from error


def _is_url(name: str) -> bool:
    return "://" in name


def _builder_of_url(url: str, config: str | None, split: str, cache_dir: str | None):
    """A builder of the Parquet files at a URL that fsspec knows: one, or the splits of a folder by their names."""
    base, shown = f"{url.rstrip('/')}/{config or ''}".rstrip("/"), _basename(url)
    try:
        patterns = {"train": [base]} if base.endswith(_PARQUET) else get_data_patterns(base)
        files = DataFilesDict.from_patterns(patterns, base_path=base).filter(extensions=[_PARQUET])
        builder = load_dataset_builder(
            "parquet", data_files={s: list(f) for s, f in files.items()}, cache_dir=cache_dir
        )
    except (*_UNREADABLE, EmptyDatasetError) as error:
        raise UserError(f"no Parquet files can be read at {shown}: {_reason(error)}") from error
    _known_split(split, builder.config.data_files, shown)
    return builder


def _cache_of_files(builder, cache_dir: str | None) -> str:
    """A cache folder for the files of a local dataset as they are now.

    `datasets` caches a local folder by its last name and by its README.md, not by its files: another folder of that
    name, or the same one with other files, would silently be read as what it was.
    """
    digest = hashlib.blake2b(digest_size=8)
    for files in (builder.config.data_files or {}).values():
        for file in files:
            found = os.stat(file)
            digest.update(f"{os.path.realpath(file)} {found.st_size} {found.st_mtime_ns}\n".encode())
    return os.path.join(cache_dir or datasets_config.HF_DATASETS_CACHE, f"local-{digest.hexdigest()}")


def _config_error(name: str, config: str | None, error: Exception) -> UserError:
    try:
        configs = get_dataset_config_names(name)
    except _UNREADABLE:
        configs = []
    if config is None and len(configs) > 1:
        return UserError(f"{name} has several configs, and one must be named {nearest('default', configs)}")
    if config is not None and configs and config not in configs:
        return UserError(f"{name} has no config {config} {nearest(config, configs)}")
    return UserError(f"{name} cannot be read as a dataset: {_reason(error)}")


def _stream(builder, split: str) -> IterableDataset:
    if "[" in split:
        raise UserError(f"a slice of a split ({split}) cannot be streamed; give the whole split, or --streaming False")
    try:
        return builder.as_streaming_dataset(split)._resolve_features().decode(False)
    except _UNREADABLE as error:
        raise UserError(f"{builder.dataset_name} cannot be streamed: {_reason(error)}") from error


def _prepared(builder, split: str, num_proc: int) -> tuple[Dataset, list[int] | None]:
    """The split as a map-style dataset, and how many rows each of its files gave (None for a slice)."""
    datasets_config.SAVE_ORIGINAL_SHARD_LENGTHS = True
    try:
        if num_proc > 1:
            with _spawning():
                builder.download_and_prepare(num_proc=num_proc)
        else:
            builder.download_and_prepare()
        lengths = None if "[" in split else _rows_of_files(builder, split)
        return builder.as_dataset(split), lengths
    except _UNREADABLE as error:
        raise UserError(f"{builder.dataset_name} cannot be read: {_reason(error)}") from error


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """Let `datasets` spawn its workers: one that is forked after torch began its threads can hang for ever."""
    before = [(library, library.get_start_method(allow_none=True)) for library in (multiprocess, multiprocessing)]
    try:
        for library, _ in before:
            library.set_start_method("spawn", force=True)
        yield
    finally:
        for library, method in before:
            library.set_start_method(method, force=True)


def _rows_of_files(builder, split: str) -> list[int]:
    lengths = _noted_lengths(builder, split)
    files = len(lengths) if isinstance(builder, Cache) else builder.as_streaming_dataset(split).num_shards
    if len(lengths) != files:
        # Another program filled the cache and did not note the lengths, or several processes passed over empty files.
        builder.download_and_prepare(download_mode=DownloadMode.REUSE_CACHE_IF_EXISTS)
        lengths = _noted_lengths(builder, split)
    return lengths + [0] * (files - len(lengths))


def _noted_lengths(builder, split: str) -> list[int]:
    info = builder.info.splits[split]
    return info.original_shard_lengths or [info.num_examples]  # datasets notes nothing for a single file


def _files(builder, split: str) -> list[tuple[str, int | None]]:
    """The names of a split's files and their sizes in bytes, where their file system lists them."""
    paths = list((builder.config.data_files or {}).get(split, []))
    sizes: dict[str, int] = {}
    for folder in {path.rpartition("/")[0] for path in paths}:
        filesystem, inside = url_to_fs(folder)
        if not {"http", "https"} & set(filesystem.protocol):  # which would have to guess from a page
            with contextlib.suppress(OSError, HTTPError):
                listed = filesystem.ls(inside, detail=True)
                sizes |= {entry["name"]: entry["size"] for entry in listed if entry["type"] == "file"}
    return [(path.rpartition("/")[2], sizes.get(url_to_fs(path)[1])) for path in paths]


def _undecoded(data: Dataset | IterableDataset, audio_column: str, name: str):
    """The data with its audio as stored. Raises UserError for an audio column that holds none."""
    for column, feature in data.features.items():
        is_audio = isinstance(feature, Audio)
        if column == audio_column and not is_audio:
            if _sample_type(feature) is not None:
                continue
            _require_files(feature, f"column {column} of {name}")
            if feature == Value("large_string"):  # as pandas writes paths; `datasets` makes no Audio of them
                continue
        if column == audio_column or is_audio:
            data = data.cast_column(column, Audio(decode=False))
    return data


def _require_files(feature, where: str) -> None:
    """Raise UserError for a column that can hold neither files nor their paths."""
    kind = str(getattr(feature, "dtype", ""))
    if kind in ("string", "large_string", "binary", "large_binary", "null"):
        return
    if isinstance(feature, dict) and {"bytes", "path"} & set(feature):
        return
    found = (
        "samples without their sampling rate" if isinstance(feature, (List, LargeList)) else f"no audio, but {feature}"
    )
    raise UserError(f"{where} holds {found}; it must hold files, their paths, or array with sampling_rate")


def _sample_type(feature) -> str | None:
    """The type of the samples of an audio column {"array", "sampling_rate"}, None for another column."""
    if isinstance(feature, Audio) or not isinstance(feature, dict) or not {"array", "sampling_rate"} <= set(feature):
        return None
    samples = feature["array"]
    while isinstance(samples, (List, LargeList)):  # channels
        samples = samples.feature
    kinds = [getattr(part, "dtype", "") for part in (samples, feature["sampling_rate"])]
    return kinds[0] if all(kind.startswith(("int", "uint", "float")) for kind in kinds) else None


def _stored(audio: dict) -> bytes:
    """The first bytes of an undecoded audio, none of a file that is not on this disk."""
    if audio.get("array") is not None:
        return audio["array"].tobytes()[:_BYTES_HEARD]
    if audio.get("bytes") or not os.path.isfile(audio.get("path") or ""):
        return (audio.get("bytes") or b"")[:_BYTES_HEARD]
    with open(audio["path"], "rb") as file:
        return file.read(_BYTES_HEARD)


def _units(
    data: Dataset | IterableDataset, lengths: list[int] | None, rows_per_unit: int, files: list[tuple[str, int | None]]
) -> list[Unit]:
    if isinstance(data, IterableDataset):
        lengths = [None] * data.num_shards
    elif lengths is None:
        lengths = [min(rows_per_unit, len(data) - first) for first in range(0, len(data), rows_per_unit)]
    files = files if len(files) == len(lengths) else [(None, None)] * len(lengths)
    return [
        Unit(index, len(lengths), rows, *file) for index, (rows, file) in enumerate(zip(lengths, files, strict=True))
    ]


def _basename(name: str) -> str:
    """The last part of a path or a URL, which may hold credentials; a name on the Hub as it is."""
    if _is_url(name):
        return name.rstrip("/").rpartition("/")[2]
    path = Path(name)
    return path.absolute().name if path.exists() else name


def _reason(error: Exception) -> str:
    """The first lines of an error, in one: of its cause, where `datasets` wraps it in one that says nothing."""
    error = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
