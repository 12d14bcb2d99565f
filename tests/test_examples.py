"""From rows to token sequences, examples and batches."""

import re
from dataclasses import replace

import numpy as np
import pytest
from transformers import WhisperTokenizer

from distil_whisper.audio import Window
from distil_whisper.examples import (
    Collator,
    Example,
    ExampleMaker,
    LabelColumns,
    Labeller,
    LabelSettings,
    draws,
)
from distil_whisper.tokens import IGNORED, Grammar, Sequence

POSITIONS = 128
TIMED = "<|0.00|> one two<|1.20|>"
HINDI = LabelColumns("text", True, "hi", "transcribe")
TRANSCRIPTS = LabelColumns("text", False, "hi", "transcribe")
WINDOW = Window(sampling_rate=16_000, samples=4 * 16_000, frames=400, mels=80)
PREFIX, END = "<|startoftranscript|><|hi|><|transcribe|>", "<|endoftext|>"
ALWAYS, NEVER = LabelSettings(1.0, 1.0, 0), LabelSettings(0.0, 0.0, 0)


@pytest.fixture(scope="module")
def grammar(toy_teacher):
    return Grammar(WhisperTokenizer.from_pretrained(toy_teacher), True, POSITIONS)


@pytest.fixture(scope="module")
def english_only(toy_english_only):
    return Grammar(WhisperTokenizer.from_pretrained(toy_english_only), False, POSITIONS)


def ids(grammar, text):
    return grammar.tokenizer.encode(text, add_special_tokens=False)


def whole(sequence):
    return [*sequence.decoder_input_ids, sequence.labels[-1]]


def row_of(grammar, **values):
    """A row as labelling writes it."""
    return {
        "text": "five",
        "whisper_transcript": TIMED,
        "whisper_token_ids": None,
        "tokenizer_fingerprint": grammar.fingerprint,
        "condition_on_prev": ids(grammar, "<|0.00|> four<|0.50|>"),
        "language": "de",
        "task": "translate",
        "truncated": False,
        **values,
    }


@pytest.mark.parametrize(
    "columns, settings, values, expected",
    [
        (HINDI, ALWAYS, {}, f"<|startofprev|><|0.00|> four<|0.50|>{PREFIX}{TIMED}{END}"),
        (HINDI, NEVER, {}, f"{PREFIX}<|notimestamps|> one two{END}"),
        (HINDI, LabelSettings(0.0, 1.0, 0), {}, f"<|startofprev|> four{PREFIX}<|notimestamps|> one two{END}"),
        (HINDI, LabelSettings(1.0, 0.0, 0), {}, f"{PREFIX}{TIMED}{END}"),
        (HINDI, ALWAYS, {"condition_on_prev": None}, f"{PREFIX}{TIMED}{END}"),
        (HINDI, ALWAYS, {"condition_on_prev": []}, f"{PREFIX}{TIMED}{END}"),
        (HINDI, LabelSettings(1.0, 0.0, 0), {"truncated": True}, f"{PREFIX}{TIMED}"),
        (HINDI, NEVER, {"truncated": True}, f"{PREFIX}<|notimestamps|> one two"),
        (HINDI, NEVER, {"whisper_transcript": None}, f"{PREFIX}<|notimestamps|>{END}"),
        # human transcripts have neither prompts nor timestamps, and what was truncated was the pseudo-label
        (TRANSCRIPTS, ALWAYS, {}, f"{PREFIX}<|notimestamps|> five{END}"),
        (TRANSCRIPTS, ALWAYS, {"truncated": True}, f"{PREFIX}<|notimestamps|> five{END}"),
        (TRANSCRIPTS, ALWAYS, {"text": None}, f"{PREFIX}<|notimestamps|>{END}"),
    ],
)
def test_sequences_of_rows(grammar, columns, settings, values, expected):
    sequence = Labeller(grammar, settings).sequence(row_of(grammar, **values), columns, "row", 0)
    assert whole(sequence) == ids(grammar, expected)
    start = sequence.decoder_input_ids.index(grammar.start)
    assert sequence.labels[:start] == [IGNORED] * start and IGNORED not in sequence.labels[start:]


