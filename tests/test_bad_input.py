"""Bad input of stages 1 to 3: one sentence on stderr, an exit code that is not 0, and nothing lost."""

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import toy_whisper
from conftest import WORDS, launch, write_audio_dataset
from datasets import Dataset, load_dataset
from stages import ENGLISH, label, metrics, rows_of, run, train_few, write_manifest

from distil_whisper.errors import UserError
from distil_whisper.outputs import OutputFolder

SFT = (*ENGLISH, "--kl_weight", 0)
FLASH = ("--attn_type", "flash_attn_2", "--dtype")


@pytest.fixture(scope="module")
def bad_rows(tmp_path_factory, utterances):
    """Two good rows, one whose audio is text, one longer than any window, one that nobody transcribed, one empty."""
    folder = tmp_path_factory.mktemp("bad") / "speech"
    long = replace(utterances[2], samples=np.resize(utterances[2].samples, 16_000 * 9), id="long")
    untold, silent = replace(utterances[3], text=None, id="untold"), replace(utterances[4], text="", id="silent")
    write_audio_dataset(folder, [*utterances[:2], replace(utterances[5], id="broken"), long, untold, silent], files=1)
    file = str(next((folder / "data").iterdir()))
    rows = load_dataset("parquet", data_files=file, split="train").to_list()
    rows[2]["audio"]["bytes"] = b"this is no audio"
    write_rows(file, rows)
    return folder


def write_rows(file, rows):
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    pq.write_table(table.from_pylist(rows, schema=table.schema), file)


@pytest.fixture(scope="module")
def launched(taught, student, toy_english_only, speech_folder, bad_rows, tmp_path_factory):
    """How each command ended, two at a time."""
    folder = tmp_path_factory.mktemp("outputs")
    theirs = folder / "theirs"
    theirs.mkdir()
    (theirs / "README.md").write_text("theirs")
    label_with = ["run_pseudo_labelling.py", "--dataset_name", speech_folder, "--report_to", "none"]
    train_with = ["run_distillation.py", "--model_name_or_path", student, "--do_train", "--kl_weight", 0]
    two = ["--train_dataset_name", f"{speech_folder}+{bad_rows}"]
    teacher, english = ["--model_name_or_path", taught], ["--model_name_or_path", toy_english_only]
    commands = {
        "missing column": [*label_with, *teacher, *ENGLISH, "--text_column_name", "txt"],
        "unknown split": [*label_with, *teacher, *ENGLISH, "--dataset_split_name", "train+tset"],
        "mismatched lists": [*train_with, *two, *ENGLISH, "--train_split_name", "train+test+dev"],
        "mistyped flag": [*train_with, *two, "--gradient_accumulation_step", 2],
        "language for an English-only model": [*label_with, *english, *ENGLISH],
        "no language for a multilingual model": [*label_with, *teacher],
        "no language in training": [*train_with, *two],
        "flash attention without its package": [*label_with, *teacher, *ENGLISH, *FLASH, "bfloat16"],
        "flash attention in float32": [*label_with, *teacher, *ENGLISH, *FLASH, "float32"],
        "labels into somebody's folder": [*label_with, *teacher, *ENGLISH, "--output_dir", theirs],
        "a model into somebody's folder": [*train_with, *two, *ENGLISH, "--output_dir", theirs],
        "bad rows": [*label_with[:1], "--dataset_name", bad_rows, *teacher, *ENGLISH, "--max_skipped", 50],
        "too many bad rows": [*label_with[:1], "--dataset_name", bad_rows, *teacher, *ENGLISH],
    }
    for name, command in commands.items():
        if theirs not in command:
            command += ["--output_dir", folder / name.replace(" ", "-")]
    with ThreadPoolExecutor(2) as pool:
        ended = dict(zip(commands, pool.map(lambda command: launch(*command), commands.values()), strict=True))
    return folder, ended


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "missing column",
            "--text_column_name txt is not a column of speech0/default/train (allowed: audio, id, speaker, text; did",
        ),
        ("unknown split", "has no split tset (allowed: test, train; did you mean test?)"),
        ("mismatched lists", "--train_dataset_name has 2 entries"),
        ("mismatched lists", "but --train_split_name (train+test+dev) has 3; give one, or 3"),
        ("mistyped flag", "there is no argument --gradient_accumulation_step (allowed: "),
        ("mistyped flag", "did you mean --gradient_accumulation_steps?"),
        ("language for an English-only model", "--language en was given, but the model is English-only; use"),
        ("no language for a multilingual model", "--language is missing: the teacher is multilingual, and"),
        ("no language in training", "--language is missing: the model is multilingual, and speech0/default"),
        ("flash attention without its package", "--attn_type flash_attn_2 cannot be used because "),
        ("flash attention without its package", "; use --attn_type sdpa"),
        (
            "flash attention in float32",
            "--attn_type flash_attn_2 computes in bfloat16 or float16, and --dtype is float32;",
        ),
        (
            "labels into somebody's folder",
            "theirs/README.md exists and was not written by this stage; move it away, or",
        ),
        ("a model into somebody's folder", "theirs/README.md exists and was not written by this stage"),
        (
            "too many bad rows",
            "2 of 6 rows cannot be labelled (1 x unreadable, 1 x longer than the window), more than --max_skipped 5",
        ),
    ],
)
def test_launched_scripts_say_one_sentence(name, sentence, launched):
    ended = launched[1][name]
    assert ended.code == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert sentence in ended.stderr and "Traceback" not in ended.stderr + ended.stdout


