"""Output folders: one run at a time, files appear whole, and only what we wrote is replaced or removed."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from distil_whisper import engine
from distil_whisper.errors import UserError
from distil_whisper.outputs import RECORDS, OutputFolder, atomic_path, check_apart, public_arguments, write_text

STAGE = "run_distillation"


def contents(path):
    """Files below a folder with their text, without our records."""
    return {
        str(file.relative_to(path)): file.read_text()
        for file in path.rglob("*")
        if file.is_file() and RECORDS not in file.parts
    }


def write_some(path, text="ours", **options):
    """One run of a stage that writes a file, a file below a folder, and a folder."""
    with OutputFolder(path, STAGE, **options) as folder:
        folder.write_text("metrics.jsonl", text)
        folder.claim("hi/train.parquet")
        write_text(folder / "hi/train.parquet", text)
        with folder.new_folder("checkpoint-1") as made:
            (made / "config.json").write_text(text)


OURS = {"metrics.jsonl": "ours", "hi/train.parquet": "ours", "checkpoint-1/config.json": "ours"}


def test_a_second_run_replaces_what_the_first_wrote(tmp_path):
    write_some(tmp_path, "first")
    write_some(tmp_path)
    assert contents(tmp_path) == OURS


@pytest.mark.parametrize("name", ["metrics.jsonl", "hi/train.parquet", "checkpoint-1"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_other_people_are_refused_and_stay(tmp_path, name, overwrite):
    write_text(tmp_path / name, "theirs")
    with pytest.raises(UserError, match=f"{tmp_path / name} exists and was not written by this stage; move it away"):
        write_some(tmp_path, overwrite=overwrite)
    assert contents(tmp_path)[name] == "theirs"


def test_a_folder_of_other_people_is_refused_and_stays(tmp_path):
    write_text(tmp_path / "checkpoint-1" / "notes.txt", "theirs")
    with pytest.raises(UserError, match="checkpoint-1 exists"):
        write_some(tmp_path)
    assert contents(tmp_path)["checkpoint-1/notes.txt"] == "theirs"


def test_overwriting_removes_what_this_stage_wrote_and_nothing_else(tmp_path):
    write_some(tmp_path)
    theirs = {"notes.txt": "theirs", "hi/readme.txt": "theirs", "checkpoint-2/config.json": "theirs"}
    for name, text in theirs.items():
        write_text(tmp_path / name, text)
    with OutputFolder(tmp_path, "another stage") as folder:
        folder.write_text("eval.json", "another stage's")
    with OutputFolder(tmp_path, STAGE, overwrite=True) as folder:
        assert contents(tmp_path) == {**theirs, "eval.json": "another stage's"}
        folder.write_text("metrics.jsonl", "again")
    with OutputFolder(tmp_path, STAGE) as folder:  # the record is of the new run alone
        with pytest.raises(UserError, match=r"eval\.json exists"):
            folder.claim("eval.json")
        folder.claim("metrics.jsonl")


def test_without_overwriting_everything_stays(tmp_path):
    write_some(tmp_path)
    with OutputFolder(tmp_path, STAGE):
        assert contents(tmp_path) == OURS


def test_names_that_stages_share_are_claimed_by_each(tmp_path):
    for stage in ("first", "second"):
        with OutputFolder(tmp_path, stage) as folder:
            folder.claim("runs", shared=True)
            (tmp_path / "runs").mkdir(exist_ok=True)
    with OutputFolder(tmp_path, "first", overwrite=True):
        assert (tmp_path / "runs").is_dir()  # the other stage's too
    (tmp_path / "wandb").mkdir()
    with OutputFolder(tmp_path, "first") as folder, pytest.raises(UserError, match="wandb exists"):
        folder.claim("wandb", shared=True)


def test_only_what_was_claimed_is_removed(tmp_path):
    write_some(tmp_path)
    write_text(tmp_path / "notes.txt", "theirs")
    with OutputFolder(tmp_path, STAGE) as folder:
        folder.remove("notes.txt")
        folder.remove("checkpoint-1")
        folder.remove("checkpoint-1")
    assert contents(tmp_path).keys() == OURS.keys() - {"checkpoint-1/config.json"} | {"notes.txt"}


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write_text(elsewhere / "data.txt", "theirs")
    with OutputFolder(tmp_path / "out", STAGE) as folder:
        folder.claim("checkpoint-1")
        (folder / "checkpoint-1").symlink_to(elsewhere)
        folder.remove("checkpoint-1")
        assert not (folder / "checkpoint-1").is_symlink()
    assert contents(elsewhere) == {"data.txt": "theirs"}


def test_one_run_at_a_time(tmp_path):
    with OutputFolder(tmp_path, STAGE) as folder:
        folder.write_text("metrics.jsonl", "ours")
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"another run of this stage .process {os.getpid()}. is writing"):
                OutputFolder(tmp_path, STAGE, overwrite=overwrite)
        OutputFolder(tmp_path, STAGE, main=False)  # another rank of this run
        with OutputFolder(tmp_path, "another stage"):
            pass
        assert contents(tmp_path) == {"metrics.jsonl": "ours"}
    with OutputFolder(tmp_path, STAGE) as folder:
        folder.claim("metrics.jsonl")


def test_a_process_that_outlives_the_main_one_keeps_others_out(tmp_path):
    with OutputFolder(tmp_path, STAGE) as main, OutputFolder(tmp_path, STAGE, main=False) as other:
        main.share()
        other.share()
        main.__exit__()
        main._lock = None
        with pytest.raises(UserError, match="another run of this stage"):
            OutputFolder(tmp_path, STAGE)
    with OutputFolder(tmp_path, STAGE):
        pass


LOCKING = "import sys; from distil_whisper.outputs import OutputFolder; "
OPEN = "f = OutputFolder(sys.argv[1], sys.argv[2], {}); "


def in_another_process(path, then, options=""):
    """A process that opens the folder, says so, and waits for a line."""
    command = [sys.executable, "-c", LOCKING + OPEN.format(options) + then, str(path), STAGE]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_the_lock_holds_between_processes_and_dies_with_its_owner(tmp_path):
    with in_another_process(tmp_path, "print('locked', flush=True); input()") as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"another run of this stage .process {other.pid}. is writing"):
            OutputFolder(tmp_path, STAGE)
        other.kill()
    with OutputFolder(tmp_path, STAGE), in_another_process(tmp_path, "") as other:
        _, error = other.communicate()
        assert other.returncode != 0 and f"process {os.getpid()}" in error.decode()


def test_the_process_that_lives_is_named(tmp_path):
    """A launcher was killed together with the main process, but not the other one."""
    then = "f.share(); print('locked', flush=True); input()"
    with in_another_process(tmp_path, then) as main:
        assert main.stdout.readline() == b"locked\n"
        with in_another_process(tmp_path, then, "main=False") as other:
            assert other.stdout.readline() == b"locked\n"
            main.kill()
            main.wait()
            with pytest.raises(UserError, match=f"another run of this stage .process {other.pid}. is writing"):
                OutputFolder(tmp_path, STAGE)
            other.kill()


def test_other_ranks_write_no_record_and_take_no_lock(tmp_path):
    with OutputFolder(tmp_path / "out", STAGE, main=False) as folder:
        folder.claim("metrics.jsonl")
        folder.keep_arguments({"a": 1})
        folder.remove("metrics.jsonl")
    assert not (tmp_path / "out").exists()


def test_arguments_are_kept_until_overwritten(tmp_path):
    for expected in (None, {"dtype": "float32"}):
        with OutputFolder(tmp_path, STAGE) as folder:
            assert folder.arguments() == expected
            folder.keep_arguments({"dtype": "float32"})
    with OutputFolder(tmp_path, STAGE, overwrite=True) as folder:
        assert folder.arguments() is None


def test_what_was_claimed_is_on_the_disk_before_it_is_written(tmp_path):
    """A run that is killed between the two leaves a file that the next one knows as ours."""
    with OutputFolder(tmp_path, STAGE) as folder:
        folder.claim("checkpoint-1")
        assert "checkpoint-1" in json.loads((tmp_path / RECORDS / f"{STAGE}.json").read_text())["files"]


@pytest.mark.parametrize("path, words", [("", "--output_dir is missing"), ("file/below", "cannot be written to: ")])
def test_an_output_folder_that_cannot_be(tmp_path, path, words):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=words):
        OutputFolder(tmp_path / path if path else path, STAGE)


@pytest.mark.parametrize("before", [None, "before"])
def test_a_file_appears_whole_or_not_at_all(tmp_path, before):
    path = tmp_path / "below" / "file.txt"
    if before:
        write_text(path, before)
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as beside:
        beside.write_text("half")
        assert contents(tmp_path).get("below/file.txt") == before
        raise KeyboardInterrupt
    assert contents(tmp_path) == ({"below/file.txt": before} if before else {})
    with atomic_path(path) as beside:
        beside.write_text("whole")
        assert contents(tmp_path).get("below/file.txt") == before
    assert contents(tmp_path) == {"below/file.txt": "whole"}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with OutputFolder(tmp_path, STAGE) as folder:
        for name in ("first", "second"):
            with folder.new_folder("checkpoint-1") as made:
                (made / name).write_text("x")
                assert not (tmp_path / "checkpoint-1" / name).exists()
            assert contents(tmp_path) == {f"checkpoint-1/{name}": "x"}
        with pytest.raises(OSError, match="disk full"), folder.new_folder("checkpoint-1") as made:
            (made / "third").write_text("x")
            raise OSError("disk full")
    assert contents(tmp_path) == {"checkpoint-1/second": "x"}


def test_what_a_killed_run_left_beside_is_cleared_away(tmp_path):
    with atomic_path(tmp_path / "file.txt") as beside:
        beside.parent.mkdir(exist_ok=True)
        beside.write_text("left")
        with atomic_path(tmp_path / "file.txt") as again:
            assert again == beside and not again.exists()
            again.write_text("whole")
        beside.write_text("later")
    assert contents(tmp_path) == {"file.txt": "later"}


def test_json_is_readable_text(tmp_path):
    with OutputFolder(tmp_path, STAGE) as folder:
        path = folder.write_json("results.json", {"text": "हिन्दी", "wer": 1.5})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "हिन्दी", "wer": 1.5}
    assert "हिन्दी" in path.read_text(encoding="utf-8")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A dataset folder in the folder where one works, and a link to it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work/data/clips").mkdir(parents=True)
    (tmp_path / "work/data/train.json").write_text("[]")
    (tmp_path / "link").symlink_to(tmp_path / "work/data")


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("work/data", "work/data"),
        ("work/data/", "work/../work/data"),
        ("work/data/clips/labelled", "work/data"),
        ("link", "work/data"),
        ("work/data", "link"),
        ("link/clips/a/b", "./work/data"),
        ("work", "./"),
        ("./", "."),
    ],
)
def test_an_output_folder_in_a_dataset_that_is_read_is_refused(data, output, name):
    said = rf"--output_dir {output} would put files into the dataset folder {name} .*, such as /.*_output"
    with pytest.raises(UserError, match=said):
        check_apart(output, ["google/fleurs", name])
    with pytest.raises(UserError, match="the dataset folder file:///"):
        check_apart(output, [f"file://{Path(name).absolute()}"])


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("./", "work/data"),  # the dataset is below
        ("./", "work/data/train.json"),
        ("work/data", "work/data/train.json"),  # a manifest is read by its name
        ("work/data_labelled", "work/data"),
        ("work/data", "google/fleurs"),
        ("work/data", "s3://bucket/work/data"),
    ],
)
def test_an_output_folder_around_or_beside_its_data_is_fine(data, output, name):
    check_apart(output, [name])


def test_a_folder_of_the_output_that_is_read_is_refused(data):
    check_apart("work", ["work/data"], below="default")
    with pytest.raises(UserError, match="--output_dir work would put files into the dataset folder work/data "):
        check_apart("work", ["work/data"], below="data")


@dataclass
class Arguments:
    """Some arguments."""

    name: str
    steps: int = 3
    layers: list | None = None


@pytest.mark.parametrize(
    "given, shown",
    [
        ("https://user:secret@example.org/data", "https://example.org/data"),
        ("https://secret@example.org/a+s3://key:secret@bucket/b", "https://example.org/a+s3://bucket/b"),
        ("https://example.org/a@b", "https://example.org/a@b"),
        ("me@example.org", "me@example.org"),
    ],
)
def test_credentials_do_not_reach_what_is_saved(given, shown):
    assert public_arguments(Arguments(given)) == {"name": shown, "steps": 3, "layers": None}


@pytest.mark.parametrize("sees", [True, False])
def test_processes_that_do_not_share_the_folder_are_refused(sees, tmp_path, monkeypatch):
    """The second process of a run, on a machine of its own or not."""
    accelerator = SimpleNamespace(is_main_process=False)
    monkeypatch.setattr(engine, "SECONDS_TO_APPEAR", 1)
    monkeypatch.setattr(engine, "broadcast_object_list", lambda _: ["token of the first"])
    monkeypatch.setattr(engine, "gather_object", lambda values: [True, *values])
    with OutputFolder(tmp_path, STAGE) as first, OutputFolder(tmp_path, STAGE, main=False) as second:
        if sees:
            write_text(tmp_path / f".distil_whisper/{STAGE}.seen", "token of the first")
            first.share()
            engine.share_folder(second, accelerator)
        else:
            with pytest.raises(UserError, match="is not the same folder for all processes; choose one on a file"):
                engine.share_folder(second, accelerator)
