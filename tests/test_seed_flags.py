"""The tutorial's commands: every flag parses, and every flag has its effect."""

import importlib
import json
import shlex
from collections import Counter
from dataclasses import dataclass, field
from functools import partialmethod

import pytest
import torch
from datasets import load_dataset
from stages import ENGLISH, SPEAKERS, label, metrics, rows_of, run, train_few, weights
from transformers.models.whisper.modeling_whisper import WhisperAttention

import distil_whisper.sources
import distil_whisper.verdicts
import run_distillation
import run_pseudo_labelling
from distil_whisper import engine, evaluation, labelling, mixing, validation
from distil_whisper.distiller import Distiller
from distil_whisper.sequential import Sequential
from distil_whisper.trackers import resolve_report_to
from distil_whisper.transcribers import ShortForm

COMMANDS = {
    "run_pseudo_labelling": """
        --model_name_or_path "openai/whisper-large-v2" --dataset_name "mozilla-foundation/common_voice_13_0"
        --dataset_config_name "hi" --dataset_split_name "train+validation+test" --text_column_name "sentence"
        --id_column_name "path" --output_dir "./common_voice_13_0_hi_pseudo_labelled"
        --wandb_project "distil-whisper-labelling" --per_device_eval_batch_size 64 --dtype "bfloat16"
        --dataloader_num_workers 16 --preprocessing_num_workers 16 --logging_steps 500 --max_label_length 128
        --report_to "wandb" --language "hi" --task "transcribe" --return_timestamps --attn_type "flash_attn"
        --streaming False --generation_num_beams 1 --decode_token_ids False --push_to_hub""",
    "create_student_model": """
        --teacher_checkpoint "openai/whisper-large-v2" --encoder_layers 32 --decoder_layers 2
        --save_dir "./distil-large-v2-init" """,
    "run_distillation": """
        --model_name_or_path "./distil-large-v2-init" --teacher_model_name_or_path "openai/whisper-large-v2"
        --train_dataset_name "../common_voice_13_0_hi_pseudo_labelled+../common_voice_13_0_hi_pseudo_labelled"
        --train_dataset_config_name "hi+hi" --train_split_name "train+validation"
        --text_column_name "sentence+sentence" --train_dataset_samples "10+5"
        --eval_dataset_name "../common_voice_13_0_hi_pseudo_labelled" --eval_dataset_config_name "hi"
        --eval_split_name "test" --eval_text_column_name "sentence" --eval_steps 1000 --save_steps 1000
        --warmup_steps 50 --learning_rate 0.0001 --lr_scheduler_type "constant_with_warmup" --logging_steps 25
        --save_total_limit 1 --max_steps 5000 --wer_threshold 10 --per_device_train_batch_size 64
        --per_device_eval_batch_size 64 --dataloader_num_workers 16 --preprocessing_num_workers 16
        --ddp_timeout 7200 --dtype "bfloat16" --output_dir "./" --do_train --do_eval --gradient_checkpointing
        --overwrite_output_dir --predict_with_generate --freeze_encoder --streaming False --push_to_hub""",
    "run_distillation of local files": """
        --model_name_or_path "./distil-large-v2-init" --teacher_model_name_or_path "openai/whisper-large-v2"
        --train_dataset_name "datasets/train.json" --train_dataset_config_name "zh" --train_split_name "train"
        --text_column_name "sentence" --train_dataset_samples "10" --eval_dataset_name "datasets/dev.json"
        --eval_dataset_config_name "zh" --eval_split_name "test" --eval_text_column_name "sentence"
        --eval_steps 1000 --save_steps 1000 --warmup_steps 50 --learning_rate 0.0001
        --lr_scheduler_type "constant_with_warmup" --logging_steps 25 --save_total_limit 1 --max_steps 5000
        --wer_threshold 10 --per_device_train_batch_size 64 --per_device_eval_batch_size 64
        --dataloader_num_workers 16 --preprocessing_num_workers 16 --ddp_timeout 7200 --dtype "bfloat16"
        --output_dir "./" --do_train --do_eval --gradient_checkpointing --overwrite_output_dir
        --predict_with_generate --freeze_encoder --streaming False --push_to_hub""",
    "run_short_form_eval": """
        --model_name_or_path "./" --dataset_name "../common_voice_13_0_hi_pseudo_labelled+google/fleurs"
        --dataset_config_name "hi+hi_in" --dataset_split_name "test+test"
        --text_column_name "sentence+transcription" --output_dir "./" --per_device_eval_batch_size 64
        --dtype "bfloat16" --dataloader_num_workers 16 --report_to "wandb" --generation_max_length 128
        --language "hi" --attn_type "flash_attn" --streaming""",
    "run_long_form_eval": """
        --model_name_or_path "openai/whisper-large-v2" --dataset_name "distil-whisper/tedlium-long-form"
        --dataset_config_name "all" --dataset_split_name "validation" --text_column_name "text" --output_dir "./"
        --per_device_eval_batch_size 64 --chunk_length_s 30 --language "en" --return_timestamps
        --dtype "bfloat16" --report_to "wandb" --streaming""",
}
# Where the effect of a flag is tested: a test here, or one of another file.
EFFECTS = {
    "run_pseudo_labelling": {
        "model_name_or_path dataset_name output_dir": (
            "test_pseudo_labelling.test_every_row_with_its_columns_and_its_label"
        ),
        "dataset_config_name": "test_configs_are_read_apart",
        "dataset_split_name": "test_pseudo_labelling.test_splits_are_read_apart_and_figures_are_those_of_jiwer",
        "text_column_name": "test_pseudo_labelling.test_a_manifest_of_local_files",
        "id_column_name": "test_pseudo_labelling.test_packed_windows_keep_the_audio_and_the_parts",
        "wandb_project report_to": "test_trackers_are_told_the_project",
        "per_device_eval_batch_size dataloader_num_workers preprocessing_num_workers dtype attn_type": (
            "test_how_labelling_computes"
        ),
        "logging_steps": "test_pseudo_labelling.test_the_script_tells_progress_by_rows_and_hours",
        "max_label_length": "test_labels_have_so_many_tokens_at_most",
        "language": "test_pseudo_labelling.test_a_language_decides_the_normaliser_of_the_figures",
        "task": "test_pipeline.test_translation_has_no_wer_and_trains_to_translate",
        "return_timestamps generation_num_beams": "test_pseudo_labelling.test_greedy_beams_and_timestamps",
        "streaming": "test_nothing_is_prepared_on_disk_when_streaming",
        "decode_token_ids": "test_distillation.test_trains_on_labels_with_and_without_token_ids",
        "push_to_hub": "test_pipeline.test_the_tutorial_from_a_model_repository_to_the_hub",
    },
    "create_student_model": {
        "teacher_checkpoint save_dir": "test_student.test_saved_student_is_complete",
        "encoder_layers decoder_layers": "test_student.test_layers_are_maximally_spaced",
    },
    "run_distillation": {
        "model_name_or_path teacher_model_name_or_path freeze_encoder": (
            "test_distillation.test_kl_distillation_leaves_a_frozen_encoder_as_it_is"
        ),
        "train_dataset_name train_split_name train_dataset_samples": (
            "test_distillation.test_datasets_are_mixed_by_their_samples"
        ),
        "train_dataset_config_name eval_dataset_config_name": "test_configs_are_read_apart",
        "text_column_name eval_text_column_name eval_dataset_name eval_split_name output_dir overwrite_output_dir": (
            "test_pipeline.test_local_json_files_as_in_the_tutorial"
        ),
        "eval_steps do_eval": "test_distillation.test_validation_without_generation_has_a_loss_alone",
        "save_steps save_total_limit": "test_distillation.test_the_best_checkpoints_are_kept_and_saved",
        "warmup_steps learning_rate lr_scheduler_type logging_steps": "test_the_learning_rate_follows_its_schedule",
        "max_steps per_device_train_batch_size do_train": "test_distillation.test_every_row_once_an_epoch",
        "wer_threshold": "test_distillation.test_rows_above_the_wer_threshold_are_left_out",
        "per_device_eval_batch_size dataloader_num_workers preprocessing_num_workers ddp_timeout dtype": (
            "test_how_training_computes"
        ),
        "gradient_checkpointing": "test_gradient_checkpointing_computes_layers_again_and_changes_nothing",
        "predict_with_generate": "test_distillation.test_validation_measures_every_row_and_filters_none",
        "streaming": "test_nothing_is_prepared_on_disk_when_streaming",
        "push_to_hub": "test_pipeline.test_the_tutorial_from_a_model_repository_to_the_hub",
    },
    "run_short_form_eval": {
        "model_name_or_path dataset_name output_dir text_column_name language": (
            "test_evaluation.test_short_form_counts_what_it_leaves_out"
        ),
        "dataset_config_name": "test_the_evaluations_read_configs_apart",
        "dataset_split_name streaming": "test_evaluation.test_several_datasets_by_plus_and_streaming_give_the_same",
        "per_device_eval_batch_size dtype dataloader_num_workers report_to generation_max_length attn_type": (
            "test_how_an_evaluation_computes"
        ),
    },
    "run_long_form_eval": {
        "model_name_or_path dataset_name output_dir text_column_name language return_timestamps": (
            "test_evaluation.test_long_form_transcribes_all_of_a_recording"
        ),
        "dataset_config_name dataset_split_name": "test_the_evaluations_read_configs_apart",
        "chunk_length_s": "test_evaluation.test_chunks_are_those_of_the_pipeline",
        "per_device_eval_batch_size dtype report_to streaming": "test_how_an_evaluation_computes",
    },
}


