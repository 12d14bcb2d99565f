"""Sequential transcription of a model whose every window has words of its own."""

from collections import Counter

import numpy as np
import pytest
import torch
from test_decoding import enliven
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutput

from distil_whisper import sequential as sequential_module
from distil_whisper.decoding import Decoded, Decoder
from distil_whisper.mixing import batched
from distil_whisper.models import encoder_states, load_whisper
from distil_whisper.sequential import Drawn, Fallback, Recording, Sequential, WindowSearch
from distil_whisper.tokens import plain_text

TOLD = ("hi", "transcribe")
NAMES = ["a", "b", "c"]  # of recordings
LIKELY, UNHEARD = -0.93, 5e-5  # thresholds on either side of which this model's windows are


@pytest.fixture(scope="module")
def whisper(toy_teacher):
    return enliven(load_whisper(str(toy_teacher), device="cpu"))


@pytest.fixture(scope="module")
def noises():
    """Recordings of 9, 3 and 6 s; the window is 4 s."""
    draw = np.random.default_rng(0)
    return [(draw.standard_normal(seconds * 16_000) * 0.1).astype(np.float32) for seconds in (9, 3, 6)]


def generated(whisper, noises, **options) -> list[str]:
    """What transformers' own long-form generation says of recordings in one batch."""
    inputs = whisper.feature_extractor(
        noises,
        sampling_rate=16_000,
        truncation=False,
        padding="longest",
        return_attention_mask=True,
        return_tensors="pt",
    )
    told = {"language": TOLD[0], "task": TOLD[1], "return_timestamps": True, "max_new_tokens": 12, "num_beams": 1}
    ids = whisper.model.generate(**inputs, **told, **options)
    return [plain_text(whisper.tokenizer.decode(row, skip_special_tokens=True)) for row in ids]


@pytest.mark.parametrize("condition", [False, True])
def test_sequential_is_generate_for_a_batch_of_recordings(whisper, noises, condition):
    sequential = Sequential(whisper, 3, max_label_length=12, condition_on_prev_tokens=condition)
    found = [transcript.text for transcript in sequential(noises, *TOLD, NAMES)]
    assert found == generated(whisper, noises, condition_on_prev_tokens=condition)
    assert any(found)


def test_sequential_segments_hold_the_text_in_order_of_time(whisper, noises):
    for transcript in Sequential(whisper, 3, max_label_length=12, return_timestamps=True)(noises, *TOLD, NAMES):
        segments = transcript.details["segments"]
        assert segments and all(segment["start"] <= segment["end"] for segment in segments)
        assert "".join(segment["text"] for segment in segments).replace(" ", "") == transcript.text.replace(" ", "")


def test_fallback_repeats_only_what_misses_its_thresholds_and_draws_the_same_again(whisper, noises):
    def texts(fallback):
        sequential = Sequential(whisper, 3, max_label_length=6, fallback=fallback)
        torch.manual_seed(torch.seed())  # whatever was drawn before
        return [transcript.text for transcript in sequential(noises, *TOLD, NAMES)]

    never = Fallback(compression_ratio=1e6, logprob=-1e6, no_speech=1.0)
    always = Fallback(compression_ratio=1e6, logprob=0.0, no_speech=1.0)
    assert texts(never) == texts(None)
    assert texts(always) == texts(always)
    assert texts(always) != texts(None)
    silent = Fallback(compression_ratio=1e6, logprob=0.0, no_speech=0.0)  # unlikely text, and always "silence"
    assert texts(silent) == ["", "", ""]


@pytest.mark.parametrize("condition", [False, True])
def test_fallback_hears_the_same_in_batches_of_any_size(whisper, condition):
    """Some windows are repeated at some temperatures, and some are silence."""
    draw = np.random.default_rng(1)
    noises = [(draw.standard_normal(int(s * 16_000)) * 0.1).astype(np.float32) for s in (9, 1.5, 6, 3, 5, 2, 7, 4)]
    names = [f"recording {number}" for number in range(len(noises))]
    temperatures = Counter()

    def texts(size, order):
        fallback = Fallback(compression_ratio=1e6, logprob=LIKELY, no_speech=UNHEARD)
        sequential = Sequential(
            whisper, size, max_label_length=6, condition_on_prev_tokens=condition, fallback=fallback
        )
        found = {}
        for batch in batched(iter(order), size):
            heard = sequential([noises[place] for place in batch], *TOLD, [names[place] for place in batch])
            found |= {place: transcript.text for place, transcript in zip(batch, heard, strict=True)}
        return [found[place] for place in range(len(noises))]

    search = WindowSearch.__call__

    def watched(self, encoded, prompts, language, task, temperature, draws):
        temperatures[temperature] += len(encoded)
        return search(self, encoded, prompts, language, task, temperature, draws)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowSearch, "__call__", watched)
        alone = texts(1, range(8))
    assert temperatures[0.0] > 8 and temperatures[0.0] > temperatures[0.2] > temperatures[1.0] > 0
    assert sum(map(bool, alone)) > 3
    assert texts(8, [5, 2, 7, 0, 1, 3, 6, 4]) == alone