def test_files_of_others_stay_as_they_are(launched):
    folder, _ = launched
    assert [path.name for path in (folder / "theirs").glob("[!.]*")] == ["README.md"]
    assert (folder / "theirs/README.md").read_text() == "theirs"


def test_rows_that_cannot_be_labelled_are_counted_and_listed_and_the_others_labelled(launched):
    """The launched run: unreadable audio, audio longer than the window, and empty references."""
    folder, ended = launched[0] / "bad-rows", launched[1]["bad rows"]
    assert ended.code == 0 and "Traceback" not in ended.stderr
    assert "rows 4," in ended.stdout and "skipped 2" in ended.stdout and "skipped.jsonl" in ended.stdout
    reasons = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [entry["row_id"][-1] for entry in reasons] == ["2", "3"]
    assert "9.00 s of audio, the window is 2 s" in reasons[1]["reason"]
    rows = {row["id"]: row for row in rows_of(folder)}
    assert list(rows) == ["utterance-0", "utterance-1", "untold", "silent"]
    assert rows["untold"]["wer"] is None and rows["untold"]["errors"] is None
    assert rows["silent"]["reference_words"] == 0 and rows["silent"]["errors"] > 0


def test_too_many_bad_rows_end_the_run_and_the_others_are_kept(launched):
    folder = launched[0] / "too-many-bad-rows"
    assert len(rows_of(folder)) == 4 and len((folder / "skipped.jsonl").read_text().splitlines()) == 2


def test_training_and_validation_pass_over_bad_rows_and_say_so(student, bad_rows, tmp_path, capsys):
    flags = [*SFT, "--do_eval", "--eval_split_name", "train", "--predict_with_generate", "--max_steps", 2]
    flags += ["--per_device_train_batch_size", 8, "--max_skipped", 50]
    folder = train_few(student, bad_rows, tmp_path / "out", *flags)
    said = capsys.readouterr().out
    assert "4 of 6 rows kept" in said and "2  empty transcript" in said
    assert "skipped speech/default/train/00000-00000002: " in said
    assert "skipped speech/default/train/00000-00000003: longer than the window: 9.0 s of 2 s" in said
    assert "2 rows left out of the evaluation, such as speech/default/train/00000-00000002" in said
    assert [line["train/skipped"] for line in metrics(folder, "train/skipped")] == [2, 2]  # of each epoch
    assert metrics(folder, "eval/speech/default/train/wer")


def test_a_filter_that_has_nothing_to_filter_is_said(student, speech_folder, tmp_path, capsys):
    limits = ["--wer_threshold", 10, "--min_avg_logprob", 0, "--drop_language_mismatch"]
    train_few(student, speech_folder, tmp_path, *SFT, *limits, "--max_steps", 1)
    said = capsys.readouterr().out
    for flag in ("wer_threshold", "min_avg_logprob", "drop_language_mismatch"):
        assert f"--{flag} changes nothing: none of the datasets is trained on pseudo-labels" in said


def test_the_table_has_a_line_for_each_limit_and_for_what_it_cannot_see(student, labelled, tmp_path, capsys):
    limits = ["--max_compression_ratio", 90, "--drop_language_mismatch", "--filter_metric", "cer"]
    train_few(student, labelled, tmp_path, "--language", "de", "--kl_weight", 0, *limits, "--max_steps", 1)
    said = capsys.readouterr().out
    assert "         0  compression_ratio above --max_compression_ratio" in said
    assert "--filter_metric cer changes nothing without --wer_threshold" in said
    assert "labelled/default/train names the language of its labels (en); --language de is for others" in said