def flags_of(command: str) -> dict[str, str]:
    """The flags of a command line with their values, True for those that have none."""
    groups = COMMANDS[command].split("--")[1:]
    pairs = [shlex.split(group) for group in groups]
    return {name: value[0] if value else "True" for name, *value in pairs}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_tutorial_parse(command):
    args = importlib.import_module(command.split()[0]).parse_args(shlex.split(COMMANDS[command]))
    for name, value in flags_of(command).items():
        found = getattr(args, name)
        found = "+".join(found) if isinstance(found, list) else found
        assert str(found) == value or float(found) == float(value), name


@pytest.mark.parametrize("script", EFFECTS)
def test_every_flag_has_a_test_of_its_effect(script):
    shown = {flag: test for flags, test in EFFECTS[script].items() for flag in flags.split()}
    for command in COMMANDS:
        assert command.split()[0] != script or set(flags_of(command)) <= set(shown)
    for test in shown.values():
        module, _, name = test.rpartition(".")
        assert hasattr(importlib.import_module(module or __name__), name), test


@dataclass
class Watched:
    """How a run computed."""

    options: dict = field(default_factory=dict)  # of the Accelerator
    run: object = None
    workers: list[int] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)
    autocast: set = field(default_factory=set)
    sizes: Counter = field(default_factory=Counter)


