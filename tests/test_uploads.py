"""Uploads in the background: what the Hub refuses is tried again, and never stops the work."""

import threading

import pytest

from distil_whisper import uploads
from distil_whisper.errors import UserError
from distil_whisper.uploads import ATTEMPTS, BackgroundUploads


@pytest.fixture
def hub(monkeypatch):
    """A Hub that refuses so many pushes; `pushed` are the others."""

    class Hub:
        refusals, pushed, tried = 0, [], 0
        ready = threading.Event()

    Hub.ready.set()

    def push_files(folder, repo, names, **_):
        Hub.ready.wait(30)
        Hub.tried += 1
        if Hub.refusals:
            Hub.refusals -= 1
            raise UserError(f"pushing to {repo} failed: the Hub answered 503")
        Hub.pushed.append(list(names))

    monkeypatch.setattr(uploads.hub, "push_files", push_files)
    monkeypatch.setattr(uploads, "FIRST_WAIT_S", 0.0)
    return Hub


def test_files_are_pushed_while_others_are_made_and_those_waiting_together(hub, tmp_path):
    hub.ready.clear()
    background = BackgroundUploads(tmp_path, "me/labels", print)
    background.add("a.parquet", "README.md")
    while background._finished.qsize():  # the first push has begun, and the others wait for it
        pass
    background.add("b.parquet", "README.md")
    background.add("c.parquet", "README.md")
    hub.ready.set()
    background.finish()
    assert hub.pushed == [["a.parquet", "README.md"], ["b.parquet", "README.md", "c.parquet"]]


def test_a_refused_push_is_tried_again(hub, tmp_path):
    hub.refusals = ATTEMPTS - 1
    said = []
    background = BackgroundUploads(tmp_path, "me/labels", said.append)
    background.add("a.parquet")
    background.finish()
    assert hub.pushed == [["a.parquet"]] and hub.tried == ATTEMPTS and not said


def test_a_hub_that_fails_is_said_and_the_next_files_are_pushed(hub, tmp_path):
    hub.refusals = ATTEMPTS
    said = []
    background = BackgroundUploads(tmp_path, "me/labels", said.append)
    background.add("a.parquet")
    while not said:
        pass
    background.add("b.parquet")
    background.finish()
    assert hub.pushed == [["b.parquet"]]
    assert said == [
        "pushing to me/labels failed: the Hub answered 503 (the work goes on, and what is missing there is pushed at "
        "the end)"
    ]
