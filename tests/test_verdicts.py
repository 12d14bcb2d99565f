"""Which rows of a map-style dataset are kept: found by one process, kept with all that decides it, read by all."""

import pickle
from collections import Counter
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from stages import ENGLISH, train_few
from transformers import WhisperTokenizer

from distil_whisper import verdicts
from distil_whisper.examples import LabelColumns, Labeller, LabelSettings
from distil_whisper.filtering import KEPT, UNREADABLE, FilterSettings, RowFilter
from distil_whisper.normalisation import Normalisers
from distil_whisper.outputs import OutputFolder
from distil_whisper.tokens import Grammar
from distil_whisper.verdicts import VerdictFiles, Verdicts, judge

ABOVE = "WER above --wer_threshold"
TRANSCRIPTS = [" one two", "", " one two", " six", " one two", " six", " one", " one two"]


def rows_of(transcripts) -> Dataset:
    return Dataset.from_list([{"whisper_transcript": transcript, "text": "one two"} for transcript in transcripts])


@pytest.fixture(scope="module")
def make_filter(toy_teacher):
    tokenizer = WhisperTokenizer.from_pretrained(toy_teacher)

    def make(wer_threshold=50.0, name=None, language="hi", positions=128):
        labeller = Labeller(Grammar(tokenizer, True, positions), LabelSettings(0.5, 0.5, 0))
        settings = FilterSettings(wer_threshold, None, 4.0)
        columns = LabelColumns("text", True, language, "transcribe")
        return RowFilter(labeller, columns, Normalisers(name, tokenizer), settings)

    return make


class SpawnedPool:
    """In the place of ProcessPoolExecutor, whose processes take seconds to start: what they would get is pickled."""

    def __init__(self, workers, mp_context):
        assert workers == 2
        assert mp_context.get_start_method() == "spawn"  # a fork after torch has started its threads can hang

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, tasks):
        return (pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(task))) for task in tasks)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_rows_that_are_kept_and_the_count_of_each_reason(make_filter, monkeypatch, num_proc):
    monkeypatch.setattr(verdicts, "ROWS_PER_TASK", 3 if num_proc == 1 else 4)
    monkeypatch.setattr(verdicts, "ProcessPoolExecutor", SpawnedPool)
    found = Verdicts(judge(rows_of(TRANSCRIPTS), make_filter(), num_proc, lengths=True))
    assert found.kept.tolist() == [0, 2, 4, 6, 7]
    assert found.reasons == Counter({KEPT: 5, "empty transcript": 1, ABOVE: 2})
    assert found.lengths.shape == (5, 2, 2) and found.lengths.min() > 0


def test_no_row_at_all(make_filter):
    empty = Dataset.from_dict({"text": []})
    for lengths in (False, True):
        found = Verdicts(judge(empty, make_filter(), 1, lengths))
        assert found.kept.tolist() == [] and not found.reasons


def test_a_label_that_cannot_be_read_is_left_to_training_to_skip(make_filter):
    """It counts for --max_skipped there, where what is filtered does not."""
    found = Verdicts(judge(rows_of([" one two", " one<|99.00|>"]), make_filter(), 1, lengths=True))
    assert found.kept.tolist() == [0, 1] and found.reasons[UNREADABLE] == 1
    assert found.lengths[1].tolist() == [[0, 0], [0, 0]]


@pytest.fixture
def judged(monkeypatch) -> list[int]:
    """How many rows each call of `judge` in this process was given."""
    counts = []

    def watched(rows, *rest, judge=verdicts.judge):
        counts.append(len(rows))
        return judge(rows, *rest)

    monkeypatch.setattr(verdicts, "judge", watched)
    return counts


def test_verdicts_are_found_once_for_what_decides_them(make_filter, judged, monkeypatch, tmp_path):
    def ask(rows=None, lengths=False, **how):
        with OutputFolder(tmp_path, "training") as folder:
            files = VerdictFiles(folder, SimpleNamespace(num_processes=1))
            return files(0, rows or rows_of(TRANSCRIPTS), make_filter(**how), 1, lengths)

    first = ask()
    assert ask().kept.tolist() == first.kept.tolist() and ask().reasons == first.reasons and judged == [8]
    path = tmp_path / "verdicts/0.parquet"
    assert pq.read_table(path)["reason"].to_pylist().count(ABOVE) == 2
    others = [
        {"wer_threshold": 60.0},
        {"name": "basic"},
        {"language": "de"},
        {"positions": 64},
        {"lengths": True},
        {"rows": rows_of([*TRANSCRIPTS[:-1], " six"])},
        {"rows": rows_of(TRANSCRIPTS).select(range(4))},
    ]
    for number, other in enumerate(others, 2):
        ask(**other)
        ask(**other)
        assert len(judged) == number
    ask()
    monkeypatch.setattr(verdicts, "code_version", lambda: "another")
    ask()
    assert len(judged) == len(others) + 3


def test_verdicts_that_are_damaged_anywhere_are_found_again(make_filter, judged, tmp_path):
    """A file whose footer is whole can still hold pages that are not; a changed bit must not be another verdict."""
    accelerator, path = SimpleNamespace(num_processes=1), tmp_path / "verdicts/0.parquet"

    def ask() -> list[int]:
        with OutputFolder(tmp_path, "training") as folder:
            return VerdictFiles(folder, accelerator)(0, rows_of(TRANSCRIPTS), make_filter(), 1, True).kept.tolist()

    first, good = ask(), path.read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for start in range(0, footer, 20):
        path.write_bytes(good[:start] + bytes(255 - byte for byte in good[start : start + 20]) + good[start + 20 :])
        assert ask() == first
    for cut in (0, 4, footer, len(good) - 20):
        path.write_bytes(good[:cut])
        assert ask() == first
    assert len(judged) > footer / 40


def test_other_processes_read_what_the_main_one_found(make_filter, judged, tmp_path):
    rows, accelerator = rows_of(TRANSCRIPTS), SimpleNamespace(num_processes=1)
    with OutputFolder(tmp_path, "training") as folder:
        found = VerdictFiles(folder, accelerator)(0, rows, make_filter(), 1, False)
        other = VerdictFiles(OutputFolder(tmp_path, "training", main=False), accelerator)
        assert other(0, rows, make_filter(), 1, False).kept.tolist() == found.kept.tolist() and judged == [8]


def test_a_training_that_goes_on_filters_nothing_again(student, labelled, judged, tmp_path, monkeypatch):
    flags = [*ENGLISH, "--kl_weight", 0, "--wer_threshold", 500, "--group_by_length"]
    folder = train_few(student, labelled, tmp_path / "out", *flags, "--max_steps", 1)
    train_few(student, labelled, folder, *flags, "--max_steps", 2)
    assert judged == [24] and (folder / "verdicts/0.parquet").exists()
    train_few(student, labelled, folder, *flags, "--max_steps", 3, "--wer_threshold", 400)
    assert judged == [24, 24]
    train_few(student, labelled, folder, *ENGLISH, "--kl_weight", 0, "--max_steps", 1, "--overwrite_output_dir")
    assert judged == [24, 24, 24]
