"""What an evaluation leaves behind: results and predictions as files, figures for the trackers, a table, a card."""

import json
import sys
from collections import Counter
from pathlib import Path

from accelerate import Accelerator

from distil_whisper import hub
from distil_whisper.batch_log import BatchLog
from distil_whisper.engine import Turns
from distil_whisper.errors import UserError
from distil_whisper.evaluation import EvaluationSet, Evaluator, device_name
from distil_whisper.metrics import RATES
from distil_whisper.outputs import OutputFolder, atomic_path, public_arguments
from distil_whisper.scoring import figures, predictions
from distil_whisper.trackers import TABLE_ROWS, Trackers

RTFX_MEANS = (
    "seconds of audio per second that a process spends on log-mel, encoder and decoding; reading and decoding audio "
    "files is left out, and so is the first batch of each process, unless there are no others"
)


class Report:
    """The results of one evaluation: files in the output folder, trackers, a table. The main process writes.

    form: short_form or long_form, with which the files' names begin. Those of earlier evaluations in the same folder
    are kept beside, but for one of the same model in the same way. With --push_to_hub the figures are put into the
    model's card. Raises UserError for what would refuse that, before any work, and for files of others in the folder.
    """

    def __init__(self, form: str, args, accelerator: Accelerator, folder: OutputFolder):
        self.form = form
        self.args = args
        self.accelerator = accelerator
        self.folder = folder
        self.splits: list[dict] = []
        self.predictions: list[dict] = []
        self.repo = _repository(args) if args.push_to_hub and accelerator.is_main_process else None
        folder.claim(self.results_file, self.predictions_file)
        self.earlier = _earlier(folder / self.results_file) if accelerator.is_main_process else []
        # earlier evaluations in the same folder stay in its metrics
        self.trackers = Trackers(
            accelerator, folder, args.wandb_project, args.wandb_name, public_arguments(args), resume_step=sys.maxsize
        )

    @property
    def results_file(self) -> str:
        return f"{self.form}_results.json"

    @property
    def predictions_file(self) -> str:
        return f"{self.form}_predictions.jsonl"

    def add(self, split: EvaluationSet, log: BatchLog) -> None:
        """Take in a split that is transcribed, and write all files anew, so that a later failure loses nothing."""
        found = log.read()
        label = self._own_label(split.source.label)
        of_split = {"evaluation": log.key, **_names(split), "label": label, **figures(found, split.normaliser)}
        rows = predictions(found, split.normaliser)
        if not of_split["skipped"]:  # else the same command looks at those rows again
            log.finish()
        self.splits.append(of_split)
        known = {"evaluation": log.key, "model": self.args.model_name_or_path, "dataset": label}
        self.predictions += [{**known, **row} for row in rows]
        self._write_predictions()
        self._write_results()
        shown = [[row["row_id"], row["reference"], row["prediction"]] for row in rows[:TABLE_ROWS]]
        self.trackers.log_table(f"{self.form}/{label}", ["row", "reference", "prediction"], shown, step=0)

    def _write_results(self) -> None:
        ours = {
            "model": self.args.model_name_or_path,
            "datasets": self.splits,
            "rtfx_means": RTFX_MEANS,
            "device": device_name(self.accelerator),
            "processes": self.accelerator.num_processes,
            "arguments": public_arguments(self.args),
        }
        earlier = [run for run in self.earlier if not _is_part_of(run, ours)]
        self.folder.write_json(self.results_file, {**ours, "earlier": earlier})

    def _write_predictions(self) -> None:
        """The rows of this run, then those of earlier ones."""
        path, ours = self.folder / self.predictions_file, {split["evaluation"] for split in self.splits}
        with atomic_path(path) as beside, beside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.predictions)
            if path.exists():
                with path.open(encoding="utf-8") as lines:
                    file.writelines(line for line in lines if json.loads(line).get("evaluation") not in ours)

    def _own_label(self, label: str) -> str:
        """The label of a split, with a number where folders of one name would share it."""
        same = sum(split["label"].split(" (")[0] == label for split in self.splits)
        return f"{label} ({same + 1})" if same else label

    def finish(self) -> None:
        """Log the figures of all splits and their mean WER, and print the table."""
        values = {
            f"{self.form}/{split['label']}/{name}": split[name]
            for split in self.splits
            for name in (*RATES, "rtfx")
            if split[name] is not None
        }
        rates = [split["wer"] for split in self.splits if split["wer"] is not None]
        if rates:
            values[f"{self.form}/wer"] = sum(rates) / len(rates)
        self.trackers.log(values, step=0)
        print("\n".join([*_table(self.splits), *filter(None, map(_note, self.splits))]))
        print(f"results in {self.folder / self.results_file}, predictions in {self.folder / self.predictions_file}")
        if self.repo is not None:
            print(f"figures in the card of {hub.push_results(self.repo, map(_result, self.splits))}")