def test_transcripts_whose_language_nobody_knows_are_left_out(student, utterances, tmp_path, capsys):
    manifest = write_manifest(tmp_path / "data/train.json", utterances[:6])
    rows = json.loads(manifest.read_text())
    for row, language in zip(rows, ["en", "de", None, "", "xx", "en"], strict=True):
        row["language"] = language
    manifest.write_text(json.dumps(rows))
    flags = ["--kl_weight", 0, "--text_column_name", "sentence", "--max_steps", 1]
    train_few(student, manifest, tmp_path / "out", *flags)
    said = capsys.readouterr().out
    assert "3 of 6 rows kept" in said and "2  no language in column language" in said
    assert "1  a language in column language that the model has not" in said


def test_a_stream_of_which_nothing_is_left_says_why(student, labelled, tmp_path):
    with pytest.raises(UserError, match=r"is left to train on \(24 x avg_logprob below --min_avg_logprob\)"):
        train_few(student, labelled, tmp_path, *SFT, "--streaming", "--min_avg_logprob", 0)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--kl_weight", 1], "--teacher_model_name_or_path is missing; name the teacher, or give --kl_weight 0"),
        (["--streaming", "--max_steps", -1], "--streaming needs --max_steps"),
        (["--per_device_train_batch_size", 0], "--per_device_train_batch_size is 0; it must be 1 or more"),
        (["--timestamp_probability", 1.5], "--timestamp_probability is 1.5; it must be between 0 and 1"),
        (["--train_dataset_samples", "ten"], "--train_dataset_samples is ten; it must be positive numbers"),
        (["--text_column_name", "sentence"], "--text_column_name sentence is not a column of labelled/default/train"),
        (
            ["--do_eval", "--eval_split_name", "test", "--eval_text_column_name", "txt"],
            "--eval_text_column_name txt is not a column of",
        ),
        (["--do_eval", "--eval_split_name", "dev"], "has no split dev (allowed: test, train"),
        (["--max_label_length", 0], "is left to train on (24 x label longer than --max_label_length)"),
        (["--use_pseudo_labels", True, "--train_dataset_name", "SPEECH"], "--use_pseudo_labels whisper_transcript is"),
        (["--language", "hindee"], "the model has no language 'hindee'"),
        (["--language", "en-US"], "did you mean en?"),
        (["--language", "pt_BR"], "did you mean pt?"),
        (["--report_to", "wandbb"], "--report_to has an unknown tracker wandbb (allowed: "),
        (["--normalizer", "basics"], "there is no text normaliser 'basics' (allowed: "),
        (["--lr_scheduler_type", "lineer"], "linear"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "cosine_with_restarts"),
        (["--learning_rate", -1], "--learning_rate is -1.0; it must be 0 or more"),
        (["--adam_beta2", 1], "--adam_beta2 is 1.0; it must be at least 0 and below 1"),
        (["--dataloader_num_workers", -1], "--dataloader_num_workers is -1; it must be between 0 and 1,024"),
        (["--max_steps", -1, "--num_train_epochs", 0], "--num_train_epochs is 0.0; it must be above 0"),
        (["--max_steps", 0], "--max_steps is 0; it must be 1 or more, or -1 for --num_train_epochs"),
        (["--wer_threshold", -5], "--wer_threshold is -5.0; it must be 0 or more"),
        (["--min_avg_logprob", 1], "--min_avg_logprob is 1.0; it must be 0 or less"),
        (["--max_no_speech_prob", 60], "--max_no_speech_prob is 60.0; it must be between 0 and 1"),
    ],
)
def test_mistakes_of_training_are_one_sentence(flags, sentence, student, labelled, speech_folder, tmp_path):
    flags = [speech_folder if flag == "SPEECH" else flag for flag in flags]
    with pytest.raises(UserError) as caught:
        train_few(student, labelled, tmp_path / "out", *SFT, *flags)
    assert sentence in str(caught.value) and "\n" not in str(caught.value).strip()
    assert not (tmp_path / "out/model.safetensors").exists()


