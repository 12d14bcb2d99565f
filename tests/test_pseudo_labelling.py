"""Stage 1 as a user runs it: what is in the folder, what is said, and that only the audio decides the labels."""

import json
import re
import shutil
from dataclasses import replace

import fsspec
import jiwer
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import write_audio_dataset
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from stages import ENGLISH, SPEAKERS, WINDOW_S, label, metrics, rows_of, run, write_manifest

import run_pseudo_labelling
from distil_whisper import normalisation, plan
from distil_whisper.audio import decode, stack
from distil_whisper.decoding import Decoder
from distil_whisper.errors import UserError
from distil_whisper.handoff import WRITTEN
from distil_whisper.models import load_whisper
from distil_whisper.normalisation import normaliser
from distil_whisper.outputs import RECORDS
from distil_whisper.tokens import plain_text


@pytest.fixture(scope="module")
def teacher(taught):
    return load_whisper(str(taught), device="cpu")


def heard(teacher, utterances, **options) -> list[str]:
    """The teacher's transcripts of utterances, each alone."""
    decoder = Decoder(teacher, **options)
    waveforms = [stack([utterance.samples], teacher.window) for utterance in utterances]
    return [teacher.grammar.decode(decoder(waveform, "en", "transcribe")[0].ids) for waveform in waveforms]


def test_every_row_with_its_columns_and_its_label(labelled, teacher, utterances):
    rows = rows_of(labelled)
    assert [(row["id"], row["text"], row["speaker"]) for row in rows] == [
        (u.id, u.text, u.speaker) for u in utterances
    ]
    assert [row["audio"]["bytes"] for row in rows] == [u.encoded() for u in utterances]
    assert [row["whisper_transcript"] for row in rows] == heard(teacher, utterances, return_timestamps=True)
    assert set(WRITTEN) <= set(rows[0])


@pytest.mark.parametrize("flags", [[], ["--generation_num_beams", 3], ["--return_timestamps"]])
def test_greedy_beams_and_timestamps(flags, teacher, taught, speech_folder, utterances, tmp_path):
    folder = label(taught, speech_folder, tmp_path, *ENGLISH, *flags, "--dataset_split_name", "test")
    options = {"num_beams": 3} if "--generation_num_beams" in flags else {"return_timestamps": bool(flags)}
    found = [row["whisper_transcript"] for row in rows_of(folder, "test")]
    assert found == heard(teacher, utterances[:8], **options)
    assert all(("<|0.00|>" in text) == (flags == ["--return_timestamps"]) for text in found)
    if options == {"num_beams": 3}:
        assert found != heard(teacher, utterances[:8])


def test_splits_are_read_apart_and_figures_are_those_of_jiwer(taught, teacher, speech_folder, tmp_path, capsys):
    """By the name of the config or without it; the card, the terminal and metrics.jsonl say the same."""
    folder = label(taught, speech_folder, tmp_path / "out", *ENGLISH, "--dataset_split_name", "train+test")
    assert {name: len(split) for name, split in load_dataset(str(folder), "default").items()} == {
        "train": 24,
        "test": 8,
    }
    rules = normaliser(None, "en", teacher.tokenizer)
    said, card = capsys.readouterr().out, (folder / "README.md").read_text()
    for split, count in (("train", 24), ("test", 8)):
        rows = rows_of(folder, split, "default")
        pair = [rules(row["text"]) for row in rows], [rules(row["whisper_transcript"]) for row in rows]
        wer, cer = round(100 * jiwer.wer(*pair), 2), round(100 * jiwer.cer(*pair), 2)
        hours = round(sum(row["duration"] for row in rows) / 3600, 3)
        assert f"split default/{split}, rows {count}, hours {hours}, mean_fill" in said
        cut = sum(row["truncated"] for row in rows)
        share = round(100 * cut / count, 1)
        told = f"truncated {cut}, truncated_percent {share}, languages en, tasks transcribe"
        assert f"read {count}, skipped 0, {told}, wer {wer}, cer {cer}" in said
        assert (
            f"| default/{split} | {count} | {hours} | " in card
            and f" | {count} | 0 | {cut} | {share} | en | transcribe | {wer} | {cer} |" in card
        )
        (line,) = metrics(folder, f"default/{split}/wer")
        assert (line[f"default/{split}/wer"], line[f"default/{split}/cer"]) == (wer, cer)
    total = sum(row["errors"] for row in rows) / sum(row["reference_words"] for row in rows)
    assert round(100 * total, 2) == wer


