"""Encoder outputs and the teacher's last hidden states, kept on disk for trainings of many epochs.

Both are the same in every epoch as long as audio and labels are: the student's decoder is then all that is left to
compute. They are kept as bfloat16 in memory-mapped files that grow to a limit; what comes later is computed each time.
Training uses what is kept from the first pass on, rounded as it is, so a resumed run goes on with the same bits.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad

from distil_whisper.copies import on_device
from distil_whisper.distiller import Distiller
from distil_whisper.errors import UserError
from distil_whisper.examples import Batch
from distil_whisper.models import weights_digest
from distil_whisper.outputs import write_text

_BYTES = 2  # of a bfloat16


class StateFile:
    """Arrays [rows, width] by key, in one file that only grows, up to a limit in bytes.

    Every process writes a file of its own and reads those of all: rows move between processes from epoch to epoch.
    """

    def __init__(self, folder: Path, name: str, width: int, limit: int, rank: int, processes: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.width = width
        self.rows_limit = limit // processes // (width * _BYTES)
        self.rank = rank
        self._data_paths = [folder / f"{name}-{process}.bf16" for process in range(processes)]
        self._index_paths = [folder / f"{name}-{process}.jsonl" for process in range(processes)]
        self._read = [0] * processes  # how far each index was read
        self._places: dict[str, tuple[int, int, int]] = {}  # key -> process, first row, rows
        self._used = 0
        self._data_paths[rank].touch()
        self._drop_bad_lines()
        self._refresh([rank])  # the others' when they are needed: they drop theirs at the same time
        self._data = self._data_paths[rank].open("r+b")
        self._index = self._index_paths[rank].open("ab", buffering=0)

    def get(self, key: str) -> torch.Tensor | None:
        """The array of a key, None if there is none."""
        if key not in self._places:
            self._refresh(range(len(self._index_paths)))
        if key not in self._places:
            return None
        process, first, rows = self._places[key]
        offset = first * self.width * _BYTES
        found = np.memmap(self._data_paths[process], np.uint16, "r", offset, shape=(rows, self.width))
        return torch.from_numpy(found.copy()).view(torch.bfloat16)

    def put(self, arrays: dict[str, torch.Tensor]) -> None:
        """Keep the arrays of a batch, if there is room for all of them.

        A killed run has kept all of a batch or none: a resumed one then computes in batches of the same size.
        """
        total = sum(len(array) for array in arrays.values())
        if not arrays or self._used + total > self.rows_limit:
            return
        self._data.seek(self._used * self.width * _BYTES)
        lines = []
        for key, array in arrays.items():
            data = array.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()
            self._data.write(data.tobytes())
            lines.append(json.dumps([key, self._used, len(array)]) + "\n")
            self._places[key] = (self.rank, self._used, len(array))
            self._used += len(array)
        self._data.flush()  # the index must never be ahead of the data
        self._index.write("".join(lines).encode())

    def _refresh(self, processes: Iterable[int]) -> None:
        """Take in what the processes have added since."""
        for process in processes:
            path = self._index_paths[process]
            if not path.exists() or path.stat().st_size == self._read[process]:
                continue
            with path.open("rb") as file:
                file.seek(self._read[process])
                lines = file.read()
            lines = lines[: lines.rfind(b"\n") + 1]
            self._read[process] += len(lines)
            there = self._rows_of(process)
            for key, first, rows in filter(None, (_entry(line, there) for line in lines.splitlines())):
                self._places[key] = (process, first, rows)
                if process == self.rank:
                    self._used = max(self._used, first + rows)

    def _rows_of(self, process: int) -> int:
        return self._data_paths[process].stat().st_size // (self.width * _BYTES)

    def _drop_bad_lines(self) -> None:
        """Take out of this process's index what was cut, and what its data file does not hold: that place is used
        again."""
        path, there = self._index_paths[self.rank], self._rows_of(self.rank)
        found = path.read_bytes() if path.exists() else b""
        good = b"".join(line + b"\n" for line in found.splitlines() if _entry(line, there))
        if good != found:
            write_text(path, good.decode())


def _entry(line: bytes, there: int) -> tuple[str, int, int] | None:
    """Key, first row and rows that a line of an index names; None if it was cut, or names more rows than there are."""
    try:
        key, first, rows = json.loads(line)
    except (ValueError, TypeError):
        return None
    if not (isinstance(key, str) and type(first) is type(rows) is int and 0 <= first <= first + rows <= there):
        return None
    return key, first, rows


class StateCaches:
    """What a batch needs of the encoder and of the teacher, from the files where they have it.

    Only for a frozen encoder that student and teacher share, and without augmentation. What is not kept has no file.
    """

    def __init__(self, distiller: Distiller, encoder: StateFile | None, teacher: StateFile | None):
        self.distiller = distiller
        self.encoder = encoder
        self.teacher = teacher

    @torch.no_grad()
    def __call__(self, batch: Batch, device) -> dict[str, torch.Tensor]:
        """The training step's further arguments."""
        dtype = self.distiller.teacher.dtype

        def encode(missing: list[int]) -> torch.Tensor:
            return self.distiller.encode(batch.waveforms[missing].to(device))[1]

        states = _together(_kept(self.encoder, batch.audio_keys, encode), device).to(dtype)
        if self.teacher is None:
            return {"encoder_states": states}

        def decode(missing: list[int]) -> torch.Tensor:
            return self.distiller.teacher_decoder(batch.decoder_input_ids[missing].to(device), states[missing])

        labelled = zip(batch.audio_keys, batch.decoder_input_ids, batch.lengths, strict=True)
        keys = [_variant(*row) for row in labelled]
        hidden = _kept(self.teacher, keys, decode, batch.lengths)
        padded = [pad(h, (0, 0, 0, batch.labels.shape[1] - len(h))) for h in hidden]
        return {"encoder_states": states, "teacher_hidden": _together(padded, device).to(dtype)}


