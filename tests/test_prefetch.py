"""Work ahead of its turn: in order, on so many threads, and never more than memory allows."""

import io
import threading
import time

import numpy as np
import pytest
import soundfile

from distil_whisper import prefetch as module
from distil_whisper.audio import decode, decoded_size
from distil_whisper.prefetch import ITEMS_AHEAD, prefetch


class Watched:
    """A function of sizes that counts what was begun and has not been taken."""

    def __init__(self):
        self.lock, self.ahead, self.most, self.most_items, self.threads = threading.Lock(), 0, 0, 0, set()
        self.items = 0

    def __call__(self, size: int) -> int:
        with self.lock:
            self.ahead, self.items = self.ahead + size, self.items + 1
            self.most, self.most_items = max(self.most, self.ahead), max(self.most_items, self.items)
            self.threads.add(threading.get_ident())
        time.sleep(0.002)
        return size

    def taken(self, size: int) -> None:
        with self.lock:
            self.ahead, self.items = self.ahead - size, self.items - 1


@pytest.mark.parametrize("sizes", [[1] * 60, [90] * 12, [150] * 6, [1, 90, 1, 1, 150, 1, 30, 30, 30, 30, 1] * 4])
def test_what_is_ahead_is_bounded_in_bytes_and_items(sizes, monkeypatch):
    monkeypatch.setattr(module, "BYTES_AHEAD", 100)
    watched, results = Watched(), []
    for size in prefetch(watched, sizes, 3, lambda size: size):
        watched.taken(size)
        results.append(size)
        time.sleep(0.003)
    assert results == sizes
    assert watched.most <= max(100, *sizes) + max(sizes)  # and the one that the caller has
    assert watched.most_items <= ITEMS_AHEAD * 3 + 2
    assert max(sizes) > 1 or len(watched.threads) == 3  # short ones are as far ahead as ever


def test_without_threads_nothing_is_ahead():
    begun = []
    results = prefetch(lambda item: begun.append(item) or item, iter(range(5)), 0)
    assert [(next(results), len(begun)) for _ in range(5)] == [(n, n + 1) for n in range(5)]


def test_an_error_comes_in_its_turn():
    def fail(item: int) -> int:
        if item == 3:
            raise KeyError(item)
        return item

    results = prefetch(fail, range(9), 2, lambda item: 10)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)


@pytest.mark.parametrize("kind", [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
@pytest.mark.parametrize("seconds", [1, 70])
def test_the_size_of_audio_is_known_before_it_is_decoded(kind, seconds, tmp_path):
    samples = np.random.default_rng(0).normal(0, 0.1, seconds * 48_000).astype(np.float32)
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 48_000, 1, kind[1], format=kind[0]) as file:
        for block in np.array_split(samples, seconds):  # more at once is too much for libsndfile's Opus
            file.write(block)
    audio = buffer.getvalue()
    (tmp_path / "audio").write_bytes(audio)
    needed = decode(audio, 16_000).nbytes
    for found in (decoded_size(audio, 16_000) - len(audio), decoded_size(str(tmp_path / "audio"), 16_000)):
        assert needed * 0.99 <= found <= (needed * 1.01 if len(audio) > 300_000 else 50 * len(audio))
    assert decoded_size(str(tmp_path / "missing"), 16_000) == decoded_size(None, 16_000) == 0
