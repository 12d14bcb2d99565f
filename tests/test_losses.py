"""The chunked loss against the plain formula, in value, gradients and memory layout."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from distil_whisper import losses
from distil_whisper.examples import positions_of
from distil_whisper.losses import LossWeights, distillation_loss

WEIGHTS = LossWeights(kl=1.0, temperature=2.0)


def make_inputs(dtype=torch.float32, batch=3, length=7, width=16, teacher_width=24, vocabulary=53, seed=0):
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, length, width, generator=draw, dtype=torch.float64)
    head = torch.randn(vocabulary, width, generator=draw, dtype=torch.float64) / 2
    teacher = torch.randn(batch, length, teacher_width, generator=draw, dtype=torch.float64)
    teacher_head = torch.randn(vocabulary, teacher_width, generator=draw, dtype=torch.float64) / 2
    labels = torch.randint(0, vocabulary, (batch, length), generator=draw)
    labels[0, :3] = -100
    labels[2, 4:] = -100
    return [t.to(dtype) for t in (student, head, teacher, teacher_head)] + [labels]


def plain_loss(student, head, teacher, teacher_head, labels, weights=WEIGHTS):
    """The formula as one writes it on paper, with full logits."""
    logits, teacher_logits = student @ head.T, teacher @ teacher_head.T
    valid = labels != -100
    ce = functional.cross_entropy(logits[valid], labels[valid], reduction="sum")
    p = functional.softmax(teacher_logits[valid] / weights.temperature, -1)
    log_q = functional.log_softmax(logits[valid] / weights.temperature, -1)
    kl = (p * (p.log() - log_q)).sum()
    return weights.ce * ce + weights.kl * weights.temperature**2 * kl, ce, kl


@pytest.mark.parametrize("chunk_elements", [1, 53 * 4, 2**25])
def test_equals_the_plain_formula_and_its_gradients(monkeypatch, chunk_elements):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk_elements)
    student, head, teacher, teacher_head, labels = make_inputs()
    ours = [student.clone().requires_grad_(), head.clone().requires_grad_()]
    theirs = [student.clone().requires_grad_(), head.clone().requires_grad_()]
    sums = distillation_loss(ours[0], ours[1], labels, positions_of(labels), WEIGHTS, teacher, teacher_head)
    loss, ce, kl = plain_loss(theirs[0], theirs[1], teacher, teacher_head, labels)
    torch.testing.assert_close(sums.loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.ce, ce, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.kl, kl, rtol=1e-5, atol=0)
    assert sums.tokens == (labels != -100).sum()
    (sums.loss * 0.37).backward()
    (loss * 0.37).backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.grad - other.grad).norm() / other.grad.norm() < 1e-5


def test_bfloat16_is_no_worse_than_the_plain_formula_in_bfloat16():
    exact = make_inputs(torch.float64, batch=8, length=24, width=64, vocabulary=997)
    reference = plain_loss(*exact)[0]
    student, head, teacher, teacher_head, labels = [t.bfloat16() if t.is_floating_point() else t for t in exact]
    ours = distillation_loss(student, head, labels, positions_of(labels), WEIGHTS, teacher, teacher_head).loss
    plain = plain_loss(student, head, teacher, teacher_head, labels)[0]
    assert (ours - reference).abs() <= (plain - reference).abs()
    assert (ours - reference).abs() / reference < 0.02


def test_autocast_computes_in_the_compute_type_and_keeps_float32_gradients():
    student, head, teacher, teacher_head, labels = make_inputs()
    student.requires_grad_()
    head.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = distillation_loss(
            student, head, labels, positions_of(labels), WEIGHTS, teacher.bfloat16(), teacher_head.bfloat16()
        )
    sums.loss.backward()
    reference = plain_loss(student, head, teacher, teacher_head, labels)[0]
    assert (
        sums.loss.dtype == torch.float32 and student.grad.dtype == torch.float32 and head.grad.dtype == torch.float32
    )
    assert (sums.loss - reference).abs() / reference < 0.02
    assert sums.loss != reference  # the products were rounded to bfloat16


def test_no_gradient_is_computed_where_none_is_wanted():
    """The loss itself takes two products with the vocabulary."""
    student, head, teacher, teacher_head, labels = make_inputs(teacher_width=16)
    head.requires_grad_()
    counted = []
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted), FlopCounterMode(display=False) as counter:
            distillation_loss(student, head, labels, positions_of(labels), WEIGHTS, teacher, teacher_head)
        counted.append(counter.get_total_flops())
    assert counted[0] > counted[1] == 2 * (2 * (labels != -100).sum() * head.numel())


def test_without_a_teacher_only_cross_entropy_is_left():
    student, head, _, _, labels = make_inputs()
    sums = distillation_loss(student, head, labels, positions_of(labels), LossWeights(ce=1.0))
    valid = labels != -100
    expected = functional.cross_entropy((student @ head.T)[valid], labels[valid], reduction="sum")
    torch.testing.assert_close(sums.loss, expected, rtol=1e-6, atol=0)
    assert sums.kl == 0


def test_no_valid_token_gives_a_zero_loss_and_zero_gradients():
    student, head, teacher, teacher_head, labels = make_inputs()
    student.requires_grad_()
    labels = torch.full_like(labels, -100)
    sums = distillation_loss(student, head, labels, positions_of(labels), WEIGHTS, teacher, teacher_head)
    sums.loss.backward()
    assert sums.loss == 0 and sums.tokens == 0 and not student.grad.any()


def test_a_teacher_that_rules_tokens_out_gives_a_finite_loss():
    student, head, _, _, labels = make_inputs()
    teacher = torch.zeros(*student.shape[:2], 1)
    teacher[..., 0] = 1.0
    teacher_head = torch.zeros(head.shape[0], 1)
    teacher_head[5] = 1e6  # every other probability underflows to 0
    sums = distillation_loss(student, head, labels, positions_of(labels), WEIGHTS, teacher, teacher_head)
    assert torch.isfinite(sums.loss)
