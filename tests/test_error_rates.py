"""One pair of texts has one WER and one CER, jiwer's, whichever stage counts them."""

import jiwer
import pytest
from datasets import Audio, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperTokenizer

from distil_whisper.alignment import utterance_errors
from distil_whisper.batch_log import Transcribed
from distil_whisper.examples import LabelColumns, Labeller, LabelSettings
from distil_whisper.filtering import FilterSettings, RowFilter
from distil_whisper.handoff import ShardFile, finish_shard, schema, shard_writer
from distil_whisper.metrics import score
from distil_whisper.normalisation import Normalisers, normaliser
from distil_whisper.outputs import OutputFolder
from distil_whisper.scoring import figures, predictions
from distil_whisper.summary import summarise
from distil_whisper.tokens import Grammar

PAIRS = [
    ("zh", "你好世界", "你好世間。"),  # one of four characters
    ("zh", "你好 世界 hi", "你好, 世界"),
    ("ja", "がぎぐ げご", "かぎぐげご"),
    ("th", "น้ำดีครับ", "น้ำ ดีคับ"),
    ("lo", "ນ້ຳ ດີ", "ນ້ຳ"),
    ("my", "မြန်မာ", "မြန်မ"),
    ("km", "ខ្មែរ", "ខ្មែ"),
    ("de", "Guten Morgen, Welt", "guten morgenwelt"),
    ("hi", "मैं हिन्दी बोलता हूँ", "मो हीन्दि बोलता"),
    ("tr", "IŞIK Ilık", "işık ılık"),
    ("en", "It's twenty one", "it is 22"),
    *[(language, "[Musik]", "ah oh") for language in ("de", "th", "en")],  # no word is left of the reference
    *[(language, "", "") for language in ("de", "zh")],
    *[(language, "guten tag", "") for language in ("de", "zh", "en")],
]


@pytest.fixture(scope="module")
def grammar(toy_teacher):
    return Grammar(WhisperTokenizer.from_pretrained(toy_teacher), True, 128)


def labelled_split(folder, reference, spoken, language, normalisers):
    """What the first stage says of a split of one row."""
    source = Features({"audio": Audio(decode=False), "text": Value("string")})
    features, _ = schema(source, None, "audio", "text")
    row = {"text": reference, "whisper_transcript": spoken, "language": language, "task": "transcribe"}
    shard = ShardFile("default", "train", 0, 1)
    with OutputFolder(folder, "run_pseudo_labelling") as output:
        with shard_writer(output / shard.name, features) as write:
            write(dict.fromkeys(features) | row)
        finish_shard(output, shard, {"rows": 1, "seconds": 1.0, "read": 1, "skipped": []})
        return summarise(output, [shard], "text", normalisers, 30.0)


@pytest.mark.parametrize("language, reference, spoken", PAIRS)
def test_all_stages_find_the_errors_that_jiwer_finds(grammar, tmp_path, language, reference, spoken):
    normalisers = Normalisers(None, grammar.tokenizer)
    rules = normalisers(language)
    pair = rules(reference), rules(spoken)
    wer = 100 * jiwer.wer(*pair)
    cer = wer if rules.spaceless else 100 * jiwer.cer(*pair)

    assert utterance_errors([reference], spoken, rules)[0].rate == pytest.approx(wer)  # a row of stage 1
    split = labelled_split(tmp_path / "out", reference, spoken, language, normalisers)
    assert (split["wer"], split["cer"]) == (pytest.approx(wer, abs=0.01), pytest.approx(cer, abs=0.01))
    assert split["normalizer"] == rules.name

    row = {"whisper_transcript": spoken, "text": reference}  # stage 3: filters, then validation
    labeller = Labeller(grammar, LabelSettings(0.2, 0.1, 0))
    for by_characters, rate in ((False, wer), (True, cer)):
        settings = FilterSettings(None, None, 30.0, by_characters=by_characters)
        row_filter = RowFilter(labeller, LabelColumns("text", True, language, "transcribe"), normalisers, settings)
        assert row_filter.error_rates(row) == [pytest.approx(rate)]
    found = score([spoken], [reference], rules)
    assert (found["wer"], found["cer"]) == (pytest.approx(wer), pytest.approx(cer))

    row = {"row_id": "row", "reference": reference, "prediction": spoken, "seconds": 1.0}  # stage 4
    transcribed = Transcribed({(0, 0): row})
    assert predictions(transcribed, rules)[0]["wer"] == pytest.approx(wer, abs=1e-4)
    found = figures(transcribed, rules)
    assert (found["wer"], found["cer"]) == (pytest.approx(wer, abs=1e-4), pytest.approx(cer, abs=1e-4))


TEXTS = st.lists(st.sampled_from(["", " ", "  ", "a", "b", "ab", "你", "好", "น้ำ", "ดี", "कि", "é", "😀"]), max_size=8)


@given(reference=TEXTS, hypothesis=TEXTS, language=st.sampled_from(["de", "th", "hi"]))
def test_counts_equal_those_of_jiwer(reference, hypothesis, language):
    rules = normaliser(None, language, None)
    texts = "".join(reference), " ".join(hypothesis)
    pair = [rules(text) for text in texts]
    words, characters = (utterance_errors([texts[0]], texts[1], rules, unit) for unit in (str.split, rules.characters))
    assert words[0].rate == pytest.approx(100 * jiwer.wer(*pair))
    assert characters[0].rate == pytest.approx(100 * (jiwer.wer if rules.spaceless else jiwer.cer)(*pair))


@given(references=st.lists(TEXTS, min_size=1, max_size=4), hypothesis=TEXTS, language=st.sampled_from(["de", "th"]))
def test_the_errors_of_utterances_are_together_those_of_the_window(references, hypothesis, language):
    rules = normaliser(None, language, None)
    texts = [" ".join(words) for words in references]
    for units in (str.split, rules.characters):
        found = utterance_errors(texts, " ".join(hypothesis), rules, units)
        whole = utterance_errors([" ".join(texts)], " ".join(hypothesis), rules, units)
        assert sum(pair.errors for pair in found) == whole[0].errors


@pytest.mark.parametrize("name", ["english", "basic", "basic_keep_marks", "multilingual"])
@pytest.mark.parametrize("language", ["zh", "th"])
def test_every_normaliser_counts_characters_where_words_are_not_parted(name, language, grammar):
    reference, spoken = {"zh": ("你好世界", "你好世間"), "th": ("กขคง", "กขคจ")}[language]
    found = score([spoken], [reference], normaliser(name, language, grammar.tokenizer))
    assert (found["cer"], found["wer"], found["headline"]) == (25, 25, "cer")