@pytest.mark.parametrize(
    "run, own, default, found",
    [
        (("hi", "transcribe"), ("de", "translate"), ("fr", "transcribe"), "<|hi|><|transcribe|>"),
        ((None, None), ("de", "translate"), ("fr", "transcribe"), "<|de|><|translate|>"),
        ((None, None), (None, None), ("fr", "transcribe"), "<|fr|><|transcribe|>"),
        ((None, "translate"), ("German", None), ("fr", "transcribe"), "<|de|><|translate|>"),
    ],
)
def test_language_and_task_are_the_flag_then_the_row_then_the_default(grammar, run, own, default, found):
    columns = LabelColumns("text", True, *run, *default)
    row = row_of(grammar, language=own[0], task=own[1])
    assert whole(Labeller(grammar, NEVER).sequence(row, columns, "row", 0))[1:3] == ids(grammar, found)
    columns = replace(columns, told=True)  # what the row's teacher was told comes before the flag
    language = {"German": "de"}.get(own[0], own[0]) or run[0] or default[0]
    found = f"<|{language}|><|{own[1] or run[1] or default[1]}|>"
    assert whole(Labeller(grammar, NEVER).sequence(row, columns, "row", 0))[1:3] == ids(grammar, found)


@pytest.mark.parametrize("pseudo, text", [(True, " one two"), (False, " five")])
def test_an_english_only_model_is_told_nothing_even_by_the_row(english_only, pseudo, text):
    sequence = Labeller(english_only, NEVER).sequence(row_of(english_only), LabelColumns("text", pseudo), "row", 0)
    assert whole(sequence) == ids(english_only, f"<|startoftranscript|><|notimestamps|>{text}{END}")


def test_token_ids_are_the_targets_where_they_are_of_this_tokenizer(grammar):
    generated = [*ids(grammar, "<|0.00|>"), *(ids(grammar, letter)[0] for letter in " six"), *ids(grammar, "<|1.00|>")]
    labeller = Labeller(grammar, ALWAYS)
    for fingerprint, expected in [
        (grammar.fingerprint, generated),
        (None, generated),  # labelled elsewhere, nobody knows by whom
        ("another", ids(grammar, TIMED)),
    ]:
        row = row_of(grammar, whisper_token_ids=generated, tokenizer_fingerprint=fingerprint)
        assert labeller.target(row, HINDI).ids == expected


@pytest.mark.parametrize(
    "values", [{"tokenizer_fingerprint": "another"}, {"condition_on_prev": [7, 8], "special": "<|startoftranscript|>"}]
)
def test_a_prompt_that_cannot_be_used_is_left_out_and_counted(grammar, values):
    row = row_of(grammar, **values)
    if special := row.pop("special", None):
        row["condition_on_prev"] = [7, grammar.id_of(special), 8, grammar.id_of(special), 9]
    sequence = Labeller(grammar, ALWAYS).sequence(row, HINDI, "row", 0)
    assert whole(sequence) == ids(grammar, f"{PREFIX}{TIMED}{END}") and sequence.prompt_left_out
    for settings, other in ((LabelSettings(1.0, 0.0, 0), row), (ALWAYS, {**row, "condition_on_prev": None})):
        assert not Labeller(grammar, settings).sequence(other, HINDI, "row", 0).prompt_left_out
    assert Collator(WINDOW, 99)([Example("row", np.zeros(9, np.float32), sequence)] * 2).prompts_left_out == 2


def kept_in(grammar, epoch, rows=400, seed=0):
    """Which of some rows keep their timestamps, and which their prompt, in an epoch."""
    labeller = Labeller(grammar, LabelSettings(0.2, 0.1, seed))
    sequences = [labeller.sequence(row_of(grammar), HINDI, f"row-{index}", epoch) for index in range(rows)]
    timed = [grammar.no_timestamps not in sequence.decoder_input_ids for sequence in sequences]
    prompted = [sequence.decoder_input_ids[0] == grammar.previous for sequence in sequences]
    return np.array(timed), np.array(prompted)


def test_the_draws_have_the_probabilities_and_are_independent(grammar):
    timed, prompted = kept_in(grammar, 0)
    assert 0.14 < timed.mean() < 0.26 and 0.06 < prompted.mean() < 0.14
    assert 0 < (timed & prompted).sum() < min(timed.sum(), prompted.sum()) / 2


def test_each_epoch_and_each_seed_draws_again(grammar):
    first = kept_in(grammar, 0)
    for other in (kept_in(grammar, 1), kept_in(grammar, 0, seed=1)):
        assert (first[0] != other[0]).any() and (first[1] != other[1]).any()
    for again, before in zip(kept_in(grammar, 0), first, strict=True):
        assert (again == before).all()


