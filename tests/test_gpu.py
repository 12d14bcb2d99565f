"""What a GPU computes is what the CPU computes: bash scripts/test.sh -m gpu"""

import math

import pytest
import torch
from stages import ENGLISH, SPEAKERS, label, metrics, rows_of, train_few, weights
from transformers.utils import is_flash_attn_2_available

import run_distillation
from distil_whisper.audio import stack
from distil_whisper.decoding import Decoder
from distil_whisper.models import load_whisper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
TRAINING = [*ENGLISH, "--freeze_encoder", "--timestamp_probability", 0.5, "--condition_on_prev_probability", 0.5]


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Convolutions in float32 are rounded to TF32 unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def on_gpu(monkeypatch):
    """Scripts that are run in this process find the GPU, which the other tests hide from them."""
    return lambda: monkeypatch.delenv("ACCELERATE_USE_CPU")


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_tokens(taught, utterances, graphs, drafts):
    """Also where a step is launched as one CUDA graph, which the next batches use again, if they are no larger."""
    cpu, gpu = (load_whisper(str(taught), device=device) for device in ("cpu", "cuda"))
    decoders = Decoder(cpu, return_timestamps=True), Decoder(gpu, return_timestamps=True, cuda_graphs=graphs)
    waveforms = stack([utterance.samples for utterance in utterances], cpu.window)
    texts = [utterance.text for utterance in utterances] if drafts else None
    for rows in (slice(20, 24), slice(0, 10), slice(10, 20), slice(20, 24), slice(10, 20)):
        told = waveforms[rows], "en", "transcribe", texts and texts[rows]
        expected, found = (decoder(*told) for decoder in decoders)
        assert [row.ids for row in found] == [row.ids for row in expected]
        assert [row.avg_logprob for row in found] == pytest.approx([row.avg_logprob for row in expected], abs=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_labels(on_gpu, taught, labelled, speech_folder, tmp_path, dtype):
    flags = ["--dataset_split_name", "train+test", "--return_timestamps", "--decode_token_ids", False]
    on_gpu()
    folder = label(taught, speech_folder, tmp_path, *ENGLISH, *SPEAKERS, *flags, "--dtype", dtype)
    found, expected = ([row["whisper_transcript"] for row in rows_of(of)] for of in (folder, labelled))
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    assert same == len(expected) or (dtype == "bfloat16" and same > len(expected) / 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_losses(on_gpu, student, taught, labelled, tmp_path, dtype):
    flags = [*TRAINING, "--teacher_model_name_or_path", taught]
    expected = train_few(student, labelled, tmp_path / "cpu", *flags)
    on_gpu()
    folder = train_few(student, labelled, tmp_path / "gpu", *flags, "--dtype", dtype)
    losses = [[line["train/loss"] for line in metrics(of, "train/loss")] for of in (expected, folder)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if dtype == "float32" else 5e-2)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}


def test_all_that_runs_on_the_device(on_gpu, student, taught, labelled, tmp_path):
    """Augmentation, evaluation with generation, checkpointing of activations, a worker and pinned memory, resume."""
    flags = [*TRAINING, "--teacher_model_name_or_path", taught, "--dtype", "bfloat16", "--gradient_checkpointing"]
    flags += ["--apply_spec_augment", "--mask_time_prob", 0.1, "--noise_probability", 0.5, "--save_steps", 2]
    flags += ["--do_eval", "--eval_split_name", "test", "--predict_with_generate", "--dataloader_num_workers", 1]
    on_gpu()
    folder = train_few(student, labelled, tmp_path, *flags)
    train_few(student, labelled, tmp_path, *flags, "--max_steps", 6)
    lines = metrics(folder, "train/loss")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line["train/loss"]) for line in lines) and metrics(folder, "eval/wer")


@pytest.mark.parametrize("streaming", [False, True])
def test_caches(on_gpu, student, taught, labelled, tmp_path, streaming):
    flags = [*TRAINING, "--teacher_model_name_or_path", taught, "--max_steps", 12, "--streaming", streaming]
    on_gpu()
    plain = train_few(student, labelled, tmp_path / "plain", *flags)
    kept = train_few(student, labelled, tmp_path / "kept", *flags, "--cache_encoder_outputs", "--cache_teacher_states")
    losses = [[line["train/loss"] for line in metrics(of, "train/loss")] for of in (plain, kept)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)  # they are kept in bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("caches", [[], ["--cache_encoder_outputs", "--cache_teacher_states"]])
def test_a_step_is_not_waited_for(on_gpu, student, taught, labelled, monkeypatch, tmp_path, dtype, caches):
    """From the second step on: torch raises where the GPU is waited for. All is in the caches in the second epoch."""
    step = run_distillation.optimizer_step

    def watched(run, *rest):
        torch.cuda.set_sync_debug_mode("error" if run.state.step >= (6 if caches else 1) else "default")
        try:
            step(run, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(run_distillation, "optimizer_step", watched)
    flags = [*ENGLISH, "--freeze_encoder", "--timestamp_probability", 1, "--condition_on_prev_probability", 0]
    on_gpu()
    flags += ["--teacher_model_name_or_path", taught, "--dtype", dtype, "--max_steps", 9, "--logging_steps", 9]
    folder = train_few(student, labelled, tmp_path, *flags, *caches)
    assert math.isfinite(metrics(folder, "train/loss")[-1]["train/loss"])


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
def test_flash_attention(on_gpu, student, taught, labelled, tmp_path):
    flags = [*TRAINING, "--teacher_model_name_or_path", taught, "--dtype", "bfloat16", "--attn_type"]
    on_gpu()
    runs = [train_few(student, labelled, tmp_path / kind, *flags, kind) for kind in ("sdpa", "flash_attention_2")]
    losses = [[line["train/loss"] for line in metrics(of, "train/loss")] for of in runs]
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)
