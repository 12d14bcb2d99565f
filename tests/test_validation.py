"""What a validation makes of the rows that were transcribed."""

from types import SimpleNamespace

import pytest
import torch

from distil_whisper.losses import LossWeights
from distil_whisper.normalisation import normaliser
from distil_whisper.validation import Reference, Validation, ValidationSet, Validator

ALONE = SimpleNamespace(process_index=0, num_processes=1, device="cpu", reduce=lambda sums, _: sums)


class Echo:
    """In the place of a decoder: every row says the same."""

    grammar = SimpleNamespace(decode=lambda ids: "你好世間")

    def __call__(self, waveforms, language, task):
        return [SimpleNamespace(ids=[], problem=None) for _ in waveforms]


@pytest.mark.parametrize(
    "rows, noted", [(["zh", "zh"], False), (["zh", "de"], True), ([("zh", "translate"), ("de", "translate")], False)]
)
def test_rows_of_several_languages_under_one_normaliser_are_told(rows, noted, monkeypatch):
    kinds = [row if isinstance(row, tuple) else (row, "transcribe") for row in rows]
    references = [Reference(f"row {place}", "你好世界", *kind) for place, kind in enumerate(kinds)]
    held_out = ValidationSet("dev", None, None, normaliser(None, "zh", None))
    validator = Validator([held_out], ALONE, None, None, 2, 0, Echo())
    monkeypatch.setattr(ALONE, "autocast", torch.no_grad, raising=False)
    spoken = validator._transcribe(torch.zeros(2, 1), references, [])
    result = Validation()
    validator._record(held_out, torch.ones(4), [], spoken, LossWeights(), result)
    assert result.values["eval/dev/cer"] == 25.0
    assert result.tables["dev"][0] == ["row 0", "你好世界", "你好世間"]
    assert [note.startswith("dev: its rows are in several languages (de, zh)") for note in result.notes] == [
        True
    ] * noted
