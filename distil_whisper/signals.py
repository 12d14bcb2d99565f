"""Being asked to stop: SIGTERM and SIGINT let a step end and a checkpoint be written."""

import signal


class StopRequest:
    """Notes SIGTERM and SIGINT while the block runs. A second one acts as it would have without us."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended; SIGTERM's where another process received it."""
        return 128 + (self.received or signal.SIGTERM)

    def _note(self, number, _frame) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
