"""Streamed training data: read at many places side by side, shared among processes and workers, from any point on.

A global batch is drawn from lanes, and the lanes are dealt to processes and workers: which rows make a batch depends
on the seed and on the size of a step, not on who reads. Where the rows of files are counted (of Parquet their ends
tell), each row of an optimizer step comes from a lane of its own, and a lane reads blocks of rows all over the data in
a random order: rows of a step are neighbours in the source about as often as in a full shuffle. Other files can only
be read from their beginning: a lane reads a share of them, and gives some rows to each batch. What a lane has read is
a few numbers, from which a resumed run goes on.
"""

import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distil_whisper.errors import UserError
from distil_whisper.examples import Batch, Collator, ExampleMaker, joined
from distil_whisper.filtering import counted, is_kept
from distil_whisper.mixing import Share, TrainingSet, visit_of_mixture, workers

LANES = 16  # of a small batch of uncounted files, at most
ROWS_OF_A_LANE, FILES_OF_A_LANE = 8, 5  # in a large batch of them; with many files a lane gives fewer rows
ROWS_OF_A_BLOCK = 100  # at most, which is a row group of the files that labelling writes
GOLDEN_RATIO = (5**0.5 - 1) / 2  # whose multiples are spread evenly, modulo 1
BYTES_OF_A_LANE = 8 << 20  # of encoded audio that it holds for all datasets, or a row of each if that is more


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


