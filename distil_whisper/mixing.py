"""The order in which training visits the rows of map-style datasets.

It is a function of the seed and of how many batches were taken, so a resumed run goes on with the very next batch, and
the rows of a global batch do not depend on the number of processes or workers. streams.py is for streamed datasets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from distil_whisper.errors import UserError
from distil_whisper.examples import Example, ExampleMaker, LabelColumns, Labeller
from distil_whisper.filtering import RowFilter
from distil_whisper.reading import Source

GROUPED_BATCHES = 50  # batches in which rows are sorted by length together


@dataclass
class TrainingSet:
    """One dataset of the mixture. `kept` are its usable rows when it is map-style."""

    source: Source
    columns: LabelColumns
    row_filter: RowFilter
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, int))

    def row_id(self, row: dict, unit: int, number: int) -> str:
        """The identity that the labelling stage gave the row, else the one that its place gives it."""
        return row.get("row_id") or self.source.row_id(unit, number)


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
    """The rows of an epoch in order, as (dataset, row) pairs.

    Without weights each row of each dataset once. With weights as many rows, each drawn from a dataset with a
    probability in proportion to its weight; a dataset that runs out starts again in a new order.
    """

    def __init__(self, sizes: list[int], weights: list[float] | None, seed: int):
        self.sizes = sizes
        self.weights = weights
        self.seed = seed

    def __len__(self) -> int:
        return sum(self.sizes)

    def __call__(self, epoch: int) -> np.ndarray:
        """An array [rows, 2] that depends on the seed and the epoch alone."""
        draw = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            pairs = [np.stack([np.full(size, index), np.arange(size)], 1) for index, size in enumerate(self.sizes)]
            return draw.permutation(np.concatenate(pairs))
        share = np.asarray(self.weights, float) / sum(self.weights)
        datasets = draw.choice(len(self.sizes), size=len(self), p=share)
        rows = np.zeros(len(self), int)
        for index, size in enumerate(self.sizes):
            places = np.flatnonzero(datasets == index)
            rounds = [draw.permutation(size) for _ in range(-(-len(places) // size))]
            rows[places] = np.concatenate([*rounds, np.zeros(0, int)])[: len(places)]
        return np.stack([datasets, rows], 1)


class LabelLengths:
    """How many decoder positions rows take in an epoch, prompts included; their audio is not read."""

    def __init__(self, sets: list[TrainingSet], labeller: Labeller, audio_column: str):
        self.sets = sets
        self.labeller = labeller
        self.tables = [training_set.source.dataset.remove_columns(audio_column) for training_set in sets]

    def __call__(self, epoch: int, pairs: np.ndarray) -> np.ndarray:
        """The lengths of (dataset, row) pairs [rows, 2]; 0 for what trains nothing."""
        return np.array([self._length(epoch, dataset, position) for dataset, position in pairs.tolist()])

    def _length(self, epoch: int, dataset: int, position: int) -> int:
        training_set = self.sets[dataset]
        index = int(training_set.kept[position])
        row = training_set.row_filter.trimmed(self.tables[dataset][index])
        row_id = training_set.row_id(row, *training_set.source.locate(index))
        try:
            sequence = self.labeller.sequence(row, training_set.columns, row_id, epoch)
        except UserError:  # of a label that cannot be read
            return 0
        return len(sequence.labels) if sequence else 0


class MapBatches(Sampler):
    """Batches of (epoch, dataset, row, counts) keys for one process, endlessly, from a batch number on.

    With lengths, rows of like length share a global batch: GROUPED_BATCHES batches of an epoch are sorted at a time,
    cut into batches, and those are put in a random order.
    """

    def __init__(self, order: EpochOrder, share: Share, start: int = 0, lengths: LabelLengths | None = None):
        self.order = order
        self.share = share
        self.start = start
        self.lengths = lengths

    @property
    def per_epoch(self) -> int:
        """Global batches in an epoch; the last one may be smaller."""
        return -(-len(self.order) // (self.share.batch_size * self.share.processes))

    def __iter__(self) -> Iterator[list[tuple[int, int, int, bool]]]:
        for epoch in count(self.start // self.per_epoch):
            first = self.start % self.per_epoch if epoch == self.start // self.per_epoch else 0
            for rows in self._of_epoch(epoch, first):
                mine, counts = self.share.of(rows.tolist())
                yield [(epoch, dataset, row, counts) for dataset, row in mine]

    def _of_epoch(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """The global batches of an epoch, from one on."""
        size, order = self.share.batch_size * self.share.processes, self.order(epoch)
        group = GROUPED_BATCHES if self.lengths else 1
        for begin in range(first - first % group, self.per_epoch, group):
            rows = order[begin * size : (begin + group) * size]
            batches = self._grouped(epoch, begin, rows, size) if self.lengths else [rows]
            yield from batches[max(first - begin, 0) :]

    def _grouped(self, epoch: int, begin: int, rows: np.ndarray, size: int) -> list[np.ndarray]:
        rows = rows[np.argsort(self.lengths(epoch, rows), kind="stable")]
        batches = [rows[place : place + size] for place in range(0, len(rows), size)]
        whole = len(rows) // size  # a smaller batch stays the last one
        draw = np.random.default_rng([self.order.seed, epoch, begin])
        return [batches[place] for place in draw.permutation(whole)] + batches[whole:]


class MapExamples(Dataset):
    """Examples by key; audio is read and decoded here, in the DataLoader's workers."""

    def __init__(self, sets: list[TrainingSet], maker: ExampleMaker):
        self.sets = sets
        self.maker = maker

    def __getitem__(self, key: tuple[int, int, int, bool]) -> Example:
        epoch, dataset, position, counts = key
        training_set = self.sets[dataset]
        index = int(training_set.kept[position])
        row = training_set.source.dataset[index]
        row_id = training_set.row_id(row, *training_set.source.locate(index))
        row = training_set.row_filter.trimmed(row)
        return self.maker(row, training_set.columns, row_id, epoch) if counts else Example(row_id)


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
