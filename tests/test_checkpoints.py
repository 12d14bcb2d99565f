"""Checkpoints: whichever way a run ends, there is one to go on from; what is damaged never counts; which is best."""

import errno
import json
import math
import os
import shutil
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from distil_whisper import checkpoints
from distil_whisper.audio import LogMel
from distil_whisper.checkpoints import MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, Checkpoints
from distil_whisper.distiller import Distiller
from distil_whisper.errors import UserError
from distil_whisper.losses import LossWeights
from distil_whisper.models import LoadedWhisper, load_whisper
from distil_whisper.outputs import OutputFolder
from distil_whisper.student import make_student
from distil_whisper.trainer_state import Evaluation, StoredState, TrainerState


class Killed(BaseException):
    """In place of SIGKILL."""


@dataclass
class Run:
    """A small training, whose weights tell the step that it is at."""

    whisper: LoadedWhisper
    model: Distiller
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR

    def go_to(self, step: int) -> None:
        """Put step into all weights that are trained."""
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.fill_(step)
                    parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def weight(self) -> float:
        """What is in them."""
        return self.optimizer.param_groups[0]["params"][0].flatten()[0].item()

    def save(self, made: Checkpoints, state: TrainerState) -> None:
        """Write a checkpoint of the state's step, and wait for it."""
        self.go_to(state.step)
        made.save(self.whisper, self.model, self.optimizer, self.scheduler, state)
        made.finish()

    def load(self, made: Checkpoints) -> TrainerState | None:
        """The newest checkpoint's state; the weights must be those of its step."""
        stored = made.load_newest(self.model, self.optimizer)
        assert stored is None or self.weight() == stored.state.step
        return stored and stored.state


@pytest.fixture(scope="module")
def run(toy_teacher) -> Run:
    whisper = load_whisper(str(toy_teacher), device="cpu")
    whisper.model, _ = make_student(whisper.model)
    model = Distiller(whisper.model, LogMel(whisper.feature_extractor), LossWeights(kl=0.0), freeze_encoder=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    return Run(whisper, model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))


def opened(folder, limit=None, best_limit=0) -> Checkpoints:
    return Checkpoints(OutputFolder(folder, "training"), Accelerator(cpu=True), limit, best_limit)


def closed(made: Checkpoints) -> None:
    made.folder.__exit__()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".distil_whisper")


OPERATIONS = ["fsync", "mkdir", "open", "rename", "replace", "rmdir", "unlink"]


def kill_at(monkeypatch, number: int) -> list[str]:
    """Every file operation from that number on ends the run, also those that would clean up: those that were done."""
    done = []
    for name in OPERATIONS:
        real = getattr(os, name)

        def operation(*args, name=name, real=real, **options):
            if len(done) >= number:
                raise Killed
            done.append(name)
            return real(*args, **options)

        monkeypatch.setattr(os, name, operation)
    return done


@pytest.mark.parametrize("best", [False, True])
def test_a_kill_at_any_moment_leaves_a_checkpoint(run, best, tmp_path, monkeypatch):
    """The second one is written and the only one before is removed; or the best one and the one before are."""
    monkeypatch.setattr(checkpoints, "write_whisper", lambda path, _, weights: save_file(weights, path / MODEL_FILE))
    limits = {"limit": 1, "best_limit": int(best)}
    made, state = opened(tmp_path / "start", **limits), TrainerState()
    for step in (1, 2) if best else (1,):
        state.step = step
        state.evaluations[step] = Evaluation({"wer": 10.0 * step}, {"figure": "wer"})
        run.save(made, state)
    closed(made)
    state.step = 3
    state.evaluations[3] = Evaluation({"wer": 5.0}, {"figure": "wer"})
    found = []
    for number in range(1000):
        folder = shutil.copytree(tmp_path / "start", tmp_path / str(number))
        made = opened(folder, **limits)
        with monkeypatch.context() as patch:
            done = kill_at(patch, number)
            try:
                run.save(made, state)
                break
            except Killed:
                closed(made)
        made = opened(folder, **limits)
        assert not [name for name in names(folder) if name.endswith(".partial")]
        found.append(run.load(made).step)
        closed(made)
        shutil.rmtree(folder)
    assert {"replace", "fsync", "unlink", "rmdir"} <= set(done) and len(found) > 20
    assert sorted(set(found)) == [2 if best else 1, 3] and found == sorted(found)
    assert names(folder) == ["checkpoint-3"]


