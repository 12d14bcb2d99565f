"""Errors of one pair of texts, and whose words are whose in a window of several utterances."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein


@dataclass(frozen=True)
class Errors:
    """The errors of one pair and what they are counted against (words, or characters)."""

    errors: int
    reference_words: int

    @property
    def rate(self) -> float:
        """Errors in percent of the reference words."""
        return percent(self.errors, self.reference_words)


def word_errors(reference: str, hypothesis: str) -> Errors:
    """Substituted, deleted and inserted words of one pair of texts, which are compared as they are."""
    return _distance(reference.split(), hypothesis.split())


def character_errors(reference: str, hypothesis: str) -> Errors:
    """Substituted, deleted and inserted characters of one pair of texts, which are compared as they are."""
    return _distance(reference.strip(), hypothesis.strip())


def characters(text: str) -> list[str]:
    """A text as characters without the spaces between words."""
    return list("".join(text.split()))


def utterance_errors(
    references: list[str],
    hypothesis: str,
    normaliser: Callable[[str], str],
    units: Callable[[str], list[str]] = str.split,
) -> list[Errors]:
    """Errors of each utterance of a packed window, from one alignment of all their words to its transcript.

    units cuts a normalised text into what is counted: words, or characters. A unit that was inserted counts for the
    utterance of the unit before it (the first one's at the start).
    """
    words, spoken = [units(normaliser(reference)) for reference in references], units(normaliser(hypothesis))
    if len(words) == 1:
        return [_distance(words[0], spoken)]
    counts = [0] * len(words)
    owner_of = _owners(words)
    for edit in Levenshtein.editops([word for part in words for word in part], spoken):
        counts[owner_of(edit.src_pos - (edit.tag == "insert"))] += 1
    return [Errors(count, len(part)) for count, part in zip(counts, words, strict=True)]


def word_owners(references: list[list[str]], hypothesis: list[str]) -> list[int]:
    """Which of the utterances each word of a transcript belongs to, by the alignment that counts its errors."""
    owner_of = _owners(references)
    owners = [0] * len(hypothesis)
    for code in Levenshtein.opcodes([word for part in references for word in part], hypothesis):
        for offset, place in enumerate(range(code.dest_start, code.dest_end)):
            owners[place] = owner_of(code.src_start - 1 if code.tag == "insert" else code.src_start + offset)
    return owners


def worst(errors: list[Errors]) -> Errors:
    """The pair with the highest rate."""
    return max(errors, key=lambda pair: pair.rate)


def percent(errors: int, total: int) -> float:
    """Errors in percent of what they are counted against; of nothing, any error is 100."""
    if total == 0:
        return 100.0 if errors else 0.0
    return 100.0 * errors / total


def _owners(parts: list[list[str]]) -> Callable[[int], int]:
    """From the place of a word among the words of all parts to its part."""
    ends = np.cumsum([len(part) for part in parts])
    return lambda place: min(int(np.searchsorted(ends, max(place, 0), side="right")), len(parts) - 1)


def _distance(reference: Sequence, hypothesis: Sequence) -> Errors:
    return Errors(Levenshtein.distance(reference, hypothesis), len(reference))
