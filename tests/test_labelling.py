"""Units of a dataset become labelled rows: windows, prompts, columns, and what is left out.

The teacher of most tests writes the words of the levels that it hears (constant samples), so that a label shows which
audio it is of; the last test has a real one.
"""

import io
import json
import math
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from conftest import WORDS
from datasets import Audio, Features, Value

from distil_whisper.audio import decode, stack
from distil_whisper.decoding import Decoded, Decoder
from distil_whisper.handoff import WRITTEN, schema
from distil_whisper.labelling import (
    Columns,
    LabellingSettings,
    Tally,
    UnitAtWork,
    UnitLabeller,
    expected_lengths,
    label_units,
)
from distil_whisper.models import load_whisper
from distil_whisper.normalisation import Normalisers
from distil_whisper.packing import Utterance, WindowAudio
from distil_whisper.resuming import OtherWindows
from distil_whisper.tokens import plain_text

RATE, TEXT = 16_000, Value("string")
FEATURES = Features({"audio": Audio(), "text": TEXT, "id": TEXT, "who": TEXT, "duration": TEXT, "note": TEXT})
SETTINGS = {
    "language": "hi",
    "task": "transcribe",
    "concatenate": False,
    "split_long": False,
    "decode_token_ids": True,
    "batch_size": 2,
    "num_workers": 0,
}
BY_SPEAKER = Columns("audio", "text", "id", "who")
UNREADABLE, TOO_LONG = b"no audio at all", 5.0  # the window has 4 s


@pytest.fixture(scope="module")
def whisper(toy_teacher):
    return load_whisper(str(toy_teacher), device="cpu")


class Ear:
    """A teacher that hears levels: k / 20 is the word k. It never comes to an end when it hears the word nine."""

    def __init__(self, grammar):
        self.grammar = grammar
        self.told = []

    def __call__(self, waveforms, language, task):
        self.told.append((language, task, len(waveforms)))
        return [self._heard(np.round(samples.numpy() * 20).astype(int)) for samples in waveforms]

    def _heard(self, levels):
        words = [WORDS[level] for level in levels[np.diff(levels, prepend=0) != 0] if level]
        truncated = "nine" in words
        text = self.grammar.encode_pseudo_label("<|0.00|> " + " ".join(words) + ("" if truncated else "<|2.00|>"))
        return Decoded(text.ids, truncated, -0.123456, 0.5)


class Rows:
    """A source of units."""

    def __init__(self, *units):
        self.rows = lambda unit: iter(units[unit])

    def row_id(self, unit, number):
        return f"source/{unit}-{number}"


def row(level, who="anna", seconds=1.0, text=..., data=None):
    """A row whose audio has one level; data stands in for it."""
    if data is None:
        buffer = io.BytesIO()
        soundfile.write(buffer, np.full(int(seconds * RATE), level / 20, np.float32), RATE, format="WAV")
        data = buffer.getvalue()
    text = WORDS[level] if text is ... else text
    audio = {"bytes": data, "path": "/home/somebody/clip.wav"}
    return {"audio": audio, "text": text, "id": f"id-{level}", "who": who, "duration": "long", "note": "kept"}


def labeller_of(teacher, decoder, columns, **settings):
    """A labeller and the features of what it writes, as the script makes them."""
    settings = LabellingSettings(**{**SETTINGS, **settings})
    kept = columns.kept_in_windows() if settings.concatenate or settings.split_long else None
    features, renamed = schema(FEATURES, kept, columns.audio, columns.text)
    rules = Normalisers("multilingual", teacher.tokenizer)
    return UnitLabeller(teacher, decoder, columns, settings, rules, renamed), features


def rows_of_unit(labeller, source, unit=0, tally=None, most_runs=None):
    """What is written of a unit, or of its first runs."""
    written = []
    units = [UnitAtWork(labeller, source, unit, tally or Tally(), most_runs)]
    for _ in label_units(units, lambda _, rows: written.append(rows), labeller.settings.num_workers):
        pass
    assert written.pop() is None and None not in written
    return list(chain.from_iterable(written))


