"""Greedy search of whole batches: one pass, caches allocated once, rules on tensors, finished rows removed.

The tokens are those of transformers' `generate(force_unique_generate_call=True)`, without its work per row and step.
"""

from dataclasses import dataclass

import torch

from distil_whisper.steps import DecoderSteps

COMPACT_BELOW = 0.75  # of the rows still running: the others then leave the batch


@dataclass(frozen=True)
class Found:
    """What greedy search found: tokens by row, end token included if it came; log-probabilities of each; the logits
    [batch, vocabulary] behind <|startoftranscript|>."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    first_logits: torch.Tensor


@torch.no_grad()
def greedy_search(decode: DecoderSteps, prefix: list[int], most: int) -> Found:
    """Decode behind a prefix, to the end token or at most `most` tokens; decode has room for all but the last."""
    rules = decode.rules
    chosen, logprob, first_logits = decode.first(prefix)
    said, rows = rules.nothing_said(decode.rows), torch.arange(decode.rows, device=chosen.device)
    tokens = torch.full((decode.rows, most), rules.end, device=chosen.device)
    logprobs = torch.zeros(decode.rows, most, device=chosen.device)
    for step in range(most):
        tokens[rows, step], logprobs[rows, step] = chosen, logprob
        said = said.and_then(chosen, rules.begin)
        running = chosen != rules.end
        left = int(running.sum())
        if left == 0 or step + 1 == most:
            break
        if (fewer := decode.rows_for(left)) <= COMPACT_BELOW * decode.rows:
            kept = running.int().argsort(descending=True, stable=True)[:fewer]
            rows, said = rows[kept], said.of(kept)
            decode.keep(kept)
        chosen, logprob = decode.next(said)
    return _until_end(tokens[: decode.count], logprobs[: decode.count], first_logits, rules.end)


def _until_end(tokens: torch.Tensor, logprobs: torch.Tensor, first_logits: torch.Tensor, end: int) -> Found:
    """Each row up to its end token; a row that ran on after it, as long as others did, is cut there."""
    found_tokens, found_logprobs = [], []
    for row, values in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        length = row.index(end) + 1 if end in row else len(row)
        found_tokens.append(row[:length])
        found_logprobs.append(values[:length])
    return Found(found_tokens, found_logprobs, first_logits)