def evaluate(evaluator: Evaluator, splits: list[EvaluationSet], logs: list[BatchLog], report: Report) -> None:
    """Transcribe the splits and report them. No process waits for another before all of its work is done.

    Raises UserError, when all is reported, for a split of which no row could be transcribed.
    """
    turns = Turns(report.accelerator)
    for number, (split, log) in enumerate(zip(splits, logs, strict=True)):
        evaluator(split, log)
        turns.count(f"split {number}", 1)
        _report_transcribed(splits, logs, report, turns)
    turns.wait_at("transcribed")
    _report_transcribed(splits, logs, report, turns)
    if report.accelerator.is_main_process:
        report.finish()
    turns.wait_at("reported")
    report.trackers.finish()
    for split in report.splits:
        if not split["rows"]:
            raise UserError(f"no row of {split['label']} could be evaluated: {_note(split) or 'it has no rows'}")


def _report_transcribed(splits, logs, report: Report, turns: Turns) -> None:
    """On the main process, report the next splits with which all processes are done."""
    while report.accelerator.is_main_process and (number := len(report.splits)) < len(splits):
        if turns.count(f"split {number}", 0) < turns.processes:
            return
        report.add(splits[number], logs[number])


def _earlier(path: Path) -> list[dict]:
    """The evaluations that a file of results holds, the latest first."""
    if not path.exists():
        return []
    try:
        latest = json.loads(path.read_text(encoding="utf-8"))
        return [{name: value for name, value in latest.items() if name != "earlier"}, *latest.get("earlier", [])]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} holds no results of this script any more; move it away") from error


def _is_part_of(run: dict, other: dict) -> bool:
    """Whether another evaluation has all figures of this one: of the same models and data, transcribed in the same
    way, and normalised so."""
    known = [{(split.get("evaluation"), split.get("normalizer")) for split in of["datasets"]} for of in (run, other)]
    return known[0] <= known[1]


def _names(split: EvaluationSet) -> dict:
    source = split.source
    names = {"dataset": source.name, "config": source.config, "split": source.split}
    return {**names, "language": split.language, "task": split.task}


def _repository(args) -> str:
    """The model's repository: that of the flag, else the one that is evaluated, else one of its folder's name."""
    name = args.model_name_or_path
    name = args.hub_model_id or (name if hub.is_hub_id(name) else Path(name).resolve().name)
    return hub.resolve_repo(args.output_dir, name, private=args.hub_private_repo)


def _result(split: dict) -> hub.Result:
    rates = {name: split[name] for name in ("wer", "cer") if split[name] is not None}
    return hub.Result(split["dataset"], split["split"], rates, split["config"])


def _table(splits: list[dict]) -> list[str]:
    """An aligned table, a line for each split; rates in percent."""
    heads = {"label": "dataset", "rows": "rows", "wer": "WER", "cer": "CER"}
    heads |= {"wer_ortho": "WER ortho", "cer_ortho": "CER ortho", "normalizer": "normaliser", "rtfx": "RTFx"}
    lines = [list(heads.values()), *([_cell(split[name]) for name in heads] for split in splits)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _cell(value) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _note(split: dict) -> str:
    """What the figures of a split leave out, or hold that one might not expect; empty if there is nothing."""
    notes = []
    if split["too_long"]:
        notes.append(f"{split['too_long']} longer than the window, left to run_long_form_eval.py")
    for reason, count in Counter(row["reason"] for row in split["skipped_rows"]).items():
        row_id = next(row["row_id"] for row in split["skipped_rows"] if row["reason"] == reason)
        notes.append(f"{count} skipped ({reason}), such as {row_id}")
    if split["empty_references"]:
        notes.append(
            f"{split['empty_references']} without words in the reference, where all that was heard is inserted"
        )
    seen = split["rows"] + split["too_long"] + split["skipped"]
    return f"{split['label']}, {seen} rows read: {'; '.join(notes)}" if notes else ""
