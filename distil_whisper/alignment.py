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

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(self.errors + other.errors, self.reference_words + other.reference_words)


def word_errors(reference: str, hypothesis: str) -> Errors:
    """Substituted, deleted and inserted words of one pair of texts, which are compared as they are."""
    return count_errors(reference.split(), hypothesis.split())


def count_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> Errors:
    """Substituted, deleted and inserted words (or characters), as many as jiwer finds."""
    return Errors(Levenshtein.distance(reference, hypothesis), len(reference))


def utterance_errors(
    references: list[str],
    hypothesis: str,
    normaliser: Callable[[str], str],
    units: Callable[[str], list[str]] = str.split,
) -> list[Errors]:
    """Errors of each utterance of a packed window, from one alignment of all their words to its transcript.

    units cuts a normalised text into what is counted: words, or characters. A unit that was inserted counts for the
    utterance of the unit before it (the first one's at the start), and so does the space that characters are counted
    with between two utterances, which is no unit of either.
    """
    words, spoken = [units(normaliser(reference)) for reference in references], units(normaliser(hypothesis))
    if len(words) == 1:
        return [count_errors(words[0], spoken)]
    spaced = _with_spaces(words, units(" "))
    counts = [0] * len(words)
    owner_of = _owners(spaced)
    for edit in Levenshtein.editops([word for part in spaced for word in part], spoken):
        counts[owner_of(edit.src_pos - (edit.tag == "insert"))] += 1
    return [Errors(count, len(part)) for count, part in zip(counts, words, strict=True)]


@dataclass(frozen=True)
class WordOwners:
    """Whose each word of a window's transcript may be, by all least-cost alignments with its utterances' words.

    claimed [utterances, words]: some alignment gives the word to the utterance: it matches or replaces one of its
    words, or stands between two of them. between [words]: some alignment inserts the word between two utterances, so
    that it may be of either.
    """

    claimed: np.ndarray
    between: np.ndarray


def word_owners(references: list[list[str]], hypothesis: list[str]) -> WordOwners:
    """The owners of a transcript's words; every utterance must have a word.

    An edge of the alignment lies on a path of least cost where the costs before it, of it and after it make the least
    cost, so two tables of costs, from either end, tell of all paths at once.
    """
    numbers: dict[str, int] = {}
    reference, spoken = (
        np.array([numbers.setdefault(word, len(numbers)) for word in words], int)
        for words in ([word for part in references for word in part], hypothesis)
    )
    equal = reference[:, None] == spoken
    before, after = _costs(equal), _costs(equal[::-1, ::-1])[::-1, ::-1]
    least = before[-1, -1]
    aligned = before[:-1, :-1] + ~equal + after[1:, 1:] == least
    inserted = before[:, :-1] + 1 + after[:, 1:] == least  # by the place among the reference words
    firsts = np.cumsum([0, *(len(part) for part in references[:-1])])
    between, within = inserted[firsts[1:]].any(0), inserted.copy()
    within[firsts[1:]] = False
    claimed = np.logical_or.reduceat(aligned, firsts) | np.logical_or.reduceat(within, firsts)
    return WordOwners(claimed, between)


def worst(errors: list[Errors]) -> Errors:
    """The pair with the highest rate."""
    return max(errors, key=lambda pair: pair.rate)


def percent(errors: int, total: int) -> float:
    """Errors in percent of what they are counted against; each is 100 of nothing, as in jiwer."""
    return 100.0 * errors / max(total, 1)


def _with_spaces(parts: list[list[str]], space: list[str]) -> list[list[str]]:
    """The units of each part, with the space after it if others come: none where words are the units."""
    filled = [place for place, part in enumerate(parts) if part]
    return [part + space if part and place != filled[-1] else part for place, part in enumerate(parts)]


def _owners(parts: list[list[str]]) -> Callable[[int], int]:
    """From the place of a word among the words of all parts to its part."""
    ends = np.cumsum([len(part) for part in parts])
    return lambda place: min(int(np.searchsorted(ends, max(place, 0), side="right")), len(parts) - 1)


def _costs(equal: np.ndarray) -> np.ndarray:
    """The edit distance of each beginning of the reference from each beginning of the hypothesis, [one more, one more]
    than equal [reference words, hypothesis words], which says what matches."""
    places = np.arange(equal.shape[1] + 1)
    costs = [places]
    for matches in equal:
        best = costs[-1] + 1
        best[1:] = np.minimum(best[1:], costs[-1][:-1] + ~matches)
        costs.append(np.minimum.accumulate(best - places) + places)
    return np.array(costs)
