import copy
import gc
import json
import math
import shutil
import weakref
from typing import ClassVar

import pytest
import torch
from transformers import BertConfig, WhisperForConditionalGeneration
from transformers.generation.logits_process import (
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)

from distil_whisper import steps
from distil_whisper.attention import attend
from distil_whisper.audio import stack
from distil_whisper.decoding import Decoder
from distil_whisper.drafts import AT_ONCE
from distil_whisper.errors import UserError
from distil_whisper.models import encoder_states, load_whisper
from distil_whisper.rules import Said

LIMIT = 20


def enliven(whisper, seed=3):
    """Random weights so large that every audio has words of its own; some end early and some run into the limit."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in whisper.model.named_parameters():
            if parameter.ndim > 1 and "embed_positions" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
        whisper.model.get_input_embeddings().weight[whisper.grammar.end] *= 3
    whisper.model.generation_config.suppress_tokens = [5, 6]
    whisper.model.generation_config.begin_suppress_tokens = [7, whisper.grammar.end]
    return whisper


@pytest.fixture(scope="module")
def multilingual(toy_teacher):
    return enliven(load_whisper(str(toy_teacher), device="cpu"))


@pytest.fixture(scope="module")
def english_only(toy_english_only):
    return enliven(load_whisper(str(toy_english_only), device="cpu"), seed=5)


@pytest.fixture(scope="module")
def waveforms(multilingual, utterances):
    return stack([utterance.samples for utterance in utterances[:8]], multilingual.window)


@pytest.fixture(params=["multilingual", "english_only"])
def told(request):
    """A model, and what it is told."""
    words = {"language": "hi", "task": "transcribe"} if request.param == "multilingual" else {}
    return request.getfixturevalue(request.param), words


def features_of(whisper, waveforms):
    extracted = whisper.feature_extractor(list(waveforms.numpy()), sampling_rate=16_000, return_tensors="pt")
    return extracted.input_features


def decode(whisper, words, waveforms, **options):
    decoder = Decoder(whisper, **{"max_label_length": LIMIT, **options})
    return decoder(waveforms, words.get("language"), words.get("task"))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("timestamps", [False, True])
def test_tokens_are_those_of_plain_generate(told, waveforms, timestamps, num_beams):
    whisper, words = told
    decoded = decode(whisper, words, waveforms, return_timestamps=timestamps, num_beams=num_beams)
    plain = whisper.model.generate(
        features_of(whisper, waveforms),
        return_timestamps=timestamps,
        num_beams=num_beams,
        max_length=LIMIT,
        force_unique_generate_call=True,
        **words,
    )
    prefix = whisper.grammar.prefix(words.get("language"), words.get("task"), timestamps)
    end = whisper.grammar.end
    assert len({tuple(row.ids) for row in decoded}) > 4
    assert {row.truncated for row in decoded} == {True, False}
    for row, tokens in zip(decoded, plain.tolist(), strict=True):
        tokens = tokens[len(prefix) :] if tokens[: len(prefix)] == prefix else tokens
        assert row.ids == (tokens[: tokens.index(end)] if end in tokens else tokens)
        assert row.truncated == (end not in tokens)
        assert len(row.ids) == LIMIT if row.truncated else len(row.ids) < LIMIT
        assert any(whisper.grammar.is_timestamp(token) for token in row.ids) or not timestamps


class RunAgain:
    """What stands in for a CUDA graph on a CPU: the same memory for arguments and results, and the function's work.

    As a graph it does not keep the steps alive that it is a function of.
    """

    made: ClassVar[list[tuple[int, int]]] = []  # shapes of the tokens

    def __init__(self, beside, function, *arguments):
        RunAgain.made.append(tuple(arguments[0].shape))
        self.step, self.told = weakref.WeakMethod(function.func), function.args
        self.arguments = [argument.clone() for argument in arguments]
        self.results = function(*self.arguments)

    def __call__(self, *arguments):
        for place, argument in zip(self.arguments, arguments, strict=True):
            place.copy_(argument)
        for place, result in zip(self.results, self.step()(*self.told, *self.arguments), strict=True):
            place.copy_(result)
        return self.results


@pytest.fixture
def graphs(monkeypatch):
    """Turns a decoder into one with graphs; gives the shapes of the tokens of each graph that was made."""
    monkeypatch.setattr(steps, "Replayed", RunAgain)
    monkeypatch.setattr(steps, "SPAN", 8)  # so that the steps go through several
    monkeypatch.setattr(RunAgain, "made", [])

    def of(decoder):
        decoder.cuda_graphs = True
        return RunAgain.made

    return of


@pytest.mark.parametrize("drafts", ["none", "right", "wrong, for every other batch"])
@pytest.mark.parametrize("timestamps", [False, True])
def test_steps_of_few_shapes_say_the_same(told, waveforms, graphs, timestamps, drafts):
    """As CUDA graphs have them: of quarters of the rows, which are kept for the next batches."""
    whisper, words = told
    language, task = words.get("language"), words.get("task")
    batches = waveforms, 0.5 * waveforms.flip(0)
    expected = [decode(whisper, words, given, return_timestamps=timestamps) for given in batches]
    assert expected[0][::-1] != expected[1]
    decoder = Decoder(whisper, max_label_length=LIMIT, return_timestamps=timestamps)
    words_end = decoder.rules.begin if timestamps else float("inf")  # no draft has a timestamp
    texts = [[" ".join(str(token) for token in row.ids if token < words_end) for row in of] for of in expected]
    decoder._draft = lambda text, _language: [int(token) for token in text.split()]
    made = graphs(decoder)
    for number, rows in (
        (0, 1),
        (1, 3),
        (0, 2),
        (0, 7),
        (0, 6),
        (0, 8),
        (1, 8),
        (0, 3),
        (1, 5),
        (0, 8),
        (1, 1),
        (1, 7),
    ):
        given = {"none": None, "right": texts[number][:rows]}.get(drafts, [["9 8 7 6"] * rows, None][number])
        found = decoder(batches[number][:rows], language, task, given)
        wanted = expected[number][:rows]
        assert [row.ids for row in found] == [row.ids for row in wanted]
        logprobs = [row.avg_logprob for row in wanted]
        assert [row.avg_logprob for row in found] == pytest.approx(logprobs, abs=1e-4)
        silent = [row.no_speech_prob for row in wanted]
        assert [row.no_speech_prob for row in found] == pytest.approx(silent, rel=1e-3)
    assert {rows for rows, _ in made} <= {1, 2, 3, 4, 6, 7, 8} and len({rows for rows, _ in made}) > 2
    assert {length for _, length in made} <= ({1} if drafts == "none" else {1, 1 + AT_ONCE})
    before = len(made)
    decoder(batches[1], language, task, texts[1] if drafts == "right" else None)
    assert len(made) == before  # as it was decoded before


def test_a_larger_batch_takes_the_place_of_the_steps_before(multilingual, waveforms, graphs):
    """Their memory is free before its own is taken, which a garbage collector may not do in time."""
    decoder, before, begin = Decoder(multilingual, max_label_length=3), [], steps.DecoderSteps.__init__
    graphs(decoder)

    def watched(self, *given):
        assert all(one() is None for one in before)
        before.append(weakref.ref(self))
        begin(self, *given)

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps.DecoderSteps, "__init__", watched)
            for rows in (1, 3, 8, 2):
                decoder(waveforms[:rows], "hi", "transcribe")
    finally:
        gc.enable()
    assert len(before) == 3


def test_rows_that_have_ended_leave(multilingual, waveforms, monkeypatch):
    """Once they are a quarter."""
    kept, keep = [], steps.DecoderSteps.keep
    monkeypatch.setattr(
        steps.DecoderSteps, "keep", lambda decode, rows: kept.append((decode.rows, len(rows))) or keep(decode, rows)
    )
    words = {"language": "hi", "task": "transcribe"}
    lengths = [len(row.ids) for row in decode(multilingual, words, waveforms)]
    assert min(lengths) < max(lengths) and kept
    assert all(after <= 0.75 * before for before, after in kept)
    running = [sum(length >= step for length in lengths) for step in range(1, LIMIT)]
    assert {after for _, after in kept} <= set(running)


@pytest.mark.parametrize("timestamps", [False, True])
def test_a_window_that_overflows_harms_no_other(multilingual, waveforms, graphs, timestamps):
    """In its batch or in later ones, which are given the same memory."""
    decoder = Decoder(multilingual, max_label_length=LIMIT, return_timestamps=timestamps)
    expected = [row.ids for row in decoder(waveforms, "hi", "transcribe")]
    graphs(decoder)
    spoilt = waveforms.clone()
    spoilt[2] *= 1e25
    for given in (waveforms, spoilt, waveforms, waveforms):
        found = decoder(given, "hi", "transcribe")
        harmed = [place for place, row in enumerate(found) if row.ids != expected[place]]
        assert harmed == [2] * (given is spoilt)
        assert all(math.isfinite(row.avg_logprob) for row in found) or given is spoilt


def test_there_are_no_graphs_under_autocast(multilingual, waveforms, graphs):
    """Its copies of weights are thrown away, and a graph would read where they were."""
    decoder = Decoder(multilingual, max_label_length=3)
    made = graphs(decoder)
    with torch.autocast("cpu", torch.bfloat16):
        decoder(waveforms[:2], "hi", "transcribe")
    assert not made and decoder._steps is None


def test_cudnn_makes_no_plan_for_each_length(multilingual, waveforms, graphs, monkeypatch):
    """It attends where there are graphs, whose lengths are few, and not where keys grow with each step."""
    allowed = []
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    monkeypatch.setattr(steps, "attend", lambda *given: allowed.append(enabled()) or attend(*given))
    decoder = Decoder(multilingual, max_label_length=3)
    for expected in (False, enabled()):
        decoder(waveforms[:2], "hi", "transcribe")
        assert set(allowed) == {expected}
        allowed.clear()
        graphs(decoder)


@torch.no_grad()
def test_rows_that_have_ended_say_the_end_again(multilingual, waveforms, graphs):
    """And those that are there for their number alone from the first: they must not seem to run on."""
    decoder = Decoder(multilingual, max_label_length=LIMIT)
    graphs(decoder)
    rules = decoder.rules
    rules.always = rules.at_first = torch.tensor([rules.end])  # the model itself never says it
    states = encoder_states(multilingual.model.get_encoder(), features_of(multilingual, waveforms))
    decode = decoder._steps_of(states, 10)
    decode.begin(states[:3])
    chosen, _, _ = decode.first([1, 2, 3])
    assert (chosen == rules.end).tolist() == [False, False, False, True]
    said = Said(torch.tensor([[4, 5], [4, rules.end], [rules.end, 6], [4, rules.end]]), torch.full((4,), rules.end))
    found, _ = decode.next(said)
    assert (found == rules.end).tolist() == [False, True, False, True]


def recomputed_logprob(whisper, prefix, features, row, timestamps):
    """The mean log-probability of a row's tokens from one pass over all of them, and the rules of decoding.

    As openai/whisper 20250625 reckons it (decoding.py, `lp / (len(t) + 1)`): of a truncated label, too.
    """
    config = copy.deepcopy(whisper.model.generation_config)
    rules = [
        SuppressTokensLogitsProcessor(config.suppress_tokens),
        SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin_index=len(prefix)),
    ]
    if timestamps:
        rules.append(WhisperTimeStampLogitsProcessor(config, begin_index=len(prefix)))
    tokens = torch.tensor([prefix + row.ids + ([] if row.truncated else [whisper.grammar.end])])
    logits = whisper.model(features, decoder_input_ids=tokens[:, :-1]).logits
    total = 0.0
    for position in range(len(prefix), tokens.shape[1]):
        scores = logits[:, position - 1].clone()
        for rule in rules:
            scores = rule(tokens[:, :position], scores)
        total += scores.log_softmax(-1)[0, tokens[0, position]].item()
    return total / (len(row.ids) + 1)


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("timestamps", [False, True])
def test_confidence_is_that_of_a_teacher_forced_pass(told, waveforms, timestamps, num_beams):
    whisper, words = told
    decoded = decode(whisper, words, waveforms, return_timestamps=timestamps, num_beams=num_beams)
    assert {row.truncated for row in decoded} == {True, False}
    features = features_of(whisper, waveforms)
    prefix = whisper.grammar.prefix(words.get("language"), words.get("task"), timestamps)
    start = torch.tensor([[whisper.grammar.start]]).expand(len(waveforms), 1)
    first = whisper.model(features, decoder_input_ids=start).logits[:, 0].softmax(-1)
    for index, row in enumerate(decoded):
        expected = recomputed_logprob(whisper, prefix, features[index : index + 1], row, timestamps)
        assert row.avg_logprob == pytest.approx(expected, abs=1e-3)
        assert row.no_speech_prob == pytest.approx(first[index, whisper.grammar.no_speech].item(), rel=1e-3)
    assert len({round(row.avg_logprob, 3) for row in decoded}) > 4


def test_the_limit_counts_tokens_after_the_prefix_and_ends_at_the_positions(multilingual, waveforms):
    words = {"language": "hi", "task": "transcribe"}
    short = decode(multilingual, words, waveforms, max_label_length=2)
    assert max(len(row.ids) for row in short) == 2
    positions = multilingual.model.config.max_target_positions
    for limit in (None, positions, 10 * positions):
        longest = decode(multilingual, words, waveforms, max_label_length=limit)
        assert max(len(row.ids) for row in longest) == positions - 4  # four tokens of prefix
        assert {row.truncated for row in longest} == {True, False}


@torch.no_grad()
def test_the_encoder_hands_on_contiguous_states(toy_teacher, waveforms):
    """And computes what transformers' own does."""
    whisper = load_whisper(str(toy_teacher), device="cpu")
    plain = WhisperForConditionalGeneration.from_pretrained(toy_teacher).get_encoder().eval()
    seen = []
    for layer in whisper.model.get_encoder().layers:
        layer.self_attn_layer_norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    features = features_of(whisper, waveforms)
    found = whisper.model.get_encoder()(features).last_hidden_state
    assert seen == [True] * whisper.model.config.encoder_layers
    assert torch.equal(found, plain(features).last_hidden_state)


