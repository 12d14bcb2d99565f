"""Pushing and loading back, with the real client and scripts against a local server that speaks the Hub's protocol."""

import json
import os

import pytest
from conftest import ROOT, launch, write_audio_dataset
from hub_server import READ_TOKEN, TOKEN, USER, HubServer
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import disable_progress_bars

from distil_whisper.errors import UserError
from distil_whisper.hub import Result, dataset_card, is_hub_id, model_card, public_name, push_folder, resolve_repo

disable_progress_bars()
SCRIPT = "create_student_model.py"
LOAD_DATASET = """
import json, sys
from datasets import load_dataset
from distil_whisper.reading import open_source
for streaming in (False, True):
    rows = list(load_dataset(sys.argv[1], "hi", split="train", streaming=streaming))
    print(json.dumps([[row["id"], row["text"], len(row["audio"]["bytes"])] for row in rows]))
source = open_source(sys.argv[1], "hi", streaming=True)
source.take_counts(source.count_rows())
rows = [row for unit in source.units for row in source.rows(unit.index, start=1)]
print(json.dumps([[row["id"], row["text"], len(row["audio"]["bytes"])] for row in rows]))
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server as this process's Hub, with a login and no other one to fall back on."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield server


def metadata(card: str) -> dict:
    return ModelCard(card).data.to_dict()


def test_student_is_pushed_loads_back_and_teaches(toy_teacher, tmp_path):
    """The script pushes a student under its folder's name; by its Hub id it is then the teacher of the next one."""
    with HubServer() as server:
        env = server.environment(tmp_path)
        flags = ["--push_to_hub", "--hub_private_repo"]
        first = tmp_path / "my-student"
        ran = launch(SCRIPT, "--teacher_checkpoint", toy_teacher, "--save_dir", first, *flags, env=env)
        assert ran.code == 0, ran.stderr
        assert f"pushed to {server.url}/{USER}/my-student" in ran.stdout
        pushed = server.files(f"{USER}/my-student")
        assert pushed == {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()}
        assert {"README.md", "model.safetensors", "generation_config.json", "tokenizer.json"} <= set(pushed)
        assert server.repositories["models", f"{USER}/my-student"].private

        second = tmp_path / "second"
        flags = ["--decoder_layers_numbers", "-1", "--push_to_hub", "--hub_model_id", f"{USER}/other"]
        ran = launch(SCRIPT, "--teacher_checkpoint", f"{USER}/my-student", "--save_dir", second, *flags, env=env)
        assert ran.code == 0, ran.stderr
        assert json.loads(server.files(f"{USER}/other")["config.json"])["decoder_layers"] == 1
        card = server.files(f"{USER}/other")["README.md"].decode()

    assert metadata(card)["base_model"] == f"{USER}/my-student"
    assert "| `--decoder_layers_numbers` | -1 |" in card and "student decoder layer 0 <- teacher layer 1" in card
    assert "base_model" not in metadata(pushed["README.md"].decode())
    for name, content in pushed.items():
        assert str(tmp_path).encode() not in content and str(toy_teacher).encode() not in content, name
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_push_without_login_is_one_sentence_and_writes_nothing(toy_teacher, tmp_path):
    with HubServer() as server:
        flags = ["--teacher_checkpoint", toy_teacher, "--save_dir", tmp_path / "student", "--push_to_hub"]
        ran = launch(SCRIPT, *flags, env=server.environment(tmp_path, token=None))
        assert server.requests == []
    assert ran.code == 2 and "Traceback" not in ran.stderr
    assert "error: --push_to_hub needs a login, and there is none; run `hf auth login`, or set HF_TOKEN" in ran.stderr
    assert not list((tmp_path / "student").glob("[!.]*"))


def test_dataset_is_pushed_and_read_streamed_or_not(hub, utterances, tmp_path):
    folder = write_audio_dataset(tmp_path / "speech", utterances[:6])
    files = [{"split": "train", "path": "data/train-*.parquet"}]
    (folder / "README.md").write_text(
        f"---\nconfigs: {json.dumps([{'config_name': 'hi', 'data_files': files}])}\n---\n"
    )
    repo_id = resolve_repo(folder, repo_type="dataset")
    assert repo_id == f"{USER}/speech"
    url = push_folder(folder, repo_id, ["data", "README.md"], repo_type="dataset", message="labels")
    assert url == f"{hub.url}/datasets/{USER}/speech"

    script = tmp_path / "load.py"
    script.write_text(LOAD_DATASET)
    hub.requests.clear()
    ran = launch(script, repo_id, env=hub.environment(tmp_path))
    assert ran.code == 0, ran.stderr
    expected = [[u.id, u.text, len(u.encoded())] for u in utterances[:6]]
    assert [json.loads(line) for line in ran.stdout.splitlines()] == [expected, expected, expected[1:3] + expected[4:]]
    assert any(wanted for _, path, wanted in hub.requests if path.endswith(".parquet"))  # streaming asks for ranges


