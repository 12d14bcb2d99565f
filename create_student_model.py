"""Make a smaller student of a Whisper teacher: stage 2.

python create_student_model.py --teacher_checkpoint openai/whisper-large-v2 --encoder_layers 32 --decoder_layers 2 \
    --save_dir ./distil-large-v2-init

The student is made of the teacher's maximally spaced layers (2 of 32: the first and the last), or of those named by
--decoder_layers_numbers, and of all its other weights. A single layer is the last one, as Distil-Whisper does, where
DistilBART takes the first. Layers are numbered from 0; negative numbers count from the end.
"""

import os
from dataclasses import asdict, dataclass, replace

from transformers import WhisperForConditionalGeneration

from distil_whisper import hub
from distil_whisper.arguments import HubFields, option, parse
from distil_whisper.errors import UserError, exit_on_user_error
from distil_whisper.models import load_whisper, save_whisper
from distil_whisper.outputs import OutputFolder, public_arguments
from distil_whisper.progress import quiet_libraries
from distil_whisper.student import LayerMap, make_student

STAGE = "create_student_model"


@dataclass
class Arguments(HubFields):
    """What the student is made of and where it goes."""

    teacher_checkpoint: str = option("", "The teacher: a name on the Hub or a folder.")
    save_dir: str = option("", "Folder for the student, its generation config, tokenizer and feature extractor.")
    encoder_layers: int | None = option(
        None, "Encoder layers of the student, maximally spaced. Default: all.", at_least=1
    )
    decoder_layers: int | None = option(
        None, "Decoder layers of the student, maximally spaced. Default: 2.", at_least=1
    )
    encoder_layers_numbers: list[int] | None = option(
        None, "The teacher's encoder layers to copy, in the student's order, from 0; -1 is the last.", nargs="+"
    )
    decoder_layers_numbers: list[int] | None = option(
        None, "The teacher's decoder layers to copy, in the student's order, from 0; -1 is the last.", nargs="+"
    )
    cache_dir: str | None = option(None, "Where models from the Hub are cached.")
    overwrite_output_dir: bool = option(
        False, "Replace a student that was made in this folder with other arguments (nothing else is removed)."
    )


def parse_args(argv: list[str] | None = None) -> Arguments:
    """Read the command line. Raises UserError for what it lacks."""
    args = parse(Arguments, argv, description=__doc__)
    for name in ("teacher_checkpoint", "save_dir"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing; {Arguments.__dataclass_fields__[name].metadata['help']}")
    return args


def report(
    teacher: WhisperForConditionalGeneration, student: WhisperForConditionalGeneration, layers: LayerMap
) -> str:
    """Which teacher layer went where, and the numbers of parameters."""
    lines = ["Layers are numbered from 0."]
    for stack, copied in (("encoder", layers.encoder), ("decoder", layers.decoder)):
        available = getattr(teacher.config, f"{stack}_layers")
        lines.append(f"{stack}: {len(copied)} of the teacher's {available} layers")
        lines += [f"  student {stack} layer {place} <- teacher layer {layer}" for place, layer in enumerate(copied)]
        if copied == [available - 1] and available > 1:
            lines.append("  (for a single layer the last is copied, as in Distil-Whisper; DistilBART takes the first)")
    whole, part = teacher.num_parameters(), student.num_parameters()
    lines.append(f"parameters: teacher {whole:,}, student {part:,} ({part / whole:.1%} of the teacher's)")
    return "\n".join(lines)


def compare_with_earlier(output: OutputFolder, made_of: dict) -> None:
    """Raise UserError if the folder holds a student that is made of something else."""
    earlier = output.arguments()
    differing = [name for name in made_of if earlier is not None and earlier.get(name) != made_of[name]]
    if differing:
        name = differing[0]
        raise UserError(
            f"--save_dir {output.path} holds a student made with other arguments ({name} {earlier.get(name)}, now "
            f"{made_of[name]}); give --overwrite_output_dir to replace it, or choose another --save_dir"
        )
    output.keep_arguments(made_of)


def card(args: Arguments, repo_id: str, report_text: str) -> str:
    """The card of a student that has learnt nothing yet."""
    return hub.model_card(
        name=repo_id,
        base=args.teacher_checkpoint,
        description="A Whisper student before its training: layers and all other weights are copies of its teacher's."
        f"\n\n```\n{report_text}\n```",
        arguments=public_arguments(args),
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if int(os.environ.get("RANK", "0")) != 0:
        return  # a launcher of several processes: one does it all
    quiet_libraries()
    teacher = load_whisper(
        args.teacher_checkpoint, cache_dir=args.cache_dir, device="cpu", argument="--teacher_checkpoint"
    )
    student, layers = make_student(
        teacher.model,
        args.encoder_layers,
        args.decoder_layers,
        args.encoder_layers_numbers,
        args.decoder_layers_numbers,
    )
    report_text = report(teacher.model, student, layers)
    print(report_text, flush=True)
    with OutputFolder(args.save_dir, STAGE, overwrite=args.overwrite_output_dir, flag="--save_dir") as output:
        compare_with_earlier(output, {"teacher_checkpoint": args.teacher_checkpoint, **asdict(layers)})
        repo_id = None
        if args.push_to_hub:
            repo_id = hub.resolve_repo(args.save_dir, args.hub_model_id, private=args.hub_private_repo)
        readme = card(args, repo_id, report_text) if repo_id else None
        save_whisper(output, replace(teacher, model=student), card=readme)
        print(f"saved in {output.path}", flush=True)
        if repo_id:
            names, message = output.record["files"], "Student before training"
            print(f"pushed to {hub.push_folder(output.path, repo_id, names, message=message)}")


if __name__ == "__main__":
    exit_on_user_error(main)
