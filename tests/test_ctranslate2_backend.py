"""CTranslate2 says what our own search says, and its rows are those of the hand-off dataset."""

from types import SimpleNamespace

import pytest
from conftest import write_audio_dataset
from stages import ENGLISH, SPEAKERS, label, rows_of

from distil_whisper.audio import stack
from distil_whisper.ctranslate2_backend import CTranslate2Decoder
from distil_whisper.decoding import Decoder
from distil_whisper.errors import UserError
from distil_whisper.models import load_whisper


@pytest.fixture(scope="module")
def teacher(taught):
    return load_whisper(str(taught), device="cpu")


@pytest.mark.parametrize("options", [{"return_timestamps": True}, {}, {"max_label_length": 2}])
def test_tokens_and_figures_are_those_of_the_greedy_search(teacher, utterances, options):
    waveforms = stack([utterance.samples for utterance in utterances], teacher.window)
    expected = Decoder(teacher, **options)(waveforms, "en", "transcribe")
    found = CTranslate2Decoder(teacher, **options)(waveforms, "en", "transcribe")
    assert [(f.ids, f.truncated) for f in found] == [(e.ids, e.truncated) for e in expected]
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs.avg_logprob == pytest.approx(ours.avg_logprob, abs=2e-3)
        assert theirs.no_speech_prob == pytest.approx(ours.no_speech_prob, abs=1e-3)
    assert any(e.truncated for e in expected) == ("max_label_length" in options)


def test_figures_of_truncated_labels_with_beams(teacher, utterances):
    """At the limit it may prefer another beam than transformers; where both take one, its figure is the same."""
    waveforms = stack([utterance.samples for utterance in utterances], teacher.window)
    options = {"max_label_length": 2, "num_beams": 3}
    expected = Decoder(teacher, **options)(waveforms, "en", "transcribe")
    found = CTranslate2Decoder(teacher, **options)(waveforms, "en", "transcribe")
    same = [pair for pair in zip(expected, found, strict=True) if pair[0].ids == pair[1].ids and pair[0].truncated]
    assert len(same) > 4
    for ours, theirs in same:
        assert theirs.truncated and theirs.avg_logprob == pytest.approx(ours.avg_logprob, abs=2e-3)


@pytest.mark.parametrize("limit", [3, 30, None])
def test_a_label_may_be_as_long_as_the_limit_or_the_positions(teacher, utterances, monkeypatch, limit):
    """CTranslate2 itself stops at half of what it is given."""
    monkeypatch.setattr(teacher.model.generation_config, "suppress_tokens", [teacher.grammar.end])
    waveforms = stack([utterance.samples for utterance in utterances[:3]], teacher.window)
    expected = Decoder(teacher, max_label_length=limit)(waveforms, "en", "transcribe")
    found = CTranslate2Decoder(teacher, max_label_length=limit)(waveforms, "en", "transcribe")
    assert [(f.ids, f.truncated) for f in found] == [(e.ids, e.truncated) for e in expected]
    assert {len(f.ids) for f in found} == {limit or teacher.grammar.max_positions - 4}  # four tokens of prefix


def test_what_it_lacks_is_said_in_a_sentence(teacher, utterances):
    def fails(*_, **__):
        raise RuntimeError("Library libcublas.so.12 is not found or cannot be loaded")

    decoder = CTranslate2Decoder(teacher)
    decoder.model = SimpleNamespace(encode=fails)
    with pytest.raises(
        UserError, match=r"--backend ctranslate2 cannot be used here: Library libcublas.* --backend torch"
    ):
        decoder(stack([utterances[0].samples], teacher.window), "en", "transcribe")


def test_labels_are_the_same(taught, labelled, utterances, tmp_path):
    data = write_audio_dataset(tmp_path / "speech", utterances)
    flags = [*ENGLISH, *SPEAKERS, "--return_timestamps", "--decode_token_ids", False, "--backend", "ctranslate2"]
    found = rows_of(label(taught, data, tmp_path / "out", *flags))
    for row, expected in zip(found, rows_of(labelled), strict=True):
        for name in ("whisper_transcript", "whisper_token_ids", "condition_on_prev", "wer", "truncated"):
            assert row[name] == expected[name]