def test_streamed_or_not_and_however_many_threads_decode(taught, labelled, speech_folder, tmp_path):
    flags = ["--dataset_split_name", "train+test", "--return_timestamps", "--decode_token_ids", False]
    batches = ["--streaming", "--dataloader_num_workers", 3, "--per_device_eval_batch_size", 16]
    folder = label(taught, speech_folder, tmp_path / "labelled", *ENGLISH, *SPEAKERS, *flags, *batches)
    for path in (labelled / "default").glob("*.parquet"):
        assert pq.read_table(path).equals(pq.read_table(folder / "default" / path.name))
    assert len(list((folder / "default").iterdir())) == 3


def test_a_manifest_of_local_files(taught, utterances, tmp_path):
    """Its audio is kept as the bytes of the files, without the path of this machine."""
    manifest = write_manifest(tmp_path / "data/dev.json", utterances[:5])
    flags = ["--text_column_name", "sentence", "--dataset_split_name", "test", "--dataset_config_name", "zh"]
    rows = rows_of(label(taught, manifest, tmp_path / "out", *ENGLISH, *flags), "test")
    assert [row["sentence"] for row in rows] == [u.text for u in utterances[:5]]
    assert rows[3]["audio"] == {"bytes": (tmp_path / "data/utterance-3.wav").read_bytes(), "path": "utterance-3.wav"}
    assert all(isinstance(row["wer"], float) for row in rows)


def test_the_script_tells_progress_by_rows_and_hours(taught, speech_folder, tmp_path, capsys):
    flags = ["--logging_steps", 2, "--per_device_eval_batch_size", 3, "--dataloader_num_workers", 0]
    folder = label(taught, speech_folder, tmp_path, *ENGLISH, *flags)
    lines, (whole,) = metrics(folder, "rows"), metrics(folder, "default/train/hours")
    assert [line["rows"] for line in lines] == [6, 12, 18, 24]
    assert lines[-1]["audio_hours"] == pytest.approx(whole["default/train/hours"], abs=1e-3)
    said = capsys.readouterr().out  # no terminal, no bar
    assert "default/train-00001-of-00002.parquet: 6 windows labelled; in all 18 of 24 rows, " in said


def test_progress_counts_what_is_labelled_though_reading_is_ahead(taught, speech_folder, tmp_path):
    flags = ["--logging_steps", 1, "--per_device_eval_batch_size", 1, "--dataloader_num_workers", 3]
    folder = label(taught, speech_folder, tmp_path, *ENGLISH, *SPEAKERS, "--concatenate_audio", *flags)
    parts = [len(row["utterance_ids"]) for row in rows_of(folder)]
    assert [line["rows"] for line in metrics(folder, "rows")] == np.cumsum(parts).tolist()


@pytest.mark.parametrize(("flags", "graphs"), [([], True), (["--cuda_graphs", False], False)])
def test_steps_are_graphs_unless_told_otherwise(taught, speech_folder, tmp_path, monkeypatch, flags, graphs):
    made, begin = [], Decoder.__init__
    monkeypatch.setattr(
        Decoder, "__init__", lambda *given, **options: made.append(options) or begin(*given, **options)
    )
    label(taught, speech_folder, tmp_path, *ENGLISH, *flags)
    assert [options["cuda_graphs"] for options in made] == [graphs]


def test_packed_windows_keep_the_audio_and_the_parts(taught, speech_folder, utterances, tmp_path):
    folder = label(taught, speech_folder, tmp_path, *ENGLISH, *SPEAKERS, "--concatenate_audio", "--return_timestamps")
    rows = rows_of(folder)
    ids = [part for row in rows for part in row["utterance_ids"]]
    assert sorted(ids) == sorted(u.id for u in utterances) and len(rows) < 24
    by_id = {u.id: u for u in utterances}
    for row in rows:
        parts = [by_id[part] for part in row["utterance_ids"]]
        assert {part.speaker for part in parts} == {row["speaker"]} == {row["recording_id"]}
        samples = decode(row["audio"], 16_000)
        assert len(samples) == sum(len(part.samples) for part in parts) <= WINDOW_S * 16_000
        assert row["text"] == " ".join(part.text for part in parts)