def test_draws_depend_on_their_arguments_alone():
    numbers = np.array([draws(0, epoch, f"row-{index}") for epoch in range(2) for index in range(2000)])
    assert (numbers >= 0).all() and (numbers < 1).all()
    assert len(np.unique(numbers)) == numbers.size
    assert np.allclose(np.histogram(numbers, 10, (0, 1))[0] / numbers.size, 0.1, atol=0.02)
    assert draws(42, 3, "a/b/train/00001-00000007") == pytest.approx((0.47557, 0.91565), abs=1e-5)  # in any process


@pytest.fixture(scope="module")
def maker(grammar):
    return ExampleMaker(Labeller(grammar, NEVER), WINDOW, "audio")


def test_an_example_is_the_decoded_audio_and_the_sequence(grammar, maker, utterances):
    audio = {"bytes": utterances[0].encoded("FLAC", 8000), "path": None}
    example = maker({**row_of(grammar), "audio": audio}, HINDI, "the row", 0)
    assert example.row_id == "the row" and example.problem is None
    assert len(example.samples) == pytest.approx(len(utterances[0].samples), abs=4)
    assert whole(example.sequence) == ids(grammar, f"{PREFIX}<|notimestamps|> one two{END}")


@pytest.mark.parametrize(
    "audio, transcript, problem",
    [
        ({"bytes": b"", "path": None}, TIMED, "empty file"),
        ({"bytes": b"no sound", "path": None}, TIMED, "unreadable: .*"),
        ({"bytes": None, "path": None}, TIMED, "no audio"),
        ({"array": np.zeros(64_001), "sampling_rate": 16_000}, TIMED, r"longer than the window: 4\.0 s of 4 s"),
        ({"array": np.full(10, np.nan), "sampling_rate": 16_000}, TIMED, "NaN or infinite samples"),
        ({"array": np.zeros(10), "sampling_rate": 16_000}, " one" * 300, "label longer than the decoder's positions"),
        ({"array": np.zeros(10), "sampling_rate": 16_000}, "<|31.00|> one", "a transcript holds the mark .*"),
    ],
)
def test_what_cannot_be_used_says_why(grammar, maker, audio, transcript, problem):
    row = {**row_of(grammar, whisper_transcript=transcript), "audio": audio}
    example = maker(row, HINDI, "the row", 0)
    assert example.sequence is None and example.samples is None
    assert re.fullmatch(problem, example.problem)


def example(length, samples=8_000):
    return Example(f"row-{length}", np.full(samples, 0.5, np.float32), Sequence(list(range(length)), [7] * length))


@pytest.mark.parametrize("lengths, padded", [([3], 8), ([8, 2], 8), ([9, 1], 16), ([5, 17, 3], 24)])
def test_batches_are_padded_to_the_longest_label_and_no_further(lengths, padded):
    batch = Collator(WINDOW, padding=99)([example(length) for length in lengths])
    assert batch.decoder_input_ids.shape == batch.labels.shape == (len(lengths), padded)
    assert batch.waveforms.shape == (len(lengths), WINDOW.samples)
    for row, length in enumerate(lengths):
        assert batch.decoder_input_ids[row].tolist() == [*range(length), *[99] * (padded - length)]
        assert batch.labels[row].tolist() == [7] * length + [IGNORED] * (padded - length)
        assert batch.waveforms[row].count_nonzero() == 8_000
    assert batch.tokens == sum(lengths)
    assert batch.valid_positions.tolist() == (batch.labels.flatten() != IGNORED).nonzero()[:, 0].tolist()
    assert batch.row_ids == [f"row-{length}" for length in lengths]
    assert batch.seconds == pytest.approx(len(lengths) * 0.5)


def test_problems_are_listed_and_leave_the_batch():
    batch = Collator(WINDOW, 99)([Example("bad", problem="empty file"), example(4), Example("a copy")])
    assert batch.problems == [("bad", "empty file")]
    assert len(batch.labels) == 1 and batch.tokens == 4 and batch.row_ids == ["row-4"]


def test_a_batch_without_usable_examples_is_one_silent_window_that_trains_nothing():
    batch = Collator(WINDOW, 99)([Example("bad", problem="empty file"), Example("a copy")])
    assert batch.waveforms.shape == (1, WINDOW.samples) and not batch.waveforms.any()
    assert batch.labels.unique().tolist() == [IGNORED] and batch.decoder_input_ids.unique().tolist() == [99]
    assert batch.tokens == 0 and batch.seconds == 0 and batch.row_ids == []
