"""Checkpoints of training: the student, the optimizer, the schedule and the state; never the teacher.

There are no random states in them: what is drawn depends on the seed and the step alone. They appear whole or not at
all, in safetensors and JSON, and a checkpoint is itself a model that `from_pretrained` loads.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
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

from distil_whisper.errors import UserError
from distil_whisper.models import LoadedWhisper, write_whisper
from distil_whisper.outputs import OutputFolder

STATE_FILE, OPTIMIZER_FILE, MODEL_FILE = "trainer_state.json", "optimizer.safetensors", "model.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_STUDENT = "student."  # the student's place in the training step
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FLAT = replace(_FULL, flatten_optimizer_state_dict=True)


@dataclass
class TrainerState:
    """Where training stands. best_value is the lowest validation figure so far, and best_step where it was reached."""

    step: int = 0
    best_value: float | None = None
    best_step: int | None = None

    def improves(self, value: float) -> bool:
        """Take note of a validation figure; True if it is the best so far."""
        better = self.best_value is None or value < self.best_value
        if better:
            self.best_value, self.best_step = value, self.step
        return better


class Checkpoints:
    """The checkpoints in an output folder, the newest `limit` of them kept, and the `best_limit` best."""

    def __init__(self, folder: OutputFolder, limit: int | None, keep_best: bool):
        self.folder = folder
        self.limit = limit
        self.keep_best = keep_best

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.path.glob("checkpoint-*"))
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / f"checkpoint-{step}"

    def save(
        self, accelerator: Accelerator, student: LoadedWhisper, model, optimizer, scheduler, state: TrainerState
    ) -> None:
        """Write a checkpoint of the student and of what trains it. Every process must call it; the main one writes."""
        weights = student_weights(model)
        moments = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        if accelerator.is_main_process and self.path(state.step).name not in self._whole():
            with self.folder.new_folder(f"checkpoint-{state.step}") as path:
                write_whisper(path, student, weights)
                tensors = {name: value for name, value in moments.items() if isinstance(value, torch.Tensor)}
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / OPTIMIZER_FILE)
                stored = {"state": asdict(state), "scheduler": _plain(scheduler.state_dict())}
                (path / STATE_FILE).write_text(json.dumps(stored, indent=2), encoding="utf-8")
            self._rotate(state)
        accelerator.wait_for_everyone()

    def load_newest(self, model, optimizer, scheduler) -> TrainerState | None:
        """Put the newest checkpoint into model, optimizer and schedule; None if there is none."""
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        stored = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        self._load_weights(path, model)
        moments = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        loaded = load_file(path / OPTIMIZER_FILE)
        expected = {name for name, value in moments.items() if isinstance(value, torch.Tensor)}
        if loaded.keys() != expected:
            raise UserError(
                f"{path} was written with other trained layers than this command trains (is --freeze_encoder the "
                "same?); use the same arguments, another --output_dir, or --overwrite_output_dir"
            )
        set_optimizer_state_dict(model, optimizer, {**moments, **loaded}, options=_FLAT)
        scheduler.load_state_dict(stored["scheduler"])
        return TrainerState(**stored["state"])

    def load_best(self, state: TrainerState, model) -> None:
        """Put the weights of the best checkpoint into the model, if it is not the one that is there."""
        if state.best_step not in (None, state.step) and self.path(state.best_step).exists():
            self._load_weights(self.path(state.best_step), model)

    def _load_weights(self, path: Path, model) -> None:
        weights = {_STUDENT + name: tensor for name, tensor in load_file(path / MODEL_FILE).items()}
        set_model_state_dict(model, weights, options=replace(_FULL, strict=False))  # tied weights are saved once

    def _whole(self) -> set[str]:
        return {self.path(step).name for step in self.steps()}

    def _rotate(self, state: TrainerState) -> None:
        if self.limit is None:
            return
        kept = set(self.steps()[-max(self.limit, 1) :])
        if self.keep_best and state.best_step is not None:
            kept.add(state.best_step)
        for step in self.steps():
            if step not in kept:
                self.folder.remove(f"checkpoint-{step}")


def student_weights(model) -> dict[str, torch.Tensor]:
    """The student's weights by its own names, gathered on the CPU. Every process must call it."""
    weights = get_model_state_dict(model, options=_FULL)
    return {name.removeprefix(_STUDENT): tensor for name, tensor in weights.items()}


def _plain(state: dict) -> dict:
    """The part of a scheduler's state that JSON can hold: all but its functions, which the arguments give again."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"}