def test_half_precision_gives_finite_confidence(toy_teacher, waveforms):
    whisper = load_whisper(str(toy_teacher), dtype="bfloat16", device="cpu")
    assert whisper.model.dtype == torch.bfloat16
    row = decode(whisper, {"language": "hi", "task": "transcribe"}, waveforms[:1])[0]
    assert -20 < row.avg_logprob < 0
    assert 0 < row.no_speech_prob < 1


def test_a_multilingual_model_is_not_decoded_without_a_language(multilingual, waveforms):
    with pytest.raises(UserError, match="needs a language and a task"):
        decode(multilingual, {}, waveforms[:1])


@pytest.mark.parametrize("option", [{"num_beams": 0}, {"max_label_length": 0}])
def test_senseless_numbers_are_refused(multilingual, option):
    with pytest.raises(UserError, match="it must be 1 or more"):
        Decoder(multilingual, **option)


def test_decoding_leaves_no_hook_on_the_model(multilingual, waveforms):
    decode(multilingual, {"language": "hi", "task": "transcribe"}, waveforms[:1])
    assert not multilingual.model._forward_hooks


def edited(folder, tmp_path, name, edit):
    """A copy of a checkpoint with one of its JSON files changed."""
    copied = shutil.copytree(folder, tmp_path / "edited")
    values = json.loads((copied / name).read_text())
    edit(values)
    (copied / name).write_text(json.dumps(values))
    return str(copied)


