"""Make a smaller student of a Whisper teacher: stage 2.

python create_student_model.py --teacher_checkpoint openai/whisper-large-v2 --encoder_layers 32 --decoder_layers 2 \
    --save_dir ./distil-large-v2-init

The student is made of the teacher's maximally spaced layers (2 of 32: the first and the last), or of those named by
--decoder_layers_numbers, and of all its other weights. A single layer is the last one, as Distil-Whisper does, where
DistilBART takes the first. Layers are numbered from 0; negative numbers count from the end.
"""

import os
from dataclasses import asdict, dataclass
from fnmatch import fnmatch

from transformers import WhisperForConditionalGeneration

from distil_whisper import hub
from distil_whisper.arguments import option, parse
from distil_whisper.errors import UserError, exit_on_user_error
from distil_whisper.models import LoadedWhisper, load_whisper
from distil_whisper.outputs import RECORDS, OutputFolder, public_arguments, remove
from distil_whisper.student import LayerMap, make_student

STAGE = "create_student_model"
WEIGHTS = "model*.safetensors*"  # one file, or several with an index


@dataclass
class Arguments:
    """What the student is made of and where it goes."""

    teacher_checkpoint: str = option("", "The teacher: a name on the Hub or a folder.")
    save_dir: str = option("", "Folder for the student, its generation config, tokenizer and feature extractor.")
    encoder_layers: int | None = option(None, "Encoder layers of the student, maximally spaced. Default: all.")
    decoder_layers: int | None = option(None, "Decoder layers of the student, maximally spaced. Default: 2.")
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
    push_to_hub: bool = option(False, "Push the student to the Hugging Face Hub.")
    hub_model_id: str | None = option(None, "Repository on the Hub. Default: the name of the save folder.")
    hub_private_repo: bool = option(False, "Make the repository on the Hub private.")


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


def save(output: OutputFolder, student: WhisperForConditionalGeneration, teacher: LoadedWhisper, readme: str | None):
    """Write the student's files beside their places, then move them there: config.json, which loading needs, last."""
    beside = output / RECORDS / f"{STAGE}.partial"
    remove(beside)
    try:
        student.save_pretrained(beside)
        teacher.tokenizer.save_pretrained(beside)
        teacher.feature_extractor.save_pretrained(beside)
        if readme is not None:
            (beside / "README.md").write_text(readme, encoding="utf-8")
        names = sorted((path.name for path in beside.iterdir()), key=lambda name: name == "config.json")
        output.claim(*names)
        remove(output / "config.json")
        for name in names:
            os.replace(beside / name, output / name)
        for name in [name for name in output.record["files"] if fnmatch(name, WEIGHTS) and name not in names]:
            output.remove(name)
    finally:
        remove(beside)


def card(args: Arguments, repo_id: str, report_text: str) -> str:
    """The card of a student that has learnt nothing yet."""
    return hub.model_card(
        name=repo_id,
        teacher=args.teacher_checkpoint,
        description="A Whisper student before its training: layers and other weights copied from the teacher.",
        arguments=public_arguments(args),
        facts={"Made of": f"\n\n```\n{report_text}\n```"},
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if int(os.environ.get("RANK", "0")) != 0:
        return  # a launcher of several processes: one does it all
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
    with OutputFolder(args.save_dir, STAGE, overwrite=args.overwrite_output_dir) as output:
        compare_with_earlier(output, {"teacher_checkpoint": args.teacher_checkpoint, **asdict(layers)})
        if not args.push_to_hub:
            save(output, student, teacher, readme=None)
        else:
            repo_id = hub.resolve_repo(args.save_dir, args.hub_model_id, private=args.hub_private_repo)
            save(output, student, teacher, card(args, repo_id, report_text))
            url = hub.push_folder(
                output.path,
                repo_id,
                output.record["files"],
                message="Student before training",
                delete_patterns=[WEIGHTS],
            )
            print(f"pushed to {url}")
        print(f"saved in {output.path}")


if __name__ == "__main__":
    exit_on_user_error(main)
