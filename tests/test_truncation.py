"""Labels that the limit of tokens truncates: how many may be, and what more tokens or shorter windows make of them."""

import contextlib
import json
from itertools import chain

import pyarrow.parquet as pq
import pytest
from conftest import write_audio_dataset
from stages import ENGLISH, SPEAKERS, WINDOW_S, label, metrics, rows_of

import run_pseudo_labelling
from distil_whisper.decoding import Decoder
from distil_whisper.errors import UserError
from distil_whisper.models import load_whisper
from distil_whisper.reading import Source
from distil_whisper.truncation import TruncationLimit

FEW, MORE, MOST = 4, 5, 20
TIMED = [*ENGLISH, *SPEAKERS, "--return_timestamps", "--decode_token_ids", False]
SMALL = ["--per_device_eval_batch_size", 1, "--logging_steps", 1]  # so that a kill loses one window


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The numbers of windows that the teacher is given, by batch."""
    counts, call = [], Decoder.__call__
    monkeypatch.setattr(
        Decoder,
        "__call__",
        lambda self, waves, *told, **of: counts.append(len(waves)) or call(self, waves, *told, **of),
    )
    return counts


@pytest.fixture(scope="module")
def data(tmp_path_factory, utterances):
    """Two files of six utterances, by three speakers."""
    return write_audio_dataset(tmp_path_factory.mktemp("data") / "speech", utterances[:12], files=2)


def labelled_with(tokens, teacher, data, folder, *flags):
    return label(teacher, data, folder, *TIMED, "--max_label_length", tokens, *flags)


def tables(folder):
    """What the files hold, by name."""
    return {path.name: pq.read_table(path) for path in sorted((folder / "default").iterdir())}


def truncated(folder) -> int:
    return sum(row["truncated"] for row in rows_of(folder))


@pytest.mark.parametrize(
    "flags", [["--concatenate_audio"], ["--streaming", "--dataloader_num_workers", 0, "--decode_token_ids", True]]
)
def test_more_tokens_label_the_truncated_rows_alone_again(flags, taught, data, decoded, tmp_path, capsys):
    """The files are those of a run that had so many from the start: also the prompts of the windows after."""
    folder = labelled_with(FEW, taught, data, tmp_path / "out", *flags)
    before, were_truncated = tables(folder), truncated(folder)
    decoded.clear()
    labelled_with(MOST, taught, data, folder, *flags)
    assert 0 < sum(decoded) == were_truncated < sum(len(table) for table in before.values())
    assert "truncated labels of 2 shards get up to 20 tokens" in capsys.readouterr().out
    fresh = labelled_with(MOST, taught, data, tmp_path / "fresh", *flags)
    assert tables(folder) == tables(fresh) != before and truncated(folder) == 0
    for name in tables(folder):
        assert (folder / "default" / name).read_bytes() == (fresh / "default" / name).read_bytes()
    decoded.clear()
    labelled_with(MOST, taught, data, folder, *flags)
    assert not decoded and "2 of 2 shards are finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"other arguments \(max_label_length was 20 and is 4\)"):
        labelled_with(FEW, taught, data, folder, *flags)


class Killed(Exception):
    """In place of a signal."""


@pytest.fixture
def killed_after(monkeypatch):
    """Labels until so many windows or ends of files are written, if there are so many."""
    write = run_pseudo_labelling.write

    def run(windows, tokens, *given):
        left = iter(range(windows))

        def watched(job, pace, unit, rows):
            if next(left, None) is None:
                raise Killed
            write(job, pace, unit, rows)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(run_pseudo_labelling, "write", watched)
            labelled_with(tokens, *given, "--dataloader_num_workers", 0, *SMALL)

    return run


@pytest.fixture(scope="module")
def unbroken(taught, data, tmp_path_factory):
    """What a run with the most tokens gives."""
    made = {}

    def of(*flags):
        if flags not in made:
            folder = labelled_with(MOST, taught, data, tmp_path_factory.mktemp("unbroken"), *flags)
            made[flags] = tables(folder)
        return made[flags]

    return of


PACKED = ("--concatenate_audio", "--max_window_seconds", 1.5)


# limits of tokens, and after how many writes the run is killed: of the first file there are seven with its end
@pytest.mark.parametrize(
    ("kills", "flags"),
    [
        ([(FEW, 4), (MOST, 2)], ()),
        ([(FEW, 5), (MORE, 3), (MOST, 5)], ()),  # the rows of the second go, not those of the first
        ([(FEW, 9), (MOST, 1), (MOST, 5), (MOST, 3)], ()),
        ([(FEW, 99), (MORE, 8), (MOST, 3)], ()),
        ([(MORE, 6), (MOST, 6)], ()),  # all windows are labelled, and the file not yet finished
        ([(FEW, 2), (MORE, 1), (MOST, 2)], PACKED),
    ],
)
def test_killed_in_between_and_given_more_tokens_it_ends_as_a_run_from_the_start(
    kills, flags, taught, data, unbroken, tmp_path, killed_after
):
    for tokens, windows in kills:
        killed_after(windows, tokens, taught, data, tmp_path, *flags)
    labelled_with(MOST, taught, data, tmp_path, *flags, *SMALL)
    assert tables(tmp_path) == unbroken(*flags)
    assert not list(tmp_path.rglob("state.json"))


def test_a_kill_between_the_file_and_its_manifest_loses_nothing(taught, data, unbroken, tmp_path, monkeypatch):
    def dies(*_):
        raise Killed

    for tokens in (FEW, MORE, MOST, MOST):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(run_pseudo_labelling, "finish_shard", dies)
            labelled_with(tokens, taught, data, tmp_path, "--dataloader_num_workers", 0)
    assert tables(labelled_with(MOST, taught, data, tmp_path)) == unbroken()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_reading_that_passes_loses_no_label(
    workers, taught, data, unbroken, decoded, tmp_path, killed_after, monkeypatch
):
    """Neither those that were set aside to be given more tokens, nor those that were labelled before the error."""
    killed_after(5, FEW, taught, data, tmp_path)
    rows = Source.rows

    def broken(self, unit, *given, **of):
        for number, row in enumerate(rows(self, unit, *given, **of)):
            if unit == 0 and number == 3 and not given:
                raise UserError("the connection was lost")
            yield row

    with monkeypatch.context() as patch, pytest.raises(UserError, match="1 of 2 shards could not be read"):
        patch.setattr(Source, "rows", broken)
        labelled_with(MOST, taught, data, tmp_path, *SMALL, "--dataloader_num_workers", workers)
    (before,) = tmp_path.rglob("*.before")
    assert len(list(before.glob("*.parquet"))) == 5
    decoded.clear()
    labelled_with(MOST, taught, data, tmp_path, *SMALL)
    assert 0 < sum(decoded) <= 3 and tables(tmp_path) == unbroken()
    assert not list(tmp_path.rglob("*.before"))


@pytest.mark.parametrize("readable_later", [True, False])
def test_other_rows_that_can_be_read_give_no_window_the_prompt_of_another(
    readable_later, taught, data, tmp_path, killed_after, monkeypatch
):
    """A row comes, or goes, among those whose whole labels stay: it is not known what those said, so a prompt may be
    missing, and none is another than the one of a run from the start."""
    rows, speakers = Source.rows, ("--speaker_id_column_name", "text")

    def lacking(self, unit, *given, **of):
        for number, row in enumerate(rows(self, unit, *given, **of)):
            row["text"] = "one voice"
            yield row | {"audio": {"bytes": b"", "path": None}} if (unit, number) == (0, 2) and lacks else row

    monkeypatch.setattr(Source, "rows", lacking)
    lacks = readable_later
    flags = ("--max_skipped", 50)
    killed_after(5, MORE, taught, data, tmp_path / "out", *flags, *speakers)
    lacks = not readable_later
    fresh, again = (
        rows_of(labelled_with(MOST, taught, data, tmp_path / name, *flags, *speakers, *SMALL))
        for name in ("fresh", "out")
    )
    assert len(fresh) == 11 + readable_later
    for one, other in zip(fresh, again, strict=True):
        prompt, found = one.pop("condition_on_prev"), other.pop("condition_on_prev")
        assert found in (prompt, None) and one == other


def test_folders_of_before_go_on(taught, data, unbroken, decoded, tmp_path, killed_after):
    """They name no limit of a shard, and no window: it is the one of their arguments, and the model's."""
    folder = tmp_path
    killed_after(9, FEW, taught, data, folder)
    records = folder / ".distil_whisper"
    for path in chain(records.glob("shards/*/*.json"), records.glob("parts/*/*/state.json")):
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "max_label_length"}))
    record = records / "run_pseudo_labelling.json"
    stored = json.loads(record.read_text())
    del stored["arguments"]["default/train"]["max_window_seconds"]
    record.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"\(concatenate_audio was False and is True; max_window_seconds was None and"):
        labelled_with(FEW, taught, data, folder, *PACKED)
    with pytest.raises(UserError, match=r"\(max_label_length was 4 and is 3\)"):
        labelled_with(3, taught, data, folder)
    decoded.clear()
    killed_after(99, FEW, taught, data, folder)
    assert len(decoded) == 12 - 8  # what was there stays, truncated or not
    decoded.clear()
    labelled_with(MOST, taught, data, folder)
    assert 0 < sum(decoded) < 12 and tables(folder) == unbroken()


