"""Checkpoints of training: the student, the optimizer, the schedule and the state; never the teacher.

There are no random states in them: what is drawn depends on the seed and the step alone. They appear whole or not at
all, in safetensors and JSON, with checksums, and a checkpoint is itself a model that `from_pretrained` loads. Training
goes on while one is written. A new one is read back before an older one is removed, so a run that is killed at any
moment leaves one to go on from.
"""

import copy
import json
import math
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from distil_whisper.engine import found_by_main_process
from distil_whisper.errors import UserError
from distil_whisper.models import LoadedWhisper, not_finite, write_whisper
from distil_whisper.outputs import OutputFolder
from distil_whisper.trainer_state import StoredState, TrainerState

STATE_FILE, OPTIMIZER_FILE, MODEL_FILE = "trainer_state.json", "optimizer.safetensors", "model.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_STUDENT = "student."  # the student's place in the training step
_TIED = _STUDENT + "proj_out.weight"  # is saved once, as the embeddings
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_MOMENTS = "state."


class Checkpoints:
    """The checkpoints in an output folder: the newest `limit` are kept (all if None) and the `best_limit` best.

    The newest is the one that was written last: a run that went on from an older one writes newer ones of lower steps.
    Every process calls the methods; the main one writes, and chooses what is loaded.
    """

    def __init__(self, folder: OutputFolder, accelerator: Accelerator, limit: int | None, best_limit: int):
        self.folder = folder
        self.accelerator = accelerator
        self.limit = limit
        self.best_limit = best_limit
        self._flaws: dict[int, str | None] = {}  # what is wrong with the checkpoints that were looked at
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, damaged ones too; the newest first, before it what cannot tell."""
        folders = self.folder.path.glob("checkpoint-*")
        ours = [match for path in folders if (match := _NAME.fullmatch(path.name)) and self._is_ours(path)]
        found = [int(match.group(1)) for match in ours]
        saves = {step: self._saves(step) for step in found}
        return sorted(found, key=lambda step: (math.inf if saves[step] is None else saves[step], step), reverse=True)

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / f"checkpoint-{step}"

    def save(self, student: LoadedWhisper, model, optimizer, scheduler, state: TrainerState) -> None:
        """Take a copy of the student and of what trains it, and write it while training goes on."""
        weights = _copied(student_weights(model), self.accelerator)
        moments = get_optimizer_state_dict(model, optimizer, options=_FULL)
        if not self.accelerator.is_main_process:
            return
        self.finish()
        moments = _copied(_flat(moments), self.accelerator)
        stored = StoredState(copy.deepcopy(state), {"last_epoch": scheduler.last_epoch}, {})
        self._writing = self._writer.submit(self._write, student, weights, moments, stored)

    def finish(self) -> None:
        """Wait until what was saved is on disk. Raises what kept it from that."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def raise_failure(self) -> None:
        """Raise what kept the last checkpoint from being written, if that is known by now."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def load_newest(self, model, optimizer) -> StoredState | None:
        """Put the newest whole checkpoint into model and optimizer, and return what else it holds; None if there is
        none.

        A damaged one is passed over, which is said. Raises UserError where all are damaged, and for one of another
        training.
        """
        step = found_by_main_process(self._newest)
        if step is None:
            return None
        path = self.path(step)
        stored = _stored(path)
        self._load_weights(path, model)
        moments = get_optimizer_state_dict(model, optimizer)  # not gathered: the names and the settings are known
        loaded = load_file(path / OPTIMIZER_FILE)
        if loaded.keys() != _flat(moments).keys():
            raise UserError(
                f"{path} was written with other trained layers than this command trains (is --freeze_encoder the "
                "same?); use the same arguments, another --output_dir, or --overwrite_output_dir"
            )
        state: dict[str, dict] = {}  # not put into `moments`, whose tensors are the optimizer's own
        for name, tensor in loaded.items():
            parameter, kind = name.removeprefix(_MOMENTS).rsplit(".", 1)
            state.setdefault(parameter, {})[kind] = tensor
        moments = {**moments, "state": state}
        set_optimizer_state_dict(model, optimizer, moments, options=StateDictOptions(full_state_dict=True))
        return stored

    def load_best(self, state: TrainerState, model) -> int:
        """Put the weights of the best checkpoint into the model, if they are not there: its step.

        Raises UserError where there is no best one, and where its checkpoint is missing or damaged.
        """
        self.finish()
        step = found_by_main_process(lambda: self._best(state))
        if step != state.step:
            self._load_weights(self.path(step), model)
        return step

    def _newest(self) -> int | None:
        steps = self.steps()
        for step in steps:
            if not self._flaw(step):
                return step
            self.accelerator.print(f"warning: {self.path(step)} is damaged ({self._flaw(step)}) and is passed over")
        if steps:
            raise UserError(
                f"all checkpoints in {self.folder.path} are damaged (such as {self.path(steps[0]).name}: "
                f"{self._flaw(steps[0])}); restore one, or begin anew with --overwrite_output_dir"
            )
        return None

    def _best(self, state: TrainerState) -> int:
        advice = "leave out --load_best_model_at_end to save the last one"
        best = next(iter(state.best_steps()), None)
        if best is None:
            raise UserError(f"no evaluation gave a finite figure, so none of the checkpoints is the best; {advice}")
        if best not in self.steps():
            raise UserError(f"{self.path(best)}, the best checkpoint, is missing; restore it, or {advice}")
        if self._flaw(best):
            raise UserError(f"{self.path(best)}, the best checkpoint, is damaged ({self._flaw(best)}); {advice}")
        return best

    def _write(self, student, weights, moments, stored: StoredState) -> None:
        step = stored.state.step
        if broken := not_finite(weights):
            raise UserError(
                f"the student's weights are not finite at step {step} (such as {broken}), so they are not saved; the "
                "earlier checkpoints stay, and the same command goes on from them, as with a lower --learning_rate"
            )
        stored.saves = 1 + max((self._saves(other) or 0 for other in self.steps()), default=0)
        # A damaged checkpoint of this step, which a resume passed over, is replaced.
        with self.folder.new_folder(f"checkpoint-{step}") as path:
            write_whisper(path, student, weights)
            save_file(moments, path / OPTIMIZER_FILE)
            stored.checksums = {name: _checksum(path / name) for name in (MODEL_FILE, OPTIMIZER_FILE)}
            stored.checksums[STATE_FILE] = _state_checksum(asdict(stored))
            (path / STATE_FILE).write_text(json.dumps(asdict(stored), indent=2), encoding="utf-8")
            if flaw := _flaw(path, step):
                raise UserError(
                    f"{self.path(step)} was written, but cannot be read back ({flaw}); the earlier checkpoints stay, "
                    "and the same command goes on from them: check the disk"
                )
        self._flaws[step] = None
        if self.limit is not None:
            self._prune(stored.state)

    def _prune(self, state: TrainerState) -> None:
        """Remove the checkpoints that are not wanted; damaged ones do not count."""
        steps = self.steps()
        best = [step for step in state.best_steps() if step in steps]
        kept = {*self._whole(steps, max(self.limit, 1)), *self._whole(best, self.best_limit)}
        for step in steps:
            if step not in kept:
                self.folder.remove(f"checkpoint-{step}")

    def _whole(self, steps: Iterable[int], count: int) -> Iterable[int]:
        """The first so many of the steps whose checkpoints are whole."""
        return islice((step for step in steps if not self._flaw(step)), count)

    def _flaw(self, step: int) -> str | None:
        """What is wrong with a checkpoint, None if nothing is. It is read once."""
        if step not in self._flaws:
            self._flaws[step] = _flaw(self.path(step), step)
        return self._flaws[step]

    def _is_ours(self, path: Path) -> bool:
        return path.is_dir() and (path.name in self.folder.record["files"] or (path / STATE_FILE).exists())

    def _saves(self, step: int) -> int | None:
        """How many checkpoints had been written with this one, None where its state does not tell."""
        try:
            return _stored(self.path(step)).saves
        except (OSError, ValueError):
            return None

    def _load_weights(self, path: Path, model) -> None:
        weights = {_STUDENT + name: tensor for name, tensor in load_file(path / MODEL_FILE).items()}
        own = {name: tensor.shape for name, tensor in get_model_state_dict(model).items() if name.startswith(_STUDENT)}
        missing = own.keys() - weights.keys() - {_TIED}
        if missing or any(tensor.shape != own.get(name) for name, tensor in weights.items()):
            raise UserError(
                f"{path} was written with another student than this command trains; use the same "
                "--model_name_or_path, another --output_dir, or --overwrite_output_dir"
            )
        set_model_state_dict(model, weights, options=replace(_FULL, strict=False))  # tied weights are saved once


def _stored(path: Path) -> StoredState:
    """The state file of a checkpoint. Raises OSError and ValueError for one that cannot be read."""
    return StoredState.from_json(json.loads((path / STATE_FILE).read_text(encoding="utf-8")))


def _flaw(path: Path, step: int) -> str | None:
    """What is wrong with the checkpoint of a step, None if nothing is."""
    try:
        found = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        stored = StoredState.from_json(found)
        if stored.state.step != step or "last_epoch" not in stored.scheduler:
            return f"{STATE_FILE} is of another step"
        if stored.checksums.pop(STATE_FILE, None) not in (None, _state_checksum(found)):
            return f"{STATE_FILE} was changed"
        if stored.checksums.keys() != {MODEL_FILE, OPTIMIZER_FILE}:
            return f"{STATE_FILE} lacks checksums"
        for name, checksum in stored.checksums.items():
            if _checksum(path / name) != checksum:
                return f"{name} was changed"
            tensors = load_file(path / name)
            if name == MODEL_FILE and (broken := not_finite(tensors)):
                return f"its weights are not finite, such as {broken}"
    except (OSError, ValueError, SafetensorError) as error:
        return " ".join(str(error).split())
    return None


def go_to(step: int, scheduler: LambdaLR, optimizer) -> None:
    """Put a schedule at a step, with the learning rate that it has now, which may not be that of the checkpoint."""
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(
        {**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # a schedule sets it with its next step only


def student_weights(model, everywhere: bool = False) -> dict[str, torch.Tensor]:
    """The student's weights by its own names, gathered on the CPU of the main process, or on every device.

    Every process must call it.
    """
    weights = get_model_state_dict(model, options=replace(_FULL, cpu_offload=not everywhere))
    return {name.removeprefix(_STUDENT): tensor for name, tensor in weights.items()}


def _flat(moments: dict) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by parameter and kind (torch's own flattening cannot be loaded back when gathered)."""
    states = moments["state"] if moments else {}  # gathered, only the main process has them
    return {f"{_MOMENTS}{name}.{kind}": value for name, kinds in states.items() for kind, value in kinds.items()}


def _copied(tensors: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Tensors that training does not touch: what comes from a GPU is a copy already."""
    on_cpu = accelerator.device.type == "cpu"
    return {name: tensor.clone() if on_cpu else tensor.contiguous() for name, tensor in tensors.items()}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _state_checksum(stored: dict) -> int:
    """The checksum of what a state file holds beside the checksums."""
    rest = {name: value for name, value in stored.items() if name != "checksums"}
    return zlib.crc32(json.dumps(json.loads(json.dumps(rest)), sort_keys=True).encode())
