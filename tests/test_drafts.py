"""A search that reads drafts finds what greedy search finds, in fewer steps where they are right."""

import random

import pytest
import torch
from conftest import write_audio_dataset
from stages import ENGLISH, SPEAKERS, label, rows_of
from test_decoding import LIMIT, enliven

from distil_whisper import attention, drafts, steps
from distil_whisper.audio import LogMel, stack
from distil_whisper.decoding import Decoder
from distil_whisper.drafts import Row, drafted_search
from distil_whisper.errors import UserError
from distil_whisper.greedy import greedy_search
from distil_whisper.models import encoder_states, load_whisper
from distil_whisper.rules import Rules

TIME = 1000  # the first timestamp of rows that are made here


class Searches:
    """Both searches of the same audio, with what the decoder was given at each step."""

    def __init__(self, whisper, waveforms, timestamps, monkeypatch):
        self.model, self.grammar = whisper.model, whisper.grammar
        grammar = self.grammar
        language = ("hi", "transcribe") if grammar.multilingual else (None, None)
        self.prefix, self.opening = grammar.prefix(*language, timestamps), frozenset(range(50))
        features = LogMel(whisper.feature_extractor)(waveforms).to(self.model.dtype)
        with torch.no_grad():
            self.encoded = encoder_states(self.model.get_encoder(), features)
        config = self.model.generation_config
        vocabulary = self.model.config.vocab_size
        self.rules = Rules(config, vocabulary, grammar.end, grammar.no_timestamps, timestamps, self.encoded.device)
        self.shapes, through = [], steps.DecoderSteps._through

        def watched(decode, tokens, *others, **options):
            self.shapes.append(tuple(tokens.shape))
            return through(decode, tokens, *others, **options)

        monkeypatch.setattr(steps.DecoderSteps, "_through", watched)

    def __call__(self, texts=None, most=LIMIT):
        """What is found with drafts, or without."""
        self.shapes.clear()
        room = len(self.prefix) + most + (-1 if texts is None else drafts.AT_ONCE)
        with torch.no_grad():
            decode = steps.DecoderSteps(self.model, self.rules, self.encoded, room)
        if texts is None:
            return greedy_search(decode, self.prefix, most)
        return drafted_search(decode, self.prefix, most, texts, self.opening)

    def words(self, found):
        """The tokens of each row that a draft can have: not the end, and no timestamps where the rules place them."""
        last = self.rules.begin if self.rules.timestamps else float("inf")
        return [[token for token in row if token < last and token != self.rules.end] for row in found.tokens]


@pytest.fixture(params=["toy_teacher", "toy_english_only"])
def whisper(request):
    return enliven(load_whisper(str(request.getfixturevalue(request.param)), device="cpu"), 5)


@pytest.fixture(params=[False, True], ids=["plain", "timestamps"])
def searches(request, whisper, utterances, monkeypatch):
    waveforms = stack([utterance.samples for utterance in utterances[:8]], whisper.window)
    return Searches(whisper, waveforms, request.param, monkeypatch)


def spoilt(words, how, draw):
    """A draft that is not quite what is said."""
    if how == "replaced":
        return [token if draw.random() < 0.8 else draw.randrange(100) for token in words]
    if how == "left out":
        return [token for token in words if draw.random() < 0.8]
    if how == "put in":
        return [each for token in words for each in ([token] if draw.random() < 0.8 else [token, draw.randrange(99)])]
    return {"right": words, "longer": words * 3, "turned": words[::-1], "none": []}[how]


@pytest.mark.parametrize("how", ["right", "replaced", "left out", "put in", "longer", "turned", "none"])
def test_what_is_found_is_what_greedy_search_finds(searches, how):
    expected, draw = searches(), random.Random(1)
    assert len({len(row) for row in expected.tokens}) > 1  # some end early and leave the caches
    for most in (LIMIT, 7, 1):
        expected = searches(most=most)
        given = [spoilt(words, how, draw) for words in searches.words(searches())]
        found = searches(given, most)
        assert found.tokens == expected.tokens
        assert torch.equal(found.first_logits, expected.first_logits)
        for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)


