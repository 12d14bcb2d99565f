"""The order of training: the same rows for any number of processes and workers, and after any resume."""

import pickle
from collections import Counter
from itertools import chain, islice
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_utterances
from datasets import Dataset, Features, List, Value

from distil_whisper import mixing
from distil_whisper.errors import UserError
from distil_whisper.examples import ExampleMaker, LabelColumns, Labeller, LabelSettings
from distil_whisper.filtering import FilterSettings, RowFilter
from distil_whisper.mixing import (
    EpochOrder,
    LabelLengths,
    MapBatches,
    MapExamples,
    Share,
    StreamBatches,
    TrainingSet,
    map_loader,
    stream_loader,
)
from distil_whisper.models import load_whisper
from distil_whisper.normalisation import Normalisers
from distil_whisper.reading import open_source

ROWS = {"first": 11, "second": 6}
SEED, SIZE = 7, 2
TEXT = Value("string")
FEATURES = Features(
    {
        "audio": {"bytes": Value("binary"), "path": TEXT},
        "whisper_transcript": TEXT,
        "condition_on_prev": List(Value("int32")),
        "row_id": TEXT,
        "text": TEXT,
    }
)


@pytest.fixture(scope="module")
def whisper(toy_teacher):
    return load_whisper(str(toy_teacher), device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two labelled datasets, the first in three files; its row 4 is too long, and the second's rows have ids."""
    root = tmp_path_factory.mktemp("labelled")
    for name, count in ROWS.items():
        rows = [
            {
                "audio": {"bytes": u.encoded(), "path": None},
                "whisper_transcript": f"<|0.00|> {u.text}<|1.00|>" if (name, i) != ("first", 4) else "",
                "condition_on_prev": [1, 2, 3],
                "row_id": f"labelled/{i}" if name == "second" else None,
                "text": u.text,
            }
            for i, u in enumerate(make_utterances(count, seed=count))
        ]
        for index, part in enumerate(np.array_split(np.arange(count), 3 if name == "first" else 1)):
            (root / name).mkdir(exist_ok=True)
            table = Dataset.from_list([rows[i] for i in part], features=FEATURES)
            table.to_parquet(root / name / f"train-{index:05d}-of-00003.parquet")
    return root


@pytest.fixture(scope="module")
def make_sets(folders, whisper, tmp_path_factory):
    """The training sets of the folders, map-style or streamed."""
    cache = str(tmp_path_factory.mktemp("cache"))
    labeller = Labeller(whisper.grammar, LabelSettings(0.5, 0.5, SEED))
    columns = LabelColumns("text", True, "hi", "transcribe")
    rules = Normalisers(None, whisper.tokenizer)

    def make(streaming, names=tuple(ROWS), wer_threshold=None):
        row_filter = RowFilter(labeller, columns, rules, FilterSettings(wer_threshold, None, 4.0))
        sets = []
        for name in names:
            source = open_source(str(folders / name), streaming=streaming, cache_dir=cache)
            kept = np.array([i for i in range(ROWS[name]) if (name, i) != ("first", 4)])
            sets.append(TrainingSet(source, columns, row_filter, kept))
        return sets, ExampleMaker(labeller, whisper.window, "audio")

    return make


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", range(1, 13))
def test_the_shares_of_a_batch_are_the_batch(rows, processes):
    shares = [Share(rank, processes, 3).of(list(range(rows))) for rank in range(processes)]
    assert [row for mine, counts in shares if counts for row in mine] == list(range(rows))
    assert all(mine == [0] for mine, counts in shares if not counts)  # a copy, so that the process has a batch
    assert all(mine for mine, _ in shares)
    assert max(len(mine) for mine, _ in shares) - min(len(mine) * counts for mine, counts in shares) <= 1


def test_without_weights_every_row_comes_once_an_epoch_in_an_order_of_its_own():
    order = EpochOrder([5, 3, 40], None, SEED)
    epochs = [order(epoch).tolist() for epoch in range(3)]
    rows = [[dataset, row] for dataset, size in enumerate([5, 3, 40]) for row in range(size)]
    assert all(sorted(epoch) == rows for epoch in epochs) and len(order) == len(rows)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and rows not in epochs
    assert EpochOrder([5, 3, 40], None, SEED)(1).tolist() == epochs[1]
    assert EpochOrder([5, 3, 40], None, SEED + 1)(1).tolist() != epochs[1]


def test_weights_decide_how_often_a_dataset_is_drawn():
    order = EpochOrder([300, 1000, 700], [6.0, 3.0, 1.0], SEED)
    pairs = order(0)
    drawn = Counter(pairs[:, 0].tolist())
    assert len(pairs) == len(order) == 2000
    for dataset, share in enumerate([0.6, 0.3, 0.1]):
        assert drawn[dataset] / 2000 == pytest.approx(share, abs=0.04)
    for dataset, size in enumerate([300, 1000, 700]):  # none is used again before all are used
        uses = Counter(pairs[pairs[:, 0] == dataset, 1].tolist())
        assert set(uses) <= set(range(size))
        assert max(uses.values()) - min(uses.values() if len(uses) == size else [0]) <= 1
    assert pairs.tolist() != order(1).tolist()
    assert pairs.tolist() == EpochOrder([300, 1000, 700], [6.0, 3.0, 1.0], SEED)(0).tolist()


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_map_batches_of_all_processes_are_the_global_batches(weights, start, processes):
    size = 6 // processes
    order = EpochOrder([17, 10], weights, SEED)  # 27 rows: 4 batches of 6, and one of 3
    whole = list(islice(MapBatches(order, Share(0, 1, 6)), 20))
    assert [len(batch) for batch in whole[:6]] == [6, 6, 6, 6, 3, 6]
    assert [key[1:3] for batch in whole[5:10] for key in batch] == [tuple(pair) for pair in order(1).tolist()]
    assert {key[0] for batch in whole[5:10] for key in batch} == {1}
    parts = [
        list(islice(MapBatches(order, Share(rank, processes, size), start), 20 - start)) for rank in range(processes)
    ]
    assert [[key for part in parts_of_batch for key in part] for parts_of_batch in zip(*parts, strict=True)] == whole[
        start:
    ]
    assert MapBatches(order, Share(0, processes, size)).per_epoch == 5


def identity(example):
    """What must be equal wherever and whenever an example is made."""
    sequence = example.sequence and (tuple(example.sequence.decoder_input_ids), tuple(example.sequence.labels))
    return example.row_id, sequence, None if example.samples is None else example.samples.tobytes()


def taken(loader, count):
    return [[identity(example) for example in batch] for batch in islice(loader, count)]


def map_examples(make_sets, share, start=0, workers=0, count=12):
    """Examples of the map-style mixture; `list` in the collator's place leaves them apart."""
    sets, maker = make_sets(False)
    order = EpochOrder([len(s.kept) for s in sets], None, SEED)
    return taken(map_loader(sets, MapBatches(order, share, start), maker, list, workers), count)


def streamed(make_sets, share, start=0, weights=None, block_size=4, names=tuple(ROWS), **filters):
    sets, maker = make_sets(True, names, **filters)
    return StreamBatches(sets, weights, maker, list, share, SEED, block_size, start)


def stream_examples(make_sets, share, start=0, workers=0, count=12):
    return taken(stream_loader(streamed(make_sets, share, start), workers), count)


@pytest.mark.parametrize("examples", [map_examples, stream_examples])
def test_two_processes_train_on_the_rows_of_one(make_sets, examples):
    whole = examples(make_sets, Share(0, 1, 2 * SIZE))
    halves = [examples(make_sets, Share(rank, 2, SIZE)) for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole
    assert len({row for batch in whole for row, *_ in batch}) == 16


@pytest.mark.parametrize("examples", [map_examples, stream_examples])
def test_a_resumed_run_goes_on_with_the_next_batch(make_sets, examples):
    unbroken = examples(make_sets, Share(1, 2, SIZE), count=12)
    assert examples(make_sets, Share(1, 2, SIZE), start=5, count=7) == unbroken[5:]


def test_two_workers_change_nothing(make_sets):
    """Of a stream in processes of their own; of map-style rows, whose order is not theirs, what a worker is given."""
    unbroken = stream_examples(make_sets, Share(1, 2, SIZE), count=8)
    assert stream_examples(make_sets, Share(1, 2, SIZE), start=3, workers=2, count=5) == unbroken[3:]
    sets, maker = make_sets(False)
    loader = map_loader(sets, MapBatches(EpochOrder([4], None, SEED), Share(0, 1, 2)), maker, list, 2)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    sent = pickle.loads(pickle.dumps(loader.dataset))
    assert identity(sent[1, 0, 3, True]) == identity(loader.dataset[1, 0, 3, True])


@pytest.mark.parametrize("workers, start", [(2, 0), (2, 1), (3, 2), (2, 5)])
def test_streaming_workers_share_the_batches_in_turn(make_sets, monkeypatch, workers, start):
    unbroken = stream_examples(make_sets, Share(0, 1, SIZE))
    found = []
    for worker in range(workers):
        monkeypatch.setattr(mixing, "get_worker_info", lambda w=worker: SimpleNamespace(num_workers=workers, id=w))
        found.append(taken(streamed(make_sets, Share(0, 1, SIZE), start), 4))
    in_turn = [batch for batches in zip(*found, strict=True) for batch in batches]
    assert in_turn[: 12 - start] == unbroken[start : start + len(in_turn)][: 12 - start]


def test_an_example_depends_on_epoch_and_row_alone(make_sets):
    """Whatever the order: map-style and streamed rows with the same id have the same sequence in the same epoch."""
    sets, maker = make_sets(False)
    by_epoch = [
        {
            example.row_id: identity(example)
            for dataset in range(2)
            for example in (MapExamples(sets, maker)[epoch, dataset, i, True] for i in range(len(sets[dataset].kept)))
        }
        for epoch in range(3)
    ]
    assert by_epoch[0].keys() == by_epoch[1].keys() and len(by_epoch[0]) == 16
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]
    assert {"labelled/0", "first/default/train/00001-00000001"} <= by_epoch[0].keys()
    stream = streamed(make_sets, Share(0, 1, SIZE))
    made = [example for batch in islice(stream, 30) for example in batch]
    epochs = set()
    for example, (_, epoch, row_id, _) in zip(made, stream.rows(), strict=False):
        if epoch < 3:
            assert identity(example) == by_epoch[epoch][row_id]
            epochs.add(epoch)
    assert epochs == {0, 1, 2}


def test_a_row_that_stands_in_for_none_is_not_trained_on(make_sets):
    sets, maker = make_sets(False)
    example = MapExamples(sets, maker)[0, 0, 0, False]
    assert example.sequence is None and example.problem is None


@pytest.mark.parametrize("name", ROWS)
def test_streamed_rows_come_once_an_epoch_in_a_new_order_each_time(make_sets, name):
    usable = ROWS[name] - (name == "first")
    rows = [
        (epoch, row_id)
        for _, epoch, row_id, _ in islice(streamed(make_sets, Share(0, 1, 2), names=[name]).rows(), 3 * usable)
    ]
    epochs = [[row_id for epoch, row_id in rows if epoch == number] for number in range(3)]
    assert [len(set(epoch)) for epoch in epochs] == [usable] * 3
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert "first/default/train/00001-00000000" not in epochs[0]  # the row whose label is empty


def test_streamed_datasets_are_mixed_equally_or_by_weight(make_sets):
    for weights, share in [(None, 0.5), ([9.0, 1.0], 0.9)]:
        stream = streamed(make_sets, Share(0, 1, 2), weights=weights)
        drawn = Counter(dataset for dataset, *_ in islice(stream.rows(), 150))
        assert drawn[0] / 150 == pytest.approx(share, abs=0.15)


def test_a_stream_of_which_no_row_is_left_ends_with_the_reasons(make_sets):
    stream = streamed(make_sets, Share(0, 1, 2), names=["first"], wer_threshold=-1.0)
    with pytest.raises(UserError, match=r"no row of first/default/train is left .*wer_threshold': 10"):
        next(stream.rows())


def test_rows_of_like_length_share_a_batch(make_sets, monkeypatch):
    """Prompts count, each row is there once an epoch, and a resumed run goes on with the very next batch."""
    monkeypatch.setattr(mixing, "GROUPED_BATCHES", 4)
    sets, maker = make_sets(False)
    lengths = LabelLengths(sets, maker.labeller, "audio")
    order, share = EpochOrder([len(s.kept) for s in sets], None, SEED), Share(0, 1, SIZE)
    per_epoch = MapBatches(order, share).per_epoch
    grouped = list(islice(MapBatches(order, share, 0, lengths), 2 * per_epoch))
    plain = list(islice(MapBatches(order, share), 2 * per_epoch))
    assert sorted(chain.from_iterable(grouped)) == sorted(chain.from_iterable(plain)) and grouped != plain

    def padding(batches):
        found = [lengths(batch[0][0], np.array([key[1:3] for key in batch])) for batch in batches]
        return sum(len(batch) * batch.max() - batch.sum() for batch in found)

    assert padding(grouped) < padding(plain)
    epochs = {tuple(lengths(epoch, order(0)).tolist()) for epoch in range(4)}
    assert len(epochs) > 1  # timestamps and prompts are drawn again
    for start in (1, 5, per_epoch + 3):
        assert list(islice(MapBatches(order, share, start, lengths), 4)) == grouped[start : start + 4]
