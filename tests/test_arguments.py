"""Command lines and configuration files become one dataclass; what is wrong in them becomes one sentence."""

import importlib
import json
from dataclasses import asdict, dataclass, fields
from typing import get_args, get_type_hints

import pytest

from distil_whisper.arguments import DataFields, ModelFields, Range, RunFields, attention, option, parse, split_plus
from distil_whisper.errors import UserError


@dataclass
class Arguments(ModelFields, DataFields, RunFields):
    """The shared fields, and one of each other type that a stage has."""

    learning_rate: float = option(1e-4, "A number.", at_least=0)
    max_steps: int = option(-1, "A count.")
    share: float = option(0.5, "A share.", at_least=0, at_most=1)
    speeds: list[float] = option([1.0, 1.0], "Two factors.", nargs=2, above=0, at_most=2)
    beta: float | None = option(None, "A number below another.", at_least=0, below=1)
    wer_threshold: float | None = option(None, "A number that may be absent.")
    drop_empty: bool = option(True, "A switch that is on.")
    use_pseudo_labels: bool | None = option(None, "Yes, no or unset.", nargs="?", const=True)
    layers: list[int] | None = option(None, "Numbers, or absent.", nargs="+")
    dataset_name: str | None = option(None, "Datasets.")


def changed(args):
    """What differs from the defaults."""
    defaults = asdict(Arguments())
    return {name: value for name, value in asdict(args).items() if value != defaults[name]}


def given(*argv):
    return changed(parse(Arguments, list(argv)))


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", {}),
        ("--learning_rate 3e-5 --max_steps -2", {"learning_rate": 3e-5, "max_steps": -2}),
        ("--max_steps=7 --wer_threshold=10", {"max_steps": 7, "wer_threshold": 10.0}),
        ("--streaming", {"streaming": True}),
        ("--streaming True", {"streaming": True}),
        ("--streaming False --drop_empty False", {"drop_empty": False}),
        ("--push_to_hub False", {}),  # prior art's type=bool made this true
        ("--push_to_hub no --streaming yes", {"streaming": True}),
        ("--streaming=False --drop_empty=False", {"drop_empty": False}),
        ("--use_pseudo_labels", {"use_pseudo_labels": True}),
        ("--use_pseudo_labels False", {"use_pseudo_labels": False}),
        ("--use_pseudo_labels None", {}),
        ("--language hi --task translate", {"language": "hi", "task": "translate"}),
        ("--language None --task none --wer_threshold none --cache_dir NONE", {}),
        ("--language=none", {}),
        ("--language hi --language none", {}),
        ("--language none --language hi", {"language": "hi"}),
        ("--report_to wandb tensorboard", {"report_to": ["wandb", "tensorboard"]}),
        ("--report_to none", {"report_to": ["none"]}),
        ("--layers 0 -1", {"layers": [0, -1]}),
        ("--layers none", {}),
        ("--dataset_name a+b --max-steps 4", {"dataset_name": "a+b", "max_steps": 4}),
        ("--dataset_name=key=value", {"dataset_name": "key=value"}),
        ("--attn_type flash_attn --dtype bfloat16", {"attn_type": "flash_attn", "dtype": "bfloat16"}),
    ],
)
def test_command_lines(line, expected):
    assert given(*line.split()) == expected


@pytest.mark.parametrize(
    "line, words",
    [
        ("--learning_rat 1", r"no argument --learning_rat .*did you mean --learning_rate\?"),
        ("--laguage hi", r"did you mean --language\?"),
        ("--learning 1", r"no argument --learning "),  # no abbreviations
        ("--zzz", r"no argument --zzz \(allowed: --"),
        ("--max_stepz=3", r"no argument --max_stepz .*did you mean --max_steps\?"),
        ("--max_steps many", "--max_steps.*many"),
        ("--max_steps none", "--max_steps.*none"),
        ("--dtype float17", "--dtype.*float17.*bfloat16"),
        ("--task sing", "--task.*sing.*translate"),
        ("--streaming maybe", "maybe"),
        ("stray", "'stray' does not belong to any argument"),
        ("--max_steps 3 4", "'4' does not belong to any argument"),
        ("--max_steps", "--max_steps.*expected one argument"),
        ("--learning_rate -1", r"--learning_rate is -1.0; it must be 0 or more$"),
        ("--learning_rate nan", r"--learning_rate is nan; it must be 0 or more$"),
        ("--learning_rate inf", r"--learning_rate is inf; it must be 0 or more$"),
        ("--wer_threshold nan", r"--wer_threshold is nan; it must be a number$"),
        ("--share 1.01", r"--share is 1.01; it must be between 0 and 1$"),
        ("--speeds 1 2.5", r"--speeds is 2.5; it must be above 0 and at most 2$"),
        ("--speeds 0 1", r"--speeds is 0.0; it must be above 0 and at most 2$"),
        ("--beta 1", r"--beta is 1.0; it must be at least 0 and below 1$"),
        ("--preprocessing_num_workers 0", r"--preprocessing_num_workers is 0; it must be between 1 and 1,024$"),
        ("--seed -1", r"--seed is -1; it must be between 0 and 4,294,967,295$"),
        ("--ddp_timeout 0", r"--ddp_timeout is 0; it must be between 1 and "),
    ],
)
def test_mistakes_are_one_sentence(line, words):
    with pytest.raises(UserError, match=words) as caught:
        given(*line.split())
    assert "\n" not in str(caught.value)


