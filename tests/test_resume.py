"""A run that was stopped and started again ends as one that was not: losses, weights and rows, bit for bit."""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, launch
from stages import ENGLISH, SPEAKERS, label, metrics, train_few, weights, write_manifest

import run_distillation
import run_pseudo_labelling
from distil_whisper.validation import Validation, Validator

EVERYTHING_RANDOM = """
  --language en --kl_weight 0 --gradient_accumulation_steps 2 --timestamp_probability 0.5
  --condition_on_prev_probability 0.5 --noise_probability 0.5 --speed_perturbation 0.9 1.1 --apply_spec_augment
  --mask_time_prob 0.2 --mask_feature_prob 0.2 --shuffle_buffer_size 10 --save_steps 2 --max_steps 5
""".split()  # noqa: SIM905


class Killed(BaseException):
    """In place of SIGKILL, within this process."""


@pytest.fixture(scope="module")
def forgetful(student, tmp_path_factory):
    """The student with dropout."""
    folder = shutil.copytree(student, tmp_path_factory.mktemp("forgetful") / "student")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.1, "attention_dropout": 0.1}))
    return folder


@pytest.fixture
def stop(monkeypatch):
    """Stops the training of this process in its step of that number (from 0), once, by a function."""
    step = run_distillation.optimizer_step

    def arrange(number, how):
        def stopping(training, *rest):
            if training.state.step == number:
                monkeypatch.setattr(run_distillation, "optimizer_step", step)
                training.checkpoints.finish()
                how()
            return step(training, *rest)

        monkeypatch.setattr(run_distillation, "optimizer_step", stopping)

    return arrange


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def same(one, other) -> bool:
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


@pytest.mark.parametrize(("streaming", "step", "how"), [(False, 3, kill), (True, 1, terminate)])
def test_resumed_training_equals_an_unbroken_one(streaming, step, how, forgetful, labelled, stop, tmp_path):
    """Shuffling, dropout, augmentation and accumulation are on; only the broken run has workers. A signal is heeded
    at the end of the next step."""
    evaluate = ["--do_eval", "--eval_split_name", "test", "--predict_with_generate", "--eval_steps", 3]
    flags = [*EVERYTHING_RANDOM, *evaluate, "--streaming", streaming]
    unbroken = train_few(forgetful, labelled, tmp_path / "unbroken", *flags)
    workers = ["--dataloader_num_workers", 2]
    stop(step, how)
    with pytest.raises((Killed, SystemExit)) as stopped:
        train_few(forgetful, labelled, tmp_path / "broken", *flags, *workers)
    assert getattr(stopped.value, "code", 143) == 143
    assert (tmp_path / "broken/checkpoint-2").exists() and not (tmp_path / "broken/model.safetensors").exists()
    broken = train_few(forgetful, labelled, tmp_path / "broken", *flags, *workers)
    assert metrics(broken) == metrics(unbroken)
    assert [line["step"] for line in metrics(broken, "train/loss")] == [1, 2, 3, 4, 5]
    assert same(broken, unbroken) and not same(broken, forgetful)


def test_resumed_training_with_caches_equals_an_unbroken_one(student, taught, labelled, stop, tmp_path):
    """Steps that were done again, after the checkpoint, find in the caches what they computed the first time."""
    flags = [*ENGLISH, "--teacher_model_name_or_path", taught, "--freeze_encoder", "--timestamp_probability", 0.5]
    flags += ["--cache_encoder_outputs", "--cache_teacher_states", "--save_steps", 1, "--max_steps", 4]
    unbroken = train_few(student, labelled, tmp_path / "unbroken", *flags)
    stop(3, kill)
    with pytest.raises(Killed):
        train_few(student, labelled, tmp_path / "broken", *flags)
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"broken/checkpoint-{step}")
    broken = train_few(student, labelled, tmp_path / "broken", *flags)
    assert metrics(broken) == metrics(unbroken) and same(broken, unbroken)


@pytest.fixture
def scaled(monkeypatch):
    """Gradients are scaled as for float16 on a GPU, in bfloat16: the scales of the steps."""
    make, scales = run_distillation.training_accelerator, []

    def scaling(args):
        accelerator = make(argparse.Namespace(**{**vars(args), "dtype": "bfloat16"}))
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        update = accelerator.scaler.update

        def watched():
            update()
            scales.append(accelerator.scaler.get_scale())

        accelerator.scaler.update = watched
        return accelerator

    monkeypatch.setattr(run_distillation, "training_accelerator", scaling)
    return scales


