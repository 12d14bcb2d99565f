"""Which process and worker reads which rows, and what becomes of rows that cannot be used."""

import pickle

import numpy as np
import pytest
from conftest import make_utterances, write_audio_dataset
from stages import write_manifest

from distil_whisper import recordings
from distil_whisper.errors import UserError
from distil_whisper.reading import open_source
from distil_whisper.recordings import TOO_LONG, Recordings, RowShare, TextColumns, decoded

COLUMNS = TextColumns("audio", "text")
RATE = 16_000


@pytest.fixture(scope="module")
def three_files(tmp_path_factory):
    """Eleven rows in three files, in a folder with a name of its own."""
    return write_audio_dataset(tmp_path_factory.mktemp("three") / "speech", make_utterances(11), "test", files=3)


def read(source, share: RowShare, workers: int, monkeypatch) -> list[list[recordings.Recording]]:
    """What each worker of one process reads."""

    class Info:
        num_workers = workers

    result = []
    for Info.id in range(workers):
        monkeypatch.setattr(recordings, "get_worker_info", lambda: Info)
        result.append(list(Recordings(source, COLUMNS, share)))
    return result


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 5, 99])
@pytest.mark.parametrize("processes, workers", [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2), (13, 1)])
def test_every_row_is_read_once_by_someone(three_files, monkeypatch, streaming, limit, processes, workers):
    source = open_source(str(three_files), split="test", streaming=streaming)
    everything = [recording.row_id for recording in Recordings(source, COLUMNS, RowShare(0, 1))]
    assert len(everything) == 11
    shares = [read(source, RowShare(rank, processes, limit), workers, monkeypatch) for rank in range(processes)]
    found = [recording for share in shares for worker in share for recording in worker]
    assert sorted(recording.row_id for recording in found) == everything[:limit]
    for share in shares:
        for worker in share:
            assert [recording.place for recording in worker] == sorted(recording.place for recording in worker)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("processes, workers, limit", [(1, 1, None), (2, 2, 9), (2, 2, None), (4, 1, None)])
def test_what_is_done_is_not_read_again(three_files, monkeypatch, streaming, processes, workers, limit):
    source = open_source(str(three_files), split="test", streaming=streaming)
    everything = [recording.place for recording in Recordings(source, COLUMNS, RowShare(0, 1))]
    done = frozenset(everything[place] for place in (0, 1, 4, 5, 8))
    shares = [RowShare(rank, processes, limit, done) for rank in range(processes)]
    found = [recording.place for share in shares for w in read(source, share, workers, monkeypatch) for recording in w]
    assert sorted(found) == [place for place in everything[:limit] if place not in done]


def test_work_is_shared_evenly(three_files, monkeypatch):
    known = open_source(str(three_files), split="test")
    sizes = [len(worker) for rank in range(2) for worker in read(known, RowShare(rank, 2), 2, monkeypatch)]
    assert sizes == [2, 3, 3, 3]
    streamed = open_source(str(three_files), split="test", streaming=True)
    sizes = [len(worker) for worker in read(streamed, RowShare(0, 1), 4, monkeypatch)]
    assert sizes == [4, 4, 3, 0]  # a file is read by one worker, so that it is downloaded once


def test_only_the_columns_that_are_needed_are_read(three_files, monkeypatch):
    source = open_source(str(three_files), split="test")
    asked = []

    def rows(unit, columns, start=0, read_rows=source.rows):
        asked.append(columns)
        return read_rows(unit, columns, start)

    monkeypatch.setattr(source, "rows", rows)
    assert len(list(Recordings(source, COLUMNS, RowShare(0, 1)))) == 11
    assert asked == [["audio", "text"]] * 3


def test_rows_that_cannot_be_used_say_why(tmp_path, utterances):
    manifest = write_manifest(tmp_path / "test.json", utterances[:4], language="hi")
    lines = manifest.read_text().replace(f'"{utterances[3].text}"', "null")
    manifest.write_text(lines)
    (tmp_path / f"{utterances[0].id}.wav").write_bytes(b"not audio")
    (tmp_path / f"{utterances[1].id}.wav").unlink()
    source = open_source(str(manifest), split="test")
    longest = len(utterances[2].samples)
    rows = Recordings(source, TextColumns("audio", "sentence"), RowShare(0, 1))
    found = list(decoded(rows, RATE, longest, 2))
    assert found[0].problem.startswith("unreadable: ")
    assert found[1].problem.startswith("missing file: ")
    assert (found[2].problem, found[2].language, found[2].reference) == (None, "hi", utterances[2].text)
    assert np.allclose(found[2].samples, utterances[2].samples, atol=1e-4)
    assert found[3].problem == "no transcript in column sentence"
    shorter = list(decoded(rows, RATE, longest - 1, 0))
    assert (shorter[2].problem, shorter[2].samples) == (TOO_LONG, None)


def test_a_file_that_cannot_be_read_comes_as_an_error_that_a_worker_can_send(three_files, monkeypatch):
    source = open_source(str(three_files), split="test")

    def rows(unit, columns, start=0):
        raise UserError("unit 0 of speech/default/test cannot be read: the disk is gone")
        yield

    monkeypatch.setattr(source, "rows", rows)
    (error,) = Recordings(source, COLUMNS, RowShare(0, 1))
    assert str(pickle.loads(pickle.dumps(error))) == "unit 0 of speech/default/test cannot be read: the disk is gone"
