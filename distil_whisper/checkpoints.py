"""Checkpoints of training: the student, the optimizer, the schedule and the state; never the teacher.

There are no random states in them: what is drawn depends on the seed and the step alone. They appear whole or not at
all, in safetensors and JSON, with checksums, and a checkpoint is itself a model that `from_pretrained` loads. Training
goes on while one is written.
"""

import copy
import json
import re
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from distil_whisper.errors import UserError
from distil_whisper.models import LoadedWhisper, write_whisper
from distil_whisper.outputs import OutputFolder

STATE_FILE, OPTIMIZER_FILE, MODEL_FILE = "trainer_state.json", "optimizer.safetensors", "model.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_STUDENT = "student."  # the student's place in the training step
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_MOMENTS = "state."


@dataclass
class TrainerState:
    """Where training stands: optimizer steps done, the figure of each validation by its step, all figures of the last
    validation, what the meter has summed since the last line of metrics, the rows that came until then and those of
    them that were skipped, where the data stand, how float16's gradients are scaled, and how many steps were bad.
    """

    step: int = 0
    figures: dict[int, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    metered: list[float] = field(default_factory=list)
    rows: int = 0
    skipped: int = 0
    streams: dict = field(default_factory=dict)
    scaler: dict = field(default_factory=dict)
    bad_steps: int = 0

    def best_steps(self, count: int) -> list[int]:
        """The steps of the lowest figures, the best first."""
        return sorted(self.figures, key=lambda step: (self.figures[step], step))[:count]


class Checkpoints:
    """The checkpoints in an output folder: the newest `limit` are kept (all if None) and the `best_limit` best.

    Every process calls the methods; the main one writes.
    """

    def __init__(self, folder: OutputFolder, limit: int | None, best_limit: int):
        self.folder = folder
        self.limit = limit
        self.best_limit = best_limit
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order."""
        found = (_NAME.fullmatch(path.parent.name) for path in self.folder.path.glob(f"checkpoint-*/{STATE_FILE}"))
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / f"checkpoint-{step}"

    def save(
        self, accelerator: Accelerator, student: LoadedWhisper, model, optimizer, scheduler, state: TrainerState
    ) -> None:
        """Take a copy of the student and of what trains it, and write it while training goes on."""
        weights = _copied(student_weights(model), accelerator)
        moments = get_optimizer_state_dict(model, optimizer, options=_FULL)
        if not accelerator.is_main_process:
            return
        self.finish()
        moments = _copied(_flat(moments), accelerator)
        state = copy.deepcopy(state)
        scheduled = {"last_epoch": scheduler.last_epoch}
        self._writing = self._writer.submit(self._write, student, weights, moments, scheduled, state)

    def finish(self) -> None:
        """Wait until what was saved is on disk."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def load_newest(self, model, optimizer, scheduler, say) -> TrainerState | None:
        """Put the newest whole checkpoint into model, optimizer and schedule; None if there is none.

        A damaged one is passed over, which is said. Raises UserError for one of another training.
        """
        step = next((step for step in reversed(self.steps()) if self._is_whole(step, say)), None)
        if step is None:
            return None
        path = self.path(step)
        stored = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
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
        _go_to(stored["scheduler"]["last_epoch"], scheduler, optimizer)
        state = TrainerState(**stored["state"])
        state.figures = {int(step): value for step, value in state.figures.items()}
        return state

    def load_best(self, state: TrainerState, model) -> None:
        """Put the weights of the best checkpoint into the model, if it is not the one that is there."""
        self.finish()
        for step in state.best_steps(1):
            if step != state.step and step in self.steps():
                self._load_weights(self.path(step), model)

    def _write(self, student, weights, moments, scheduled, state: TrainerState) -> None:
        # A damaged checkpoint of this step, which a resume passed over, is replaced.
        with self.folder.new_folder(f"checkpoint-{state.step}") as path:
            write_whisper(path, student, weights)
            save_file(moments, path / OPTIMIZER_FILE)
            checksums = {name: _checksum(path / name) for name in (MODEL_FILE, OPTIMIZER_FILE)}
            stored = {"state": asdict(state), "scheduler": scheduled, "checksums": checksums}
            (path / STATE_FILE).write_text(json.dumps(stored, indent=2), encoding="utf-8")
        if self.limit is not None:
            kept = {*self.steps()[-max(self.limit, 1) :], *state.best_steps(self.best_limit)}
            for step in [step for step in self.steps() if step not in kept]:
                self.folder.remove(f"checkpoint-{step}")

    def _is_whole(self, step: int, say) -> bool:
        path = self.path(step)
        try:
            checksums = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["checksums"]
            whole = all(_checksum(path / name) == value for name, value in checksums.items())
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            say(f"warning: {path} is damaged and is passed over")
        return whole

    def _load_weights(self, path: Path, model) -> None:
        weights = {_STUDENT + name: tensor for name, tensor in load_file(path / MODEL_FILE).items()}
        set_model_state_dict(model, weights, options=replace(_FULL, strict=False))  # tied weights are saved once


def _go_to(step: int, scheduler: LambdaLR, optimizer) -> None:
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