@pytest.fixture
def label(whisper):
    """Label the rows of one unit: the labelled rows and the tally. They fit the schema of the hand-off dataset."""

    def run(*rows, columns=BY_SPEAKER, ear=None, **settings):
        labeller, features = labeller_of(whisper, ear or Ear(whisper.grammar), columns, **settings)
        tally = Tally()
        labelled = rows_of_unit(labeller, Rows(rows), tally=tally)
        pa.Table.from_pylist(labelled, schema=features.arrow_schema)
        assert all(set(found) == set(features) for found in labelled)
        return labelled, tally

    return run


def words(labelled):
    return [plain_text(found["whisper_transcript"]) for found in labelled]


def prompts(whisper, labelled):
    """condition_on_prev as text."""
    return [
        found["condition_on_prev"] and plain_text(whisper.grammar.decode(found["condition_on_prev"]))
        for found in labelled
    ]


def test_one_row_in_is_one_row_out_with_its_columns_and_those_of_the_contract(whisper, label):
    (found,), tally = label(row(3, seconds=1.5))
    assert set(found) == {"audio", "text", "id", "who", "source_duration", "note", *WRITTEN}
    assert found["audio"] == {"bytes": row(3, seconds=1.5)["audio"]["bytes"], "path": "clip.wav"}
    expected = {
        "text": "three",
        "id": "id-3",
        "source_duration": "long",
        "note": "kept",
        "whisper_transcript": "<|0.00|> three<|2.00|>",
        "whisper_token_ids": None,
        "tokenizer_fingerprint": whisper.grammar.fingerprint,
        "condition_on_prev": None,
        "language": "hi",
        "task": "transcribe",
        "row_id": "source/0-0",
        "recording_id": "anna",
        "window_start": 0.0,
        "utterance_ids": None,
        "utterance_starts": None,
        "utterance_texts": None,
        "utterance_wer": None,
        "truncated": False,
        "wer": 0.0,
        "errors": 0,
        "reference_words": 1,
        "normalizer": "multilingual",
        "avg_logprob": -0.1235,
        "no_speech_prob": 0.5,
        "duration": 1.5,
    }
    assert {name: found[name] for name in expected} == expected
    assert (tally.rows, tally.seconds, tally.skipped) == (1, 1.5, [])


def test_token_ids_are_kept_on_demand_as_they_were_generated(whisper, label):
    (found,), _ = label(row(3), decode_token_ids=False)
    assert found["whisper_token_ids"] == whisper.grammar.encode_pseudo_label("<|0.00|> three<|2.00|>").ids
    assert found["whisper_transcript"] == "<|0.00|> three<|2.00|>"


NOBODY = (None, "", " ")  # nobody knows whose they are
SKIPPED = {"unreadable": row(5, data=UNREADABLE), "too long": row(5, seconds=TOO_LONG), "empty": row(5, data=b"")}


@pytest.mark.parametrize(
    "rows, columns, expected",
    [
        ([row(1), row(2), row(3)], BY_SPEAKER, [None, "one", "two"]),
        ([row(1), row(2, "ben"), row(3)], BY_SPEAKER, [None, None, "one"]),
        ([row(1), row(9), row(3), row(4)], BY_SPEAKER, [None, "one", None, "three"]),  # nine was truncated
        *[([row(1), row(2, nobody), row(3, nobody)], BY_SPEAKER, [None, None, None]) for nobody in NOBODY],
        ([row(1), row(2)], Columns("audio", "text", "id"), [None, None]),
        ([row(1), row(2)], Columns("audio", "text", None, "who", "id"), [None, None]),  # a recording each
        *[([row(1), bad, row(3), row(4)], BY_SPEAKER, [None, None, "three"]) for bad in SKIPPED.values()],
        ([row(1), {**row(2, "ben"), "audio": SKIPPED["empty"]["audio"]}, row(3)], BY_SPEAKER, [None, "one"]),
    ],
)
@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (2, 0), (8, 2)])
def test_the_prompt_is_the_window_before_of_the_same_speaker(
    whisper, label, rows, columns, expected, batch_size, num_workers
):
    labelled, _ = label(*rows, columns=columns, batch_size=batch_size, num_workers=num_workers)
    assert prompts(whisper, labelled) == expected


