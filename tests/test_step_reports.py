"""Bad steps: whose loss or gradients are not finite. They change nothing, are counted, and end a run in time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import launch
from safetensors.torch import load_file
from stages import ENGLISH, metrics, train_few, weights
from test_processes import SHARDED

from distil_whisper.errors import UserError
from distil_whisper.examples import ExampleMaker
from distil_whisper.step_reports import StepReports

FEW = (*ENGLISH, "--kl_weight", 0, "--save_steps", 1, "--per_device_train_batch_size", 2)


@pytest.fixture
def poison(monkeypatch):
    """Lets the samples of some of the rows that training asks for, by their number, be NaN; gives the rows' ids."""
    make, row_ids = ExampleMaker.__call__, []

    def of(chosen):
        def poisoned(self, *given):
            example = make(self, *given)
            row_ids.append(example.row_id)
            if chosen(len(row_ids) - 1):
                example.samples.fill(np.nan)
            return example

        monkeypatch.setattr(ExampleMaker, "__call__", poisoned)
        return row_ids

    return of


def state_of(checkpoint) -> dict[str, torch.Tensor]:
    """Weights and moments."""
    return {**weights(checkpoint), **load_file(checkpoint / "optimizer.safetensors")}


def test_a_bad_step_changes_nothing_but_counts(student, labelled, tmp_path, poison, capsys):
    row_ids = poison(lambda number: number == 5)  # of the third step
    folder = train_few(student, labelled, tmp_path, *FEW)
    before, bad, after = (state_of(folder / f"checkpoint-{step}") for step in (2, 3, 4))
    assert all(torch.equal(tensor, bad[name]) for name, tensor in before.items())
    assert not any(torch.equal(tensor, after[name]) for name, tensor in bad.items() if "fc1.weight" in name)
    lines = metrics(folder, "train/loss")
    assert [line["train/bad_steps"] for line in lines] == [0, 0, 1, 1]
    assert [line["train/learning_rate"] for line in lines] == pytest.approx([75e-5, 5e-4, 25e-5, 0])
    assert lines[2]["train/grad_norm"] is None and lines[2]["train/loss"] is None and lines[3]["train/loss"] > 0
    said = capsys.readouterr().out
    assert f"step 3 changed nothing: its loss or its gradients were not finite, on {row_ids[5]}\n" in said


def test_a_bad_batch_leaves_its_whole_accumulated_step_out(student, labelled, tmp_path, poison, capsys):
    row_ids = poison(lambda number: number == 2)
    folder = train_few(student, labelled, tmp_path, *FEW, "--gradient_accumulation_steps", 2, "--max_steps", 2)
    assert all(
        torch.equal(tensor, weights(student)[name]) for name, tensor in weights(folder / "checkpoint-1").items()
    )
    assert f"finite, on {row_ids[2]}\n" in capsys.readouterr().out


def test_bad_steps_in_a_row_end_the_run_and_spare_its_checkpoints(student, labelled, tmp_path, poison):
    poison(lambda number: number >= 4)
    with pytest.raises(UserError, match="the last 3 steps up to step 5 were not finite"):
        train_few(student, labelled, tmp_path, *FEW, "--max_steps", 12, "--save_steps", 2, "--max_bad_steps", 3)
    assert not (tmp_path / "config.json").exists()
    states = [state_of(path) for path in sorted(tmp_path.glob("checkpoint-*"))]
    assert len(states) == 2 and all(tensor.isfinite().all() for state in states for tensor in state.values())


def test_a_run_that_ends_with_bad_steps_saves_no_student_until_a_good_one_came(student, labelled, tmp_path, poison):
    row_ids = poison(lambda number: number in (2, 3, 4))  # of the second and of the third step
    train_few(student, labelled, tmp_path, *FEW, "--max_steps", 2)
    (tmp_path / "config.json").unlink()  # a single one may be due to a row
    row_ids[:] = range(4)
    for _ in range(2):  # nothing is left to train the second time
        with pytest.raises(
            UserError, match=r"the last 2 steps up to step 3 were not finite.*the student is not saved"
        ):
            train_few(student, labelled, tmp_path, *FEW, "--max_steps", 3)
    assert not (tmp_path / "config.json").exists()
    train_few(student, labelled, tmp_path, *FEW, "--max_steps", 4)
    assert (tmp_path / "config.json").exists()