def test_long_audio_is_skipped_and_listed_or_split(taught, utterances, tmp_path, capsys):
    long = replace(utterances[0], samples=utterances[0].samples.repeat(4), id="long")
    data = write_audio_dataset(tmp_path / "speech", [utterances[1], long, utterances[2]], files=1)
    folder = label(taught, data, tmp_path / "skip", *ENGLISH, "--max_skipped", 40)
    (entry,) = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert entry["row_id"] == "speech/default/train/00000-00000001"
    assert f"the window is {WINDOW_S} s" in entry["reason"] and entry["file"] == "long.wav"
    assert [row["id"] for row in rows_of(folder)] == [utterances[1].id, utterances[2].id]
    assert "skipped 1" in capsys.readouterr().out

    rows = rows_of(label(taught, data, tmp_path / "split", *ENGLISH, "--long_audio", "split", *SPEAKERS))
    pieces = [row for row in rows if row["id"] == "long"]
    assert len(pieces) > 1 and not (tmp_path / "split/skipped.jsonl").exists()
    assert sum(row["duration"] for row in pieces) == pytest.approx(len(long.samples) / 16_000, abs=1e-3)
    assert [row["window_start"] for row in pieces] == sorted({row["window_start"] for row in pieces})


def test_finished_labels_are_used_again_but_not_with_other_arguments(taught, speech_folder, tmp_path, capsys):
    label(taught, speech_folder, tmp_path, *ENGLISH)
    label(taught, speech_folder, tmp_path, *ENGLISH, "--dataset_split_name", "train+test")
    assert "speech0/default/train: 2 of 2 shards are finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"made with other arguments \(return_timestamps was False and is True\)"):
        label(taught, speech_folder, tmp_path, *ENGLISH, "--return_timestamps")
    assert not any("<|" in row["whisper_transcript"] for row in rows_of(tmp_path))
    (tmp_path / "mine.txt").write_text("mine")
    label(taught, speech_folder, tmp_path, *ENGLISH, "--return_timestamps", "--overwrite_output_dir")
    assert all("<|0.00|>" in row["whisper_transcript"] for row in rows_of(tmp_path))
    assert (tmp_path / "mine.txt").exists() and not (tmp_path / "default/test-00000-of-00001.parquet").exists()


def test_a_dataset_at_a_url(taught, labelled, speech_folder, tmp_path):
    """Streamed, with the rows of a local one."""
    far = fsspec.filesystem("memory")
    far.put(f"{speech_folder}/data/", "/bucket/speech0/", recursive=True)
    flags = [*ENGLISH, *SPEAKERS, "--return_timestamps", "--decode_token_ids", False, "--streaming"]
    folder = label(taught, "memory://bucket/speech0", tmp_path, *flags, "--dataset_split_name", "train+test")
    far.rm("/", recursive=True)
    for split in ("train", "test"):
        assert rows_of(folder, split, "default") == rows_of(labelled, split)
    assert "memory://" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_other_data_are_refused(taught, utterances, tmp_path, streaming):
    """Another file more, another file, and another dataset of the same name."""
    data, flags = tmp_path / "one/speech", [*ENGLISH, "--streaming", streaming]
    write_audio_dataset(data, utterances[:6], files=2)
    folder = label(taught, data, tmp_path / "out", *flags)
    other = write_audio_dataset(tmp_path / "two/speech", utterances[6:12], files=2)
    with pytest.raises(UserError, match=r"holds labels of other data called speech/default/train than .*two/speech;"):
        label(taught, other, tmp_path / "out", *flags)
    kept = label(taught, data, tmp_path / "out", *flags)
    moved = shutil.move(data, tmp_path / "three/speech")
    label(taught, moved, tmp_path / "out", *flags)
    data = moved
    shutil.rmtree(data)
    write_audio_dataset(data, utterances[:9], files=3)
    with pytest.raises(UserError, match=r"made with other arguments \(shards was 2 and is 3\)"):
        label(taught, data, tmp_path / "out", *flags)
    assert len(rows_of(kept)) == 6
    assert len(rows_of(label(taught, data, folder, *flags, "--overwrite_output_dir"))) == 9


