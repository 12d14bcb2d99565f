"""Evaluate a model on recordings of any length: WER, CER and speed: stage 4b.

accelerate launch run_long_form_eval.py --model_name_or_path openai/whisper-large-v2 \
    --dataset_name distil-whisper/tedlium-long-form --dataset_split_name validation \
    --text_column_name text --language en --chunk_length_s 30 --return_timestamps --dtype bfloat16 --streaming \
    --output_dir ./tedlium

With --chunk_length_s the recordings are cut into overlapping chunks, which are transcribed side by side and joined.
Without it they are transcribed sequentially, each window from the last timestamp of the one before.
Writes long_form_results.json and long_form_predictions.jsonl into the output folder, beside those of other models,
and prints a table. Killed and started again, it goes on after its last batch.
"""

from dataclasses import dataclass

from distil_whisper.arguments import DataFields, ModelFields, RunFields, option, parse
from distil_whisper.engine import make_accelerator
from distil_whisper.errors import UserError, exit_on_user_error
from distil_whisper.evaluation import (
    EvaluationFields,
    Evaluator,
    check_arguments,
    load_model,
    open_logs,
    open_sets,
)
from distil_whisper.models import LoadedWhisper
from distil_whisper.outputs import OutputFolder
from distil_whisper.progress import quiet_libraries
from distil_whisper.report import Report, evaluate
from distil_whisper.sequential import Fallback, Sequential
from distil_whisper.transcribers import Chunked

STAGE = "run_long_form_eval"


@dataclass
class Arguments(EvaluationFields, ModelFields, DataFields, RunFields):
    """What is evaluated, on what, and how."""

    chunk_length_s: float | None = option(
        None,
        "Transcribe in chunks of so many seconds; match the length that the model was trained on. "
        "Default: sequentially, without chunks.",
        at_least=1,
    )
    stride_length_s: float | None = option(
        None, "Overlap at either side of a chunk in seconds. Default: a sixth of --chunk_length_s.", at_least=0
    )
    condition_on_prev_tokens: bool = option(
        False, "Sequential: give each window the text of the one before as its prompt."
    )
    temperature_fallback: bool = option(
        False, "Sequential: decode a window again at higher temperatures where the text is repetitive or unlikely."
    )
    compression_ratio_threshold: float = option(
        Fallback.compression_ratio,
        "With --temperature_fallback: a window whose tokens are more repetitive is repeated.",
        above=0,
        only_with={"temperature_fallback": True},
    )
    logprob_threshold: float = option(
        Fallback.logprob,
        "With --temperature_fallback: a window with a lower mean log-probability is repeated.",
        at_most=0,
        only_with={"temperature_fallback": True},
    )
    no_speech_threshold: float = option(
        Fallback.no_speech,
        "With --temperature_fallback: such a window is silence above this no-speech probability.",
        at_least=0,
        at_most=1,
        only_with={"temperature_fallback": True},
    )
    seed: int = option(
        42,
        "Seed of what --temperature_fallback draws.",
        at_least=0,
        at_most=2**32 - 1,
        only_with={"temperature_fallback": True},
    )


def parse_args(argv: list[str] | None = None) -> Arguments:
    """Read the command line. Raises UserError for what it lacks or contradicts."""
    args = parse(Arguments, argv, description=__doc__)
    check_arguments(args)
    if args.chunk_length_s is None and args.stride_length_s is not None:
        raise UserError("--stride_length_s is the overlap of chunks; give --chunk_length_s with it")
    for name in ("condition_on_prev_tokens", "temperature_fallback"):
        if args.chunk_length_s is not None and getattr(args, name):
            raise UserError(f"--{name} belongs to the sequential algorithm; leave out --chunk_length_s")
    return args


def make_transcriber(args: Arguments, whisper: LoadedWhisper) -> Chunked | Sequential:
    """Chunked transcription with --chunk_length_s, sequential without."""
    common = (whisper, args.per_device_eval_batch_size)
    options = {
        "num_beams": args.generation_num_beams,
        "max_label_length": args.generation_max_length,
        "return_timestamps": args.return_timestamps,
    }
    if args.chunk_length_s is not None:
        return Chunked(*common, args.chunk_length_s, args.stride_length_s, **options)
    fallback = Fallback(args.compression_ratio_threshold, args.logprob_threshold, args.no_speech_threshold, args.seed)
    return Sequential(
        *common,
        condition_on_prev_tokens=args.condition_on_prev_tokens,
        fallback=fallback if args.temperature_fallback else None,
        **options,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()
    accelerator = make_accelerator(args)
    with OutputFolder(args.output_dir, STAGE, args.overwrite_output_dir, accelerator.is_main_process) as folder:
        report = Report("long_form", args, accelerator, folder)
        whisper = load_model(args, accelerator)
        transcriber = make_transcriber(args, whisper)
        splits = open_sets(args, whisper)
        evaluator = Evaluator(accelerator, whisper, transcriber, args.dataloader_num_workers, limit=args.max_samples)
        evaluate(evaluator, splits, open_logs(args, folder, accelerator, whisper, splits), report)


if __name__ == "__main__":
    exit_on_user_error(main)