FILES = {
    "args.json": json.dumps(
        {
            "learning_rate": "1e-4",
            "max_steps": 12,
            "wer_threshold": 10,
            "streaming": True,
            "drop_empty": False,
            "language": None,
            "task": "none",
            "report_to": ["wandb", "trackio"],
            "layers": [0, -1],
            "dataset_name": "a b+c",
            "wandb_name": "--first try=1",
        }
    ),
    "args.yaml": """
learning_rate: 1e-4  # a string for YAML, which wants 1.0e-4
max_steps: 12
wer_threshold: 10
streaming: true
drop_empty: no
language: null
task: none
report_to: [wandb, trackio]
layers: [0, -1]
dataset_name: a b+c
wandb_name: --first try=1
""",
}
FILES["args.yml"] = FILES["args.yaml"]
FROM_FILE = {
    "max_steps": 12,
    "wer_threshold": 10.0,
    "streaming": True,
    "drop_empty": False,
    "report_to": ["wandb", "trackio"],
    "layers": [0, -1],
    "dataset_name": "a b+c",
    "wandb_name": "--first try=1",
}


@pytest.fixture(params=FILES)
def config_file(request, tmp_path):
    path = tmp_path / request.param
    path.write_text(FILES[request.param], encoding="utf-8")
    return path


def test_a_file_gives_typed_values(config_file):
    args = parse(Arguments, [str(config_file)])
    assert changed(args) == FROM_FILE
    assert args.learning_rate == 1e-4 and type(args.wer_threshold) is float


def test_flags_override_the_file(config_file):
    flags = "--learning_rate 2e-4 --max_steps 3 --wer_threshold none --streaming False --drop_empty --report_to none"
    changed_values = given(str(config_file), *flags.split(), "--language", "hi", "--layers", "none", "--wandb_name=x")
    assert changed_values == {
        "learning_rate": 2e-4,
        "max_steps": 3,
        "report_to": ["none"],
        "language": "hi",
        "dataset_name": "a b+c",
        "wandb_name": "x",
    }


def test_a_flag_has_the_value_none_of_the_file_overridden(tmp_path):
    path = tmp_path / "args.json"
    path.write_text('{"language": "hi", "task": "translate"}')
    assert given(str(path), "--language", "none") == {"task": "translate"}


@pytest.mark.parametrize("text", ["language: no", "language: 'no'"])
def test_a_language_in_yaml_is_no_boolean(tmp_path, text):
    path = tmp_path / "args.yaml"
    path.write_text(f"{text}\nstreaming: yes\ndrop_empty: false\n")
    assert given(str(path)) == {"language": "no", "streaming": True, "drop_empty": False}


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.json", '{"learning_rat": 1}', r"unknown argument learning_rat .*did you mean learning_rate\?"),
        ("a.yaml", "max_steps: many", "--max_steps.*many"),
        ("a.json", '{"max_steps": 1', "a.json cannot be read as a configuration file: "),
        ("a.yaml", "a: [1", "a.yaml cannot be read as a configuration file: "),
        ("a.json", "[1, 2]", "a.json must hold names and values.* not a list"),
        ("a.yaml", "share: .nan", "--share is nan; it must be between 0 and 1"),
        ("a.json", '{"dataset_name": {"a": 1}}', "a.json gives dataset_name names and values of its own"),
        ("a.yml", "", "a.yml must hold names and values"),
        ("a.json", b"\xff\xfe", "a.json cannot be read"),
        ("missing.json", None, "missing.json cannot be read as a configuration file: .*No such file"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words) as caught:
        given(str(path))
    assert "\n" not in str(caught.value)


