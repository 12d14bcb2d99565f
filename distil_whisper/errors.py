"""Errors that are part of the interface: one sentence for the user, never a traceback."""

import difflib
import sys
from collections.abc import Callable, Iterable

import torch


class UserError(Exception):
    """A mistake that the user can mend: its message is one sentence with what was found and what is allowed."""


def nearest(found: str, allowed: Iterable[str]) -> str:
    """The end of an error sentence: the allowed values, and the one most like what was found."""
    allowed = sorted(str(value) for value in allowed)
    close = difflib.get_close_matches(str(found), allowed, n=1, cutoff=0.5)
    listed = ", ".join(allowed) if len(allowed) <= 20 else ", ".join(allowed[:20]) + f", ... ({len(allowed)} in all)"
    return f"(allowed: {listed}{f'; did you mean {close[0]}?' if close else ''})"


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run a script's main: a UserError, a full GPU and Ctrl-C become a line on stderr, and exit codes 2, 2 and 130."""
    try:
        main()
    except UserError as error:
        # A DataLoader's worker sends its traceback along: the sentence stands behind the last name of the class.
        sentence = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2].strip()
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; what is finished is kept", file=sys.stderr, flush=True)
        sys.exit(130)
    except RuntimeError as error:
        if (full := _full_gpu(error)) is None:
            raise
        print(
            f"error: {str(full).split('. GPU', 1)[0]}; give a smaller batch (--per_device_train_batch_size, "
            "--per_device_eval_batch_size), with which a run that is started again goes on",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(2)


def _full_gpu(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The error of a full GPU behind another one, such as that of a graph which could not be captured then."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error
