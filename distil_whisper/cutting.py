"""Utterances that the teacher got wrong, cut out of packed windows: audio, text and times."""

import re
from collections.abc import Callable, Iterator

import numpy as np

from distil_whisper.alignment import word_owners
from distil_whisper.normalisation import Normaliser
from distil_whisper.tokens import TIMESTAMP_MARK

REMOVED = "removed_spans"  # a key of rows that were cut: [start, end] in seconds of what their audio loses
_PARTS = ("utterance_ids", "utterance_starts", "utterance_texts", "utterance_wer")


def cut_utterances(row: dict, bad: set[int], normaliser: Normaliser) -> dict | None:
    """A row of a packed window without some of its utterances; None where that cannot be done with certainty.

    Words go with the utterance that the alignment gives them to, and timestamps behind a removed utterance move. It
    cannot be done where normalisation joins words of the transcript, where a segment holds words that stay and words
    that go, and where nothing would stay.
    """
    texts, starts = row["utterance_texts"], row["utterance_starts"]
    if len(bad) == len(texts) or any(text is None for text in texts):
        return None
    pieces = _pieces(row["whisper_transcript"], normaliser.spaceless)
    owners = _owners_of_pieces(pieces, texts, normaliser)
    if owners is None:
        return None
    ends = [*starts[1:], float("inf")]
    spans = [[starts[part], ends[part]] for part in sorted(bad)]
    transcript = _without(pieces, [owner in bad for owner in owners], _mover(spans))
    if transcript is None:
        return None
    kept = [part for part in range(len(texts)) if part not in bad]
    parts = {name: [row[name][part] for part in kept] for name in _PARTS if row.get(name)}
    parts["utterance_starts"] = [_mover(spans)(start) for start in parts["utterance_starts"]]
    figures = dict.fromkeys(("wer", "errors", "reference_words"))
    return {**row, **parts, **figures, "whisper_transcript": transcript, "whisper_token_ids": None, REMOVED: spans}


def cut_samples(samples: np.ndarray, spans: list[list[float]] | None, sampling_rate: int) -> np.ndarray:
    """Samples without the spans, which are in seconds."""
    for start, end in reversed(spans or []):
        last = len(samples) if end == float("inf") else round(end * sampling_rate)
        samples = np.concatenate([samples[: round(start * sampling_rate)], samples[last:]])
    return samples


def _pieces(transcript: str, spaceless: bool) -> list[str | float]:
    """Words (characters, where no spaces are written) with the space before them, and times in seconds, in order."""
    pieces: list[str | float] = []
    for position, part in enumerate(TIMESTAMP_MARK.split(transcript)):
        pieces += [float(part)] if position % 2 else re.findall(r"\s*\S" if spaceless else r"\s*\S+", part)
    return pieces


def _owners_of_pieces(pieces: list[str | float], texts: list[str], normaliser: Normaliser) -> list[int | None] | None:
    """The utterance of each word, None for times; None altogether where words cannot be told apart."""
    counts = [0 if isinstance(piece, float) else len(normaliser(piece).split()) for piece in pieces]
    apart = [word for piece in pieces if isinstance(piece, str) for word in normaliser(piece).split()]
    together = normaliser("".join(piece if isinstance(piece, str) else " " for piece in pieces)).split()
    if apart != together:
        return None
    owners_of_words = word_owners([normaliser(text).split() for text in texts], apart)
    owners: list[int | None] = []
    begin, latest = 0, 0
    for piece, count in zip(pieces, counts, strict=True):
        mine = set(owners_of_words[begin : begin + count]) or {latest}
        if len(mine) > 1:
            return None
        begin, latest = begin + count, next(iter(mine))
        owners.append(None if isinstance(piece, float) else latest)
    return owners


def _without(pieces: list[str | float], goes: list[bool], move: Callable[[float], float]) -> str | None:
    """The transcript of what stays; None if nothing does, or if of a segment (between two times) only a part does."""
    transcript = ""
    for start, words, end in _segments(list(zip(pieces, goes, strict=True))):
        marked = start is not None or end is not None
        if marked and len({gone for _, gone in words}) > 1:
            return None
        staying = "".join(word for word, gone in words if not gone)
        if staying or (not words and end is None):  # a last segment may have nothing but its beginning
            transcript += f"{_mark(start, move)}{staying}{_mark(end, move)}"
    return transcript or None


def _segments(pieces: list[tuple[str | float, bool]]) -> Iterator[tuple[float | None, list, float | None]]:
    """(start, words, end); times are None where none was written."""
    start, words = None, []
    for piece, gone in pieces:
        if isinstance(piece, str):
            words.append((piece, gone))
        elif words:
            yield start, words, piece
            start, words = None, []
        else:
            start = piece
    yield start, words, None


def _mark(seconds: float | None, move: Callable[[float], float]) -> str:
    return "" if seconds is None else f"<|{round(move(seconds) / 0.02) * 0.02:.2f}|>"


def _mover(spans: list[list[float]]) -> Callable[[float], float]:
    """From a time in the window to the time in what is left of it."""
    return lambda time: time - sum(max(0.0, min(time, end) - start) for start, end in spans)
