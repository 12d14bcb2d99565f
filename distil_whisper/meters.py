"""Metrics of training, averaged over processes and over the steps since the last line."""

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest

import torch
from accelerate import Accelerator

from distil_whisper.examples import Batch
from distil_whisper.losses import LossWeights


class Meter:
    """Adds up steps; `read` gives their metrics and starts again."""

    def __init__(self, accelerator: Accelerator, weights: LossWeights):
        self.accelerator = accelerator
        self.weights = weights
        self.rows = self.skipped = 0  # rows of the whole run that came, and those of them that could not be used
        self._start()

    def _start(self) -> None:
        self._losses = torch.zeros(3, device=self.accelerator.device, dtype=torch.float64)  # ce, kl, valid tokens
        # samples, seconds of audio, places of the label tensors, rows and prompts that could not be used
        self._counts = [0.0] * 5
        self._norm, self._since = 0.0, time.perf_counter()

    def add(self, group: list[Batch], losses: torch.Tensor, norm: torch.Tensor) -> None:
        """Take note of a step: its batches, its sums of ce, kl and tokens (left out unless they are finite), and its
        gradient norm."""
        rows = [
            (len(batch.row_ids), batch.seconds, batch.labels.numel(), len(batch.problems), batch.prompts_left_out)
            for batch in group
        ]
        counts = [sum(counted) for counted in zip(*rows, strict=True)]
        self._losses += losses.where(losses.isfinite().all(), 0)
        self._counts = [one + other for one, other in zip(self._counts, counts, strict=True)]
        self._norm = norm

    def sums(self) -> list[float]:
        """What was added up since the last line, over all processes, for a checkpoint. Every process must call it."""
        sums = torch.cat([self._losses, self._losses.new_tensor(self._counts)])
        return self.accelerator.reduce(sums, "sum").tolist()

    def go_on(self, sums: list[float], rows: int, skipped: int) -> None:
        """Go on from what a checkpoint holds."""
        self.rows, self.skipped = rows, skipped
        if self.accelerator.is_main_process:
            self._losses += self._losses.new_tensor(sums[:3])
            # Checkpoints of earlier versions count fewer things.
            self._counts = [one + other for one, other in zip_longest(self._counts, sums[3:], fillvalue=0.0)]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training's."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Metrics by name; every process must call it. Peak memory is this process's."""
        ce, kl, tokens, samples, seconds, places, skipped, left_out = self.sums()
        self.rows, self.skipped = self.rows + int(samples + skipped), self.skipped + int(skipped)
        took = time.perf_counter() - self._since
        ce, kl = (total / tokens if tokens else math.nan for total in (ce, kl))
        values = {
            "train/loss": self.weights.ce * ce + self.weights.kl * self.weights.temperature**2 * kl,
            "train/ce": ce,
            "train/kl": kl,
            "train/grad_norm": float(self._norm),
            "train/tokens_per_second": tokens / took,
            "train/samples_per_second": samples / took,
            "train/audio_hours_per_hour": seconds / took,
            "train/padding": 1 - tokens / max(places, 1),
            "train/skipped": skipped,
            "train/prompts_left_out": left_out,
        }
        values["train/peak_memory_gb"] = peak_memory() / 1e9
        self._start()
        return values


def peak_memory() -> int:
    """The most bytes that were in use: of the GPU, or of this process where there is none."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
