"""The training step: what reaches the models, what is computed once, and the loss against the whole models."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from distil_whisper.audio import LogMel
from distil_whisper.distiller import Distiller
from distil_whisper.examples import Collator, Example, LabelColumns, Labeller, LabelSettings, positions_of
from distil_whisper.losses import CE_WEIGHT, LossWeights
from distil_whisper.models import load_whisper
from distil_whisper.student import make_student

WEIGHTS = LossWeights(kl=0.7, temperature=2.0)
HINDI = LabelColumns("text", True, "hi", "transcribe")
TIMED = "<|0.00|> one two<|1.20|>"


@pytest.fixture(scope="module")
def loaded(toy_teacher):
    return load_whisper(str(toy_teacher), device="cpu")


@pytest.fixture
def teacher(loaded):
    """A teacher of one's own, whose outputs are not all alike."""
    torch.manual_seed(0)
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def batch(loaded, utterances):
    """Four samples as training makes them: with a prompt, without, truncated, and with a prompt beyond its limit."""
    grammar = loaded.grammar
    labeller = Labeller(grammar, LabelSettings(1.0, 1.0, 0))
    prompts = [grammar.encode_pseudo_label("<|0.00|> six seven<|0.80|>").ids, None, None, list(range(100))]
    rows = [
        {"whisper_transcript": transcript, "condition_on_prev": prompt, "truncated": index == 2}
        for index, (transcript, prompt) in enumerate(zip([TIMED, " four", TIMED, " nine"], prompts, strict=True))
    ]
    examples = [
        Example(f"{index}", utterances[index].samples, labeller.sequence(row, HINDI, f"{index}", 0))
        for index, row in enumerate(rows)
    ]
    return Collator(loaded.window, padding=grammar.end)(examples)


@pytest.fixture
def make(loaded, teacher):
    """A Distiller of this teacher and a student of two of its decoder layers."""

    def made(freeze_encoder=True, with_teacher=True, weights=WEIGHTS, model=teacher, **options):
        student, _ = make_student(teacher, decoder_layers=2, **options)
        log_mel = LogMel(loaded.feature_extractor)
        return Distiller(student, log_mel, weights, model if with_teacher else None, freeze_encoder)

    return made


class Spy:
    """What a module was called with, and how often."""

    def __init__(self, module):
        self.calls = []
        module.register_forward_pre_hook(lambda _, args, given: self.calls.append((args, given)), with_kwargs=True)

    @property
    def windows(self) -> int:
        """How many an encoder was given, in however many calls."""
        return sum(len(args[0]) for args, _ in self.calls)


def heard(distiller):
    """Spies on (student encoder, teacher encoder) and (student decoder, teacher decoder)."""
    models = distiller.student.model, distiller.teacher.model
    return [Spy(model.encoder) for model in models], [Spy(model.decoder) for model in models]


@pytest.mark.parametrize("freeze_encoder, changed", [(True, False), (True, True), (False, False)])
def test_both_decoders_see_the_same_tokens_prompts_included(make, batch, loaded, freeze_encoder, changed):
    distiller = make(freeze_encoder)
    if changed:
        distiller.shares_encoder = False
    _, (student, teacher) = heard(distiller)
    distiller(**batch.inputs("cpu"))
    (ours,), (theirs,) = ([given["input_ids"] for _, given in spy.calls] for spy in (student, teacher))
    assert torch.equal(ours, batch.decoder_input_ids) and torch.equal(theirs, batch.decoder_input_ids)
    previous = loaded.grammar.previous
    assert [row[0] == previous for row in theirs.tolist()] == [True, False, False, True]
    states = [spy.calls[0][1]["encoder_hidden_states"] for spy in (student, teacher)]
    assert (states[0] is states[1]) == distiller.shares_encoder
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("freeze_encoder, times", [(True, (0, 1)), (False, (1, 1))])
def test_a_shared_encoder_runs_once(make, batch, freeze_encoder, times):
    distiller = make(freeze_encoder)
    encoders, decoders = heard(distiller)
    for _ in range(2):
        distiller(**batch.inputs("cpu"))
    assert [spy.windows for spy in encoders] == [2 * len(batch.labels) * each for each in times]
    assert [len(spy.calls) for spy in decoders] == [2, 2]


def test_without_a_teacher_the_students_encoder_runs(make, batch):
    distiller = make(with_teacher=False)
    spy = Spy(distiller.student.model.encoder)
    losses = distiller(**batch.inputs("cpu"))
    assert spy.windows == len(batch.labels) and losses["kl"] == 0
    assert losses["loss"].item() == pytest.approx(CE_WEIGHT * losses["ce"].item())


def other_weights(student, teacher):
    with torch.no_grad():
        student.model.encoder.layers[1].fc1.bias[3] += 1e-3


def other_width(student, teacher):
    student.model.encoder.layers[0].fc1 = torch.nn.Linear(32, 64)


def half_precision(student, teacher):
    teacher.bfloat16()


@pytest.mark.parametrize(
    "freeze_encoder, options, change, shared",
    [
        (True, {}, None, True),
        (False, {}, None, False),
        (True, {"encoder_layers_numbers": [0]}, None, False),  # the widths match, and all weights that are there
        (True, {"encoder_layers_numbers": [1, 0]}, None, False),
        (True, {}, other_weights, False),
        (True, {}, other_width, False),
        (True, {}, half_precision, True),  # of the same weights
    ],
)
def test_the_encoder_is_shared_only_if_it_is_frozen_and_equal(
    loaded, teacher, freeze_encoder, options, change, shared
):
    student, _ = make_student(teacher, decoder_layers=2, **options)
    if change:
        change(student, teacher)
    distiller = Distiller(student, LogMel(loaded.feature_extractor), WEIGHTS, teacher, freeze_encoder)
    assert distiller.shares_encoder == shared


