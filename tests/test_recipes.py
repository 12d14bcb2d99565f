"""What the recipes and the README tell a user to run is parsed by what it would start."""

import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import stages
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, make_utterances
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from distil_whisper.audio import decode
from distil_whisper.errors import UserError
from distil_whisper.reading import open_source

SCRIPTS = {path.name: path.stem for path in ROOT.glob("run_*.py")} | {
    "create_student_model.py": "create_student_model"
}
README = (ROOT / "README.md").read_text(encoding="utf-8")
STAGE_RECIPES = sorted((ROOT / "scripts" / "hindi").glob("[1-9]_*.sh"))
RECIPES = [*STAGE_RECIPES, ROOT / "scripts/hindi/patient_training.sh", ROOT / "scripts/local_json.sh"]
SWEEP = yaml.safe_load((ROOT / "scripts" / "chunk_length_s_sweep.yaml").read_text(encoding="utf-8"))
OF_OTHERS = {"--help", "--flag", "--machine_rank", "--cpu", "--num_processes"}  # of accelerate and argparse


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The commands of a bash block as words; comments are left out, continued lines are joined."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in line if not re.fullmatch(r"[A-Z_]+=\S*", word)] for line in words if line]


def parse(command: list[str]):
    """What a command's script makes of its flags; accelerate's own flags are parsed by accelerate."""
    if command[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(command[2:])
        command = ["python", launched.training_script, *launched.training_script_args]
    assert command[0] == "python"
    return importlib.import_module(SCRIPTS[Path(command[1]).name]).parse_args(command[2:])


def starts_a_script(command: list[str]) -> bool:
    return command[0] in ("accelerate", "python") and any(Path(word).name in SCRIPTS for word in command)


README_COMMANDS = [c for block in blocks("bash") for c in commands(block) if starts_a_script(c)]


def run_recipe(recipe: Path, folder: Path, *flags: str, **names: str) -> list[list[str]]:
    """Run a recipe where `accelerate` and `python` only note how they were called."""
    log = folder / "calls.jsonl"
    for name in ("accelerate", "python"):
        program = folder / name
        program.write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"print(json.dumps([{name!r}, *sys.argv[1:]]), file=open({str(log)!r}, 'a'))\n"
        )
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **names}
    ran = subprocess.run(["bash", str(recipe), *flags], env=environment, capture_output=True, text=True, cwd="/")
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").rglob("*.sh")), ids=lambda path: path.name)
def test_bash_reads_every_script(script):
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_flags_of_a_recipe_are_those_of_its_script(recipe, tmp_path):
    calls = run_recipe(recipe, tmp_path)
    assert [Path(word).name for call in calls for word in call if Path(word).name in SCRIPTS]
    for call in calls:
        parse(call)


def test_recipes_cover_the_stages_in_order_and_hand_over_folders(tmp_path):
    calls = {recipe.name[0]: parse(run_recipe(recipe, tmp_path)[-1]) for recipe in STAGE_RECIPES}
    assert [type(args).__module__ for args in calls.values()] == [
        "run_pseudo_labelling",
        "create_student_model",
        "run_distillation",
        "run_short_form_eval",
        "run_long_form_eval",
    ]
    labelling, student, training, short_form, _ = calls.values()
    assert training.train_dataset_name == f"{labelling.output_dir}+{labelling.output_dir}"
    assert training.eval_dataset_name == labelling.output_dir == short_form.dataset_name.split("+")[0]
    assert training.model_name_or_path == student.save_dir
    assert training.teacher_model_name_or_path == student.teacher_checkpoint == labelling.model_name_or_path
    assert short_form.model_name_or_path == training.output_dir


def test_names_and_further_flags_reach_the_script(tmp_path):
    recipe = ROOT / "scripts" / "hindi" / "3_training.sh"
    (call,) = run_recipe(recipe, tmp_path, "--push_to_hub", "--max_steps", "7", TEACHER="my/teacher", BATCH_SIZE="3")
    args = parse(call)
    assert (args.teacher_model_name_or_path, args.per_device_train_batch_size) == ("my/teacher", 3)
    assert (args.push_to_hub, args.max_steps) == (True, 7)