def open_caches(
    folder: Path, distiller: Distiller, encoder: bool, teacher: bool, limit_gb: float, rank: int, processes: int
) -> StateCaches:
    """The caches of a training, below a folder of their teacher's own; limit_gb bounds them together.

    Raises UserError where student and teacher share no encoder, or its input changes from epoch to epoch.
    """
    if not distiller.shares_encoder:
        raise UserError(
            "--cache_encoder_outputs and --cache_teacher_states need a teacher, --freeze_encoder and a student "
            "encoder that equals the teacher's: otherwise its outputs change as it is trained"
        )
    if distiller.spec_augment is not None:
        raise UserError(
            "caches cannot be used with SpecAugment, which changes the input each time; give one of them up"
        )
    limit = int(limit_gb * 1e9)
    teacher_limit = limit // 10 if encoder else limit  # the teacher's states are some twenty times smaller
    folder = folder / weights_digest(distiller.teacher)  # the states of another one are not those of this one
    config = distiller.teacher.config

    def state_file(name: str, bytes_limit: int) -> StateFile:
        return StateFile(folder, name, config.d_model, bytes_limit, rank, processes)

    return StateCaches(
        distiller,
        state_file("encoder", limit - teacher_limit if teacher else limit) if encoder else None,
        state_file("teacher", teacher_limit) if teacher else None,
    )


def _kept(
    file: StateFile | None,
    keys: list[str],
    compute: Callable[[list[int]], torch.Tensor],
    lengths: list[int] | None = None,
) -> list[torch.Tensor]:
    """An array for each key: from the file, else computed for all that it lacks at once, and then kept.

    lengths: how many rows of each computed array are worth keeping, None for all. With a file, what is computed is
    rounded as it is kept, and rows of one key get one array.
    """
    found = [file.get(key) if file is not None and key else None for key in keys]
    missing = [row for row, states in enumerate(found) if states is None]
    new: dict[str, torch.Tensor] = {}
    for row, states in zip(missing, compute(missing) if missing else [], strict=True):
        found[row] = states
        if file is not None:
            used = states if lengths is None else states[: lengths[row]]
            found[row] = new.setdefault(keys[row], used.bfloat16())
    new.pop("", None)  # what was asked for without a key
    if file is not None:
        file.put(new)
    return found


def _together(arrays: list[torch.Tensor], device: torch.device | str) -> torch.Tensor:
    """Arrays as one tensor on a device: those that all come from files in one copy, which a GPU is not waited for."""
    if any(array.device.type != "cpu" for array in arrays):
        return torch.stack([array.to(device) for array in arrays])
    together = torch.stack(arrays)
    pinned = together.pin_memory() if torch.device(device).type == "cuda" else together
    return on_device({"states": pinned}, device)["states"]


def _variant(audio_key: str, decoder_input_ids: torch.Tensor, length: int) -> str:
    """The key of one labelling of a recording: timestamps and prompts make several of it."""
    ids = decoder_input_ids[:length].numpy().tobytes()
    return audio_key and hashlib.blake2b(audio_key.encode() + ids, digest_size=12).hexdigest()
