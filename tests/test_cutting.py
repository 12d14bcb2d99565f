"""Utterances that are cut out of packed windows: words, times and audio go together, or the window goes whole."""

import json
import random
from argparse import Namespace
from functools import cache

import numpy as np
import pytest

from benchmarks.cutting import KINDS, STYLES, simulate
from benchmarks.cutting import main as benchmark
from distil_whisper.alignment import word_owners
from distil_whisper.cutting import REMOVED, cut_samples, cut_utterances
from distil_whisper.normalisation import normaliser
from distil_whisper.tokens import plain_text

INF = float("inf")
TEXTS, STARTS = ("one two", "three", "four five"), (0.0, 2.0, 3.0)
GERMAN = normaliser("basic", "de", None)


class Tokenizer:
    english_spelling_normalizer = None


def window(transcript, texts=TEXTS, starts=STARTS, **values):
    parts = {"utterance_texts": list(texts), "utterance_starts": list(starts), "utterance_wer": [0.0] * len(texts)}
    ids = {"utterance_ids": [str(part) for part in range(len(texts))], "whisper_token_ids": [1, 2]}
    return {"whisper_transcript": transcript, "wer": 50.0, **parts, **ids, **values}


def cut(transcript, texts=TEXTS, starts=STARTS, threshold=10.0, rules=GERMAN, **values):
    return cut_utterances(window(transcript, texts, starts, **values), threshold, rules)


MARKED = "<|0.20|> one two<|1.80|><|2.10|> tree<|2.80|><|3.20|> four five<|4.60|>"


@pytest.mark.parametrize(
    "transcript, expected, removed",
    [
        (MARKED, "<|0.20|> one two<|1.80|><|2.20|> four five<|3.60|>", {1}),
        (MARKED.replace("two", "too"), "<|0.20|> four five<|1.60|>", {0, 1}),
        (
            MARKED.replace("tree", "three").replace("five", "nine"),
            "<|0.20|> one two<|1.80|><|2.10|> three<|2.80|>",
            {2},
        ),
        (MARKED.replace("tree", "three oh"), "<|0.20|> one two<|1.80|><|2.20|> four five<|3.60|>", {1}),
        (MARKED.replace("tree", "oh three"), "<|0.20|> one two<|1.80|><|2.20|> four five<|3.60|>", {1}),
        (  # a mark in the silence where two utterances meet: it moves to the cut
            MARKED.replace("1.80|><|2.10", "2.10|><|2.10"),
            "<|0.20|> one two<|2.00|><|2.20|> four five<|3.60|>",
            {1},
        ),
        (MARKED + "<|4.80|>", "<|0.20|> one two<|1.80|><|2.20|> four five<|3.60|><|3.80|>", {1}),
        (MARKED.removesuffix("<|4.60|>"), "<|0.20|> one two<|1.80|><|2.20|> four five", {1}),  # no end was written
        (
            "<|0.20|> one two<|1.80|><|3.20|> four five<|4.60|>",
            "<|0.20|> one two<|1.80|><|2.20|> four five<|3.60|>",
            {1},
        ),
    ],
)
def test_words_times_and_audio_of_an_utterance_go(transcript, expected, removed):
    found = cut(transcript, duration=5.0)
    kept = sorted(set(range(3)) - removed)
    ends = [*STARTS[1:], INF]
    assert found["whisper_transcript"] == expected
    assert found[REMOVED] == [[STARTS[part], ends[part]] for part in sorted(removed)]
    assert found["utterance_ids"] == [str(part) for part in kept] and found["whisper_token_ids"] is None
    assert found["utterance_texts"] == [TEXTS[part] for part in kept] and found["utterance_starts"][0] == 0.0
    assert found["duration"] == 5.0 - sum(min(end, 5.0) - start for start, end in found[REMOVED])
    assert found["utterance_wer"] == [0.0] * len(kept) and found["normalizer"] == "basic"
    assert (found["wer"], found["errors"]) == (0.0, 0)
    assert found["reference_words"] == sum(len(TEXTS[part].split()) for part in kept)


def test_text_alone_does_not_tell_the_border_of_two_utterances():
    """A word that is said in the first one's audio may stand in the second one's transcript."""
    texts, starts = ("a b c", "d e f g h", "i j k l"), (0.0, 4.0, 8.0)
    assert cut(" a b c d e f i j k l", texts, starts) is None
    assert cut("<|0.20|> a b c d e f<|7.60|><|8.20|> i j k l<|11.00|>", texts, starts) is None
    reaching = cut("<|0.20|> a b c d<|4.04|><|8.20|> i j k l<|11.00|>", texts, starts)  # the second was not heard
    assert reaching["whisper_transcript"] == "<|0.20|> i j k l<|3.00|>"


