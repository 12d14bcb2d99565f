"""The distillation loss, from the decoders' last hidden states and in chunks of valid tokens.

No tensor of shape [batch, length, vocabulary] ever exists: a chunk's logits live only while its loss and its gradient
are computed, in one pass. Softmax is float32 whatever the compute type is.

Liger-Kernel's LigerFusedLinearJSDLoss (0.8.5, beta=0) computes the same, and is not used: it works on padding too,
keeps the soft loss in the type of the logits, which is too little in bfloat16, and needs torch.compile to be as fast.
benchmarks/loss.py compares them. On two CPU cores ours took 1.12 s and 0.94 GB, Liger's 1.88 s and 2.04 GB, compiled
1.14 s and 1.32 GB after a first call of 12 s.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

CE_WEIGHT = 0.8  # of Distil-Whisper, arXiv 2311.00430
CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB of float32, some 320 tokens of Whisper's vocabulary


@dataclass(frozen=True)
class LossWeights:
    """CE_WEIGHT * CE + kl_weight * temperature^2 * KL(teacher || student)."""

    ce: float = CE_WEIGHT
    kl: float = 1.0
    temperature: float = 2.0


@dataclass(frozen=True)
class LossSums:
    """Sums over valid tokens: `loss` carries the gradient, the others are for the record."""

    loss: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    tokens: torch.Tensor


def distillation_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    labels: torch.Tensor,
    valid_positions: torch.Tensor,
    weights: LossWeights,
    teacher_hidden: torch.Tensor | None = None,
    teacher_head: torch.Tensor | None = None,
) -> LossSums:
    """CE of the labels and temperature-scaled KL from the teacher, summed over the valid tokens.

    Hidden states are [batch, length, width] (the widths may differ), heads [vocabulary, width], labels
    [batch, length], valid_positions [tokens] those of the flattened labels that count. Without teacher_hidden there is
    no KL term. Source: arXiv 2311.00430, section 3.
    """
    hidden, targets = student_hidden.flatten(0, 1)[valid_positions], labels.flatten()[valid_positions]
    teacher = None
    if teacher_hidden is not None:
        teacher = teacher_hidden.flatten(0, 1)[valid_positions].detach(), teacher_head.detach()
    loss, ce, kl = _ChunkedLoss.apply(hidden, student_head, targets, teacher, weights, torch.is_grad_enabled())
    return LossSums(loss, ce, kl, torch.full_like(ce, len(valid_positions), dtype=torch.long))


class _ChunkedLoss(torch.autograd.Function):
    """Forward computes the loss and, while a chunk's logits are there, its gradient; backward only scales it."""

    @staticmethod
    def forward(ctx, hidden, head, targets, teacher, weights, with_gradient):
        compute_type = (
            torch.get_autocast_dtype(hidden.device.type)
            if torch.is_autocast_enabled(hidden.device.type)
            else hidden.dtype
        )
        with torch.autocast(hidden.device.type, enabled=False):
            return _forward(ctx, hidden, head, targets, teacher, weights, with_gradient, compute_type)

    @staticmethod
    def backward(ctx, scale, _ce, _kl):
        grad_hidden, grad_head = ctx.saved_tensors
        grads = (grad.mul(scale.to(grad.dtype)) for grad in (grad_hidden, grad_head))
        return *grads, None, None, None, None


def _forward(ctx, hidden, head, targets, teacher, weights, with_gradient, compute_type):
    needs_gradient = with_gradient and any(ctx.needs_input_grad)
    head_cast = head.to(compute_type)
    grad_hidden = torch.zeros_like(hidden) if needs_gradient else None
    grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_gradient else None
    ce = hidden.new_zeros((), dtype=torch.float32)
    kl = hidden.new_zeros((), dtype=torch.float32)
    chunk = max(1, CHUNK_ELEMENTS // head.shape[0])
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        states = hidden[part].to(compute_type)
        logits = (states @ head_cast.T).float()
        log_q = functional.log_softmax(logits, dim=-1)
        ce -= log_q.gather(1, targets[part, None]).sum()
        grad = None
        if needs_gradient:
            grad = log_q.exp_().mul_(weights.ce)
            grad.scatter_add_(1, targets[part, None], grad.new_full((len(states), 1), -weights.ce))
        del log_q
        if teacher is not None:
            kl += _add_kl(logits, teacher[0][part], teacher[1], weights, grad)
        del logits
        if needs_gradient:
            grad = grad.to(compute_type)
            grad_hidden[part] = (grad @ head_cast).to(hidden.dtype)
            if compute_type == torch.float32:
                grad_head.addmm_(grad.T, states)
            else:
                grad_head += (grad.T @ states).float()
    if needs_gradient:
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
    ctx.set_materialize_grads(True)
    ctx.mark_non_differentiable(ce, kl)
    return weights.ce * ce + weights.kl * weights.temperature**2 * kl, ce, kl


def _add_kl(logits, teacher_hidden, teacher_head, weights, grad):
    """KL(teacher || student) of a chunk at the temperature, its gradient by the student's logits added to grad.

    Works in place where it can, logits included: these tensors are the largest of all.
    """
    temperature = weights.temperature
    teacher_logits = (teacher_hidden @ teacher_head.to(teacher_hidden.dtype).T).float().div_(temperature)
    log_p = functional.log_softmax(teacher_logits, dim=-1)
    del teacher_logits
    log_q = functional.log_softmax(logits.div_(temperature), dim=-1)
    p = log_p.exp()
    # Where the teacher's probability is 0, log p may be -inf: such an entry adds nothing.
    kl = torch.linalg.vecdot(p, log_p.sub_(log_q).nan_to_num_(neginf=0.0)).sum()
    if grad is not None:  # T^2 * KL has the gradient T * (q - p)
        grad.add_(log_q.exp_().sub_(p), alpha=weights.kl * temperature)
    return kl