def test_only_what_was_named_is_pushed(hub, tmp_path):
    repo_id = resolve_repo(tmp_path, "run")
    for name in ("model.safetensors", "secrets.env", "runs/a[1].bin", "runs/.half.7.partial", "more/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0" + name.encode())
    names = ["model.safetensors", "runs"]
    push_folder(tmp_path, repo_id, names, message="first")
    assert set(hub.files(repo_id)) == {"model.safetensors", "runs/a[1].bin"}
    push_folder(tmp_path, repo_id, names, message="of nothing new")
    (tmp_path / "runs/a[1].bin").write_bytes(b"")
    push_folder(tmp_path, repo_id, ["runs/a[1].bin"], message="second")
    assert hub.files(repo_id)["runs/a[1].bin"] == b""
    assert hub.repositories["models", repo_id].messages == ["initial commit", "first", "second"]


def test_a_set_of_shards_replaces_the_one_before(hub, tmp_path):
    """`load_dataset` would read the shards of both by their common pattern."""
    repo_id = resolve_repo(tmp_path, "labels", repo_type="dataset")
    (tmp_path / "en").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / f"en/{name}.parquet").write_bytes(name.encode())
    names = [f"en/{path.name}" for path in (tmp_path / "en").iterdir()]
    push_folder(tmp_path, repo_id, names, repo_type="dataset", message="first")
    assert set(hub.files(repo_id, "dataset")) == set(names)
    for path in (tmp_path / "en").iterdir():
        path.unlink()
    (tmp_path / "en/train-00000-of-00001.parquet").write_bytes(b"again")
    push_folder(tmp_path, repo_id, ["en/train-00000-of-00001.parquet"], repo_type="dataset", message="second")
    expected = {"en/train-00000-of-00001.parquet": b"again", "en/test-00000-of-00001.parquet": b"test-00000-of-00001"}
    assert hub.files(repo_id, "dataset") == expected


def test_repository_that_exists_is_used_again(hub, tmp_path):
    assert resolve_repo(tmp_path / "student") == f"{USER}/student"
    HfApi().upload_file(repo_id=f"{USER}/student", path_in_repo="kept.txt", path_or_fileobj=b"kept")
    assert resolve_repo(tmp_path / "student") == f"{USER}/student"
    assert hub.files(f"{USER}/student") == {"kept.txt": b"kept"}


@pytest.mark.parametrize(
    ("token", "repo", "sentence"),
    [
        ("hf_of_nobody", "student", "cannot use the repository student: the Hub answered 401: Invalid user token"),
        (READ_TOKEN, f"{USER}/public", "the Hub answered 403: You don't have the rights to write with this token"),
        (TOKEN, "somebody/student", "the Hub answered 403: You don't have the rights to create a repo under the"),
        (TOKEN, "openai/whisper-tiny", "the Hub answered 403: You don't have the rights to write to openai/whisper"),
        (TOKEN, "my student", "--hub_model_id my student, which cannot name a repository (allowed: letters"),
        (TOKEN, "my student", "give --hub_model_id my-student"),
        (TOKEN, "a/b/c", "--hub_model_id a/b/c, which cannot name a repository"),
        (TOKEN, "-x--y..z", "give --hub_model_id x-y-z"),
    ],
)
def test_what_would_refuse_a_push_refuses_it_at_the_start(hub, monkeypatch, tmp_path, token, repo, sentence):
    hub.add("openai/whisper-tiny", tmp_path)
    hub.add(f"{USER}/public", tmp_path)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as refusal:
        resolve_repo(tmp_path, repo)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value) and token not in str(refusal.value)


def test_private_work_does_not_go_to_a_public_repository(hub, tmp_path):
    resolve_repo(tmp_path, "public")
    resolve_repo(tmp_path, "private", private=True)
    assert hub.repositories["models", f"{USER}/private"].private
    resolve_repo(tmp_path, "private", private=True)
    with pytest.raises(UserError, match=f"--hub_private_repo was given, but the repository {USER}/public exists"):
        resolve_repo(tmp_path, "public", private=True)


def test_no_network_is_one_sentence(monkeypatch, tmp_path):
    with HubServer() as server:
        gone = server.url
    monkeypatch.setattr(constants, "ENDPOINT", gone)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"--push_to_hub cannot use the repository me/student: .*[Cc]onnect"):
        resolve_repo(tmp_path, "me/student")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"--push_to_hub cannot use the repository me/student: .*offline mode"):
        resolve_repo(tmp_path, "me/student")


