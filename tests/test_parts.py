"""A shard in progress: what was kept of it survives, and its file is the same wherever its parts end."""

import json

import pyarrow.parquet as pq
import pytest
from datasets import Features, Value

from distil_whisper.handoff import ROWS_PER_GROUP, ShardFile
from distil_whisper.outputs import OutputFolder
from distil_whisper.parts import ShardInProgress

FEATURES = Features({"row": Value("int64"), "text": Value("string")})
SHARD = ShardFile("default", "train", 0, 1)
COUNT, TOKENS = 2 * ROWS_PER_GROUP + 30, 128


@pytest.fixture
def folder(tmp_path):
    with OutputFolder(tmp_path / "labelled", "run_pseudo_labelling") as opened:
        yield opened


def rows(first, last):
    """Some rows are so long that a Parquet page ends among a hundred of them."""
    return [
        {"row": number, "text": f"text {number} " + "ab"[number % 2] * (number % 7) * 9_000}
        for number in range(first, last)
    ]


def write(folder, first, kept_every, last=COUNT, died_at=None):
    """Write rows from one on, as a run does that dies before a row, if at all."""
    with ShardInProgress(folder, SHARD, FEATURES, None, TOKENS) as shard:
        assert shard.progress.get("rows", 0) == first
        for row in rows(first, last):
            if row["row"] == died_at:
                raise KeyboardInterrupt
            shard.write(row)
            if kept_every and (row["row"] + 1) % kept_every == 0:
                shard.keep({"rows": row["row"] + 1})
        shard.finish({"rows": last})
        shard.forget()


def test_the_file_is_the_same_wherever_parts_end_and_the_run_was_killed(folder, tmp_path):
    write(folder, 0, None)
    expected = (folder / SHARD.name).read_bytes()
    table = pq.read_table(folder / SHARD.name)
    assert table.to_pylist() == rows(0, COUNT) and table.schema.equals(FEATURES.arrow_schema, check_metadata=True)
    with OutputFolder(tmp_path / "broken", "run_pseudo_labelling") as broken:
        for first, died_at in ((0, 33), (30, 30), (30, 151)):
            with pytest.raises(KeyboardInterrupt):
                write(broken, first, 10, died_at=died_at)
            assert not (broken / SHARD.name).exists()
        write(broken, 150, 70)
        assert (broken / SHARD.name).read_bytes() == expected
        assert not list((broken / ".distil_whisper/parts").rglob("*.parquet"))


def test_what_was_kept_of_other_contents_is_dropped(folder):
    with ShardInProgress(folder, SHARD, FEATURES, "one file", TOKENS) as shard:
        shard.write(rows(0, 1)[0])
        shard.keep({"rows": 1})
    assert ShardInProgress(folder, SHARD, FEATURES, "one file", TOKENS).progress == {"rows": 1}
    with ShardInProgress(folder, SHARD, FEATURES, "another", TOKENS) as shard:
        assert shard.progress == {}
    assert not list((folder / ".distil_whisper/parts").rglob("*.*"))


def test_a_unit_without_rows_has_no_file(folder):
    write(folder, 0, None, last=0)
    assert not (folder / SHARD.name).exists()


def test_a_unit_that_is_labelled_again_and_left_no_row_has_no_file(folder):
    write(folder, 0, None)
    write(folder, 0, None, last=0)
    assert not (folder / SHARD.name).exists()


def test_a_shard_whose_manifest_is_missing_is_joined_again(folder):
    with ShardInProgress(folder, SHARD, FEATURES, None, TOKENS) as shard:
        for row in rows(0, 5):
            shard.write(row)
        shard.finish({"rows": 5})
    with ShardInProgress(folder, SHARD, FEATURES, None, TOKENS) as again:
        assert again.progress == {"rows": 5}
        again.finish({"rows": 5})
    assert pq.read_table(folder / SHARD.name).to_pylist() == rows(0, 5)


def test_what_a_version_kept_that_knew_less_of_the_contents_stays(folder):
    """It did not note the files of the rows, and noted whether there was FFmpeg."""
    with ShardInProgress(folder, SHARD, FEATURES, "rows 12ab", TOKENS) as shard:
        shard.write(rows(0, 1)[0])
        shard.keep({"rows": 1})
    state = folder / ".distil_whisper/parts/default/train-00000-of-00001/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"ffmpeg": False}))
    assert ShardInProgress(folder, SHARD, FEATURES, "rows 12ab of files 34cd", TOKENS).progress == {"rows": 1}
    assert ShardInProgress(folder, SHARD, FEATURES, "rows 56ef of files 34cd", TOKENS).progress == {}


def test_a_shard_that_begins_anew_keeps_its_earlier_rows(folder):
    for tokens in (TOKENS, TOKENS + 1):
        with ShardInProgress(folder, SHARD, FEATURES, None, tokens) as shard:
            shard.write(rows(0, 1)[0])
            shard.keep({"rows": 1})
    with ShardInProgress(folder, SHARD, FEATURES, None, TOKENS + 1) as shard:
        assert shard.progress == {"rows": 1}
        shard.restart()
    again = ShardInProgress(folder, SHARD, FEATURES, None, TOKENS + 1)
    assert again.progress == {} and again.parts == 0
    assert [len(pq.read_table(path)) for path in again.earlier.paths] == [1]