def valid_positions(batch, grammar):
    """Where the loss looks: from <|startoftranscript|> on, up to the last token that has a successor."""
    valid = torch.zeros(batch.labels.shape, dtype=torch.bool)
    for row, tokens in enumerate(batch.decoder_input_ids.tolist()):
        length = len(tokens)
        while length > 1 and tokens[length - 1] == grammar.end:  # padding
            length -= 1
        valid[row, tokens.index(grammar.start) : length] = True
    return valid


def plain_losses(distiller, batch, log_mel, grammar):
    """The formula on the logits of the whole models, at the positions of the transcripts."""
    features, valid = log_mel(batch.waveforms), valid_positions(batch, grammar)
    logits = [
        model(features, decoder_input_ids=batch.decoder_input_ids).logits[valid]
        for model in (distiller.student, distiller.teacher)
    ]
    ce = functional.cross_entropy(logits[0], batch.labels[valid], reduction="sum")
    logs = [functional.log_softmax(each / WEIGHTS.temperature, -1) for each in logits]
    kl = functional.kl_div(*logs, log_target=True, reduction="sum")
    return CE_WEIGHT * ce + WEIGHTS.kl * WEIGHTS.temperature**2 * kl, ce, kl, valid.sum()


@pytest.mark.parametrize("freeze_encoder, shared", [(True, True), (True, False), (False, False)])
def test_the_losses_and_gradients_are_those_of_the_formula_on_the_transcripts_alone(
    make, batch, loaded, freeze_encoder, shared
):
    distiller = make(freeze_encoder)
    distiller.shares_encoder = shared
    found = distiller(**batch.inputs("cpu"))
    found["loss"].backward()
    student = distiller.student
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    loss, ce, kl, tokens = plain_losses(distiller, batch, distiller.log_mel, loaded.grammar)
    for name, expected in (("loss", loss), ("ce", ce), ("kl", kl)):
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
    assert found["tokens"] == tokens == batch.tokens
    assert kl > 0.1 and ce > 1
    loss.backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    assert any("encoder.layers" in name for name in gradients) != freeze_encoder
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-5, name


def test_the_teacher_is_not_part_of_what_is_trained_wrapped_and_saved(make, batch):
    distiller = make(freeze_encoder=False)
    ours = {f"student.{name}" for name, _ in distiller.student.named_parameters()}
    assert {name for name, _ in distiller.named_parameters()} == ours
    assert all(name.startswith(("student.", "log_mel.")) for name in distiller.state_dict())
    before = copy.deepcopy(distiller.teacher.state_dict())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller.train()
    assert not distiller.teacher.training
    assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())
    distiller(**batch.inputs("cpu"))["loss"].backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())


@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_a_frozen_encoder_has_no_dropout(make, freeze_encoder):
    distiller = make(freeze_encoder)
    distiller.train()
    assert distiller.student.model.encoder.training != freeze_encoder
    assert distiller.student.model.encoder.layers[0].training != freeze_encoder
    assert distiller.student.model.decoder.training
    distiller.eval()
    assert not distiller.student.model.decoder.training


def test_padding_and_neighbours_change_nothing(make, batch):
    distiller = make()
    whole = distiller(**batch.inputs("cpu"))
    parts = []
    for row in range(len(batch.labels)):
        used = int((batch.labels[row] != -100).nonzero().max()) + 1
        inputs = (batch.waveforms[row : row + 1], batch.decoder_input_ids[row : row + 1, :used])
        labels = batch.labels[row : row + 1, :used]
        parts.append(distiller(*inputs, labels, positions_of(labels)))
    for name in ("loss", "ce", "kl", "tokens"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], rtol=1e-4, atol=1e-4)


def test_a_batch_that_trains_nothing_has_a_loss_of_zero_and_gradients(make, loaded):
    """One rank may have no row left: it must take part in the step all the same."""
    distiller = make()
    losses = distiller(**Collator(loaded.window, loaded.grammar.end)([]).inputs("cpu"))
    losses["loss"].backward()
    assert losses["loss"] == 0 and losses["tokens"] == 0
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)


def test_a_teacher_in_half_precision_teaches_a_student_in_float32(make, batch, teacher):
    exact = make()(**batch.inputs("cpu"))
    distiller = make(model=copy.deepcopy(teacher).bfloat16())
    assert distiller.shares_encoder
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distiller(**batch.inputs("cpu"))
    losses["loss"].backward()
    assert {parameter.grad.dtype for parameter in distiller.parameters() if parameter.grad is not None} == {
        torch.float32
    }
    np.testing.assert_allclose(losses["loss"].item(), exact["loss"].item(), rtol=0.05)


def test_states_that_were_kept_are_not_computed_again(make, batch):
    distiller = make()
    inputs = batch.inputs("cpu")
    states, for_teacher = distiller.encode(batch.waveforms)
    hidden = distiller.teacher_decoder(batch.decoder_input_ids, for_teacher)
    expected = distiller(**inputs)["loss"]
    encoders, (_, teacher) = heard(distiller)
    kept = distiller(**inputs, encoder_states=states, teacher_hidden=hidden)["loss"]
    assert not encoders[0].calls and not encoders[1].calls and not teacher.calls
    torch.testing.assert_close(kept, expected)
