"""Greedy search with a draft: the decoder reads some tokens of it at a time, and keeps those that it says itself.

Speculative decoding (Leviathan et al., arXiv 2211.17192) in which the transcript of the data stands in for a small
model: what is found is what greedy search finds, whatever the draft says.
"""

from dataclasses import dataclass, field

import torch
from transformers import WhisperForConditionalGeneration

from distil_whisper.greedy import COMPACT_BELOW, DecoderSteps, Found, Rules, Said

AT_ONCE = 4  # tokens of a draft that are read together with the last one said
NEARBY = 12  # tokens of a draft, either way, among which its place is found again when something else was said
TRIAL = 8  # steps after which a batch must find WORTH tokens in a step, or it goes on with one at a time
WORTH = 1.5


@dataclass
class Row:
    """What was found of a row so far, and where its draft stands. begin: the first timestamp; opening: the tokens that
    begin a word."""

    draft: list[int]
    begin: int
    opening: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    place: int = 0
    lost: bool = False
    ended: bool = False

    def proposed(self, count: int) -> list[int]:
        """What may come next: the draft from its place on, behind a second timestamp where a segment was closed."""
        closed = len(self.tokens) > 1 and self.tokens[-1] >= self.begin > self.tokens[-2]
        return [*self.tokens[-1:] * closed, *self.draft[self.place : self.place + count]][:count]

    def take(self, proposed: list[int], said: list[int], logprobs: list[float]) -> int:
        """Take what was said behind the proposed tokens as far as they were right, and what was said then.

        Returns how many tokens that is.
        """
        wrong = (place for place, (ours, theirs) in enumerate(zip(proposed, said, strict=False)) if ours != theirs)
        count = next(wrong, len(proposed)) + 1
        self.tokens += said[:count]
        self.logprobs += logprobs[:count]
        for token in said[:count]:
            self._follow(token)
        return count

    def _follow(self, token: int) -> None:
        """Go on in the draft behind the nearest token that is the one said; if there is none, behind the word that was
        said otherwise, unless that was done before. What begins no word, such as a comma, was put in."""
        nearby = range(max(self.place - NEARBY, 0), min(self.place + NEARBY, len(self.draft)))
        same = [place for place in nearby if self.draft[place] == token]
        if same:
            self.place = min(same, key=lambda place: abs(place - self.place)) + 1
        elif token in self.opening and not self.lost:
            words = (place for place in range(self.place + 1, len(self.draft)) if self.draft[place] in self.opening)
            self.place = next(words, len(self.draft))
        self.lost = not same


@torch.no_grad()
def drafted_search(
    model: WhisperForConditionalGeneration,
    encoded: torch.Tensor,
    prefix: list[int],
    rules: Rules,
    most: int,
    drafts: list[list[int]],
    opening: frozenset[int],
) -> Found:
    """`greedy_search` with a draft of the words of each row, which may be empty. opening: tokens that begin a word."""

    def chosen(hidden: torch.Tensor, said: Said, first: bool = False) -> tuple[list, list]:
        """What is said behind each token [batch, length], and its log-probability."""
        found = rules.choose(model.proj_out(hidden).float().flatten(0, 1), said, first)
        return tuple(values.view(hidden.shape[:2]).tolist() for values in found)

    device, width = encoded.device, AT_ONCE
    decode = DecoderSteps(model.model.decoder, encoded, len(prefix) + most + width)
    hidden = decode(torch.tensor([prefix], device=device).expand(len(encoded), -1))
    first_logits = model.proj_out(hidden[:, 0]).float()
    rows = [Row(draft, rules.begin, opening) for draft in drafts]
    inside, proposed = rows, [[] for _ in rows]  # inside: those that the caches are of
    said = chosen(hidden[:, -1:], rules.nothing_said(len(rows)), first=True)
    steps = found = 0
    while True:
        for row, ours, theirs, logprobs in zip(inside, proposed, *said, strict=True):
            if not row.ended:
                steps, found = steps + 1, found + row.take(ours, theirs, logprobs)
                row.ended = row.tokens[-1] == rules.end or len(row.tokens) == most
        left = [place for place, row in enumerate(inside) if not row.ended]
        if not left:
            return Found([row.tokens for row in rows], [row.logprobs for row in rows], first_logits)
        if len(left) < COMPACT_BELOW * len(inside):
            inside = [inside[place] for place in left]
            decode.keep(torch.tensor(left, device=device))
        if steps > TRIAL * len(rows) and found < WORTH * steps:
            width = 0
        proposed = [[] if row.ended else row.proposed(min(width, most - len(row.tokens) - 1)) for row in inside]
        length = 1 + max(map(len, proposed))
        inputs = [[row.tokens[-1], *ours] for row, ours in zip(inside, proposed, strict=True)]
        inputs = torch.tensor([row + [rules.end] * (length - len(row)) for row in inputs], device=device)
        behind = torch.tensor([len(row.tokens) for row in inside], device=device)
        places = len(prefix) - 1 + behind[:, None] + torch.arange(length, device=device)
        said = chosen(decode(inputs, places), _said(inside, rules.begin, device).along(inputs[:, 1:]))


def _said(rows: list[Row], begin: int, device) -> Said:
    """What rows have said, which is something."""
    recent = [[begin, *row.tokens][-2:] for row in rows]
    latest = [max((token for token in row.tokens if token >= begin), default=begin - 1) for row in rows]
    return Said(torch.tensor(recent, device=device), torch.tensor(latest, device=device))
