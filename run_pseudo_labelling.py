"""Transcribe audio with a Whisper teacher, for a student to learn from: stage 1.

accelerate launch run_pseudo_labelling.py --model_name_or_path openai/whisper-large-v2 \
    --dataset_name ./common_voice_hi --dataset_split_name train+validation+test --text_column_name sentence \
    --id_column_name path --language hi --return_timestamps --dtype bfloat16 \
    --output_dir ./common_voice_hi_pseudo_labelled

Finished shards can be read at once with load_dataset. Killed and started again, with any number of processes, it goes
on with the shards that are missing.
"""

import json
from dataclasses import dataclass
from datetime import timedelta

import pyarrow.parquet as pq
from accelerate import Accelerator, InitProcessGroupKwargs

from distil_whisper import hub
from distil_whisper.arguments import DataFields, ModelFields, RunFields, option, parse
from distil_whisper.decoding import Decoder
from distil_whisper.errors import UserError, exit_on_user_error
from distil_whisper.handoff import (
    MEANINGS,
    ShardFile,
    finish_shard,
    read_manifest,
    schema,
    shard_writer,
    write_readme,
)
from distil_whisper.labelling import Columns, LabellingSettings, Tally, UnitLabeller
from distil_whisper.metrics import character_errors, word_errors
from distil_whisper.models import LoadedWhisper, load_whisper
from distil_whisper.normalisation import Normaliser, normaliser
from distil_whisper.outputs import OutputFolder, public_arguments, write_text
from distil_whisper.progress import bar, quiet_libraries
from distil_whisper.reading import Source
from distil_whisper.sources import columns_of, open_sources
from distil_whisper.tokens import language_and_task, plain_text
from distil_whisper.trackers import Trackers, project_configuration, resolve_report_to

STAGE = "run_pseudo_labelling"
SKIPPED_FILE = "skipped.jsonl"
LABEL_ARGUMENTS = (  # those that decide what the labels are
    "model_name_or_path",
    "dtype",
    "language",
    "task",
    "return_timestamps",
    "generation_num_beams",
    "max_label_length",
    "decode_token_ids",
    "concatenate_audio",
    "long_audio",
    "audio_column_name",
    "text_column_name",
    "id_column_name",
    "speaker_id_column_name",
    "recording_id_column_name",
    "normalizer",
)


@dataclass
class Arguments(ModelFields, DataFields, RunFields):
    """Whose labels, of what, and how they are made."""

    model_name_or_path: str = option("", "The teacher: a folder or a name on the Hub.")
    dataset_name: str = option("", "Datasets to label, separated by +: names on the Hub, folders or manifests.")
    dataset_config_name: str | None = option(None, "Their configurations, separated by +.")
    dataset_split_name: str = option("train", "Their splits, separated by +.")
    text_column_name: str | None = option(
        None, "Column of the transcripts, for the teacher's WER. Default: text, where there is one."
    )
    id_column_name: str | None = option(None, "Column that identifies an utterance.")
    speaker_id_column_name: str | None = option(None, "Column that identifies the speaker.")
    recording_id_column_name: str | None = option(None, "Column that identifies the recording an utterance is from.")
    concatenate_audio: bool = option(
        False, "Pack utterances of one recording or speaker, in order, into windows of the model's length."
    )
    long_audio: str = option(
        "skip",
        "Audio longer than the window: skip it (it is listed) or split it at pauses.",
        choices=["skip", "split"],
    )
    return_timestamps: bool = option(False, "Let the teacher write timestamps.")
    generation_num_beams: int = option(1, "Beams of the search; 1 is greedy.")
    max_label_length: int = option(128, "The most tokens of a label; a longer one is marked as truncated.")
    decode_token_ids: bool = option(
        True, "Keep the text alone, which training encodes again. False keeps the token ids too, and trains on them."
    )
    per_device_eval_batch_size: int = option(16, "Windows of a process in a batch.")
    logging_steps: int = option(500, "Batches between two lines of metrics.")
    normalizer: str | None = option(
        None, "Text normaliser of the WER: english, basic or basic_keep_marks. Default: by language."
    )


@dataclass
class Job:
    """What labels units: the teacher, how, and where the rows go."""

    args: Arguments
    accelerator: Accelerator
    folder: OutputFolder
    whisper: LoadedWhisper
    decoder: Decoder
    language: str | None
    task: str | None
    normaliser: Normaliser
    trackers: Trackers
    repo: str | None = None
    batches: int = 0