def forget(values):
    for name in ("is_multilingual", "lang_to_id", "task_to_id", "no_timestamps_token_id", "prev_sot_token_id"):
        values.pop(name, None)


@pytest.mark.parametrize("kind", ["toy_teacher", "toy_english_only"])
def test_an_old_generation_config_is_completed_by_name(request, tmp_path, kind):
    folder = request.getfixturevalue(kind)
    whisper = load_whisper(edited(folder, tmp_path, "generation_config.json", forget), device="cpu")
    before = load_whisper(str(folder), device="cpu").model.generation_config
    after = whisper.model.generation_config
    assert whisper.grammar.multilingual == (kind == "toy_teacher")
    for name in ("is_multilingual", "no_timestamps_token_id", "prev_sot_token_id"):
        assert getattr(after, name) == getattr(before, name)
    if whisper.grammar.multilingual:
        assert after.lang_to_id.items() >= before.lang_to_id.items()
        assert after.task_to_id == before.task_to_id


def test_a_prefix_forced_by_position_does_not_count(english_only, toy_english_only, tmp_path, waveforms):
    def force(values):
        values["forced_decoder_ids"] = [[1, english_only.grammar.no_timestamps]]

    folder = edited(toy_english_only, tmp_path, "generation_config.json", force)
    whisper = load_whisper(folder, device="cpu")
    assert whisper.model.generation_config.forced_decoder_ids is None
    assert len(decode(whisper, {}, waveforms[:1])) == 1


def test_missing_and_wrong_checkpoints_are_refused_in_one_sentence(toy_teacher, tmp_path):
    with pytest.raises(UserError, match=r"--teacher_model_name_or_path .*nowhere: there is no file or folder"):
        load_whisper(str(tmp_path / "nowhere"), argument="--teacher_model_name_or_path")
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="is a bert model; give a Whisper checkpoint"):
        load_whisper(str(tmp_path / "bert"))

    def add_layer(values):
        values["decoder_layers"] += 1

    with pytest.raises(UserError, match=r"lacks 2\d weights, such as model.decoder.layers.4"):
        load_whisper(edited(toy_teacher, tmp_path, "config.json", add_layer), device="cpu")


@pytest.mark.parametrize("kind", ["toy_teacher", "toy_english_only"])
def test_a_checkpoint_without_a_tokenizer_is_refused(request, tmp_path, kind):
    """transformers makes an empty one of nothing."""
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copied")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"copied has no tokenizer; put that of its teacher beside it \(tokenizer.json"
    ):
        load_whisper(str(folder), device="cpu")
