"""Stage 3 as a user runs it, on a toy teacher: the three methods, the data, what is evaluated and saved."""

from collections import Counter
from dataclasses import replace

import jiwer
import pytest
import torch
from conftest import write_audio_dataset
from stages import ENGLISH, SPEAKERS, label, metrics, rows_of, run, train, train_few, weights, write_manifest
from transformers import WhisperForConditionalGeneration

import run_distillation
from distil_whisper.checkpoints import Checkpoints
from distil_whisper.errors import UserError
from distil_whisper.normalisation import normaliser
from distil_whisper.tokens import plain_text
from distil_whisper.validation import Validation, Validator

SFT = (*ENGLISH, "--kl_weight", 0)
ALL_ROWS = ("--per_device_train_batch_size", 24, "--timestamp_probability", 0, "--condition_on_prev_probability", 0)
EVALUATE = ("--do_eval", "--eval_split_name", "test")


def test_fine_tuning_learns_without_a_teacher(taught):
    losses = [line["train/loss"] for line in metrics(taught, "train/loss")]
    assert losses[-1] < losses[0] / 4
    assert {line["train/kl"] for line in metrics(taught, "train/kl")} == {0}
    assert metrics(taught, "eval/wer")[-1]["eval/foreign0/default/train/cer"] < 90


def test_shrink_and_fine_tune_needs_no_teacher(student, labelled, tmp_path):
    folder = train_few(student, labelled, tmp_path / "out", *SFT, *ALL_ROWS)
    lines = metrics(folder, "train/loss")
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert all(line["train/loss"] == pytest.approx(0.8 * line["train/ce"]) for line in lines)
    before, after = weights(student), weights(folder)
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in moved(before))


def test_kl_distillation_leaves_a_frozen_encoder_as_it_is(student, taught, labelled, tmp_path, capsys):
    flags = ["--teacher_model_name_or_path", taught, "--freeze_encoder", "--learning_rate", 1e-4]
    strong = ["--kl_weight", 20, "--temperature", 3, *ALL_ROWS]
    folder = train_few(student, labelled, tmp_path / "out", *ENGLISH, *flags, *strong)
    lines = metrics(folder, "train/kl")
    assert lines[-1]["train/kl"] < lines[0]["train/kl"]
    for line in lines:
        assert line["train/loss"] == pytest.approx(0.8 * line["train/ce"] + 20 * 3**2 * line["train/kl"])
    before, after = weights(student), weights(folder)
    for name in moved(before):
        assert torch.equal(before[name], after[name]) == ("encoder." in name), name
    assert "runs once for both" in capsys.readouterr().out


def moved(tensors: dict) -> list[str]:
    """Names of weights that every step of training changes (a key's bias has no gradient, positions are fixed)."""
    return [name for name in tensors if name.endswith(("fc1.weight", "q_proj.weight", "layer_norm.bias"))]


def test_datasets_are_mixed_by_their_samples(student, labelled, foreign_labels, seen, tmp_path):
    names = [f"{labelled}+{labelled}+{foreign_labels}", "--train_split_name", "train+test+train"]
    samples = ["--train_dataset_samples", "10+1+1.5", "--text_column_name", "text+text+text"]
    train_few(student, *names[:1], tmp_path / "out", *names[1:], *samples, *SFT, "--max_steps", 24)
    counts = Counter(row_id.rsplit("/", 1)[0] for row_id, _ in seen.rows)
    source = rows_of(labelled)[0]["row_id"].split("/")[0]
    shares = [counts[f"{source}/default/train"], counts[f"{source}/default/test"]]
    shares.append(counts[f"{foreign_labels.name}/default/train"])
    assert sum(shares) == counts.total() == 96
    assert shares[0] > 0.65 * 96 and min(shares) > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_every_row_once_an_epoch(streaming, student, labelled, seen, tmp_path):
    flags = ["--train_split_name", "train", "--per_device_train_batch_size", 6, "--max_steps", 8]
    train_few(student, labelled, tmp_path / "out", *SFT, *flags, "--streaming", streaming)
    expected = sorted(row["row_id"] for row in rows_of(labelled))
    for epoch in (0, 1):
        assert sorted(row_id for row_id, number in seen.rows if number == epoch) == expected
    order = [[row_id for row_id, number in seen.rows if number == epoch] for epoch in (0, 1)]
    assert order[0] != expected and order[0] != order[1]


