"""Which rows are trained on, and a table of why the others are not."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distil_whisper.alignment import utterance_errors
from distil_whisper.cutting import cut_utterances
from distil_whisper.errors import UserError
from distil_whisper.examples import LabelColumns, Labeller
from distil_whisper.multilingual import characters
from distil_whisper.normalisation import Normaliser, is_spaceless
from distil_whisper.tokens import compression_ratio, plain_text

KEPT = "kept"
UNREADABLE = f"{KEPT}, to be skipped in training: its label cannot be read"
CUT = "kept without the utterances above --wer_threshold"
MISMATCH = "another language than the teacher was told"


# What a teacher's own figures say against a row: the threshold, and whether values below or above it are left out.
LIMITS = {
    "min_avg_logprob": ("avg_logprob", "below"),
    "max_no_speech_prob": ("no_speech_prob", "above"),
    "max_compression_ratio": ("compression_ratio", "above"),
    "max_ngram_repeats": ("ngram_repeats", "above"),
    "min_chars_per_second": ("chars_per_second", "below"),
    "max_chars_per_second": ("chars_per_second", "above"),
}
NEEDED_COLUMNS = {  # of the hand-off dataset; the other figures are of the text
    "min_avg_logprob": "avg_logprob",
    "max_no_speech_prob": "no_speech_prob",
    "min_chars_per_second": "duration",
    "max_chars_per_second": "duration",
    "drop_language_mismatch": "detected_language",
}
NGRAM = 3  # words (characters where no spaces are written) of which repeats are counted


@dataclass(frozen=True)
class FilterSettings:
    """What is left out of training; None for no limit. wer_threshold is in percent of words, or of characters where
    by_characters; utterances above it are cut out of packed windows if cut_utterances."""

    wer_threshold: float | None
    max_label_length: int | None
    window_seconds: float
    drop_truncated: bool = True
    drop_empty: bool = True
    by_characters: bool = False
    cut_utterances: bool = False
    min_avg_logprob: float | None = None
    max_no_speech_prob: float | None = None
    max_compression_ratio: float | None = None
    max_ngram_repeats: int | None = None
    min_chars_per_second: float | None = None
    max_chars_per_second: float | None = None
    drop_language_mismatch: bool = False


class RowFilter:
    """Says of a row (its audio is not needed) why it is left out, or that it is kept."""

    def __init__(
        self,
        labeller: Labeller,
        columns: LabelColumns,
        normalisers: Callable[[str | None], Normaliser],
        settings: FilterSettings,
    ):
        self.labeller = labeller
        self.columns = columns
        self.normalisers = normalisers
        self.settings = settings

    def __call__(self, row: dict) -> str:
        """How it is kept (see is_kept), or the reason in words that the table shows. A label that cannot be read is
        for training to skip: what is broken counts for --max_skipped, what is unwanted does not. What is left of a row
        that utterances are cut out of passes the same filters again."""
        against = self.objection(row)
        if against is not None or not self.columns.pseudo:
            return against or KEPT
        cut = self._cut(row)
        if cut is row:
            return self.unchecked(row) or KEPT
        return self._above if cut is None or self._is_above(cut) else self.objection(cut) or CUT

    def objection(self, row: dict) -> str | None:
        """Why a row is left out whatever its transcript says (or UNREADABLE), None if nothing speaks against it."""
        settings = self.settings
        duration = known(row, "duration")
        if isinstance(duration, int | float) and duration > settings.window_seconds:  # a user's own may be a text
            return "audio longer than the window by column duration"
        if self.columns.pseudo and settings.drop_truncated and row.get("truncated"):
            return "pseudo-label truncated"
        untold = self.labeller.untold(row, self.columns)
        if untold is not None:
            return untold
        try:
            target = self.labeller.target(row, self.columns)
        except UserError:
            return UNREADABLE
        words = self.labeller.grammar.without_timestamps(target).ids
        if not words and settings.drop_empty:
            return "empty transcript"
        if settings.max_label_length is not None and len(target.ids) > settings.max_label_length:
            return "label longer than --max_label_length"
        if self.labeller.frame(row, self.columns, target) is None:
            return "label longer than the decoder's positions"
        return self.doubt(row) if self.columns.pseudo else None

    def trimmed(self, row: dict) -> dict:
        """A row that is kept, without the utterances that are to be cut out of it."""
        return (self._cut(row) or row) if self.columns.pseudo else row

    def doubt(self, row: dict) -> str | None:
        """Which of the teacher's own figures speaks against a row, None if none does."""
        settings = self.settings
        for name, (figure, side) in LIMITS.items():
            limit = getattr(settings, name)
            value = None if limit is None else self.figure(row, figure)
            if value is not None and (value < limit if side == "below" else value > limit):
                return f"{figure} {side} --{name}"
        detected, told = row.get("detected_language"), row.get("language")
        if settings.drop_language_mismatch and detected is not None and detected != told:
            return MISMATCH
        return None

    def limits(self) -> list[str]:
        """The reasons that the limits which were given have."""
        settings = self.settings
        names = [name for name in LIMITS if getattr(settings, name) is not None]
        given = [f"{' '.join(LIMITS[name])} --{name}" for name in names]
        given += [MISMATCH] if settings.drop_language_mismatch else []
        return given + ([self._above] if settings.wer_threshold is not None else [])

    def unchecked(self, row: dict) -> str | None:
        """That a row is kept although a limit was given on a figure that it lacks, None if there is no such limit."""
        settings = self.settings
        limited = {name: column for name, column in NEEDED_COLUMNS.items() if is_given(getattr(settings, name))}
        lacking = [LIMITS.get(name, (column,))[0] for name, column in limited.items() if known(row, column) is None]
        if settings.wer_threshold is not None and not self.is_comparable(row):
            lacking.append(self._rate)
        return f"{KEPT} unchecked: no {', '.join(dict.fromkeys(lacking))}" if lacking else None

    @property
    def _rate(self) -> str:
        return "CER" if self.settings.by_characters else "WER"

    @property
    def _above(self) -> str:
        return f"{self._rate} above --wer_threshold"

    def figure(self, row: dict, name: str) -> float | None:
        """One of the figures that limits are for; None where the row does not tell."""
        text = plain_text(row["whisper_transcript"] or "")
        if name == "compression_ratio":
            return compression_ratio(text)
        if name == "chars_per_second":
            duration = known(row, "duration")
            return len(text) / duration if duration else None
        if name == "ngram_repeats":
            spaceless = is_spaceless(self.labeller.language(row, self.columns))
            return ngram_repeats(characters(text) if spaceless else text.split())
        return known(row, name)

    def error_rates(self, row: dict) -> list[float]:
        """WER (or CER) of the pseudo-label in percent, of each utterance of a packed window. Empty without a
        transcript, and for a translation, whose transcript is in another language."""
        if not self.is_comparable(row):
            return []
        if self._is_counted(row):
            return row.get("utterance_wer") or [row["wer"]]
        normaliser = self.normaliser(row)
        spoken = plain_text(row["whisper_transcript"] or "")
        pairs = utterance_errors(self._texts(row), spoken, normaliser, self._units(normaliser))
        return [pair.rate for pair in pairs]

    def is_comparable(self, row: dict) -> bool:
        """Whether a row has error rates."""
        if row.get("task") == "translate" or self.columns.text is None:
            return False
        return self._is_counted(row) or None not in self._texts(row)

    def _is_counted(self, row: dict) -> bool:
        """Whether labelling has counted the errors, by the same normaliser."""
        rates = [known(row, "wer"), *(row.get("utterance_wer") or ())]
        is_lacking = any(rate is None or math.isnan(rate) for rate in rates)
        return not (is_lacking or self.settings.by_characters) and row.get("normalizer") == self.normaliser(row).name

    def _texts(self, row: dict) -> list[str | None]:
        """The transcript of each utterance of a packed window, else of the row."""
        return row.get("utterance_texts") or [row.get(self.columns.text)]

    def normaliser(self, row: dict) -> Normaliser:
        """The normaliser of a row's language."""
        return self.normalisers(self.labeller.language(row, self.columns))

    def _is_above(self, row: dict) -> bool:
        threshold = self.settings.wer_threshold
        return threshold is not None and any(rate > threshold for rate in self.error_rates(row))

    def _cut(self, row: dict) -> dict | None:
        """A row without its utterances above the threshold: itself if none is, None if it is left out whole."""
        if not self._is_above(row):
            return row
        parts, starts = (row.get(name) or [] for name in ("utterance_texts", "utterance_starts"))
        if not self.settings.cut_utterances or len(parts) < 2 or len(parts) != len(starts):
            return None
        normaliser = self.normaliser(row)
        return cut_utterances(row, self.settings.wer_threshold, normaliser, self._units(normaliser))

    def _units(self, normaliser: Normaliser) -> Callable[[str], list[str]]:
        return normaliser.characters if self.settings.by_characters else str.split


