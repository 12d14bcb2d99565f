"""The two evaluation scripts: figures, files, what is skipped, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stages
from conftest import Utterance, launch, write_audio_dataset
from test_processes import UNEVEN
from transformers import AutomaticSpeechRecognitionPipeline

from distil_whisper.decoding import Decoder
from distil_whisper.errors import UserError
from distil_whisper.models import load_whisper
from distil_whisper.sequential import Sequential
from distil_whisper.transcribers import Chunked

FLAGS = ("--language", "en", "--generation_max_length", 8, "--report_to", "none")


def evaluate(form: str, model, data, output, *flags) -> dict:
    """Run an evaluation in this process; its results."""
    names = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", output]
    stages.run(f"run_{form}_eval", *names, *flags)
    return json.loads((Path(output) / f"{form}_results.json").read_text())


def predictions(output, form: str = "short_form") -> list[dict]:
    return [json.loads(line) for line in (Path(output) / f"{form}_predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory, utterances):
    """Good rows, one without words, one longer than the window, and one that is no audio."""
    good = utterances[0]
    rows = [
        *utterances[:3],
        replace(good, id="silent", text=""),
        replace(good, id="long", samples=np.tile(good.samples, 12)),
    ]
    folder = write_audio_dataset(tmp_path_factory.mktemp("mixed"), rows, split="test", files=1)
    path = next((folder / "data").glob("*.parquet"))
    table = pq.read_table(path)
    broken = table.to_pylist()
    broken[1]["audio"] = {"bytes": b"no audio at all", "path": "broken.wav"}
    pq.write_table(pa.Table.from_pylist(broken, schema=table.schema), path)
    return folder


def test_short_form_counts_what_it_leaves_out(toy_teacher, mixed_folder, tmp_path):
    (result,) = evaluate("short_form", toy_teacher, mixed_folder, tmp_path, *FLAGS)["datasets"]
    assert (result["rows"], result["too_long"], result["skipped"], result["empty_references"]) == (3, 1, 1, 1)
    assert "broken" not in json.dumps(predictions(tmp_path)) and len(predictions(tmp_path)) == 3
    assert result["skipped_rows"][0]["row_id"].endswith("00000-00000001")
    assert result["normalizer"] == "english" and result["rtfx"] > 0
    assert result["wer"] >= 0 and {"cer", "wer_ortho", "cer_ortho"} <= result.keys()


def test_several_datasets_by_plus_and_streaming_give_the_same(toy_teacher, speech_folder, tmp_path):
    both = f"{speech_folder}+{speech_folder}"
    plain = evaluate("short_form", toy_teacher, both, tmp_path / "a", *FLAGS, "--dataset_split_name", "test+train")
    streamed = evaluate(
        "short_form", toy_teacher, both, tmp_path / "b", *FLAGS, "--dataset_split_name", "test+train", "--streaming"
    )
    assert [entry["rows"] for entry in plain["datasets"]] == [8, 24]
    for one, other in zip(plain["datasets"], streamed["datasets"], strict=True):
        assert {k: one[k] for k in ("rows", "wer", "cer", "label")} == {
            k: other[k] for k in ("rows", "wer", "cer", "label")
        }
    assert predictions(tmp_path / "a") == predictions(tmp_path / "b")


def test_two_processes_go_on_where_one_was_stopped_however_far_apart_they_end(
    toy_teacher, speech_folder, tmp_path, monkeypatch
):
    """The second one is held up for longer than a collective may take."""
    sets = ["--dataset_split_name", "train+test", *FLAGS]
    one = evaluate("short_form", toy_teacher, speech_folder, tmp_path / "one", *sets)
    decode, calls = Decoder.__call__, []

    def stop_at_second(self, *arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, *arguments, **options)

    monkeypatch.setattr(Decoder, "__call__", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate("short_form", toy_teacher, speech_folder, tmp_path / "two", *sets)
    monkeypatch.undo()
    flags = ["--model_name_or_path", toy_teacher, "--dataset_name", speech_folder, "--output_dir", tmp_path / "two"]
    ran = launch("run_short_form_eval.py", *flags, *sets, "--ddp_timeout", 10, launcher=UNEVEN)
    assert ran.code == 0, ran.stderr
    two = json.loads((tmp_path / "two" / "short_form_results.json").read_text())
    assert two["processes"] == 2
    timeless = [
        {name: value for name, value in split.items() if "timed" not in name and name != "rtfx"}
        for run in (one, two)
        for split in run["datasets"]
    ]
    assert timeless[:2] == timeless[2:] and [split["rows"] for split in timeless[:2]] == [24, 8]
    assert predictions(tmp_path / "two") == predictions(tmp_path / "one")


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory, utterances):
    """Two recordings of several windows."""
    parts = utterances[:16]
    long = [
        Utterance(f"long-{i}", " ".join(u.text for u in part), "x", np.concatenate([u.samples for u in part]))
        for i, part in enumerate((parts[:8], parts[8:]))
    ]
    return write_audio_dataset(tmp_path_factory.mktemp("long"), long, split="test", files=1)


@pytest.mark.parametrize(
    "how", [("--chunk_length_s", 4), (), ("--condition_on_prev_tokens", "--temperature_fallback")]
)
def test_long_form_transcribes_all_of_a_recording(toy_teacher, long_folder, tmp_path, how):
    results = evaluate("long_form", toy_teacher, long_folder, tmp_path, *FLAGS, "--return_timestamps", *how)
    (result,) = results["datasets"]
    assert result["rows"] == 2 and result["rtfx"] > 0
    heard = predictions(tmp_path, "long_form")
    assert all(row["segments"] and row["segments"][-1]["end"] is not None for row in heard)
    assert all(row["segments"][-1]["end"] > 4 for row in heard)  # beyond the first window


def test_chunks_are_those_of_the_pipeline(toy_teacher, long_folder):
    whisper = load_whisper(toy_teacher, device="cpu")
    samples = np.random.default_rng(0).standard_normal(9 * 16_000).astype(np.float32)
    ours = Chunked(whisper, 2, 4.0, 1.0, max_label_length=8, return_timestamps=True)(
        [samples], "en", "transcribe", ["a recording"]
    )[0]
    pipeline = AutomaticSpeechRecognitionPipeline(
        whisper.model, tokenizer=whisper.tokenizer, feature_extractor=whisper.feature_extractor, ignore_warning=True
    )
    told = {"num_beams": 1, "max_new_tokens": 8, "language": "en", "task": "transcribe"}
    theirs = pipeline(
        samples, chunk_length_s=4, stride_length_s=1, batch_size=2, return_timestamps=True, generate_kwargs=told
    )
    assert ours.text == " ".join(theirs["text"].split())
    assert ours.details["segments"]
    assert [(s["start"], s["end"]) for s in ours.details["segments"]] == [c["timestamp"] for c in theirs["chunks"]]


def test_sequential_is_generate_on_the_whole_recording(toy_teacher):
    whisper = load_whisper(toy_teacher, device="cpu")
    samples = np.random.default_rng(0).standard_normal(9 * 16_000).astype(np.float32)
    ours = Sequential(whisper, 1, max_label_length=8)([samples], "en", "transcribe", ["a recording"])[0].text
    inputs = whisper.feature_extractor(
        samples,
        sampling_rate=16_000,
        truncation=False,
        padding="longest",
        return_attention_mask=True,
        return_tensors="pt",
    )
    ids = whisper.model.generate(
        **inputs,
        return_timestamps=True,
        language="en",
        task="transcribe",
        max_new_tokens=8,
        num_beams=1,
        condition_on_prev_tokens=False,
    )
    assert ours == " ".join(whisper.tokenizer.decode(ids[0], skip_special_tokens=True).split()) and ours


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("short_form", ["--text_column_name", "txt"], "text"),
        ("short_form", ["--dataset_split_name", "tset"], "test"),
        ("short_form", ["--dataset_split_name", "test+test+test", "--text_column_name", "text+text"], "3"),
        ("short_form", ["--normalizer", "basik"], "basic"),
        ("short_form", ["--language", "none"], "--language"),
        ("long_form", ["--chunk_length_s", "30"], "4"),
        ("long_form", ["--stride_length_s", "1"], "--chunk_length_s"),
        ("long_form", ["--chunk_length_s", "4", "--stride_length_s", "2"], "half"),
    ],
)
def test_mistakes_are_one_sentence(toy_teacher, speech_folder, tmp_path, script, flags, words):
    with pytest.raises(UserError, match=words) as error:
        evaluate(script, toy_teacher, speech_folder, tmp_path, "--report_to", "none", "--language", "en", *flags)
    assert "\n" not in str(error.value)


def test_a_language_for_an_english_only_model_is_refused_at_the_command_line(
    toy_english_only, speech_folder, tmp_path
):
    flags = ["--model_name_or_path", toy_english_only, "--dataset_name", speech_folder, "--output_dir", tmp_path]
    ran = launch("run_short_form_eval.py", *flags, "--report_to", "none", "--language", "hi")
    assert ran.code == 2 and "Traceback" not in ran.stderr
    assert (
        ran.stderr.strip().splitlines()[-1].startswith("error: --language hi was given, but the model is English-only")
    )


def test_long_form_is_launched_and_a_foreign_file_is_kept(toy_teacher, long_folder, tmp_path):
    flags = ["--model_name_or_path", toy_teacher, "--dataset_name", long_folder, "--output_dir", tmp_path, *FLAGS]
    (tmp_path / "long_form_results.json").write_text("mine")
    refused = launch("run_long_form_eval.py", *flags, "--chunk_length_s", 4)
    assert refused.code == 2 and "long_form_results.json" in refused.stderr and "Traceback" not in refused.stderr
    assert (tmp_path / "long_form_results.json").read_text() == "mine"
    (tmp_path / "long_form_results.json").unlink()
    ran = launch("run_long_form_eval.py", *flags, "--chunk_length_s", 4)
    assert ran.code == 0 and "WER" in ran.stdout