def test_workers_that_a_stream_has_no_work_for_are_not_started(student, labelled, tmp_path, capsys):
    """A batch of four is drawn from four lanes."""
    flags = ["--streaming", "--max_steps", 1, "--dataloader_num_workers", 6, "--kl_weight", 0]
    train_few(student, labelled, tmp_path, *ENGLISH, *flags)
    assert "of --dataloader_num_workers 6, a batch of this size keeps 4 busy" in capsys.readouterr().out


def test_streamed_rows_are_drawn_as_map_style_ones(student, labelled, seen, tmp_path):
    flags = ["--timestamp_probability", 0.5, "--condition_on_prev_probability", 0.5, "--max_steps", 6]
    train_few(student, labelled, tmp_path / "map", *SFT, *flags)
    drawn = dict(seen.sequences)
    seen.sequences.clear()
    train_few(student, labelled, tmp_path / "streamed", *SFT, *flags, "--streaming")
    assert len(drawn) == 24 and drawn == seen.sequences


def test_epochs_decide_the_steps_where_no_max_steps_is_given(student, labelled, tmp_path):
    flags = ["--max_steps", -1, "--num_train_epochs", 1.5, "--gradient_accumulation_steps", 2]
    folder = train_few(student, labelled, tmp_path / "out", *SFT, *flags)
    assert metrics(folder, "train/loss")[-1]["step"] == 5  # 1.5 * 6 batches in pairs
    assert metrics(folder, "train/loss")[-1]["train/epoch"] == pytest.approx(10 / 6)


@pytest.mark.parametrize(
    ("flag", "said"), [(None, "pseudo-labels"), (True, "pseudo-labels"), (False, "transcripts in text")]
)
def test_pseudo_labels_are_used_where_there_are(flag, said, student, labelled, seen, tmp_path, capsys):
    flags = [] if flag is None else ["--use_pseudo_labels", flag]
    train_few(student, labelled, tmp_path / "out", *SFT, *flags, "--timestamp_probability", 1, "--max_steps", 6)
    assert f"labelled/default/train: training on the {said}" in capsys.readouterr().out
    grammar = run_distillation.load_whisper(str(student)).grammar
    for row in rows_of(labelled):
        ids = row["whisper_token_ids"] if flag is not False else grammar.encode_transcript(row["text"], "en")
        assert seen.sequences[row["row_id"], 0].labels[-len(ids) - 1 :] == [*ids, grammar.end]


def test_a_dataset_without_labels_trains_on_its_transcripts(student, speech_folder, tmp_path, capsys):
    train_few(student, speech_folder, tmp_path / "out", *SFT, "--max_steps", 1)
    assert "training on the transcripts in text" in capsys.readouterr().out


@pytest.mark.parametrize("decode_token_ids", [True, False])
def test_trains_on_labels_with_and_without_token_ids(decode_token_ids, student, taught, speech_folder, seen, tmp_path):
    """Text is encoded again; ids are the targets as they are, even where no text encodes to them."""
    data = label(taught, speech_folder, tmp_path / "data", *ENGLISH, "--decode_token_ids", decode_token_ids)
    train_few(student, data, tmp_path / "out", *SFT, "--max_steps", 6)
    grammar = run_distillation.load_whisper(str(student)).grammar
    for row in rows_of(data):
        assert (row["whisper_token_ids"] is None) == decode_token_ids
        encoded = grammar.encode_text(row["whisper_transcript"])
        expected = encoded if decode_token_ids else row["whisper_token_ids"]
        assert seen.sequences[row["row_id"], 0].labels[-len(expected) - 1 :] == [*expected, grammar.end]