def damage(path) -> None:
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")


def test_what_was_made_after_going_on_from_an_older_one_is_newer(run, tmp_path):
    """A damaged checkpoint of a higher step neither takes a good one's place nor hides it."""
    made = opened(tmp_path, limit=2)
    for step in (100, 200):
        run.save(made, TrainerState(step))
    damage(tmp_path / "checkpoint-200" / OPTIMIZER_FILE)
    closed(made)
    made = opened(tmp_path, limit=1)
    assert run.load(made).step == 100
    run.save(made, TrainerState(150))
    assert names(tmp_path) == ["checkpoint-150"]
    run.save(made, TrainerState(120))
    assert names(tmp_path) == ["checkpoint-120"] and run.load(made).step == 120


def test_a_damaged_one_that_nobody_looked_at_takes_no_place(run, tmp_path):
    made = opened(tmp_path)
    for step in (1, 2, 3):
        run.save(made, TrainerState(step))
    damage(tmp_path / "checkpoint-2" / MODEL_FILE)
    closed(made)
    made = opened(tmp_path, limit=3)
    assert run.load(made).step == 3
    run.save(made, TrainerState(4))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def with_state(path, change) -> None:
    stored = json.loads((path / STATE_FILE).read_text())
    (path / STATE_FILE).write_text(json.dumps(change(stored)))


def set_at(*place, value):
    """A change of one value of a state file, with a right checksum of it or without one."""

    def change(stored):
        inner = stored
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value
        return stored

    return lambda path: with_state(path, change)


def infinite(path) -> None:
    weights = load_file(path / MODEL_FILE)
    name = next(iter(weights))
    save_file({**weights, name: torch.full_like(weights[name], torch.inf)}, path / MODEL_FILE)
    set_at("checksums", MODEL_FILE, value=checkpoints._checksum(path / MODEL_FILE))(path)


DAMAGE = {
    "no state": lambda path: (path / STATE_FILE).unlink(),
    "empty": lambda path: (path / STATE_FILE).write_text(""),
    "cut": lambda path: (path / STATE_FILE).write_text((path / STATE_FILE).read_text()[:-30]),
    "no text": lambda path: (path / STATE_FILE).write_bytes(b"\xff\xfe\x00"),
    "null": lambda path: (path / STATE_FILE).write_text("null"),
    "a list": lambda path: (path / STATE_FILE).write_text("[1, 2]"),
    "a number": lambda path: (path / STATE_FILE).write_text("7"),
    "no object": lambda path: (path / STATE_FILE).write_text("{}"),
    "no checksums": lambda path: with_state(path, lambda stored: {**stored, "checksums": {}}),
    "checksums null": lambda path: with_state(path, lambda stored: {**stored, "checksums": None}),
    "state null": lambda path: with_state(path, lambda stored: {**stored, "state": None}),
    "state list": lambda path: with_state(path, lambda stored: {**stored, "state": []}),
    "no schedule": lambda path: with_state(path, lambda stored: {**stored, "scheduler": {}}),
    "schedule text": set_at("scheduler", "last_epoch", value="two"),
    "another step": set_at("state", "step", value=7),
    "step text": set_at("state", "step", value="2"),
    "step true": set_at("state", "step", value=True),
    "evaluations list": set_at("state", "evaluations", value=[3.0]),
    "evaluations nonsense": set_at("state", "evaluations", value={"two": 1.0}),
    "metered nonsense": set_at("state", "metered", value=[None]),
    "streams changed": set_at("state", "streams", value={"lanes": -1}),
    "model cut": lambda path: (path / MODEL_FILE).write_bytes((path / MODEL_FILE).read_bytes()[:-9]),
    "model changed": lambda path: damage(path / MODEL_FILE),
    "model away": lambda path: (path / MODEL_FILE).unlink(),
    "optimizer empty": lambda path: (path / OPTIMIZER_FILE).write_bytes(b""),
    "not finite": infinite,
}


