"""The caches: what is kept is what would be computed, and nothing is kept that changes."""

import pytest
import torch

from distil_whisper.audio import LogMel
from distil_whisper.augmentation import SpecAugment
from distil_whisper.caches import StateFile, open_caches
from distil_whisper.distiller import Distiller
from distil_whisper.errors import UserError
from distil_whisper.examples import Collator, Example
from distil_whisper.losses import LossWeights
from distil_whisper.models import load_whisper
from distil_whisper.student import make_student
from distil_whisper.tokens import Sequence


@pytest.fixture
def distiller(toy_teacher):
    whisper = load_whisper(str(toy_teacher), device="cpu")
    student, _ = make_student(whisper.model)
    made = Distiller(student, LogMel(whisper.feature_extractor), LossWeights(), whisper.model, freeze_encoder=True)
    return made, Collator(whisper.window, whisper.grammar.end)


def batch_of(collator, *lengths: int):
    draw = torch.Generator().manual_seed(0)
    examples = []
    for row, length in enumerate(lengths):
        ids = torch.randint(0, 200, (length + 1,), generator=draw).tolist()
        samples = torch.randn(8_000, generator=draw).numpy()
        examples.append(Example(f"row {row}", samples, Sequence(ids[:-1], ids[1:]), audio_key=f"audio {row}"))
    return collator(examples)


@pytest.mark.parametrize("kept", [(True, False), (False, True), (True, True)])
def test_the_loss_is_the_one_without_caches_and_the_second_time_nothing_is_computed(distiller, tmp_path, kept):
    made, collator = distiller
    batch = batch_of(collator, 5, 9, 14)
    plain = made(**batch.inputs("cpu"))["loss"].item()
    caches = open_caches(tmp_path, made, *kept, 1.0, 0, 1)
    first = made(**batch.inputs("cpu"), **caches(batch, "cpu"))["loss"].item()
    calls = []
    for name, module in (("encoder", made.teacher.model.encoder), ("decoder", made.teacher.model.decoder)):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    second = made(**batch.inputs("cpu"), **caches(batch, "cpu"))["loss"].item()
    assert first == second == pytest.approx(plain, rel=2e-3)  # kept as bfloat16, and used so from the first time on
    assert ("encoder" in calls, "decoder" in calls) == (not kept[0], not kept[1])


def test_another_labelling_of_the_same_audio_is_computed_anew(distiller, tmp_path):
    made, collator = distiller
    caches = open_caches(tmp_path, made, True, True, 1.0, 0, 1)
    batch, other = batch_of(collator, 6, 6), batch_of(collator, 6, 7)
    caches(batch, "cpu")
    expected = made(**other.inputs("cpu"))["kl"].item()
    assert made(**other.inputs("cpu"), **caches(other, "cpu"))["kl"].item() == pytest.approx(expected, rel=1e-2)


def test_a_file_keeps_to_its_limit_and_is_read_by_other_processes_and_later_runs(tmp_path):
    writer, reader = (StateFile(tmp_path, "states", 4, 2 * 5 * 4 * 2, rank, 2) for rank in (0, 1))
    arrays = {key: torch.randn(rows, 4).bfloat16() for key, rows in (("a", 3), ("b", 2), ("c", 1))}
    for key, array in arrays.items():
        writer.put({key: array})
    assert torch.equal(reader.get("a"), arrays["a"]) and torch.equal(reader.get("b"), arrays["b"])
    assert reader.get("c") is None and writer.get("c") is None  # 5 rows were full
    reader.put({"d": arrays["a"]})
    later = StateFile(tmp_path, "states", 4, 2 * 5 * 4 * 2, 0, 2)
    assert torch.equal(later.get("d"), arrays["a"]) and torch.equal(later.get("b"), arrays["b"])


def test_a_batch_is_kept_whole_or_not_at_all(tmp_path):
    """What a resumed run lacks of a batch it would compute in a smaller one, which gives other bits."""
    file = StateFile(tmp_path, "states", 4, 5 * 4 * 2, 0, 1)
    file.put({"a": torch.ones(3, 4), "b": torch.ones(3, 4)})
    assert file.get("a") is None and file.get("b") is None
    file.put({"a": torch.ones(3, 4), "c": torch.ones(2, 4)})
    assert file.get("a") is not None and file.get("c") is not None


@pytest.mark.parametrize("damage", ["cut", "not utf-8", "no entry", "cut data"])
def test_a_line_that_was_cut_is_passed_over(damage, tmp_path):
    """Only its array is computed again; what comes next has a line of its own, and the place is used again."""
    file = StateFile(tmp_path, "states", 4, 1_000_000, 0, 1)
    for number in range(3):
        file.put({f"row {number}": torch.full((2, 4), float(number))})
    index, data = tmp_path / "states-0.jsonl", tmp_path / "states-0.bf16"
    lines = index.read_bytes().splitlines(keepends=True)
    if damage == "cut data":
        data.write_bytes(data.read_bytes()[:-8])
    else:
        nonsense = b"\xff\xfe\n"
        ends = {"cut": lines[2][:-4], "not utf-8": nonsense, "no entry": b'[["a"], 0, 5]\nnull\n7\n["a", -1, 5]\n'}
        index.write_bytes(b"".join(lines[:2]) + ends[damage])
    again = StateFile(tmp_path, "states", 4, 1_000_000, 0, 1)
    assert again.get("row 2") is None and again.get("row 1")[0, 0] == 1
    again.put({"row 3": torch.full((2, 4), 3.0)})
    later = StateFile(tmp_path, "states", 4, 1_000_000, 0, 1)
    assert [later.get(f"row {number}") is not None for number in range(4)] == [True, True, False, True]
    assert later.get("row 3").eq(3).all() and later.get("row 1").eq(1).all()


def test_what_changes_from_epoch_to_epoch_is_refused(distiller, tmp_path):
    made, _ = distiller
    made.spec_augment = SpecAugment.from_config(made.student.config)
    with pytest.raises(UserError, match="SpecAugment"):
        open_caches(tmp_path, made, True, True, 1.0, 0, 1)
    made.spec_augment, made.shares_encoder = None, False
    with pytest.raises(UserError, match="--freeze_encoder"):
        open_caches(tmp_path, made, True, True, 1.0, 0, 1)


def test_another_teacher_has_other_states(distiller, tmp_path):
    made, collator = distiller
    batch = batch_of(collator, 5, 9)

    def loss(folder):
        caches = open_caches(folder, made, True, True, 1.0, 0, 1)
        return made(**batch.inputs("cpu"), **caches(batch, "cpu"))["loss"].item()

    first = loss(tmp_path / "one")
    with torch.no_grad():
        made.teacher.model.encoder.conv1.weight.mul_(2)
        made.student.model.encoder.conv1.weight.mul_(2)
    assert loss(tmp_path / "one") == loss(tmp_path / "fresh") != first