def test_the_positions_of_the_decoder_are_the_last_limit(searches):
    """Drafts that are longer than they are, of rows that come to no end."""
    searches.rules.always = torch.cat([searches.rules.always, torch.tensor([searches.rules.end])])
    most = searches.grammar.max_positions - len(searches.prefix)
    expected = searches(most=most)
    if not searches.rules.timestamps:  # whose rules let nothing but the end follow the last timestamp
        assert {len(row) for row in expected.tokens} == {most}
    found = searches([words * 3 for words in searches.words(expected)], most)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("how", ["right", "replaced", "none"])
def test_bfloat16_finds_the_same_but_for_ties(toy_teacher, utterances, monkeypatch, how):
    """Also where attention goes by products: whether there is a mask or not makes no difference."""
    monkeypatch.setattr(attention, "BFLOAT16", True)
    whisper = enliven(load_whisper(str(toy_teacher), dtype="bfloat16", device="cpu"), 5)
    waveforms, draw = stack([utterance.samples for utterance in utterances], whisper.window), random.Random(1)
    searches = Searches(whisper, waveforms, True, monkeypatch)
    expected = searches()
    found = searches([spoilt(words, how, draw) for words in searches.words(expected)])
    same = sum(ours == theirs for ours, theirs in zip(found.tokens, expected.tokens, strict=True))
    assert same >= len(utterances) - 1


def test_drafts_may_be_of_some_rows_alone(searches):
    expected = searches()
    given = [words if place % 2 else [] for place, words in enumerate(searches.words(expected))]
    assert searches(given).tokens == expected.tokens


def test_right_drafts_save_steps_and_wrong_ones_are_given_up(searches, monkeypatch):
    expected = searches()
    one_by_one = list(searches.shapes)
    searches(searches.words(expected))
    assert len(searches.shapes) < len(one_by_one) * 0.7
    assert max(length for _, length in searches.shapes[1:]) == 1 + drafts.AT_ONCE
    monkeypatch.setattr(drafts, "TRIAL", 3)
    wrong = [[(token + 1) % 90 for token in words] for words in searches.words(expected)]
    assert searches(wrong).tokens == expected.tokens
    lengths = [length for _, length in searches.shapes[1:]]
    assert lengths[0] == 1 + drafts.AT_ONCE and lengths[-5:] == [1] * 5


def row(draft, *tokens, place=0):
    return Row(list(draft), TIME, frozenset(range(20)), list(tokens), [], place)


def test_a_closed_segment_is_followed_by_its_timestamp_and_the_draft():
    assert row([1, 2, 3], TIME).proposed(2) == [1, 2]
    assert row([1, 2, 3], TIME, 1, TIME + 5, place=1).proposed(2) == [TIME + 5, 2]
    assert row([1, 2, 3], TIME, 1, TIME + 5, place=1).proposed(0) == []
    assert row([1, 2, 3], TIME, 1, TIME + 5, TIME + 5, place=1).proposed(4) == [2, 3]
    assert row([1, 2, 3], 1, 2, place=2).proposed(4) == [3]


def test_what_is_taken():
    spoken = row([1, 2, 3, 4, 5, 6])
    said = [(1, 0.1), (2, 0.2), (9, 0.3), (8, 0.4)]
    assert spoken.take([1, 2, 3], said) == 3  # 9 in place of 3; 8 followed the 3
    assert spoken.tokens == [1, 2, 9] and spoken.logprobs == [0.1, 0.2, 0.3]
    assert spoken.take([4, 5], [(4, 0), (5, 0), (6, 0)]) == 3  # all right, and one more
    assert spoken.tokens == [1, 2, 9, 4, 5, 6] and spoken.place == 6


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ([1, 2], 2),
        ([1, 4], 4),  # words were left out
        ([1, 9], 2),  # another word in place of 2
        ([1, 9, 31], 2),  # of two tokens, as 20 and above begin none
        ([1, 30, 2], 2),  # a comma
        ([1, 9, 2, 3], 3),  # a word that the draft lacks
        ([1, 9, 8, 2], 2),
        ([1, 9, 8, 7], 2),  # unlike the draft: it waits
        ([1, 9, 8, 7, 6], 6),
        ([1, 2, 3, 4, 5, 6, 7], 6),
        ([1, 2, 3, 4, 5, 5], 5),
    ],
)
def test_where_the_draft_goes_on(said, place):
    spoken = row([1, 2, 3, 4, 5, 6])
    for token in said:
        spoken.take([], [(token, 0.0)])
    assert spoken.place == place


