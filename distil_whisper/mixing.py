"""The order in which training visits the rows of map-style datasets.

It is a function of the seed and of how many samples were taken, so a resumed run goes on with the very next one, also
with batches of another size, and the rows of a global batch do not depend on the number of processes or workers.
streams.py is for streamed datasets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from distil_whisper.examples import Example, ExampleMaker, LabelColumns, Labeller
from distil_whisper.filtering import RowFilter
from distil_whisper.reading import Source

_SAMPLES, _ROUND = 1, 2  # what is drawn, beside the order of an epoch
GROUPED_BATCHES = 50  # batches in which rows are sorted by length together


@dataclass
class TrainingSet:
    """One dataset of the mixture. `kept` are its usable rows when it is map-style, and `lengths` what those take (see
    verdicts.lengths_of) [kept, 2, 2] where rows of like length are to share a batch."""

    source: Source
    columns: LabelColumns
    row_filter: RowFilter
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    lengths: np.ndarray | None = None

    def row_id(self, row: dict, unit: int, number: int) -> str:
        """The identity that the labelling stage gave the row, else the one that its place gives it."""
        own = row.get("row_id")
        return self.source.row_id(unit, number) if own in (None, "") else str(own)

    def row_ids(self, positions: np.ndarray) -> list[str]:
        """The identities of kept rows, read together."""
        indices = self.kept[positions].tolist()
        own = [None] * len(indices)
        if "row_id" in self.source.column_names and indices:
            own = self.source.dataset.with_format("arrow", columns=["row_id"])[indices]["row_id"].to_pylist()
        return [
            self.row_id({"row_id": row_id}, *self.source.locate(i)) for row_id, i in zip(own, indices, strict=True)
        ]


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this process takes."""

    rank: int
    processes: int
    batch_size: int  # per process

    def of(self, rows: list) -> tuple[list, bool]:
        """This process's rows of a global batch, and whether they count: a batch with fewer rows than processes
        (the last of an epoch) leaves some with a copy of its first row, whose labels are to be ignored."""
        bounds = np.linspace(0, len(rows), self.processes + 1).round().astype(int)
        mine = rows[bounds[self.rank] : bounds[self.rank + 1]]
        return (mine, True) if mine else (rows[:1], False)


