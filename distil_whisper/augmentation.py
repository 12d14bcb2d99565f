"""Augmentation: SpecAugment on the log-mel of a batch, noise and speed on the waveform of a sample."""

from dataclasses import dataclass

import numpy as np
import soxr
import torch

from distil_whisper.tokens import TIME_PRECISION, Grammar, Target


@dataclass(frozen=True)
class SpecAugment:
    """Masks stretches of frames and of mel bins with 0 (Park et al., arXiv 1904.08779).

    The fields are those of WhisperConfig; transformers applies them in the full model's forward only, which a shared
    encoder pass goes around. Draws come from torch's generator, on the device of the features.
    """

    mask_time_prob: float
    mask_time_length: int
    mask_time_min_masks: int
    mask_feature_prob: float
    mask_feature_length: int
    mask_feature_min_masks: int

    @classmethod
    def from_config(cls, config) -> "SpecAugment":
        """The settings of a WhisperConfig."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Masked log-mel [batch, mels, frames]."""
        batch, mels, frames = features.shape
        device = features.device
        time = _spans(batch, frames, self.mask_time_prob, self.mask_time_length, self.mask_time_min_masks, device)
        bins = _spans(
            batch, mels, self.mask_feature_prob, self.mask_feature_length, self.mask_feature_min_masks, device
        )
        return features.masked_fill(time[:, None, :] | bins[:, :, None], 0.0)


@dataclass(frozen=True)
class WaveformAugment:
    """White noise with a probability, its signal-to-noise ratio (in dB) drawn from a range, and a speed likewise."""

    noise_probability: float = 0.0
    noise_snr_db: tuple[float, float] = (10.0, 30.0)
    speed: tuple[float, float] = (1.0, 1.0)

    def __bool__(self) -> bool:
        return self.noise_probability > 0 or self.speed != (1.0, 1.0)

    def __call__(self, samples: np.ndarray, longest: int, draw: np.random.Generator) -> tuple[np.ndarray, float]:
        """Changed samples and by what factor they are faster. None becomes longer than `longest` samples."""
        speed = max(draw.uniform(*self.speed), len(samples) / longest)
        if speed != 1.0:
            samples = soxr.resample(samples, speed, 1.0).astype(np.float32)[:longest]
        if draw.random() < self.noise_probability:
            power = np.mean(samples.astype(np.float64) ** 2) / 10 ** (draw.uniform(*self.noise_snr_db) / 10)
            samples = samples + np.sqrt(power).astype(np.float32) * draw.standard_normal(len(samples), np.float32)
        return samples, speed


def at_speed(target: Target, speed: float, grammar: Grammar, window_seconds: float) -> Target:
    """A target whose timestamps are those of audio played faster by a factor; none is after the window's end.

    A teacher may set a mark after the end of the audio, which slower audio would move out of the window.
    """
    if speed == 1.0 or not target.has_timestamps:
        return target
    first = grammar.timestamp_begin

    def moved(token: int) -> int:
        return grammar.timestamp(min((token - first) * TIME_PRECISION / speed, window_seconds))

    return Target([moved(token) if grammar.is_timestamp(token) else token for token in target.ids], True)


def _spans(batch: int, size: int, probability: float, length: int, at_least: int, device) -> torch.Tensor:
    """Which of `size` places are masked [batch, size]: spans of a length, about `probability` of the places in all."""
    if probability <= 0 or length > size:
        return torch.zeros(batch, size, dtype=torch.bool, device=device)
    wanted = probability * size / length
    counts = (wanted + torch.rand(batch, 1, device=device)).floor().clamp(min=at_least)
    most = max(int(wanted) + 1, at_least)
    starts = torch.randint(0, size - length + 1, (batch, most, 1), device=device)
    used = torch.arange(most, device=device) < counts
    places = torch.arange(size, device=device)
    return ((places >= starts) & (places < starts + length) & used[..., None]).any(1)