def parse_args(argv: list[str] | None = None) -> Arguments:
    """Read the command line. Raises UserError for what it lacks or contradicts."""
    args = parse(Arguments, argv, description=__doc__)
    for name in ("model_name_or_path", "dataset_name", "output_dir"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing; {Arguments.__dataclass_fields__[name].metadata['help']}")
    if args.concatenate_audio and not (args.speaker_id_column_name or args.recording_id_column_name):
        raise UserError(
            "--concatenate_audio needs --speaker_id_column_name or --recording_id_column_name, to know which "
            "utterances belong together"
        )
    for name in ("per_device_eval_batch_size", "logging_steps", "generation_num_beams", "max_label_length"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be 1 or more")
    return args


def make_accelerator(args: Arguments) -> Accelerator:
    """accelerate with our trackers and timeout."""
    return Accelerator(
        log_with=resolve_report_to(args.report_to),
        project_config=project_configuration(args.output_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))],
    )


def check_arguments(args: Arguments, folder: OutputFolder, sources: list[Source]) -> None:
    """Raise UserError if a finished shard of a split was labelled with other arguments, with the difference."""
    names = [f"{source.config}/{source.split}" for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--dataset_name lists {names.count(name)} datasets with the same {name}, whose files would have the "
                "same names; label them into one --output_dir each"
            )
    if not folder.main:
        return
    now = {name: getattr(args, name) for name in LABEL_ARGUMENTS}
    earlier = folder.arguments() or {}
    for source in sources:
        was = earlier.get(f"{source.config}/{source.split}")
        now["dataset"] = source.label
        differing = [
            f"{name} was {was[name]} and is {now[name]}" for name in now if was and was.get(name) != now[name]
        ]
        if differing:
            raise UserError(
                f"{folder.path} holds labels of {source.config}/{source.split} made with other arguments "
                f"({'; '.join(differing)}); use those, another --output_dir, or --overwrite_output_dir"
            )
        earlier[f"{source.config}/{source.split}"] = dict(now)
    folder.keep_arguments(earlier)


def shards_of(source: Source) -> list[ShardFile]:
    """The output files of a source, one for each unit of it."""
    return [ShardFile(source.config or "default", source.split, unit.index, unit.of) for unit in source.units]


def columns_for(args: Arguments, sources: list[Source]) -> list[Columns]:
    """The columns of each source by their role. Raises UserError for one that is not there."""
    flags = ("text_column_name", "id_column_name", "speaker_id_column_name", "recording_id_column_name")
    texts, *others = [columns_of(args, "dataset", sources, flag) for flag in flags]
    texts = [
        text or ("text" if "text" in source.column_names else None)
        for text, source in zip(texts, sources, strict=True)
    ]
    return [Columns(args.audio_column_name, *roles) for roles in zip(texts, *others, strict=True)]


def label_source(job: Job, source: Source, columns: Columns) -> None:
    """Label this process's share of the units that are not finished."""
    args = job.args
    windows_are_rows = not args.concatenate_audio and args.long_audio == "skip"
    kept = None if windows_are_rows else columns.kept_in_windows()
    features, renamed = schema(source.features, kept, columns.audio, columns.text)
    settings = LabellingSettings(
        job.language,
        job.task,
        args.concatenate_audio,
        args.long_audio == "split",
        args.decode_token_ids,
        args.per_device_eval_batch_size,
        args.dataloader_num_workers,
    )
    labeller = UnitLabeller(job.whisper, job.decoder, columns, settings, job.normaliser, renamed)
    shards = shards_of(source)
    missing = [shard for shard in shards if read_manifest(job.folder, shard) is None]
    job.accelerator.print(f"{source.label}: {len(shards) - len(missing)} of {len(shards)} shards are finished")
    job.accelerator.wait_for_everyone()  # all count before one writes
    mine = missing[job.accelerator.process_index :: job.accelerator.num_processes]
    progress = bar(total=source.num_rows, desc=f"labelling {source.label}", unit="row")
    for shard in mine:
        label_shard(job, source, shard, labeller, features, progress)
    progress.close()
    job.accelerator.wait_for_everyone()


def label_shard(job: Job, source: Source, shard: ShardFile, labeller: UnitLabeller, features, progress) -> None:
    """Label one unit into its file."""
    tally = Tally()
    with shard_writer(job.folder / shard.name, features) as write:
        for rows in labeller(source, shard.index, tally):
            for row in rows:
                write(row)
            progress.update(len(rows))
            job.batches += 1
            if job.batches % job.args.logging_steps == 0:
                job.trackers.log(
                    {"rows_of_shard": tally.rows, "audio_hours_of_shard": tally.seconds / 3600}, job.batches
                )
    finish_shard(job.folder, shard, {"rows": tally.rows, "seconds": tally.seconds, "skipped": tally.skipped})
    write_readme(job.folder, card(job, {}))


def summarise(job: Job, source: Source, columns: Columns) -> dict:
    """What a split came to, read from its finished files: rows, hours, skipped rows, WER and CER of the teacher."""
    manifests = [read_manifest(job.folder, shard) for shard in shards_of(source)]
    skipped = [entry for manifest in manifests for entry in manifest["skipped"]]
    summary = {
        "split": f"{source.config or 'default'}/{source.split}",
        "rows": sum(manifest["rows"] for manifest in manifests),
        "hours": round(sum(manifest["seconds"] for manifest in manifests) / 3600, 3),
        "skipped": len(skipped),
    }
    if columns.text is not None and job.task != "translate":
        summary |= error_rates(job, source, columns.text)
    return summary