def test_rows_above_the_wer_threshold_are_left_out(student, taught, labelled, utterances, seen, tmp_path, capsys):
    heard = [plain_text(row["whisper_transcript"]) for row in rows_of(labelled)]
    texts = [text if index % 3 else f"not {text}" for index, text in enumerate(heard)]
    data = label_again(taught, utterances, texts, tmp_path, "--return_timestamps")
    train_few(student, data, tmp_path / "out", *SFT, "--wer_threshold", 10, "--max_steps", 6)
    assert {row_id for row_id, _ in seen.rows} == {row["row_id"] for i, row in enumerate(rows_of(data)) if i % 3}
    told = capsys.readouterr().out
    assert "16 of 24 rows kept" in told and "8  WER above --wer_threshold" in told


def test_a_packed_window_is_left_out_for_its_worst_utterance(student, taught, utterances, seen, tmp_path):
    """Every other window gets the transcripts that its teacher heard, the rest of them with one wrong utterance."""
    words = ["--normalizer", "basic"]  # the English one joins digits of neighbouring utterances
    pack = ["--concatenate_audio", "--return_timestamps", *SPEAKERS, *words]
    texts = {}
    for index, window in enumerate(rows_of(label_again(taught, utterances, None, tmp_path / "first", *pack))):
        heard = iter(plain_text(window["whisper_transcript"]).split())
        parts = [next(heard, "") for _ in window["utterance_ids"]]
        parts[-1] = " ".join([parts[-1], *heard])
        texts |= zip(window["utterance_ids"], parts if index % 2 else ["not", *parts[1:]], strict=True)
    data = label_again(taught, utterances, [texts[u.id] for u in utterances], tmp_path / "second", *pack)
    rows = rows_of(data)
    good, bad = rows[1::2], rows[::2]
    assert all(row["wer"] == max(row["utterance_wer"]) for row in rows)
    assert {row["wer"] for row in good} == {0} and any(row["errors"] < row["reference_words"] for row in bad)
    train_few(student, data, tmp_path / "out", *SFT, *words, "--wer_threshold", 60, "--max_steps", 6)
    assert {row_id for row_id, _ in seen.rows} == {row["row_id"] for row in good}


def label_again(taught, utterances, texts, folder, *flags):
    """Label the utterances, with other transcripts if they are given, as `labelled` was."""
    named = [replace(u, text=text) for u, text in zip(utterances, texts or [u.text for u in utterances], strict=True)]
    data = write_audio_dataset(folder / "speech", named)
    return label(taught, data, folder / "data", *ENGLISH, *flags)


def test_validation_measures_every_row_and_filters_none(student, labelled, speech_folder, tmp_path):
    """Alone, without training; a row too long for --max_label_length or below no threshold still counts."""
    flags = ["--eval_dataset_name", f"{labelled}+{speech_folder}", *SFT, *EVALUATE, "--max_label_length", 1]
    names = ["--model_name_or_path", student, "--output_dir", tmp_path / "out", "--report_to", "none"]
    run("run_distillation", *names, *flags, "--wer_threshold", 0, "--predict_with_generate")
    (line,) = metrics(tmp_path / "out", "eval/wer")
    rows = [row for row in rows_of(labelled, "test")]
    student_says = label(student, speech_folder, tmp_path / "said", *ENGLISH, "--dataset_split_name", "test")
    said = [plain_text(row["whisper_transcript"]) for row in rows_of(student_says, "test")]
    rules = normaliser(None, "en", run_distillation.load_whisper(str(student)).tokenizer)
    expected = jiwer.wer([rules(row["text"]) for row in rows], [rules(text) for text in said]) * 100
    for name in ("labelled", speech_folder.name):
        assert line[f"eval/{name}/default/test/wer"] == pytest.approx(expected)
    assert line["eval/wer"] == pytest.approx(expected) and not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_without_generation_has_a_loss_alone(streaming, student, taught, labelled, tmp_path):
    names = ["--teacher_model_name_or_path", taught, "--eval_steps", 2, "--streaming", streaming]
    folder = train_few(student, labelled, tmp_path / "out", *ENGLISH, *EVALUATE, *names)
    lines = metrics(folder, "eval/loss")
    assert [line["step"] for line in lines] == [2, 4] and not metrics(folder, "eval/wer")
    for line in lines:
        ce, kl = (line[f"eval/labelled/default/test/{name}"] for name in ("ce", "kl"))
        assert line["eval/loss"] == pytest.approx(0.8 * ce + 4 * kl) and kl > 0