def test_a_limit_needs_its_column_in_pseudo_labels_alone(
    student, labelled, foreign_labels, speech_folder, tmp_path, capsys
):
    limit = [*SFT, "--min_avg_logprob", -100]
    with pytest.raises(UserError, match=r"--min_avg_logprob needs the column avg_logprob, which .* lacks; label it"):
        train_few(student, foreign_labels, tmp_path / "foreign", *limit)
    train_few(student, f"{labelled}+{speech_folder}", tmp_path / "mixed", *limit)
    assert "speech0/default/train: training on the transcripts in text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--concatenate_audio"], "--concatenate_audio needs --speaker_id_column_name or --recording_id_column_name"),
        (["--max_label_length", 0], "--max_label_length is 0; it must be 1 or more"),
        (["--max_skipped", -1], "--max_skipped is -1.0; it must be between 0 and 100"),
        (["--audio_column_name", "sound"], "--audio_column_name sound is not a column of"),
        (["--output_dir", "labels [de]"], "the path of the folder labels [de] has one of the characters * ? [ in it"),
        (["--dataset_split_name", "train+train"], "lists default/train and default/train, whose files would"),
        (["--task", "translat"], "translat"),
        (["--model_name_or_path", "SPEECH"], "cannot be loaded as a Whisper checkpoint"),
        (["--dataset_config_name", "hi"], "has no config hi (allowed: default"),
        (["--dataset_name", "SPEECH+"], "has an empty entry; put a name between, before and after each +"),
        (["--dataset_name", "+SPEECH"], "has an empty entry"),
        (["--dataset_name", "+"], "--dataset_name + has an empty entry"),
        (["--dataset_name", "none"], "--dataset_name is missing"),
        (["--dataset_split_name", "train+"], "--dataset_split_name train+ has an empty entry"),
        (
            ["--text_column_name", "audio"],
            "--text_column_name audio is the column of speech0/default/train that holds",
        ),
        (["--id_column_name", "audio"], "--id_column_name audio is the column of"),
        (["--speaker_id_column_name", "audio"], "--speaker_id_column_name audio is the column of"),
        (["--recording_id_column_name", "audio"], "--recording_id_column_name audio is the column of"),
        (["--dataset_split_name", "train[30:40]"], "speech0 cannot be read: Instruction "),
        (
            ["--model_name_or_path", "./nomodel"],
            "--model_name_or_path ./nomodel: there is no file or folder ./nomodel",
        ),
        (["--model_name_or_path", "a/b/nomodel"], "there is no file or folder a/b/nomodel"),
        (["--dataset_name", "./nodata"], "there is no file or folder ./nodata"),
        (["--dataset_name", "gone.parquet"], "there is no file or folder gone.parquet"),
    ],
)
def test_mistakes_of_labelling_are_one_sentence(flags, sentence, taught, speech_folder, tmp_path):
    flags = [str(flag).replace("SPEECH", str(speech_folder)) for flag in flags]
    with pytest.raises(UserError) as caught:
        label(taught, speech_folder, tmp_path / "out", *ENGLISH, *flags)
    assert sentence in str(caught.value) and "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("condition_on_prev", "hello", "column condition_on_prev of .* holds string; it must hold list<item: int32>"),
        ("whisper_token_ids", "1 2 3", "column whisper_token_ids of .* holds string; it must hold list<item: int32>"),
        ("whisper_transcript", 5, "column whisper_transcript of .* holds int64; it must hold string"),
        ("avg_logprob", "-0.3", "column avg_logprob of .* holds string; it must hold double"),
        ("truncated", "False", "column truncated of .* holds string; it must hold bool"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_another_kind_than_labels_have_is_named(column, value, sentence, streaming, student, tmp_path):
    rows = [{"audio": {"bytes": b"", "path": "a.wav"}, "whisper_transcript": " one", "text": "one", column: value}]
    (tmp_path / "labels").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "labels/train.parquet")
    with pytest.raises(UserError, match=sentence):
        train_few(student, tmp_path / "labels", tmp_path / "out", *SFT, "--streaming", streaming)


def test_splits_whose_files_would_have_one_name_are_refused(taught, utterances, tmp_path):
    """Each of their files would replace the other's."""
    first, second = (write_manifest(tmp_path / name / f"{name}.json", utterances[:2]) for name in "ab")
    splits = ["--dataset_split_name", "test.clean+test_clean"]
    with pytest.raises(UserError, match=r"lists default/test.clean and default/test_clean, whose files would have"):
        label(taught, f"{first}+{second}", tmp_path / "out", *ENGLISH, *splits)


@pytest.mark.parametrize(("kind", "window", "words"), [("window", 3, WORDS), ("tokenizer", 2, WORDS[:3])])
def test_a_student_of_another_teacher_is_refused(kind, window, words, student, labelled, tmp_path):
    teacher = toy_whisper.save(tmp_path / "other", [" " + " ".join(words)] * 3, window, d_model=32, heads=2)
    with pytest.raises(UserError, match=f"student and teacher have different {kind}s .*create_student_model"):
        train_few(student, labelled, tmp_path / "out", *ENGLISH, "--teacher_model_name_or_path", teacher)


