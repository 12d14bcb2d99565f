"""Streamed training: the same batches for any number of processes and workers, and from any point on."""

import json
from collections import Counter
from itertools import chain, islice
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mixtures import ROWS, SEED, identity

from distil_whisper import row_groups, streams
from distil_whisper.errors import UserError
from distil_whisper.examples import Collator, joined
from distil_whisper.mixing import MapExamples, Share, TrainingSet, visit_of_mixture
from distil_whisper.reading import Source, Unit
from distil_whisper.streams import Lane, StreamBatches, StreamMixture, StreamParts, lanes_of, shares_of_lanes

BLOCK = 12  # rows that are shuffled together, over all lanes


@pytest.fixture
def mixture(make_sets):
    """A streamed mixture with global batches of so many rows, and its ExampleMaker."""

    def make(batch=4, weights=None, block_size=BLOCK, names=tuple(ROWS), counted=True, **filters):
        sets, maker = make_sets(True, names, **filters)
        for training_set in sets if counted else []:
            training_set.source.take_counts(training_set.source.count_rows())
        return StreamMixture(sets, weights, SEED, block_size, batch), maker

    return make


def of_lanes(mixture, batches, start=0, places=None):
    """The rows of whole batches, and the lanes that gave them."""
    lanes = [Lane(mixture, number, (places or {}).get(number)) for number in range(mixture.lanes)]
    turns = [[lanes[number] for number in turn] for turn in mixture.lanes_of_turns([*range(mixture.lanes_of_batch)])]
    numbers = range(start, start + batches)
    rows = [[row for lane in turns[number % mixture.turns] for row in lane.take(number)] for number in numbers]
    return rows, {lane.number: lane.places for lane in lanes}


def names(rows):
    return [[(row.dataset, row.epoch, row.row_id) for row in batch] for batch in rows]


@pytest.mark.parametrize(
    ("batch", "files", "lanes"),
    [(1, 1, 1), (4, 9, 4), (7, 9, 7), (24, 9, 12), (64, 9, 16), (100, 9, 10), (512, 9, 64), (512, 1500, 256)],
)
def test_a_batch_of_uncounted_files_is_drawn_from_lanes_that_divide_it(batch, files, lanes):
    assert lanes_of(batch, files) == lanes