class EpochOrder:
    """The samples of an epoch in order, as (dataset, row, visit): how often the row came before.

    Without weights each row of each dataset once. With weights as many samples, each drawn from a dataset with a
    probability in proportion to its weight. All rows of a dataset come, in a random order, before one comes again:
    where an epoch ends within such a round, the next one goes on with it.
    """

    def __init__(self, sizes: list[int], weights: list[float] | None, seed: int):
        self.sizes = sizes
        self.chances = None if weights is None else np.asarray(weights, float) / sum(weights)
        self.seed = seed
        self._totals = [np.zeros(len(sizes), int)]  # of each epoch, what each dataset gave before it

    def __len__(self) -> int:
        return sum(self.sizes)

    def __call__(self, epoch: int) -> np.ndarray:
        """An array [samples, 3] that depends on the seed and the epoch alone."""
        draw = np.random.default_rng([self.seed, epoch])
        if self.chances is None:
            rows = [
                np.stack([np.full(size, dataset), np.arange(size), np.full(size, epoch)], 1)
                for dataset, size in enumerate(self.sizes)
            ]
            return draw.permutation(np.concatenate(rows))
        before, after = self._total(epoch), self._total(epoch + 1)
        datasets = draw.permutation(np.repeat(np.arange(len(self.sizes)), after - before))
        samples = np.column_stack([datasets, datasets, datasets])
        for dataset, span in enumerate(zip(before, after, strict=True)):
            samples[datasets == dataset, 1:] = self._rows(dataset, *span)
        return samples

    def _total(self, epoch: int) -> np.ndarray:
        """How many samples of each dataset all epochs before this one hold."""
        while len(self._totals) <= epoch:
            draw = np.random.default_rng([self.seed, len(self._totals) - 1, 0, _SAMPLES])
            self._totals.append(self._totals[-1] + draw.multinomial(len(self), self.chances))
        return self._totals[epoch]

    def _rows(self, dataset: int, first: int, last: int) -> np.ndarray:
        """The samples of a dataset, counted over all epochs, from one to another: rows and visits [n, 2]."""
        size = self.sizes[dataset]
        visits = range(first // size, -(-last // size))
        rounds = [np.random.default_rng([self.seed, dataset, visit, _ROUND]).permutation(size) for visit in visits]
        rows = np.concatenate([*rounds, np.zeros(0, int)])[first % size :][: last - first]
        return np.column_stack([rows, np.arange(first, last) // size])


def visit_of_mixture(visit: int, dataset: int, datasets: int) -> int:
    """A visit in a dataset as one among those in all of them: a row may be in several, under the same id."""
    return visit * datasets + dataset


class LabelLengths:
    """How many decoder positions samples take, prompts included, by the lengths that are known of their rows."""

    def __init__(self, sets: list[TrainingSet], labeller: Labeller):
        self.sets = sets
        self.labeller = labeller

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """The lengths of (dataset, row, visit) samples [n, 3]; 0 for what trains nothing."""
        lengths = np.zeros(len(samples), int)
        for dataset, training_set in enumerate(self.sets):
            places = np.flatnonzero(samples[:, 0] == dataset)
            positions, visits = samples[places, 1], visit_of_mixture(samples[places, 2], dataset, len(self.sets))
            drawn = map(self.labeller.drawn, training_set.row_ids(positions), visits.tolist())
            timestamps, prompted = np.array([*drawn], int).reshape(-1, 2).T
            lengths[places] = training_set.lengths[positions, timestamps, prompted]
        return lengths


class MapBatches(Sampler):
    """Batches of (dataset, row, visit, counts) keys for one process, endlessly, from a position on: the number of
    samples of the endless order that were taken before. The last batch of an epoch may be smaller.

    With lengths, rows of like length share a global batch: GROUPED_BATCHES batches of an epoch are sorted at a time,
    cut into batches, and those are put in a random order. Such groups begin with the epoch, or within one where a run
    went on with batches of another size: `grouped_from` is that position.
    """

    def __init__(
        self,
        order: EpochOrder,
        share: Share,
        start: int = 0,
        lengths: LabelLengths | None = None,
        grouped_from: int = 0,
    ):
        self.order = order
        self.share = share
        self.start = start
        self.lengths = lengths
        self.grouped_from = grouped_from
        self.size = share.batch_size * share.processes

    @property
    def per_epoch(self) -> int:
        """Global batches in an epoch."""
        return -(-len(self.order) // self.size)

    def after(self, position: int, batches: int) -> int:
        """The position after so many batches from a position on."""
        epoch, offset = divmod(position, len(self.order))
        rest = batches - self._left(offset)
        if rest < 0:
            return position + batches * self.size
        return (epoch + 1 + rest // self.per_epoch) * len(self.order) + rest % self.per_epoch * self.size

    def number(self, position: int) -> int:
        """How many batches come before the next one of a position, had all been of this size."""
        epoch, offset = divmod(position, len(self.order))
        return (epoch + 1) * self.per_epoch - self._left(offset)

    def begins_group(self, position: int) -> bool:
        """Whether no group of rows of like length is divided by a position, where groups begin at `grouped_from`."""
        epoch, offset = divmod(position, len(self.order))
        return (offset - self._first_group(epoch)) % (GROUPED_BATCHES * self.size) == 0

    def __iter__(self) -> Iterator[list[tuple[int, int, int, bool]]]:
        for epoch in count(self.start // len(self.order)):
            first = max(self.start - epoch * len(self.order), 0)
            for samples in self._of_epoch(epoch, first):
                mine, counts = self.share.of(samples.tolist())
                yield [(*sample, counts) for sample in mine]

    def _left(self, offset: int) -> int:
        """The batches from an offset in an epoch to its end."""
        return -(-(len(self.order) - offset) // self.size)

    def _first_group(self, epoch: int) -> int:
        return max(self.grouped_from - epoch * len(self.order), 0)

    def _of_epoch(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """The global batches of an epoch, from an offset on."""
        order, size = self.order(epoch), self.size
        if self.lengths is None:
            yield from (order[place : place + size] for place in range(first, len(order), size))
            return
        group = GROUPED_BATCHES * size
        for begin in range(first - (first - self._first_group(epoch)) % group, len(order), group):
            batches = self._grouped(epoch, begin, order[begin : begin + group])
            yield from batches[max(first - begin, 0) // size :]

    def _grouped(self, epoch: int, begin: int, samples: np.ndarray) -> list[np.ndarray]:
        samples, size = samples[np.argsort(self.lengths(samples), kind="stable")], self.size
        batches = [samples[place : place + size] for place in range(0, len(samples), size)]
        whole = len(samples) // size  # a smaller batch stays the last one
        draw = np.random.default_rng([self.order.seed, epoch, begin // size])
        return [batches[place] for place in draw.permutation(whole)] + batches[whole:]


class MapExamples(Dataset):
    """Examples by key; audio is read and decoded here, in the DataLoader's workers."""

    def __init__(self, sets: list[TrainingSet], maker: ExampleMaker):
        self.sets = sets
        self.maker = maker

    def __getitem__(self, key: tuple[int, int, int, bool]) -> Example:
        dataset, position, visit, counts = key
        training_set = self.sets[dataset]
        index = int(training_set.kept[position])
        row = training_set.source.row(index)
        row_id = training_set.row_id(row, *training_set.source.locate(index))
        row = training_set.row_filter.trimmed(row)
        visit = visit_of_mixture(visit, dataset, len(self.sets))
        return self.maker(row, training_set.columns, row_id, visit) if counts else Example(row_id)


def map_loader(sets: list[TrainingSet], batches: MapBatches, maker, collator, num_workers: int) -> DataLoader:
    """An endless DataLoader over map-style datasets."""
    return DataLoader(MapExamples(sets, maker), batch_sampler=batches, collate_fn=collator, **workers(num_workers))


def workers(num_workers: int) -> dict:
    """DataLoader arguments for that many workers."""
    # Spawned: a forked worker inherits locks of torch's and fsspec's threads, and can hang for ever.
    context = "spawn" if num_workers else None
    return {"num_workers": num_workers, "multiprocessing_context": context, "pin_memory": torch.cuda.is_available()}


def batched(rows: Iterator, size: int) -> Iterator[tuple]:
    """Runs of so many rows; the last may be shorter. (itertools.batched came with Python 3.12.)"""
    while batch := tuple(islice(rows, size)):
        yield batch
