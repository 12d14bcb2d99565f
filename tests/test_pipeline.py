"""Stages 1 to 3 one after the other, as the tutorial's commands run them, and with other kinds of models."""

import json
import shutil

import pytest
import toy_whisper
from conftest import ROOT, WORDS, launch, write_audio_dataset
from hub_server import TOKEN, USER, HubServer
from huggingface_hub import ModelCard
from stages import ENGLISH, SPEAKERS, label, metrics, rows_of, run, train_few, weights, write_manifest
from transformers import WhisperForConditionalGeneration

from distil_whisper.models import load_whisper

LABELLING = """
  --dataset_config_name default --dataset_split_name train+test --text_column_name text --id_column_name id
  --wandb_project distil-whisper-labelling --per_device_eval_batch_size 64 --dtype bfloat16
  --dataloader_num_workers 16 --preprocessing_num_workers 1 --logging_steps 500 --max_label_length 60
  --report_to wandb --language en --task transcribe --return_timestamps --attn_type flash_attn --streaming False
  --generation_num_beams 1 --decode_token_ids False --push_to_hub
"""
SCHEDULE = """
  --eval_steps 2 --save_steps 2 --warmup_steps 1 --learning_rate 0.0001 --lr_scheduler_type constant_with_warmup
  --logging_steps 1 --save_total_limit 1 --max_steps 3 --per_device_train_batch_size 4 --per_device_eval_batch_size 4
  --dataloader_num_workers 0 --preprocessing_num_workers 1 --ddp_timeout 7200 --dtype bfloat16 --output_dir ./
  --do_train --do_eval --gradient_checkpointing --overwrite_output_dir --predict_with_generate --freeze_encoder
  --streaming False
"""
TRAINING = """
  --train_dataset_config_name default+default --train_split_name train+test --text_column_name text+text
  --train_dataset_samples 10+5 --eval_dataset_config_name default --eval_split_name test --eval_text_column_name text
  --wer_threshold 1000 --push_to_hub
"""
LOCAL_JSON = """
  --train_dataset_name datasets/train.json --train_dataset_config_name zh --train_split_name train
  --text_column_name sentence --train_dataset_samples 10 --eval_dataset_name datasets/dev.json
  --eval_dataset_config_name zh --eval_split_name test --eval_text_column_name sentence --wer_threshold 10
"""


