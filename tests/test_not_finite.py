"""Logits that are not finite are no labels and no transcripts: their rows are skipped, and the others are as ever."""

import numpy as np
import pytest
import torch
from stages import ENGLISH, label, rows_of
from test_decoding import enliven

from distil_whisper import labelling
from distil_whisper.decoding import NOT_FINITE, Decoder
from distil_whisper.models import load_whisper
from distil_whisper.sequential import Sequential
from distil_whisper.transcribers import Chunked, ShortForm

TOLD = ("hi", "transcribe")


@pytest.fixture(scope="module")
def whisper(toy_teacher):
    return enliven(load_whisper(str(toy_teacher), device="cpu"))


@pytest.mark.parametrize(("beams", "timestamps", "drafts"), [(1, False, False), (1, True, True), (3, True, False)])
def test_a_window_without_finite_logits_has_a_problem(whisper, beams, timestamps, drafts):
    decoder = Decoder(whisper, num_beams=beams, max_label_length=8, return_timestamps=timestamps)
    waveforms = torch.randn(3, whisper.window.samples, generator=torch.Generator().manual_seed(0))
    texts = {"texts": [" one two"] * 3} if drafts else {}
    expected = decoder(waveforms, *TOLD, **texts)
    waveforms[1] = torch.nan
    found = decoder(waveforms, *TOLD, **texts)
    assert [row.problem for row in found] == [None, NOT_FINITE, None]
    assert [found[row].ids for row in (0, 2)] == [expected[row].ids for row in (0, 2)]


def made(kind, whisper):
    """A transcriber of windows of 4 s."""
    if kind is ShortForm:
        return ShortForm(Decoder(whisper, max_label_length=8), whisper, 3)
    return kind(whisper, 3, *([4.0] if kind is Chunked else []), max_label_length=8)


@pytest.mark.parametrize("kind", [ShortForm, Chunked, Sequential])
def test_a_recording_without_finite_logits_has_a_problem(whisper, kind):
    draw = np.random.default_rng(0)
    seconds = 3 if kind is ShortForm else 6
    noises = [(draw.standard_normal(seconds * 16_000) * 0.1).astype(np.float32) for _ in range(3)]
    transcriber = made(kind, whisper)
    expected = transcriber(noises, *TOLD, ["a", "b", "c"])
    noises[1][100:] = np.nan
    found = transcriber(noises, *TOLD, ["a", "b", "c"])
    assert [row.problem for row in found] == [None, NOT_FINITE, None]
    assert [found[row].text for row in (0, 2)] == [expected[row].text for row in (0, 2)]


def test_its_row_is_not_labelled_but_skipped(taught, speech_folder, monkeypatch, tmp_path):
    expected, read, count = rows_of(label(taught, speech_folder, tmp_path / "whole", *ENGLISH)), labelling.decode, []

    def poisoned(*given):
        count.append(read(*given))
        return count[-1] * np.float32(np.nan if len(count) == 2 else 1)

    monkeypatch.setattr(labelling, "decode", poisoned)
    folder = label(
        taught, speech_folder, tmp_path / "out", *ENGLISH, "--max_skipped", 50, "--dataloader_num_workers", 0
    )
    assert rows_of(folder) == [*expected[:1], *expected[2:]]
    assert any(NOT_FINITE in path.read_text() for path in folder.rglob("*.json*"))
