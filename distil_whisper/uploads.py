"""Files that are pushed to the Hub while the work that makes them goes on."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue

from distil_whisper import hub
from distil_whisper.errors import UserError

ATTEMPTS, FIRST_WAIT_S = 5, 2.0  # each wait is twice the one before


class BackgroundUploads:
    """Pushes finished files from a thread. What the Hub refuses is tried again, and then left for a later push: the
    work goes on in any case."""

    def __init__(self, folder: Path, repo: str, say: Callable[[str], None]):
        self.folder = folder
        self.repo = repo
        self.say = say
        self._finished: SimpleQueue[tuple[str, ...] | None] = SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._push, daemon=True)  # a killed run does not wait for the Hub
        self._thread.start()

    def add(self, *names: str) -> None:
        """Push files of the folder soon."""
        self._finished.put(names)

    def finish(self) -> None:
        """Push what is waiting, without waiting between attempts any more, and end."""
        self._ending.set()
        self._finished.put(None)
        self._thread.join()

    def _push(self) -> None:
        ended = False
        while not ended:
            waiting = [self._finished.get()]
            while not self._finished.empty():
                waiting.append(self._finished.get())
            ended = None in waiting
            names = dict.fromkeys(name for names in waiting if names for name in names)
            if names:
                self._push_with_patience(names)

    def _push_with_patience(self, names: Iterable[str]) -> None:
        for attempt in range(ATTEMPTS):
            try:
                hub.push_files(self.folder, self.repo, names, repo_type="dataset", message="Finished shards")
                return
            except UserError as error:
                problem = error
                self._ending.wait(FIRST_WAIT_S * 2**attempt)
        self.say(f"{problem} (the work goes on, and what is missing there is pushed at the end)")
