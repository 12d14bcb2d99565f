import pytest

from distil_whisper.alignment import Errors, word_errors
from distil_whisper.metrics import ErrorRates, score
from distil_whisper.normalisation import normaliser


class Tokenizer:
    english_spelling_normalizer = None


BASIC = normaliser("basic", "de", Tokenizer)


@pytest.mark.parametrize(
    "reference, hypothesis, errors, words, rate",
    [
        ("a b c d", "a b c d", 0, 4, 0.0),
        ("a b c d", "a x c", 2, 4, 50.0),
        ("a", "b c d", 3, 1, 300.0),
        ("a b", "", 2, 2, 100.0),
        ("", "", 0, 0, 0.0),
        ("", "a b", 2, 0, 200.0),
        ("  a   b ", "a b", 0, 2, 0.0),
    ],
)
def test_word_errors_of_one_pair(reference, hypothesis, errors, words, rate):
    found = word_errors(reference, hypothesis)
    assert found == Errors(errors, words)
    assert found.rate == rate


@pytest.mark.parametrize(
    "references, hypotheses, wer, cer, empty",
    [
        (["a b c d", "a"], ["a b c d", "b"], 20.0, 12.5, 0),  # one of five words: not the mean of 0 and 100
        (["a b", ""], ["a b", "c"], 50.0, 100 / 3, 1),  # what is said in silence is inserted
        ([""], ["a"], 100.0, 100.0, 1),
        (["", ""], ["a b", "c"], 300.0, 400.0, 2),
        ([""], [""], 0.0, 0.0, 1),
        (["a"], [""], 100.0, 100.0, 0),
    ],
)
def test_error_rates_of_a_corpus(references, hypotheses, wer, cer, empty):
    found = ErrorRates().compute(predictions=hypotheses, references=references)
    assert found["wer"] == pytest.approx(wer)
    assert found["cer"] == pytest.approx(cer)
    assert found["empty_references"] == empty
    assert found["errors"] == found["substitutions"] + found["deletions"] + found["insertions"]


def test_corpus_errors_are_the_sum_of_the_pairs():
    references, hypotheses = ["a b c", "d e", "", "f"], ["a c", "d x e", "y", "f"]
    pairs = [word_errors(*pair) for pair in zip(references, hypotheses, strict=True)]
    found = ErrorRates().compute(predictions=hypotheses, references=references)
    assert found["errors"] == sum(pair.errors for pair in pairs) == 3
    assert found["reference_words"] == sum(pair.reference_words for pair in pairs) == 6


def test_two_metrics_at_once_do_not_share_their_texts():
    first, second = ErrorRates(), ErrorRates()
    first.add_batch(predictions=["a"], references=["a"])
    second.add_batch(predictions=["b"], references=["a"])
    assert first.compute()["wer"] == 0.0
    assert second.compute()["wer"] == 100.0


def test_score_reports_normalised_and_orthographic_rates():
    found = score(["Hello, world", "yes"], ["hello world", "[noise]"], BASIC)
    assert (found["wer"], found["wer_ortho"]) == (50.0, pytest.approx(200 / 3))
    assert found["cer_ortho"] > found["cer"] > 0
    assert found["rows"] == 2
    assert found["empty_references"] == 1  # what is left of "[noise]"
    assert (found["normalizer"], found["headline"]) == ("basic", "wer")


def test_score_of_a_language_without_spaces_is_led_by_characters():
    found = score(["你好世間"], ["你好 世界。"], normaliser(None, "zh", Tokenizer))
    assert (found["headline"], found["cer"], found["wer"]) == ("cer", 25.0, 25.0)
    assert found["wer_ortho"] == 100.0
    assert found["cer_ortho"] == 40.0  # the full stop, and no space
    thai = score(["น้ำ"], ["น้ำ ดี"], normaliser(None, "th", Tokenizer))
    assert (thai["cer"], thai["cer_ortho"]) == (50.0, 50.0)  # a letter with its marks is one character


def test_score_of_nothing():
    found = score([], [], BASIC)
    assert found["rows"] == 0
    assert found["wer"] is None
    assert found["wer_ortho"] is None
