"""metrics.jsonl: one file for all stages of a folder, each with lines of its own."""

import json

import pytest
from accelerate import Accelerator

from distil_whisper.outputs import OutputFolder
from distil_whisper.trackers import Trackers


@pytest.fixture
def log(tmp_path):
    """Log steps as a run of a stage, which resumes from a step or starts anew; returns the lines of the file."""

    def run(stage: str, steps: range, resume_step: int | None = None):
        with OutputFolder(tmp_path, stage) as folder:
            trackers = Trackers(Accelerator(cpu=True), folder, "project", None, {}, resume_step)
            for step in steps:
                trackers.log({"figure": step / 2}, step)
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    return run


def test_a_stage_begins_or_goes_on_with_its_own_lines_alone(log, tmp_path):
    log("train", range(1, 4))
    lines = log("evaluate", range(1))
    assert [(line["stage"], line["step"]) for line in lines] == [*(("train", n) for n in (1, 2, 3)), ("evaluate", 0)]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "train", "st')  # killed while it wrote
    lines = log("train", range(3, 5), resume_step=2)
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("train", 1),
        ("train", 2),
        ("evaluate", 0),
        ("train", 3),
        ("train", 4),
    ]
    lines = log("train", range(1, 2))
    assert [(line["stage"], line["step"]) for line in lines] == [("evaluate", 0), ("train", 1)]
    assert lines[1]["figure"] == 0.5
