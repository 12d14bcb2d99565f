"""Metrics of training, averaged over processes and over the steps since the last line."""

import time

import torch
from accelerate import Accelerator

from distil_whisper.examples import Batch
from distil_whisper.losses import LossWeights


class Meter:
    """Adds up steps; `read` gives their metrics and starts again."""

    def __init__(self, accelerator: Accelerator, weights: LossWeights):
        self.accelerator = accelerator
        self.weights = weights
        self._start()

    def _start(self) -> None:
        self.sums = torch.zeros(3, device=self.accelerator.device, dtype=torch.float64)
        self.samples, self.seconds, self.norm, self.places = 0, 0.0, 0.0, 0
        self.began = time.perf_counter()

    def add(self, group: list[Batch], sums: torch.Tensor, norm: float) -> None:
        """Take note of a step: its batches, its sums of ce, kl and tokens, and its gradient norm."""
        self.sums += sums
        self.norm = norm
        for batch in group:
            self.samples += len(batch.labels)
            self.seconds += batch.seconds
            self.places += batch.labels.numel()

    def read(self) -> dict[str, float]:
        """Metrics by name; every process must call it. Peak memory is the GPU's, where there is one."""
        counts = torch.tensor([self.samples, self.seconds, self.places], device=self.accelerator.device).double()
        sums = self.accelerator.reduce(torch.cat([self.sums, counts]), "sum").tolist()
        ce, kl, tokens, samples, seconds, places = sums
        took = time.perf_counter() - self.began
        ce, kl = ce / max(tokens, 1), kl / max(tokens, 1)
        values = {
            "train/loss": self.weights.ce * ce + self.weights.kl * self.weights.temperature**2 * kl,
            "train/ce": ce,
            "train/kl": kl,
            "train/grad_norm": float(self.norm),
            "train/tokens_per_second": tokens / took,
            "train/samples_per_second": samples / took,
            "train/audio_hours_per_hour": seconds / took,
            "train/padding": 1 - tokens / max(places, 1),
        }
        if torch.cuda.is_available():
            values["train/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self._start()
        return values