SEPARATE, PACKED = [["one", "two"], ["three", "four"]], [["one two"], ["three four"]]


def test_speakers_of_a_table_without_a_number_are_nobody(whisper):
    labeller, _ = labeller_of(whisper, Ear(whisper.grammar), BY_SPEAKER)
    assert [labeller._recording({"who": who}) for who in (7, 7.5, float("nan"))] == ["7", "7.5", None]


@pytest.mark.parametrize("concatenate, expected", [(False, SEPARATE), (True, PACKED)])
def test_prompts_and_windows_never_cross_a_unit(whisper, concatenate, expected):
    source = Rows([row(1), row(2)], [row(3), row(4)])
    labeller, _ = labeller_of(whisper, Ear(whisper.grammar), BY_SPEAKER, concatenate=concatenate)
    for unit in range(2):
        labelled = rows_of_unit(labeller, source, unit)
        assert words(labelled) == expected[unit]
        assert labelled[0]["condition_on_prev"] is None
        assert labelled[0]["row_id"] == f"source/{unit}-0"


def test_a_prompt_holds_the_timestamps_and_no_prefix(whisper, label):
    labelled, _ = label(row(1), row(2))
    assert labelled[1]["condition_on_prev"] == whisper.grammar.encode_pseudo_label("<|0.00|> one<|2.00|>").ids


def test_rows_that_cannot_be_labelled_are_listed_and_the_others_are_there(label):
    labelled, tally = label(row(1), *SKIPPED.values(), row(2))
    assert words(labelled) == ["one", "two"]
    assert [found["row_id"] for found in labelled] == ["source/0-0", "source/0-4"]
    reasons = {entry["row_id"]: entry["reason"] for entry in tally.skipped}
    assert {(entry["id"], entry["file"]) for entry in tally.skipped} == {("id-5", "/home/somebody/clip.wav")}
    assert reasons.keys() == {"source/0-1", "source/0-2", "source/0-3"}
    assert reasons["source/0-1"].startswith("unreadable")
    assert reasons["source/0-2"] == "longer than the window: 5.00 s of audio, the window is 4 s"
    assert reasons["source/0-3"] == "empty file"
    assert (tally.rows, tally.seconds) == (2, 2.0)


@pytest.mark.parametrize(
    "text, settings, expected",
    [
        ("three", {}, (0.0, 0, 1)),
        ("Three!", {}, (0.0, 0, 1)),
        ("one two three four", {}, (75.0, 3, 4)),
        ("", {}, (100.0, 1, 0)),
        (None, {}, (None, None, None)),
        ("three", {"task": "translate"}, (None, None, None)),
        ("three", {"columns": Columns("audio", None, "id", "who")}, (None, None, None)),
    ],
)
def test_word_errors_are_counted_where_there_is_a_transcript(label, text, settings, expected):
    (found,), _ = label(row(3, text=text), **settings)
    assert (found["wer"], found["errors"], found["reference_words"]) == expected
    assert found["normalizer"] == (None if expected[0] is None else "multilingual")