@pytest.mark.parametrize(
    "transcript, texts, starts",
    [
        # an advert in an utterance without a transcript
        (
            " guten morgen zusammen kaufen sie jetzt bis morgen also",
            ("guten morgen zusammen", "", "bis morgen also"),
            STARTS,
        ),
        (
            "<|0.10|> guten morgen zusammen<|1.90|><|2.00|> kaufen sie<|2.90|><|3.10|> bis morgen<|4.00|>",
            ("guten morgen zusammen", "...", "bis morgen also"),
            STARTS,
        ),
        (" one two tree four five", ("one two", None, "four five"), STARTS),
        # the first of two that say the same was not heard, or the second: times that agree with neither tell nothing
        (" one two three four five", ("one two three", "one two three", "four five"), (0.0, 3.0, 6.0)),
        (
            "<|3.20|> one two three<|4.80|><|6.20|> four five<|7.40|>",
            ("one two three", "one two three", "four five"),
            (0.0, 3.0, 6.0),
        ),
        (MARKED.replace("2.10", "1.50").replace("1.80", "1.40"), TEXTS, STARTS),  # what goes reaches into what stays
        (MARKED.replace("1.80", "2.50").replace("2.10", "2.50"), TEXTS, STARTS),  # what stays, into what goes
        (MARKED.replace("0.20", "2.02").replace("1.80", "2.06"), TEXTS, STARTS),  # words and times disagree
        (MARKED.replace("1.80", "0.10"), TEXTS, STARTS),  # times do not rise
        (MARKED.replace("4.60", "3.20"), TEXTS, STARTS),
        (MARKED.removeprefix("<|0.20|>"), TEXTS, STARTS),  # a segment has no beginning
        ("<|0.20|> one two<|1.80|><|2.10|> tree four<|3.60|><|3.60|> five<|4.60|>", TEXTS, STARTS),
        (" six seven", TEXTS, STARTS),  # nothing stays
        ("", TEXTS, STARTS),
    ],
)
def test_what_cannot_be_cut_with_certainty_is_not_cut(transcript, texts, starts):
    assert cut(transcript, texts, starts) is None


def test_a_segment_that_only_its_times_tie_to_its_utterance_may_be_the_neighbours():
    marked = "<|0.20|> one two<|1.40|><|1.50|> oh<|1.90|><|2.10|> three<|2.80|><|3.20|> four six<|4.60|>"
    assert cut(marked.replace("three", "tree"), threshold=60.0) is None  # "oh" stays, beside an utterance that goes
    assert cut(marked.replace("six", "five").replace("one", "ten"), threshold=60.0) is None  # the reverse
    assert cut(marked.replace("four six", "for six"), threshold=60.0)["utterance_ids"] == ["0", "1"]  # both stay


def test_times_are_rough_only_where_words_are_certain():
    marked = "<|0.20|> one two<|2.10|><|2.10|> tree<|2.80|><|3.20|> four five<|4.60|>"
    assert cut(marked)["utterance_ids"] == ["0", "2"]
    assert cut(marked.replace("two", "two oh").replace("tree", "three"), threshold=60.0) is not None  # nothing goes
    assert (
        cut(marked.replace("two", "two oh").replace("tree", "three"), threshold=40.0) is None
    )  # "oh" may be of either


def test_a_word_at_a_border_counts_for_the_utterance_in_whose_audio_it_is():
    """Stage 1 counts it for the one before, which may be right."""
    marked = "<|0.20|> one two<|1.80|><|2.10|> oh three<|2.80|><|3.20|> four five<|4.60|>"
    stored = {"utterance_wer": [50.0, 0.0, 0.0], "normalizer": "basic"}
    assert cut(marked, **stored)["utterance_ids"] == ["0", "2"]
    row = window(marked, **stored)
    assert cut_utterances(row, 100.0, GERMAN) is row  # none is above it


def test_characters_can_be_what_is_counted():
    row = window(MARKED)
    assert cut_utterances(row, 30.0, GERMAN, GERMAN.characters) is row  # one of five letters
    assert cut_utterances(row, 10.0, GERMAN, GERMAN.characters)["utterance_ids"] == ["0", "2"]


