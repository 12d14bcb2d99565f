"""Which rows are trained on, why others are not, and word errors of each utterance of a packed window."""

import math
import random
from collections import Counter

import pytest
from rapidfuzz.distance import Levenshtein
from transformers import WhisperTokenizer

from distil_whisper.alignment import Errors, utterance_errors, worst
from distil_whisper.examples import LabelColumns, Labeller, LabelSettings
from distil_whisper.filtering import CUT, KEPT, UNREADABLE, FilterSettings, RowFilter, table
from distil_whisper.normalisation import Normalisers, normaliser
from distil_whisper.tokens import Grammar

PSEUDO = LabelColumns("text", True, "hi", "transcribe")
TRANSCRIPTS = LabelColumns("text", False, "hi", "transcribe")
HINDI, VOWELS_WRONG = "मैं हिन्दी बोलता हूँ", "मो हीन्दि बोलता हा"
NAN = math.nan
UNCHECKED = "kept unchecked: no WER"
ABOVE, LOOPS = "WER above --wer_threshold", "compression_ratio above --max_compression_ratio"


@pytest.fixture(scope="module")
def grammar(toy_teacher):
    return Grammar(WhisperTokenizer.from_pretrained(toy_teacher), True, 128)


@pytest.fixture(scope="module")
def make_filter(grammar):
    """RowFilter of this toy, by its columns, settings and normaliser."""

    def make(columns=PSEUDO, name=None, **settings):
        given = {"wer_threshold": None, "max_label_length": None, "window_seconds": 4.0, **settings}
        labeller = Labeller(grammar, LabelSettings(0.2, 0.1, 0))
        return RowFilter(labeller, columns, Normalisers(name, grammar.tokenizer), FilterSettings(**given))

    return make


def row_of(transcript=" one two", text="one two", **values):
    return {"whisper_transcript": transcript, "text": text, **values}


