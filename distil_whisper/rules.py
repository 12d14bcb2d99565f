"""What may be said next: Whisper's grammar of timestamps and its suppressed tokens, on whole batches of logits."""

from dataclasses import dataclass

import torch


class Rules:
    """Which tokens may come next: suppressed ones never, and with timestamps those that Whisper's grammar allows.

    As openai/whisper's decoding.py: timestamps come in pairs and never go back, the first token is one of the first
    second, and where all timestamps together are likelier than any word, one of them it is.
    """

    def __init__(self, generation_config, vocabulary: int, end: int, no_timestamps: int, timestamps: bool, device):
        self.end = end
        self.begin = no_timestamps + 1
        self.starts = torch.tensor([0, end, self.begin], device=device)  # of words, what is between, timestamps
        self.timestamps = timestamps
        self.last_at_first = getattr(generation_config, "max_initial_timestamp_index", None)
        always = set(generation_config.suppress_tokens or []) | ({no_timestamps} if timestamps else set())
        at_first = always | set(generation_config.begin_suppress_tokens or [])
        self.always, self.at_first = (
            torch.tensor([token for token in tokens if 0 <= token < vocabulary], dtype=torch.long, device=device)
            for tokens in (always, at_first)
        )

    def nothing_said(self, rows: int) -> "Said":
        """What rows have said at their beginning, which the rules take as following a pair of timestamps."""
        begin = torch.full((rows, 2), self.begin, device=self.always.device)
        return Said(begin, begin[:, 0] - 1)

    def choose(self, logits: torch.Tensor, said: "Said", first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest allowed token of each row behind what it has said, and its log-probability.

        logits [batch, vocabulary] are overwritten: those of tokens that may not follow become -inf.
        """
        logits.index_fill_(1, self.at_first if first else self.always, -torch.inf)
        if not self.timestamps:
            best, chosen = logits.max(-1)
            return chosen, best - logits.logsumexp(-1)
        # Few passes over the vocabulary: words, what lies between them and the timestamps, and timestamps apart.
        words, others, times = logits.split([self.end, self.begin - self.end, logits.shape[1] - self.begin], 1)
        if first:
            others.fill_(-torch.inf)
            if self.last_at_first is not None:
                times[:, self.last_at_first + 1 :] = -torch.inf
            best, chosen = times.max(-1)
            return chosen + self.begin, best - times.logsumexp(-1)
        no_words = self._in_pairs(times, said)
        parts = [[part.max(-1), part.logsumexp(-1)] for part in (words, others, times)]
        best = torch.stack([found.values for found, _ in parts], 1)
        total = torch.stack([total for _, total in parts], 1)
        best[:, 0], total[:, 0] = (side[:, 0].masked_fill(no_words, -torch.inf) for side in (best, total))
        likelier = total[:, 2] > best[:, :2].amax(1)  # all timestamps together than any word
        for side in (best, total):
            side[:, :2] = side[:, :2].masked_fill(likelier[:, None], -torch.inf)
        value, which = best.max(1)
        tokens = torch.stack([found.indices for found, _ in parts], 1) + self.starts
        return tokens.gather(1, which[:, None])[:, 0], value - total.logsumexp(1)

    def _in_pairs(self, times: torch.Tensor, said: "Said") -> torch.Tensor:
        """Forbid timestamps that may not follow; returns the rows in which no word may."""
        before, last = (said.recent >= self.begin).unbind(1)
        opened = last & ~before  # a segment was ended: only a timestamp or the end may follow
        latest = said.latest - self.begin
        earliest = torch.where(opened, latest, latest + 1)
        place = torch.arange(times.shape[1], device=times.device)
        times.masked_fill_((place < earliest[:, None]) | (last & before)[:, None], -torch.inf)
        return opened


@dataclass(frozen=True)
class Said:
    """What the rules look at of what each row has said: its last two tokens [batch, 2], its latest timestamp [batch]
    (the token before all timestamps, if there was none)."""

    recent: torch.Tensor
    latest: torch.Tensor

    def and_then(self, tokens: torch.Tensor, begin: int) -> "Said":
        """With one more token of each row [batch]."""
        recent = torch.stack([self.recent[:, 1], tokens], 1)
        return Said(recent, torch.where(tokens >= begin, tokens, self.latest))

    def along(self, tokens: torch.Tensor) -> "Said":
        """Before and behind each of further tokens [batch, length], which hold no later timestamp:
        [batch * (length + 1)]."""
        recent = torch.cat([self.recent, tokens], 1).unfold(1, 2, 1)
        return Said(recent.flatten(0, 1), self.latest[:, None].expand(-1, recent.shape[1]).flatten())

    def of(self, rows: torch.Tensor) -> "Said":
        """What these rows have said."""
        return Said(self.recent[rows], self.latest[rows])