def test_validation_is_the_same_streamed_or_not(student, labelled, tmp_path):
    flags = ["--eval_dataset_name", labelled, *SFT, *EVALUATE, "--predict_with_generate", "--report_to", "none"]
    for streaming in (False, True):
        folder = tmp_path / str(streaming)
        names = ["--model_name_or_path", student, "--output_dir", folder, "--streaming", streaming]
        run("run_distillation", *names, *flags)
    assert metrics(tmp_path / "False") == metrics(tmp_path / "True")


@pytest.fixture
def figures(monkeypatch):
    """WERs that validations find, in turn."""
    found = []

    def validator(self, model, weights):
        wer = found.pop(0)
        test = {f"eval/labelled/default/test/{name}": value for name, value in (("wer", wer), ("cer", 1), ("loss", 1))}
        return Validation({"eval/wer": wer, "eval/loss": wer, **test})

    monkeypatch.setattr(Validator, "__call__", validator)
    return found


def test_the_best_checkpoints_are_kept_and_saved(figures, student, labelled, tmp_path):
    figures += [50.0, 20.0, 30.0, 40.0, 60.0, 70.0]
    flags = [*EVALUATE, "--eval_steps", 1, "--save_steps", 2, "--save_total_limit", 1, "--load_best_model_at_end"]
    folder = train_few(student, labelled, tmp_path / "out", *SFT, *flags, "--max_steps", 6)
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-6"]
    best, last = (weights(folder / name) for name in checkpoints(folder))
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(folder).items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in weights(folder).items())
    card = (folder / "README.md").read_text()
    assert "20.0" in card and "70.0" not in card and "Optimizer steps: 2" in card


def test_an_evaluation_of_fewer_rows_is_no_best_and_drops_none(student, labelled, utterances, tmp_path, capsys):
    """Such as while a file server is away: a set of which nothing can be read has no figure, least of all 0."""
    path = write_manifest(tmp_path / "held_out" / "rows.json", utterances[:3])
    audio = sorted(path.parent.glob("*.wav"))
    flags = [*SFT, "--do_eval", "--eval_dataset_name", path, "--eval_split_name", "train", "--eval_steps", 1]
    flags += ["--eval_text_column_name", "sentence", "--save_total_limit", 1, "--load_best_model_at_end"]
    folder = train_few(student, labelled, tmp_path / "out", *flags, "--learning_rate", 1, "--max_steps", 2)
    first = checkpoints(folder)[0]
    audio[0].unlink()
    train_few(student, labelled, folder, *flags, "--learning_rate", 1, "--max_steps", 3)
    assert "more rows, so this one is not ranked" in capsys.readouterr().out and first in checkpoints(folder)
    for file in audio[1:]:
        file.unlink()
    with pytest.raises(UserError, match=r"no row of .* could be used in the last evaluation"):
        train_few(student, labelled, folder, *flags, "--learning_rate", 1, "--max_steps", 4)
    assert checkpoints(folder) == [first, "checkpoint-4"] and "eval/loss" not in metrics(folder, "step")[-1]
    assert all(torch.equal(tensor, weights(folder / first)[name]) for name, tensor in weights(folder).items())
    with pytest.raises(UserError, match=r"no row of .* could be used in the last evaluation"):
        train(student, labelled, folder, *flags, "--do_train", False)