def test_list_defaults_are_not_shared():
    first, second = Arguments(), Arguments()
    first.report_to.append("wandb")
    assert second.report_to == ["default"]


@pytest.mark.parametrize(
    "value, count, expected",
    [
        ("a+b+c", None, ["a", "b", "c"]),
        ("a", 3, ["a", "a", "a"]),
        (None, 2, [None, None]),
        ("a + b", 2, ["a", "b"]),
        ("hi+none", 2, ["hi", None]),
        ("hi+", 2, ["hi", None]),
        ("a+b", 2, ["a", "b"]),
        ("a", 1, ["a"]),
    ],
)
def test_plus_separates_and_one_is_broadcast(value, count, expected):
    assert split_plus(value, count) == expected


@pytest.mark.parametrize("value, count", [("a+b", 3), ("a+b", 1), ("a+b+c", 2)])
def test_lists_that_do_not_match_are_shown(value, count):
    with pytest.raises(UserError) as caught:
        split_plus(value, count, "--train_split_name", "--train_dataset_name (x+y)")
    entries = len(value.split("+"))
    assert str(caught.value).startswith(
        f"--train_split_name has {entries} entries ({value}), but --train_dataset_name"
    )
    assert "(x+y)" in str(caught.value)


@pytest.mark.parametrize("asked, found", [(None, None), ("eager", "eager"), ("sdpa", "sdpa"), ("flash_attn", "sdpa")])
def test_names_of_attention(asked, found):
    assert attention(asked) == found


@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize("asked", ["flash_attn_2", "flash_attention_2"])
def test_flash_attention_2_needs_its_package(monkeypatch, asked, available):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: available)
    if available:
        assert attention(asked) == "flash_attention_2"
    else:
        with pytest.raises(UserError, match=f"--attn_type {asked} cannot be used because .*; use --attn_type sdpa"):
            attention(asked)


@pytest.mark.parametrize(
    "script",
    [
        "run_pseudo_labelling",
        "create_student_model",
        "run_distillation",
        "run_short_form_eval",
        "run_long_form_eval",
    ],
)
def test_every_number_has_its_range_where_it_is_declared(script):
    arguments = importlib.import_module(script).Arguments
    kinds = get_type_hints(arguments)
    numbers = [each for each in fields(arguments) if {int, float} & {kinds[each.name], *get_args(kinds[each.name])}]
    assert numbers
    assert [each.name for each in numbers if each.metadata["range"] == Range()] == []


@pytest.mark.parametrize(
    "script, flags, sentences",
    [
        ("run_long_form_eval", "--no_speech_threshold 0.5", ["--no_speech_threshold has no effect without --temp"]),
        ("run_long_form_eval", "--no_speech_threshold 0.5 --temperature_fallback", []),
        (
            "run_long_form_eval",
            "--seed 1 --hub_model_id me/mine",
            ["--hub_model_id has no", "--seed has no effect wi"],
        ),
        ("run_short_form_eval", "--attn_type sdpa", []),  # it has no other backend
        ("run_pseudo_labelling", "--attn_type sdpa", []),
        (
            "run_pseudo_labelling",
            "--attn_type sdpa --backend ctranslate2 --cuda_graphs False",
            [
                "--attn_type has no effect with --backend ctranslate2",
                "--cuda_graphs has no effect with --backend ctra",
            ],
        ),
        ("run_distillation", "--temperature 3 --kl_weight 0", ["--temperature has no effect without --kl_weight"]),
        ("run_distillation", "--noise_snr_db 5 10", ["--noise_snr_db has no effect without --noise_probability"]),
    ],
)
def test_flags_without_effect_get_a_line_each(script, flags, sentences, capsys):
    parse(importlib.import_module(script).Arguments, flags.split())
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(sentences)
    for line, sentence in zip(sorted(said), sentences, strict=True):
        assert line.startswith(sentence)


def test_what_a_flag_needs_beside_it_is_a_flag():
    """Of one script at least: a script without it has nothing to say."""
    scripts = ("run_pseudo_labelling", "run_distillation", "run_short_form_eval", "run_long_form_eval")
    known = [fields(importlib.import_module(script).Arguments) for script in scripts]
    needs = {(each.name, name) for of_script in known for each in of_script for name in each.metadata["only_with"]}
    assert needs
    for pair in needs:
        assert any(set(pair) <= {each.name for each in of_script} for of_script in known), pair
