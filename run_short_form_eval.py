"""Evaluate a model on recordings that fit its window: WER, CER and speed: stage 4a.

accelerate launch run_short_form_eval.py --model_name_or_path ./distil-large-v2-hi \
    --dataset_name "./common_voice_hi_pseudo_labelled+google/fleurs" --dataset_config_name "hi+hi_in" \
    --dataset_split_name "test+test" --text_column_name "sentence+transcription" --language hi \
    --per_device_eval_batch_size 64 --dtype bfloat16 --streaming --output_dir ./distil-large-v2-hi

Writes short_form_results.json and short_form_predictions.jsonl into the output folder, beside those of other models,
and prints a table. Killed and started again, it goes on after its last batch.
"""

from dataclasses import dataclass

from distil_whisper.arguments import DataFields, ModelFields, RunFields, parse
from distil_whisper.decoding import Decoder
from distil_whisper.engine import make_accelerator
from distil_whisper.errors import exit_on_user_error
from distil_whisper.evaluation import (
    EvaluationFields,
    Evaluator,
    check_arguments,
    load_model,
    open_logs,
    open_sets,
)
from distil_whisper.outputs import OutputFolder
from distil_whisper.progress import quiet_libraries
from distil_whisper.report import Report, evaluate
from distil_whisper.transcribers import ShortForm

STAGE = "run_short_form_eval"


@dataclass
class Arguments(EvaluationFields, ModelFields, DataFields, RunFields):
    """What is evaluated, on what, and how."""


def parse_args(argv: list[str] | None = None) -> Arguments:
    """Read the command line. Raises UserError for what it lacks or contradicts."""
    args = parse(Arguments, argv, description=__doc__)
    check_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()
    accelerator = make_accelerator(args)
    with OutputFolder(args.output_dir, STAGE, args.overwrite_output_dir, accelerator.is_main_process) as folder:
        report = Report("short_form", args, accelerator, folder)
        whisper = load_model(args, accelerator)
        decoder = Decoder(
            whisper,
            num_beams=args.generation_num_beams,
            max_label_length=args.generation_max_length,
            return_timestamps=args.return_timestamps,
        )
        splits = open_sets(args, whisper)
        evaluator = Evaluator(
            accelerator,
            whisper,
            ShortForm(decoder, whisper, args.per_device_eval_batch_size),
            args.dataloader_num_workers,
            longest=whisper.window.samples,
            limit=args.max_samples,
        )
        evaluate(evaluator, splits, open_logs(args, folder, accelerator, whisper, splits), report)


if __name__ == "__main__":
    exit_on_user_error(main)