def test_a_step_that_is_both_best_and_due_is_written_once(figures, student, labelled, monkeypatch, tmp_path):
    written, write = [], Checkpoints._write

    def watched(self, student, weights, moments, stored):
        written.append(stored.state.step)
        write(self, student, weights, moments, stored)

    monkeypatch.setattr(Checkpoints, "_write", watched)
    figures += [50.0, 40.0, 60.0, 30.0]
    train_few(student, labelled, tmp_path / "out", *SFT, *EVALUATE, "--eval_steps", 1, "--save_steps", 2)
    assert written == [1, 2, 4]


def test_figures_that_measure_something_else_are_not_ranked_together(figures, student, labelled, tmp_path):
    """The WER by one normaliser says nothing of that by another."""
    figures += [5.0, 6.0, 30.0, 20.0, 40.0]
    flags = [*SFT, "--do_eval", "--save_steps", 2, "--save_total_limit", 1, "--load_best_model_at_end"]
    flags += ["--eval_split_name", "test", "--eval_steps", 1]
    folder = train_few(student, labelled, tmp_path, *flags, "--max_steps", 2)
    assert checkpoints(folder) == ["checkpoint-1", "checkpoint-2"]
    flags += ["--normalizer", "basic", "--max_steps", 5]
    train_few(student, labelled, folder, *flags)
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-5"]
    assert all(torch.equal(t, weights(folder)[name]) for name, t in weights(folder / "checkpoint-4").items())


@pytest.mark.parametrize(
    ("flags", "needed"),
    [(["--do_eval", "--save_best_total_limit", "0"], "--save_best_total_limit 1"), ([], "--do_eval")],
)
def test_the_best_cannot_be_saved_where_none_is_kept(flags, needed):
    given = ["--model_name_or_path", "a", "--train_dataset_name", "b", "--output_dir", "c", "--do_train", *SFT]
    with pytest.raises(UserError, match=f"--load_best_model_at_end needs {needed}"):
        run_distillation.parse_args([str(flag) for flag in [*given, "--load_best_model_at_end", *flags]])


def test_without_load_best_the_last_model_is_saved(figures, student, labelled, tmp_path):
    figures += [20.0, 30.0]
    flags = [*EVALUATE, "--eval_steps", 2, "--save_best_total_limit", 0, "--save_total_limit", 2]
    folder = train_few(student, labelled, tmp_path / "out", *SFT, *flags)
    assert checkpoints(folder) == ["checkpoint-4"]
    assert all(torch.equal(t, weights(folder)[name]) for name, t in weights(folder / "checkpoint-4").items())


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_checkpoint_is_the_student_alone_and_loads(student, taught, labelled, tmp_path):
    flags = [*ENGLISH, "--teacher_model_name_or_path", taught, "--freeze_encoder"]
    folder = train_few(student, labelled, tmp_path / "out", *flags)
    checkpoint = folder / "checkpoint-4"
    shapes = {name: tensor.shape for name, tensor in weights(student).items()}
    assert {name: tensor.shape for name, tensor in weights(checkpoint).items()} == shapes
    trained = sum(shape.numel() for name, shape in shapes.items() if ".encoder." not in name)
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    known = ("tokenizer.json", "optimizer.safetensors", "model.safetensors")
    assert (checkpoint / "optimizer.safetensors").stat().st_size < 4 * 2 * trained + 50_000
    assert size - sum((checkpoint / name).stat().st_size for name in known) < 200_000
    model = WhisperForConditionalGeneration.from_pretrained(checkpoint)
    assert torch.equal(model.proj_out.weight, weights(folder)["model.decoder.embed_tokens.weight"])
