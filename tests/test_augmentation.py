"""SpecAugment against transformers' own statistics; noise and speed on waveforms, with the timestamps that follow."""

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperTokenizer

from distil_whisper.augmentation import SpecAugment, WaveformAugment, at_speed
from distil_whisper.examples import LabelColumns, Labeller, LabelSettings
from distil_whisper.tokens import Grammar


def settings(**fields) -> SpecAugment:
    return SpecAugment.from_config(WhisperConfig(apply_spec_augment=True, **fields))


def masked_share(augment: SpecAugment, batch: int = 400) -> tuple[float, float]:
    """Share of the frames and of the mel bins that are masked throughout."""
    torch.manual_seed(0)
    masked = augment(torch.ones(batch, 80, 300)) == 0
    return masked.all(1).float().mean().item(), masked.all(2).float().mean().item()


def test_masks_the_share_and_the_lengths_that_the_config_says():
    frames, bins = masked_share(settings(mask_time_prob=0.2, mask_time_length=10, mask_time_min_masks=0))
    assert 0.15 < frames < 0.2 and bins == 0  # spans may overlap
    frames, bins = masked_share(settings(mask_time_prob=0.0, mask_feature_prob=0.25, mask_feature_length=5))
    assert frames == 0 and 0.18 < bins < 0.25


def test_min_masks_are_made_even_where_the_probability_rounds_to_none():
    frames, _ = masked_share(settings(mask_time_prob=1e-6, mask_time_length=30, mask_time_min_masks=2))
    assert 0.15 < frames <= 0.2


def test_masks_are_contiguous_and_the_rest_is_untouched():
    torch.manual_seed(1)
    features = torch.randn(3, 80, 300)
    augmented = settings(mask_time_prob=1e-6, mask_time_length=30, mask_time_min_masks=1)(features)
    masked = (augmented == 0).all(1)
    assert (masked.sum(1) == 30).all()
    assert all(torch.nonzero(row).flatten().diff().eq(1).all() for row in masked)
    assert torch.equal(
        augmented[:, :, :][~masked[:, None].expand_as(features)], features[~masked[:, None].expand_as(features)]
    )


def test_the_same_seed_draws_the_same_masks():
    augment, features = settings(mask_time_prob=0.1), torch.ones(4, 80, 300)
    torch.manual_seed(7)
    first = augment(features)
    torch.manual_seed(7)
    assert torch.equal(first, augment(features))
    assert not torch.equal(first, augment(features))


def test_noise_has_the_ratio_that_was_asked_for():
    tone = np.sin(np.arange(32_000) / 5).astype(np.float32)
    noisy, speed = WaveformAugment(1.0, (20.0, 20.0))(tone, 64_000, np.random.default_rng(0))
    ratio = 10 * np.log10(np.mean(tone**2) / np.mean((noisy - tone) ** 2))
    assert speed == 1.0 and abs(ratio - 20) < 0.2 and noisy.dtype == np.float32


@pytest.mark.parametrize("speed", [0.8, 1.25])
def test_speed_changes_the_length(speed):
    samples = np.ones(16_000, np.float32)
    played, factor = WaveformAugment(speed=(speed, speed))(samples, 32_000, np.random.default_rng(0))
    assert factor == speed and abs(len(played) - 16_000 / speed) <= 1


def test_nothing_is_slowed_beyond_the_window():
    played, factor = WaveformAugment(speed=(0.5, 0.5))(np.ones(30_000, np.float32), 32_000, np.random.default_rng(0))
    assert len(played) <= 32_000 and factor == 30_000 / 32_000


def test_timestamps_follow_the_speed(toy_teacher):
    grammar = Grammar(WhisperTokenizer.from_pretrained(toy_teacher), True, 128)
    target = grammar.encode_pseudo_label("<|0.00|> one<|1.00|><|1.00|> two<|2.50|>")
    assert grammar.decode(at_speed(target, 1.25, grammar, 4.0).ids) == "<|0.00|> one<|0.80|><|0.80|> two<|2.00|>"
    labeller = Labeller(grammar, LabelSettings(1.0, 0.0, 0))
    row = {"whisper_transcript": "<|0.00|> one<|1.00|>"}
    columns = LabelColumns(None, True, "en", "transcribe")
    assert grammar.timestamp(2.0) in labeller.sequence(row, columns, "row", 0, speed=0.5).labels


@pytest.mark.parametrize(("window", "last"), [(30.0, "30.00"), (4.0, "4.00")])
def test_no_mark_leaves_the_window(toy_teacher, window, last):
    """Whisper's marks may lie after the audio's end: slower audio would take them beyond the last timestamp."""
    grammar = Grammar(WhisperTokenizer.from_pretrained(toy_teacher), True, 128)
    target = grammar.encode_pseudo_label("<|0.00|> one<|1.00|><|1.00|> two<|29.00|>")
    slow = at_speed(target, 0.9, grammar, window)
    assert grammar.decode(slow.ids) == f"<|0.00|> one<|1.12|><|1.12|> two<|{last}|>"
