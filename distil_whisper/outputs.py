"""The folder that a stage writes into: one run at a time, files appear whole, and only what we wrote is replaced."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from distil_whisper.errors import UserError

RECORDS = ".distil_whisper"  # below the output folder: what each stage wrote, and the lock of a stage that runs
_HALF = re.compile(r"\.(.+?)(\.removed)?\.\d+\.partial")  # see atomic_path and remove
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


class OutputFolder:
    """The output folder of one stage, opened for one run.

    Only the main process (main=True) locks, records and removes; the others use the paths. Raises UserError when
    another run of the stage lives in the folder, and when a file that is about to be written is somebody else's.
    """

    def __init__(
        self, path: str | Path, stage: str, overwrite: bool = False, main: bool = True, flag: str = "--output_dir"
    ):
        if not str(path):
            raise UserError(f"{flag} is missing; name the folder that this stage may write into")
        self.path = Path(path)
        self.stage = stage
        self.main = main
        self.flag = flag
        self._lock: int | None = None
        if not main:
            return
        try:
            (self.path / RECORDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag} {path} cannot be written to: {error.strerror}") from error
        self._lock = self._take_lock()
        self.record = self._read_record(stage)
        self._remove_halves()
        if overwrite:
            self._remove_ours()

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def share(self) -> None:
        """Let every process of the run hold the lock, so that one which outlives the main one keeps others out.

        Each calls it once, after all of them have opened the folder.
        """
        if self._lock is None:
            self._lock = os.open(self.path / RECORDS / f"{self.stage}.lock", os.O_RDWR | os.O_APPEND)
            os.write(self._lock, f"{os.getpid()}\n".encode())
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def claim(self, *names: str, shared: bool = False) -> None:
        """Announce files or folders (relative names) that this stage writes; shared ones may be another stage's.

        Raises UserError if one is there that was not written by this stage (or, if shared, by any).
        """
        if not self.main:
            return
        kind = "shared" if shared else "files"
        stages = self._stages() if shared else [self.stage]
        ours = {name for stage in stages for name in self._read_record(stage)[kind]}
        for name in names:
            if name not in ours and (self.path / name).exists():
                raise UserError(
                    f"{self.path / name} exists and was not written by this stage; move it away, or choose another "
                    f"{self.flag}"
                )
        new = [name for name in names if name not in self.record[kind]]
        if new:
            self.record[kind] += new
            self._save_record()

    def remove(self, name: str) -> None:
        """Delete a file or folder that we wrote."""
        if self.main and name in self.record["files"]:
            remove(self.path / name)
            self.record["files"].remove(name)
            self._save_record()

    def arguments(self) -> dict | None:
        """The arguments that the folder's finished work was made with, None at first."""
        return self.record.get("arguments")

    def keep_arguments(self, arguments: dict) -> None:
        """Store the arguments that decide what this stage writes, for a later run to compare with."""
        if self.main:
            self.record["arguments"] = arguments
            self._save_record()

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file whole or not at all."""
        self.claim(name)
        write_text(self.path / name, text)
        return self.path / name

    def write_json(self, name: str, value) -> Path:
        """Write a JSON file whole or not at all."""
        return self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """A folder that appears under its name when the block ends without an error."""
        self.claim(name)
        with atomic_path(self.path / name) as beside:
            beside.mkdir(parents=True)
            yield beside

    def _stages(self) -> list[str]:
        return [path.stem for path in (self.path / RECORDS).glob("*.json")]

    def _read_record(self, stage: str) -> dict:
        path = self.path / RECORDS / f"{stage}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else _new_record()

    def _save_record(self) -> None:
        write_text(self.path / RECORDS / f"{self.stage}.json", json.dumps(self.record, indent=2))

    def _take_lock(self) -> int:
        descriptor = os.open(self.path / RECORDS / f"{self.stage}.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            known = os.pread(descriptor, 1 << 16, 0).decode().split()
            os.close(descriptor)
            alive = [process for process in known if psutil.pid_exists(int(process))]
            named = ", ".join(alive or known) or "unknown"  # those of another machine are not alive here
            raise UserError(
                f"another run of this stage (process {named}) is writing into {self.path}; wait for it or stop it, "
                f"or choose another {self.flag}"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return descriptor

    def _remove_halves(self) -> None:
        """Delete what killed runs of this stage left half written."""
        ours = {self.path / name for name in self.record["files"]}
        for half in [half for folder in {path.parent for path in ours} for half in folder.glob(".*.partial")]:
            match = _HALF.fullmatch(half.name)
            if match and half.parent / match.group(1) in ours:
                remove(half)

    def _remove_ours(self) -> None:
        for name in self.record["files"]:
            remove(self.path / name)
        self.record = {**_new_record(), "shared": self.record["shared"]}
        self._save_record()


def check_apart(output: str | Path, inputs: Iterable[str | None], below: str = "") -> None:
    """Raise UserError if an output folder, or one below it, is a dataset folder that is read or lies inside one.

    What is written there would be taken for data, and a README.md or Parquet files hide data of other kinds. Links are
    resolved. Files that are read, such as manifests, may lie anywhere, and so may dataset folders below the output.
    """
    written = (Path(output) / below).resolve()
    for name in filter(None, inputs):
        read = Path(re.sub("^(file|local)://", "", name)).resolve()
        if read.is_dir() and any(folder.exists() and folder.samefile(read) for folder in (written, *written.parents)):
            raise UserError(
                f"--output_dir {output} would put files into the dataset folder {name} that is read, where they hide "
                f"its data or are taken for it; give a folder outside of it, such as {read}_output"
            )


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` for a file or folder to be written to; it takes the name when the block ends well and all
    of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.{os.getpid()}.partial"
    remove(beside)
    try:
        yield beside
        _sync(beside)
        if beside.is_dir():
            remove(path)
        os.replace(beside, path)
        sync_one(path.parent)
    finally:
        remove(beside)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there. A folder loses its name first: none is ever half there."""
    if path.is_dir() and not path.is_symlink():
        if not _HALF.fullmatch(path.name):
            path = path.rename(path.parent / f".{path.name}.removed.{time.time_ns()}.partial")
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    for inner in path.iterdir() if path.is_dir() else ():
        _sync(inner)
    sync_one(path)


def sync_one(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_record() -> dict:
    return {"files": [], "shared": []}


def public_arguments(args) -> dict:
    """A dataclass of arguments as a dict for files, cards and trackers, without credentials inside of addresses."""
    return {
        name: _CREDENTIALS.sub("", value) if isinstance(value, str) else value
        for name, value in dataclasses.asdict(args).items()
    }