def test_a_finite_evaluation_after_bad_steps_says_that_the_student_is_well(student, labelled, tmp_path, poison):
    poison(lambda number: 2 <= number < 6)
    train_few(student, labelled, tmp_path, *FEW, "--max_steps", 3, "--do_eval", "--eval_split_name", "test")
    assert (tmp_path / "config.json").exists() and metrics(tmp_path, "train/loss")[-1]["train/bad_steps"] == 2


def test_a_student_whose_last_evaluation_is_not_finite_is_not_saved(student, labelled, tmp_path, poison):
    poison(lambda number: number >= 4)  # what comes after the rows of two steps
    evaluate = ["--do_eval", "--eval_split_name", "test", "--eval_steps", 2]
    with pytest.raises(UserError, match=r"the last evaluation found eval/.*ce nan, so the student is not saved"):
        train_few(student, labelled, tmp_path, *FEW, "--max_steps", 2, *evaluate)
    assert not (tmp_path / "config.json").exists()


def test_no_limit_of_the_norm_is_no_clipping(student, labelled, tmp_path):
    none, high, low = (
        weights(train_few(student, labelled, tmp_path / str(limit), *FEW, "--max_steps", 2, "--max_grad_norm", limit))
        for limit in (0, 1e6, 1e-3)
    )
    assert all(torch.equal(tensor, high[name]) for name, tensor in none.items())
    assert not any(torch.equal(tensor, low[name]) for name, tensor in none.items() if "fc1.weight" in name)


@pytest.mark.parametrize(
    ("blamed", "norm", "scale", "bad", "named"),
    [
        ([False, False, False], 1.0, None, 0, []),
        ([False, True, False], torch.nan, None, 1, ["b"]),
        ([False, False, False], torch.inf, None, 1, ["a", "b", "c"]),  # the backward pass alone overflowed
        ([False, False, False], torch.inf, 2.0**12, 0, []),  # which the scaler answers
        ([False, False, False], torch.inf, 0.5, 1, ["a", "b", "c"]),  # but not for ever
        ([False, True, False], torch.nan, 2.0**12, 1, ["b"]),
    ],
)
def test_what_is_bad_and_what_float16s_scaler_answers(blamed, norm, scale, bad, named, capsys, monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "scaler", scale and torch.amp.GradScaler("cpu", init_scale=scale))
    reports = StepReports(accelerator, 10)
    group = [SimpleNamespace(row_ids=["a", "b"]), SimpleNamespace(row_ids=["c"])]
    reports.send(1, group, torch.tensor(blamed), torch.tensor(norm), stop=False)
    assert not reports.read() and reports.bad_steps == bad
    said = capsys.readouterr().out
    assert (f"on {', '.join(named)}\n" in said) if named else not said


def test_good_steps_between_them_end_no_run():
    reports = StepReports(Accelerator(cpu=True), 2)
    for norm in (torch.nan, 1.0, torch.nan, 1.0):
        reports.send(1, [SimpleNamespace(row_ids=[])], torch.tensor([False]), torch.tensor(norm), stop=False)
        reports.read()
    assert reports.bad_steps == 2


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


@pytest.mark.parametrize("launcher", [TORCHRUN, pytest.param(SHARDED, marks=pytest.mark.slow)], ids=["ddp", "fsdp"])
def test_two_processes_leave_out_a_step_that_is_bad_on_one_of_them(launcher, student, labelled, tmp_path):
    names = ["--model_name_or_path", student, "--train_dataset_name", labelled, "--output_dir", tmp_path]
    few = ["--max_steps", 2, "--logging_steps", 1, "--learning_rate", 1e-3, "--do_train", "--report_to", "none"]
    ran = launch("run_distillation.py", *names, *few, *FEW, processes=2, launcher=[*launcher, "tests/poisoned.py"])
    assert ran.code == 0, ran.stderr
    assert [line["train/bad_steps"] for line in metrics(tmp_path, "train/loss")] == [1, 1]
    before, first, second = (weights(path) for path in (student, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"))
    assert all(torch.equal(tensor, first[name]) for name, tensor in before.items())
    assert not all(torch.equal(tensor, second[name]) for name, tensor in before.items())
    assert ran.stdout.count("step 1 changed nothing: its loss or its gradients were not finite, on ") == 1
