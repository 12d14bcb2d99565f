"""What the user sees of a mistake: one sentence on stderr, exit code 2."""

import contextlib
import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from stages import ENGLISH, label, run, train_few
from torch._utils import ExceptionWrapper

from distil_whisper.errors import UserError, exit_on_user_error, nearest

SENTENCE = "--split tran is not there (allowed: test, train; did you mean train?)"


@pytest.mark.parametrize(
    "found, allowed, words",
    [
        ("tran", ["train", "test"], "(allowed: test, train; did you mean train?)"),
        ("zzz", ["train", "test"], "(allowed: test, train)"),
        ("29x", [f"x{index:02d}" for index in range(30)], "... (30 in all); did you mean x29?)"),
    ],
)
def test_what_is_allowed_and_what_is_nearest(found, allowed, words):
    assert nearest(found, allowed).endswith(words)


def files_of(folder) -> dict[str, int]:
    """The files of a folder and their sizes."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def files_at_most(size: int):
    """No file of this process may become larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fail():
    raise UserError(SENTENCE)


def fail_in_a_worker():
    try:
        fail()
    except UserError:
        ExceptionWrapper(where="in DataLoader worker process 0").reraise()  # what a DataLoader does with it


@pytest.mark.parametrize("main", [fail, fail_in_a_worker])
def test_a_mistake_is_one_line_and_exit_code_2(capsys, main):
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(main)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"error: {SENTENCE}\n")


def test_ctrl_c_is_one_line_and_its_exit_code(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(interrupted)
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "stopped by Ctrl-C; what is finished is kept\n")


@pytest.mark.parametrize("captured", [False, True])
def test_a_full_gpu_is_one_line_with_what_to_do(capsys, captured):
    """Also where it ended the capture of a graph, which has an error of its own."""

    def filled():
        try:
            fill()
        finally:
            if captured:
                raise RuntimeError("operation failed due to a previous error during capture")

    def fill():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 296.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which "
            "254.19 MiB is free."
        )

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(filled)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: CUDA out of memory. Tried to allocate 296.00 MiB; give a smaller batch (--per_device"
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "out/data.parquet"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # what tokenizers raises
    ],
)
def test_a_full_disk_is_one_line_with_what_to_do(capsys, error):
    """Also where a library puts an error of its own around it."""

    def filled():
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("could not write the dataset") from cause

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(filled)
    assert ended.value.code == 2
    file = getattr(error, "filename", None) or "a file"
    said = f"error: {file} cannot be written: No space left on device; what is finished is kept: make room, and "
    assert capsys.readouterr().err == f"{said}start the same command again\n"


@pytest.mark.parametrize("stage", ["labelling", "training", "a student"])
def test_a_disk_that_fills_up_leaves_no_half_file_and_what_is_there(
    stage, taught, student, labelled, speech_folder, tmp_path, capsys
):
    """A limit on the size of files stands for the disk: the same calls fail, after some of the bytes were written."""

    def work(folder):
        if stage == "labelling":
            label(taught, speech_folder, folder, *ENGLISH, "--long_audio", "split")
        elif stage == "training":
            train_few(student, labelled, folder, *ENGLISH, "--kl_weight", 0, "--save_steps", 2)
        else:
            run("create_student_model", "--teacher_checkpoint", taught, "--decoder_layers", 1, "--save_dir", folder)

    work(tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    size = {"labelling": 20_000, "training": 200_000, "a student": 200_000}[stage]
    with pytest.raises(SystemExit) as ended, files_at_most(size):
        exit_on_user_error(lambda: work(tmp_path / "full"))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "cannot be written: File too large" in said
    assert [file for file in files_of(tmp_path / "full") if "partial" in file] == []
    work(tmp_path / "full")
    assert files_of(tmp_path / "full").keys() == whole.keys()


def test_a_copy_of_a_dataset_without_room_is_no_fault_of_the_dataset(capsys):
    def read():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "cache/speech.arrow")
        except OSError as error:
            raise UserError("speech cannot be read: No space left on device") from error

    with pytest.raises(SystemExit):
        exit_on_user_error(read)
    assert capsys.readouterr().err.startswith("error: cache/speech.arrow cannot be written: No space left on device;")


def test_a_path_that_cannot_be_used_is_one_line(capsys):
    with pytest.raises(SystemExit):
        exit_on_user_error(Path("x" * 5_000).read_bytes)
    assert capsys.readouterr().err == f"error: {'x' * 200} cannot be used: File name too long\n"


def test_a_name_with_newlines_and_escape_sequences_stays_in_its_line(capsys):
    def fail():
        raise UserError("there is no dataset a\nerror: b\x1b[31m")

    with pytest.raises(SystemExit):
        exit_on_user_error(fail)
    assert capsys.readouterr().err == "error: there is no dataset a error: b [31m\n"


def test_errors_of_ours_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_on_user_error(lambda: 1 / 0)