def test_a_second_run_in_the_same_folder_is_refused(student, taught, labelled, speech_folder, tmp_path):
    for stage, start in (
        ("run_distillation", lambda folder: train_few(student, labelled, folder, *SFT)),
        ("run_pseudo_labelling", lambda folder: label(taught, speech_folder, folder, *ENGLISH)),
    ):
        folder = tmp_path / stage
        with OutputFolder(folder, stage), pytest.raises(UserError, match="another run of this stage"):
            start(folder)


def test_an_earlier_training_with_other_layers_is_not_continued(student, labelled, tmp_path):
    train_few(student, labelled, tmp_path / "out", *SFT)
    with pytest.raises(UserError, match=r"checkpoint-4 was written with other .*freeze_encoder"):
        train_few(student, labelled, tmp_path / "out", *SFT, "--freeze_encoder", "--max_steps", 6)


def test_a_missing_script_argument_is_named():
    for script, flag in (
        ("run_pseudo_labelling", "--model_name_or_path"),
        ("create_student_model", "--teacher_checkpoint"),
        ("run_distillation", "--model_name_or_path"),
    ):
        with pytest.raises(UserError, match=f"{flag} is missing"):
            run(script)


@pytest.mark.parametrize("script", ["run_pseudo_labelling", "run_distillation", "create_student_model"])
def test_help_shows_every_argument(script, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).parse_args(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    fields = importlib.import_module(script).Arguments.__dataclass_fields__
    assert all(f"--{name}" in shown for name in fields)


@pytest.mark.parametrize("script", ["run_short_form_eval.py", "run_long_form_eval.py"])
def test_launched_help(script):
    ran = launch(script, "--help")
    assert ran.code == 0 and "--generation_num_beams" in ran.stdout and "accelerate launch" in ran.stdout


def write_table(folder, utterances, texts: list[str]):
    """A CSV whose cells are written as they are given, audio files beside it."""
    folder.mkdir()
    for number, utterance in enumerate(utterances[: len(texts)]):
        (folder / f"{number}.wav").write_bytes(utterance.encoded())
    lines = [f"{number}.wav,{text},{number}.{number}0" for number, text in enumerate(texts)]
    (folder / "numbers.csv").write_text("\n".join(["audio,text,id", *lines]) + "\n")
    return folder / "numbers.csv"


def test_a_dry_run_says_what_cannot_be_read(taught, utterances, tmp_path, capsys):
    manifest = write_manifest(tmp_path / "train.json", utterances[:4])
    (tmp_path / f"{utterances[1].id}.wav").unlink()
    (tmp_path / f"{utterances[2].id}.wav").write_bytes(b"no sound")
    label(taught, manifest, tmp_path / "out", *ENGLISH, "--dry_run")
    assert "  2 of 4 rows looked at cannot be read (1 x missing file, 1 x unreadable)" in capsys.readouterr().out
    for utterance in utterances[:4]:
        (tmp_path / f"{utterance.id}.wav").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"no row of .*train that was tried can be labelled \(4 x missing file\)"):
        label(taught, manifest, tmp_path / "out", *ENGLISH, "--dry_run")


SPELT = [["1", "22", "3"], ["1.50", "22", ".5"]]


@pytest.mark.parametrize("texts", SPELT, ids=" ".join)
def test_transcripts_of_numbers_in_a_table_are_text_as_it_is_written(
    texts, taught, student, utterances, tmp_path, seen
):
    """In every stage, where the column text is taken without being named."""
    table = write_table(tmp_path / "data", utterances, texts)
    rows = rows_of(
        label(
            taught,
            table,
            tmp_path / "labels",
            *ENGLISH,
            "--id_column_name",
            "id",
            "--concatenate_audio",
            "--speaker_id_column_name",
            "id",
        )
    )
    assert [row["text"] for row in rows] == texts
    assert [row["utterance_ids"] for row in rows] == [["0.00"], ["1.10"], ["2.20"]]
    train_few(student, table, tmp_path / "model", *SFT, "--max_steps", 1)
    assert len(seen.batches) == 1
    names = [*ENGLISH, "--model_name_or_path", student, "--report_to", "none"]
    run("run_short_form_eval", *names, "--dataset_name", table, "--output_dir", tmp_path / "out")
    lines = (tmp_path / "out/short_form_predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["reference"] for line in lines] == texts


def test_transcripts_that_are_no_text_are_one_sentence(taught, student, utterances, tmp_path):
    manifest = write_manifest(tmp_path / "data/train.json", utterances[:3], text=1.5)
    sentence = r"column text of .*train holds no text, but float64; store the transcripts as strings, or name their"
    for stage in (
        lambda: label(taught, manifest, tmp_path / "labels", *ENGLISH),
        lambda: train_few(student, manifest, tmp_path / "model", *SFT),
    ):
        with pytest.raises(UserError, match=sentence):
            stage()