@pytest.mark.parametrize(
    ("batch", "accumulated", "buffer_size", "lanes"),
    [(4, 1, 1000, 12), (4, 16, 1000, 64), (512, 1, 1000, 512), (4, 1, 8, 4)],
)
def test_each_row_of_a_step_comes_from_a_lane_of_its_own(batch, accumulated, buffer_size, lanes):
    sets = [TrainingSet(Files([1000] * 3, True), None, Everything())]
    of = StreamMixture(sets, None, SEED, buffer_size, batch, accumulated)
    assert of.lanes == lanes and of.rows_of_lane == 1


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6])
def test_the_lanes_are_dealt_to_the_processes(mixture, processes):
    of, _ = mixture(24)
    shares = [shares_of_lanes(of, Share(rank, processes, 24 // processes)) for rank in range(processes)]
    taken = [(lane, row) for share in shares for lane, (first, last) in share.items() for row in range(first, last)]
    assert taken == [(lane, row) for lane in range(of.lanes) for row in range(of.rows_of_lane)]
    if of.lanes % processes == 0:  # else a lane lies across two processes, and both read it
        assert sum(len(share) for share in shares) == of.lanes


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("batch", [2, 4, 6])
def test_rows_come_once_an_epoch_in_a_new_order_each_time(mixture, name, batch):
    """Whether there are more files than lanes or fewer."""
    of, _ = mixture(batch, names=[name])
    usable = ROWS[name] - (name == "first")
    rows = [row for of_batch in names(of_lanes(of, 6 * usable)[0]) for row in of_batch]
    epochs = [[row_id for _, epoch, row_id in rows if epoch == number] for number in range(3)]
    assert [len(epoch) for epoch in epochs] == [len(set(epoch)) for epoch in epochs] == [usable] * 3
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert "first/default/train/00001-00000000" not in epochs[0]  # the row whose label is empty


def test_datasets_are_mixed_equally_or_by_weight(mixture):
    for weights, share in [(None, 0.5), ([9.0, 1.0], 0.9)]:
        rows, _ = of_lanes(mixture(4, weights)[0], 50)
        drawn = Counter(row.dataset for batch in rows for row in batch)
        assert drawn[0] / 200 == pytest.approx(share, abs=0.12)


@pytest.mark.parametrize("batch", [1, 4, 6])
@pytest.mark.parametrize("start", [1, 2, 5, 11, 30])
def test_a_resumed_stream_goes_on_with_the_next_batch(mixture, batch, start):
    of, _ = mixture(batch)
    unbroken, _ = of_lanes(of, 40)
    _, places = of_lanes(of, start)
    kept = json.loads(json.dumps(of.to_keep(places)))
    resumed, _ = of_lanes(of, 40 - start, start, of.resumed(kept, start * batch, pytest.fail))
    assert names(resumed) == names(unbroken)[start:]


def test_a_resumed_stream_reads_no_file_again_but_those_it_stands_in(mixture, monkeypatch):
    of, _ = mixture(2, names=["first"])
    opened, read = [], Source.rows
    monkeypatch.setattr(Source, "rows", lambda self, unit, *rest: opened.append(unit) or read(self, unit, *rest))
    _, places = of_lanes(of, 40)
    assert len(opened) > 12
    opened.clear()
    of_lanes(of, 1, 40, places)
    assert len(opened) <= 3 * of.lanes  # where each stands, and the next ones if that was at its end


def test_with_another_batch_or_buffer_a_new_pass_begins(mixture):
    of, _ = mixture(2, names=["first"])
    rows, places = of_lanes(of, 17)
    last = max(row.epoch for batch in rows for row in batch)
    for batch, block_size in ((6, BLOCK), (2, 3 * BLOCK)):
        said = []
        other, _ = mixture(batch, names=["first"], block_size=block_size)
        later, _ = of_lanes(other, 1, 17, other.resumed(of.to_keep(places), 17 * 2, said.append))
        assert len(said) == 1 and "another size" in said[0]
        assert min(row.epoch for row in later[0]) == last + 1
        assert other.resumed(None, 0, said.append) == other.resumed({}, 0, said.append) == {}


def test_with_other_files_a_new_pass_begins(mixture):
    of, _ = mixture(2, names=["first"])
    _, places = of_lanes(of, 17)
    kept = of.to_keep(places)
    for names_now in (["second"], ["first", "second"]):
        said, (other, _) = [], mixture(2, names=names_now)
        assert other.lanes == of.lanes
        begun = other.resumed(kept, 17 * 2, said.append)
        assert len(said) == 1 and "other files or numbers of rows" in said[0]
        assert min(place.epoch for of_lane in begun.values() for place in of_lane.values()) > 0
    del kept["files"]
    assert of.resumed(kept, 17 * 2, pytest.fail) == places  # of an earlier version


class Files:
    """A source of files with so many rows, which are counted or not."""

    label, audio_column, column_names = "files", "audio", ["audio", "text"]

    def __init__(self, sizes: list[int], counted: bool):
        self.sizes = sizes
        self.units = [Unit(index, len(sizes), size if counted else None) for index, size in enumerate(sizes)]

    def rows(self, unit, columns=None, start=0, step=1):
        return ({"text": (unit, row)} for row in range(start, self.sizes[unit], step))

    def row_id(self, unit, row):
        return f"{unit}-{row}"


class Everything:
    """A filter that keeps all rows."""

    trimmed = staticmethod(lambda row: row)

    def __call__(self, row):
        return "kept"


@pytest.mark.parametrize("batch", [4, 64, 100])
@pytest.mark.parametrize(
    ("sizes", "counted"),
    [
        ([1000, 1], True),
        ([8000, *[100] * 7], True),
        ([1000, 500], True),
        ([1000] * 12, True),
        ([1000, *[7] * 40], True),
        ([1000, 100], False),
        ([3000], False),
        ([500] * 80, False),
    ],
)
def test_files_of_any_sizes_are_seen_evenly(sizes, counted, batch):
    """After as many draws as there are rows, nearly all were drawn once; uncounted files are few or of like size."""
    sets = [TrainingSet(Files(sizes, counted), None, Everything())]
    of = StreamMixture(sets, None, SEED, 1000, batch)
    rows, _ = of_lanes(of, sum(sizes) // batch)
    drawn = Counter(row.row["text"] for of_batch in rows for row in of_batch)
    assert len(drawn) >= 0.97 * sum(sizes) - batch
    assert max(drawn.values()) <= 2


@pytest.mark.parametrize("batch", [4, 64])
def test_a_dataset_of_small_weight_gives_its_rows_before_it_repeats_them(batch):
    sets = [TrainingSet(Files([500] * 4, True), None, Everything()) for _ in range(3)]
    of = StreamMixture(sets, [0.8, 0.15, 0.05], SEED, 1000, batch)
    rows = [row for part in of_lanes(of, 20_000 // batch)[0] for row in part]
    for dataset, share in ((1, 0.15), (2, 0.05)):
        drawn = [row.row["text"] for row in rows if row.dataset == dataset]
        assert len(drawn) / len(rows) == pytest.approx(share, abs=0.005)
        assert len(set(drawn[:2000])) >= 0.97 * min(len(drawn), 2000)


def neighbours(batches):
    """The share of pairs of a batch's rows, as (file, row), that are of one file and fewer than 1,000 rows apart."""
    found, pairs = 0, 0
    for files, rows in (np.array(batch).T for batch in batches):
        near = (files[:, None] == files) & (abs(rows[:, None] - rows) < 1000)
        found, pairs = found + near.sum() - len(rows), pairs + len(rows) * (len(rows) - 1)
    return found / pairs


@pytest.mark.parametrize(
    ("files", "size", "batch", "accumulated", "weights"),
    [
        (100, 1_000, 512, 1, None),
        (100, 10_000, 512, 1, None),
        (1000, 2_000, 512, 1, None),
        (300, 5_000, 32, 1, None),
        (100, 10_000, 8, 16, None),
        (100, 2_000, 512, 1, [0.9, 0.1]),
    ],
)
def test_rows_of_a_step_are_neighbours_as_in_a_full_shuffle(files, size, batch, accumulated, weights):
    """At most twice as often, for any number of files, batches and accumulated ones, and in a set of small weight."""
    sets = [TrainingSet(Files([size] * files, True), None, Everything()) for _ in weights or [1]]
    of = StreamMixture(sets, weights, SEED, 1000, batch, accumulated)
    numbers = 12_000 // batch // accumulated * accumulated
    rows = [[r.row["text"] for r in part if r.dataset == len(sets) - 1] for part in of_lanes(of, numbers)[0]]
    steps = [list(chain(*rows[begin : begin + accumulated])) for begin in range(0, numbers, accumulated)]
    draw = np.random.default_rng(0)
    shuffled = [np.stack([draw.integers(files, size=512), draw.integers(size, size=512)], 1) for _ in range(100)]
    assert neighbours(steps) < 2 * neighbours(shuffled)


def test_memory_is_bounded_in_bytes(mixture, monkeypatch):
    """A lane holds rows up to a number of bytes, or one, and the order of a lane's files and blocks is whole."""
    monkeypatch.setattr(streams, "BYTES_OF_A_LANE", 60_000)
    of, _ = mixture(4, names=["first"])
    blocks, take = [], Lane._block
    monkeypatch.setattr(Lane, "_block", lambda *given: blocks.append(take(*given)) or blocks[-1])
    rows = [row for part in names(of_lanes(of, 20)[0]) for row in part]
    held = [sum(len(row["audio"]["bytes"]) for _, row in block) for block, _ in blocks]
    assert max(held) > 60_000 and all(
        sum(len(row["audio"]["bytes"]) for _, row in block[:-1]) < 60_000 for block, _ in blocks
    )
    assert len({row_id for _, epoch, row_id in rows if epoch == 0}) == 10


def parts_of(make, share, workers, monkeypatch, start=0, places=None):
    """What each of the workers of a process gives to a batch, in turn."""
    iterators = []
    for worker in range(workers):
        monkeypatch.setattr(streams, "get_worker_info", lambda w=worker: SimpleNamespace(num_workers=workers, id=w))
        of, maker = make(12)
        iterators.append(iter(StreamParts(of, maker, list, share, start, places)))
        first = next(iterators[-1])  # reads who it is
        iterators[-1] = (first, iterators[-1])
    while True:
        yield [first for first, _ in iterators]
        iterators = [(next(rest), rest) for _, rest in iterators]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [1, 2])
def test_processes_and_workers_share_a_batch_and_read_nothing_twice(mixture, monkeypatch, processes, workers):
    of, maker = mixture(12)
    whole = [
        [
            identity(maker(r.row, of.sets[r.dataset].columns, r.row_id, visit_of_mixture(r.epoch, r.dataset, 2)))
            for r in batch
        ]
        for batch in of_lanes(of, 4)[0]
    ]
    read = []
    take = Lane.take
    monkeypatch.setattr(Lane, "take", lambda self, batch: read.append((self.number, batch)) or take(self, batch))
    found = [
        list(islice(parts_of(mixture, Share(rank, processes, 12 // processes), workers, monkeypatch), 4))
        for rank in range(processes)
    ]
    batches = [
        [identity(example) for of_rank in found for part, _ in of_rank[batch] for example in part]
        for batch in range(4)
    ]
    assert batches == whole
    assert len(read) == len(set(read)) and {lane for lane, _ in read} == set(range(of.lanes))
    places = {lane: at for of_rank in found for _, of_part in of_rank[3] for lane, at in of_part.items()}
    assert places == of_lanes(of, 4)[1]


def test_two_workers_change_nothing(mixture, whisper):
    """In processes of their own; tensors and the places that a checkpoint keeps."""
    collator = Collator(whisper.window, whisper.grammar.end)
    taken = []
    for workers in (0, 2):
        of, maker = mixture(8)
        batches = StreamBatches(StreamParts(of, maker, collator, Share(1, 2, 4)), workers, collator.padding)
        taken.append((list(islice(batches, 3)), batches.places))
    (alone, places), (shared, places_shared) = taken
    assert places == places_shared and len(places) == 4
    for one, other in zip(alone, shared, strict=True):
        assert one.waveforms.equal(other.waveforms) and one.labels.equal(other.labels)
        assert one.decoder_input_ids.equal(other.decoder_input_ids)
        assert (one.tokens, one.seconds, one.lengths) == (other.tokens, pytest.approx(other.seconds), other.lengths)


def test_there_are_no_more_workers_than_lanes(mixture):
    of, maker = mixture(4)
    batches = StreamBatches(StreamParts(of, maker, list, Share(1, 2, 2)), 5, 0)
    assert batches._workers == 2


def test_parts_are_joined_as_one_batch(make_sets, whisper):
    sets, maker = make_sets(False)
    examples = [MapExamples(sets, maker)[0, row, 0, True] for row in range(5)]
    collator = Collator(whisper.window, whisper.grammar.end)
    useless = collator([MapExamples(sets, maker)[0, 0, 0, False]])
    whole, parts = collator(examples), [collator(examples[:2]), useless, collator(examples[2:])]
    together = joined(parts, collator.padding)
    for name in ("waveforms", "decoder_input_ids", "labels", "valid_positions"):
        assert getattr(together, name).equal(getattr(whole, name)), name
    assert together.row_ids == whole.row_ids and len(together.row_ids) == 5
    assert (together.tokens, together.lengths, together.audio_keys) == (whole.tokens, whole.lengths, whole.audio_keys)
    assert joined([useless, useless], collator.padding).labels.shape == useless.labels.shape


def test_an_example_depends_on_epoch_and_row_alone(mixture, make_sets):
    """Whatever the order: map-style and streamed rows with the same id have the same sequence in the same epoch."""
    sets, map_maker = make_sets(False)
    by_epoch = [
        {
            example.row_id: identity(example)
            for dataset in range(2)
            for example in (
                MapExamples(sets, map_maker)[dataset, i, epoch, True] for i in range(len(sets[dataset].kept))
            )
        }
        for epoch in range(3)
    ]
    assert by_epoch[0].keys() == by_epoch[1].keys() and len(by_epoch[0]) == 16
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]
    assert {"labelled/0", "first/default/train/00001-00000001"} <= by_epoch[0].keys()
    of, maker = mixture(4)
    epochs = set()
    for row in (row for batch in of_lanes(of, 15)[0] for row in batch):
        if row.epoch < 3:
            visit = visit_of_mixture(row.epoch, row.dataset, 2)
            example = maker(row.row, of.sets[row.dataset].columns, row.row_id, visit)
            assert identity(example) == by_epoch[row.epoch][row.row_id]
            epochs.add(row.epoch)
    assert epochs == {0, 1, 2}


def test_a_stream_of_which_no_row_is_left_ends_with_the_reasons(mixture):
    of, _ = mixture(2, names=["first"], wer_threshold=-1.0)
    with pytest.raises(
        UserError, match=r"no row of first/default/train is left to train on \(10 x WER above --wer_threshold, 1 x"
    ):
        of_lanes(of, 1)


def test_a_lane_waits_for_the_few_rows_that_are_left(mixture, make_sets):
    """A lane may find nothing for an epoch or more where other lanes do."""
    of, _ = mixture(6, names=["first"])
    kept = of.sets[0].row_filter
    rows = [r for batch in of_lanes(of, 6)[0] for r in batch]
    only = rows[0].row["text"], rows[0].row["audio"]["bytes"]
    of.sets[0].row_filter = OnlyRow(kept, only)
    lane = Lane(of, 0)
    assert [row.row_id for batch in range(3) for row in lane.take(batch)] == [rows[0].row_id] * 3


class OnlyRow:
    """A filter that leaves one row."""

    def __init__(self, inner, only):
        self.trimmed, self.only = inner.trimmed, only

    def __call__(self, row):
        audio = row.get("audio")
        return "kept" if row["text"] == self.only[0] and (audio is None or audio["bytes"] == self.only[1]) else "left"


@pytest.mark.parametrize("kind", ["map", "streamed", "counted"])
def test_every_other_row_of_a_unit(make_sets, monkeypatch, kind):
    monkeypatch.setattr("distil_whisper.reading._ROWS_AT_ONCE", 3)  # so that a unit is read in several tables
    (training_set, *_), _ = make_sets(kind != "map")
    source, whole = training_set.source, [*make_sets(False)[0][0].source.rows(0)]
    assert len(whole) == 4
    if kind == "counted":
        assert [unit.rows for unit in source.units] == [None] * 3
        source.take_counts(source.count_rows())
        assert [unit.rows for unit in source.units] == [4, 4, 3] and source.num_rows == 11
    for start, step in np.ndindex(4, 5):
        assert [*source.rows(0, None, start, step + 1)] == whole[start :: step + 1]
    assert [*source.rows(0, ["text"], 1)] == [{"text": row["text"]} for row in whole[1:]]


def test_a_row_group_before_the_rows_is_not_read(tmp_path, monkeypatch):
    table = pa.table({"number": range(1000)})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=100)
    read, iterate = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, *size, **how: read.append(how) or iterate(self, *size, **how)
    )
    found = next(row_groups.tables(str(tmp_path / "rows.parquet"), ["number"], 730, 16))
    assert found.column("number").to_pylist() == [730, 731] and read[0]["row_groups"] == [7, 8, 9]
    assert row_groups.count_rows(str(tmp_path / "rows.parquet")) == 1000
