"""How an evaluation computes, what it times, and what it leaves in files, in the trackers and on the Hub."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stages
import torch
from accelerate import Accelerator
from conftest import launch
from hub_server import TOKEN, USER, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from stages import surroundings, write_manifest
from test_decoding import enliven

from distil_whisper import evaluation
from distil_whisper.alignment import word_errors
from distil_whisper.audio import decode
from distil_whisper.batch_log import BatchLog
from distil_whisper.decoding import Decoder
from distil_whisper.errors import UserError
from distil_whisper.evaluation import EvaluationSet, Evaluator
from distil_whisper.models import load_whisper
from distil_whisper.normalisation import normaliser
from distil_whisper.reading import open_source
from distil_whisper.recordings import TextColumns
from distil_whisper.scoring import figures
from distil_whisper.transcribers import ShortForm, Transcript

__all__ = ["surroundings"]  # a fixture that acts by itself
SHORT = ("--generation_max_length", 8, "--report_to", "none")


def evaluate(model, data, output, *flags) -> dict:
    """Short-form evaluation in this process; its results."""
    names = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", output]
    stages.run("run_short_form_eval", *names, *SHORT, *flags)
    return results(output)


def results(folder) -> dict:
    return json.loads((Path(folder) / "short_form_results.json").read_text())


def predictions(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "short_form_predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def lively(toy_teacher, tmp_path_factory):
    """A model that says something else of every recording, as a folder."""
    folder = tmp_path_factory.mktemp("lively") / "lively"
    whisper = enliven(load_whisper(str(toy_teacher), device="cpu"))
    for part in (whisper.model, whisper.tokenizer, whisper.feature_extractor):
        part.save_pretrained(folder)
    return folder


def test_flags_decide_how_it_computes(lively, speech_folder, tmp_path, monkeypatch):
    seen = Counter()
    search, loader = Decoder.__call__, evaluation.DataLoader

    def watched_decode(self, waveforms, language, task):
        config = self.model.config
        seen[len(waveforms), self.model.dtype, config._attn_implementation, self.num_beams, language, task] += 1
        return search(self, waveforms, language, task)

    def watched_loader(*arguments, num_workers, multiprocessing_context, **options):
        seen["workers", num_workers, multiprocessing_context] += 1
        return loader(*arguments, **options)

    monkeypatch.setattr(Decoder, "__call__", watched_decode)
    monkeypatch.setattr(evaluation, "DataLoader", watched_loader)
    flags = ["--dtype", "bfloat16", "--attn_type", "flash_attn", "--num_beams", 2, "--dataloader_num_workers", 3]
    flags += ["--language", "Hindi", "--task", "translate", "--max_samples", 7, "--per_device_eval_batch_size", 3]
    found = evaluate(lively, speech_folder, tmp_path, *flags, "--return_timestamps", "--generation_max_length", 5)
    told = (torch.bfloat16, "sdpa", 2, "hi", "translate")
    assert seen == {(3, *told): 2, (1, *told): 1, ("workers", 3, "spawn"): 1}
    (split,) = found["datasets"]
    assert (split["rows"], split["language"], split["task"], split["normalizer"]) == (7, "hi", "translate", "english")
    assert all(row["timestamped"].startswith("<|") for row in predictions(tmp_path))
    assert found["arguments"]["generation_max_length"] == 5 and found["device"] == "cpu"


def test_predictions_and_figures_belong_together(lively, speech_folder, utterances, tmp_path):
    """With workers, which a launched script starts."""
    names = ["--model_name_or_path", lively, "--dataset_name", speech_folder, "--output_dir", tmp_path]
    flags = ["--dataset_split_name", "train", "--language", "hi", "--dataloader_num_workers", 2, "--return_timestamps"]
    ran = launch("run_short_form_eval.py", *names, *SHORT, *flags)
    assert (ran.code, ran.stderr) == (0, "")
    (split,), rows = results(tmp_path)["datasets"], predictions(tmp_path)
    assert [row["reference"] for row in rows] == [utterance.text for utterance in utterances]
    assert [row["seconds"] for row in rows] == [round(len(u.samples) / 16_000, 3) for u in utterances]
    whisper = load_whisper(str(lively), device="cpu")
    transcriber = ShortForm(Decoder(whisper, max_label_length=8, return_timestamps=True), whisper, 1)
    alone = [transcriber([decode(u.encoded(), 16_000)], "hi", "transcribe", [u.id])[0] for u in utterances]
    assert len({transcript.details["timestamped"] for transcript in alone}) > 5
    assert [row["timestamped"] for row in rows] == [transcript.details["timestamped"] for transcript in alone]
    assert [row["prediction"] for row in rows] == [transcript.text for transcript in alone]
    normalise = normaliser(None, "hi", None)
    for row in rows:
        errors = word_errors(normalise(row["reference"]), normalise(row["prediction"]))
        assert (row["errors"], row["reference_words"]) == (errors.errors, errors.reference_words)
    assert split["errors"] == sum(row["errors"] for row in rows)
    assert split["wer"] == pytest.approx(100 * split["errors"] / split["reference_words"], abs=1e-3)
    assert split["truncated"] == sum(row["truncated"] for row in rows) > 0
    assert split["audio_seconds"] == pytest.approx(sum(row["seconds"] for row in rows), abs=0.1)
    assert f"{split['wer']:.2f}" in ran.stdout and "speech0/default/train" in ran.stdout


@pytest.fixture
def timed(toy_teacher, speech_folder, monkeypatch):
    """Evaluate 8 rows by a clock on which reading takes no time and a batch ten seconds; with which batches it was
    called. `broken` ends the run at that batch."""
    clock, sizes = [0.0], []
    whisper = load_whisper(str(toy_teacher), device="cpu")
    source = open_source(str(speech_folder), split="test")
    normalise = normaliser(None, "en", whisper.tokenizer)
    split = EvaluationSet(source, TextColumns("audio", "text"), "en", "transcribe", normalise, one_language=False)
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: clock[0])

    def run(log: BatchLog, batch: int, broken: int | None = None, evaluator: Evaluator | None = None) -> Evaluator:
        class Transcriber:
            def is_full(self, waveforms):
                return len(waveforms) == batch

            def __call__(self, waveforms, language, task, names):
                if len(sizes) == broken:
                    raise KeyboardInterrupt
                sizes.append(len(waveforms))
                clock[0] += 10.0
                return [Transcript("one")] * len(waveforms)

        evaluator = evaluator or Evaluator(Accelerator(cpu=True), whisper, Transcriber(), num_workers=0)
        evaluator(split, log)
        return evaluator

    run.sizes = sizes
    run.figures = lambda log: figures(log.read(), normalise)
    return run


@pytest.mark.parametrize(
    "batch, counted", [(2, [(2, 10.0), (2, 10.0), (2, 10.0)]), (8, [(8, 10.0)])], ids=["warm-up", "one batch"]
)
def test_rtfx_times_the_model_without_the_first_batch(timed, tmp_path, batch, counted):
    logs = [BatchLog(tmp_path / name) for name in "ab"]
    evaluator = timed(logs[0], batch)
    timed(logs[1], batch, evaluator=evaluator)
    first, second = map(timed.figures, logs)
    seconds = [row["seconds"] for row in logs[0].read().rows.values()]
    audio = seconds[len(seconds) - sum(count for count, _ in counted) :]
    assert first["timed_compute_seconds"] == sum(took for _, took in counted)
    assert first["timed_audio_seconds"] == pytest.approx(sum(audio), abs=0.01)
    assert first["rtfx"] == pytest.approx(sum(audio) / first["timed_compute_seconds"], abs=0.01)
    assert second["timed_compute_seconds"] == 10.0 * (8 // batch)  # by then it is warm


def test_a_killed_evaluation_goes_on_after_its_last_batch_and_its_speed_is_that_of_all(timed, tmp_path):
    whole = BatchLog(tmp_path / "whole")
    timed(whole, 2)
    timed.sizes.clear()
    with pytest.raises(KeyboardInterrupt):
        timed(BatchLog(tmp_path / "killed"), 2, broken=2)
    written = tmp_path / "killed" / "0.jsonl"
    written.write_text(written.read_text() + '\n{"rows": [[[0, 5], {"row_id": "half wr', encoding="utf-8")
    killed = BatchLog(tmp_path / "killed")
    assert sorted(killed.before.rows) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    timed(killed, 2)
    assert timed.sizes == [2, 2, 2, 2] and killed.read().rows == whole.read().rows
    found, expected = timed.figures(killed), timed.figures(whole)
    assert (found["timed_compute_seconds"], expected["timed_compute_seconds"]) == (20.0, 30.0)  # it warmed up twice
    assert found["audio_seconds"] == expected["audio_seconds"] and found["errors"] == expected["errors"]


def test_the_language_is_that_of_the_rows_and_must_be_one(lively, utterances, tmp_path):
    """What was evaluated before a split that is refused stays."""
    one = write_manifest(tmp_path / "one.json", utterances[:3], language="Hindi")
    two = write_manifest(tmp_path / "two.json", utterances[:3], language="de")
    two.write_text(two.read_text().replace('"de"', '"fr"', 1))
    flags = ["--text_column_name", "sentence", "--dataset_split_name", "test"]
    found = evaluate(lively, one, tmp_path / "out", *flags)
    assert [split["language"] for split in found["datasets"]] == ["hi"]
    sentence = r"two.json/default/test holds several languages \(fr, but de in two.json/default/test/00000-00000001\)"
    with pytest.raises(UserError, match=sentence):
        evaluate(lively, f"{one}+{two}", tmp_path / "out", *flags)
    assert [split["dataset"] for split in results(tmp_path / "out")["datasets"]] == [str(one)]
    found = evaluate(lively, f"{one}+{two}", tmp_path / "out", *flags, "--language", "ta")
    assert [(split["language"], split["rows"]) for split in found["datasets"]] == [("ta", 3), ("ta", 3)]


def test_a_multilingual_model_needs_a_language(lively, speech_folder, tmp_path):
    with pytest.raises(UserError, match="--language is missing: the model is multilingual, and speech0/default/test"):
        evaluate(lively, speech_folder, tmp_path)


def test_folders_of_one_name_are_told_apart_and_other_stages_metrics_stay(lively, utterances, tmp_path):
    swapped = [replace(u, samples=v.samples) for u, v in zip(utterances[:2], utterances[1::-1], strict=True)]
    data = [write_manifest(tmp_path / f / "test.json", rows) for f, rows in (("a", utterances[:2]), ("b", swapped))]
    flags = ["--language", "hi", "--text_column_name", "sentence"]
    out = tmp_path / "out"
    evaluate(lively, data[0], out, *flags)
    with (out / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 7, "train/loss": 1.0}\n')
    found = evaluate(lively, f"{data[0]}+{data[1]}", out, *flags)
    assert [split["label"] for split in found["datasets"]] == ["test.json/default/test", "test.json/default/test (2)"]
    assert [row["dataset"][-3:] for row in predictions(out)] == ["est", "est", "(2)", "(2)"]
    assert len(found["datasets"]) == 2 and found["earlier"] == []  # the first of them alone
    seconds = [round(len(u.samples) / 16_000, 3) for u in (*utterances[:2], *swapped)]
    assert [row["seconds"] for row in predictions(out)] == seconds
    first, other, last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert other == {"step": 7, "train/loss": 1.0}
    assert last["short_form/wer"] == np.mean([split["wer"] for split in found["datasets"]])
    assert first.keys() < last.keys()
    evaluate(lively, f"{data[0]}+{data[1]}", out, *flags)
    assert [row["seconds"] for row in predictions(out)] == seconds
    with pytest.raises(UserError, match=r"--dataset_name lists test.json/default/test 2 times; leave the others out"):
        evaluate(lively, f"{data[0]}+{data[0]}", out, *flags)


def test_a_set_without_a_row_that_can_be_evaluated_fails_after_all_are_written(lively, utterances, tmp_path, capsys):
    """What could not be read is looked at again by the same command, what was too long is not."""
    one, other = utterances[:2]
    empty = write_manifest(tmp_path / "empty.json", [replace(one, id="empty")])
    (tmp_path / "empty.wav").write_bytes(b"")
    long = write_manifest(tmp_path / "long.json", [replace(one, id="long", samples=np.tile(one.samples, 12))])
    good = write_manifest(tmp_path / "good.json", [other])
    flags = ["--language", "hi", "--text_column_name", "sentence"]
    with pytest.raises(UserError, match=r"^no row of empty.json/default/test could be evaluated: .*1 skipped \(empty"):
        evaluate(lively, f"{empty}+{long}+{good}", tmp_path / "out", *flags)
    splits = results(tmp_path / "out")["datasets"]
    assert [(s["rows"], s["skipped"], s["too_long"], s["rtfx"] is None) for s in splits] == [
        (0, 1, 0, True),
        (0, 0, 1, True),
        (1, 0, 0, False),
    ]
    assert [row["reference"] for row in predictions(tmp_path / "out")] == [other.text]
    said = capsys.readouterr().out
    assert "1 rows read: 1 skipped (empty file), such as empty.json/default/test/00000-00000000" in said
    (tmp_path / "empty.wav").write_bytes(one.encoded())
    (tmp_path / "long.wav").unlink()  # and is not read again
    with pytest.raises(
        UserError, match=r"^no row of long.json/default/test could be evaluated: .*longer than the win"
    ):
        evaluate(lively, f"{empty}+{long}+{good}", tmp_path / "out", *flags)
    assert [(s["rows"], s["skipped"]) for s in results(tmp_path / "out")["datasets"]] == [(1, 0), (0, 0), (1, 0)]


def other_weights(folder, model):
    """A copy of a model whose weights were trained a little further."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.layer_norm.bias"] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_evaluations_in_one_folder_stand_side_by_side(lively, speech_folder, tmp_path, monkeypatch, capsys):
    """By model and by what decides the figures; what is finished is not transcribed again."""
    flags, out = ["--language", "hi", "--max_samples", 3], tmp_path / "out"
    first = evaluate(lively, speech_folder, out, *flags)
    model = other_weights(tmp_path / "model", lively)
    second = evaluate(model, speech_folder, out, *flags)
    assert second["model"] == str(model) and [run["model"] for run in second["earlier"]] == [str(lively)]
    assert second["earlier"][0]["datasets"] == first["datasets"]
    rows = predictions(out)
    assert [row["model"] for row in rows] == [str(model)] * 3 + [str(lively)] * 3
    keys = [split["evaluation"] for run in (second, *second["earlier"]) for split in run["datasets"]]
    assert [row["evaluation"] for row in rows] == [keys[0]] * 3 + [keys[1]] * 3 and keys[0] != keys[1]

    def never(*_, **__):
        raise AssertionError("this was transcribed before")

    capsys.readouterr()
    monkeypatch.setattr(Decoder, "__call__", never)
    again = evaluate(lively, speech_folder, out, *flags)
    assert again["datasets"] == first["datasets"] and [run["model"] for run in again["earlier"]] == [str(model)]
    assert sorted(map(json.dumps, predictions(out))) == sorted(map(json.dumps, rows))
    assert f"{first['datasets'][0]['wer']:.2f}" in capsys.readouterr().out
    figured = evaluate(lively, speech_folder, out, *flags, "--normalizer", "basic")  # of the same transcripts
    assert [run["datasets"][0]["normalizer"] for run in (figured, *figured["earlier"])] == [
        "basic",
        *[run["datasets"][0]["normalizer"] for run in (again, *again["earlier"])],
    ]
    for changed in (["--num_beams", 2], ["--per_device_eval_batch_size", 2], ["--overwrite_output_dir"]):
        with pytest.raises(AssertionError, match="this was transcribed before"):
            evaluate(lively, speech_folder, out, *flags, *changed)
    monkeypatch.undo()
    other_weights(tmp_path / "further", model)
    shutil.copy(tmp_path / "further/model.safetensors", model)
    evaluate(model, speech_folder, out, *flags)
    shutil.copy(lively / "model.safetensors", model)
    assert [run["model"] for run in evaluate(model, speech_folder, out, *flags)["earlier"]] == [str(model)]


