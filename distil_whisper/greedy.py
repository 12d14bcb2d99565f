"""Greedy search of whole batches: one pass, caches allocated once, rules on tensors, finished rows removed.

The tokens are those of transformers' `generate(force_unique_generate_call=True)`, without its work per row and step.
"""

import functools
from dataclasses import dataclass

import torch
from transformers import WhisperForConditionalGeneration

from distil_whisper.attention import attend, for_any_length

COMPACT_BELOW = 0.75  # of the rows still running: the others then leave the batch
ALIGNED = 8  # keys of a masked step come in multiples of it: kernels would else copy the mask


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
        return Said(recent.flatten(0, 1), self.latest.repeat_interleave(recent.shape[1]))

    def of(self, rows: torch.Tensor) -> "Said":
        """What these rows have said."""
        return Said(self.recent[rows], self.latest[rows])


class Replayed:
    """A function of tensors as a CUDA graph: its hundreds of kernels are launched as one.

    What else it reads and writes must stay where it is, and writing it twice must do no harm.
    """

    def __init__(self, function, *arguments: torch.Tensor):
        self.arguments = [argument.clone() for argument in arguments]
        before, beside = torch.cuda.current_stream(), _stream_of_graphs()
        beside.wait_stream(before)
        with torch.cuda.stream(beside):  # once outside of the graph: the libraries then have their workspaces
            function(*self.arguments)
        before.wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=beside, capture_error_mode="thread_local"):
            self.result = function(*self.arguments)

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        """The function's result, in the same memory each time."""
        for place, argument in zip(self.arguments, arguments, strict=True):
            place.copy_(argument)
        self.graph.replay()
        return self.result


@functools.cache
def _stream_of_graphs():
    """The stream that all graphs are captured on: libraries keep a workspace for each stream."""
    return torch.cuda.Stream()


