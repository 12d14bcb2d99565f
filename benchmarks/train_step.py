"""Time a training step of the engine against a plain reference step.

python benchmarks/train_step.py --json train_step.json

The models have random weights and real sizes: Whisper tiny with 2 of its 4 decoder layers on a CPU, large-v3 with 2
decoder layers on a GPU. The reference is what a first script does: teacher and student encoder separately, labels
padded to 448, full logits, float features read from disk. Every variant runs in processes of its own, in turn,
several times; ratios are medians of pairs.
"""

import json
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from measuring import SIZES, Clock, in_turn, machine, make_parser, this_device, write_json
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from distil_whisper.audio import LogMel, Window, stack
from distil_whisper.caches import StateCaches, open_caches
from distil_whisper.distiller import Distiller
from distil_whisper.examples import Batch, positions_of
from distil_whisper.losses import LossWeights
from distil_whisper.meters import peak_memory
from distil_whisper.models import contiguous_states
from distil_whisper.student import make_student

VARIANTS = ("reference", "engine", "cached")
WEIGHTS = LossWeights()


def make_models(size: str, device, dtype) -> tuple[WhisperForConditionalGeneration, WhisperForConditionalGeneration]:
    """A teacher in the compute type and a float32 student with 2 of its decoder layers, the same in every process."""
    torch.manual_seed(0)
    of = SIZES[size]
    config = WhisperConfig(
        vocab_size=of["vocabulary"],
        num_mel_bins=of["mels"],
        d_model=of["d_model"],
        encoder_layers=of["layers"],
        decoder_layers=of["layers"],
        encoder_attention_heads=of["heads"],
        decoder_attention_heads=of["heads"],
        encoder_ffn_dim=4 * of["d_model"],
        decoder_ffn_dim=4 * of["d_model"],
    )
    with device:
        teacher = WhisperForConditionalGeneration(config)
        student, _ = make_student(teacher, decoder_layers=2)
    return teacher.to(dtype).eval(), student


def make_batch(window: Window, batch_size: int, label_tokens: int, vocabulary: int, padded_to: int | None) -> Batch:
    """Noise for audio and random labels: of a length around label_tokens, padded to the longest or to `padded_to`."""
    draw = np.random.default_rng(1)
    samples = [draw.standard_normal(window.samples, np.float32) * 0.1 for _ in range(batch_size)]
    lengths = draw.integers(int(label_tokens * 0.8), label_tokens + 1, batch_size).tolist()
    longest = padded_to or -(-max(lengths) // 8) * 8
    inputs = torch.zeros(batch_size, longest, dtype=torch.long)
    labels = torch.full((batch_size, longest), -100)
    for row, length in enumerate(lengths):
        tokens = torch.from_numpy(draw.integers(0, vocabulary, length + 1))
        inputs[row, :length], labels[row, :length] = tokens[:-1], tokens[1:]
    keys = [f"recording-{row}" for row in range(batch_size)]
    seconds = batch_size * window.seconds
    rows = [str(row) for row in range(batch_size)]
    return Batch(stack(samples, window), inputs, labels, positions_of(labels), seconds, [], keys, lengths, rows, 0)


class ReferenceStep:
    """What a first script does with a batch whose features lie on disk."""

    def __init__(self, teacher, student, batch: Batch, features: torch.Tensor, folder: Path):
        self.teacher, self.student, self.batch = teacher, student, batch
        self.student.model.encoder.requires_grad_(False)
        self.path = folder / "features.npy"
        np.save(self.path, features.float().numpy())

    def loss(self, device) -> torch.Tensor:
        """Mean of 0.8 CE + T^2 KL over the valid tokens, from full logits."""
        features = torch.from_numpy(np.load(self.path)).to(device)
        labels, inputs = self.batch.labels.to(device), self.batch.decoder_input_ids.to(device)
        with torch.no_grad():
            teacher_logits = self.teacher(features.to(self.teacher.dtype), decoder_input_ids=inputs).logits
        logits = self.student(features, decoder_input_ids=inputs).logits
        valid = (labels != -100).float()
        ce = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        p = functional.softmax(teacher_logits.float() / WEIGHTS.temperature, -1)
        log_q = functional.log_softmax(logits.float() / WEIGHTS.temperature, -1)
        kl = (functional.kl_div(log_q, p, reduction="none").sum(-1) * valid).sum()
        return (WEIGHTS.ce * ce + WEIGHTS.kl * WEIGHTS.temperature**2 * kl) / valid.sum()


class EngineStep:
    """The engine: one encoder pass, trimmed labels, chunked loss; with caches, the student's decoder alone."""

    def __init__(self, distiller: Distiller, batch: Batch, caches: StateCaches | None):
        self.distiller, self.batch, self.caches = distiller, batch, caches

    def loss(self, device) -> torch.Tensor:
        """Mean loss over the valid tokens."""
        kept = self.caches(self.batch, device) if self.caches else {}
        return self.distiller(**self.batch.inputs(device), **kept)["loss"] / self.batch.tokens


def make_step(variant: str, args, device, dtype, folder: Path):
    """The step of a variant, and the student that it trains."""
    teacher, student = make_models(args.size, device, dtype)
    extractor = WhisperFeatureExtractor(feature_size=SIZES[args.size]["mels"])
    window = Window.from_models(extractor, student.config)
    vocabulary = SIZES[args.size]["vocabulary"]
    padded_to = student.config.max_target_positions if variant == "reference" else None
    batch = make_batch(window, args.batch_size, args.label_tokens, vocabulary, padded_to)
    log_mel = LogMel(extractor).to(device)
    if variant == "reference":
        return ReferenceStep(teacher, student, batch, log_mel(batch.waveforms.to(device)).cpu(), folder), student
    for model in (teacher, student):
        contiguous_states(model)
    distiller = Distiller(student, log_mel, WEIGHTS, teacher, freeze_encoder=True)
    caches = open_caches(folder, distiller, True, True, 8.0, 0, 1) if variant == "cached" else None
    return EngineStep(distiller, batch, caches), student


def run_variant(args) -> dict:
    """Steps of one variant in this process: seconds of each, first loss, peak memory, operations, parts."""
    device, dtype = this_device(), getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        step, student = make_step(args.variant, args, device, dtype, Path(folder))
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=None if args.variant == "reference" else True)
        clock, seconds, losses = Clock(device), [], []
        if args.variant != "reference":
            parts = step.distiller
            clock.around(parts, "encode", "log-mel and encoder")
            clock.around(parts, "teacher_decoder", "teacher's decoder")
        counted = FlopCounterMode(display=False)
        for number in range(args.warmup + args.steps):
            clock.seconds.clear()
            began = clock.now()
            with counted if number == args.warmup - 1 else nullcontext():
                losses.append(one_step(step, student, optimizer, clock, device, dtype))
            if number >= args.warmup:
                seconds.append(clock.now() - began)
    flops, parts = counted.get_total_flops(), dict(clock.seconds)
    return {"seconds": seconds, "loss": losses[0], "peak_bytes": peak_memory(), "flops": flops, "parts": parts}


