"""What the user sees of a mistake: one sentence on stderr, exit code 2."""

import pytest
import torch
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


def test_errors_of_ours_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_on_user_error(lambda: 1 / 0)
