"""Greedy search of whole batches: one pass, rules on tensors, finished rows removed.

The tokens are those of transformers' `generate(force_unique_generate_call=True)`, without its work per row and step.
"""

from dataclasses import dataclass

import torch
from transformers import DynamicCache, EncoderDecoderCache, WhisperForConditionalGeneration

COMPACT_BELOW = 0.75  # of the rows still running: the others then leave the batch


@dataclass(frozen=True)
class Found:
    """What greedy search found: tokens by row, end token included if it came; log-probabilities of each; the logits
    [batch, vocabulary] behind <|startoftranscript|>."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    first_logits: torch.Tensor


class Rules:
    """Which tokens may come next: suppressed ones never, and with timestamps those that Whisper's grammar allows.

    As openai/whisper's decoding.py: timestamps come in pairs and never go back, the first token is one of the first
    second, and where all timestamps together are likelier than any word, one of them it is.
    """

    def __init__(self, generation_config, vocabulary: int, end: int, no_timestamps: int, timestamps: bool, device):
        self.end = end
        self.begin = no_timestamps + 1
        self.timestamps = timestamps
        self.always = self._mask(generation_config.suppress_tokens, vocabulary, device)
        self.at_first = self._mask(generation_config.begin_suppress_tokens, vocabulary, device) | self.always
        if timestamps:
            self.always[no_timestamps] = self.at_first[no_timestamps] = True
            self.at_first[: self.begin] = True
            last = getattr(generation_config, "max_initial_timestamp_index", None)
            if last is not None:
                self.at_first[self.begin + last + 1 :] = True

    def __call__(self, logits: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocabulary] with -inf for what may not follow the tokens so far [batch, length]."""
        first = history.shape[1] == 0
        scores = logits.masked_fill(self.at_first if first else self.always, -torch.inf)
        if not self.timestamps:
            return scores
        if not first:
            scores = self._in_pairs(scores, history)
        words, times = scores[:, : self.begin], scores[:, self.begin :]
        likelier = times.logsumexp(-1, keepdim=True) > words.amax(-1, keepdim=True)
        return torch.cat([words.masked_fill(likelier, -torch.inf), times], -1)

    def _in_pairs(self, scores: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        is_time = history >= self.begin
        last = is_time[:, -1]
        before = is_time[:, -2] if history.shape[1] > 1 else torch.ones_like(last)
        opened = last & ~before  # a segment was ended: only a timestamp or the end may follow
        latest = torch.where(is_time, history, -1).amax(1)
        earliest = torch.where(opened, latest, latest + 1).clamp(min=self.begin)
        place = torch.arange(scores.shape[1], device=scores.device)
        forbidden = (place >= self.begin) & (place < earliest[:, None])
        forbidden |= (last & before)[:, None] & (place >= self.begin)
        forbidden |= opened[:, None] & (place < self.end)
        return scores.masked_fill(forbidden, -torch.inf)

    @staticmethod
    def _mask(tokens: list[int] | None, vocabulary: int, device) -> torch.Tensor:
        mask = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        mask[[token for token in tokens or [] if token < vocabulary]] = True
        return mask


@torch.no_grad()
def greedy_search(
    model: WhisperForConditionalGeneration, encoded: torch.Tensor, prefix: list[int], rules: Rules, most: int
) -> Found:
    """Decode encoder states [batch, positions, width] behind a prefix, to the end token or at most `most` tokens."""
    rows = torch.arange(len(encoded), device=encoded.device)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    inputs = torch.tensor([prefix], device=encoded.device).expand(len(encoded), -1)
    history = inputs[:, :0]
    tokens = torch.full((len(encoded), most), rules.end, device=encoded.device)
    logprobs = torch.zeros(len(encoded), most, device=encoded.device)
    first_logits = None
    for step in range(most):
        hidden = model.model.decoder(
            input_ids=inputs, encoder_hidden_states=encoded, cache=cache, use_cache=True
        ).last_hidden_state
        if first_logits is None:
            first_logits = model.proj_out(hidden[:, 0]).float()
        scores = rules(model.proj_out(hidden[:, -1]).float(), history)
        best, chosen = scores.max(-1)
        tokens[rows, step], logprobs[rows, step] = chosen, best - scores.logsumexp(-1)
        running = chosen != rules.end
        inputs, history = chosen[:, None], torch.cat([history, chosen[:, None]], 1)
        left = int(running.sum())
        if left == 0:
            break
        if left < COMPACT_BELOW * len(rows):
            kept = running.nonzero().flatten()
            rows, inputs, history, encoded = rows[kept], inputs[kept], history[kept], encoded[kept]
            cache.batch_select_indices(kept)
    return _until_end(tokens, logprobs, first_logits, rules.end)


def _until_end(tokens: torch.Tensor, logprobs: torch.Tensor, first_logits: torch.Tensor, end: int) -> Found:
    """Each row up to its end token; a row that ran on after it, as long as others did, is cut there."""
    found_tokens, found_logprobs = [], []
    for row, values in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        length = row.index(end) + 1 if end in row else len(row)
        found_tokens.append(row[:length])
        found_logprobs.append(values[:length])
    return Found(found_tokens, found_logprobs, first_logits)