@pytest.fixture
def watched(monkeypatch):
    """Watches what a run is built of; its loaders then do without workers."""
    result = Watched()

    def accelerator(*, make=engine.Accelerator, **options):
        result.options = options
        return make(**options)

    monkeypatch.setattr(engine, "Accelerator", accelerator)
    for script in (run_distillation, run_pseudo_labelling):

        def begin(*arguments, make=script.begin):
            result.run = make(*arguments)
            return result.run

        monkeypatch.setattr(script, "begin", begin)

    def loader(*arguments, make=torch.utils.data.DataLoader, **options):
        result.workers.append(options.pop("num_workers"))
        options.pop("multiprocessing_context")
        options.pop("pin_memory")
        return make(*arguments, **options)

    def open_source(*arguments, num_proc, make=distil_whisper.sources.open_source, **options):
        result.processes.append(num_proc)
        return make(*arguments, **options)

    def judge(rows, row_filter, num_proc, lengths, judge=distil_whisper.verdicts.judge):
        result.processes.append(num_proc)
        return judge(rows, row_filter, 1, lengths)

    def forward(self, waveforms, *, step=Distiller.forward, **rest):
        enabled = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        result.autocast.add(enabled)
        result.sizes["training" if self.training else "evaluation", len(waveforms)] += 1
        return step(self, waveforms, **rest)

    monkeypatch.setattr(mixing, "DataLoader", loader)
    monkeypatch.setattr(validation, "DataLoader", loader)
    monkeypatch.setattr(evaluation, "DataLoader", loader)
    monkeypatch.setattr(distil_whisper.sources, "open_source", open_source)
    monkeypatch.setattr(distil_whisper.verdicts, "judge", judge)
    monkeypatch.setattr(Distiller, "forward", forward)
    return result