@pytest.mark.parametrize(
    "reason, columns, settings, row",
    [
        (KEPT, PSEUDO, {}, row_of()),
        (KEPT, PSEUDO, {}, row_of(duration=4.0)),
        ("audio longer than the window by column duration", PSEUDO, {}, row_of(duration=4.01)),
        ("audio longer than the window by column duration", TRANSCRIPTS, {}, row_of(duration=4.01)),
        (KEPT, PSEUDO, {}, row_of(duration=None)),
        ("pseudo-label truncated", PSEUDO, {}, row_of(truncated=True)),
        (KEPT, PSEUDO, {"drop_truncated": False}, row_of(truncated=True)),
        (KEPT, TRANSCRIPTS, {}, row_of(truncated=True)),
        ("empty transcript", PSEUDO, {}, row_of("")),
        ("empty transcript", PSEUDO, {}, row_of(None)),
        ("empty transcript", PSEUDO, {}, row_of("<|0.00|><|1.00|>")),
        ("empty transcript", PSEUDO, {}, row_of("<|startoftranscript|><|hi|><|transcribe|><|endoftext|>")),
        (KEPT, PSEUDO, {"drop_empty": False}, row_of("")),
        ("empty transcript", TRANSCRIPTS, {}, row_of(text=" ")),
        ("empty transcript", TRANSCRIPTS, {}, row_of(text=None)),
        (KEPT, TRANSCRIPTS, {}, row_of("")),
        (KEPT, PSEUDO, {"max_label_length": 4}, row_of("<|0.00|> one two<|1.00|>")),
        ("label longer than --max_label_length", PSEUDO, {"max_label_length": 3}, row_of("<|0.00|> one two<|1.00|>")),
        (KEPT, PSEUDO, {}, row_of(" one" * 124)),
        ("label longer than the decoder's positions", PSEUDO, {}, row_of(" one" * 125)),
        (KEPT, PSEUDO, {"drop_truncated": False}, row_of(" one" * 125, truncated=True)),
        (KEPT, PSEUDO, {"wer_threshold": 50.0}, row_of(" one six")),
        (ABOVE, PSEUDO, {"wer_threshold": 49.9}, row_of(" one six")),
        (KEPT, PSEUDO, {"wer_threshold": 0.0}, row_of("<|0.00|> One, two!<|1.00|>")),
        (KEPT, TRANSCRIPTS, {"wer_threshold": 0.0}, row_of(" six")),
        (UNCHECKED, PSEUDO, {"wer_threshold": 0.0}, row_of(" six", task="translate")),
        (UNCHECKED, PSEUDO, {"wer_threshold": 0.0}, row_of(" six", text=None)),
        (UNCHECKED, LabelColumns(None, True, "hi", "transcribe"), {"wer_threshold": 0.0}, row_of(" six")),
        (ABOVE, PSEUDO, {"wer_threshold": 10.0}, row_of(" six", wer=NAN, normalizer="multilingual")),
        (
            ABOVE,
            PSEUDO,
            {"wer_threshold": 10.0},
            row_of(" six", wer=0.0, utterance_wer=[NAN], normalizer="multilingual"),
        ),
        ("kept unchecked: no no_speech_prob", PSEUDO, {"max_no_speech_prob": 0.5}, row_of(no_speech_prob=NAN)),
        ("avg_logprob below --min_avg_logprob", PSEUDO, {"min_avg_logprob": -1.0}, row_of(avg_logprob=-math.inf)),
        ("kept unchecked: no chars_per_second", PSEUDO, {"max_chars_per_second": 5.0}, row_of(duration=NAN)),
        (KEPT, TRANSCRIPTS, {}, row_of(duration="4.01")),
        (UNREADABLE, PSEUDO, {}, row_of(whisper_token_ids=[1, None])),
        (
            ABOVE,
            PSEUDO,
            {"wer_threshold": 10.0, "cut_utterances": True},
            row_of(" six", utterance_texts=["one", "two"]),
        ),
        (
            "kept unchecked: no avg_logprob, chars_per_second, detected_language, CER",
            PSEUDO,
            {
                "wer_threshold": 0.0,
                "by_characters": True,
                "min_avg_logprob": -1.0,
                "min_chars_per_second": 1.0,
                "max_chars_per_second": 9.0,
                "max_compression_ratio": 9.0,
                "drop_language_mismatch": True,
            },
            row_of(text=None, avg_logprob=None),
        ),
        ("no language in column language", LabelColumns("text", False), {}, row_of(language="")),
        ("no language in column lang", LabelColumns("text", True, language_column="lang"), {}, row_of(lang=None)),
        (
            "a language in column language that the model has not",
            LabelColumns("text", False),
            {},
            row_of(language="xx"),
        ),
        ("no task of Whisper's in column task", LabelColumns("text", False, "hi"), {}, row_of(task="sing")),
        (ABOVE, PSEUDO, {"wer_threshold": 90.0}, row_of(" six", text="")),
        ("CER above --wer_threshold", PSEUDO, {"wer_threshold": 10.0, "by_characters": True}, row_of(" one six")),
        (KEPT, PSEUDO, {"wer_threshold": 34.0, "by_characters": True}, row_of(" one tvo", wer=50.0)),
        ("avg_logprob below --min_avg_logprob", PSEUDO, {"min_avg_logprob": -0.5}, row_of(avg_logprob=-0.6)),
        (KEPT, PSEUDO, {"min_avg_logprob": -0.5}, row_of(avg_logprob=-0.5)),
        (KEPT, TRANSCRIPTS, {"min_avg_logprob": -0.5}, row_of(avg_logprob=-0.6)),
        ("no_speech_prob above --max_no_speech_prob", PSEUDO, {"max_no_speech_prob": 0.5}, row_of(no_speech_prob=0.6)),
        (
            "compression_ratio above --max_compression_ratio",
            PSEUDO,
            {"max_compression_ratio": 2.4},
            row_of(" one" * 30),
        ),
        (KEPT, PSEUDO, {"max_compression_ratio": 2.4}, row_of()),
        ("ngram_repeats above --max_ngram_repeats", PSEUDO, {"max_ngram_repeats": 2}, row_of(" one two six" * 3)),
        (KEPT, PSEUDO, {"max_ngram_repeats": 2}, row_of(" one two six" * 2)),
        ("chars_per_second below --min_chars_per_second", PSEUDO, {"min_chars_per_second": 3.0}, row_of(duration=3.0)),
        ("chars_per_second above --max_chars_per_second", PSEUDO, {"max_chars_per_second": 2.0}, row_of(duration=3.0)),
        (KEPT, PSEUDO, {"min_chars_per_second": 2.0, "max_chars_per_second": 3.0}, row_of(duration=3.0)),
        (
            "another language than the teacher was told",
            PSEUDO,
            {"drop_language_mismatch": True},
            row_of(language="hi", detected_language="ur"),
        ),
        (KEPT, PSEUDO, {"drop_language_mismatch": True}, row_of(language="hi", detected_language="hi")),
    ],
)
def test_reasons(make_filter, reason, columns, settings, row):
    assert make_filter(columns, **settings)(row) == reason