def test_what_is_drawn_follows_the_temperature_and_never_breaks_the_rules():
    draw = np.random.default_rng(0)
    logits = torch.tensor([[2.0, 1.0, -torch.inf, 0.0, -1.0, -torch.inf]])
    draws = torch.from_numpy(draw.random((20_000, 1), dtype=np.float32)).double()
    for temperature in (0.2, 1.0):
        drawn = Drawn(temperature, draws)
        chosen = drawn(None, logits.expand(20_000, -1)).argmax(-1)
        shares = torch.bincount(chosen, minlength=6) / 20_000
        assert torch.allclose(shares, (logits[0] / temperature).softmax(-1), atol=0.01)
        assert torch.allclose(drawn.of_tokens(chosen[:, None])[:, 0], logits[0].log_softmax(-1)[chosen])
    edges = Drawn(1.0, torch.tensor([[0.0], [1 - 2.0**-24]]).double())
    assert edges(None, logits.expand(2, -1)).argmax(-1).tolist() == [0, 4]


def test_the_score_of_a_drawn_text_is_what_the_model_gives_it_without_a_temperature(whisper, noises):
    """As openai/whisper scores it: the mean over its tokens and the end, by the logits that the rules leave."""
    features = Sequential(whisper, 1)._features([noises[1]])[..., : whisper.window.frames]
    encoded = encoder_states(
        whisper.model.get_encoder(), pad(features, (0, whisper.window.frames - features.shape[2]))
    )
    prefix, most = whisper.grammar.prefix(*TOLD, True), 12
    rules = Decoder(whisper, return_timestamps=True).rules
    for prompt in ([], [whisper.grammar.previous, 11, 12, 13]):
        for attempt, temperature in enumerate((0.0, 0.8)):
            draws = torch.from_numpy(Fallback().draws("a", 0, attempt, most)).double()[None]
            (found,) = WindowSearch(whisper, 1, most)(encoded, [prompt], *TOLD, temperature, draws)
            ids = torch.tensor([[*prompt, *prefix, *found.ids]])
            with torch.no_grad():
                output = whisper.model(decoder_input_ids=ids, encoder_outputs=BaseModelOutput(encoded)).logits[0]
            said, total = rules.nothing_said(1), 0.0
            logits = output[len(prompt) + len(prefix) - 1 :]
            for place, token in enumerate([*found.ids, whisper.grammar.end][:most]):
                scores = logits[None, place].clone()
                chosen, logprob = rules.choose(scores, said, first=place == 0)
                total += float(logprob + output.new_tensor(0) + logits[place, token] - logits[place, chosen[0]])
                said = said.and_then(torch.tensor([token]), rules.begin)
            assert found.avg_logprob == pytest.approx(total / (len(found.ids) + 1), abs=1e-4)
            no_speech = output[len(prompt)].softmax(-1)[whisper.grammar.no_speech]
            assert found.no_speech_prob == pytest.approx(float(no_speech), abs=1e-6)


def heard(logprob, no_speech=0.0, ids=(300, 301)):
    return Decoded(list(ids), False, logprob, no_speech)


@pytest.mark.parametrize(
    "tries, taken",
    [
        ([heard(-0.5)], 0.0),
        ([heard(-1.5), heard(-0.9)], 0.2),
        ([heard(-1.5)] * 6, 1.0),  # the last one stands
        ([heard(-0.5, ids=[5] * 60), heard(-0.5)], 0.2),  # repetitive
        ([heard(-1.5, no_speech=0.7)], None),  # silence
        ([heard(-0.5, no_speech=0.7)], 0.0),  # likely text is no silence
        ([heard(-1.5), heard(-1.2, no_speech=0.7)], None),
    ],
)
def test_a_window_is_repeated_as_openai_whisper_repeats_it(whisper, noises, monkeypatch, tries, taken):
    given = iter(tries)
    monkeypatch.setattr(WindowSearch, "__call__", lambda self, *_: [next(given)])
    sequential = Sequential(whisper, 1, condition_on_prev_tokens=True, fallback=Fallback())
    (running,) = recordings = [Recording(0, "a", 300)]
    ((found, temperature),) = sequential._heard(torch.zeros(1, 1), recordings, *TOLD)
    sequential._take(running, found, temperature)
    assert next(given, None) is None and running.frame == 300
    assert len(running.segments) == (taken is not None)
    if taken is not None:
        assert temperature == taken and bool(running.prompt()) == (taken < 0.5)


def test_silence_is_what_transformers_skips(whisper, noises, monkeypatch):
    """One recording at a time and at one temperature, where its thresholds see what ours see."""
    monkeypatch.setattr(sequential_module, "TEMPERATURES", (0.0,))
    fallback = Fallback(compression_ratio=1e6, logprob=LIKELY, no_speech=UNHEARD)
    sequential = Sequential(whisper, 1, max_label_length=12, fallback=fallback)
    options = {"logprob_threshold": LIKELY, "no_speech_threshold": UNHEARD, "compression_ratio_threshold": 1e6}
    for noise in noises[::2]:
        (found,) = sequential([noise], *TOLD, ["a"])
        assert [found.text] == generated(whisper, [noise], temperature=(0.0,), **options)


def test_the_prompt_leaves_room_for_a_window(whisper):
    positions = whisper.grammar.max_positions
    for prompted, left in ((False, positions - 4), (True, positions - 4 - positions // 2)):
        for limit, most in ((None, left), (10, 10), (10 * positions, left)):
            sequential = Sequential(whisper, 1, max_label_length=limit, condition_on_prev_tokens=prompted)
            assert sequential.search.most == most
