"""Runs whose processes are killed (SIGKILL) at random moments end as unbroken ones do."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, make_utterances, write_audio_dataset
from stages import ENGLISH, SPEAKERS, label, metrics, train_few, weights
from test_resume import EVERYTHING_RANDOM

FEW, MANY = 2, 20


def command(script, *flags, processes=1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", processes, "--standalone"] if processes > 1 else []
    return [str(part) for part in (sys.executable, *launcher, ROOT / script, *flags)]


def start(arguments) -> subprocess.Popen:
    """A command whose processes are a group of their own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, env=environment, start_new_session=True, cwd=ROOT, **pipes)


def kill(process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def kill_within(arguments, begun: str, seconds: float) -> None:
    """Start a command and kill it at most so many seconds after it said that the work has begun."""
    process = start(arguments)
    for line in process.stdout:
        if begun in line:
            break
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    kill(process)


def ended(arguments) -> str:
    process = start(arguments)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize(
    ("kills", "processes", "streaming"),
    [
        (FEW, 1, True),
        *(pytest.param(MANY, p, s, marks=pytest.mark.slow) for p in (1, 2) for s in (False, True)),
    ],
)
def test_killed_labelling(kills, processes, streaming, taught, utterances, tmp_path):
    """A batch of four windows is the most that is lost, in shards of 60 rows."""
    data = write_audio_dataset(tmp_path / "speech", utterances * 10, files=4)
    flags = [*ENGLISH, *SPEAKERS, "--return_timestamps", "--per_device_eval_batch_size", 4, "--logging_steps", 1]
    flags += ["--concatenate_audio", "--streaming", streaming]
    unbroken = label(taught, data, tmp_path / "unbroken", *flags)
    names = ["--model_name_or_path", taught, "--dataset_name", data, "--output_dir", tmp_path / "broken"]
    arguments = command("run_pseudo_labelling.py", *names, *flags, "--report_to", "none", processes=processes)
    draw = np.random.default_rng(kills + processes)
    for _ in range(kills):
        kill_within(arguments, "shards are finished", draw.uniform(0, 4.0 / kills))
    ended(arguments)
    files = sorted(path.name for path in (unbroken / "default").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "broken/default").iterdir()) and len(files) == 4
    for name in files:
        found, expected = (tmp_path / "broken/default" / name, unbroken / "default" / name)
        assert found.read_bytes() == expected.read_bytes() and pq.read_table(found).num_rows


@pytest.mark.parametrize(
    ("kills", "streaming"),
    [(FEW, False), *(pytest.param(MANY, streaming, marks=pytest.mark.slow) for streaming in (False, True))],
)
def test_killed_training(kills, streaming, student, labelled, tmp_path):
    steps = 4 * kills
    flags = [*EVERYTHING_RANDOM, "--per_device_train_batch_size", 4, "--streaming", streaming, "--max_steps", steps]
    flags += ["--save_steps", 1, "--save_total_limit", 1, "--learning_rate", 1e-3, "--logging_steps", 1]
    unbroken = train_few(student, labelled, tmp_path / "unbroken", *flags)
    names = ["--model_name_or_path", student, "--train_dataset_name", labelled, "--output_dir", tmp_path / "broken"]
    arguments = command("run_distillation.py", *names, *flags, "--do_train", "--report_to", "none")
    draw = np.random.default_rng(kills)
    for _ in range(kills):
        kill_within(arguments, f"step {draw.integers(1, steps)}:", draw.uniform(0, 0.1))
    ended(arguments)
    assert metrics(tmp_path / "broken") == metrics(unbroken)
    assert [line["step"] for line in metrics(unbroken, "train/loss")] == list(range(1, steps + 1))
    found = weights(tmp_path / "broken")
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(unbroken).items())


@pytest.mark.slow
def test_evaluation_goes_on_by_row_with_any_number_of_processes(toy_teacher, tmp_path):
    data = write_audio_dataset(tmp_path / "data", make_utterances(60), split="test", files=3)
    names = [
        "--model_name_or_path",
        toy_teacher,
        "--dataset_name",
        data,
        *ENGLISH,
        "--report_to",
        "none",
        "--streaming",
    ]
    flags = [*names, "--per_device_eval_batch_size", 1, "--generation_max_length", 32, "--output_dir"]

    def written() -> int:
        logs = (tmp_path / "killed").glob(".distil_whisper/*.batches/*/*.jsonl")
        return sum(log.read_text(encoding="utf-8").count("\n") for log in logs)

    for processes, batches in ((2, 5), (1, 15), (2, 25)):
        running = start(command("run_short_form_eval.py", *flags, tmp_path / "killed", processes=processes))
        while running.poll() is None and written() < batches:
            time.sleep(0.02)
        for child in psutil.Process(running.pid).children(recursive=True):  # torchrun's are groups of their own
            child.kill()
        kill(running)
        assert batches <= written() < 60
    for name, processes in (("killed", 2), ("whole", 1)):
        ended(command("run_short_form_eval.py", *flags, tmp_path / name, processes=processes))
    killed, whole = ((tmp_path / name / "short_form_predictions.jsonl").read_text() for name in ("killed", "whole"))
    assert killed == whole and whole.count("\n") == 60 == written()