def test_the_scale_of_gradients_is_kept(student, labelled, scaled, tmp_path):
    flags = [*ENGLISH, "--kl_weight", 0, "--lr_scheduler_type", "constant"]
    train_few(student, labelled, tmp_path / "unbroken", *flags)
    expected = list(scaled)
    scaled.clear()
    for steps in (3, 4):
        train_few(student, labelled, tmp_path / "broken", *flags, "--max_steps", steps)
    assert scaled == expected == [2.0**8, 2.0**9, 2.0**9, 2.0**10]


def test_a_step_whose_gradients_overflow_is_left_out(student, labelled, scaled, monkeypatch, tmp_path):
    """It is no bad step, and moves the schedule; an infinite norm is no JSON."""
    clip = Accelerator.clip_grad_norm_

    def overflowing(self, parameters, most):
        parameters[0].grad.fill_(torch.inf)
        return clip(self, parameters, most)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", overflowing)
    folder = train_few(student, labelled, tmp_path, *ENGLISH, "--kl_weight", 0, "--max_steps", 2)
    assert scaled == [2.0**7, 2.0**6] and same(folder, student)
    lines = metrics(folder, "train/loss")
    assert [line["train/learning_rate"] for line in lines] == [5e-4, 0]
    for line in lines:
        assert line["train/grad_norm"] is None and line["train/bad_steps"] == 0
        assert math.isfinite(line["train/loss"])


