"""Manifests and audio folders: files of one's own as a map-style dataset whose audio column holds absolute paths."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.table import InMemoryTable

from distil_whisper.errors import UserError, nearest

MANIFEST_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
FOLDER_AUDIO_COLUMN = "audio"
_SPLIT_FOLDER = re.compile(r"(train|test|valid|validation|val|dev|eval)([._-].*)?")
_OF_FFMPEG = {".m4a", ".mp4", ".aac", ".webm", ".mka", ".wma", ".g722", ".amr"}
_AUDIO_SUFFIXES = frozenset(AudioFolder.EXTENSIONS) | {".oga", ".aif"} | _OF_FFMPEG
_WHOLE, _DECIMAL = re.compile(r"0|-?[1-9]\d{0,17}"), re.compile(r"-?(0|[1-9]\d*)?\.\d+([eE][-+]?\d+)?")


def read_manifest(path: Path, audio_column: str, exact: Collection[str] = ()) -> Dataset:
    """A JSON, JSONL, CSV or TSV manifest, one row an utterance; audio paths are relative to the manifest.

    JSON may be a list of rows, {"data": [rows]} or one row a line. exact: columns whose cells can be written again as
    they are written. Raises UserError for what cannot be read.
    """
    rows = _read_rows(path, exact)
    if not rows:
        raise UserError(f"{path} holds no rows")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if audio_column not in columns:
        raise UserError(
            f"--audio_column_name {audio_column} is not a column of {path} {nearest(audio_column, columns)}"
        )
    paths = [_audio_path(row.get(audio_column), f"row {index} of {path}") for index, row in enumerate(rows)]
    base = _base(path.parent, next((p for p in paths if p is not None), ""))
    for row, audio in zip(rows, paths, strict=True):
        row[audio_column] = None if audio is None else str(base / audio)
    return _dataset(rows, columns, str(path))


def is_audio_folder(folder: Path) -> bool:
    """Whether a folder holds audio files, or a metadata file that names them."""
    return any((folder / name).is_file() for name in METADATA) or next(_audio_files(folder), None) is not None


def splits_of_audio_folder(folder: Path) -> dict[str, Path]:
    """The splits of an audio folder: its sub-folders with names such as train or test_ood, else all of it as train."""
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    splits = {name: path for name, path in found.items() if _SPLIT_FOLDER.fullmatch(name) and is_audio_folder(path)}
    return splits or {"train": folder}


def read_audio_folder(folder: Path, split: Path, exact: Collection[str] = ()) -> Dataset:
    """One split of an audio folder: the rows of its metadata.csv or metadata.jsonl, else its audio files by name.

    Columns: audio, file_name, and what the metadata has; exact as for a manifest. Raises UserError for metadata
    without file names.
    """
    rows = [row for metadata in _metadata_files(split) for row in _described(metadata, exact)]
    if not rows and split != folder:
        described = [row for metadata in _metadata_files(folder) for row in _described(metadata, exact)]
        rows = [row for row in described if split in Path(row[FOLDER_AUDIO_COLUMN]).parents]
    if not rows:
        names = sorted(path.relative_to(split).as_posix() for path in _audio_files(split))
        rows = [{FOLDER_AUDIO_COLUMN: str((split / name).absolute()), FILE_NAME: name} for name in names]
    if not rows:
        raise UserError(f"{split} holds no audio files")
    columns = list(dict.fromkeys([FOLDER_AUDIO_COLUMN, *(name for row in rows for name in row)]))
    return _dataset(rows, columns, str(split))


def _audio_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in _AUDIO_SUFFIXES and path.is_file())


def _metadata_files(folder: Path) -> list[Path]:
    return sorted(path for name in METADATA for path in folder.rglob(name))


def _described(metadata: Path, exact: Collection[str]) -> list[dict]:
    rows = _read_rows(metadata, exact)
    for index, row in enumerate(rows):
        if not isinstance(row.get(FILE_NAME), str):
            raise UserError(f"row {index} of {metadata} has no {FILE_NAME} {nearest(FILE_NAME, row)}")
        row[FOLDER_AUDIO_COLUMN] = str((metadata.parent / row[FILE_NAME]).absolute())
    return rows


def _read_rows(path: Path, exact: Collection[str]) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return _csv_rows(text, path, exact) if path.suffix in (".csv", ".tsv") else _json_rows(text, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not in UTF-8 at line {line}; save it in that encoding") from error


def _json_rows(text: str, path: Path) -> list[dict]:
    try:
        rows = _from_json(text, path)
        rows = rows["data"] if isinstance(rows, dict) and isinstance(rows.get("data"), list) else rows
        rows = [rows] if isinstance(rows, dict) else rows
    except json.JSONDecodeError as error:
        if not text.strip():
            return []
        rows = (
            _json_lines(text, path) if "Extra data" in error.msg or path.suffix == ".jsonl" else _broken(path, error)
        )
    if not isinstance(rows, list):
        raise UserError(f"{path} must hold a list of rows, not a {type(rows).__name__}")
    halves = re.search(r"\\u[dD][89a-fA-F]", text)  # of a pair that stands for one character, if both are there
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {index} of {path} must be names and values, not a {type(row).__name__}")
        if halves:
            _require_whole_characters(row, f"row {index} of {path}")
    return rows


def _from_json(text: str, path: Path):
    def as_row(pairs: list[tuple]) -> dict:
        row = dict(pairs)
        if len(row) < len(pairs):
            ((name, count),) = Counter(name for name, _ in pairs).most_common(1)
            raise UserError(f"{path} has a row with {count} values called {name}; give each a name of its own")
        return row

    return json.loads(text, object_pairs_hook=as_row)


def _require_whole_characters(row: dict, where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(f"{where} has {half}, which is half of a character; write the whole one") from error


def _json_lines(text: str, path: Path) -> list:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [_from_json(line, path)] if line.strip() else []
        except json.JSONDecodeError as error:
            _broken(path, error, number)
    return rows


def _broken(path: Path, error: json.JSONDecodeError, line: int | None = None):
    raise UserError(f"{path} is not valid JSON at line {line or error.lineno}: {error.msg}") from error


def _csv_rows(text: str, path: Path, exact: Collection[str]) -> list[dict]:
    # Tab-separated files such as Common Voice's do not quote, and their transcripts may begin with a quotation mark.
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    reader = csv.DictReader(io.StringIO(text), strict=True, **dialect)
    try:
        names, rows = reader.fieldnames or (), list(reader)
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV at line {reader.reader.line_num}: {error}") from error
    # One column without a name, such as the index that pandas writes, is kept like any other.
    unnamed = [name for name in names if not name.strip()] if Counter(map(str.strip, names))[""] > 1 else []
    for name, count in Counter(name for name in names if name not in unnamed).items():
        if count > 1:
            raise UserError(f"{path} has {count} columns called {name}; give each a name of its own")
    for index, row in enumerate(rows):
        for name in unnamed:
            row.pop(name, None)
        if None in row or None in row.values():
            raise UserError(f"row {index} of {path} has not as many cells as the first line has names")
    for name in rows[0] if rows else []:
        cells = [row[name] for row in rows]
        for row, value in zip(rows, _numbers(cells, name in exact), strict=True):
            row[name] = value
    return rows


def _numbers(cells: list[str], exact: bool) -> list:
    """A column as numbers where each is written as one; names such as 007 stay text, empty cells become null.

    exact: only as whole numbers, whose spelling can be told from their value; 1.50 and 1.5 would be the same.
    """
    filled = [cell for cell in cells if cell]
    for pattern, kind in ((_WHOLE, int),) if exact else ((_WHOLE, int), (_DECIMAL, float)):
        if filled and all(pattern.fullmatch(cell) or (kind is float and _WHOLE.fullmatch(cell)) for cell in filled):
            return [kind(cell) if cell else None for cell in cells]
    return cells


def _audio_path(value, where: str) -> str | None:
    if isinstance(value, dict) and "path" not in value:
        raise UserError(f"{where} must give its audio as a path, not as a dict without one")
    path = value.get("path") if isinstance(value, dict) else value
    if path is not None and not isinstance(path, str):
        raise UserError(f"{where} must give its audio as a path, not as a {type(path).__name__}")
    return path or None


def _base(folder: Path, first: str) -> Path:
    """Where a manifest's paths start: beside it, or in clips/, where Common Voice keeps the files of its manifests."""
    folder = folder.absolute()
    in_clips = not (folder / first).is_file() and (folder / "clips" / first).is_file()
    return folder / "clips" if in_clips else folder


def _dataset(rows: list[dict], columns: list[str], where: str) -> Dataset:
    arrays = []
    for name in columns:
        try:
            array = pa.array([row.get(name) for row in rows])
        except OverflowError as error:
            raise UserError(
                f"column {name} of {where} holds a whole number of more than 64 bits; put it in quotes, as text"
            ) from error
        except pa.ArrowException as error:
            kinds = sorted({type(row[name]).__name__ for row in rows if row.get(name) is not None})
            raise UserError(f"column {name} of {where} mixes values of several kinds: {', '.join(kinds)}") from error
        arrays.append(array.cast(pa.string()) if pa.types.is_null(array.type) else array)
    return Dataset(InMemoryTable.from_arrays(arrays, names=columns))