def ngram_repeats(words: list[str], size: int = NGRAM) -> int:
    """How often the most frequent run of so many words occurs."""
    counts = Counter(tuple(words[place : place + size]) for place in range(len(words) - size + 1))
    return max(counts.values(), default=0)


def known(row: dict, name: str):
    """What a row holds in a column, None where it lacks that: NaN is how some programs write a missing figure."""
    value = row.get(name)
    return None if isinstance(value, float) and math.isnan(value) else value


def is_given(limit: float | bool | None) -> bool:
    """Whether a limit is one; 0 is."""
    return limit is not None and limit is not False


def is_kept(reason: str) -> bool:
    """Whether a RowFilter's answer lets a row be trained on."""
    return reason.startswith(KEPT)


def counted(reasons: Counter) -> str:
    """Why rows were left out, the most frequent reason first."""
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def table(counts: Iterable[tuple[str, Counter]]) -> str:
    """What was kept of each dataset, and why the rest was not."""
    lines = []
    for name, counter in counts:
        total = sum(counter.values())
        kept = sum(count for reason, count in counter.items() if is_kept(reason))
        lines.append(f"{name}: {kept} of {total} rows kept")
        lines += [f"  {count:>8}  {reason}" for reason, count in counter.most_common() if reason != KEPT]
    return "\n".join(lines)