@pytest.mark.parametrize(
    "stored, rate",
    [
        ({"wer": 12.5, "normalizer": "multilingual"}, 12.5),  # labelling counted already
        ({"wer": 12.5, "normalizer": "english"}, 50.0),
        ({"wer": 12.5, "normalizer": "basic_keep_marks"}, 50.0),  # the default of before
        ({"wer": None, "normalizer": "multilingual"}, 50.0),
    ],
)
def test_a_stored_wer_counts_if_its_normaliser_is_ours(make_filter, stored, rate):
    assert make_filter().error_rates(row_of(" one six", **stored)) == [rate]


def test_a_packed_window_is_as_bad_as_its_worst_utterance(make_filter):
    parts = ["one two three four", "nine nine"]
    row = row_of(" one two three four five six", " ".join(parts), utterance_texts=parts)
    assert make_filter(wer_threshold=40.0)(row) == ABOVE  # a third of the window's words, but one utterance is lost
    assert make_filter(wer_threshold=40.0)({**row, "utterance_texts": None}) == KEPT
    assert make_filter().error_rates(row) == [0.0, 100.0]
    assert make_filter(wer_threshold=0.0)({**row, "utterance_texts": [parts[0], None]}) == UNCHECKED


@pytest.mark.parametrize("name, reason", [(None, ABOVE), ("basic_keep_marks", ABOVE), ("basic", KEPT)])
def test_the_vowel_signs_of_hindi_count_unless_the_normaliser_deletes_them(make_filter, name, reason):
    basic = normaliser("basic", "hi", None)
    assert basic(HINDI) == basic(VOWELS_WRONG)
    assert make_filter(name=name, wer_threshold=10.0)(row_of(f" {VOWELS_WRONG}", HINDI)) == reason
    assert make_filter(name=name, wer_threshold=10.0)(row_of(f" {HINDI}।", HINDI)) == KEPT


@pytest.mark.parametrize(
    "references, hypothesis, errors",
    [
        (["a b", "c d"], "a b c d", [0, 0]),
        (["a b", "c d"], "a x c d", [1, 0]),
        (["a b", "c d"], "a b c x", [0, 1]),
        (["a b", "c d"], "a b", [0, 2]),
        (["a b", "c d"], "c d", [2, 0]),
        (["a b", "c d"], "a b x c d", [1, 0]),  # an insertion belongs to the word before it
        (["a b", "c d"], "a b c x d", [0, 1]),
        (["a b", "c d"], "a b c d x y", [0, 2]),
        (["a b", "c d"], "x a b c d", [1, 0]),
        (["a b", "c d", "e"], "a b x x e", [0, 2, 0]),
        (["a", "b", "c"], "a c", [0, 1, 0]),
        (["", "a"], "a", [0, 0]),
        (["a", "", "b"], "a x b", [1, 0, 0]),
        (["a", ""], "a", [0, 0]),
        (["a b"], "a x y", [2]),
        (["a b"], "", [2]),
        ([""], "x", [1]),
        (["A, b!", "C"], "a b. c", [0, 0]),  # compared as the normaliser writes them
    ],
)
def test_word_errors_of_each_utterance(references, hypothesis, errors):
    rules = normaliser("basic", "hi", None)
    found = utterance_errors(references, hypothesis, rules)
    assert [pair.errors for pair in found] == errors
    assert [pair.reference_words for pair in found] == [len(rules(text).split()) for text in references]


def test_the_errors_of_the_utterances_are_those_of_the_window():
    draw = random.Random(0)
    for _ in range(200):
        references = [" ".join(draw.choices("abcd", k=draw.randint(0, 4))) for _ in range(draw.randint(1, 5))]
        hypothesis = draw.choices("abcd", k=draw.randint(0, 12))
        found = utterance_errors(references, " ".join(hypothesis), str)
        assert sum(pair.errors for pair in found) == Levenshtein.distance(" ".join(references).split(), hypothesis)


def test_characters_of_each_utterance_count_its_own_spaces():
    rules = normaliser(None, "de", None)
    found = utterance_errors(["", "ab cd", "", "ef g", ""], "ab cd ef g", rules, rules.characters)
    assert found == [Errors(0, 0), Errors(0, 5), Errors(0, 0), Errors(0, 4), Errors(0, 0)]
    assert utterance_errors(["ab", "ef g"], "ab efg", rules, rules.characters) == [Errors(0, 2), Errors(1, 4)]
    thai = normaliser(None, "th", None)
    assert utterance_errors(["น้ำ ดี", "มา"], "น้ำดีมะ", thai, thai.characters) == [Errors(0, 2), Errors(1, 2)]


