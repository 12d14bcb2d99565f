"""Short-form and chunked transcription of a model whose every window has words of its own."""

import logging

import numpy as np
import pytest
from test_decoding import enliven

from distil_whisper.audio import stack
from distil_whisper.decoding import Decoder
from distil_whisper.errors import UserError
from distil_whisper.models import load_whisper
from distil_whisper.tokens import plain_text
from distil_whisper.transcribers import Chunked, ShortForm

TOLD = ("hi", "transcribe")
NAMES = ["a", "b", "c"]  # of recordings


@pytest.fixture(scope="module")
def whisper(toy_teacher):
    return enliven(load_whisper(str(toy_teacher), device="cpu"))


@pytest.fixture(scope="module")
def noises():
    """Recordings of 9, 3 and 6 s; the window is 4 s."""
    draw = np.random.default_rng(0)
    return [(draw.standard_normal(seconds * 16_000) * 0.1).astype(np.float32) for seconds in (9, 3, 6)]


@pytest.mark.parametrize("timestamps", [False, True])
def test_short_form_gives_text_marks_and_whether_the_limit_was_met(whisper, utterances, monkeypatch, timestamps):
    if not timestamps:  # which of its tokens a random model writes is not the same on every machine
        special = range(whisper.grammar.end + 1, whisper.model.config.vocab_size)
        monkeypatch.setattr(whisper.model.generation_config, "suppress_tokens", list(special))
    waveforms = [utterance.samples for utterance in utterances[:6]]
    decoder = Decoder(whisper, max_label_length=12, return_timestamps=timestamps)
    transcriber = ShortForm(decoder, whisper, batch_size=6)
    assert (transcriber.is_full(waveforms[:5]), transcriber.is_full(waveforms)) == (False, True)
    found = transcriber(waveforms, *TOLD, NAMES)
    expected = decoder(stack(waveforms, whisper.window), *TOLD)
    assert len({transcript.text for transcript in found}) > 1
    for transcript, decoded in zip(found, expected, strict=True):
        marked = whisper.grammar.decode(decoded.ids)
        assert transcript.text == plain_text(marked)
        assert transcript.details["truncated"] == decoded.truncated
        assert transcript.details.get("timestamped") == (marked if timestamps else None)
        assert "<|" not in transcript.text


def test_short_form_never_cuts_a_recording(whisper, noises):
    with pytest.raises(ValueError, match="do not fit a window of 4 s"):
        ShortForm(Decoder(whisper), whisper, batch_size=1)(noises[:1], *TOLD, NAMES)


@pytest.mark.parametrize("timestamps", [False, True])
def test_chunks_of_several_recordings_in_one_batch_are_those_of_each_alone(whisper, noises, timestamps):
    options = {"max_label_length": 12, "return_timestamps": timestamps}
    together = Chunked(whisper, 4, 4.0, **options)(noises, *TOLD, NAMES)
    alone = [Chunked(whisper, 1, 4.0, **options)([noise], *TOLD, NAMES)[0] for noise in noises]
    assert [transcript.text for transcript in together] == [transcript.text for transcript in alone]
    assert any(transcript.text for transcript in together)
    assert [transcript.details for transcript in together] == [transcript.details for transcript in alone]
    assert all(("segments" in transcript.details) == timestamps for transcript in together)


def test_chunks_that_end_within_a_word_are_nothing_to_warn_of():
    logger = logging.getLogger("transformers.models.whisper.tokenization_whisper")

    def shown(message: str) -> bool:
        return bool(logger.filter(logging.LogRecord(logger.name, logging.WARNING, "", 0, message, None, None)))

    assert shown("anything else")
    assert not shown("Whisper did not predict an ending timestamp, which can happen if audio is cut off")


def test_recordings_are_gathered_until_their_chunks_fill_a_batch(whisper, noises):
    chunked = Chunked(whisper, 5, 4.0, 0.5)  # a chunk every 3 s: 3, 1 and 2 of them
    assert [chunked.is_full(noises[:count]) for count in (1, 2, 3)] == [False, False, True]


@pytest.mark.parametrize(
    "chunk, stride, sentence",
    [
        (4.5, None, "--chunk_length_s is 4.5; it must be above 0 and at most 4"),
        (0.0, None, "--chunk_length_s is 0; it must be above 0"),
        (4.0, 2.0, "--stride_length_s is 2; it must be at least 0 and less than half of --chunk_length_s"),
        (4.0, -1.0, "--stride_length_s is -1; it must be at least 0"),
    ],
)
def test_chunks_that_cannot_be_are_refused(whisper, chunk, stride, sentence):
    with pytest.raises(UserError, match=sentence):
        Chunked(whisper, 1, chunk, stride)
