"""Students: which layers they copy, that the copies are exact, and that what is saved works elsewhere."""

import copy
import json
import shutil

import pytest
import torch
import toy_whisper
from conftest import WORDS, launch
from safetensors import safe_open
from stages import ENGLISH, train_few
from transformers import (
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
    pipeline,
)

import create_student_model
from distil_whisper.errors import UserError
from distil_whisper.student import LayerMap, alignment_heads, make_student, spaced_layers

SCRIPT = "create_student_model.py"
SAVED = {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"}


@pytest.fixture(scope="module")
def teacher(toy_teacher):
    return WhisperForConditionalGeneration.from_pretrained(toy_teacher, dtype=torch.float32)


@pytest.fixture(scope="module")
def saved_student(toy_teacher, tmp_path_factory):
    """A student with the teacher's whole encoder and its first and last decoder layers, made by the script."""
    folder = tmp_path_factory.mktemp("student") / "student"
    ran = launch(SCRIPT, "--teacher_checkpoint", toy_teacher, "--save_dir", folder, "--decoder_layers", 2)
    assert ran.code == 0, ran.stderr
    return folder, ran.stdout


@pytest.mark.parametrize(
    ("teacher_layers", "student_layers", "expected"),
    [
        (32, 2, [0, 31]),
        (32, 1, [31]),
        (1, 1, [0]),
        (32, 3, [0, 15, 31]),
        (4, 3, [0, 1, 3]),
        (12, 6, [0, 2, 4, 6, 8, 11]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_layers_are_maximally_spaced(teacher_layers, student_layers, expected):
    assert spaced_layers(teacher_layers, student_layers) == expected


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, LayerMap([0, 1], [0, 3])),
        ({"encoder_layers": 1, "decoder_layers": 1}, LayerMap([1], [3])),
        ({"decoder_layers_numbers": [0, -1]}, LayerMap([0, 1], [0, 3])),
        ({"decoder_layers_numbers": [-2, 1], "decoder_layers": 2}, LayerMap([0, 1], [2, 1])),
        ({"encoder_layers_numbers": [0], "decoder_layers": 4}, LayerMap([0], [0, 1, 2, 3])),
    ],
)
def test_layers_are_bit_equal_to_the_teachers(teacher, chosen, expected):
    student, layers = make_student(teacher, **chosen)
    assert layers == expected
    assert student.config.encoder_layers == len(layers.encoder) == len(student.model.encoder.layers)
    assert student.config.decoder_layers == len(layers.decoder) == len(student.model.decoder.layers)
    compared = set()
    for stack in ("encoder", "decoder"):
        ours, theirs = getattr(student.model, stack), getattr(teacher.model, stack)
        for layer, copied in zip(ours.layers, getattr(layers, stack), strict=True):
            for name, weight in layer.state_dict().items():
                assert torch.equal(weight, theirs.layers[copied].state_dict()[name])
        compared |= {f"model.{stack}.layers.{name}" for name in ours.layers.state_dict()}
    for name, weight in student.state_dict().items():
        if name not in compared:
            assert torch.equal(weight, teacher.state_dict()[name]), name
    assert student.proj_out.weight is student.model.decoder.embed_tokens.weight
    assert not {w.data_ptr() for w in student.parameters()} & {w.data_ptr() for w in teacher.parameters()}


@pytest.mark.parametrize(
    ("chosen", "found", "allowed"),
    [
        ({"decoder_layers": 5}, "--decoder_layers is 5", "1 to 4; nearest: 4"),
        ({"decoder_layers": 0}, "--decoder_layers is 0", "1 to 4; nearest: 1"),
        ({"encoder_layers": 3}, "--encoder_layers is 3", "1 to 2; nearest: 2"),
        ({"decoder_layers_numbers": [0, 4]}, "--decoder_layers_numbers names layer 4", "0 to 3, or -4 to -1"),
        ({"decoder_layers_numbers": [0, -5]}, "names layer -5", "nearest: -4"),
        ({"encoder_layers_numbers": [2]}, "--encoder_layers_numbers names layer 2", "nearest: 1"),
        ({"decoder_layers_numbers": [3, -1]}, "more than once (3, -1 of 4", "at most once"),
        ({"decoder_layers_numbers": [0, -1], "decoder_layers": 3}, "--decoder_layers is 3", "names 2 layers (0 -1)"),
    ],
)
def test_impossible_layers_are_refused(teacher, chosen, found, allowed):
    with pytest.raises(UserError) as refusal:
        make_student(teacher, **chosen)
    assert found in str(refusal.value) and allowed in str(refusal.value)


@pytest.mark.parametrize(
    ("teacher_heads", "decoder_layers", "expected"),
    [
        ([[2, 0], [2, 1], [3, 1]], [0, 3], [[1, 1]]),  # the survivors under their new number
        ([[2, 0], [3, 1]], [3, 2, 0], [[0, 1], [1, 0]]),  # in the student's order
        ([[1, 0]], [0, 3], [[1, 0], [1, 1]]),  # none survives: the upper half
        ([[1, 0]], [0, 2, 3], [[1, 0], [1, 1], [2, 0], [2, 1]]),
        ([[1, 0]], [3], [[0, 0], [0, 1]]),  # one layer: all of it
        ([], [0, 3], [[1, 0], [1, 1]]),
        (None, [0, 3], [[1, 0], [1, 1]]),
    ],
)
def test_alignment_heads_are_heads_that_the_student_has(teacher_heads, decoder_layers, expected):
    assert alignment_heads(teacher_heads, decoder_layers, heads=2) == expected


def test_teacher_is_left_as_it_was(teacher):
    before = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict(), teacher.generation_config.to_dict()
    make_student(teacher, decoder_layers=1)
    after = teacher.state_dict(), teacher.config.to_dict(), teacher.generation_config.to_dict()
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])