def test_results_of_an_older_version_are_kept_and_those_of_nobody_are_refused(lively, speech_folder, tmp_path):
    flags, out = ["--language", "hi", "--max_samples", 2], tmp_path / "out"
    evaluate(lively, speech_folder, out, *flags)
    old = {**results(out), "model": "old", "earlier": []}
    old["datasets"] = [{name: value for name, value in old["datasets"][0].items() if name != "evaluation"}]
    (out / "short_form_results.json").write_text(json.dumps({k: v for k, v in old.items() if k != "earlier"}))
    lines = [{k: v for k, v in row.items() if k not in ("evaluation", "model")} for row in predictions(out)]
    (out / "short_form_predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = evaluate(lively, speech_folder, out, *flags)
    assert [run["model"] for run in (found, *found["earlier"])] == [str(lively), "old"]
    assert predictions(out)[2:] == lines
    (out / "short_form_results.json").write_text("null")
    with pytest.raises(UserError, match=r"short_form_results\.json holds no results of this script any more"):
        evaluate(lively, speech_folder, out, *flags)


def test_a_model_is_evaluated_into_its_own_folder(lively, speech_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(lively, tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.chdir(folder)
    for _ in range(2):
        found = evaluate("./", speech_folder, "./", "--language", "hi", "--max_samples", 2)
        assert (found["model"], found["earlier"]) == ("./", [])
    assert (folder / "model.safetensors").read_bytes() == before


def test_figures_go_into_the_card_of_the_model(lively, speech_folder, tmp_path):
    names = ["--model_name_or_path", f"{USER}/lively", "--dataset_name", speech_folder, "--language", "hi"]
    card = "---\nlicense: mit\n---\n\n# My student\n\nIts story.\n"
    with HubServer() as hub:
        hub.add(f"{USER}/lively", lively)
        env = hub.environment(tmp_path)
        pushed = [*names, *SHORT, "--push_to_hub"]
        ran = launch("run_short_form_eval.py", *pushed, "--output_dir", tmp_path / "out", env=env)
        assert ran.code == 0, ran.stderr
        assert f"figures in the card of {hub.url}/{USER}/lively" in ran.stdout
        made = ModelCard(hub.files(f"{USER}/lively")["README.md"].decode())
        (split,) = results(tmp_path / "out")["datasets"]
        figures = {(result.metric_type, result.metric_value) for result in made.data.eval_results}
        assert figures == {("wer", round(split["wer"], 2)), ("cer", round(split["cer"], 2))}
        place = made.data.eval_results[0]
        assert (place.dataset_name, place.dataset_config, place.dataset_split) == ("speech0", "default", "test")

        (tmp_path / "with_card").mkdir()
        (tmp_path / "with_card/README.md").write_text(card)
        hub.add(f"{USER}/other", tmp_path / "with_card")
        again = [*pushed, "--hub_model_id", f"{USER}/other", "--output_dir", tmp_path / "out", "--max_samples", 2]
        ran = launch("run_short_form_eval.py", *again, env=env)
        assert ran.code == 0, ran.stderr
        text = hub.files(f"{USER}/other")["README.md"].decode()
        kept = ModelCard(text)
        assert kept.data.license == "mit" and kept.text.strip() == "# My student\n\nIts story."
        assert len(kept.data.eval_results) == 2
        assert TOKEN not in text + ran.stdout + ran.stderr and str(tmp_path) not in text

        refused = launch("run_short_form_eval.py", *again[:-2], env={**env, "HF_TOKEN": ""})
        assert refused.code == 2 and "--push_to_hub needs a login" in refused.stderr
