"""Time the distillation loss, forward and backward, against the plain formula and against Liger-Kernel's.

pip install liger-kernel && python benchmarks/loss.py --json loss.json

All get the same last hidden states (Whisper tiny's width on a CPU, large-v3's on a GPU), the same heads and labels, of
which a fifth is padding. Liger's is LigerFusedLinearJSDLoss with beta=0, which is KL(teacher || student), weighted as
ours is; it is left out where the package is missing. Every variant runs in processes of its own, in turn.
"""

import importlib.util
import json
import statistics

import torch
from measuring import SIZES, Clock, in_turn, machine, make_parser, this_device, write_json
from torch.nn import functional

from distil_whisper.examples import positions_of
from distil_whisper.losses import LossWeights, distillation_loss
from distil_whisper.meters import peak_memory

VARIANTS = ("plain", "ours", "liger", "liger_compiled")
WEIGHTS = LossWeights()


def inputs(args, dtype, device) -> dict[str, torch.Tensor]:
    """Hidden states and heads of student and teacher, and labels."""
    torch.manual_seed(0)
    width, vocabulary = SIZES[args.size]["d_model"], SIZES[args.size]["vocabulary"]
    shape = (args.batch_size, args.label_tokens)
    made = {
        "student_hidden": torch.randn(*shape, width),
        "student_head": torch.randn(vocabulary, width) * 0.05,
        "teacher_hidden": torch.randn(*shape, width),
        "teacher_head": torch.randn(vocabulary, width) * 0.05,
    }
    made = {name: tensor.to(device, dtype) for name, tensor in made.items()}
    labels = torch.randint(0, vocabulary, shape)
    labels[:, -args.label_tokens // 5 :] = -100
    return {**made, "labels": labels.to(device)}


def plain(student_hidden, student_head, teacher_hidden, teacher_head, labels) -> torch.Tensor:
    """The formula, on full logits."""
    exact = torch.promote_types(student_hidden.dtype, torch.float32)
    logits, targets = (student_hidden @ student_head.T).to(exact), (teacher_hidden @ teacher_head.T).to(exact)
    valid = labels != -100
    ce = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    log_q = functional.log_softmax(logits / WEIGHTS.temperature, -1)
    log_p = functional.log_softmax(targets / WEIGHTS.temperature, -1)
    kl = (functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * valid).sum()
    return (WEIGHTS.ce * ce + WEIGHTS.kl * WEIGHTS.temperature**2 * kl) / valid.sum()


def ours(student_hidden, student_head, teacher_hidden, teacher_head, labels) -> torch.Tensor:
    """The engine's."""
    places = positions_of(labels)
    sums = distillation_loss(student_hidden, student_head, labels, places, WEIGHTS, teacher_hidden, teacher_head)
    return sums.loss / sums.tokens


def liger(compiled: bool):
    """Liger-Kernel's, with or without torch.compile."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    soft = WEIGHTS.kl * WEIGHTS.temperature**2
    made = LigerFusedLinearJSDLoss(WEIGHTS.ce, soft, 0.0, -100, WEIGHTS.temperature, compiled)

    def loss(student_hidden, student_head, teacher_hidden, teacher_head, labels) -> torch.Tensor:
        flat = (student_hidden.flatten(0, 1), student_head, teacher_hidden.flatten(0, 1), teacher_head)
        return made(*flat, labels.flatten())

    return loss


def run_variant(args) -> dict:
    """Seconds of forward and backward, the first call's apart; peak memory; distance from the formula in float64."""
    device, dtype = this_device(), getattr(torch, args.dtype)
    loss_of = {"plain": plain, "ours": ours}.get(args.variant) or liger(args.variant == "liger_compiled")
    given = inputs(args, dtype, device)
    trained = [given["student_hidden"].requires_grad_(), given["student_head"].requires_grad_()]
    clock, seconds = Clock(device), []
    for _ in range(1 + args.steps):
        for tensor in trained:
            tensor.grad = None
        began = clock.now()
        loss = loss_of(**given)
        loss.backward()
        seconds.append(clock.now() - began)
    peak = peak_memory()
    found = [loss.item(), *(tensor.grad.double() for tensor in trained)]
    exact = {name: t.detach().double() if t.is_floating_point() else t for name, t in given.items()}
    of_exact = [exact["student_hidden"].requires_grad_(), exact["student_head"].requires_grad_()]
    expected = plain(**exact)
    expected.backward()
    errors = [((g - e.grad).norm() / e.grad.norm()).item() for g, e in zip(found[1:], of_exact, strict=True)]
    return {
        "first": seconds[0],
        "seconds": seconds[1:],
        "peak": peak,
        "loss_error": abs(found[0] - expected.item()) / expected.item(),
        "gradient_error": max(errors),
    }


def summarise(args, runs: dict[str, list[dict]]) -> dict:
    """Medians by variant."""

    def median(name: str, value) -> float:
        return statistics.median(value(run) for run in runs[name])

    return {
        "machine": machine(),
        "size": args.size,
        "dtype": args.dtype,
        "tokens": args.batch_size * args.label_tokens,
        **{
            name: {
                "seconds": median(name, lambda run: statistics.median(run["seconds"])),
                "first_seconds": median(name, lambda run: run["first"]),
                "peak_gb": median(name, lambda run: run["peak"] / 1e9),
                "loss_error": runs[name][0]["loss_error"],
                "gradient_error": runs[name][0]["gradient_error"],
            }
            for name in runs
        },
    }


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = make_parser(__doc__, VARIANTS)
    parser.add_argument("--batch_size", type=int, default=64 if cuda else 8)
    parser.add_argument("--label_tokens", type=int, default=128 if cuda else 96)
    parser.add_argument("--steps", type=int, default=10 if cuda else 3, help="Timed calls of a process.")
    args = parser.parse_args(argv)
    if args.variant:
        print(json.dumps(run_variant(args)))
        return
    runs = in_turn(__file__, VARIANTS[: 4 if importlib.util.find_spec("liger_kernel") else 2], args)
    result = summarise(args, runs)
    print(f"{result['machine']}; {args.size}, {args.dtype}, {result['tokens']} tokens")
    print(f"{'':16}{'seconds':>9}{'first':>9}{'peak GB':>9}{'loss error':>12}{'gradient error':>16}")
    for name in runs:
        row = result[name]
        figures = f"{row['seconds']:>9.3f}{row['first_seconds']:>9.3f}{row['peak_gb']:>9.2f}"
        print(f"{name:16}{figures}{row['loss_error']:>12.1e}{row['gradient_error']:>16.1e}")
    write_json(args, result)


if __name__ == "__main__":
    main()
