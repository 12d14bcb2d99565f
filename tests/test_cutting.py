"""Utterances that are cut out of packed windows: words, times and audio go together."""

import numpy as np
import pytest

from distil_whisper.cutting import REMOVED, cut_samples, cut_utterances
from distil_whisper.normalisation import normaliser

INF = float("inf")


class Tokenizer:
    english_spelling_normalizer = None


def window(transcript, texts=("one two", "three", "four five"), starts=(0.0, 2.0, 3.0), **values):
    parts = {"utterance_texts": list(texts), "utterance_starts": list(starts), "utterance_wer": [0.0] * len(texts)}
    ids = {"utterance_ids": [str(part) for part in range(len(texts))], "whisper_token_ids": [1, 2]}
    return {"whisper_transcript": transcript, "wer": 50.0, **parts, **ids, **values}


MARKED = "<|0.20|> one two<|1.80|><|2.10|> tree<|2.80|><|3.20|> four five<|4.60|>"


@pytest.mark.parametrize(
    "transcript, bad, expected, spans",
    [
        (" one two tree four five", {1}, " one two four five", [[2.0, 3.0]]),
        (" one two tree four five", {0}, " tree four five", [[0.0, 2.0]]),
        (" one two tree four five", {0, 2}, " tree", [[0.0, 2.0], [3.0, INF]]),
        (" One, two. Tree! Four five.", {1}, " One, two. Four five.", [[2.0, 3.0]]),
        (" one two four five", {1}, " one two four five", [[2.0, 3.0]]),  # nothing was heard of it
        (" one two three oh four five", {1}, " one two four five", [[2.0, 3.0]]),  # inserted words go with it
        (MARKED, {1}, "<|0.20|> one two<|1.80|><|2.20|> four five<|3.60|>", [[2.0, 3.0]]),
        (MARKED, {0}, "<|0.10|> tree<|0.80|><|1.20|> four five<|2.60|>", [[0.0, 2.0]]),
        (MARKED, {2}, "<|0.20|> one two<|1.80|><|2.10|> tree<|2.80|>", [[3.0, INF]]),
        (  # a time within the removed part moves to where it was cut
            MARKED.replace("1.80", "2.10"),
            {1},
            "<|0.20|> one two<|2.00|><|2.20|> four five<|3.60|>",
            [[2.0, 3.0]],
        ),
        ("<|0.20|> one two<|1.80|><|2.10|> tree four<|3.40|><|3.40|> five<|4.60|>", {1}, None, None),  # half a segment
        (MARKED + "<|4.80|>", {0}, "<|0.10|> tree<|0.80|><|1.20|> four five<|2.60|><|2.80|>", [[0.0, 2.0]]),
        ("<|0.20|> one two<|1.80|><|2.10|> tree", {0}, "<|0.10|> tree", [[0.0, 2.0]]),  # its end was not written
    ],
)
def test_words_times_and_audio_of_an_utterance_go(transcript, bad, expected, spans):
    cut = cut_utterances(window(transcript), bad, normaliser("basic", "de", Tokenizer))
    if expected is None:
        assert cut is None
        return
    assert (cut["whisper_transcript"], cut[REMOVED]) == (expected, spans)
    kept = [part for part in range(3) if part not in bad]
    assert cut["utterance_ids"] == [str(part) for part in kept] and cut["wer"] is cut["whisper_token_ids"] is None
    assert cut["utterance_starts"][0] == 0.0


@pytest.mark.parametrize(
    "row, bad",
    [
        (window(" one two three four five"), {0, 1, 2}),
        (window(" one two three four five", texts=("one two", None, "four five")), {0}),
    ],
)
def test_what_cannot_be_cut_with_certainty_is_not_cut(row, bad):
    assert cut_utterances(row, bad, normaliser("basic", "de", Tokenizer)) is None


def test_numbers_that_the_english_normaliser_joins_cannot_be_told_apart():
    row = window(" twenty three four", texts=("twenty", "three", "four"))
    assert cut_utterances(row, {0}, normaliser(None, "en", Tokenizer)) is None


def test_characters_are_the_words_of_languages_without_spaces():
    row = window("你好世界再见", texts=("你好", "世间", "再见"))
    assert cut_utterances(row, {1}, normaliser(None, "zh", Tokenizer))["whisper_transcript"] == "你好再见"


def test_samples_go_with_their_spans():
    samples = np.arange(50)
    assert cut_samples(samples, [[1.0, 2.0], [4.0, INF]], 10).tolist() == [*range(10), *range(20, 40)]
    assert cut_samples(samples, None, 10) is samples
