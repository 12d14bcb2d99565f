"""Errors that are part of the interface: one sentence for the user, never a traceback."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

DISK_PROBLEMS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full, a quota, a limit of the size of files
PATH_PROBLEMS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


class UserError(Exception):
    """A mistake that the user can mend: its message is one sentence with what was found and what is allowed."""


def nearest(found: str, allowed: Iterable[str]) -> str:
    """The end of an error sentence: the allowed values, and the one most like what was found."""
    allowed = sorted(str(value) for value in allowed)
    close = difflib.get_close_matches(str(found), allowed, n=1, cutoff=0.5)
    listed = ", ".join(allowed) if len(allowed) <= 20 else ", ".join(allowed[:20]) + f", ... ({len(allowed)} in all)"
    return f"(allowed: {listed}{f'; did you mean {close[0]}?' if close else ''})"


def refuse_missing_path(name: str | Path, suffixes: tuple[str, ...] = (), argument: str = "") -> None:
    """Raise UserError for a name that is a path by its form, or by a suffix, where there is nothing of that name.

    No name on the Hub has such a form, so that the Hub need not be asked.
    """
    path, name = Path(name), str(name)
    is_path = name.startswith((".", os.sep, "~")) or name.endswith(suffixes) or name.count("/") > 1
    if not is_path or path.exists():
        return
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    meant = f"; did you mean {path.parent / close[0]}?" if close else ""
    raise UserError(f"{argument and f'{argument} {name}: '}there is no file or folder {name}{meant}")


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run a script's main: a UserError, a full GPU, a full disk and Ctrl-C become a line on stderr.

    The exit code is 130 after Ctrl-C, 2 after the others. Other errors keep their traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; what is finished is kept", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        if (sentence := _sentence(error)) is None:
            raise
        # One line whatever a name holds: a newline or a terminal's escape sequence in it is a space.
        line = "".join(character if character.isprintable() else " " for character in sentence.strip())
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)


def _sentence(error: Exception) -> str | None:
    """What a user is told of an error that they can mend; None for one that they cannot."""
    for cause in _causes(error):
        if isinstance(cause, torch.OutOfMemoryError):
            return (
                f"{str(cause).split('. GPU', 1)[0]}; give a smaller batch (--per_device_train_batch_size, "
                "--per_device_eval_batch_size), with which a run that is started again goes on"
            )
        if (problem := _disk_problem(cause)) is not None:  # also where reading a dataset fails as its copy has no room
            return f"{problem}; what is finished is kept: make room, and start the same command again"
    if isinstance(error, UserError):
        # A DataLoader's worker sends its traceback along: the sentence comes after the last name of the class.
        return str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in PATH_PROBLEMS and cause.filename is not None:
            return f"{str(cause.filename)[:200]} cannot be used: {os.strerror(cause.errno)}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, such as that of a graph which could not be captured as the GPU was full."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _disk_problem(error: BaseException) -> str | None:
    """What an error says of a disk that takes no more; None for any other error."""
    code, file = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if found := re.search(
        r"\(os error (\d+)\)$", str(error)
    ):  # of safetensors and tokenizers, with classes of their own
        code = int(found.group(1))
    if code not in DISK_PROBLEMS:
        return None
    return f"{file or 'a file'} cannot be written: {os.strerror(code)}"