def test_half_precision_teacher_gives_a_float32_student(toy_teacher, tmp_path):
    half = WhisperForConditionalGeneration.from_pretrained(toy_teacher, dtype=torch.float16)
    student, _ = make_student(half)
    assert {weight.dtype for weight in student.parameters()} == {torch.float32} == {student.config.dtype}
    expected = half.model.decoder.layers[3].fc1.weight
    assert torch.equal(student.model.decoder.layers[1].fc1.weight, expected.float())
    half_teacher, folder = shutil.copytree(toy_teacher, tmp_path / "half"), tmp_path / "student"
    half.save_pretrained(half_teacher)
    create_student_model.main(["--teacher_checkpoint", str(half_teacher), "--save_dir", str(folder)])
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float32}  # noqa: SIM118


def test_old_config_fields_follow_the_layers(toy_teacher, tmp_path):
    """OpenAI's configs also carry num_hidden_layers, which loading must not put in place of the student's count."""
    old = tmp_path / "teacher"
    shutil.copytree(toy_teacher, old)
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["encoder_layers"]}))
    student, _ = make_student(WhisperForConditionalGeneration.from_pretrained(old), encoder_layers=1)
    student.save_pretrained(tmp_path / "student")
    assert WhisperForConditionalGeneration.from_pretrained(tmp_path / "student").config.encoder_layers == 1


def test_generation_config_of_a_teacher_without_one_survives_reloading(toy_teacher, tmp_path):
    bare = tmp_path / "teacher"
    shutil.copytree(toy_teacher, bare)
    (bare / "generation_config.json").unlink()
    create_student_model.main(["--teacher_checkpoint", str(bare), "--save_dir", str(tmp_path / "student")])
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "student").generation_config
    assert loaded.alignment_heads == [[1, 0], [1, 1]]
    assert loaded.is_multilingual and "<|hi|>" in loaded.lang_to_id