def test_a_failed_push_says_how_to_push_later(hub, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError) as refusal:
        push_folder(tmp_path, f"{USER}/deleted", ["metrics.jsonl"], repo_type="dataset", message="m")
    assert str(refusal.value) == (
        f"pushing to {USER}/deleted failed: the Hub answered 404: Repository not found; {tmp_path} is complete; "
        "start the same command again to push it"
    )
    (tmp_path / "README.md").write_text("---\nlanguage: [\n---\n")
    resolve_repo(tmp_path, "student")
    with pytest.raises(UserError, match=r"failed: Invalid metadata in README\.md; .* is complete"):
        push_folder(tmp_path, f"{USER}/student", ["README.md"], message="m")


def test_model_card_states_where_a_student_comes_from(tmp_path):
    local = tmp_path / "labelled"
    local.mkdir()
    card = model_card(
        f"{USER}/student",
        "openai/whisper-large-v2",
        "A distilled student.",
        {
            "train_dataset_name": f"{local}+mozilla/cv",
            "learning_rate": 1e-4,
            "output_dir": str(tmp_path),
            "wer_threshold": None,
            "resume_from_checkpoint": "../elsewhere/checkpoint-5",
            "eval_split_name": ["test|a", "test_ood"],
        },
        datasets=[str(local), "mozilla/cv"],
        languages=["Hindi", "en", "klingon"],
        results=[
            Result("mozilla/cv", "test", {"wer": 12.345, "cer": 4.0}, config="hi", facts={"rows": 7}),
            Result(str(local), "test_ood", {"wer": 30.0, "rtfx": 12.5}),
        ],
        facts={"Parameters": "1,234"},
    )
    data = ModelCard(card).data
    assert (data.base_model, data.datasets, data.language) == ("openai/whisper-large-v2", ["mozilla/cv"], ["en", "hi"])
    assert data.library_name == "transformers" and {"whisper", "distillation"} <= set(data.tags)
    assert data.license is None
    found = {
        (r.dataset_type, r.dataset_config, r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results
    }
    assert found == {
        ("mozilla/cv", "hi", "test", "wer"): 12.35,
        ("mozilla/cv", "hi", "test", "cer"): 4.0,
        ("labelled", None, "test_ood", "wer"): 30.0,
    }
    assert "| mozilla/cv | hi | test | 12.35 | 4.00 | 7 |  |" in card
    assert "| `--train_dataset_name` | labelled+mozilla/cv |" in card
    assert "| `--resume_from_checkpoint` | checkpoint-5 |" in card
    assert r"| `--eval_split_name` | test\|a test_ood |" in card
    assert "wer_threshold" not in card and "output_dir" not in card
    assert str(tmp_path) not in card and str(tmp_path.parent) not in card
    assert "- Parameters: 1,234" in card


def test_dataset_card_has_no_path_of_this_machine(tmp_path):
    card = dataset_card(
        str(tmp_path),
        str(tmp_path / "teacher"),
        [str(tmp_path / "cv"), "mozilla/cv"],
        {"dataset_name": str(tmp_path / "cv")},
        splits=[{"split": "train", "rows": 5}, {"split": "test", "rows": 2, "wer": 3.5}],
        columns={"whisper_transcript": "the teacher's text"},
        facts={"Language": "hi"},
    )
    assert card.startswith(f"# {tmp_path.name}\n")
    assert "- Teacher: teacher\n- Audio: cv, mozilla/cv\n- Language: hi" in card
    assert "| split | rows | wer |\n| --- | --- | --- |\n| train | 5 |  |\n| test | 2 | 3.5 |" in card
    assert "| whisper_transcript | the teacher's text |" in card
    assert str(tmp_path.parent) not in card


def test_names_of_this_machine_are_told_from_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai" / "whisper-tiny").mkdir(parents=True)
    assert is_hub_id("openai/whisper-base") and is_hub_id("gpt2")
    assert not is_hub_id("openai/whisper-tiny")  # a folder here: what a script would load
    assert not any(map(is_hub_id, [str(tmp_path), "./teacher", "outputs/run/teacher", "~/teacher"]))
    assert public_name("openai/whisper-base") == "openai/whisper-base"
    assert public_name("openai/whisper-tiny") == "whisper-tiny"
    assert public_name(".") == tmp_path.name
    assert public_name("/gone/from/here") == "here"


def test_what_a_shell_sets_does_not_change_the_tests(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import conftest\nfrom huggingface_hub import constants, get_token\n"
        "print(constants.HF_HUB_OFFLINE, constants.ENDPOINT, get_token())\n"
    )
    shell = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "tests", "scripts"))
    assert launch(probe, env={**shell, "PYTHONPATH": paths}).stdout == "False https://huggingface.co None\n"