def test_too_many_truncated_labels_end_a_run(taught, data, tmp_path, capsys):
    """At its end, for they are few; what is labelled stays, and more tokens finish it."""
    folder = tmp_path / "out"
    said = (
        r"12 of 12 labels \(100\.0%\) are truncated at --max_label_length 1, more than --max_truncated 5 percent, .*"
    )
    said += r" give --max_label_length 2 \(at most 125\), with which these alone are labelled again, or allow more"
    with pytest.raises(UserError, match=said):
        labelled_with(1, taught, data, folder, "--max_truncated", 5)
    assert len(rows_of(folder)) == 12 and "truncated 12, truncated_percent 100.0" in capsys.readouterr().out
    (line,) = metrics(folder, "default/train/truncated_percent")
    assert line["default/train/truncated_percent"] == 100.0
    assert "| truncated_percent |" in (folder / "README.md").read_text()
    labelled_with(MOST, taught, data, folder, "--max_truncated", 0)
    assert truncated(folder) == 0


def test_too_many_truncated_labels_end_a_run_early(taught, utterances, tmp_path):
    """What is labelled by then is kept, inside a file too, and more tokens go on with it."""
    data = write_audio_dataset(tmp_path / "speech", utterances * 7, files=1)
    flags = ["--per_device_eval_batch_size", 3, "--logging_steps", 99, "--max_truncated", 5]
    with pytest.raises(UserError, match=r"120 of 120 labels \(100.0%\) are truncated"):
        labelled_with(1, taught, data, tmp_path / "out", *flags)
    (state,) = (tmp_path / "out").rglob("state.json")
    assert json.loads(state.read_text())["progress"]["rows"] == 120 and not (tmp_path / "out/default").exists()
    with pytest.raises(UserError, match=r"120 of 120 labels \(100.0%\) are truncated"):
        labelled_with(2, taught, data, tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("labels", "truncated", "early", "late"),
    [
        (60, 60, False, True),
        (100, 5, False, False),
        (100, 11, False, True),
        (100, 12, True, True),
        (10_000, 501, False, True),
        (10_000, 580, True, True),
        (0, 0, False, False),
    ],
)
def test_a_part_is_judged_with_care(labels, truncated, early, late):
    limit = TruncationLimit(128, 445, 5.0, None)
    assert bool(limit.early_problem(labels, truncated)) == early
    assert bool(limit.problem(labels, truncated)) == late