def test_the_tutorial_from_a_model_repository_to_the_hub(taught, speech_folder, tmp_path):
    """Scripts that were copied into a folder with other files, the package importable; data and teacher by Hub id."""
    repository = tmp_path / "distil-toy"
    repository.mkdir()
    for name in ("create_student_model.py", "run_distillation.py"):
        shutil.copy(ROOT / name, repository)
    (repository / "notes.txt").write_text("mine")
    with HubServer() as hub:
        hub.add(f"{USER}/teacher", taught)
        hub.add(f"{USER}/speech", speech_folder, "dataset")
        env = {**hub.environment(tmp_path), "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
        teacher, labelled = f"{USER}/teacher", f"{USER}/labelled"
        names = ["--model_name_or_path", teacher, "--dataset_name", f"{USER}/speech", "--output_dir", "./labelled"]
        ran = [launch("run_pseudo_labelling.py", *names, *LABELLING.split(), cwd=tmp_path, env=env)]
        names = ["--teacher_checkpoint", teacher, "--encoder_layers", 2, "--decoder_layers", 2]
        copied = repository / "create_student_model.py"
        ran += [launch(copied, *names, "--save_dir", "./init", cwd=repository, env=env)]
        names = ["--model_name_or_path", "./init", "--teacher_model_name_or_path", teacher, *ENGLISH]
        names += ["--train_dataset_name", f"{labelled}+{labelled}", "--eval_dataset_name", labelled]
        ran += [
            launch(repository / "run_distillation.py", *names, *(TRAINING + SCHEDULE).split(), cwd=repository, env=env)
        ]
        assert [(one.code, "Traceback" in one.stderr) for one in ran] == [(0, False)] * 3, ran
        data, model = hub.files(labelled, "dataset"), hub.files(f"{USER}/distil-toy")

    assert {name for name in data if name.endswith(".parquet")} == {
        "default/test-00000-of-00001.parquet",
        "default/train-00000-of-00002.parquet",
        "default/train-00001-of-00002.parquet",
    }
    assert (
        data["default/test-00000-of-00001.parquet"]
        == (tmp_path / "labelled/default/test-00000-of-00001.parquet").read_bytes()
    )
    assert list((tmp_path / "labelled/wandb").glob("offline-run-*"))
    card = data["README.md"].decode()
    assert f"- Teacher: {teacher}" in card and f"- Audio: {USER}/speech" in card

    assert (repository / "notes.txt").read_text() == "mine"
    assert (repository / "init/model.safetensors").exists() and (repository / "run_distillation.py").exists()
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md", "metrics.jsonl"} <= set(model)
    assert not any(name.startswith(("checkpoint-", "init", "notes", ".")) for name in model)
    card = ModelCard(model["README.md"].decode())
    assert card.data.base_model == teacher and card.data.datasets == [labelled]
    assert [result.metric_type for result in card.data.eval_results] == ["wer", "cer"]
    pushed = b"".join([*data.values(), *model.values()])
    assert str(tmp_path).encode() not in pushed
    assert TOKEN.encode() not in pushed + b"".join(one.stdout.encode() + one.stderr.encode() for one in ran)
    WhisperForConditionalGeneration.from_pretrained(repository)


def test_local_json_files_as_in_the_tutorial(student, taught, utterances, tmp_path, monkeypatch):
    """A manifest's config name is ignored, its split is the file; its language column names the language."""
    write_manifest(tmp_path / "datasets/train.json", utterances[:12], language="en")
    write_manifest(tmp_path / "datasets/dev.json", utterances[12:16], language="en")
    (tmp_path / "metrics.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    models = ["--model_name_or_path", student, "--teacher_model_name_or_path", taught, "--report_to", "none"]
    run("run_distillation", *models, *(LOCAL_JSON + SCHEDULE).split())
    assert metrics(tmp_path, "eval/wer")[-1]["step"] == 3 and metrics(tmp_path, "train/kl")[-1]["train/kl"] > 0
    assert weights(tmp_path).keys() == weights(student).keys()
    run(
        "run_distillation", *models, *(LOCAL_JSON + SCHEDULE).split()
    )  # --overwrite_output_dir: afresh, and only what is ours goes
    assert [line["step"] for line in metrics(tmp_path, "train/loss")] == [1, 2, 3]
    assert (tmp_path / "metrics.txt").read_text() == "mine" and (tmp_path / "datasets/train.json").exists()


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """Makes random-weight teachers of a kind."""
    texts = [" " + " ".join(WORDS)] * 3

    def make(name, window=2, **options):
        folder = tmp_path_factory.mktemp("teachers") / name
        return toy_whisper.save(folder, texts, window, d_model=32, heads=2, **options)

    return make


def pipeline(teacher, data, folder, *, language=(), labelling=(), training=()):
    """Stages 1 to 3 with a teacher; the folder of the trained student."""
    labelled = label(teacher, data, folder / "labelled", *language, "--max_label_length", 12, *labelling)
    student = folder / "student"
    run("create_student_model", "--teacher_checkpoint", teacher, "--decoder_layers", 1, "--save_dir", student)
    distil = ["--teacher_model_name_or_path", teacher, "--drop_truncated", False, "--drop_empty", False]
    evaluate = ["--do_eval", "--eval_split_name", "train", "--predict_with_generate"]
    return train_few(student, labelled, folder / "trained", *distil, *evaluate, *training)


def test_an_english_only_teacher(untaught, speech_folder, seen, tmp_path):
    teacher = untaught("toy.en", multilingual=False)
    folder = pipeline(teacher, speech_folder, tmp_path, labelling=["--return_timestamps", "--task", "transcribe"])
    grammar = load_whisper(str(folder)).grammar
    assert {row["language"] for row in rows_of(tmp_path / "labelled")} == {None}
    for batch in seen.batches:
        first_two = batch["decoder_input_ids"][:, :2]
        assert set(first_two[:, 0].tolist()) <= {grammar.start, grammar.previous}
    openings = {
        tuple(s.decoder_input_ids[:2]) for s in seen.sequences.values() if s.decoder_input_ids[0] == grammar.start
    }
    assert (grammar.start, grammar.no_timestamps) in openings
    assert all(
        second == grammar.no_timestamps or grammar.is_timestamp(second) or second < grammar.end
        for _, second in openings
    )


def test_translation_has_no_wer_and_trains_to_translate(untaught, speech_folder, seen, tmp_path):
    pipeline(
        untaught("toy"),
        speech_folder,
        tmp_path,
        labelling=["--language", "german", "--task", "translate", "--text_column_name", "text"],
        training=["--wer_threshold", 0, "--max_steps", 6, "--timestamp_probability", 0, "--language", "None"],
    )
    rows = rows_of(tmp_path / "labelled")
    figures = ("wer", "errors", "reference_words", "utterance_wer", "normalizer")
    assert {row[name] for row in rows for name in figures} == {None}
    assert {(row["language"], row["task"]) for row in rows} == {("de", "translate")}
    grammar = load_whisper(str(tmp_path / "trained")).grammar
    expected = grammar.prefix("de", "translate", timestamps=False)
    trained = [seen.sequences[row["row_id"], 0].decoder_input_ids for row in rows]
    assert all(ids[ids.index(grammar.start) :][: len(expected)] == expected for ids in trained)


@pytest.mark.parametrize(("mels", "window"), [(128, 3), (80, 5)])
def test_other_mel_bins_and_window_lengths(mels, window, untaught, utterances, tmp_path):
    """Nothing in the pipeline knows 80 mel bins or a window of 30 s."""
    data = write_audio_dataset(tmp_path / "speech", utterances[:8])
    pack = ["--concatenate_audio", *SPEAKERS, *ENGLISH, "--return_timestamps"]
    teacher = untaught("toy", window, num_mel_bins=mels)
    folder = pipeline(teacher, data, tmp_path, labelling=pack)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_mel_bins"], config["max_source_positions"]) == (mels, window * 50)
    lengths = [row["duration"] for row in rows_of(tmp_path / "labelled")]
    spoken = sum(len(u.samples) for u in utterances[:8]) / 16_000
    assert sum(lengths) == pytest.approx(spoken, abs=0.01) and window / 2 < max(lengths) <= window
    assert metrics(folder, "eval/wer")