def test_packed_windows(whisper, label):
    rows = [row(1), row(5, "ben"), row(2), row(4, text="fore"), row(6, seconds=1.5), row(7, "ben")]
    labelled, tally = label(*rows, concatenate=True)
    by_words = dict(zip(words(labelled), labelled, strict=True))
    assert set(by_words) == {"one two four", "five seven", "six"}
    found = by_words["one two four"]
    samples = decode(found["audio"], RATE)
    np.testing.assert_allclose(samples, np.repeat([0.05, 0.1, 0.2], RATE), atol=1e-4)
    assert found["audio"]["path"] is None
    expected = {
        "text": "one two fore",
        "id": "id-1",
        "who": "anna",
        "utterance_ids": ["id-1", "id-2", "id-4"],
        "utterance_starts": [0.0, 1.0, 2.0],
        "utterance_texts": ["one", "two", "fore"],
        "utterance_wer": [0.0, 0.0, 100.0],
        "wer": 100.0,
        "errors": 1,
        "reference_words": 3,
        "row_id": "source/0-0",
        "recording_id": "anna",
        "window_start": 0.0,
        "duration": 3.0,
    }
    assert {name: found[name] for name in expected} == expected
    assert "note" not in found
    assert prompts(whisper, [by_words["six"]]) == ["one two four"]
    assert tally.rows == 3 and tally.seconds == 6.5


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_utterance_starts_give_back_the_samples(whisper, label, rate, monkeypatch):
    """Of every offset: four digits are a sample off for a third of them."""
    monkeypatch.setattr(whisper, "window", replace(whisper.window, sampling_rate=rate))
    labeller, _ = labeller_of(whisper, None, BY_SPEAKER, concatenate=True)
    offsets = [*range(4 * rate), *range(30 * rate, 30 * rate + 100)]
    window = WindowAudio([Utterance("row", "anna", row(1), np.zeros(0))] * len(offsets), offsets, np.zeros(0), "row")
    assert [round(start * rate) for start in labeller._parts(window)["utterance_starts"]] == offsets


@pytest.mark.parametrize("language, joined", [("hi", "one two"), ("ja", "onetwo")])
def test_texts_are_joined_as_the_language_is_written(label, language, joined):
    (found,), _ = label(row(1), row(2), concatenate=True, language=language)
    assert found["text"] == joined
    (found,), _ = label(row(1), row(2, text=None), concatenate=True, language=language)
    assert found["text"] is None and found["utterance_texts"] == ["one", None] and found["wer"] is None


