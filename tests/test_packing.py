"""Windows: utterances packed, long recordings cut, nothing lost, mixed or reordered."""

from itertools import pairwise

import numpy as np
import pytest

from distil_whisper import packing
from distil_whisper.packing import Utterance, pack, single, split

RATE, WINDOW = 16_000, 4 * 16_000


def utterance(index, recording, length):
    """Samples that say whose they are."""
    return Utterance(f"row-{index}", recording, {"number": index}, np.full(length, index, np.float32))


def mixed(seed, count=60, recordings=5):
    """Utterances of several recordings, mixed with one another."""
    draw = np.random.default_rng(seed)
    return [
        utterance(index, f"recording-{draw.integers(recordings)}", int(draw.integers(1, 101)))
        for index in range(count)
    ]


def numbers(window):
    return [part.row["number"] for part in window.parts]


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ([40, 60], [[0, 1]]),  # exactly the window
        ([40, 61], [[0], [1]]),
        ([30, 30, 30, 30], [[0, 1, 2], [3]]),
        ([90, 20, 10, 80], [[0], [1, 2], [3]]),  # 10 would fit behind 90, but the order is kept
        ([100, 100], [[0], [1]]),
        ([5], [[0]]),
        ([], []),
    ],
)
def test_each_window_is_filled_until_the_next_utterance_does_not_fit(lengths, expected):
    windows = pack((utterance(index, "one", length) for index, length in enumerate(lengths)), 100)
    assert [numbers(window) for window in windows] == expected


def test_recordings_are_not_mixed_where_their_utterances_are():
    lengths = [("a", 40), ("b", 50), ("a", 40), ("b", 40), ("a", 40), ("c", 10)]
    windows = list(pack([utterance(index, *of) for index, of in enumerate(lengths)], 100))
    assert sorted(numbers(window) for window in windows) == [[0, 2], [1, 3], [4], [5]]
    assert [window.recording_id for window in windows if numbers(window) == [4]] == ["a"]


@pytest.mark.parametrize("open_windows", [1, 2, 64])
@pytest.mark.parametrize("seed", range(4))
def test_packing_loses_mixes_and_reorders_nothing(monkeypatch, seed, open_windows):
    monkeypatch.setattr(packing, "OPEN_WINDOWS", open_windows)
    utterances = mixed(seed)
    windows = list(pack(iter(utterances), 100))
    for recording in {u.recording_id for u in utterances}:
        of_it = [window for window in windows if window.recording_id == recording]
        assert [part for window in of_it for part in window.parts] == [
            u for u in utterances if u.recording_id == recording
        ]
        for window, following in pairwise(of_it):  # greedy: the next one had no room
            assert open_windows < 64 or len(window.samples) + len(following.parts[0].samples) > 100
    for window in windows:
        assert len(window.samples) <= 100
        assert window.row_id == window.parts[0].row_id and not window.cut and window.window_start == 0.0
        for part, start in zip(window.parts, window.starts, strict=True):
            assert (window.samples[start : start + len(part.samples)] == part.samples).all()


def test_as_many_recordings_as_are_open_bound_the_memory(monkeypatch):
    monkeypatch.setattr(packing, "OPEN_WINDOWS", 3)
    read = []
    first = next(pack((read.append(index) or utterance(index, f"{index}", 10) for index in range(100)), 100))
    assert numbers(first) == [0]  # the one begun first is closed
    assert len(read) == 4


def test_packing_is_lazy():
    read = []
    windows = pack((read.append(index) or utterance(index, "one", 60) for index in range(100)), 100)
    assert numbers(next(windows)) == [0] and read == [0, 1]


def test_one_utterance_is_a_window_of_its_own():
    alone = utterance(3, "one", 70)
    window = single(alone)
    assert window.samples is alone.samples and window.parts == [alone] and window.starts == [0]
    assert (window.row_id, window.recording_id, window.cut) == ("row-3", "one", False)


def recording(*parts, seed=0):
    """Speech-like noise and pauses in turn, from their seconds; and where the pauses are."""
    draw = np.random.default_rng(seed)
    samples, pauses, at = [], [], 0.0
    for index, seconds in enumerate(parts):
        loudness = 0.2 if index % 2 == 0 else 0.002
        samples.append((loudness * draw.standard_normal(int(seconds * RATE))).astype(np.float32))
        pauses += [(at, at + seconds)] if index % 2 else []
        at += seconds
    return Utterance("long", "long", {}, np.concatenate(samples)), pauses


@pytest.mark.parametrize("seed", range(6))
def test_a_long_recording_is_cut_in_its_pauses_and_nothing_is_lost(seed):
    draw = np.random.default_rng(seed)
    long, pauses = recording(*(draw.uniform(0.5, 1.2) if i % 2 == 0 else 0.3 for i in range(25)), seed=seed)
    windows = list(split(long, WINDOW, RATE))
    assert (np.concatenate([window.samples for window in windows]) == long.samples).all()
    assert all(len(window.samples) <= WINDOW for window in windows) and len(windows) > 3
    begins = np.cumsum([0, *(len(window.samples) for window in windows)])[:-1] / RATE
    for window, begin in zip(windows, begins, strict=True):
        assert window.window_start == pytest.approx(begin)
        assert window.row_id == f"long@{begin:.2f}" and window.recording_id == "long" and window.cut
    for begin in begins[1:]:
        assert any(start + 0.05 < begin < end - 0.05 for start, end in pauses)  # well inside of a pause
    for window in windows[:-1]:
        assert len(window.samples) >= WINDOW // 2


def test_the_last_pause_of_a_window_is_taken():
    long, pauses = recording(2.3, 0.3, 0.5, 0.3, 2.0)  # both pauses are in the second half of the first window
    first, second = split(long, WINDOW, RATE)
    assert pauses[1][0] < len(first.samples) / RATE < pauses[1][1]
    assert len(second.samples) == len(long.samples) - len(first.samples)


@pytest.mark.parametrize("samples", [np.zeros(11 * RATE, np.float32), np.full(11 * RATE, 0.5, np.float32)])
def test_a_recording_without_pauses_is_cut_all_the_same(samples):
    windows = list(split(Utterance("long", "long", {}, samples), WINDOW, RATE))
    assert sum(len(window.samples) for window in windows) == len(samples)
    assert all(WINDOW // 2 <= len(window.samples) <= WINDOW for window in windows[:-1])


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW])
def test_what_fits_is_not_cut(length):
    (window,) = split(Utterance("short", "short", {}, np.ones(length, np.float32)), WINDOW, RATE)
    assert len(window.samples) == length
