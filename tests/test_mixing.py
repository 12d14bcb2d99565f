"""The order of training: the same rows for any number of processes and workers, and after any resume."""

import pickle
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
from mixtures import SEED, identity

from distil_whisper import mixing
from distil_whisper.mixing import EpochOrder, LabelLengths, MapBatches, MapExamples, Share, map_loader

SIZE = 2


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


def taken(loader, count):
    return [[identity(example) for example in batch] for batch in islice(loader, count)]


def map_examples(make_sets, share, start=0, workers=0, count=12):
    """Examples of the map-style mixture; `list` in the collator's place leaves them apart."""
    sets, maker = make_sets(False)
    order = EpochOrder([len(s.kept) for s in sets], None, SEED)
    return taken(map_loader(sets, MapBatches(order, share, start), maker, list, workers), count)


def test_two_processes_train_on_the_rows_of_one(make_sets):
    whole = map_examples(make_sets, Share(0, 1, 2 * SIZE))
    halves = [map_examples(make_sets, Share(rank, 2, SIZE)) for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole
    assert len({row for batch in whole for row, *_ in batch}) == 16


def test_a_resumed_run_goes_on_with_the_next_batch(make_sets):
    unbroken = map_examples(make_sets, Share(1, 2, SIZE), count=12)
    assert map_examples(make_sets, Share(1, 2, SIZE), start=5, count=7) == unbroken[5:]


def test_a_worker_makes_the_same_example(make_sets):
    sets, maker = make_sets(False)
    loader = map_loader(sets, MapBatches(EpochOrder([4], None, SEED), Share(0, 1, 2)), maker, list, 2)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    sent = pickle.loads(pickle.dumps(loader.dataset))
    assert identity(sent[1, 0, 3, True]) == identity(loader.dataset[1, 0, 3, True])


def test_a_row_that_stands_in_for_none_is_not_trained_on(make_sets):
    sets, maker = make_sets(False)
    example = MapExamples(sets, maker)[0, 0, 0, False]
    assert example.sequence is None and example.problem is None


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