def test_what_other_speakers_say_in_files_of_the_same_names_is_other_data(taught, utterances, tmp_path):
    """Such as the clean and the noisy recordings of a corpus."""
    clean = write_manifest(tmp_path / "clean/train.json", utterances[:2])
    swapped = [replace(u, samples=v.samples) for u, v in zip(utterances[:2], utterances[1::-1], strict=True)]
    noisy = write_manifest(tmp_path / "noisy/train.json", swapped)
    label(taught, clean, tmp_path / "out", *ENGLISH)
    with pytest.raises(UserError, match=r"holds labels of other data called train.json/default/train than .*/noisy/"):
        label(taught, noisy, tmp_path / "out", *ENGLISH)
    (clean.parent / f"{utterances[0].id}.wav").write_bytes(b"")  # a file that changes where it is, is the same one
    label(taught, clean, tmp_path / "out", *ENGLISH)


def test_other_files_in_a_manifest_of_audio_alone_are_other_data(taught, utterances, tmp_path):
    manifest = write_manifest(tmp_path / "data/train.json", utterances[:4])
    names = [row["audio"] for row in json.loads(manifest.read_text())]
    manifest.write_text(json.dumps([{"audio": name} for name in names[:2]]))
    label(taught, manifest, tmp_path / "out", *ENGLISH)
    record = next((tmp_path / "out/.distil_whisper").rglob("train-00000-of-00001.json"))
    kept = json.loads(record.read_text())
    record.write_text(json.dumps({**kept, "contents": kept["contents"].partition(" of files")[0]}))  # as it was before
    label(taught, manifest, tmp_path / "out", *ENGLISH)
    record.write_text(json.dumps(kept))
    for others in (names[1::-1], names[2:]):
        manifest.write_text(json.dumps([{"audio": name} for name in others]))
        with pytest.raises(UserError, match=r"holds labels of other data: .* was made of rows \w+ of files"):
            label(taught, manifest, tmp_path / "out", *ENGLISH)


def test_labels_of_other_rows_or_of_another_teacher_are_refused(taught, utterances, tmp_path):
    teacher = shutil.copytree(taught, tmp_path / "teacher")
    manifest = write_manifest(tmp_path / "data/train.json", utterances[:3])
    label(teacher, manifest, tmp_path / "out", *ENGLISH)
    manifest = write_manifest(tmp_path / "data/train.json", utterances[:4])
    with pytest.raises(
        UserError, match=r"holds labels of other data: default/train-00000-of-00001.parquet was made of rows"
    ):
        label(teacher, manifest, tmp_path / "out", *ENGLISH)
    manifest = write_manifest(tmp_path / "data/train.json", utterances[:3])
    weights = load_file(teacher / "model.safetensors")
    weights["model.decoder.layer_norm.bias"] += 1e-3
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"other arguments \(weights of the teacher was \w+ and is \w+\)"):
        label(teacher, manifest, tmp_path / "out", *ENGLISH)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_read_stops_no_other(taught, utterances, tmp_path, capsys, workers):
    """Mended, it alone is labelled."""
    data = write_audio_dataset(tmp_path / "speech", utterances[:12], files=4)
    flags = [*ENGLISH, "--streaming", "--dataloader_num_workers", workers, "--per_device_eval_batch_size", 1]
    expected = rows_of(label(taught, data, tmp_path / "whole", *flags))
    file = data / "data/train-00001-of-00004.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(
        UserError, match=r"1 of 4 shards could not be read, .*-00001-of-00004.parquet\); the others are"
    ):
        label(taught, data, tmp_path / "out", *flags)
    said = capsys.readouterr().out
    assert "default/train-00001-of-00004.parquet is left out: train-00001-of-00004.parquet of speech/default" in said
    assert rows_of(tmp_path / "out") == [row for row in expected if row["id"] not in {u.id for u in utterances[3:6]}]
    file.write_bytes(whole)
    assert rows_of(label(taught, data, tmp_path / "out", *flags)) == expected
    assert "speech/default/train: 3 of 4 shards are finished" in capsys.readouterr().out
    assert not (tmp_path / "out/.distil_whisper/parts").exists()