def test_training_that_was_killed_from_outside(student, labelled, tmp_path):
    flags = [*EVERYTHING_RANDOM, "--per_device_train_batch_size", 4, "--logging_steps", 1]
    unbroken = train_few(student, labelled, tmp_path / "unbroken", *flags)
    names = ["--model_name_or_path", student, "--train_dataset_name", labelled, "--output_dir", tmp_path / "broken"]
    command = [
        ROOT / "run_distillation.py",
        *names,
        "--do_train",
        "--report_to",
        "none",
        "--learning_rate",
        1e-3,
        *flags,
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    python = [sys.executable, *(str(part) for part in command)]
    with subprocess.Popen(python, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 4:"):
                process.kill()
    assert process.returncode == -signal.SIGKILL
    broken = train_few(student, labelled, tmp_path / "broken", *flags)
    assert metrics(broken) == metrics(unbroken) and same(broken, unbroken)


def test_a_damaged_checkpoint_is_passed_over(student, labelled, stop, tmp_path, capsys):
    unbroken = train_few(student, labelled, tmp_path / "unbroken", *EVERYTHING_RANDOM)
    stop(4, kill)
    with pytest.raises(Killed):
        train_few(student, labelled, tmp_path / "broken", *EVERYTHING_RANDOM)
    damaged = tmp_path / "broken/checkpoint-4/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8] + b"12345678")
    broken = train_few(student, labelled, tmp_path / "broken", *EVERYTHING_RANDOM)
    said = capsys.readouterr().out
    assert "checkpoint-4 is damaged (optimizer.safetensors was changed) and is passed over" in said
    assert "going on from" in said and "checkpoint-2" in said
    assert metrics(broken) == metrics(unbroken) and same(broken, unbroken)


def test_the_best_evaluation_is_remembered(student, labelled, stop, monkeypatch, tmp_path):
    losses = iter([50.0, 20.0, 30.0, 40.0])
    names = ("eval/loss", "eval/labelled/default/test/loss")
    monkeypatch.setattr(Validator, "__call__", lambda *_: Validation(dict.fromkeys(names, next(losses))))
    keep = ["--save_steps", 1, "--save_total_limit", 1, "--load_best_model_at_end", *ENGLISH, "--kl_weight", 0]
    flags = ["--do_eval", "--eval_split_name", "test", "--eval_steps", 1, *keep]
    stop(3, kill)
    with pytest.raises(Killed):
        train_few(student, labelled, tmp_path / "out", *flags)
    folder = train_few(student, labelled, tmp_path / "out", *flags)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert same(folder, folder / "checkpoint-2") and not same(folder, folder / "checkpoint-4")
    assert [line["eval/loss"] for line in metrics(folder, "eval/loss")] == [50, 20, 30, 40]


def test_other_batches_go_on_with_the_next_sample_and_the_epochs_that_were_asked_for(
    student, labelled, seen, stop, tmp_path
):
    """Two epochs of 24 rows, the first two steps in batches of 4, the others in batches of 3, two to a step."""
    flags = [*ENGLISH, "--kl_weight", 0, "--max_steps", -1, "--num_train_epochs", 2, "--save_steps", 2]
    train_few(student, labelled, tmp_path / "unbroken", *flags)
    rows = list(seen.rows)
    stop(3, kill)
    with pytest.raises(Killed):
        train_few(student, labelled, tmp_path / "broken", *flags)
    seen.rows.clear()
    other = ["--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2]
    folder = train_few(student, labelled, tmp_path / "broken", *flags, *other)
    last = metrics(folder, "train/epoch")[-1]
    assert seen.rows == rows[8:] and last["train/epoch"] == 2  # 16 rows in 6 batches, and 24 in 8
    assert last["step"] == 2 + 7 and last["train/learning_rate"] == 0


@pytest.mark.parametrize(
    ("before", "now", "sentence"),
    [(False, True, "the run was not streamed before: a new"), (True, False, "the run was streamed before: from here")],
)
def test_a_run_goes_on_streamed_or_no_longer(before, now, sentence, student, labelled, tmp_path, capsys):
    flags = [*ENGLISH, "--kl_weight", 0]
    train_few(student, labelled, tmp_path / "out", *flags, "--max_steps", 2, "--streaming", before)
    folder = train_few(student, labelled, tmp_path / "out", *flags, "--max_steps", 4, "--streaming", now)
    assert sentence in capsys.readouterr().out
    assert [line["step"] for line in metrics(folder, "train/loss")] == [1, 2, 3, 4]


def test_a_finished_run_is_not_trained_again(student, labelled, seen, tmp_path):
    flags = [*ENGLISH, "--kl_weight", 0]
    folder = train_few(student, labelled, tmp_path / "out", *flags)
    before, lines = weights(folder), metrics(folder)
    seen.rows.clear()
    train_few(student, labelled, folder, *flags)
    assert not seen.rows and metrics(folder) == lines
    assert all(torch.equal(tensor, weights(folder)[name]) for name, tensor in before.items())


def test_a_run_that_goes_on_with_other_arguments_says_which(student, labelled, tmp_path, capsys):
    flags = [*ENGLISH, "--kl_weight", 0]
    folder = train_few(student, labelled, tmp_path / "out", *flags)
    assert "Arguments that changed" not in (folder / "README.md").read_text()
    changed = ["--learning_rate", 0.003, "--max_steps", 5, "--logging_steps", 2]
    for more in (
        changed,
        [*changed, "--report_to", "none"],
        ["--max_steps", 6],
        ["--learning_rate", 9, "--max_steps", 2],
    ):
        train_few(student, labelled, folder, *flags, *more)
    said = capsys.readouterr().out
    assert said.count("going on with other arguments than before") == 2
    for change in ("learning_rate was 0.001 and is 0.003", "learning_rate was 0.003 and is 0.001"):
        assert change in said
    for change in ("max_steps was 4 and is 5", "max_steps was 5 and is 6"):
        assert change in said
    assert "logging_steps was" not in said and "nothing is left to train: 2 steps were asked for" in said
    card = (folder / "README.md").read_text()
    assert "Arguments that changed on the way: from step 4 on, " in card and "; from step 5 on, " in card
    rates = [line for line in card.splitlines() if "learning_rate`" in line and line.startswith("|")]
    assert len(rates) == 1 and "0.001" in rates[0]  # not the last one, with which nothing was trained
    train_few(student, labelled, folder, *flags, "--overwrite_output_dir")
    assert "Arguments that changed" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("rate", [3e-3, 0])
def test_a_run_that_goes_on_with_another_learning_rate_learns_at_it(student, labelled, tmp_path, rate):
    flags = [*ENGLISH, "--kl_weight", 0, "--lr_scheduler_type", "constant"]
    folder = train_few(student, labelled, tmp_path / "out", *flags)
    before = weights(folder)
    train_few(student, labelled, folder, *flags, "--learning_rate", rate, "--max_steps", 6)
    rates = [line["train/learning_rate"] for line in metrics(folder, "train/loss")]
    assert rates == [1e-3] * 4 + [rate] * 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(folder).items()) == (not rate)


def test_arguments_that_may_change_are_arguments():
    assert set(run_distillation.Arguments.__dataclass_fields__) > run_distillation.MAY_CHANGE


def shards(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "default").glob("*.parquet")}


@pytest.mark.parametrize("streaming", [False, True])
def test_killed_labelling_equals_an_unbroken_one(streaming, taught, speech_folder, monkeypatch, tmp_path, capsys):
    """Killed while it writes the second of two shards: the first is left as it is, the second has the same bytes."""
    flags = [*ENGLISH, *SPEAKERS, "--return_timestamps", "--per_device_eval_batch_size", 5, "--streaming", streaming]
    flags += ["--logging_steps", 1, "--dataloader_num_workers", 0]
    unbroken = label(taught, speech_folder, tmp_path / "unbroken", *flags)
    write = run_pseudo_labelling.write

    def killed(job, pace, unit, rows):
        if unit.index == 1 and unit.tally.rows == 10:
            raise Killed
        write(job, pace, unit, rows)

    monkeypatch.setattr(run_pseudo_labelling, "write", killed)
    with pytest.raises(Killed):
        label(taught, speech_folder, tmp_path / "broken", *flags)
    assert list(shards(tmp_path / "broken")) == ["train-00000-of-00002.parquet"]
    first = (tmp_path / "broken/default/train-00000-of-00002.parquet").stat().st_mtime_ns
    monkeypatch.undo()
    capsys.readouterr()
    broken = label(taught, speech_folder, tmp_path / "broken", *flags)
    assert "default/train-00001-of-00002.parquet: going on behind 5 windows" in capsys.readouterr().out
    assert shards(broken) == shards(unbroken) and len(shards(broken)) == 2
    assert (broken / "default/train-00000-of-00002.parquet").stat().st_mtime_ns == first


def test_labelling_that_is_asked_to_stop_keeps_what_is_labelled(taught, speech_folder, monkeypatch, tmp_path, capsys):
    flags = [*ENGLISH, *SPEAKERS, "--return_timestamps", "--per_device_eval_batch_size", 5, "--logging_steps", 2]
    flags += ["--dataloader_num_workers", 0]
    unbroken = label(taught, speech_folder, tmp_path / "unbroken", *flags)
    write = run_pseudo_labelling.write

    def interrupted(job, pace, unit, rows):
        if unit.index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        write(job, pace, unit, rows)

    monkeypatch.setattr(run_pseudo_labelling, "write", interrupted)
    with pytest.raises(SystemExit) as ended:
        label(taught, speech_folder, tmp_path / "broken", *flags)
    assert ended.value.code == 130
    said = "stopped behind 10 windows of default/train-00001-of-00002.parquet; the same command goes on"
    assert said in capsys.readouterr().out
    monkeypatch.undo()
    broken = label(taught, speech_folder, tmp_path / "broken", *flags)
    assert "default/train-00001-of-00002.parquet: going on behind 10 windows" in capsys.readouterr().out
    assert shards(broken) == shards(unbroken)


@pytest.mark.parametrize("row", [0, 4])
def test_labelling_goes_on_only_after_the_same_windows(row, taught, utterances, monkeypatch, tmp_path, capsys):
    """A file that was missing is there once the labelling was killed, before the rows that were kept or after them."""
    manifest = write_manifest(tmp_path / "data/train.json", utterances[:6])
    audio = tmp_path / "data" / json.loads(manifest.read_text())[row]["audio"]
    flags = [*ENGLISH, "--per_device_eval_batch_size", 1, "--logging_steps", 1, "--dataloader_num_workers", 0]
    unbroken = label(taught, manifest, tmp_path / "unbroken", *flags)
    missing, write = audio.rename(tmp_path / "missing"), run_pseudo_labelling.write

    def killed(job, pace, unit, rows):
        if unit.tally.rows == 4:
            raise Killed
        write(job, pace, unit, rows)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_pseudo_labelling, "write", killed)
        label(taught, manifest, tmp_path / "broken", *flags)
    missing.rename(audio)
    capsys.readouterr()
    assert shards(label(taught, manifest, tmp_path / "broken", *flags)) == shards(unbroken)
    said = "train-00000-of-00001.parquet: its rows give other windows than before, and it is labelled anew"
    assert (said in capsys.readouterr().out) == (row == 0)


def test_what_a_killed_run_left_half_written_goes(student, labelled, tmp_path):
    """Halves have the number of the process that was killed in their names; other people's files stay."""
    flags = [*ENGLISH, "--kl_weight", 0, "--max_steps", 1]
    folder = train_few(student, labelled, tmp_path / "out", *flags)
    half, mine = folder / ".checkpoint-1.12345.partial", folder / ".download.12345.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    mine.write_text("mine")
    train_few(student, labelled, folder, *flags)
    assert not half.exists() and mine.read_text() == "mine"


def test_two_threads_give_the_same_weights_each_time(student, tmp_path):
    saved = [tmp_path / name for name in ("one", "other")]
    for path in saved:
        ran = launch("tests/threads.py", student, path, env={"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"})
        assert ran.code == 0, ran.stderr
    assert saved[0].read_bytes() == saved[1].read_bytes()
