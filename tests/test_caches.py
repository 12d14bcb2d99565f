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
    whisper = load_whisper(toy_teacher, device="cpu")
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
    assert first == pytest.approx(plain, rel=1e-6)
    assert second == pytest.approx(plain, rel=2e-3)  # kept as bfloat16
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
        writer.put(key, array)
    assert torch.equal(reader.get("a"), arrays["a"]) and torch.equal(reader.get("b"), arrays["b"])
    assert reader.get("c") is None and writer.get("c") is None  # 5 rows were full
    reader.put("d", arrays["a"])
    later = StateFile(tmp_path, "states", 4, 2 * 5 * 4 * 2, 0, 2)
    assert torch.equal(later.get("d"), arrays["a"]) and torch.equal(later.get("b"), arrays["b"])


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
    open_caches(tmp_path, made, True, True, 1.0, 0, 1)(batch, "cpu")
    with torch.no_grad():
        made.teacher.model.encoder.conv1.weight.mul_(2)
        made.student.model.encoder.conv1.weight.mul_(2)
    plain = made(**batch.inputs("cpu"))["loss"].item()
    caches = open_caches(tmp_path, made, True, True, 1.0, 0, 1)
    assert made(**batch.inputs("cpu"), **caches(batch, "cpu"))["loss"].item() == pytest.approx(plain, rel=1e-6)