@pytest.mark.parametrize(("asked", "found"), [("bfloat16", torch.bfloat16), ("float32", False)])
def test_how_training_computes(asked, found, watched, student, taught, labelled, tmp_path):
    """The compute type is that of the teacher's weights; the student's and the optimizer's are float32."""
    flags = ["--dtype", asked, "--attn_type", "flash_attn", "--ddp_timeout", 7200, "--dataloader_num_workers", 16]
    evaluate = ["--do_eval", "--eval_split_name", "test", "--per_device_eval_batch_size", 5]
    names = ["--teacher_model_name_or_path", taught, "--preprocessing_num_workers", 3]
    folder = train_few(student, labelled, tmp_path, *ENGLISH, *names, *flags, *evaluate)
    model, optimizer = watched.run.model, watched.run.raw_optimizer
    assert model.student.config._attn_implementation == model.teacher.config._attn_implementation == "sdpa"
    assert {parameter.dtype for parameter in model.teacher.parameters()} == {getattr(torch, asked)}
    assert {parameter.dtype for parameter in model.student.parameters()} == {torch.float32}
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert states and {value.dtype for value in states} == {torch.float32}
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}
    assert watched.autocast == {found}
    assert watched.workers == [16, 16] and watched.processes == [3, 3, 3]
    assert watched.sizes == {("training", 4): 4, ("evaluation", 5): 1, ("evaluation", 3): 1}
    (timeout,) = [h.timeout for h in watched.options["kwargs_handlers"] if hasattr(h, "timeout")]
    assert timeout.total_seconds() == 7200


def test_how_labelling_computes(watched, monkeypatch, taught, speech_folder, tmp_path):
    sizes, threads, decode_ahead = [], set(), labelling.prefetch

    def ahead(function, items, workers, *size_of):
        threads.add(workers)
        return decode_ahead(function, items, workers, *size_of)

    def decoder(self, waveforms, *told, decode=run_pseudo_labelling.Decoder.__call__):
        sizes.append(len(waveforms))
        return decode(self, waveforms, *told)

    monkeypatch.setattr(labelling, "prefetch", ahead)
    monkeypatch.setattr(run_pseudo_labelling.Decoder, "__call__", decoder)
    flags = ["--dtype", "bfloat16", "--attn_type", "flash_attn", "--ddp_timeout", 7200, "--dataloader_num_workers", 2]
    batches = ["--per_device_eval_batch_size", 5, "--preprocessing_num_workers", 3]
    label(taught, speech_folder, tmp_path, *ENGLISH, *flags, *batches)
    model = watched.run.whisper.model
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"
    assert sizes == [5, 5, 2, 5, 5, 2] and threads == {2} and watched.processes == [3]
    assert watched.options["kwargs_handlers"][0].timeout.total_seconds() == 7200


