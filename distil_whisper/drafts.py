"""Greedy search with a draft: the decoder reads some tokens of it at a time, and keeps those that it says itself.

Speculative decoding (Leviathan et al., arXiv 2211.17192) in which the transcript of the data stands in for a small
model: what is found is what greedy search finds, whatever the draft says. (In half precision two tokens that are about
equally likely may change places, as with another batch size.)
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch

from distil_whisper.greedy import COMPACT_BELOW, Found
from distil_whisper.rules import Said
from distil_whisper.steps import DecoderSteps

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

    @property
    def latest(self) -> int:
        """The latest timestamp, the token before all of them if there was none."""
        return max((token for token in self.tokens if token >= self.begin), default=self.begin - 1)

    def proposed(self, count: int) -> list[int]:
        """What may come next: the draft from its place on, behind a second timestamp where a segment was closed."""
        closed = len(self.tokens) > 1 and self.tokens[-1] >= self.begin > self.tokens[-2]
        return [*self.tokens[-1:] * closed, *self.draft[self.place : self.place + count]][:count]

    def take(self, proposed: list[int], said: list[tuple[int, float]]) -> int:
        """Take what was said behind the proposed tokens as far as they were right, and what was said then.

        said: tokens and their log-probabilities, one more than proposed. Returns how many were taken.
        """
        wrong = (place for place, token in enumerate(proposed) if token != said[place][0])
        taken = said[: next(wrong, len(proposed)) + 1]
        for token, logprob in taken:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self._follow(token)
        return len(taken)

    def _follow(self, token: int) -> None:
        """Go on in the draft behind the nearest token that is the one said; if there is none, behind the word that was
        said otherwise, unless that was done before. What begins no word, such as a comma, was put in."""
        nearby = range(max(self.place - NEARBY, 0), min(self.place + NEARBY, len(self.draft)))
        same = [place for place in nearby if self.draft[place] == token]
        if same:
            self.place, self.lost = min(same, key=lambda place: abs(place - self.place)) + 1, False
        elif token in self.opening and not self.lost:
            words = (place for place in range(self.place + 1, len(self.draft)) if self.draft[place] in self.opening)
            self.place, self.lost = next(words, len(self.draft)), True


@torch.no_grad()
def drafted_search(
    decode: DecoderSteps, prefix: list[int], most: int, drafts: list[list[int]], opening: frozenset[int]
) -> Found:
    """`greedy_search` with a draft of the words of each row, which may be empty. opening: tokens that begin a word.

    decode has room for AT_ONCE tokens more.
    """
    rules, width = decode.rules, AT_ONCE
    *said, first_logits = decode.first(prefix)
    rows = [Row(draft, rules.begin, opening) for draft in drafts]
    spare = Row([], rules.begin, opening, [rules.end], ended=True)
    inside = [*rows, *[spare] * (decode.rows - len(rows))]  # those that the caches are of
    proposed, said = [[] for _ in inside], _in_turn(*said)
    steps = found = 0
    while True:
        for row, ours in zip(inside, proposed, strict=True):
            if not row.ended:
                steps, found = steps + 1, found + row.take(ours, list(islice(said, 1 + len(ours))))
                row.ended = row.tokens[-1] == rules.end or len(row.tokens) == most
        left = sum(not row.ended for row in inside)
        if not left:
            return Found([row.tokens for row in rows], [row.logprobs for row in rows], first_logits)
        if (fewer := decode.rows_for(left)) <= COMPACT_BELOW * len(inside):
            kept = sorted(range(len(inside)), key=lambda place: inside[place].ended)[:fewer]
            inside = [inside[place] for place in kept]
            decode.keep(torch.tensor(kept, device=first_logits.device))
        if steps > TRIAL * len(rows) and found < WORTH * steps:
            width = 0
        proposed = [[] if row.ended else row.proposed(min(width, most - len(row.tokens) - 1)) for row in inside]
        said = _in_turn(*_step(decode, len(prefix), inside, proposed, width if decode.graphs is not None else 0))


def _in_turn(tokens: torch.Tensor, logprobs: torch.Tensor) -> Iterator[tuple[int, float]]:
    """Tokens and their log-probabilities, [n] each, in one copy."""
    tokens, logprobs = torch.stack([tokens.double(), logprobs.double()]).tolist()
    return zip(map(int, tokens), logprobs, strict=True)


def _step(
    decode: DecoderSteps, prefix: int, rows: list[Row], proposed: list[list[int]], least: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes behind the last token of each row that has not ended and behind what is proposed: tokens and their
    log-probabilities. prefix: its length; least: so many are proposed at least, if need be
    fillers."""
    rules = decode.rules
    inputs = [[row.tokens[-1], *ours] for row, ours in zip(rows, proposed, strict=True)]
    length = max(1 + least, *map(len, inputs))
    lengths = [0 if row.ended else len(given) for row, given in zip(rows, inputs, strict=True)]
    counting = [number * length + place for number, given in enumerate(lengths) for place in range(given)]
    given = (
        torch.tensor([given + [rules.end] * (length - len(given)) for given in inputs]),
        torch.tensor([[prefix + len(row.tokens) - 1] for row in rows]) + torch.arange(length),
        torch.tensor(counting),
        torch.tensor([[rules.begin, *row.tokens][-2:] for row in rows]),
        torch.tensor([row.latest for row in rows]),
    )
    # to the device in one copy, for each of which a GPU would be waited for
    sent = torch.cat([values.flatten() for values in given]).to(decode.places.device)
    sent = sent.split([values.numel() for values in given])
    tokens, places, counting, recent, latest = (one.view_as(other) for one, other in zip(sent, given, strict=True))
    return decode.next_of_some(tokens, places, int(given[1].max()) + 1, Said(recent, latest), counting)