def test_a_common_voice_archive_becomes_a_folder_with_three_splits(tmp_path):
    archive = tmp_path / "cv-corpus" / "hi"
    (archive / "clips").mkdir(parents=True)
    spoken = make_utterances(6)
    for split, rows in (("train", spoken[:3]), ("dev", spoken[3:5]), ("test", spoken[5:])):
        lines = ["client_id\tpath\tsentence\tage"]
        for row in rows:
            (archive / "clips" / f"{row.id}.mp3").write_bytes(row.encoded("MP3"))
            lines.append(f'{row.speaker}\t{row.id}.mp3\t"{row.text}\t')
        (archive / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = tmp_path / "common_voice_hi"
    for _ in range(2):  # a second run changes nothing
        run_recipe_for_real = ["bash", str(ROOT / "scripts" / "hindi" / "0_common_voice.sh"), "cv-corpus/hi"]
        subprocess.run(
            run_recipe_for_real, cwd=tmp_path, env={**os.environ, "DATASET": str(folder)}, check=True, timeout=60
        )
    for split, rows in (("train", spoken[:3]), ("validation", spoken[3:5]), ("test", spoken[5:])):
        source = open_source(str(folder), "default", split)
        found = list(source.rows(0))
        assert [(row["path"], row["sentence"], row["client_id"]) for row in found] == [
            (f"{row.id}.mp3", f'"{row.text}', row.speaker) for row in rows
        ]
        assert [len(decode(row["audio"], 16_000)) > 1000 for row in found] == [True] * len(rows)
        lines = (folder / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        assert all((folder / line.split("\t")[0]).is_file() for line in lines)


def test_every_run_of_the_sweep_is_a_command_of_the_script():
    names = SWEEP["parameters"]
    choices = [[(name, value) for value in spec.get("values", [spec.get("value")])] for name, spec in names.items()]
    lengths = []
    for combination in itertools.product(*choices):
        flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in combination}})["args"]
        args = parse(["python", SWEEP["program"], *flags])
        assert args.return_timestamps is True and args.report_to == ["wandb"]
        lengths.append(args.chunk_length_s)
    assert lengths == names["chunk_length_s"]["values"]


def test_the_long_form_recipe_logs_the_figure_that_the_sweep_minimises(toy_teacher, speech_folder, tmp_path):
    recipe = ROOT / "scripts" / "hindi" / "5_long_form_evaluation.sh"
    names = {"TEACHER": str(toy_teacher), "LONG_DATASET": str(speech_folder), "LONG_SPLIT": "test", "DTYPE": "float32"}
    names |= {"EVALUATION": str(tmp_path), "CHUNK_LENGTH_S": "4", "BATCH_SIZE": "4", "REPORT_TO": "none"}
    (call,) = run_recipe(recipe, tmp_path, "--max_samples", "2", "--generation_max_length", "8", **names)
    stages.run(SCRIPTS[call[1]], *call[2:])
    logged = [json.loads(line) for line in (tmp_path / "long_form" / "metrics.jsonl").read_text().splitlines()]
    assert any(SWEEP["metric"]["name"] in line for line in logged)


@pytest.fixture(scope="module")
def toy_names(toy_teacher, tmp_path_factory) -> dict[str, Path]:
    """What stands for the names in the README's Python."""
    folder = tmp_path_factory.mktemp("names")
    make = importlib.import_module("create_student_model").main
    make(["--teacher_checkpoint", str(toy_teacher), "--save_dir", str(folder / "student")])
    (folder / "audio.wav").write_bytes(make_utterances(1)[0].encoded())
    return {
        "openai/whisper-tiny": toy_teacher,
        "openai/whisper-large-v2": toy_teacher,
        "outputs/hindi/distil-whisper-large-v2-hi": folder / "student",
        "audio.wav": folder / "audio.wav",
    }


@pytest.mark.parametrize("block", blocks("python"), ids=["check", "transcribe", "words", "speculative"])
def test_the_python_of_the_readme_runs(block, toy_names, monkeypatch, capsys):
    for name, stand_in in toy_names.items():
        block = block.replace(f'"{name}"', repr(str(stand_in)))
    if "assistant_model" in block:  # the claim beside it: the assisted text is the teacher's own
        block += 'assert torch.equal(tokens, teacher.generate(features, language="hi", task="transcribe"))'
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(compile(block, "README.md", "exec"), {})
    assert ("Environment works:" in capsys.readouterr().out) == ("Environment works:" in block)


