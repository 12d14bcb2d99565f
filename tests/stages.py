"""The stages as a Python process of a user would run them, what their folders hold afterwards, and a toy teacher that
knows the 24 utterances a little."""

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import soundfile
import toy_whisper
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import WORDS, Utterance, write_audio_dataset
from safetensors.torch import load_file

from distil_whisper.distiller import Distiller
from distil_whisper.examples import ExampleMaker
from distil_whisper.tokens import Sequence

WINDOW_S = 2
ENGLISH = ("--language", "en")
SPEAKERS = ("--id_column_name", "id", "--speaker_id_column_name", "speaker")
TIMINGS = ("per_second", "per_hour", "memory_gb")  # that differ from run to run


def run(script: str, *flags) -> None:
    """Call a script's main in this process, as if it had been started anew."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()
    importlib.import_module(script).main([str(flag) for flag in flags])


def label(teacher, data, output, *flags) -> Path:
    """Stage 1, without trackers, however many labels a toy teacher does not end."""
    names = ["--model_name_or_path", teacher, "--dataset_name", data, "--output_dir", output, "--report_to", "none"]
    run("run_pseudo_labelling", *names, "--max_truncated", 100, *flags)
    return Path(output)


def train(student, data, output, *flags) -> Path:
    """Stage 3, without trackers."""
    names = ["--model_name_or_path", student, "--train_dataset_name", data, "--output_dir", output]
    run("run_distillation", *names, "--report_to", "none", "--do_train", *flags)
    return Path(output)


def train_few(student, data, output, *flags) -> Path:
    """Stage 3 for four small steps; flags override that."""
    few = ["--max_steps", 4, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--learning_rate", 1e-3]
    return train(student, data, output, *few, *flags)


def metrics(folder, *names: str) -> list[dict]:
    """The lines of metrics.jsonl that hold all of these names, without timings and the stage."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if k != "stage" and not k.endswith(TIMINGS)} for line in lines]
    return [line for line in timeless if all(name in line for name in names)]


def weights(folder) -> dict:
    """A saved model's tensors by name."""
    return load_file(Path(folder) / "model.safetensors")


def rows_of(folder, split: str = "train", config: str | None = None) -> list[dict]:
    """What `load_dataset` reads of a folder, audio as it is stored."""
    from datasets import Audio, load_dataset

    return list(load_dataset(str(folder), config, split=split).cast_column("audio", Audio(decode=False)))


def write_manifest(path: Path, utterances: list[Utterance], **columns) -> Path:
    """A JSON manifest with its audio files beside it: audio, sentence, and the columns that are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for utterance in utterances:
        soundfile.write(path.parent / f"{utterance.id}.wav", utterance.samples, 16_000)
        rows.append({"audio": f"{utterance.id}.wav", "sentence": utterance.text, **columns})
    path.write_text(json.dumps(rows))
    return path


@dataclass
class Seen:
    """What training was given: rows as (row id, epoch), and the batches."""

    rows: list[tuple[str, int]] = field(default_factory=list)
    sequences: dict[tuple[str, int], Sequence | None] = field(default_factory=dict)
    batches: list[dict] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch) -> Seen:
    """Watches the examples that are made and the batches that the training step is given, in this process."""
    result = Seen()
    make, step = ExampleMaker.__call__, Distiller.forward

    def watched_make(self, row, columns, row_id, epoch):
        example = make(self, row, columns, row_id, epoch)
        result.rows.append((row_id, epoch))
        result.sequences[row_id, epoch] = example.sequence
        return example

    def watched_step(self, waveforms, decoder_input_ids, labels, valid_positions):
        result.batches.append({"decoder_input_ids": decoder_input_ids, "labels": labels})
        return step(self, waveforms, decoder_input_ids, labels, valid_positions)

    monkeypatch.setattr(ExampleMaker, "__call__", watched_make)
    monkeypatch.setattr(Distiller, "forward", watched_step)
    return result


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """What a user's shell may hold would change a run: wandb is nobody's, and scripts run on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="session")
def foreign_labels(tmp_path_factory, utterances) -> Path:
    """The utterances as another program labels them: the frame is in whisper_transcript, timestamps are too."""
    from datasets import load_dataset

    folder = tmp_path_factory.mktemp("foreign")
    write_audio_dataset(folder, utterances, files=1)
    file = str(next((folder / "data").iterdir()))
    transcripts = []
    for utterance in utterances:
        end = len(utterance.samples) / 16_000 // 0.02 * 0.02
        transcripts.append(
            f"<|startoftranscript|><|en|><|transcribe|><|0.00|> {utterance.text}<|{end:.2f}|><|endoftext|>"
        )
    rows = load_dataset("parquet", data_files=file, split="train").add_column("whisper_transcript", transcripts)
    rows.to_parquet(file)
    return folder


@pytest.fixture(scope="session")
def taught(tmp_path_factory, foreign_labels) -> Path:
    """A toy Whisper after fine-tuning by the script: it writes timestamps, ends its text, and is mostly wrong."""
    folder = tmp_path_factory.mktemp("taught")
    texts = [" " + " ".join(WORDS)] * 3
    toy_whisper.save(folder / "untrained", texts, WINDOW_S, d_model=64, heads=2)
    flags = ["--max_steps", 100, "--learning_rate", 4e-3, "--warmup_steps", 20, "--timestamp_probability", 0.5]
    evaluation = ["--do_eval", "--eval_split_name", "train", "--predict_with_generate", "--logging_steps", 10]
    train(folder / "untrained", foreign_labels, folder / "teacher", *ENGLISH, "--kl_weight", 0, *flags, *evaluation)
    return folder / "teacher"


@pytest.fixture(scope="session")
def student(tmp_path_factory, taught) -> Path:
    """The taught teacher's encoder and the first and the last of its 4 decoder layers."""
    folder = tmp_path_factory.mktemp("student") / "student"
    run("create_student_model", "--teacher_checkpoint", taught, "--decoder_layers", 2, "--save_dir", folder)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory, taught, speech_folder) -> Path:
    """train and test as the taught teacher hears them: timestamps, token ids, prompts by speaker."""
    folder = tmp_path_factory.mktemp("labelled") / "labelled"
    flags = ["--dataset_split_name", "train+test", "--return_timestamps", "--decode_token_ids", False]
    return label(taught, speech_folder, folder, *ENGLISH, *SPEAKERS, *flags)