@pytest.fixture(scope="module")
def two_checkpoints(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    made = opened(folder)
    for step in (1, 2):
        run.save(made, TrainerState(step, {step: Evaluation({"wer": 1.0 / step}, {"figure": "wer"})}))
    closed(made)
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(kind, run, two_checkpoints, tmp_path, capsys):
    folder = shutil.copytree(two_checkpoints, tmp_path / "out")
    DAMAGE[kind](folder / "checkpoint-2")
    made = opened(folder)
    assert run.load(made).step == 1
    assert "checkpoint-2 is damaged (" in capsys.readouterr().out
    for path in (folder / "checkpoint-1", folder / "checkpoint-2"):
        (path / STATE_FILE).write_text("null")
    closed(made)
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged .*--overwrite_output_dir"):
        run.load(opened(folder))


def test_without_a_checkpoint_training_begins(run, tmp_path):
    assert run.load(opened(tmp_path)) is None


def test_a_checkpoint_of_the_versions_before_is_loaded(run, two_checkpoints, tmp_path):
    """They kept a number of each evaluation, all figures of the last, and no checksum of the state."""
    folder = shutil.copytree(two_checkpoints, tmp_path / "out")
    last = {"eval/a/test/wer": 20.0, "eval/wer": 20.0, "eval/loss": 1.0, "eval/a/test/loss": 1.0}
    for step, figures in ((1, {"1": 30.0}), (2, {"1": 30.0, "2": math.nan})):
        path = folder / f"checkpoint-{step}" / STATE_FILE
        checksums = json.loads(path.read_text())["checksums"]
        del checksums[STATE_FILE]
        state = {"step": step, "figures": figures, "evaluation": last, "metered": [], "streams": {}, "scaler": {}}
        path.write_text(json.dumps({"state": state, "scheduler": {"last_epoch": step}, "checksums": checksums}))
    made = opened(folder)
    state = run.load(made)
    assert state.step == 2 and state.evaluations[2].values == last
    assert made.load_newest(run.model, run.optimizer).scheduler == {"last_epoch": 2}
    assert state.evaluations[1].measure == {"figure": "eval/wer", "sets": ["a/test"]}
    assert state.evaluations[1].figure == 30.0 and state.best_steps()[-1] == 1
    state.evaluations[3] = Evaluation({"eval/wer": 40.0}, {**state.evaluations[1].measure, "settings": "new"})
    state.step = 3
    assert state.best_steps()[-2:] == [1, 3]
    run.save(made, state)
    assert run.load(made).evaluations.keys() == {1, 2, 3}


def test_best_is_the_lowest_figure_of_what_the_last_evaluation_measures():
    wer, loss = {"figure": "eval/wer", "sets": ["a"]}, {"figure": "eval/loss", "sets": ["a"]}
    other = {"figure": "eval/wer", "sets": ["a", "b"]}
    state = TrainerState()
    assert state.best_steps() == []
    for step, (value, measure) in enumerate(
        [(50.0, wer), (1.0, loss), (math.nan, wer), (20.0, other), (30.0, wer), (math.inf, wer), (40.0, wer)]
    ):
        state.evaluations[step] = Evaluation({measure["figure"]: value}, measure)
    assert state.best_steps() == [4, 6, 0]
    state.evaluations[7] = Evaluation({"eval/loss": 2.0, "eval/wer": 0.0}, loss)
    assert state.best_steps() == [1, 7]
    state.evaluations[8] = Evaluation({"eval/wer": math.nan}, wer)
    assert state.best_steps() == [4, 6, 0]
    state.evaluations |= {
        9: Evaluation({"eval/wer": 35.0}, wer, rows=20),
        10: Evaluation({"eval/wer": 0.0}, wer, rows=19),
    }
    assert state.best_steps() == [4, 9, 6, 0]  # an earlier version has not counted the rows
    assert StoredState.from_json(json.loads(json.dumps({"state": {"step": 8}, "scheduler": {}, "checksums": {}})))


def test_the_best_checkpoint_is_loaded_or_missed(run, tmp_path):
    made = opened(tmp_path, limit=1, best_limit=1)
    state = TrainerState()
    for step, wer in ((1, 20.0), (2, 10.0), (3, math.nan), (4, 30.0)):
        state.step, state.evaluations[step] = step, Evaluation({"wer": wer}, {"figure": "wer"})
        run.save(made, state)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert made.load_best(state, run.model) == 2 and run.weight() == 2
    damage(tmp_path / "checkpoint-2" / MODEL_FILE)
    closed(made)
    made = opened(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint-2, the best checkpoint, is damaged .*was changed"):
        made.load_best(state, run.model)
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint-2, the best checkpoint, is missing; restore it, or leave out"):
        made.load_best(state, run.model)
    state.evaluations = {4: Evaluation({"wer": math.nan}, {"figure": "wer"})}
    with pytest.raises(UserError, match="no evaluation gave a finite figure"):
        made.load_best(state, run.model)


def test_a_full_disk_leaves_what_is_there(run, tmp_path, monkeypatch):
    made = opened(tmp_path, limit=1)
    run.save(made, TrainerState(1))

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        made.save(run.whisper, run.model, run.optimizer, run.scheduler, TrainerState(2))
        made._writer.shutdown()
        with pytest.raises(OSError, match="No space left"):
            made.raise_failure()
    assert names(tmp_path) == ["checkpoint-1"]
    closed(made)
    made = opened(tmp_path, limit=1)
    run.go_to(1)
    assert run.load(made).step == 1
    run.save(made, TrainerState(2))
    assert names(tmp_path) == ["checkpoint-2"]


def test_what_cannot_be_read_back_is_no_checkpoint(run, tmp_path, monkeypatch):
    made = opened(tmp_path, limit=1)
    run.save(made, TrainerState(1))
    monkeypatch.setattr(checkpoints, "save_file", lambda _, path: path.write_bytes(b"something else"))
    with pytest.raises(UserError, match=r"checkpoint-2 was written, but cannot be read back .*; the earlier"):
        run.save(made, TrainerState(2))
    assert names(tmp_path) == ["checkpoint-1"]


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path):
    made = opened(tmp_path, limit=1)
    run.save(made, TrainerState(1))
    run.go_to(2)
    with torch.no_grad():
        run.whisper.model.model.decoder.layers[0].fc1.bias[3] = torch.nan
    made.save(run.whisper, run.model, run.optimizer, run.scheduler, TrainerState(2))
    with pytest.raises(UserError, match=r"not finite at step 2 \(such as model.decoder.layers.0.fc1.bias\)"):
        made.finish()
    assert names(tmp_path) == ["checkpoint-1"]
    assert run.load(made).step == 1


def test_another_student_is_refused(run, two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / "out")
    path = folder / "checkpoint-2"
    weights = {name: tensor for name, tensor in load_file(path / MODEL_FILE).items() if "layers.1." not in name}
    save_file(weights, path / MODEL_FILE)
    set_at("checksums", MODEL_FILE, value=checkpoints._checksum(path / MODEL_FILE))(path)
    with pytest.raises(UserError, match="another student than this command trains"):
        run.load(opened(folder))
