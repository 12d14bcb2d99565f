"""Every benchmark runs, in a size that says nothing of speed, and its variants compute the same."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # each variant is a process of its own
SMALL = ["--size", "tiny", "--dtype", "float32", "--pairs", 1]


@pytest.fixture
def measured(tmp_path):
    """What a benchmark writes with --json."""

    def run(script, *flags) -> dict:
        command = [sys.executable, ROOT / "benchmarks" / script, *flags, "--json", tmp_path / "figures.json"]
        ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, ran.stderr
        found = json.loads((tmp_path / "figures.json").read_text())
        assert found["machine"] in ran.stdout
        return found

    return run


def test_labelling(measured):
    label = ["--batches", 1, "--batch_size", 2, "--label_tokens", 12, "--max_label_length", 16]
    found = measured("labelling.py", *SMALL, *label)
    assert found["speedup"] > 0 and found["token_agreement"] > 0.9
    assert set(found["token_agreements"]) == set(found["speedups"]) > {"engine", "engine_drafts", "ctranslate2"}
    assert found["wer"]["engine"] == found["wer"]["reference"]
    for figures in ("audio_seconds_per_second", "tokens_per_second", "peak_gb"):
        assert set(found[figures]) > set(found["speedups"]) and min(found[figures].values()) > 0


def test_the_training_step(measured):
    step = ["--batch_size", 2, "--label_tokens", 12, "--steps", 1, "--warmup", 0]
    found = measured("train_step.py", *SMALL, *step)
    assert found["loss_difference"] < 1e-5 and found["memory_ratio"] > 0
    assert found["speedup"] > 0 and found["speedup_cached"] > 0


def test_the_loss(measured):
    found = measured("loss.py", *SMALL, "--batch_size", 2, "--label_tokens", 12, "--steps", 1)
    assert max(found[name]["gradient_error"] for name in ("plain", "ours")) < 1e-5


def test_labelling_beside_decoding(measured):
    """Packed clips are four or five to a window."""
    found = measured("labelling_host.py", "--shards", 2, "--clips", 20, "--batch_size", 2, "--pace", 10_000)
    for workers in (0, 4):
        clips, packed = (found[f"{name}, {workers} workers"] for name in ("clips", "packed"))
        assert clips["windows"] == pytest.approx(5 * clips["audio"]) and 0 < packed["audio"] <= packed["windows"]


def test_the_memory_of_labelling(measured):
    few, many = measured("labelling_memory.py", "--few", 1, "--many", 2, "--megabytes", 8)["runs"]
    assert (few["shards"], many["shards"]) == (1, 2)
    assert 0 < few["output_gb"] < many["output_gb"] and many["peak_gb"] < 2 * few["peak_gb"]
