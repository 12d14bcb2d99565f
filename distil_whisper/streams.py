"""Streamed training data: files read side by side, each by one process and one worker, from any point on.

A global batch is drawn from lanes, so many rows from each. A lane reads files of its own, and the lanes are dealt to
processes and workers: nothing is read twice, and which rows make a batch depends on the seed and on the size of the
global batch, not on who reads. What a lane has read is a few numbers, from which a resumed run goes on.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, islice

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distil_whisper.errors import UserError
from distil_whisper.examples import Batch, Collator, ExampleMaker, joined
from distil_whisper.filtering import is_kept
from distil_whisper.mixing import Share, TrainingSet, workers

ROWS_OF_A_LANE = 8  # in a large batch; a small batch is drawn from this many lanes


@dataclass(frozen=True)
class Place:
    """Where a lane stands in a dataset: its part of the endless sequence of parts, the row of the part's file that
    begins the block which is given out, and how many rows of the block were given."""

    part: int
    row: int = 0
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
    most = min(batch, max(ROWS_OF_A_LANE, batch // ROWS_OF_A_LANE))
    return max(number for number in range(1, most + 1) if batch % number == 0)


class StreamMixture:
    """Streamed datasets and how they are mixed: by weight (None: equally), rows shuffled in blocks of block_size over
    all lanes, global batches of `batch` rows."""

    def __init__(self, sets: list[TrainingSet], weights: list[float] | None, seed: int, block_size: int, batch: int):
        self.sets = sets
        self.chances = np.asarray(weights or [1.0] * len(sets), float) / sum(weights or [1.0] * len(sets))
        self.seed = seed
        self.lanes = lanes_of(batch)
        self.rows_of_lane = batch // self.lanes
        self.block_size = max(1, block_size // self.lanes)

    def chosen(self, lane: int, batch: int) -> list[int]:
        """The datasets of a lane's rows of a batch, by their numbers."""
        draw = np.random.default_rng([self.seed, lane, batch])
        return draw.choice(len(self.sets), size=self.rows_of_lane, p=self.chances).tolist()

    def split(self, dataset: int) -> int:
        """In how many parts each file is cut: fewer files than lanes are shared by several lanes."""
        return math.ceil(self.lanes / max(1, len(self.sets[dataset].source.units)))

    def parts(self, dataset: int) -> int:
        """Parts in an epoch of a dataset. Lane after lane takes the next one, so all lanes end an epoch together."""
        return self.split(dataset) * len(self.sets[dataset].source.units)

    def part(self, dataset: int, number: int) -> tuple[int, int, int]:
        """The epoch, the unit and the first row of a part; the others of it follow at a distance of `split`."""
        epoch, place = divmod(number, self.parts(dataset))
        order = np.random.default_rng([self.seed, dataset, epoch]).permutation(self.parts(dataset))
        unit, first = divmod(int(order[place]), self.split(dataset))
        return epoch, unit, first

    def resumed(self, kept: dict | None, say) -> Places:
        """The places that a checkpoint holds (what `to_keep` gave); of a run with other lanes, the nearest ones."""
        if not kept:
            return {}
        places = {
            int(lane): {int(dataset): Place(**place) for dataset, place in of_lane.items()}
            for lane, of_lane in kept["places"].items()
        }
        if kept["lanes"] == self.lanes:
            return places
        say("the global batch has another size than before: the stream goes on near where it was, in another order")
        begun = {dataset: self._begun(dataset, kept["lanes"], places) for dataset in range(len(self.sets))}
        return {lane: {dataset: Place(first + lane) for dataset, first in begun.items()} for lane in range(self.lanes)}

    def to_keep(self, places: Places) -> dict:
        """Places of all lanes as JSON can hold them."""
        return {
            "lanes": self.lanes,
            "places": {lane: {d: asdict(place) for d, place in of_lane.items()} for lane, of_lane in places.items()},
        }

    def _begun(self, dataset: int, lanes: int, places: Places) -> int:
        """The first part that no lane of a run with so many lanes has begun, counted in parts of this one."""
        units = len(self.sets[dataset].source.units)
        begun = 1 + max((of_lane[dataset].part for of_lane in places.values() if dataset in of_lane), default=-1)
        return math.ceil(begun / (units * math.ceil(lanes / units)) * self.parts(dataset))


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
        mixture = self.mixture
        place, fruitless = self.places.get(dataset, Place(self.number)), 0
        while True:
            fruitless += 1
            epoch, unit, _ = mixture.part(dataset, place.part)
            for row, block in self._blocks(dataset, place):
                fruitless = 0
                order = np.random.default_rng([mixture.seed, dataset, place.part, row]).permutation(len(block))
                for given in range(place.given, len(block)):
                    number, kept = block[order[given]]
                    self.places[dataset] = Place(place.part, row, given + 1)
                    yield Mixed(dataset, epoch, mixture.sets[dataset].row_id(kept, unit, number), kept)
                place = replace(place, given=0)
            if fruitless == mixture.parts(dataset):
                require_rows(mixture.sets[dataset])
            place = Place(place.part + mixture.lanes)

    def _blocks(self, dataset: int, place: Place) -> Iterator[tuple[int, list[tuple[int, dict]]]]:
        """Blocks of the usable rows of a part with their numbers in the file, and the row that begins each block."""
        training_set, step = self.mixture.sets[dataset], self.mixture.split(dataset)
        _, unit, first = self.mixture.part(dataset, place.part)
        start, block = max(place.row, first), []
        begin = start
        for order, row in enumerate(training_set.source.rows(unit, None, start, step)):
            number = start + order * step
            if is_kept(training_set.row_filter(row)):
                block.append((number, training_set.row_filter.trimmed(row)))
            if len(block) == self.mixture.block_size:
                yield begin, block
                begin, block = number + step, []
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
    raise UserError(f"no row of {source.label} is left after filtering: {dict(seen)}")


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
    the last batch that was taken."""

    def __init__(self, parts: StreamParts, num_workers: int, padding: int):
        self.places: Places = {}
        self._padding = padding
        self._workers = min(num_workers, len(parts.shares))
        self._parts = iter(DataLoader(parts, batch_size=None, **workers(self._workers)))

    def __iter__(self) -> "StreamBatches":
        return self

    def __next__(self) -> Batch:
        # A DataLoader takes its workers in turn: the next so many parts are one batch's, in the order of the lanes.
        found = [next(self._parts) for _ in range(max(1, self._workers))]
        for _, places in found:
            self.places |= places
        return joined([batch for batch, _ in found], self._padding)


def shares_of_lanes(mixture: StreamMixture, share: Share) -> dict[int, tuple[int, int]]:
    """The lanes that a process reads, and from where to where it takes their rows of a batch."""
    first, last = (share.batch_size * (share.rank + more) for more in (0, 1))
    size = mixture.rows_of_lane
    return {
        lane: (max(first - lane * size, 0), min(last - lane * size, size))
        for lane in range(first // size, -(-last // size))
    }