class DecoderSteps:
    """Whisper's decoder, some tokens at a time: the last hidden states that transformers computes.

    Keys and values of `encoded` [batch, positions, width] are computed once; those of the tokens, at most `most`, go
    into tensors that are allocated once. graphs: a step of one token is a CUDA graph, and all rows stay to the end.
    """

    def __init__(self, decoder, encoded: torch.Tensor, most: int, graphs: bool = False):
        self.decoder = decoder
        self.graphs = graphs
        self.graph: Replayed | None = None
        self.shape = (len(encoded), most)
        self.places = torch.arange(-(-most // ALIGNED) * ALIGNED, device=encoded.device)
        self.length = 0
        self.heard, self.said = [], []
        for layer in decoder.layers:
            keys, values = _heard(layer.encoder_attn, encoded)
            self.heard.append((keys, values))
            shape = (*keys.shape[:2], len(self.places), keys.shape[-1])
            self.said.append(tuple(keys.new_zeros(shape) for _ in range(2)))  # of its type, which autocast decides

    def begin(self, encoded: torch.Tensor) -> None:
        """Begin anew with other encoder states of the same shape, in the same memory."""
        self.length = 0
        for layer, places in zip(self.decoder.layers, self.heard, strict=True):
            for place, states in zip(places, _heard(layer.encoder_attn, encoded), strict=True):
                place.copy_(states)

    def __call__(self, tokens: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [batch, length, width] of tokens [batch, length].

        They are the next ones of each row, or with places [batch, length] those there; what was at these places and
        behind them is forgotten.
        """
        if places is not None:
            return self._through(tokens, places)
        begin, self.length = self.length, self.length + tokens.shape[1]
        places = self.places[begin : self.length]
        if not self.graphs or len(places) > 1:
            return self._through(tokens, places, self.length)
        if self.graph is None:
            self.graph = Replayed(self._through, tokens, places)
        return self.graph(tokens, places)

    def _through(self, tokens: torch.Tensor, places: torch.Tensor, seen: int | None = None) -> torch.Tensor:
        """The layers, for tokens at places [length] of all rows or [batch, length]. seen: how many places there are up
        to the last of them; None to mask those behind each token, so that the shapes are the same at every place."""
        decoder, causal, by_row = self.decoder, seen is not None and len(places) > 1, places.ndim == 2
        mask = self._mask(places) if seen is None else None
        positions = decoder.embed_positions.weight
        hidden = decoder.embed_tokens(tokens) + positions[places.clamp(max=len(positions) - 1)]
        for layer, heard, said in zip(decoder.layers, self.heard, self.said, strict=True):
            states = layer.self_attn_layer_norm(hidden)
            for cache, project in zip(said, (layer.self_attn.k_proj, layer.self_attn.v_proj), strict=True):
                new = _heads(project(states), layer.self_attn)
                if by_row:
                    cache.scatter_(2, places[:, None, :, None].expand_as(new), new)
                else:
                    cache.index_copy_(2, places, new)
            past = (cache[:, :, :seen] for cache in said)
            hidden = hidden + _attended(layer.self_attn, states, *past, causal=causal, mask=mask)
            hidden = hidden + _attended(layer.encoder_attn, layer.encoder_attn_layer_norm(hidden), *heard)
            states = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden)))
            hidden = hidden + layer.fc2(states)
        return decoder.layer_norm(hidden)

    def _mask(self, places: torch.Tensor) -> torch.Tensor:
        """What is added to the scores of tokens at places [length] or [batch, length]: those behind them count not."""
        behind = self.places > places[..., None]
        mask = torch.zeros_like(behind, dtype=self.said[0][0].dtype).masked_fill_(behind, -torch.inf)
        return mask[:, None] if places.ndim == 2 else mask

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        for caches in (self.heard, self.said):
            for number, of_layer in enumerate(caches):  # layer by layer: the caches of all are most of the memory
                caches[number] = tuple(states[rows] for states in of_layer)


def _heard(attention, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of encoder states, [batch, heads, positions, width of a head] each."""
    keys, values = attention.k_proj(encoded), attention.v_proj(encoded)
    return _heads(keys, attention).contiguous(), _heads(values, attention).contiguous()


def _heads(states: torch.Tensor, attention) -> torch.Tensor:
    """[batch, length, width] as [batch, heads, length, width of a head]."""
    return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _attended(attention, states: torch.Tensor, keys, values, causal: bool = False, mask=None) -> torch.Tensor:
    """What an attention layer adds. causal: for the first call, which has several tokens and no past."""
    queries = _heads(attention.q_proj(states) * attention.scaling, attention)
    found = attend(queries, keys, values, mask, causal)
    return attention.out_proj(found.transpose(1, 2).flatten(2))


@torch.no_grad()
@for_any_length
def greedy_search(
    model: WhisperForConditionalGeneration, decode: DecoderSteps, prefix: list[int], rules: Rules, most: int
) -> Found:
    """Decode behind a prefix, to the end token or at most `most` tokens; decode has room for all but the last."""
    count, device = decode.shape[0], decode.places.device
    rows = torch.arange(count, device=device)
    inputs = torch.tensor([prefix], device=device).expand(count, -1)
    said = rules.nothing_said(count)
    tokens = torch.full((count, most), rules.end, device=device)
    logprobs = torch.zeros(count, most, device=device)
    first_logits = None
    for step in range(most):
        hidden = decode(inputs)
        if first_logits is None:
            first_logits = model.proj_out(hidden[:, 0]).float()
        chosen, logprob = rules.choose(model.proj_out(hidden[:, -1]).float(), said, first=step == 0)
        tokens[rows, step], logprobs[rows, step] = chosen, logprob
        running = chosen != rules.end
        inputs, said = chosen[:, None], said.and_then(chosen, rules.begin)
        left = int(running.sum())
        if left == 0:
            break
        if left < COMPACT_BELOW * len(rows) and not decode.graphs:
            kept = running.nonzero().flatten()
            rows, inputs, said = rows[kept], inputs[kept], said.of(kept)
            decode.keep(kept)
    return _until_end(tokens, logprobs, first_logits, rules.end)


def _until_end(tokens: torch.Tensor, logprobs: torch.Tensor, first_logits: torch.Tensor, end: int) -> Found:
    """Each row up to its end token; a row that ran on after it, as long as others did, is cut there."""
    found_tokens, found_logprobs = [], []
    for row, values in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        length = row.index(end) + 1 if end in row else len(row)
        found_tokens.append(row[:length])
        found_logprobs.append(values[:length])
    return Found(found_tokens, found_logprobs, first_logits)