def lanes_of(batch: int, files: int) -> int:
    """How many lanes a global batch of so many rows of uncounted files is drawn from: a divisor of it."""
    most = min(batch, max(LANES, batch // ROWS_OF_A_LANE, files // FILES_OF_A_LANE))
    return max(number for number in range(1, most + 1) if batch % number == 0)


class StreamMixture:
    """Streamed datasets and how they are mixed: by weight (None: equally), in global batches of `batch` rows, of which
    so many are accumulated to a step. Lanes hold buffer_size rows to be shuffled, or a block each if that is more."""

    def __init__(
        self,
        sets: list[TrainingSet],
        weights: list[float] | None,
        seed: int,
        buffer_size: int,
        batch: int,
        accumulated: int = 1,
    ):
        self.sets = sets
        self.chances = np.asarray(weights or [1.0] * len(sets), float) / sum(weights or [1.0] * len(sets))
        self.seed = seed
        self.batch = batch
        self.block_size = min(buffer_size, ROWS_OF_A_BLOCK)
        self.turns = 1  # batches that have lanes of their own, before the lanes of the first are drawn from again
        if all(is_counted(one) for one in sets):
            self.lanes_of_batch = batch
            self.turns = max(accumulated, -(-buffer_size // (batch * self.block_size)))
        else:
            self.lanes_of_batch = lanes_of(batch, min(len(one.source.units) for one in sets))
            self.block_size = max(1, buffer_size // self.lanes_of_batch)
        self.lanes = self.lanes_of_batch * self.turns
        self.rows_of_lane = batch // self.lanes_of_batch
        self.blocks = [self._blocks_of(one) if is_counted(one) else None for one in sets]

    def chosen(self, lane: int, batch: int) -> list[int]:
        """The datasets of a lane's rows of a batch, by their numbers.

        A lane goes round the shares of the datasets in steps of the golden ratio, from a random start. So each gives
        about as many rows of a dataset as any other, and all rows of a small one come before many come again.
        """
        first = batch // self.turns * self.rows_of_lane
        steps = np.arange(first, first + self.rows_of_lane)
        start = np.random.default_rng([self.seed, lane, 0, 1]).random()
        return np.searchsorted(np.cumsum(self.chances[:-1]), (start + GOLDEN_RATIO * steps) % 1, "right").tolist()

    def lanes_of_turns(self, places: list[int]) -> list[list[int]]:
        """The lanes at some places of a batch, for each of the batches that have lanes of their own."""
        return [[turn * self.lanes_of_batch + place for place in places] for turn in range(self.turns)]

    def share(self, dataset: int, lane: int, epoch: int) -> list[Segment]:
        """A lane's part of an epoch of a dataset, whose blocks or files are in an order of that epoch's own.

        Of blocks all shares have as many rows, and a block may lie across two of them. Else a share is so many files,
        or of fewer files than lanes every so many rows of each.
        """
        blocks, draw = self.blocks[dataset], np.random.default_rng([self.seed, dataset, epoch])
        place = (lane + epoch) % self.lanes  # no lane keeps to a part of the data
        if blocks is not None:
            return self._share_of_blocks(draw.permutation(blocks), place)
        order = draw.permutation(len(self.sets[dataset].source.units))
        split = self.lanes if len(order) < self.lanes else 1
        parts = [Segment(int(unit), first, None, split) for unit in order for first in range(split)]
        return parts[place :: self.lanes]

    def _share_of_blocks(self, blocks: np.ndarray, place: int) -> list[Segment]:
        ends = np.cumsum(blocks[:, 2] - blocks[:, 1])
        total = int(ends[-1]) if len(ends) else 0
        first, last = (total * (place + more) // self.lanes for more in (0, 1))
        mine = slice(np.searchsorted(ends, first, "right"), np.searchsorted(ends, last, "left") + 1)
        segments = []
        for (unit, start, stop), end in zip(blocks[mine].tolist(), ends[mine].tolist(), strict=True):
            segment = Segment(unit, max(start, stop - (end - first)), min(stop, stop - (end - last)))
            segments += [segment] if segment.start < segment.stop else []
        return segments

    def _blocks_of(self, training_set: TrainingSet) -> np.ndarray:
        """The blocks [n, 3] of a dataset whose rows are counted: file, first row and the row after the last."""
        parts = [np.zeros((0, 3), int)]
        for unit in training_set.source.units:
            starts = np.arange(0, unit.rows, self.block_size)
            stops = np.minimum(starts + self.block_size, unit.rows)
            parts.append(np.stack([np.full(len(starts), unit.index), starts, stops], 1))
        return np.concatenate(parts)

    def resumed(self, kept: dict | None, samples: int, say) -> Places:
        """The places that a checkpoint holds (what `to_keep` gave) after so many samples. With other lanes, blocks or
        files than its run had they mean nothing, and a new pass over the data comes next."""
        if not kept:
            return {}
        if "places" not in kept:
            say("the run was not streamed before: a new pass over the data begins")
            return {}
        places = {
            int(lane): {int(dataset): Place(**place) for dataset, place in of_lane.items()}
            for lane, of_lane in kept["places"].items()
        }
        same = (kept["lanes"], kept.get("block_size")) == (self.lanes, self.block_size)
        changed = kept.get("files", self.files) != self.files  # an earlier version did not keep it
        if same and not changed and samples % self.batch == 0:
            return places
        if changed:
            say("the datasets have other files or numbers of rows than before: a new pass over the data begins")
        elif "block_size" in kept:
            say("the step or the shuffling buffer has another size than before: a new pass over the data begins")
        else:
            say("an earlier version shuffled streamed rows in another way: a new pass over the data begins")
        begun = [place.epoch for of_lane in places.values() for place in of_lane.values()]
        fresh = {dataset: Place(max(begun, default=-1) + 1) for dataset in range(len(self.sets))}
        return {lane: fresh for lane in range(self.lanes)}

    def to_keep(self, places: Places) -> dict:
        """Places of all lanes as JSON can hold them."""
        kept = {lane: {d: asdict(place) for d, place in of_lane.items()} for lane, of_lane in places.items()}
        return {"lanes": self.lanes, "block_size": self.block_size, "files": self.files, "places": kept}

    @cached_property
    def files(self) -> int:
        """A checksum of how many files each dataset has, and of how many rows."""
        return zlib.crc32(repr([[unit.rows for unit in one.source.units] for one in self.sets]).encode())


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
        source, numbered = self.mixture.sets[dataset].source, None
        begin = of.start if first is None else first
        while of.stop is None or begin < of.stop:
            if numbered is None:
                rows = source.rows(of.unit, None, begin, of.step)
                numbers = count(begin, of.step) if of.stop is None else range(begin, of.stop, of.step)
                numbered = zip(numbers, rows, strict=False)
            block, last = self._block(dataset, numbered)
            if self.mixture.blocks[dataset] is not None:  # a reader has rows to come ready, too: it is not kept
                rows.close()
                numbered = None
            if block:
                yield begin, block
            if last is None:
                return
            begin = last + of.step

    def _block(self, dataset: int, rows: Iterator[tuple[int, dict]]) -> tuple[list[tuple[int, dict]], int | None]:
        """The next usable rows, as many as a block may hold, and the number of the last; None after the end."""
        training_set, block, held = self.mixture.sets[dataset], [], 0
        for number, row in rows:
            if is_kept(training_set.row_filter(row)):
                block.append((number, training_set.row_filter.trimmed(row)))
                held += len((row.get(training_set.source.audio_column) or {}).get("bytes") or b"")
            if len(block) == self.mixture.block_size or held * len(self.mixture.sets) >= BYTES_OF_A_LANE:
                return block, number
        return block, None


def is_counted(training_set: TrainingSet) -> bool:
    """Whether it is known how many rows each file of a dataset has, so that they can be read from any row on."""
    return all(unit.rows is not None for unit in training_set.source.units)


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
        mine = np.array_split(list(self.shares), worker.num_workers)[worker.id].tolist() if worker else [*self.shares]
        turns = self.mixture.lanes_of_turns(mine)
        lanes = [[Lane(self.mixture, number, self.places.get(number)) for number in turn] for turn in turns]
        for batch in count(self.start):
            examples, turn = [], lanes[batch % self.mixture.turns]
            for place, lane in zip(mine, turn, strict=True):
                for of in islice(lane.take(batch), *self.shares[place]):
                    columns = self.mixture.sets[of.dataset].columns
                    visit = visit_of_mixture(of.epoch, of.dataset, len(self.mixture.sets))
                    examples.append(self.maker(of.row, columns, of.row_id, visit))
            yield self.collator(examples), {lane.number: dict(lane.places) for lane in turn}


class StreamBatches:
    """The batches of this process without end, joined of what its workers give; `places` are those of its lanes after
    the last batch that was taken. With workers, a thread has the next batch ready."""

    def __init__(self, parts: StreamParts, num_workers: int, padding: int):
        own = {lane for turn in parts.mixture.lanes_of_turns([*parts.shares]) for lane in turn}
        self.places: Places = {lane: places for lane, places in parts.places.items() if lane in own}
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
    """The lanes of a batch that a process reads, and from where to where it takes their rows of it."""
    first, last = (share.batch_size * (share.rank + more) for more in (0, 1))
    size = mixture.rows_of_lane
    return {
        lane: (max(first - lane * size, 0), min(last - lane * size, size))
        for lane in range(first // size, -(-last // size))
    }