def error_rates(job: Job, source: Source, text_column: str) -> dict:
    """The teacher's WER and CER over a split's finished files, normalised; rows without a transcript do not count."""
    totals = {"wer": [0, 0], "cer": [0, 0]}
    for shard in shards_of(source):
        path = job.folder / shard.name
        for batch in (
            pq.ParquetFile(path).iter_batches(columns=[text_column, "whisper_transcript"]) if path.exists() else []
        ):
            for row in batch.to_pylist():
                if row[text_column] is None:
                    continue
                reference, spoken = (
                    job.normaliser(row[text_column]),
                    job.normaliser(plain_text(row["whisper_transcript"])),
                )
                for name, errors in (
                    ("wer", word_errors(reference, spoken)),
                    ("cer", character_errors(reference, spoken)),
                ):
                    totals[name] = [totals[name][0] + errors.errors, totals[name][1] + errors.reference_words]
    return {name: round(100 * wrong / total, 2) if total else None for name, (wrong, total) in totals.items()}


def card(job: Job, summaries: list[dict]) -> str:
    """The text of the dataset's README.md."""
    args = job.args
    return hub.dataset_card(
        name=job.repo or str(job.folder.path),
        teacher=args.model_name_or_path,
        sources=args.dataset_name.split("+"),
        arguments=public_arguments(args),
        splits=summaries or [],
        columns=MEANINGS,
        facts={"Language": job.language, "Task": job.task, "Text normaliser": job.normaliser.name},
    )


def report(job: Job, sources: list[Source], columns: list[Columns]) -> None:
    """Write and show what the labelled splits came to, and list the rows that were skipped."""
    summaries = [summarise(job, source, roles) for source, roles in zip(sources, columns, strict=True)]
    skipped = [
        {"split": f"{shard.config}/{shard.split}", **entry}
        for source in sources
        for shard in shards_of(source)
        for entry in read_manifest(job.folder, shard)["skipped"]
    ]
    if skipped:
        write_text(job.folder / SKIPPED_FILE, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in skipped))
    write_readme(job.folder, card(job, summaries))
    for summary in summaries:
        job.trackers.log(
            {f"{summary['split']}/{k}": v for k, v in summary.items() if isinstance(v, (int, float))}, job.batches
        )
        print(", ".join(f"{name} {value}" for name, value in summary.items() if value is not None))
    print(
        f"saved in {job.folder.path}"
        + (f"; {len(skipped)} skipped rows are listed in {SKIPPED_FILE}" if skipped else "")
    )


def begin(args: Arguments, accelerator: Accelerator, folder: OutputFolder) -> Job:
    """Load the teacher and settle what it is told."""
    whisper = load_whisper(
        args.model_name_or_path,
        dtype=args.dtype,
        attn_type=args.attn_type,
        cache_dir=args.cache_dir,
        device=accelerator.device,
    )
    language, task = language_and_task(args.language, args.task, whisper.grammar, whisper.model.generation_config)
    if whisper.grammar.multilingual and language is None:
        raise UserError("--language is missing: the teacher is multilingual, and nothing else names the language")
    decoder = Decoder(
        whisper,
        num_beams=args.generation_num_beams,
        max_label_length=args.max_label_length,
        return_timestamps=args.return_timestamps,
    )
    rules = normaliser(args.normalizer, language, whisper.tokenizer)
    trackers = Trackers(accelerator, folder, args.wandb_project, args.wandb_name, public_arguments(args))
    return Job(args, accelerator, folder, whisper, decoder, language, task, rules, trackers)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()
    accelerator = make_accelerator(args)
    main_process = accelerator.is_main_process
    with OutputFolder(args.output_dir, STAGE, args.overwrite_output_dir, main_process) as folder:
        repo = None
        if args.push_to_hub and main_process:
            private = args.hub_private_repo
            repo = hub.resolve_repo(args.output_dir, args.hub_model_id, repo_type="dataset", private=private)
        sources = open_sources(args)
        columns = columns_for(args, sources)
        check_arguments(args, folder, sources)
        shards = [shard for source in sources for shard in shards_of(source)]
        folder.claim("README.md", SKIPPED_FILE, *(name for s in shards for name in (s.name, s.manifest)))
        job = begin(args, accelerator, folder)
        job.repo = repo
        accelerator.wait_for_everyone()
        for source, roles in zip(sources, columns, strict=True):
            label_source(job, source, roles)
        if main_process:
            report(job, sources, columns)
            if repo:
                names = ["README.md", *(shard.name for shard in shards)]
                url = hub.push_folder(folder.path, repo, names, repo_type="dataset", message="Pseudo-labels")
                print(f"pushed to {url}")
        job.trackers.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
