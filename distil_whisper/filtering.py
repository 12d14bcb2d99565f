"""Which rows are trained on, and a table of why the others are not."""

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
from rapidfuzz.distance import Levenshtein

from distil_whisper.examples import LabelColumns, Labeller
from distil_whisper.metrics import Errors, word_errors
from distil_whisper.normalisation import Normaliser
from distil_whisper.progress import bar
from distil_whisper.tokens import plain_text

KEPT = "kept"
ROWS_PER_TASK = 5_000


@dataclass(frozen=True)
class FilterSettings:
    """What is left out of training. wer_threshold is in percent, None for no threshold."""

    wer_threshold: float | None
    max_label_length: int | None
    window_seconds: float
    drop_truncated: bool = True
    drop_empty: bool = True


class RowFilter:
    """Says of a row (its audio is not needed) why it is left out, or that it is kept."""

    def __init__(self, labeller: Labeller, columns: LabelColumns, normaliser: Normaliser, settings: FilterSettings):
        self.labeller = labeller
        self.columns = columns
        self.normaliser = normaliser
        self.settings = settings

    def __call__(self, row: dict) -> str:
        """KEPT, or the reason in words that the table shows."""
        settings = self.settings
        if (row.get("duration") or 0.0) > settings.window_seconds:
            return "audio longer than the window"
        if self.columns.pseudo and settings.drop_truncated and row.get("truncated"):
            return "pseudo-label truncated"
        target = self.labeller.target(row, self.columns)
        words = self.labeller.grammar.without_timestamps(target).ids
        if not words and settings.drop_empty:
            return "empty transcript"
        if settings.max_label_length is not None and len(target.ids) > settings.max_label_length:
            return "label longer than --max_label_length"
        if self.labeller.frame(row, self.columns, target) is None:
            return "label longer than the decoder's positions"
        if self.columns.pseudo and settings.wer_threshold is not None:
            rate = self.word_error_rate(row)
            if rate is not None and rate > settings.wer_threshold:
                return "WER above --wer_threshold"
        return KEPT

    def word_error_rate(self, row: dict) -> float | None:
        """WER of the pseudo-label in percent; of a packed window, that of its worst utterance. None without a
        transcript, and for a translation, whose transcript is in another language."""
        if row.get("task") == "translate" or self.columns.text is None:
            return None
        if row.get("wer") is not None and row.get("normalizer") == self.normaliser.name:
            return row["wer"]
        utterances = row.get("utterance_texts") or [row.get(self.columns.text)]
        if any(text is None for text in utterances):
            return None
        return worst(utterance_errors(utterances, plain_text(row["whisper_transcript"] or ""), self.normaliser)).rate


def utterance_errors(references: list[str], hypothesis: str, normaliser: Callable[[str], str]) -> list[Errors]:
    """Word errors of each utterance of a packed window, from one alignment of all their words to its transcript.

    A word that was inserted counts for the utterance of the word before it (the first one's at the start).
    """
    if len(references) == 1:
        return [word_errors(normaliser(references[0]), normaliser(hypothesis))]
    words = [normaliser(reference).split() for reference in references]
    bounds = np.cumsum([0, *(len(part) for part in words)])
    counts = [0] * len(words)
    everything = [word for part in words for word in part]
    for edit in Levenshtein.editops(everything, normaliser(hypothesis).split()):
        position = edit.src_pos - 1 if edit.tag == "insert" else edit.src_pos
        owner = int(np.searchsorted(bounds, max(position, 0), side="right")) - 1
        counts[min(owner, len(words) - 1)] += 1
    return [Errors(count, end - start) for count, (start, end) in zip(counts, pairwise(bounds.tolist()), strict=True)]


def worst(errors: list[Errors]) -> Errors:
    """The pair with the highest rate."""
    return max(errors, key=lambda pair: pair.rate)


def keep_rows(dataset, row_filter: RowFilter, num_proc: int) -> tuple[np.ndarray, Counter]:
    """Indices of the rows of a map-style dataset (without its audio) that are kept, and the count of each reason.

    Several processes are spawned, not forked: a fork after torch has started its threads can hang for ever.
    """
    spans = [(start, min(start + ROWS_PER_TASK, len(dataset))) for start in range(0, len(dataset), ROWS_PER_TASK)]
    tasks = [(dataset, row_filter, span) for span in spans]
    workers = min(num_proc, len(tasks))
    options = {"total": len(tasks), "desc": "filtering", "unit": f" x {ROWS_PER_TASK} rows"}
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            verdicts = list(bar(pool.map(_verdicts, tasks), **options))
    else:
        verdicts = list(bar(map(_verdicts, tasks), **options))
    reasons = [reason for part in verdicts for reason in part]
    return np.flatnonzero([reason == KEPT for reason in reasons]), Counter(reasons)


def table(counts: Iterable[tuple[str, Counter]]) -> str:
    """What was kept of each dataset, and why the rest was not."""
    lines = []
    for name, counter in counts:
        total = sum(counter.values())
        lines.append(f"{name}: {counter[KEPT]} of {total} rows kept")
        lines += [f"  {count:>8}  {reason}" for reason, count in counter.most_common() if reason != KEPT]
    return "\n".join(lines)


def _verdicts(task) -> list[str]:
    dataset, row_filter, (start, end) = task
    return [row_filter(row) for row in dataset.select(range(start, end))]
