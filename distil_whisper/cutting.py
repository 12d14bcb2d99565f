"""Utterances that the teacher got wrong, cut out of packed windows: audio, text and times."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from distil_whisper.alignment import Errors, WordOwners, count_errors, word_errors, word_owners, worst
from distil_whisper.normalisation import Normaliser
from distil_whisper.tokens import TIME_PRECISION, TIMESTAMP_MARK

REMOVED = "removed_spans"  # a key of rows that were cut: [start, end] in seconds of what their audio loses
# How far a segment may reach into a neighbour's audio, in seconds and as a share of its length: timestamps are rough,
# and often stand somewhere in the silence where two recordings meet. benchmarks/cutting.py shows what it does.
COLLAR, COLLAR_SHARE = 0.3, 0.25
CLEAR_COLLAR = 0.1  # the same, shorter than a word, of segments with words of which only the times say whose they are
_PARTS = ("utterance_ids", "utterance_starts", "utterance_texts")
_INF = float("inf")


@dataclass(frozen=True)
class Segment:
    """What is said from start to end (seconds; the end may be inf), and its words as they are normalised."""

    text: str
    words: list[str]
    start: float
    end: float

    def utterances(self, starts: list[float], collar: float = COLLAR) -> slice:
        """The utterances whose audio it lies in, but for so many seconds."""
        collar = min(collar, COLLAR_SHARE * (self.end - self.start))
        middle = (self.start + self.end) / 2
        found = [
            part
            for part, (start, end) in enumerate(pairwise([*starts, _INF]))
            if min(self.end, end) - max(self.start, start) > collar or start <= middle < end
        ]
        return slice(found[0], found[-1] + 1)

    def written(self) -> str:
        """Its part of a transcript."""
        return f"{_mark(self.start)}{self.text}{_mark(self.end)}"


def cut_utterances(
    row: dict, threshold: float, normaliser: Normaliser, units: Callable[[str], list[str]] = str.split
) -> dict | None:
    """A row of a packed window without the utterances that have more errors than a threshold, in percent of units.

    The row itself where none has more. None where it cannot be done with certainty: where an utterance's transcript
    has no words, timestamps do not rise, a segment lies in audio that stays and in audio that goes, alignments of
    least cost differ in whether a word stays or goes, or nothing stays. Without timestamps all of the text is one
    segment. No segment is split by its text: words of a transcript may stand on the wrong side of a border.
    """
    starts = row["utterance_starts"]
    references = [normaliser(text or "").split() for text in row["utterance_texts"]]
    segments = _segments(row["whisper_transcript"] or "", normaliser)
    if not all(references) or not segments or not _rise(segments):
        return None
    owners = word_owners(references, _words(segments))
    owner = _owner_of_each_word(segments, owners, starts)
    if owner is None:
        return None
    words = np.array(_words(segments), object)
    pairs = [(" ".join(told), " ".join(words[owner == part])) for part, told in enumerate(references)]
    bad = np.array([count_errors(units(told), units(said)).rate > threshold for told, said in pairs])
    if not bad.any():
        return row
    kept = _kept(segments, bad, owners, owner, starts)
    return kept and _without(row, bad, kept, pairs, normaliser.name)


def cut_samples(samples: np.ndarray, spans: list[list[float]] | None, sampling_rate: int) -> np.ndarray:
    """Samples without the spans, which are in seconds."""
    for start, end in reversed(spans or []):
        last = len(samples) if end == float("inf") else round(end * sampling_rate)
        samples = np.concatenate([samples[: round(start * sampling_rate)], samples[last:]])
    return samples


def _segments(transcript: str, normaliser: Normaliser) -> list[Segment]:
    """The segments of a transcript; none where one has no beginning. A last one may have no end, and no words yet."""
    before, *parts = TIMESTAMP_MARK.split(transcript)  # text, seconds, text, seconds, ..., text
    if not parts:
        return [Segment(before, normaliser(before).split(), 0.0, _INF)]
    if before.strip():
        return []
    texts, times = parts[1::2], [*map(float, parts[::2]), _INF]
    opened = not texts[-1].strip() and not "".join(texts[-2:-1]).strip()
    return [
        Segment(text, normaliser(text).split(), start, end)
        for text, (start, end) in zip(texts, pairwise(times), strict=True)
        if text.strip() or (end == _INF and opened)
    ]


def _words(segments: list[Segment]) -> list[str]:
    return [word for segment in segments for word in segment.words]


def _rise(segments: list[Segment]) -> bool:
    """Whether every segment takes time and none begins before another ends."""
    return all(segment.start < segment.end for segment in segments) and all(
        segment.end <= following.start for segment, following in pairwise(segments)
    )


def _owner_of_each_word(segments: list[Segment], owners: WordOwners, starts: list[float]) -> np.ndarray | None:
    """The utterance of each word, by the times of its segment, else by the alignments; None where they do not tell."""
    owner = np.where((owners.claimed.sum(0) == 1) & ~owners.between, owners.claimed.argmax(0), -1)
    first = 0
    for segment in segments:
        mine, last = segment.utterances(starts), first + len(segment.words)
        if mine.stop - mine.start == 1:
            owner[first:last] = mine.start
        elif not ((owner[first:last] >= mine.start) & (owner[first:last] < mine.stop)).all():
            return None
        first = last
    return owner


def _kept(
    segments: list[Segment], bad: np.ndarray, owners: WordOwners, owner: np.ndarray, starts: list[float]
) -> list[Segment] | None:
    """The segments that stay; None where that is in doubt, or none does."""
    if (owners.claimed & (bad[:, None] != bad[owner])).any():
        return None
    kept, first = [], 0
    for segment in segments:
        mine, last = segment.utterances(starts), first + len(segment.words)
        claimed = owners.claimed[mine, first:last].any(0)
        if not claimed.all():
            mine = segment.utterances(starts, CLEAR_COLLAR)
        if last > first and not claimed.any():  # nothing but rough times says that it is not a neighbour's
            mine = slice(max(mine.start - 1, 0), mine.stop + 1)
        if bad[mine].any() and not bad[mine].all():
            return None
        kept += [] if bad[mine].any() else [segment]
        first = last
    return kept if _words(kept) else None


def _without(
    row: dict, bad: np.ndarray, segments: list[Segment], pairs: list[tuple[str, str]], normaliser: str
) -> dict | None:
    """The row of what stays; None where its timestamps would not rise."""
    starts = row["utterance_starts"]
    spans = [[start, end] for (start, end), goes in zip(pairwise([*starts, _INF]), bad, strict=True) if goes]
    move, stay = _mover(spans), np.flatnonzero(~bad)
    moved = [
        replace(segment, start=_on_grid(move(segment.start)), end=_on_grid(move(segment.end))) for segment in segments
    ]
    if not _rise(moved):
        return None
    errors = [word_errors(*pairs[part]) for part in stay]
    whole, duration = sum(errors, Errors(0, 0)), row.get("duration")
    return {
        **row,
        **{name: [row[name][part] for part in stay] for name in _PARTS if row.get(name)},
        "utterance_starts": [move(starts[part]) for part in stay],
        "utterance_wer": [pair.rate for pair in errors],
        "wer": worst(errors).rate,
        "errors": whole.errors,
        "reference_words": whole.reference_words,
        "normalizer": normaliser,
        "duration": duration and move(duration),
        "whisper_transcript": "".join(segment.written() for segment in moved),
        "whisper_token_ids": None,
        REMOVED: spans,
    }


def _on_grid(seconds: float) -> float:
    """The nearest time that a timestamp token has."""
    return seconds if seconds == _INF else round(seconds / TIME_PRECISION) * TIME_PRECISION


def _mark(seconds: float) -> str:
    return "" if seconds == _INF else f"<|{seconds:.2f}|>"


def _mover(spans: list[list[float]]) -> Callable[[float], float]:
    """From a time in the window to the time in what is left of it."""
    return lambda time: time - sum(max(0.0, min(time, end) - start) for start, end in spans)
