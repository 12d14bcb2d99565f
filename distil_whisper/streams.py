"""Streamed training data: files read side by side, shared among processes and workers, from any point on.

A global batch is drawn from lanes, so many rows from each. A lane reads a share of the files, and the lanes are dealt
to processes and workers: which rows make a batch depends on the seed and on the size of the global batch, not on who
reads. What a lane has read is a few numbers, from which a resumed run goes on.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distil_whisper.errors import UserError
from distil_whisper.examples import Batch, Collator, ExampleMaker, joined
from distil_whisper.filtering import counted, is_kept
from distil_whisper.mixing import Share, TrainingSet, workers

LANES = 16  # of a small batch, at most
ROWS_OF_A_LANE = 8  # in a large batch


@dataclass(frozen=True)
class Segment:
    """Rows of a unit: every step-th from `start` up to `stop` (None: to the end)."""

    unit: int
    start: int = 0
    stop: int | None = None
    step: int = 1


@dataclass(frozen=True)
class Place:
    """Where a lane stands in a dataset: the epoch, the segment of its share, the row that begins the block which is
    given out (None: the segment's first), and how many rows of the block were given."""

    epoch: int = 0
    segment: int = 0
    row: int | None = None
    given: int = 0


Places = dict[int, dict[int, Place]]  # by lane and dataset


@dataclass(frozen=True)
class Mixed:
    """A row of a mixture: its dataset, that one's epoch, its id and what it holds."""

    dataset: int
    epoch: int
    row_id: str
    row: dict


def lanes_of(batch: int) -> int:
    """How many lanes a global batch of so many rows is drawn from: a divisor of it."""
    most = min(batch, max(LANES, batch // ROWS_OF_A_LANE))
    return max(number for number in range(1, most + 1) if batch % number == 0)


class StreamMixture:
    """Streamed datasets and how they are mixed: by weight (None: equally), block_size rows held to be shuffled by all
    lanes together, global batches of `batch` rows."""

    def __init__(self, sets: list[TrainingSet], weights: list[float] | None, seed: int, block_size: int, batch: int):
        self.sets = sets
        self.chances = np.asarray(weights or [1.0] * len(sets), float) / sum(weights or [1.0] * len(sets))
        self.seed = seed
        self.lanes = lanes_of(batch)
        self.rows_of_lane = batch // self.lanes
        self.block_sizes = [max(1, int(block_size * chance / self.lanes)) for chance in self.chances]

    def chosen(self, lane: int, batch: int) -> list[int]:
        """The datasets of a lane's rows of a batch, by their numbers."""
        draw = np.random.default_rng([self.seed, lane, batch])
        return draw.choice(len(self.sets), size=self.rows_of_lane, p=self.chances).tolist()

    def share(self, dataset: int, lane: int, epoch: int) -> list[Segment]:
        """A lane's part of an epoch of a dataset, whose files are in an order of that epoch's own.

        Where it is known how many rows a file has, all shares are of the same size, and a file may lie across two of
        them. Else a share is so many files, or of fewer files than lanes every so many rows of each.
        """
        units = self.sets[dataset].source.units
        order = np.random.default_rng([self.seed, dataset, epoch]).permutation(len(units))
        place = (lane + epoch) % self.lanes  # no lane keeps to a part of the data
        if all(unit.rows is not None for unit in units):
            return self._share_of_rows([(int(unit), units[unit].rows) for unit in order], place)
        split = self.lanes if len(units) < self.lanes else 1
        parts = [Segment(int(unit), first, None, split) for unit in order for first in range(split)]
        return parts[place :: self.lanes]

    def _share_of_rows(self, files: list[tuple[int, int]], place: int) -> list[Segment]:
        total = sum(rows for _, rows in files)
        first, last = (total * (place + more) // self.lanes for more in (0, 1))
        segments, begin = [], 0
        for unit, rows in files:
            start, stop = max(first - begin, 0), min(last - begin, rows)
            if start < stop:
                segments.append(Segment(unit, start, stop))
            begin += rows
        return segments

    def resumed(self, kept: dict | None, say) -> Places:
        """The places that a checkpoint holds (what `to_keep` gave). With other batches or blocks than its run had they
        mean nothing, and a new pass over the data comes next."""
        if not kept:
            return {}
        places = {
            int(lane): {int(dataset): Place(**place) for dataset, place in of_lane.items()}
            for lane, of_lane in kept["places"].items()
        }
        if (kept["lanes"], kept["block_sizes"]) == (self.lanes, self.block_sizes):
            return places
        say("the global batch or the shuffling buffer has another size than before: a new pass over the data begins")
        begun = [place.epoch for of_lane in places.values() for place in of_lane.values()]
        fresh = {dataset: Place(max(begun, default=-1) + 1) for dataset in range(len(self.sets))}
        return {lane: fresh for lane in range(self.lanes)}

    def to_keep(self, places: Places) -> dict:
        """Places of all lanes as JSON can hold them."""
        kept = {lane: {d: asdict(place) for d, place in of_lane.items()} for lane, of_lane in places.items()}
        return {"lanes": self.lanes, "block_sizes": self.block_sizes, "places": kept}


class Lane:
    """One of the streams that batches are drawn from, from its places in the datasets on."""

    def __init__(self, mixture: StreamMixture, number: int, places: dict[int, Place] | None = None):
        self.mixture = mixture
        self.number = number
        self.places = dict(places or {})
        self._streams = [self._rows_of(dataset) for dataset in range(len(mixture.sets))]

    def take(self, batch: int) -> list[Mixed]:
        """The lane's rows of a batch, by the batch's number. Raises UserError for a dataset of which none is left."""
        return [next(self._streams[dataset]) for dataset in self.mixture.chosen(self.number, batch)]

    def _rows_of(self, dataset: int) -> Iterator[Mixed]:
        """The rows of a dataset without end; `places` follows what was given."""
        training_set = self.mixture.sets[dataset]
        place, fruitless = self.places.get(dataset, Place()), 0
        if not training_set.source.units:
            require_rows(training_set)
        while True:
            fruitless += 1
            segments = self.mixture.share(dataset, self.number, place.epoch)
            for number in range(place.segment, len(segments)):
                unit = segments[number].unit
                for row, block in self._blocks(dataset, segments[number], place.row):
                    fruitless = 0
                    draw = np.random.default_rng([self.mixture.seed, dataset, place.epoch, unit, row])
                    order = draw.permutation(len(block))
                    for given in range(place.given, len(block)):
                        index, kept = block[order[given]]
                        self.places[dataset] = Place(place.epoch, number, row, given + 1)
                        yield Mixed(dataset, place.epoch, training_set.row_id(kept, unit, index), kept)
                    place = replace(place, given=0)
                place = replace(place, row=None)
            if fruitless == self.mixture.lanes:
                require_rows(training_set)
            place = Place(place.epoch + 1)

    def _blocks(self, dataset: int, of: Segment, first: int | None) -> Iterator[tuple[int, list[tuple[int, dict]]]]:
        """Blocks of the usable rows of a segment with their numbers in the file, and the row that begins each block;
        from a row on, if one is given."""
        training_set, block = self.mixture.sets[dataset], []
        start = begin = of.start if first is None else first
        rows = training_set.source.rows(of.unit, None, start, of.step)
        rows = rows if of.stop is None else islice(rows, max(of.stop - start, 0))
        for order, row in enumerate(rows):
            number = start + order * of.step
            if is_kept(training_set.row_filter(row)):
                block.append((number, training_set.row_filter.trimmed(row)))
            if len(block) == self.mixture.block_sizes[dataset]:
                yield begin, block
                begin, block = number + of.step, []
        if block:
            yield begin, block


def require_rows(training_set: TrainingSet) -> None:
    """Raise UserError with the reasons if the filters leave no row of a dataset. Reads all of it but the audio."""
    source, seen = training_set.source, Counter()
    columns = [name for name in source.column_names if name != source.audio_column]
    for unit in range(len(source.units)):
        for row in source.rows(unit, columns):
            reason = training_set.row_filter(row)
            if is_kept(reason):
                return
            seen[reason] += 1
    raise UserError(f"no row of {source.label} is left to train on ({counted(seen)})")


class StreamParts(IterableDataset):
    """What a worker's lanes give to each batch of this process, endlessly from a batch number on, and their places
    after it."""

    def __init__(
        self,
        mixture: StreamMixture,
        maker: ExampleMaker,
        collator: Collator,
        share: Share,
        start: int = 0,
        places: Places | None = None,
    ):
        self.mixture = mixture
        self.maker = maker
        self.collator = collator
        self.start = start
        self.places = places or {}
        self.shares = shares_of_lanes(mixture, share)

    def __iter__(self) -> Iterator[tuple[Batch, Places]]:
        worker = get_worker_info()
        mine = np.array_split(list(self.shares), worker.num_workers)[worker.id] if worker else list(self.shares)
        lanes = [Lane(self.mixture, int(number), self.places.get(int(number))) for number in mine]
        for batch in count(self.start):
            examples = []
            for lane in lanes:
                for of in islice(lane.take(batch), *self.shares[lane.number]):
                    columns = self.mixture.sets[of.dataset].columns
                    examples.append(self.maker(of.row, columns, of.row_id, of.epoch))
            yield self.collator(examples), {lane.number: dict(lane.places) for lane in lanes}


class StreamBatches:
    """The batches of this process without end, joined of what its workers give; `places` are those of its lanes after
    the last batch that was taken. With workers, a thread has the next batch ready."""

    def __init__(self, parts: StreamParts, num_workers: int, padding: int):
        self.places: Places = {}
        self._padding = padding
        self._workers = min(num_workers, len(parts.shares))  # more would have no lane
        loading = {**workers(self._workers), "pin_memory": False}  # the joined batch is what goes to the GPU
        self._parts = iter(DataLoader(parts, batch_size=None, **loading))
        self._thread = ThreadPoolExecutor(1) if self._workers else None
        self._coming: Future | None = None

    def __iter__(self) -> "StreamBatches":
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            batch, places = self._join()
        else:
            batch, places = (self._coming or self._thread.submit(self._join)).result()
            self._coming = self._thread.submit(self._join)
        self.places |= places
        return batch

    def _join(self) -> tuple[Batch, Places]:
        """The next batch, and the places after it."""
        # A DataLoader takes its workers in turn: the next so many parts are one batch's, in the order of the lanes.
        found = [next(self._parts) for _ in range(max(1, self._workers))]
        batch = joined([batch for batch, _ in found], self._padding)
        places = {lane: place for _, places in found for lane, place in places.items()}
        return (batch.pin_memory() if torch.cuda.is_available() else batch), places


def shares_of_lanes(mixture: StreamMixture, share: Share) -> dict[int, tuple[int, int]]:
    """The lanes that a process reads, and from where to where it takes their rows of a batch."""
    first, last = (share.batch_size * (share.rank + more) for more in (0, 1))
    size = mixture.rows_of_lane
    return {
        lane: (max(first - lane * size, 0), min(last - lane * size, size))
        for lane in range(first // size, -(-last // size))
    }
