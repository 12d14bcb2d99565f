"""Checkpoints that cannot be used: one sentence, whichever of their files is wrong."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding

from distil_whisper import models, outputs
from distil_whisper.errors import UserError
from distil_whisper.models import load_whisper, save_whisper
from distil_whisper.outputs import OutputFolder


@pytest.fixture
def checkpoint(toy_teacher, tmp_path):
    return shutil.copytree(toy_teacher, tmp_path / "model")


def edit(checkpoint, file, **values):
    """Change values of one of a checkpoint's JSON files."""
    path = checkpoint / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"d_model": 64}, r"its weight .* is \[.*\], and its config.json wants \["),
        ({"encoder_ffn_dim": 129}, r"its weight model.encoder.layers.0.fc1.bias is \[128\], and .* wants \[129\]"),
        (
            {"decoder_layers": 2},
            r"weights of layers that its config.json does not name, such as model.decoder.layers.2",
        ),
        ({"decoder_layers": 6}, r"it lacks \d+ weights, such as model.decoder.layers.4"),
        ({"encoder_layers": 0}, r"its config.json has encoder_layers 0; it must be 1 or more"),
        ({"vocab_size": -1}, r"its config.json has vocab_size -1; it must be 1 or more"),
        ({"decoder_attention_heads": 5}, r"decoder_attention_heads 5, which does not divide d_model 32"),
        ({"attention_dropout": 7}, r"attention_dropout 7; it must be at least 0 and below 1"),
        ({"d_model": "many"}, r"cannot be loaded as a Whisper checkpoint: .*d_model"),
        ({"activation_function": "nonsense"}, r"cannot be loaded as a Whisper checkpoint: .*nonsense"),
        (
            {"decoder_start_token_id": 5},
            r"<\|startoftranscript\|> is token 5 of its model, and token \d+ of its tokeni",
        ),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_one_sentence(values, sentence, checkpoint):
    edit(checkpoint, "config.json", **values)
    with pytest.raises(UserError, match=sentence) as caught:
        load_whisper(str(checkpoint), argument="--teacher_checkpoint")
    assert str(caught.value).startswith(f"--teacher_checkpoint {checkpoint} ") and "\n" not in str(caught.value)


def test_a_tokenizer_of_another_whisper_is_one_sentence(checkpoint):
    """Those of large-v2 and large-v3 differ by one token: every label would be shifted by it."""
    edit(checkpoint, "generation_config.json", no_timestamps_token_id=371)
    with pytest.raises(
        UserError, match=r"<\|notimestamps\|> is token 371 of its model, and token \d+ of its tokenizer"
    ):
        load_whisper(str(checkpoint))


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"half": '])
@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"],
)
def test_a_damaged_file_is_one_sentence(file, content, checkpoint):
    (checkpoint / file).write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded as a Whisper checkpoint") as caught:
        load_whisper(str(checkpoint))
    assert "\n" not in str(caught.value)


def test_a_file_of_a_checkpoint_is_not_its_folder(checkpoint):
    with pytest.raises(UserError, match=rf"config.json is a file; give the folder of the checkpoint, {checkpoint}$"):
        load_whisper(str(checkpoint / "config.json"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_are_not_finite_are_neither_loaded_nor_saved(dtype, checkpoint, tmp_path):
    """A number that float16 has not is infinite there."""
    whisper = load_whisper(str(checkpoint), device="cpu")
    file, name = checkpoint / "model.safetensors", "model.decoder.layers.1.fc1.bias"
    weights = load_file(file)
    weights[name][3] = torch.nan if dtype == "float32" else 1e6
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"its weight {name} is not finite in {dtype}$"):
        load_whisper(str(checkpoint), dtype=dtype, device="cpu")
    weights[name][3] = torch.inf
    with OutputFolder(tmp_path / "saved", "stage") as folder:
        with pytest.raises(UserError, match=rf"weights are not finite \(such as {name}\), so they are not saved in"):
            save_whisper(folder, whisper, weights)
        assert not (folder / "config.json").exists()


def test_a_killed_save_leaves_nothing_that_the_next_start_does_not_remove(checkpoint, tmp_path, monkeypatch):
    """Killed while a file is written, no block of a `with` ends and nothing is removed."""
    whisper = load_whisper(str(checkpoint), device="cpu")

    def killed(path, *_):
        (path / "model.safetensors").write_bytes(b"half")
        monkeypatch.setattr(outputs, "remove", lambda path: None)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(models, "write_whisper", killed)
        with OutputFolder(tmp_path / "saved", "stage") as folder, pytest.raises(KeyboardInterrupt):
            save_whisper(folder, whisper)
    assert [*(tmp_path / "saved").rglob("model.safetensors")]
    monkeypatch.undo()
    with OutputFolder(tmp_path / "saved", "stage") as folder:
        assert not [*(tmp_path / "saved").rglob("model.safetensors")]
        save_whisper(folder, whisper)
    assert {path.name for path in (tmp_path / "saved/.distil_whisper").iterdir()} == {"stage.json", "stage.lock"}
    load_whisper(str(tmp_path / "saved"))


def test_a_saved_checkpoint_is_on_the_disk_before_it_has_its_name(checkpoint, tmp_path, monkeypatch):
    whisper, synced, moved = load_whisper(str(checkpoint), device="cpu"), [], {}

    def replace(source, target, replace=os.replace):
        moved[os.path.basename(target)] = os.stat(source).st_ino in synced
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda file, fsync=os.fsync: synced.append(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(os, "replace", replace)
    with OutputFolder(tmp_path, "stage") as folder:
        save_whisper(folder, whisper)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= moved.keys() and all(moved.values())
    assert synced[-1] != tmp_path.stat().st_ino and tmp_path.stat().st_ino in synced  # the last one is of the record


def test_the_table_of_positions_is_read_as_transformers_reads_it(checkpoint):
    ours = load_whisper(str(checkpoint), device="cpu").model.model.decoder.embed_positions
    theirs = WhisperPositionalEmbedding(*ours.weight.shape)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.zeros(2, 5, dtype=torch.long)
    for options in ({}, {"cache_length": 3}, {"position_ids": torch.tensor([[4, 2, 0], [1, 1, 1]])}):
        assert torch.equal(ours(ids, **options), theirs(ids, **options))
