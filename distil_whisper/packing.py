"""Windows for the teacher: utterances of one recording or speaker packed together, long recordings cut."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

OPEN_WINDOWS = 64  # of different recordings that are filled at a time; the one begun first is closed beyond that
_FRAME_S = 0.02  # step in which a quiet place to cut is looked for, and a fifth of what is averaged there


@dataclass(frozen=True)
class Utterance:
    """A row of the source with its audio decoded (mono, the model's rate). told: the language and the task that the
    teacher is told. after_gap: the row before it of the same recording was left out."""

    row_id: str
    recording_id: str
    row: dict
    samples: np.ndarray
    told: tuple[str | None, str | None] = (None, None)
    after_gap: bool = False


@dataclass(frozen=True)
class WindowAudio:
    """What the teacher hears at once: parts of one recording, where each begins in the window (in samples), and where
    the window begins in its recording (in seconds, known for cut recordings only). flac: the samples as a file.
    earlier: the row that was labelled of it with a smaller limit of tokens. in_between: it has none, and others after
    it may."""

    parts: list[Utterance]
    starts: list[int]
    samples: np.ndarray
    row_id: str
    window_start: float = 0.0
    cut: bool = False
    flac: bytes | None = None
    earlier: dict | None = None
    in_between: bool = False

    @property
    def is_labelled(self) -> bool:
        """Whether its earlier row stays, because its label came to an end."""
        return self.earlier is not None and not self.earlier["truncated"]

    @property
    def recording_id(self) -> str:
        """Whose audio it is."""
        return self.parts[0].recording_id

    @property
    def told(self) -> tuple[str | None, str | None]:
        """The language and the task of all its parts."""
        return self.parts[0].told

    @property
    def after_gap(self) -> bool:
        """Whether what comes before it in its recording was left out."""
        return self.parts[0].after_gap and self.window_start == 0.0


def single(utterance: Utterance) -> WindowAudio:
    """One utterance as a window of its own."""
    return WindowAudio([utterance], [0], utterance.samples, utterance.row_id)


def pack(utterances: Iterable[Utterance], window_samples: int) -> Iterator[WindowAudio]:
    """Fill windows with the utterances of each recording in their order, none cut and none reordered.

    Filling each window until the next utterance does not fit needs the fewest windows that keep the order. Utterances
    of different recordings may be mixed in the input. None may be longer than the window. Another language or task
    begins a new window.
    """
    opened: OrderedDict[str, list[Utterance]] = OrderedDict()
    for utterance in utterances:
        parts = opened.get(utterance.recording_id, [])
        size = sum(len(part.samples) for part in parts) + len(utterance.samples)
        if parts and (size > window_samples or utterance.told != parts[0].told):
            yield _join(opened.pop(utterance.recording_id))
            parts = []
        opened[utterance.recording_id] = [*parts, utterance]
        if len(opened) > OPEN_WINDOWS:
            yield _join(opened.popitem(last=False)[1])
    for parts in opened.values():
        yield _join(parts)


def split(utterance: Utterance, window_samples: int, sampling_rate: int) -> Iterator[WindowAudio]:
    """Cut a long recording into windows at its quietest places: in the second half of each window the end of the last
    stretch that is as quiet as pauses are there."""
    samples, begin = utterance.samples, 0
    while begin < len(samples):
        end = len(samples)
        if end - begin > window_samples:
            end = begin + _quiet_place(samples[begin : begin + window_samples], sampling_rate)
        seconds = begin / sampling_rate
        row_id = f"{utterance.row_id}@{seconds:.2f}"
        yield WindowAudio([utterance], [0], samples[begin:end], row_id, seconds, cut=True)
        begin = end


def _join(parts: list[Utterance]) -> WindowAudio:
    starts = np.cumsum([0, *(len(part.samples) for part in parts[:-1])]).tolist()
    return WindowAudio(parts, starts, np.concatenate([part.samples for part in parts]), parts[0].row_id)


def _quiet_place(samples: np.ndarray, sampling_rate: int) -> int:
    """The sample at which a window is best cut: the middle of its last quiet stretch in the second half."""
    frame = int(_FRAME_S * sampling_rate)
    energy = np.add.reduceat(samples.astype(np.float64) ** 2, np.arange(0, len(samples), frame))
    smooth = np.convolve(energy, np.ones(5) / 5, mode="same")
    half = len(smooth) // 2
    later = smooth[half:]
    quiet = np.flatnonzero(later <= max(later.min() * 2, later.mean() * 0.01))
    last = quiet[-1]
    first = last
    while first - 1 in quiet:
        first -= 1
    return max(frame, (half + (first + last) // 2) * frame)
