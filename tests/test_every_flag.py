"""Every flag of every script, given the borders of its range, values beyond them and values of another kind: the run
ends as it should, or with one sentence."""

import contextlib
import importlib
import io
import shutil
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stages import ENGLISH, run

from distil_whisper.errors import exit_on_user_error

TEXTS = ["", " ", "none", "+", "x+", "+x", "x+y+z", "./no such place", "é", "a\nb", "x" * 3_000, "True", "-1", "en-US"]
NUMBERS = [
    "0",
    "-0.0",
    "1",
    "-1",
    "2",
    "0.5",
    "1e-300",
    "9999",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "many",
    "",
    "1,5",
    "none",
]
NOT_TRIED = {  # of the flags that are valid but do what a test should not
    "push_to_hub",  # tests/test_hub.py has a Hub
    "dataloader_num_workers",  # as many processes as asked for
    "preprocessing_num_workers",
    "streaming",  # of every dataset that the others name; tests/test_streams.py
}


def values_of(kind: type, each) -> list[list[str]]:
    """What a flag is given: borders, what lies beyond them, and what is of another kind."""
    kinds = {kind, *get_args(kind)}
    kinds |= {inner for outer in kinds for inner in get_args(outer)}
    if bool in kinds:
        return [[], ["True"], ["False"], ["maybe"], ["none"], ["2"]]
    if not kinds & {int, float}:
        return [[text] for text in [*TEXTS, *each.metadata.get("choices", ())]]
    limits = [limit for limit in vars(each.metadata["range"]).values() if limit is not None]
    borders = [str(border) for limit in limits for border in (limit, limit - 1, limit + 1, limit / 2)]
    count = each.metadata.get("nargs")
    many = [[number] * count for number in [*NUMBERS, *borders]] if isinstance(count, int) else []
    return [[number] for number in [*NUMBERS, *borders]] + many + [[], ["1", "2", "3"]]


def flags_of(script: str) -> list[tuple[str, list[list[str]]]]:
    """The flags of a script, and what each is given."""
    arguments = importlib.import_module(script).Arguments
    kinds = get_type_hints(arguments)
    return [(each.name, values_of(kinds[each.name], each)) for each in fields(arguments) if each.name not in NOT_TRIED]


@pytest.fixture(scope="module")
def commands(taught, student, labelled, speech_folder):
    """A small run of every script, which any flag after it overrides."""
    evaluation = ["--model_name_or_path", student, "--dataset_name", speech_folder, *ENGLISH, "--max_samples", 2]
    few = ["--max_steps", 1, "--per_device_train_batch_size", 2, "--max_train_samples", 4, "--do_train"]
    return {
        "run_pseudo_labelling": [
            *("--model_name_or_path", taught, "--dataset_name", speech_folder, *ENGLISH),
            *("--dataset_split_name", "test", "--report_to", "none"),
        ],
        "create_student_model": ["--teacher_checkpoint", taught, "--decoder_layers", 1],
        "run_distillation": [
            *("--model_name_or_path", student, "--train_dataset_name", labelled, *ENGLISH, *few),
            *("--kl_weight", 0, "--report_to", "none", "--text_column_name", "text"),
        ],
        "run_short_form_eval": [*evaluation, "--dataset_split_name", "test", "--report_to", "none"],
        "run_long_form_eval": [*evaluation, "--dataset_split_name", "test", "--report_to", "none"],
    }


def try_flag(script: str, command: list, flag: str, values: list[str], folder) -> None:
    """Run a script with one more flag in a folder of its own. Raises what is neither its end nor one sentence."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    out = "save_dir" if script == "create_student_model" else "output_dir"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            exit_on_user_error(lambda: run(script, *command, f"--{out}", folder / "out", f"--{flag}", *values))
    except SystemExit as ended:
        errors = [line for line in said.getvalue().split("\n") if line.startswith("error: ")]
        assert ended.code == 2 and len(errors) == 1 and len(errors[0]) < 8_000, said.getvalue()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A name that is no folder is looked up on the Hub, which answers at once here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


SCRIPTS = [
    "run_pseudo_labelling",
    "create_student_model",
    "run_distillation",
    "run_short_form_eval",
    "run_long_form_eval",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_ends_well_or_in_one_sentence(script, commands, tmp_path, monkeypatch):
    """One value of each flag, other ones in each test by the seed of the suite; `-m slow` tries many."""
    monkeypatch.chdir(tmp_path)

    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(flags_of(script)), st.data())
    def trial(of, data):
        flag, values = of
        try_flag(script, commands[script], flag, data.draw(st.sampled_from(values)), tmp_path / "run")

    trial()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_ends_well_or_in_one_sentence(script, commands, tmp_path, monkeypatch):
    """All values of all flags: minutes."""
    monkeypatch.chdir(tmp_path)
    wrong = []
    for flag, all_values in flags_of(script):
        for values in all_values:
            try:
                try_flag(script, commands[script], flag, values, tmp_path / "run")
            except Exception as error:
                wrong.append(f"--{flag} {' '.join(values)[:80]}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)