@pytest.mark.parametrize("form", ["short_form", "long_form"])
@pytest.mark.parametrize("streaming", [False, True])
def test_how_an_evaluation_computes(form, streaming, watched, monkeypatch, toy_teacher, speech_folder, tmp_path):
    """8 rows, 5 at once, in the type, with the attention, the workers and the limit that were asked for."""
    script, projects, models, sizes = importlib.import_module(f"run_{form}_eval"), [], [], []

    def load_model(*arguments, load=script.load_model):
        models.append(load(*arguments))
        return models[-1]

    def transcribe(self, waveforms, *told, call):
        sizes.append(len(waveforms))
        return call(self, waveforms, *told)

    monkeypatch.setattr(script, "load_model", load_model)
    for transcriber in (ShortForm, Sequential):
        monkeypatch.setattr(transcriber, "__call__", partialmethod(transcribe, call=transcriber.__call__))
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda self, project, **_: projects.append(project))
    names = ["--model_name_or_path", toy_teacher, "--dataset_name", speech_folder, "--output_dir", tmp_path]
    compute = ["--dtype", "bfloat16", "--attn_type", "flash_attn", "--dataloader_num_workers", 16]
    flags = ["--per_device_eval_batch_size", 5, "--generation_max_length", 3, "--streaming", streaming]
    read = ["--cache_dir", tmp_path / "cache", "--report_to", "wandb", "--wandb_project", "evaluations"]
    run(f"run_{form}_eval", *names, *ENGLISH, *compute, *flags, *read)
    (whisper,) = models
    assert whisper.model.dtype == torch.bfloat16 and whisper.model.config._attn_implementation == "sdpa"
    assert sizes == [5, 3] and watched.workers == [16]
    heard = [json.loads(line)["prediction"] for line in (tmp_path / f"{form}_predictions.jsonl").open()]
    tokens = [len(whisper.tokenizer.encode(text, add_special_tokens=False)) for text in heard]
    assert len(tokens) == 8 and max(tokens) <= 3 + 3 * (form == "long_form")  # a long recording has several windows
    assert projects == ["evaluations"] and watched.options["log_with"] == ["wandb"]
    assert bool(list((tmp_path / "cache").rglob("*.arrow"))) != streaming


@pytest.mark.parametrize("form", ["short_form", "long_form"])
def test_the_evaluations_read_configs_apart(form, toy_teacher, two_configs, tmp_path):
    names = ["--model_name_or_path", toy_teacher, "--dataset_name", two_configs, "--output_dir", tmp_path]
    flags = ["--dataset_config_name", "hi+en", "--dataset_split_name", "train", "--generation_max_length", 3]
    run(f"run_{form}_eval", *names, *flags, *ENGLISH, "--report_to", "none", "--max_samples", 2)
    found = json.loads((tmp_path / f"{form}_results.json").read_text())["datasets"]
    assert [(entry["config"], entry["split"], entry["rows"]) for entry in found] == [
        ("hi", "train", 2),
        ("en", "train", 2),
    ]
    heard = [json.loads(line)["reference"] for line in (tmp_path / f"{form}_predictions.jsonl").open()]
    assert heard == [row["text"] for config in ("hi", "en") for row in rows_of(two_configs, config=config)[:2]]


def test_labels_have_so_many_tokens_at_most(taught, speech_folder, tmp_path):
    flags = ["--max_label_length", 3, "--return_timestamps", "--decode_token_ids", False]
    rows = rows_of(label(taught, speech_folder, tmp_path, *ENGLISH, *SPEAKERS, *flags))
    lengths = {len(row["whisper_token_ids"]) for row in rows}
    assert max(lengths) == 3 and all(row["truncated"] for row in rows if len(row["whisper_token_ids"]) == 3)
    assert any(row["condition_on_prev"] is None for row in rows[1:4])