def test_a_language_decides_the_normaliser_of_the_figures(taught, speech_folder, tmp_path):
    hindi = rows_of(label(taught, speech_folder, tmp_path / "hi", "--language", "Hindi"))
    assert {(row["language"], row["task"], row["normalizer"]) for row in hindi} == {
        ("hi", "transcribe", "multilingual")
    }
    basic = label(taught, speech_folder, tmp_path / "en", *ENGLISH, "--normalizer", "basic")
    assert {row["normalizer"] for row in rows_of(basic)} == {"basic"}
    assert plain_text(rows_of(basic)[0]["whisper_transcript"]) == rows_of(basic)[0]["whisper_transcript"].strip()


def test_a_labelling_that_another_default_began_goes_on(taught, speech_folder, tmp_path, capsys, monkeypatch):
    """Each row names the normaliser of its figures; those of the split are counted by one."""
    flags = ["--language", "Hindi", "--report_to", "none"]
    with monkeypatch.context() as before:
        before.setattr(normalisation, "DEFAULT", "basic_keep_marks")
        folder = label(taught, speech_folder, tmp_path / "hi", *flags)
    whole = rows_of(folder)
    for file in (f"{RECORDS}/shards/default/train-00001-of-00002.json", "default/train-00001-of-00002.parquet"):
        (folder / file).unlink()
    rows = rows_of(label(taught, speech_folder, folder, *flags))
    assert [row["normalizer"] for row in rows] == ["basic_keep_marks"] * 12 + ["multilingual"] * 12
    assert [row["whisper_transcript"] for row in rows] == [row["whisper_transcript"] for row in whole]
    assert capsys.readouterr().out.count(", normalizer multilingual\n") == 1


def test_the_plan_is_near_what_labelling_takes(taught, speech_folder, labelled, tmp_path, capsys):
    """Nothing is written by it. Hours are read off the headers; disk comes from a trial."""
    names = ["--dataset_split_name", "train+test", "--return_timestamps", "--decode_token_ids", False]
    for streaming in (False, True):
        label(
            taught, speech_folder, tmp_path / "out", *ENGLISH, *SPEAKERS, *names, "--dry_run", "--streaming", streaming
        )
        said = capsys.readouterr().out
        assert not (tmp_path / "out").exists()
        hours = sum(row["duration"] for row in rows_of(labelled)) / 3600
        assert f"/default/train: 24 rows, {hours:.2f} hours of audio, 2 shards" in said
        assert "/default/test: 8 rows" in said and "with 1 process," in said
        assert "in all: 32 rows, " in said and ", 3 shards" in said
        size = sum(path.stat().st_size for path in (labelled / "default").glob("train*")) / 1e6
        (found,) = re.findall(r"train: .*\n.* ([\d.]+) MB", said)
        assert float(found) == pytest.approx(size, rel=0.15)


def test_the_plan_looks_at_rows_all_over_a_file(taught, utterances, tmp_path, monkeypatch):
    """At five of twelve at most, that is at every third; here the short ones come first."""
    plans, estimate = [], plan.estimate
    monkeypatch.setattr(plan, "ROWS_LOOKED_AT", 5)
    monkeypatch.setattr(run_pseudo_labelling, "estimate", lambda *of: plans.append(estimate(*of)) or plans[-1])
    rows = sorted(utterances[:12], key=lambda utterance: len(utterance.samples))
    data = write_audio_dataset(tmp_path / "speech", rows, files=1)
    for streaming in (False, True):
        label(taught, data, tmp_path / "out", *ENGLISH, "--dry_run", "--streaming", streaming)
    for found, looked_at in zip(plans, (rows[::3], rows[:5]), strict=True):  # a stream would fetch what lies between
        mean = sum(len(utterance.samples) for utterance in looked_at) / len(looked_at)
        assert found.hours * 3600 == pytest.approx(12 * mean / 16_000, rel=1e-3)