def test_the_worst_has_the_highest_rate_not_the_most_errors():
    found = utterance_errors(["a b c d e f", "g"], "a x y d e f z", str)
    assert [pair.errors for pair in found] == [2, 1]
    assert worst(found) == found[1]


def test_the_table_says_what_became_of_each_dataset():
    counts = [("a/b/train", Counter({KEPT: 7, "empty transcript": 1, ABOVE: 12})), ("c", Counter({KEPT: 3}))]
    assert table(counts).splitlines() == [
        "a/b/train: 7 of 20 rows kept",
        f"        12  {ABOVE}",
        "         1  empty transcript",
        "c: 3 of 3 rows kept",
    ]


PARTS, BEGINS = ["one two three four", "nine nine"], [0.0, 2.0]
PACKED = row_of(
    "<|0.00|> one two three four<|1.80|><|2.20|> five six<|3.00|>",
    " ".join(PARTS),
    utterance_texts=PARTS,
    utterance_starts=BEGINS,
    duration=3.5,
)


def test_a_bad_utterance_is_cut_out_and_counted_apart(make_filter):
    cut = make_filter(wer_threshold=40.0, cut_utterances=True)
    assert cut(PACKED) == CUT
    assert cut.trimmed(PACKED)["whisper_transcript"] == "<|0.00|> one two three four<|1.80|>"
    lost = {**PACKED, "whisper_transcript": " six"}
    assert cut(lost) == ABOVE and cut.trimmed(lost) is lost  # nothing of it is right
    fine = {**PACKED, "whisper_transcript": " one two three four nine nine"}
    assert cut(fine) == KEPT and cut.trimmed(fine) is fine
    assert make_filter(wer_threshold=40.0)(PACKED) == ABOVE
    assert table([("a", Counter({KEPT: 1, CUT: 2, ABOVE: 3}))]).startswith("a: 3 of 6 rows kept")
    assert table([("a", Counter({KEPT: 1, UNCHECKED: 2, ABOVE: 3}))]).startswith("a: 3 of 6 rows kept")


DENSE = "<|0.00|> one two three four<|1.80|><|2.20|> five six one two six five<|3.40|>"
LOOPING = {
    "utterance_texts": [" ".join(["one"] * 12), "nine nine"],
    "whisper_transcript": f"<|0.00|>{' one' * 12}<|1.80|><|2.20|> five six two nine four seven<|3.40|>",
}


@pytest.mark.parametrize(
    "reason, settings, values",
    [
        (CUT, {"max_chars_per_second": 9.0}, {}),  # 27 in 3.5 s, 18 in the 2 s that are left
        ("chars_per_second above --max_chars_per_second", {"max_chars_per_second": 8.0}, {}),
        (
            "chars_per_second below --min_chars_per_second",
            {"min_chars_per_second": 9.5},
            {"whisper_transcript": DENSE},
        ),
        (LOOPS, {"max_compression_ratio": 2.4}, LOOPING),
    ],
)
def test_what_is_left_of_a_cut_row_passes_the_filters_again(make_filter, reason, settings, values):
    row = {**PACKED, **values}
    assert make_filter(**settings)(row) == KEPT
    assert make_filter(wer_threshold=40.0, cut_utterances=True, **settings)(row) == reason


def test_which_utterances_are_cut_out_goes_by_the_rule_that_cuts(make_filter):
    """Labelling counts words that were inserted between two utterances for the one before."""
    parts, marked = ["one two", "three four"], "<|0.00|> one two<|1.80|><|2.20|> nine nine three four<|3.00|>"
    stored = {"wer": 100.0, "utterance_wer": [100.0, 0.0], "normalizer": "multilingual"}
    row = row_of(marked, " ".join(parts), utterance_texts=parts, utterance_starts=BEGINS, **stored)
    cut = make_filter(wer_threshold=40.0, cut_utterances=True)
    assert cut(row) == CUT and cut.trimmed(row)["whisper_transcript"] == "<|0.00|> one two<|1.80|>"
    longer = ["one two", "three four five six seven"]  # two words of five are not above it
    row |= {"utterance_texts": longer, "whisper_transcript": marked.replace("four", "four five six seven")}
    assert cut(row) == KEPT and cut.trimmed(row) is row


def test_utterances_are_cut_out_by_characters(make_filter):
    by_characters = make_filter(wer_threshold=40.0, cut_utterances=True, by_characters=True)
    assert by_characters(PACKED) == CUT  # 7 of 9 characters
    close = {**PACKED, "whisper_transcript": PACKED["whisper_transcript"].replace("five six", "nine nin")}
    assert by_characters(close) == KEPT