@pytest.fixture(scope="module")
def two_configs(tmp_path_factory, speech_folder):
    """A dataset whose README gives each of two configs one of its files."""
    folder = tmp_path_factory.mktemp("configs") / "speech"
    (folder / "data").mkdir(parents=True)
    configs = []
    for index, config in enumerate(("hi", "en")):
        name = f"data/train-0000{index}-of-00002.parquet"
        (folder / name).write_bytes((speech_folder / name).read_bytes())
        configs.append({"config_name": config, "data_files": [{"split": "train", "path": name}]})
    (folder / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    return folder


def test_configs_are_read_apart(student, taught, two_configs, labelled, seen, tmp_path):
    out = label(taught, two_configs, tmp_path / "labels", *ENGLISH, "--dataset_config_name", "hi+en")
    expected = [row["id"] for row in rows_of(labelled)]
    assert [row["id"] for config in ("hi", "en") for row in rows_of(out, config=config)] == expected
    names = [f"{out}+{out}", "--train_dataset_config_name", "hi+en", "--train_split_name", "train"]
    evaluate = ["--do_eval", "--eval_dataset_name", two_configs, "--eval_dataset_config_name", "en"]
    evaluate += ["--eval_split_name", "train"]
    folder = train_few(student, names[0], tmp_path / "out", *names[1:], *ENGLISH, "--kl_weight", 0, *evaluate)
    assert {row_id.split("/")[1] for row_id, _ in seen.rows} == {"hi", "en"}
    assert "eval/speech/en/train/loss" in metrics(folder, "eval/loss")[0]


@pytest.mark.parametrize(
    ("schedule", "rates"), [("constant_with_warmup", [5e-4, 1e-3, 1e-3]), ("linear", [5e-4, 1e-3, 2e-3 / 3])]
)
def test_the_learning_rate_follows_its_schedule(schedule, rates, student, labelled, tmp_path):
    flags = ["--lr_scheduler_type", schedule, "--warmup_steps", 2, "--learning_rate", 0.001, "--max_steps", 5]
    folder = train_few(student, labelled, tmp_path / "a", *ENGLISH, "--kl_weight", 0, *flags)
    assert [line["train/learning_rate"] for line in metrics(folder, "train/loss")][:3] == pytest.approx(rates)
    train_few(student, labelled, tmp_path / "b", *ENGLISH, "--kl_weight", 0, *flags, "--logging_steps", 2)
    assert [line["step"] for line in metrics(tmp_path / "b", "train/loss")] == [2, 4, 5]


def test_gradient_checkpointing_computes_layers_again_and_changes_nothing(student, labelled, monkeypatch, tmp_path):
    calls, forward = [], WhisperAttention.forward

    def counted(self, *args, **kwargs):
        calls[-1] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WhisperAttention, "forward", counted)
    for name, flags in (("plain", []), ("checkpointed", ["--gradient_checkpointing"])):
        calls.append(0)
        train_few(student, labelled, tmp_path / name, *ENGLISH, "--kl_weight", 0, *flags)
    assert calls[1] == 2 * calls[0] > 0
    plain, checkpointed = weights(tmp_path / "plain"), weights(tmp_path / "checkpointed")
    assert all(torch.allclose(tensor, checkpointed[name], atol=1e-6) for name, tensor in plain.items())


@pytest.mark.parametrize("report_to", [["tensorboard"], ["none"], ["wandb"], ["wandb", "tensorboard"]])
def test_trackers_are_told_the_project(report_to, watched, monkeypatch, taught, speech_folder, tmp_path):
    projects = []
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda self, project, **_: projects.append(project))
    flags = ["--report_to", *report_to, "--wandb_project", "distil-whisper-labelling"]
    label(taught, speech_folder, tmp_path, *ENGLISH, *flags)
    assert projects == ([] if report_to == ["none"] else ["distil-whisper-labelling"])
    assert watched.options["log_with"] == (None if report_to == ["none"] else report_to)
    assert metrics(tmp_path, "default/train/wer")


def test_tensorboard_writes_into_the_output_folder(student, labelled, tmp_path):
    flags = ["--report_to", "tensorboard", "--max_steps", 1]
    train_few(student, labelled, tmp_path, *ENGLISH, "--kl_weight", 0, *flags)
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))


def test_wandb_without_a_login_runs_offline(monkeypatch, tmp_path, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_report_to(["default"], "out") == ["tensorboard"]
    assert resolve_report_to(["wandb"], "out") == ["wandb"]
    assert "wandb sync out/wandb/offline-run-*" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert resolve_report_to(["default"], "out") == ["tensorboard", "wandb"]


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_is_prepared_on_disk_when_streaming(streaming, student, taught, speech_folder, tmp_path):
    cache = ["--streaming", streaming, "--cache_dir", tmp_path / "cache"]
    out = label(taught, speech_folder, tmp_path / "labels", *ENGLISH, *cache)
    train_few(student, out, tmp_path / "out", *ENGLISH, "--kl_weight", 0, "--max_steps", 1, *cache)
    assert bool(list((tmp_path / "cache").rglob("*.arrow"))) != streaming
    assert len(load_dataset(str(out), split="train")) == 24