def test_saved_student_is_complete(saved_student, toy_teacher):
    folder, stdout = saved_student
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} >= SAVED
    teacher_tokenizer, tokenizer = AutoTokenizer.from_pretrained(toy_teacher), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == teacher_tokenizer.get_vocab()
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    assert extractor.n_samples == WhisperFeatureExtractor.from_pretrained(toy_teacher).n_samples
    theirs = json.loads((toy_teacher / "generation_config.json").read_text())
    ours = json.loads((folder / "generation_config.json").read_text())
    assert {name: value for name, value in ours.items() if value is not None} == {
        **theirs,
        "alignment_heads": [[1, 0], [1, 1]],
    }
    assert "student decoder layer 0 <- teacher layer 0\n" in stdout
    assert "student decoder layer 1 <- teacher layer 3\n" in stdout
    student = WhisperForConditionalGeneration.from_pretrained(folder)
    whole = WhisperForConditionalGeneration.from_pretrained(toy_teacher).num_parameters()
    assert f"teacher {whole:,}, student {student.num_parameters():,}" in stdout
    assert str(toy_teacher) not in "".join(path.read_text() for path in folder.glob("*.json"))


@pytest.fixture(scope="module")
def trained_student(tmp_path_factory, student, taught, labelled):
    flags = ["--teacher_model_name_or_path", taught, "--freeze_encoder", "--timestamp_probability", 0.5]
    return train_few(student, labelled, tmp_path_factory.mktemp("trained"), *ENGLISH, *flags)


@pytest.fixture(params=["new", "trained"])
def teacher_and_student(request, toy_teacher):
    """A student before and after its training, with its teacher."""
    if request.param == "new":
        return toy_teacher, request.getfixturevalue("saved_student")[0]
    return request.getfixturevalue("taught"), request.getfixturevalue("trained_student")


def test_word_timestamps_come_in_order(teacher_and_student, utterances):
    transcribe = pipeline("automatic-speech-recognition", model=str(teacher_and_student[1]))
    options = {"language": "en", "num_beams": 1, "max_new_tokens": 20}
    for utterance in utterances[:3]:
        audio = {"raw": utterance.samples, "sampling_rate": 16_000}
        chunks = transcribe(audio, return_timestamps="word", generate_kwargs=options)["chunks"]
        times = [time for chunk in chunks for time in chunk["timestamp"]]
        assert times and times == sorted(times)


def test_saved_student_assists_its_teacher(teacher_and_student, utterances):
    names = [str(name) for name in teacher_and_student]
    teacher, student = (WhisperForConditionalGeneration.from_pretrained(name) for name in names)
    assistant = WhisperForCausalLM.from_pretrained(names[1])
    assert torch.equal(assistant.model.decoder.layers[1].fc1.weight, student.model.decoder.layers[1].fc1.weight)
    extract = WhisperFeatureExtractor.from_pretrained(names[0])
    options = {"language": "en", "task": "transcribe", "max_new_tokens": 20, "num_beams": 1}
    for utterance in utterances[:3]:
        features = extract(utterance.samples, sampling_rate=16_000, return_tensors="pt").input_features
        alone = teacher.generate(features, **options)
        assert torch.equal(alone, teacher.generate(features, assistant_model=assistant, **options))


def test_english_only_teacher_and_a_single_layer(toy_english_only, tmp_path, capsys):
    argv = ["--teacher_checkpoint", str(toy_english_only), "--save_dir", str(tmp_path), "--decoder_layers", "1"]
    create_student_model.main(argv)
    printed = capsys.readouterr().out
    assert "student decoder layer 0 <- teacher layer 3\n" in printed
    assert "for a single layer the last is copied, as in Distil-Whisper; DistilBART takes the first" in printed
    assert not WhisperForConditionalGeneration.from_pretrained(tmp_path).generation_config.is_multilingual