def one_step(step, student, optimizer, clock: Clock, device, dtype) -> float:
    """Forward, backward, clipping and update, timed by part."""
    with clock.part("forward"), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = step.loss(device)
    with clock.part("backward"):
        loss.backward()
    with clock.part("optimizer"):
        torch.nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def matmul_rate(dtype) -> float:
    """Operations a second of this machine's own product of large matrices, the best of several."""
    device = this_device()
    size = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    clock, rates = Clock(device), []
    for _ in range(10):
        began = clock.now()
        torch.mm(a, b)
        rates.append(2 * size**3 / (clock.now() - began))
    return max(rates)


def summarise(args, runs: dict[str, list[dict]], rate: float) -> dict:
    """Medians, ratios of pairs, and the share of the machine's matrix rate."""
    seconds = {name: [statistics.median(run["seconds"]) for run in of] for name, of in runs.items()}
    peaks = {name: statistics.median(run["peak_bytes"] for run in of) for name, of in runs.items()}
    losses = {name: of[0]["loss"] for name, of in runs.items()}

    def speedup(variant: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds["reference"], seconds[variant], strict=True))

    median = {name: statistics.median(of) for name, of in seconds.items()}
    return {
        "machine": machine(),
        "size": args.size,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "label_tokens": args.label_tokens,
        "seconds_per_step": median,
        "samples_per_second": {name: args.batch_size / value for name, value in median.items()},
        "peak_gb": {name: value / 1e9 for name, value in peaks.items()},
        "speedup": speedup("engine"),
        "speedup_cached": speedup("cached"),
        "memory_ratio": peaks["engine"] / peaks["reference"],
        "loss_difference": abs(losses["engine"] - losses["reference"]) / losses["reference"],
        "matmul_tflops": rate / 1e12,
        "matmul_share": runs["engine"][0]["flops"] / median["engine"] / rate,
        "parts": {name: of[0]["parts"] for name, of in runs.items()},
    }


def show(result: dict) -> None:
    """The result as a table."""
    print(f"{result['machine']}; {result['size']}, {result['dtype']}, batch {result['batch_size']}")
    print(f"{'':12}{'s/step':>10}{'samples/s':>12}{'peak GB':>10}")
    for name in VARIANTS:
        row = [result[key][name] for key in ("seconds_per_step", "samples_per_second", "peak_gb")]
        print(f"{name:12}{row[0]:>10.3f}{row[1]:>12.2f}{row[2]:>10.2f}")
    print(
        f"speedup {result['speedup']:.2f}, with caches {result['speedup_cached']:.2f}, "
        f"memory {result['memory_ratio']:.2f} of the reference's, loss difference {result['loss_difference']:.1e}"
    )
    print(f"matrix products: {result['matmul_tflops']:.3f} TFLOP/s here, the engine uses {result['matmul_share']:.0%}")
    for name, parts in result["parts"].items():
        print(f"{name}: " + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items()))


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = make_parser(__doc__, VARIANTS)
    parser.add_argument("--batch_size", type=int, default=64 if cuda else 8)
    parser.add_argument("--label_tokens", type=int, default=128 if cuda else 95)
    parser.add_argument("--steps", type=int, default=10 if cuda else 3, help="Timed steps of a process.")
    parser.add_argument("--warmup", type=int, default=3 if cuda else 1, help="Steps before them.")
    args = parser.parse_args(argv)
    if args.variant:
        print(json.dumps(run_variant(args)))
        return
    rate = matmul_rate(getattr(torch, args.dtype))
    runs = in_turn(__file__, VARIANTS, args)
    result = summarise(args, runs, rate)
    show(result)
    write_json(args, result)


if __name__ == "__main__":
    main()