@pytest.mark.parametrize(
    "language, texts, heard, expected",
    [
        (
            "zh",
            ("你好世界", "天地玄黄", "再见朋友"),
            ("你好世界。", "天地黄,", "「再见朋友」"),
            "你好世界。「再见朋友」",
        ),
        ("th", ("ดีมาก", "น้ำที่นี่ร้อนจัด", "ไปก่อนนะ"), ("ดีมาก", "น้ำที่ร้อนจัด", "ไปก่อนนะ"), "ดีมากไปก่อนนะ"),
        (
            "ja",
            ("こんにちは", "がぎぐげご", "さようなら"),
            ("こんにちは", "がぎげご", "さようなら"),
            "こんにちはさようなら",
        ),
        (
            "fr",
            ("oui bonjour madame", "le chat noir est là", "merci à vous"),
            (" Oui bonjour madame !", " Le chat est là.", " « Merci à vous »"),
            "Oui bonjour madame ! « Merci à vous »",
        ),
        (
            "en",
            ("one hundred twenty three", "x y z q r s", "four five"),
            (" one hundred twenty three", " x y r s", " four five"),
            "one hundred twenty three four five",
        ),
    ],
)
def test_other_languages_and_numbers_that_are_normalised(language, texts, heard, expected):
    transcript = "".join(f"<|{3 * part + 0.2:.2f}|>{text}<|{3 * part + 2.8:.2f}|>" for part, text in enumerate(heard))
    found = cut(transcript, texts, (0.0, 3.0, 6.0), rules=normaliser(None, language, Tokenizer))
    assert plain_text(found["whisper_transcript"]) == expected


@pytest.mark.parametrize("joined", STYLES.values())
@pytest.mark.parametrize("spaceless", [False, True])
def test_in_simulated_windows_text_and_audio_stay_together(joined, spaceless):
    args = Namespace(windows=50, seed=1, spaceless=spaceless)
    outcomes = [simulate(kind, joined, args) for kind in KINDS]
    if joined is None:  # then the text alone would have to tell what is said in which audio
        assert not any(outcome.cut for outcome in outcomes)
        return
    assert sum(outcome.cut for outcome in outcomes) > 50 and not any(outcome.wrong for outcome in outcomes)
    assert sum(outcome.lost for outcome in outcomes) < 0.85 * sum(outcome.lost_uncut for outcome in outcomes)


def test_the_simulation_prints_what_it_writes(tmp_path, capsys):
    benchmark(["--windows", "8", "--json", str(tmp_path / "figures.json")])
    header, _, *lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [line.split(" | ")[0] for line in lines] == [f"| {kind}" for kind in KINDS] and next(iter(STYLES)) in header
    assert f"of {found['empty']['timestamps']['cut']} wrong" in lines[KINDS.index("empty")]


def test_the_owners_of_words_are_those_of_all_alignments():
    """Beside an enumeration of them."""
    draw = random.Random(0)
    for _ in range(100):
        references = [draw.choices("abc", k=draw.randint(1, 3)) for _ in range(draw.randint(1, 3))]
        hypothesis = draw.choices("abcx", k=draw.randint(0, 5))
        owners, alignments = word_owners(references, hypothesis), least_cost_alignments(references, hypothesis)
        for place in range(len(hypothesis)):
            found = {alignment[place] for alignment in alignments}
            claims = found - {None}
            assert claims == set(np.flatnonzero(owners.claimed[:, place]).tolist())
            assert owners.between[place] == (None in found)


def least_cost_alignments(references, hypothesis):
    """Of each, whose every word is: None between two utterances."""
    words = [(word, part) for part, reference in enumerate(references) for word in reference]
    borders = np.cumsum([len(reference) for reference in references])[:-1].tolist()

    @cache
    def following(place, spoken):
        if (place, spoken) == (len(words), len(hypothesis)):
            return 0, {()}
        ways = []
        if place < len(words):
            cost, rest = following(place + 1, spoken)
            ways.append((cost + 1, rest))
        if spoken < len(hypothesis):
            owner = None if place in borders else words[min(place, len(words) - 1)][1]
            cost, rest = following(place, spoken + 1)
            ways.append((cost + 1, {(owner, *others) for others in rest}))
        if place < len(words) and spoken < len(hypothesis):
            word, owner = words[place]
            cost, rest = following(place + 1, spoken + 1)
            ways.append((cost + (word != hypothesis[spoken]), {(owner, *others) for others in rest}))
        least = min(cost for cost, _ in ways)
        return least, set().union(*(found for cost, found in ways if cost == least))

    return following(0, 0)[1]


def test_samples_go_with_their_spans():
    samples = np.arange(50)
    assert cut_samples(samples, [[1.0, 2.0], [4.0, INF]], 10).tolist() == [*range(10), *range(20, 40)]
    assert cut_samples(samples, None, 10) is samples
