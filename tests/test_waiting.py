"""A training step asks no tensor for a value: a GPU, which would be waited for then, has the next step in hand."""

import copy
from dataclasses import replace

import pytest
import torch
from stages import ENGLISH, train_few
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensorMode
from transformers import get_scheduler

import run_distillation
from distil_whisper.meters import Meter
from distil_whisper.step_reports import StepReports


class Stepped(Exception):
    """The step came to its end."""


def without_values(fake: FakeTensorMode, *things) -> tuple:
    """Copies of modules and batches whose tensors have shapes and types alone."""
    with FakeCopyMode(fake):
        return tuple(copy.deepcopy(thing) for thing in things)


@pytest.fixture
def fake_step(monkeypatch):
    """Lets the first step of a training go without values, and raises Stepped; scaled: as for float16."""
    step = run_distillation.optimizer_step

    def arrange(scaled):
        def faked(run, group, stop):
            fake, accelerator = FakeTensorMode(), run.accelerator
            model, teacher, group = without_values(fake, run.model, run.model._teacher, group)
            model._teacher = teacher
            with fake:
                accelerator.scaler = torch.amp.GradScaler("cpu") if scaled else None
                accelerator._optimizers.clear()
                optimizer = accelerator.prepare_optimizer(run_distillation.make_optimizer(run.args, model))
                meter, reports = Meter(accelerator, run.weights), StepReports(accelerator, 10)
                scheduler = get_scheduler("constant", optimizer.optimizer)
                changed = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
                step(replace(run, **changed, meter=meter, reports=reports), group, stop)
            raise Stepped

        monkeypatch.setattr(run_distillation, "optimizer_step", faked)

    return arrange


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_waits_for_no_value(scaled, fake_step, student, taught, labelled, tmp_path):
    """Forward, backward, clipping, leaving out a bad step, the update, and what is noted of it."""
    fake_step(scaled)
    flags = ["--teacher_model_name_or_path", taught, "--freeze_encoder", "--gradient_accumulation_steps", 2]
    with pytest.raises(Stepped):
        train_few(student, labelled, tmp_path, *ENGLISH, *flags)


def test_that_would_be_seen(fake_step, student, labelled, monkeypatch, tmp_path):
    add = Meter.add
    monkeypatch.setattr(Meter, "add", lambda self, group, losses, norm: add(self, group, losses, norm.item()))
    fake_step(False)
    with pytest.raises(DataDependentOutputException):
        train_few(student, labelled, tmp_path, *ENGLISH, "--kl_weight", 0)
