"""Labels that come to no end within the limit of tokens: how many may be, and what a user can do about more."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TruncationLimit:
    """The share of labels that may be truncated.

    max_label_length: the most tokens of a label, of which the decoder has room for some. max_truncated: percent of the
    labels. window_seconds: the longest window that is packed or split, None where each row is a window.
    """

    max_label_length: int
    room: int
    max_truncated: float
    window_seconds: float | None

    def problem(self, labels: int, truncated: int) -> str | None:
        """A sentence on more truncated labels than may be, with what helps; None if there are not more."""
        if 100 * truncated <= self.max_truncated * labels:
            return None
        return (
            f"{truncated} of {labels} labels ({100 * truncated / labels:.1f}%) are truncated at --max_label_length "
            f"{self.max_label_length}, more than --max_truncated {self.max_truncated:g} percent, and training leaves "
            f"them out; what is labelled is kept: {', or '.join(self._remedies())}"
        )

    def early_problem(self, labels: int, truncated: int) -> str | None:
        """The same from a part of the labels, if it is so many that chance cannot have made them: three standard
        deviations above what may be. A few labels say little, and are judged at the end."""
        most = self.max_truncated / 100 * labels
        sure = labels >= 100 and truncated > most + 3 * math.sqrt(most)
        return self.problem(labels, truncated) if sure else None

    def _remedies(self) -> list[str]:
        remedies = []
        if self.max_label_length < self.room:
            more = min(2 * self.max_label_length, self.room)
            remedies.append(
                f"give --max_label_length {more} (at most {self.room}), with which these alone are labelled again"
            )
        if self.window_seconds is not None:
            shorter = f"--max_window_seconds {self.window_seconds / 2:g} --overwrite_output_dir"
            remedies.append(f"label anew in shorter windows ({shorter})")
        return [*remedies, "allow more (--max_truncated)"]
