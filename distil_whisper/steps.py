"""Whisper's decoder, a step at a time: caches allocated once, and on a GPU a step launched as one CUDA graph."""

import contextlib
import functools
from collections.abc import Callable

import torch
from transformers import WhisperForConditionalGeneration

from distil_whisper.attention import attend, for_any_length
from distil_whisper.rules import Rules, Said

ALIGNED = 8  # keys of a masked step come in multiples of it: kernels would else copy the mask
SHARES = 4  # there are graphs for quarters of the largest batch,
SPAN = 128  # and for multiples of so many places: few graphs, and little work in vain


class Replayed:
    """A function of tensors as a CUDA graph: its hundreds of kernels are launched as one.

    What else it reads and writes must stay where it is, as long as this is used, and writing it twice must do no harm.
    beside: an earlier one, which never runs at the same time, and whose memory for what is computed on the way it
    shares.
    """

    def __init__(self, beside: "Replayed | None", function: Callable, *arguments: torch.Tensor):
        self.arguments = [argument.clone() for argument in arguments]
        before, stream = torch.cuda.current_stream(), _stream_of_graphs()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):  # once outside of the graph, for the libraries' workspaces and plans
            function(*self.arguments)
        before.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        pool = beside and beside.graph.pool()
        with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
            self.results = function(*self.arguments)

    def __call__(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The function's results, in the same memory each time."""
        for place, argument in zip(self.arguments, arguments, strict=True):
            place.copy_(argument)
        self.graph.replay()
        return self.results


@functools.cache
def _stream_of_graphs():
    """The stream that all graphs are captured on: libraries keep a workspace for each stream."""
    return torch.cuda.Stream()


class DecoderSteps:
    """Whisper's decoder and its rules: from the tokens of a step, those that are likeliest behind each of them.

    Keys and values of `encoded` [batch, positions, width] are computed once; those of the tokens, at most `most`, go
    into tensors that are allocated once. graphs: steps are CUDA graphs, which are made for some numbers of rows and of
    places alone. They are there for the next batches that `begin` is given, which must not be larger than the first.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        rules: Rules,
        encoded: torch.Tensor,
        most: int,
        graphs: bool = False,
    ):
        self.model, self.rules = model, rules
        self.graphs: dict[tuple, Replayed] | None = {} if graphs else None
        self.room = len(encoded)
        self.places = torch.arange(-(-most // ALIGNED) * ALIGNED, device=encoded.device)
        self.heard, self.said = [], []
        for layer in model.model.decoder.layers:
            keys = _heads(layer.encoder_attn.k_proj(encoded[:1, :1]), layer.encoder_attn)  # autocast decides its type
            shape = [self.room, keys.shape[1], encoded.shape[1], keys.shape[3]]
            self.heard.append((keys.new_empty(shape), keys.new_empty(shape)))
            shape[2] = len(self.places)
            self.said.append((keys.new_empty(shape), keys.new_empty(shape)))
        self.begin(encoded)

    def begin(self, encoded: torch.Tensor) -> None:
        """Begin anew, with these encoder states. For graphs there may be more `rows` than they have: what those say
        is of no use."""
        self.count, self.rows, self.length = len(encoded), self.rows_for(len(encoded)), 0
        for layer, caches, said in zip(self.model.model.decoder.layers, self.heard, self.said, strict=True):
            attention = layer.encoder_attn
            for cache in said:
                cache.zero_()  # what a mask hides must be a number, whatever was said before
            for cache, project in zip(caches, (attention.k_proj, attention.v_proj), strict=True):
                cache[: self.count] = _heads(project(encoded), attention)

    def rows_for(self, count: int) -> int:
        """How many rows are computed for so many."""
        return count if self.graphs is None else _round_up(count, -(-self.room // SHARES), self.room)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self.rows = len(rows)
        for caches in (*self.heard, *self.said):
            for cache in caches:
                cache[: self.rows] = cache[rows]

    def first(self, prefix: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first token of each row behind a prefix, its log-probability, [rows] each; the logits
        [batch, vocabulary] behind the prefix's first token. Rows of no use have ended."""
        self.length = len(prefix)
        tokens = torch.tensor([prefix], device=self.places.device).expand(self.rows, -1)
        with self._kernels():
            hidden = self._through(tokens, self.places[: self.length], self.length, causal=True)
        said = self.rules.nothing_said(self.rows)
        chosen, logprob = self.rules.choose(self.model.proj_out(hidden[:, -1]).float(), said, first=True)
        chosen[self.count :] = self.rules.end
        return chosen, logprob, self.model.proj_out(hidden[: self.count, 0]).float()

    def next(self, said: Said) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of each row behind what it has said, and its log-probability, [rows] each."""
        place, self.length = self.places[self.length : self.length + 1], self.length + 1
        tokens = said.recent[:, 1:]
        if self.graphs is not None:
            return self._replayed(self.length, tokens, place, said.recent, said.latest)
        with self._kernels():
            hidden = self._through(tokens, place, self.length)
        return self._chosen(hidden[:, 0], said)

    def next_of_some(
        self, tokens: torch.Tensor, places: torch.Tensor, length: int, said: Said, counting: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What comes behind each of some tokens [rows, some], and its log-probability, for those that count.

        places [rows, some] are theirs, all before `length`: what was there and behind them is forgotten. said: what
        came before them. counting [n]: of the flattened tokens.
        """
        if self.graphs is not None:
            chosen, logprob = self._replayed(length, tokens, places, said.recent, said.latest)
            return chosen[counting], logprob[counting]
        with self._kernels():
            hidden = self._through(tokens, places, self._seen(length), masked=True)
        return self._chosen(hidden.flatten(0, 1)[counting], said.along(tokens[:, 1:]).of(counting))

    def _replayed(self, length: int, *arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The step of tokens, places, and what was said before them as a graph."""
        seen = self._seen(length)
        key = (*(argument.shape for argument in arguments[:2]), seen)
        if key not in self.graphs:
            beside = next(iter(self.graphs.values()), None)
            self.graphs[key] = Replayed(beside, functools.partial(self._step, seen), *arguments)
        return self.graphs[key](*arguments)

    def _step(self, seen: int, tokens: torch.Tensor, places: torch.Tensor, recent: torch.Tensor, latest: torch.Tensor):
        """`next_of_some`, for all of the tokens."""
        hidden = self._through(tokens, places, seen, masked=True)
        return self._chosen(hidden.flatten(0, 1), Said(recent, latest).along(tokens[:, 1:]))

    def _seen(self, length: int) -> int:
        """How many places are looked at where a mask hides what is behind so many."""
        return _round_up(length, SPAN, len(self.places))

    def _kernels(self):
        """Around what is computed for one length after the other. With graphs, there are few."""
        return for_any_length() if self.graphs is None else contextlib.nullcontext()

    def _chosen(self, hidden: torch.Tensor, said: Said) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest token behind each of hidden states [n, width]; behind the end it is the end."""
        chosen, logprob = self.rules.choose(self.model.proj_out(hidden).float(), said, first=False)
        return chosen.masked_fill(said.recent[:, 1] == self.rules.end, self.rules.end), logprob

    def _through(
        self, tokens: torch.Tensor, places: torch.Tensor, seen: int, causal: bool = False, masked: bool = False
    ) -> torch.Tensor:
        """The decoder's last hidden states [rows, length, width] of tokens [rows, length] at places [length] or
        [rows, length], which look at the first `seen` places: all, up to their own (causal: those from the first on),
        or with a mask those up to their own."""
        decoder, by_row = self.model.model.decoder, places.ndim == 2
        mask = self._mask(places, seen) if masked else None
        positions = decoder.embed_positions.weight
        hidden = decoder.embed_tokens(tokens) + positions[places.clamp(max=len(positions) - 1)]
        for layer, heard, said in zip(decoder.layers, self.heard, self.said, strict=True):
            heard, said = ([cache[: self.rows] for cache in caches] for caches in (heard, said))
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

    def _mask(self, places: torch.Tensor, seen: int) -> torch.Tensor:
        """What is added to the scores of tokens at places [length] or [rows, length]: those behind them count not."""
        behind = self.places[:seen] > places[..., None]
        mask = torch.zeros_like(behind, dtype=self.said[0][0].dtype).masked_fill_(behind, -torch.inf)
        return mask[:, None] if places.ndim == 2 else mask


def _round_up(value: int, step: int, most: int) -> int:
    """The next multiple, or the most that there is."""
    return min(-(-value // step) * step, most)


def _heads(states: torch.Tensor, attention) -> torch.Tensor:
    """[batch, length, width] as [batch, heads, length, width of a head]."""
    return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _attended(attention, states: torch.Tensor, keys, values, causal: bool = False, mask=None) -> torch.Tensor:
    """What an attention layer adds. causal: for the first call, which has several tokens and no past."""
    queries = _heads(attention.q_proj(states) * attention.scaling, attention)
    found = attend(queries, keys, values, mask, causal)
    return attention.out_proj(found.transpose(1, 2).flatten(2))