def test_words_of_several_tokens_are_passed_over_whole():
    spoken = row([1, 2, 30, 31, 3], place=1)
    spoken.take([], [(9, 0.0)])
    assert spoken.place == 4


def test_a_search_with_the_texts_of_the_data(taught, utterances, monkeypatch):
    """The decoder makes drafts of texts, in small letters where all are capitals, and of none where there is none."""
    whisper = load_whisper(str(taught), device="cpu")
    waveforms = stack([utterance.samples for utterance in utterances[:6]], whisper.window)
    decoder, seen = Decoder(whisper, return_timestamps=True), []
    encode = whisper.grammar.encode_transcript
    whisper.grammar.encode_transcript = lambda text, language: seen.append((text, language)) or encode(text, language)
    expected = decoder(waveforms, "en", "transcribe")
    texts = [utterances[0].text.upper(), None, *(utterance.text for utterance in utterances[2:6])]
    found = decoder(waveforms, "en", "transcribe", texts)
    assert [row.ids for row in found] == [row.ids for row in expected]
    assert [row.avg_logprob for row in found] == pytest.approx([row.avg_logprob for row in expected], abs=1e-4)
    assert seen == [(text, "en") for text in [texts[0].lower(), *texts[2:]]]
    asked = []
    monkeypatch.setattr("distil_whisper.decoding.drafted_search", lambda *given: asked.append(given))
    assert [row.ids for row in decoder(waveforms, "en", "transcribe", [None] * 6)] == [row.ids for row in expected]
    assert not asked  # nothing to read


def test_labels_are_the_same(taught, labelled, utterances, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "distil_whisper.decoding.drafted_search", lambda *args: asked.append(args[-2]) or drafted_search(*args)
    )
    data = write_audio_dataset(tmp_path / "speech", utterances)
    flags = [*ENGLISH, *SPEAKERS, "--return_timestamps", "--decode_token_ids", False, "--draft_from_text"]
    found, expected = rows_of(label(taught, data, tmp_path / "out", *flags)), rows_of(labelled)
    assert asked and all(draft for of_batch in asked for draft in of_batch)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("whisper_transcript", "whisper_token_ids", "condition_on_prev", "wer", "truncated"):
            assert ours[name] == theirs[name]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--generation_num_beams", 2], "--draft_from_text is for greedy search with --backend torch"),
        (["--backend", "ctranslate2"], "--draft_from_text is for greedy search with --backend torch"),
        (["--task", "translate"], "--draft_from_text is for --task transcribe"),
    ],
)
def test_what_drafts_do_not_go_with(toy_teacher, speech_folder, tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        label(toy_teacher, speech_folder, tmp_path, *ENGLISH, "--draft_from_text", *flags)


def test_drafts_need_transcripts(toy_teacher, utterances, tmp_path):
    from datasets import load_dataset

    write_audio_dataset(tmp_path / "speech", utterances[:2], files=1)
    (file,) = (tmp_path / "speech" / "data").iterdir()
    dataset = load_dataset("parquet", data_files=str(file), split="train").rename_column("text", "said")
    dataset.to_parquet(str(file))
    with pytest.raises(UserError, match=r"--draft_from_text needs transcripts, and .* has none in a column text"):
        label(toy_teacher, tmp_path / "speech", tmp_path / "out", *ENGLISH, "--draft_from_text")
