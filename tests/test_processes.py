"""Two processes give what one gives: the same rows, the same losses for the same global batches, the same figures."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.utils import DistributedType
from conftest import ROOT, launch
from stages import ENGLISH, SPEAKERS, metrics, train_few, weights

from distil_whisper import engine
from distil_whisper.engine import check_engine
from distil_whisper.errors import UserError

TRAINING = [*ENGLISH, "--freeze_encoder", "--timestamp_probability", 0.5, "--condition_on_prev_probability", 0.5]
EVALUATION = ["--do_eval", "--predict_with_generate", "--eval_steps", 2]
WHOLE = ["--per_device_train_batch_size", 6, "--per_device_eval_batch_size", 6, "--gradient_accumulation_steps", 2]
HALF = ["--per_device_train_batch_size", 3, "--per_device_eval_batch_size", 3, "--gradient_accumulation_steps", 2]

TWO = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0", "--config_file"]
DDP = [*TWO, "scripts/accelerate/ddp.yaml"]
SHARDED = [*TWO, "scripts/accelerate/fsdp.yaml", "tests/sharded.py"]
UNEVEN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "tests/uneven.py"]


def train_twice(student, labelled, folder, flags, start=lambda one, two: None, launcher=None):
    """Train in one process and in two; the second run begins with what `start` puts into its folder."""
    one = train_few(student, labelled, folder / "one", *flags, "--save_steps", 2, *WHOLE)
    start(one, folder / "two")
    names = ["--model_name_or_path", student, "--train_dataset_name", labelled, "--output_dir", folder / "two"]
    few = ["--max_steps", 4, "--logging_steps", 1, "--learning_rate", 1e-3, "--do_train", "--report_to", "none"]
    ran = launch("run_distillation.py", *names, *few, *flags, *HALF, processes=2, launcher=launcher)
    assert ran.code == 0, ran.stderr
    expected, found = metrics(one), metrics(folder / "two")
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, other in zip(expected, found, strict=True):
        line.pop("train/padding", None)
        assert {name: other[name] for name in line} == pytest.approx(line, rel=1e-3)
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(folder / "two")[name], atol=1e-4), name
    return ran.stdout


def begun(one, two):
    """A run whose last checkpoint is that of step 2."""
    shutil.copytree(one, two, ignore=shutil.ignore_patterns("checkpoint-4", "*.safetensors", "*.lock"))
    shutil.copytree(one / "checkpoint-2", two / "checkpoint-2", dirs_exist_ok=True)


@pytest.mark.parametrize("launcher", [DDP, SHARDED], ids=["ddp", "fsdp"])
def test_training_goes_on_in_two_processes(launcher, student, taught, labelled, tmp_path):
    """From a checkpoint of one process. Seven rows to evaluate: the last batch has one for two processes."""
    flags = [*TRAINING, *EVALUATION, "--eval_split_name", "test[:7]", "--teacher_model_name_or_path", taught]
    said = train_twice(student, labelled, tmp_path, flags, begun, launcher)
    assert "going on from" in said and "step 1: " not in said
    assert said.count("step 3: loss") == said.count("runs once for both") == 1


@pytest.mark.parametrize(
    ("kind", "version", "found"),
    [
        ("FSDP", 2, None),
        ("MULTI_GPU", 0, None),
        ("FSDP", 1, "FSDP with fsdp_version: 1"),
        ("DEEPSPEED", 0, "DeepSpeed"),
    ],
)
def test_engines_that_cannot_train_a_student_are_refused(kind, version, found):
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=version == 2)
    refused = (
        pytest.raises(UserError, match=f"accelerate was configured for {found}; use DDP") if found else nullcontext()
    )
    with refused:
        check_engine(accelerator)


def test_processes_may_drop_other_layers_than_one_another(student, labelled, tmp_path):
    folder = shutil.copytree(student, tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_layerdrop": 0.5}))
    flags = ["--model_name_or_path", folder, "--train_dataset_name", labelled, "--output_dir", tmp_path / "out"]
    few = ["--max_steps", 4, "--per_device_train_batch_size", 2, "--kl_weight", 0, "--do_train", "--report_to", "none"]
    ran = launch("run_distillation.py", *flags, *few, *ENGLISH, "--freeze_encoder", processes=2)
    assert ran.code == 0, ran.stderr
    assert not any(
        torch.equal(weights(folder)[name], t)
        for name, t in weights(tmp_path / "out").items()
        if "decoder" in name and "fc1" in name
    )


def test_dropped_layers_are_refused_where_weights_are_sharded():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(UserError, match=r"layerdrop 0\.1"):
        engine.allow_dropped_layers(accelerator, 0.1)


@pytest.mark.slow
def test_streamed_training_in_two_processes(student, taught, labelled, tmp_path):
    flags = [*TRAINING, *EVALUATION, "--eval_split_name", "test", "--teacher_model_name_or_path", taught]
    said = train_twice(student, labelled, tmp_path, [*flags, "--streaming"], begun)  # which compares the two
    assert said.count("step 4: loss") == 1


@pytest.mark.parametrize("launcher", [UNEVEN, SHARDED], ids=["torchrun", "fsdp"])
def test_labelling_in_two_processes(launcher, taught, labelled, speech_folder, tmp_path):
    """Configured for FSDP or not, every process has the whole teacher. One may end long before the other."""
    names = ["--model_name_or_path", taught, "--dataset_name", speech_folder, "--output_dir", tmp_path / "labelled"]
    flags = ["--dataset_split_name", "train+test", "--return_timestamps", "--decode_token_ids", False]
    flags += [*ENGLISH, *SPEAKERS, "--report_to", "none", "--ddp_timeout", 10, "--logging_steps", 1]
    flags += ["--dataloader_num_workers", 0]  # with workers a process takes a shard more than it labels
    ran = launch("run_pseudo_labelling.py", *names, *flags, processes=2, launcher=launcher)
    assert ran.code == 0, ran.stderr
    paths = sorted(path.relative_to(labelled) for path in (labelled / "default").glob("*.parquet"))
    assert paths == sorted(
        path.relative_to(tmp_path / "labelled") for path in (tmp_path / "labelled/default").iterdir()
    )
    for path in paths:
        assert pq.read_table(labelled / path).equals(pq.read_table(tmp_path / "labelled" / path))
    found, expected = (metrics(folder, "default/train/hours") for folder in (tmp_path / "labelled", labelled))
    assert [{**line, "step": 0} for line in found] == [{**line, "step": 0} for line in expected]
    if launcher is UNEVEN:  # it had one shard, of 8 or 12 rows, and the other process took the other two
        assert metrics(tmp_path / "labelled", "rows")[-1]["rows"] in (20, 24)


def test_the_configuration_for_a_cpu_starts_two_processes(tmp_path):
    """accelerate can start one without a word where two were asked for."""
    script = tmp_path / "count.py"
    script.write_text("from accelerate import Accelerator\nprint(f'of {Accelerator().num_processes}')\n")
    config = ROOT / "scripts/accelerate/ddp_cpu_2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout.count("of 2")) == (0, 2), ran.stderr


def test_processes_that_do_not_know_of_one_another_are_refused(monkeypatch, tmp_path):
    """As accelerate starts them without that variable: each would write into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = SimpleNamespace(report_to=["none"], output_dir=str(tmp_path), ddp_timeout=60)
    monkeypatch.setattr(engine, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(UserError, match="2 processes were launched, but accelerate counts 1; on CPUs set ACCELERATE"):
        engine.make_accelerator(args)