def test_what_helps_is_what_there_is():
    full = TruncationLimit(445, 445, 5.0, 30.0).problem(10, 10)
    assert "give --max_label_length" not in full and full.endswith(
        "--overwrite_output_dir), or allow more (--max_truncated)"
    )
    assert "(--max_window_seconds 15 " in full
    assert "--max_label_length 445 (at most 445)" in TruncationLimit(300, 445, 5.0, None).problem(10, 10)


def test_the_plan_says_the_share(taught, data, tmp_path, capsys):
    labelled_with(1, taught, data, tmp_path / "out", "--dry_run", "--max_truncated", 5)
    said = capsys.readouterr().out
    assert (
        "  12 of 12 labels truncated in the trial (100.0%)" in said and "more than --max_truncated 5 percent" in said
    )
    labelled_with(MOST, taught, data, tmp_path / "out", "--dry_run", "--max_truncated", 5)
    said = capsys.readouterr().out
    assert "  0 of 12 labels truncated in the trial (0.0%)" in said and "--max_truncated" not in said


def test_a_limit_beyond_the_positions_is_said(taught, data, tmp_path, capsys):
    """As much as there is room for is taken, and is no other limit than a larger one."""
    folder = labelled_with(1000, taught, data, tmp_path)
    assert "--max_label_length 1000 is more than the decoder has room for; 125 is taken" in capsys.readouterr().out
    labelled_with(2000, taught, data, tmp_path)
    assert "2 of 2 shards are finished" in capsys.readouterr().out and truncated(folder) == 0
    whisper = load_whisper(str(taught), device="cpu")
    for timestamps in (False, True):
        prefix = whisper.grammar.prefix("en", "transcribe", timestamps)
        assert whisper.grammar.room(timestamps) == whisper.grammar.max_positions - len(prefix)


def test_windows_may_be_shorter_than_the_model_takes(taught, data, utterances, tmp_path):
    def durations(folder, *flags):
        rows = rows_of(labelled_with(MOST, taught, data, tmp_path / folder, "--max_window_seconds", 1, *flags))
        assert sum(row["duration"] for row in rows) == pytest.approx(sum(alone), abs=1e-2)
        return rows, [row["duration"] for row in rows]

    alone = [len(utterance.samples) / 16_000 for utterance in utterances[:12]]
    rows, packed = durations("packed", "--concatenate_audio")
    assert all(length <= 1 or len(row["utterance_ids"]) == 1 for row, length in zip(rows, packed, strict=True))
    assert any(len(row["utterance_ids"]) > 1 for row in rows)
    _, split = durations("split", "--long_audio", "split")
    _, both = durations("both", "--long_audio", "split", "--concatenate_audio")
    assert max(split + both) <= 1 < max(alone) and len(split) > max(len(alone), len(both))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (PACKED[1:], "--max_window_seconds is for --concatenate_audio and --long_audio split, .*"),
        (
            ["--long_audio", "split", "--max_window_seconds", WINDOW_S + 1],
            "--max_window_seconds is 3, and the model's window has 2 s; give at most 2",
        ),
        (["--max_truncated", 101], "--max_truncated is 101.0; it must be between 0 and 100"),
    ],
)
def test_what_cannot_be_is_refused(flags, sentence, taught, data, tmp_path):
    with pytest.raises(UserError, match=f"^{sentence}$"):
        labelled_with(MOST, taught, data, tmp_path, *flags)