def long_row(*levels, who="anna"):
    """A recording of 1.5 s of each level, with 0.5 s of silence behind each."""
    buffer = io.BytesIO()
    parts = [np.r_[np.full(3 * RATE // 2, level / 20), np.zeros(RATE // 2)] for level in levels]
    soundfile.write(buffer, np.concatenate(parts).astype(np.float32), RATE, format="WAV")
    return row(levels[0], who, data=buffer.getvalue())


@pytest.mark.parametrize(
    "columns, expected",
    [
        (BY_SPEAKER, [None, "seven", "one two", "three four", "five"]),
        (Columns("audio", "text"), [None, None, "one two", "three four", None]),
    ],
)
def test_long_recordings_are_cut_on_demand(whisper, label, columns, expected):
    rows = [row(7), long_row(1, 2, 3, 4, 5), row(8)]
    labelled, tally = label(*rows, split_long=True, columns=columns)
    assert words(labelled) == ["seven", "one two", "three four", "five", "eight"]
    assert not tally.skipped
    assert prompts(whisper, labelled) == expected
    whole = decode(rows[1]["audio"], RATE)
    pieces = [decode(found["audio"], RATE) for found in labelled[1:4]]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-4)
    starts = np.cumsum([0, *(len(piece) / RATE for piece in pieces[:-1])])
    for found, start in zip(labelled[1:4], starts, strict=True):
        assert found["window_start"] == pytest.approx(start)
        assert found["row_id"] == f"source/0-1@{start:.2f}"
        assert found["text"] is None and found["wer"] is None  # nobody knows which words are where
    assert labelled[0]["text"] == "seven" and labelled[0]["wer"] == 0.0
    assert labelled[0]["audio"]["bytes"] == rows[0]["audio"]["bytes"]


def test_packing_stops_at_a_long_recording(whisper, label):
    rows = [row(7), row(8), long_row(1, 2, 3), row(4), row(5)]
    labelled, _ = label(*rows, split_long=True, concatenate=True)
    assert words(labelled) == ["seven eight", "one two", "three", "four five"]
    assert prompts(whisper, labelled) == [None, "seven eight", "one two", "three"]
    assert [found["utterance_texts"] for found in labelled] == [["seven", "eight"], None, None, ["four", "five"]]


@pytest.mark.parametrize(
    "settings, read", [({}, 2), ({"split_long": True}, 2), ({"concatenate": True, "split_long": True}, 3)]
)
def test_rows_are_read_as_they_are_needed(whisper, settings, read):
    source, count = Rows(), []
    source.rows = lambda unit: (count.append(1) or row(1 + i % 8, seconds=3.0) for i in range(30))
    labeller, _ = labeller_of(whisper, Ear(whisper.grammar), BY_SPEAKER, **settings, run_batches=1)
    assert len(rows_of_unit(labeller, source, most_runs=1)) == SETTINGS["batch_size"]
    assert len(count) == read


@pytest.mark.parametrize("settings", [{}, {"concatenate": True}, {"split_long": True}])
def test_batches_change_no_row(whisper, label, settings):
    rows = [row(1 + i % 9, "ab"[i % 2], 1 + i % 3) for i in range(8)] + [long_row(1, 2, 3), row(5, data=b"")]
    expected = label(*rows, **settings)
    for batch_size in (1, 3, 100):
        ear = Ear(whisper.grammar)
        assert label(*rows, batch_size=batch_size, num_workers=batch_size % 3, ear=ear, **settings) == expected
        assert max(count for *_, count in ear.told) <= batch_size
        assert {told[:2] for told in ear.told} == {("hi", "transcribe")}


@pytest.mark.parametrize("model, told", [("toy_teacher", ("hi", "transcribe")), ("toy_english_only", (None, None))])
def test_a_real_teacher(request, utterances, model, told):
    teacher = load_whisper(str(request.getfixturevalue(model)), device="cpu")
    decoder = Decoder(teacher, max_label_length=6, return_timestamps=True)
    rows = [{**row(1, u.speaker, text=u.text, data=u.encoded()), "id": u.id} for u in utterances[:6]]
    labeller, _ = labeller_of(teacher, decoder, BY_SPEAKER, language=told[0], task=told[1], decode_token_ids=False)
    labelled = rows_of_unit(labeller, Rows(rows))
    expected = decoder(stack([u.samples for u in utterances[:6]], teacher.window), *told)
    assert [found["whisper_token_ids"] for found in labelled] == [decoded.ids for decoded in expected]
    assert [found["truncated"] for found in labelled] == [decoded.truncated for decoded in expected]
    assert (labelled[0]["language"], labelled[0]["task"]) == told
    for found in labelled:
        assert teacher.grammar.end not in found["whisper_token_ids"]
        assert found["whisper_transcript"] == teacher.grammar.decode(found["whisper_token_ids"])
        assert teacher.grammar.target_of_ids(found["whisper_token_ids"]).ids == found["whisper_token_ids"]


def test_a_unit_goes_on_behind_what_is_labelled(whisper, label):
    """Its rows are read again and its first windows not decoded again; prompts and skipped rows are as they were."""
    rows = [row(1), row(2, "ben"), *SKIPPED.values(), row(3), row(4, "ben"), row(5), row(6), row(7, "ben")]
    expected, whole = label(*rows, run_batches=1)
    labeller, _ = labeller_of(whisper, Ear(whisper.grammar), BY_SPEAKER, run_batches=1)
    began = Tally()
    first = rows_of_unit(labeller, Rows(rows), tally=began, most_runs=1)
    ear, went_on = Ear(whisper.grammar), Tally(**json.loads(json.dumps(began.progress())), kept=first)
    labeller, _ = labeller_of(whisper, ear, BY_SPEAKER, run_batches=1)
    rest = rows_of_unit(labeller, Rows(rows), tally=went_on)
    assert first + rest == expected and sum(count for *_, count in ear.told) == len(rest) == len(expected) - 2
    assert went_on == whole


@pytest.mark.parametrize("settings", [{}, {"concatenate": True}, {"split_long": True, "num_workers": 2}])
def test_a_unit_does_not_go_on_behind_other_windows(whisper, settings):
    """A row that was skipped can be read, or the reverse, or is longer; after what is labelled that may be."""

    def rest(rows):
        labeller, _ = labeller_of(whisper, Ear(whisper.grammar), BY_SPEAKER, run_batches=1, batch_size=1, **settings)
        return rows_of_unit(labeller, Rows(rows), tally=Tally(**json.loads(kept), kept=iter(first)))

    before = [row(1, seconds=3), row(2, "ben", data=UNREADABLE), row(3, seconds=3), row(4, data=UNREADABLE)]
    before += [row(5, seconds=3), row(6)]
    labeller, _ = labeller_of(whisper, Ear(whisper.grammar), BY_SPEAKER, run_batches=1, batch_size=1, **settings)
    tally = Tally()
    first = rows_of_unit(labeller, Rows(before), tally=tally, most_runs=2)
    kept = json.dumps(tally.progress())
    assert [found["duration"] for found in first] == [3, 3]
    assert [found["duration"] for found in rest(before)] in ([3, 1], [4])
    assert [found["duration"] for found in rest([*before[:5], row(6, data=UNREADABLE)])] == [3]
    for place, other in {0: row(1, data=UNREADABLE), 1: row(2, seconds=3), 2: row(3, seconds=2)}.items():
        with pytest.raises(OtherWindows):
            rest([other if number == place else was for number, was in enumerate(before)])
    with pytest.raises(OtherWindows):
        rest(before[:1])


def test_windows_that_the_teacher_could_not_label_are_passed_over_too(whisper):
    class Deaf(Ear):
        def __call__(self, waveforms, *told):
            heard = super().__call__(waveforms, *told)
            return [replace(found, avg_logprob=math.nan) if len(self.told) == 2 else found for found in heard]

    rows = [row(level) for level in range(1, 5)]
    one_by_one = {"run_batches": 1, "batch_size": 1}
    labeller, _ = labeller_of(whisper, Deaf(whisper.grammar), BY_SPEAKER, **one_by_one)
    tally = Tally()
    first = rows_of_unit(labeller, Rows(rows), tally=tally, most_runs=3)
    labeller, _ = labeller_of(whisper, Ear(whisper.grammar), BY_SPEAKER, **one_by_one)
    kept = json.dumps(tally.progress())
    assert (tally.rows, tally.left_out) == (2, 1)
    assert words(rows_of_unit(labeller, Rows(rows), tally=Tally(**json.loads(kept), kept=first))) == [WORDS[4]]
    other = [rows[0], row(2, data=UNREADABLE), *rows[2:]]
    with pytest.raises(OtherWindows):
        rows_of_unit(labeller, Rows(other), tally=Tally(**json.loads(kept), kept=first))


def test_rows_name_their_own_language_and_task(whisper, label):
    """Those told the same thing are decoded together, and packed windows hold one language."""
    columns = Columns("audio", "text", "id", "who", None, "lang", "job")
    told = [("Hindi", None), ("en", None), (None, "translate"), ("hi", "transcribe"), ("xx", None), ("en", "sing")]
    rows = [{**row(1 + i), "lang": language, "job": task} for i, (language, task) in enumerate(told)]
    ear = Ear(whisper.grammar)
    labelled, tally = label(*rows, columns=columns, ear=ear)
    assert [(found["language"], found["task"]) for found in labelled] == [
        ("hi", "transcribe"),
        ("en", "transcribe"),
        ("hi", "translate"),
        ("hi", "transcribe"),
    ]
    assert words(labelled) == ["one", "two", "three", "four"] and labelled[2]["wer"] is None
    assert [found["normalizer"] for found in labelled[:2]] == ["multilingual"] * 2
    assert sorted(ear.told) == [("en", "transcribe", 1), ("hi", "transcribe", 2), ("hi", "translate", 1)]
    assert [entry["reason"].split(" (")[0] for entry in tally.skipped] == [
        "the model has no language 'xx'",
        "the task 'sing' is not one of transcribe, translate",
    ]
    # what was said before is no prompt where another language or task was told
    assert prompts(whisper, labelled) == [None] * 4
    again, _ = label(rows[0], rows[0], rows[1], rows[0], columns=columns)
    assert prompts(whisper, again) == [None, "one", None, None]
    packed, _ = label(*rows[:4], columns=columns, concatenate=True)
    assert words(packed) == ["one", "two", "three", "four"]
    without, tally = label({**rows[2]}, columns=columns, language=None)
    assert not without and tally.skipped[0]["reason"] == "no language in column lang"


def test_a_decoder_is_given_the_texts_of_its_windows_but_for_translations(whisper, label):
    ear, given = Ear(whisper.grammar), []

    class Reader:
        grammar = ear.grammar

        def __call__(self, waveforms, language, task, texts=None):
            heard = ear(waveforms, language, task)
            given.append((task, texts, [plain_text(ear.grammar.decode(decoded.ids)) for decoded in heard]))
            return heard

    columns = Columns("audio", "text", "id", "who", task="job")
    jobs = ["transcribe", "translate", "transcribe", "transcribe", "translate"]
    rows = [{**row(level), "job": job} for level, job in enumerate(jobs, 1)]
    rows[3]["text"] = None
    labelled, _ = label(*rows, columns=columns, ear=Reader(), draft_from_text=True, batch_size=3)
    assert words(labelled) == WORDS[1:6]
    assert given == [
        ("transcribe", ["one", None, "three"], ["one", "four", "three"]),
        ("translate", [None, None], ["two", "five"]),
    ]
    given.clear()
    label(*rows, columns=columns, ear=Reader(), batch_size=3)
    assert [texts for _, texts, _ in given] == [None, None]


@pytest.mark.parametrize("text", [{"en": "one", "de": "eins"}, ["one"], 1])
def test_a_translation_may_have_any_column_of_that_name(whisper, text):
    labeller, _ = labeller_of(whisper, Ear(whisper.grammar), Columns("audio", "text"), task="translate")
    (found,) = rows_of_unit(labeller, Rows([{**row(1), "text": text}]))
    assert plain_text(found["whisper_transcript"]) == "one" and found["wer"] is None


def test_lengths_that_are_not_known_are_expected_at_the_rate_of_the_others():
    windows = [SimpleNamespace(samples=np.zeros(seconds * 10)) for seconds in (1, 2, 3, 4)]
    assert expected_lengths(windows, ["aa", None, "aaaaaa", ""]) == [2, 4, 6, 8]
    assert expected_lengths(windows, [None, "", None, None]) == [10, 20, 30, 40]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("known", ["transcripts", "audio"])
def test_windows_of_like_length_are_decoded_together_and_rows_stay_in_order(whisper, label, num_workers, known):
    """The length of a label is expected to go with that of its transcript; without one, with that of its audio."""
    ear, batches = Ear(whisper.grammar), []
    heard = ear._heard
    ear._heard = lambda levels: batches.append(levels.max()) or heard(levels)
    lengths = (3, 1, 2, 1, 3, 2)
    if known == "audio":
        rows = [row(1 + place, seconds=length, text=None) for place, length in enumerate(lengths)]
    else:
        rows = [row(1 + place, seconds=4 - length, text="a" * length) for place, length in enumerate(lengths)]
    labelled, _ = label(*rows, ear=ear, num_workers=num_workers)
    assert words(labelled) == WORDS[1:7] and batches == [2, 4, 3, 6, 1, 5]