@pytest.mark.parametrize("block", blocks("bash"))
def test_bash_reads_every_block_of_the_readme(block):
    checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("command", README_COMMANDS, ids=lambda command: " ".join(command)[:60])
def test_the_commands_of_the_readme_are_parsed(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (configuration,) = blocks("yaml")
    Path("train.yaml").write_text(configuration)
    parse(command)


def test_the_readme_shows_each_script():
    shown = {Path(word).name for command in README_COMMANDS for word in command}
    assert SCRIPTS.keys() <= shown


def test_a_mistyped_flag_would_be_noticed():
    with pytest.raises(UserError, match="--decoder_layer "):
        parse(["python", "create_student_model.py", "--decoder_layer", "2"])
    with pytest.raises(SystemExit):
        parse(["accelerate", "launch", "--no_such_flag", "create_student_model.py"])


def test_the_flags_that_the_readme_explains_exist():
    known = {
        f"--{name}"
        for module in SCRIPTS.values()
        for name in importlib.import_module(module).Arguments.__dataclass_fields__
    }
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose))
    assert named - known <= OF_OTHERS
    assert len(named & known) > 40


def test_the_readme_explains_every_column_of_the_hand_off_dataset():
    from distil_whisper.handoff import WRITTEN

    rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert [name for name in rows if name in WRITTEN] == list(WRITTEN)


def test_the_files_that_the_readme_names_exist():
    named = re.findall(r"[`(]((?:scripts|distil_whisper|tests|benchmarks)/[\w./]+|\w+\.(?:py|sh|toml))[`)]", README)
    assert len(named) > 10
    assert {name for name in named if not (ROOT / name).exists()} == {"check.py"}  # which the reader saves


def test_the_links_inside_the_readme_lead_somewhere():
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    anchors = set()
    for title in re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE):
        slug = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        anchors.add(next(f"{slug}{end}" for end in ("", "-1", "-2") if f"{slug}{end}" not in anchors))
    links = set(re.findall(r"\]\(#([\w-]+)\)", prose))
    assert links and links <= anchors


def part_of_quickstart(pattern: str) -> str:
    return re.search(pattern, (ROOT / "scripts/quickstart.sh").read_text(), re.MULTILINE | re.DOTALL).group()


def bash(text: str, folder) -> subprocess.CompletedProcess:
    command = f"set -euo pipefail; out=.\n{text}"
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60)


def test_a_stage_of_the_quickstart_is_run_until_it_ends_well_and_counts_all_its_seconds(tmp_path):
    stage = part_of_quickstart(r"^stage\(\) \{.*?^\}")
    for name in ("finished", "seconds"):
        (tmp_path / name).mkdir()
    (tmp_path / "seconds/a").write_text("7")
    failed = bash(f"{stage}\nstage a false", tmp_path)
    assert (failed.returncode, failed.stderr) == (1, "") and int((tmp_path / "seconds/a").read_text()) >= 7
    ended = bash(f"{stage}\nstage a echo works", tmp_path)
    assert (ended.returncode, "works" in ended.stdout) == (0, True), ended.stderr
    assert int((tmp_path / "finished/a").read_text()) >= 7 and not (tmp_path / "seconds/a").exists()
    assert "works" not in bash(f"{stage}\nstage a echo works", tmp_path).stdout


def test_a_folder_of_another_version_of_the_quickstart_is_refused(tmp_path):
    check = part_of_quickstart(r"^version=.*?\nfi\n.*?\n")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "finished").mkdir()
    assert bash(check, tmp_path).returncode == 0
    (tmp_path / "finished/data").touch()
    assert bash(check, tmp_path).returncode == 0
    for change in ((tmp_path / "version").unlink, lambda: (tmp_path / "version").write_text("other")):
        change()
        refused = bash(check, tmp_path)
        assert refused.returncode == 1 and "remove that folder" in refused.stderr