def test_the_plan_of_a_stream_goes_by_the_sizes_of_files(taught, utterances, tmp_path, monkeypatch, capsys):
    """Two files of six are looked at, of which the first is the longest. Processes share whole files."""
    monkeypatch.setattr(plan, "TRIAL_UNITS", 2)
    left = list(utterances)
    for number, count in enumerate((10, 2, 4, 4, 2, 2)):
        write_audio_dataset(tmp_path / "one", [left.pop() for _ in range(count)], files=1)
        (tmp_path / "speech/data").mkdir(parents=True, exist_ok=True)
        made = tmp_path / "one/data/train-00000-of-00001.parquet"
        made.rename(tmp_path / f"speech/data/train-{number:05d}-of-00006.parquet")
    label(taught, tmp_path / "speech", tmp_path / "out", *ENGLISH, "--dry_run", "--streaming")
    (rows,) = re.findall(r"default/train: (\d+) rows, .* 6 shards", capsys.readouterr().out)
    assert int(rows) == pytest.approx(24, abs=3)  # as if all were like these two, 42
    seconds = plan.Plan("speech", 24, 6, 1.0, 600.0, 0).lines
    assert "about 100 seconds with 6 processes" in seconds(6, 0.0)[1] == seconds(9, 0.0)[1].replace("9", "6")
    assert "about 3.3 minutes with 4 processes" in seconds(4, 0.0)[1]


def test_columns_named_language_and_task_are_used(taught, utterances, tmp_path):
    told = [("en", "transcribe"), ("Hindi", None), (None, "translate")]
    rows = [
        {**row, "language": language, "task": task}
        for row, (language, task) in zip(json.loads(manifest_of(utterances, tmp_path).read_text()), told, strict=True)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    folder = label(taught, tmp_path / "data.json", tmp_path / "out", "--max_skipped", 50)
    assert [(row["language"], row["task"]) for row in rows_of(folder)] == [("en", "transcribe"), ("hi", "transcribe")]
    assert "no language in column language" in (folder / "skipped.jsonl").read_text()
    both = [*ENGLISH, "--language_column_name", "language"]
    with pytest.raises(UserError, match="--language and --language_column_name exclude each other"):
        label(taught, tmp_path / "data.json", tmp_path / "out", *both)


def manifest_of(utterances, folder):
    return write_manifest(folder / "data.json", utterances[:3])


def test_labels_never_lie_in_the_folder_that_is_read(taught, utterances, tmp_path):
    """Their README.md would hide the data, and their Parquet files would be taken for it."""
    data = write_audio_dataset(tmp_path / "default", utterances[:3], files=1)
    (tmp_path / "link").symlink_to(data)
    before = sorted(data.rglob("*"))
    for output in (data, data / "labelled", tmp_path / "link", tmp_path):  # the last has a folder default, too
        for dry_run in (False, True):
            with pytest.raises(UserError, match=rf"--output_dir {output} would put files into .* {data} "):
                label(taught, data, output, *ENGLISH, "--dry_run", dry_run)
    assert sorted(data.rglob("*")) == before
    manifest = write_manifest(tmp_path / "work/clips/train.json", utterances[:3])
    for _ in range(2):
        assert len(rows_of(label(taught, manifest, manifest.parent.parent, *ENGLISH))) == 3


def test_no_stage_writes_into_a_dataset_that_it_reads(student, utterances, tmp_path):
    data = write_audio_dataset(tmp_path / "data", utterances[:3], files=1)
    before = sorted(data.rglob("*"))
    for script, *flags in (
        ("run_distillation", "--train_dataset_name", data, "--do_train", "--max_steps", 1, "--kl_weight", 0),
        ("run_distillation", "--eval_dataset_name", data, "--eval_split_name", "train", "--do_eval"),
        ("run_short_form_eval", "--dataset_name", data),
        ("run_long_form_eval", "--dataset_name", data),
    ):
        names = ["--model_name_or_path", student, "--output_dir", data, "--report_to", "none"]
        with pytest.raises(UserError, match=rf"--output_dir {data} would put files into the dataset folder "):
            run(script, *names, *flags, *ENGLISH)
        assert sorted(data.rglob("*")) == before