def test_numbers_parse_with_negatives():
    flags = ["--teacher_checkpoint", "t", "--save_dir", "s", "--decoder_layers_numbers", "0", "-1"]
    args = create_student_model.parse_args([*flags, "--encoder_layers_numbers", "-2"])
    assert (args.decoder_layers_numbers, args.encoder_layers_numbers) == ([0, -1], [-2])
    assert create_student_model.parse_args([*flags, "--decoder_layers_numbers", "none"]).decoder_layers_numbers is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--decoder_layers_numbers", "0", "-9"], "--decoder_layers_numbers names layer -9"),
        (["--decoder_layer", "2"], "did you mean --decoder_layers?"),
        (["--save_dir", ""], "--save_dir is missing"),
        (["--teacher_checkpoint", "no/such/folder"], "there is no file or folder no/such/folder"),
    ],
)
def test_mistakes_are_one_sentence(toy_teacher, tmp_path, capsys, flags, sentence):
    argv = ["--teacher_checkpoint", str(toy_teacher), "--save_dir", str(tmp_path / "student"), *flags]
    with pytest.raises(UserError) as refusal:
        create_student_model.main(argv)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "student").exists()


def test_files_of_others_are_refused_and_kept(toy_teacher, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    ran = launch(SCRIPT, "--teacher_checkpoint", toy_teacher, "--save_dir", ".", cwd=tmp_path)
    assert ran.code == 2 and "Traceback" not in ran.stderr
    assert "config.json exists and was not written by this stage" in ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes.txt", ".distil_whisper"}
    (tmp_path / "config.json").unlink()
    monkeypatch.chdir(tmp_path)
    create_student_model.main(["--teacher_checkpoint", str(toy_teacher), "--save_dir", "."])
    assert WhisperForConditionalGeneration.from_pretrained(tmp_path).config.decoder_layers == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_another_student_is_replaced_only_when_told(saved_student, toy_teacher, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(saved_student[0], folder)
    argv = ["--teacher_checkpoint", str(toy_teacher), "--save_dir", str(folder)]
    create_student_model.main([*argv, "--decoder_layers", "2"])  # the same one again
    with pytest.raises(UserError, match=r"decoder \[0, 3\], now \[3\]\); give --overwrite_output_dir"):
        create_student_model.main([*argv, "--decoder_layers", "1"])
    assert WhisperForConditionalGeneration.from_pretrained(folder).config.decoder_layers == 2
    create_student_model.main([*argv, "--decoder_layers", "1", "--overwrite_output_dir"])
    assert WhisperForConditionalGeneration.from_pretrained(folder).config.decoder_layers == 1


def test_a_failed_save_leaves_the_earlier_student(saved_student, toy_teacher, tmp_path, monkeypatch):
    folder = tmp_path / "student"
    shutil.copytree(saved_student[0], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WhisperFeatureExtractor, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        create_student_model.main(["--teacher_checkpoint", str(toy_teacher), "--save_dir", str(folder)])
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not list((folder / ".distil_whisper").glob("*.partial"))


def test_several_processes_write_one_student(toy_teacher, tmp_path):
    ran = launch(SCRIPT, "--teacher_checkpoint", toy_teacher, "--save_dir", tmp_path, processes=2)
    assert ran.code == 0, ran.stderr
    assert ran.stdout.count("saved in") == 1
    assert WhisperForConditionalGeneration.from_pretrained(tmp_path).config.decoder_layers == 2


def test_every_alignment_head_exists_whatever_the_depth(tmp_path):
    folder = toy_whisper.save(tmp_path, [" " + " ".join(WORDS)] * 3, 4, d_model=32, heads=4, decoder_layers=6)
    teacher = WhisperForConditionalGeneration.from_pretrained(folder)
    for count in range(1, 7):
        student, _ = make_student(teacher, decoder_layers=count)
        heads = student.generation_config.alignment_heads
        assert heads and all(0 <= layer < count and 0 <= head < 4 for layer, head in heads)
