"""The order of training: the same rows for any number of processes and workers, and after any resume."""

import json
import math
import pickle
from collections import Counter
from itertools import chain, islice
from types import SimpleNamespace

import numpy as np
import pytest
from mixtures import SEED, identity

from distil_whisper import mixing
from distil_whisper.examples import Labeller
from distil_whisper.mixing import EpochOrder, LabelLengths, MapBatches, MapExamples, Share, TrainingSet, map_loader
from distil_whisper.training_sets import Mixture

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
    rows = [[[dataset, row, e] for dataset, size in enumerate([5, 3, 40]) for row in range(size)] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == rows and len(order) == len(rows[0])
    plain = [[sample[:2] for sample in epoch] for epoch in epochs]
    assert plain[0] != plain[1] != plain[2] != plain[0] and epochs[0] != rows[0]
    assert EpochOrder([5, 3, 40], None, SEED)(1).tolist() == epochs[1]
    assert EpochOrder([5, 3, 40], None, SEED + 1)(1).tolist() != epochs[1]


def test_weights_decide_how_often_a_dataset_is_drawn():
    order = EpochOrder([300, 1000, 700], [6.0, 3.0, 1.0], SEED)
    pairs = order(0)
    drawn = Counter(pairs[:, 0].tolist())
    assert len(pairs) == len(order) == 2000
    for dataset, share in enumerate([0.6, 0.3, 0.1]):
        assert drawn[dataset] / 2000 == pytest.approx(share, abs=0.04)
    assert pairs.tolist() != order(1).tolist()
    assert pairs.tolist() == EpochOrder([300, 1000, 700], [6.0, 3.0, 1.0], SEED)(0).tolist()


def test_a_dataset_gives_all_its_rows_before_it_gives_one_again():
    """Across epochs, however small its weight; each visit has its number, and any epoch can be had at once."""
    sizes, weights = [300, 1000, 700, 1], [8.0, 1.0, 0.5, 0.5]
    order = EpochOrder(sizes, weights, SEED)
    epochs = [order(epoch) for epoch in range(12)]
    samples = np.concatenate(epochs)
    for dataset, size in enumerate(sizes):
        rows = samples[samples[:, 0] == dataset, 1:]  # in the order of training
        rounds = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        assert [set(visits) for visits in (part[:, 1] for part in rounds)] == [{n} for n in range(len(rounds))]
        assert all(len(set(part[:, 0])) == len(part) for part in rounds)
        assert [sorted(part[:, 0]) == list(range(size)) for part in rounds[:-1]] == [True] * (len(rounds) - 1)
        assert size == 1 or rounds[0].tolist() != rounds[1].tolist()
    assert len({tuple(sample) for sample in samples.tolist()}) == len(samples)
    again = EpochOrder(sizes, weights, SEED)
    assert again(11).tolist() == epochs[11].tolist() and again(3).tolist() == epochs[3].tolist()


def test_the_order_of_runs_that_have_begun_stays():
    """Without weights: what the version before this order gave."""
    old = np.random.default_rng([SEED, 5]).permutation([[0, row] for row in range(9)] + [[1, row] for row in range(4)])
    assert EpochOrder([9, 4], None, SEED)(5)[:, :2].tolist() == old.tolist()


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize("start", [0, 6, 24, 27, 72])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_map_batches_of_all_processes_are_the_global_batches(weights, start, processes):
    size = 6 // processes
    order = EpochOrder([17, 10], weights, SEED)  # 27 rows: 4 batches of 6, and one of 3
    batches = MapBatches(order, Share(0, 1, 6))
    whole = list(islice(batches, 25))
    assert [len(batch) for batch in whole[:6]] == [6, 6, 6, 6, 3, 6]
    assert [key[:3] for batch in whole[5:10] for key in batch] == [tuple(sample) for sample in order(1).tolist()]
    first = batches.number(start)
    assert batches.after(0, first) == start
    parts = [list(islice(MapBatches(order, Share(rank, processes, size), start), 9)) for rank in range(processes)]
    joined = [[key for part in of_batch for key in part] for of_batch in zip(*parts, strict=True)]
    assert joined == whole[first : first + 9]
    assert MapBatches(order, Share(0, processes, size)).per_epoch == 5


@pytest.mark.parametrize("start", [0, 1, 26, 27, 40])
@pytest.mark.parametrize("size", [1, 4, 6, 27, 50])
def test_positions_are_those_of_the_batches(start, size):
    """Whatever the batches were before: the samples of the order go on with the very next one."""
    order = EpochOrder([17, 10], None, SEED)
    batches = MapBatches(order, Share(0, 1, size), start)
    samples = [tuple(sample) for epoch in range(60) for sample in order(epoch).tolist()]
    position = start
    for number, batch in enumerate(islice(batches, 30)):
        assert batches.after(start, number) == position and batches.number(position) == batches.number(start) + number
        assert [key[:3] for key in batch] == samples[position : position + len(batch)]
        position += len(batch)


def test_rows_of_a_group_are_not_lost_where_its_batches_are_of_another_size(monkeypatch):
    """A run that goes on with other batches at the border of a group sees each row once; within one, groups begin
    anew there, and a later resume goes on in those."""
    monkeypatch.setattr(mixing, "GROUPED_BATCHES", 3)
    order = EpochOrder([40], None, SEED)

    def lengths(samples):
        return samples[:, 1] % 7

    before = MapBatches(order, Share(0, 1, 4), 0, lengths)
    assert [before.begins_group(position) for position in (0, 4, 12, 20, 36, 40)] == [
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    rows = [key[1] for batch in islice(before, 3) for key in batch]
    later = list(islice(MapBatches(order, Share(0, 1, 3), 12, lengths, 12), 10))
    assert sorted(rows + [key[1] for batch in later for key in batch]) == list(range(40))
    resumed = MapBatches(order, Share(0, 1, 3), 12 + 12, lengths, 12)
    assert list(islice(resumed, 6)) == later[4:]


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
    assert map_examples(make_sets, Share(1, 2, SIZE), start=5 * 2 * SIZE, count=7) == unbroken[5:]


def test_a_worker_makes_the_same_example(make_sets):
    sets, maker = make_sets(False)
    loader = map_loader(sets, MapBatches(EpochOrder([4], None, SEED), Share(0, 1, 2)), maker, list, 2)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    sent = pickle.loads(pickle.dumps(loader.dataset))
    assert identity(sent[0, 3, 1, True]) == identity(loader.dataset[0, 3, 1, True])


def test_a_row_that_stands_in_for_none_is_not_trained_on(make_sets):
    sets, maker = make_sets(False)
    example = MapExamples(sets, maker)[0, 0, 0, False]
    assert example.sequence is None and example.problem is None


def test_rows_of_like_length_share_a_batch(make_sets, monkeypatch):
    """Prompts count, each row is there once an epoch, and a resumed run goes on with the very next batch."""
    monkeypatch.setattr(mixing, "GROUPED_BATCHES", 4)
    sets, maker = make_sets(False)
    lengths = LabelLengths(sets, maker.labeller)
    order, share = EpochOrder([len(s.kept) for s in sets], None, SEED), Share(0, 1, SIZE)
    per_epoch = MapBatches(order, share).per_epoch
    grouped = list(islice(MapBatches(order, share, 0, lengths), 2 * per_epoch))
    plain = list(islice(MapBatches(order, share), 2 * per_epoch))
    assert sorted(chain.from_iterable(grouped)) == sorted(chain.from_iterable(plain)) and grouped != plain

    def padding(batches):
        found = [lengths(np.array([key[:3] for key in batch])) for batch in batches]
        return sum(len(batch) * batch.max() - batch.sum() for batch in found)

    assert padding(grouped) < padding(plain)
    for dataset, position, visit in order(0).tolist():
        index = int(sets[dataset].kept[position])
        row = sets[dataset].source.dataset[index]
        row_id = sets[dataset].row_id(row, *sets[dataset].source.locate(index))
        of_mixture = mixing.visit_of_mixture(visit, dataset, len(sets))
        sequence = maker.labeller.sequence(row, sets[dataset].columns, row_id, of_mixture)
        assert lengths(np.array([[dataset, position, visit]])) == len(sequence.labels)
    monkeypatch.setattr(Labeller, "target", None)  # no label is tokenised again
    visits = {tuple(lengths(order(0) + np.array([0, 0, visit])).tolist()) for visit in range(4)}
    assert len(visits) > 1  # timestamps and prompts are drawn again
    for start in (1, 5, per_epoch + 3):
        batches = MapBatches(order, share, MapBatches(order, share).after(0, start), lengths)
        assert list(islice(batches, 4)) == grouped[start : start + 4]


@pytest.fixture
def mixture(make_sets):
    """A Mixture with batches of so many rows, and what it says."""

    def make(batch, processes=1, weights=None, grouped=False):
        sets, maker = make_sets(False)
        flags = {"streaming": False, "group_by_length": grouped, "dataloader_num_workers": 0, "seed": SEED}
        names = {"train_dataset_name": "a+b", "train_dataset_config_name": None, "train_split_name": "train"}
        args = SimpleNamespace(**flags, **names, train_dataset_samples=weights)
        return Mixture(args, sets, maker, lambda examples: [e.row_id for e in examples], Share(0, processes, batch))

    return make


def rows_of(mixture, batches, said):
    return [row_id for batch in islice(mixture.batches(said.append), batches) for row_id in batch]


@pytest.mark.parametrize("weights", [None, "1+3"])
@pytest.mark.parametrize(("batch", "later"), [(4, 2), (4, 8), (3, 5)])
def test_a_run_that_goes_on_with_other_batches_sees_the_next_samples(mixture, weights, batch, later):
    said = []
    unbroken = rows_of(mixture(1, weights=weights), 48, said)  # 16 rows: three epochs
    before = mixture(batch, weights=weights)
    rows = rows_of(before, 7, said)
    kept = json.loads(json.dumps(before.to_keep()))
    after = mixture(later, weights=weights)
    after.resume(kept, 7, {"gradient_accumulation_steps": 1}, said.append)
    left = math.ceil(after.batches_until(3))
    assert rows + rows_of(after, left, said) == unbroken and not said
    assert after.epoch == 3 and after.batches_until(3) == 0


def test_the_position_of_an_earlier_version_is_told_by_the_arguments_of_then(mixture):
    """It counted batches: so many steps, each of so many. Weighted sampling goes on in another order."""
    before = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    for weights, lines in ((None, 1), ("1+3", 2)):
        said, after = [], mixture(2, processes=2, weights=weights)
        after.resume({}, 4, before, said.append)  # epochs of 16 rows: batches of 6, 6 and 4
        assert after.position == 2 * 16 + 2 * 6 and len(said) == lines
        assert "earlier version" in said[0] and ("new order" in said[-1]) == (weights is not None)


def test_a_group_that_is_left_with_other_batches_is_said(mixture, monkeypatch):
    monkeypatch.setattr(mixing, "GROUPED_BATCHES", 2)
    for batches, later, grouped, lines in ((1, 4, True, 0), (1, 2, True, 1), (2, 2, True, 0), (1, 4, False, 1)):
        said, before = [], mixture(4, grouped=True)
        rows_of(before, batches, said)
        after = mixture(later, grouped=grouped)
        after.resume(before.to_keep(), batches, {"gradient_accumulation_steps": 1}, said.append)
        assert len(said) == lines and all("come twice or not at all" in line for line in said)


def test_a_row_that_is_in_two_datasets_is_drawn_for_each(make_sets):
    """With timestamps and prompts in half of the samples, some differ between two copies of a dataset."""
    sets, maker = make_sets(False, ("first", "first"))
    examples = MapExamples(sets, maker)
    copies = [
        [identity(examples[dataset, row, visit, True]) for row in range(10)] for dataset in (0, 1) for visit in (0, 1)
    ]
    assert [[row_id for row_id, *_ in copy] for copy in copies] == [[row_id for row_id, *_ in copies[0]]] * 4
    assert len({tuple(sequence for _, sequence, _ in copy) for copy in copies}) == 4


def test_the_identity_of_a_row_is_a_text_whatever_its_column_holds():
    training_set = TrainingSet(SimpleNamespace(row_id=lambda unit, number: f"{unit}-{number}"), None, None)
    found = [training_set.row_id({"row_id": own}, 0, 5) for own in (0, 7, "a", "", None)]
    assert found == ["0", "7", "a", "0-5", "0-5"]
