"""Transcribe audio with a Whisper teacher, for a student to learn from: stage 1.

accelerate launch run_pseudo_labelling.py --model_name_or_path openai/whisper-large-v2 \
    --dataset_name ./common_voice_hi --dataset_split_name train+validation+test --text_column_name sentence \
    --id_column_name path --language hi --return_timestamps --dtype bfloat16 \
    --output_dir ./common_voice_hi_pseudo_labelled

Finished shards can be read at once with load_dataset. Killed and started again, with any number of processes, it goes
on with the shards that are missing.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial

import psutil
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Features
from tqdm import tqdm

from distil_whisper import hub
from distil_whisper.arguments import (
    MOST_BEAMS,
    MOST_WORKERS,
    DataFields,
    ModelFields,
    RunFields,
    option,
    parse,
    split_plus,
)
from distil_whisper.decoding import Decoder
from distil_whisper.engine import Turns, make_accelerator, share_folder
from distil_whisper.errors import UserError, exit_on_user_error
from distil_whisper.handoff import (
    LIMIT,
    MEANINGS,
    WRITTEN,
    ShardFile,
    finish_shard,
    is_finished,
    is_labelled,
    lacks_rows,
    read_manifest,
    schema,
    write_readme,
)
from distil_whisper.labelling import (
    RUN_BATCHES,
    RUN_WINDOWS,
    Columns,
    LabellingSettings,
    Tally,
    UnitAtWork,
    UnitLabeller,
    label_units,
    most_frequent,
)
from distil_whisper.models import LoadedWhisper, load_whisper, weights_digest
from distil_whisper.normalisation import Normalisers
from distil_whisper.outputs import OutputFolder, check_apart, public_arguments, remove, write_text
from distil_whisper.packing import WindowAudio
from distil_whisper.parts import PARTS, ShardInProgress, note_limit
from distil_whisper.plan import estimate, total
from distil_whisper.progress import Pace, quiet_libraries, shown
from distil_whisper.reading import Source, is_same_contents, require_no_pattern
from distil_whisper.resuming import OtherWindows
from distil_whisper.signals import StopRequest
from distil_whisper.sources import columns_of, open_sources
from distil_whisper.summary import summarise
from distil_whisper.tokens import language_and_task
from distil_whisper.trackers import Trackers
from distil_whisper.truncation import TruncationLimit
from distil_whisper.uploads import BackgroundUploads

STAGE = "run_pseudo_labelling"
SKIPPED_FILE = "skipped.jsonl"
WHEREABOUTS = {"location", "audio"}
LABEL_ARGUMENTS = (  # those that decide what the labels are
    "model_name_or_path",
    "dtype",
    "language",
    "task",
    "return_timestamps",
    "generation_num_beams",
    "backend",
    "max_label_length",
    "decode_token_ids",
    "concatenate_audio",
    "long_audio",
    "max_window_seconds",
    "audio_column_name",
    "text_column_name",
    "id_column_name",
    "speaker_id_column_name",
    "recording_id_column_name",
    "language_column_name",
    "task_column_name",
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
    language_column_name: str | None = option(
        None, "Column of the language of each row, in place of --language. Default: language, where there is one."
    )
    task_column_name: str | None = option(
        None, "Column of the task of each row, in place of --task. Default: task, where there is one."
    )
    concatenate_audio: bool = option(
        False, "Pack utterances of one recording or speaker, in order, into windows of the model's length."
    )
    long_audio: str = option(
        "skip",
        "Audio longer than the window: skip it (it is listed) or split it at pauses.",
        choices=["skip", "split"],
    )
    return_timestamps: bool = option(False, "Let the teacher write timestamps.")
    generation_num_beams: int = option(1, "Beams of the search; 1 is greedy.", at_least=1, at_most=MOST_BEAMS)
    backend: str = option(
        "torch",
        "What decodes: torch, or ctranslate2 (a converted copy of the teacher, in the type that --dtype says).",
        choices=["torch", "ctranslate2"],
    )
    cuda_graphs: bool = option(
        True,
        "Greedily on a GPU: launch each step of the decoder as one graph, for which its caches are kept.",
        only_with={"backend": "torch", "generation_num_beams": 1},
    )
    draft_from_text: bool = option(
        False,
        "Greedily, read the transcripts as drafts of the labels: the same labels, in fewer steps of the decoder.",
    )
    max_window_seconds: float | None = option(
        None,
        "The longest window that --concatenate_audio and --long_audio split make. Default: all that the model takes.",
        at_least=1,
    )
    max_label_length: int = option(
        128,
        "The most tokens of a label; a longer one is marked as truncated. A later start that gives more labels those "
        "alone again.",
        at_least=1,
    )
    decode_token_ids: bool = option(
        True, "Keep the text alone, which training encodes again. False keeps the token ids too, and trains on them."
    )
    per_device_eval_batch_size: int = option(16, "Windows of a process in a batch.", at_least=1)
    dataloader_num_workers: int = option(
        4,
        "Threads that read and write beside the decoding, each; 0 for none.",
        at_least=0,
        at_most=MOST_WORKERS,
    )
    logging_steps: int = option(
        500,
        "Batches between two lines of metrics; what is labelled by then survives a kill, inside a shard too.",
        at_least=1,
    )
    max_skipped: float = option(
        5.0, "Stop when more than so many percent of the rows cannot be labelled.", at_least=0, at_most=100
    )
    max_truncated: float = option(
        5.0, "Stop when more than so many percent of the labels are truncated.", at_least=0, at_most=100
    )
    dry_run: bool = option(
        False, "Label a few windows as a trial, print rows, hours, time and disk that the whole takes, and stop."
    )


@dataclass
class Job:
    """What labels units: the teacher, how, and where the rows go."""

    args: Arguments
    accelerator: Accelerator
    folder: OutputFolder | None
    whisper: LoadedWhisper
    decoder: Decoder
    language: str | None
    task: str | None
    normalisers: Normalisers
    turns: Turns
    truncation: TruncationLimit
    trackers: Trackers | None = None
    repo: str | None = None
    uploads: BackgroundUploads | None = None
    batches: int = 0
    read: int = 0  # rows of the units that this process labelled, and those of them that it skipped
    skipped: list[dict] = field(default_factory=list)


def parse_args(argv: list[str] | None = None) -> Arguments:
    """Read the command line. Raises UserError for what it lacks or contradicts."""
    args = parse(Arguments, argv, description=__doc__)
    for name in ("model_name_or_path", "dataset_name", "output_dir"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing; {Arguments.__dataclass_fields__[name].metadata['help']}")
    check_apart(args.output_dir, split_plus(args.dataset_name))
    check_drafts(args)
    if args.concatenate_audio and not (args.speaker_id_column_name or args.recording_id_column_name):
        raise UserError(
            "--concatenate_audio needs --speaker_id_column_name or --recording_id_column_name, to know which "
            "utterances belong together"
        )
    if args.max_window_seconds is not None and not packs_or_splits(args):
        raise UserError(
            "--max_window_seconds is for --concatenate_audio and --long_audio split, which make windows; give one of "
            "them, or leave it out"
        )
    for flag in ("language", "task"):
        if getattr(args, flag) and getattr(args, f"{flag}_column_name"):
            raise UserError(f"--{flag} and --{flag}_column_name exclude each other; give one of them")
    return args


def packs_or_splits(args: Arguments) -> bool:
    """Whether windows are made of the rows' audio; else each row is one."""
    return args.concatenate_audio or args.long_audio == "split"


def check_drafts(args: Arguments) -> None:
    """Raise UserError for drafts with what does not read them."""
    if args.draft_from_text and (args.backend != "torch" or args.generation_num_beams > 1):
        raise UserError("--draft_from_text is for greedy search with --backend torch; leave it out")
    if args.draft_from_text and args.task == "translate":
        raise UserError("--draft_from_text is for --task transcribe: a transcript is no draft of a translation")


def check_names(args: Arguments, sources: list[Source]) -> None:
    """Raise UserError for datasets whose files would have the same names, or would lie in a dataset that is read."""
    require_no_pattern(args.output_dir)
    for source in sources:
        check_apart(args.output_dir, [other.name for other in sources], below=source.config or "default")
    files: dict[str, str] = {}  # the names of their files, by the split and config that were given first
    for source in sources:
        name = f"{source.config or 'default'}/{source.split}"
        stem = ShardFile(source.config or "default", source.split, 0, 1).stem
        if stem in files:
            raise UserError(
                f"--dataset_name lists {files[stem]} and {name}, whose files would have the same names; label them "
                "into one --output_dir each"
            )
        files[stem] = name


def check_arguments(args: Arguments, folder: OutputFolder, sources: list[Source]) -> None:
    """Raise UserError if a finished shard was labelled with other arguments, or of other data, with the difference."""
    if not folder.main:
        return
    arguments = {name: getattr(args, name) for name in LABEL_ARGUMENTS}
    for source in sources:
        data = {"dataset": source.label, "shards": len(source.units), **whereabouts(source)}
        keep_or_refuse(folder, source, {**arguments, **data})
        for shard in shards_of(source):
            was = (read_manifest(folder, shard) or {}).get("contents")
            if was is not None and not is_same_contents(was, now := source.contents(shard.index)):
                raise UserError(
                    f"{folder.path} holds labels of other data: {shard.name} was made of {was}, which now is {now}; "
                    "use the data as it was, another --output_dir, or --overwrite_output_dir"
                )


def whereabouts(source: Source) -> dict[str, str]:
    """What tells other data of the same name: both are others, of data that was moved or mended only one."""
    location = hashlib.blake2b(source.location.encode(), digest_size=8).hexdigest()  # which may hold credentials
    return {"location": location, "audio": source.audio_digest()}


def keep_or_refuse(folder: OutputFolder, source: Source, now: dict[str, object]) -> None:
    """Note what the labels of a split are made with. Raises UserError if some were made with something else.

    Labels may have more tokens than before: those of the finished shards are told apart by what is noted of them.
    """
    split, earlier = f"{source.config}/{source.split}", folder.arguments() or {}
    was = earlier.get(split, {})
    if was:  # a flag that there was not is as it is without it
        was = {name: value.default for name, value in Arguments.__dataclass_fields__.items() if name in now} | was
    differing = {name for name in now if name in was and was[name] != now[name]}
    if differing >= WHEREABOUTS:
        raise UserError(
            f"{folder.path} holds labels of other data called {source.label} than {source.name}; give another "
            "--output_dir, or --overwrite_output_dir"
        )
    more = was.get(LIMIT, math.inf) < now.get(LIMIT, 0)
    differing -= WHEREABOUTS | ({LIMIT} if more else set())
    if differing:
        said = "; ".join(f"{name} was {was[name]} and is {now[name]}" for name in now if name in differing)
        raise UserError(
            f"{folder.path} holds labels of {split} made with other arguments ({said}); use those, "
            "another --output_dir, or --overwrite_output_dir"
        )
    for shard in shards_of(source) if more else ():
        note_limit(folder, shard, was[LIMIT])
    folder.keep_arguments({**earlier, split: {**was, **now}})


def shards_of(source: Source) -> list[ShardFile]:
    """The output files of a source, one for each unit of it."""
    return [ShardFile(source.config or "default", source.split, unit.index, unit.of) for unit in source.units]


def columns_for(args: Arguments, sources: list[Source]) -> list[Columns]:
    """The columns of each source by their role. Raises UserError for one that is not there."""

    def given(role: str) -> list[str | None]:
        return columns_of(args, "dataset", sources, f"{role}_column_name")

    def given_or(role: str, flag: str | None) -> list[str | None]:
        """The columns that were named, else the one of the role's own name, unless a flag stands in for it."""
        return [
            name or (role if role in source.column_names and not flag else None)
            for name, source in zip(given(role), sources, strict=True)
        ]

    for name in given("text"):
        if name in WRITTEN:
            raise UserError(
                f"--text_column_name {name} is a column that labelling writes; give the transcripts another"
            )
    roles = [given("text"), given("id"), given("speaker_id"), given("recording_id")]
    roles += [given_or("language", args.language), given_or("task", args.task)]
    columns = [Columns(args.audio_column_name, *of_source) for of_source in zip(*roles, strict=True)]
    for source, of_source in zip(sources, columns, strict=True):
        if args.draft_from_text and of_source.text is None:
            raise UserError(
                f"--draft_from_text needs transcripts, and {source.label} has none in a column text; name their "
                "column with --text_column_name, or leave the flag out"
            )
    return columns


def make_labeller(job: Job, source: Source, columns: Columns) -> tuple[UnitLabeller, Features]:
    """What labels the units of a source, and the features of the rows that it writes.

    Raises UserError where nothing names the language, or an English-only model is given one.
    """
    args, multilingual = job.args, job.whisper.grammar.multilingual
    if multilingual and job.language is None and columns.language is None:
        raise UserError(
            "--language is missing: the teacher is multilingual, and neither its generation config nor a column of "
            f"{source.label} names the language"
        )
    if not multilingual:
        if args.language_column_name:
            raise UserError("--language_column_name was given, but the model is English-only")
        columns = replace(columns, language=None, task=None)
    kept = columns.kept_in_windows() if packs_or_splits(args) else None
    features, renamed = schema(source.features, kept, columns.audio, columns.text)
    settings = LabellingSettings(
        job.language,
        job.task,
        args.concatenate_audio,
        args.long_audio == "split",
        args.decode_token_ids,
        args.per_device_eval_batch_size,
        args.dataloader_num_workers,
        min(RUN_BATCHES, max(RUN_WINDOWS // args.per_device_eval_batch_size, 1), args.logging_steps),
        args.draft_from_text,
        args.max_window_seconds,
    )
    return UnitLabeller(job.whisper, job.decoder, columns, settings, job.normalisers, renamed), features


def label_missing(job: Job, labellers: list[tuple[Source, UnitLabeller, Features]]) -> None:
    """Label the units that are not finished, of whatever source, as this process comes to them."""
    missing = []
    for source, labeller, features in labellers:
        shards = shards_of(source)
        # As the main process finds it: another machine may have no FFmpeg.
        left = [shard for shard in shards if not is_finished(job.folder, shard, job.args.max_label_length)]
        left = broadcast_object_list([left])[0]
        job.accelerator.print(f"{source.label}: {len(shards) - len(left)} of {len(shards)} shards are finished")
        manifests = [manifest for shard in left if (manifest := read_manifest(job.folder, shard)) is not None]
        if again := sum(not lacks_rows(manifest) for manifest in manifests):
            most = job.args.max_label_length
            job.accelerator.print(f"{source.label}: truncated labels of {again} shards get up to {most} tokens")
        missing += [(source, labeller, features, shard) for shard in left]
    if job.folder.main:
        digest = weights_digest(job.whisper.model)
        for source, *_ in labellers:
            keep_or_refuse(job.folder, source, {"weights of the teacher": digest})
    job.accelerator.wait_for_everyone()  # all count before one writes
    rows = [source.units[shard.index].rows for source, _, _, shard in missing]
    with StopRequest() as stop, Pace(job.turns, None if None in rows else sum(rows)) as pace, ExitStack() as files:

        def units() -> Iterator[ShardAtWork]:
            """The shards that this process takes, as it comes to read them."""
            while (number := job.turns.take()) < len(missing):
                source, labeller, features, shard = missing[number]
                contents, most = source.contents(shard.index), job.args.max_label_length
                file = files.enter_context(ShardInProgress(job.folder, shard, features, contents, most))
                tally = Tally(**file.progress, kept=file.kept_rows(), earlier=file.earlier)
                if tally.rows:
                    tqdm.write(f"{shard.name}: going on behind {tally.rows:,} windows")
                yield ShardAtWork(labeller, source, shard.index, tally, file=file)

        with closing(label_units(units(), partial(write, job, pace), job.args.dataloader_num_workers)) as at_work:
            for unit in at_work:
                if stop.received is not None:
                    at_work.close()
                    leave(unit, stop)


@dataclass
class ShardAtWork(UnitAtWork):
    """A unit and the file of its rows; counted, counted_seconds: what the progress knows of rows read and of audio."""

    file: ShardInProgress | None = None
    counted: int = 0
    counted_seconds: float = 0.0
    finished: bool = False

    def runs(self) -> Iterator[list[WindowAudio]]:
        """What is to be decoded of it: all, where the windows that were kept are others now."""
        try:
            yield from super().runs()
        except OtherWindows:
            tqdm.write(f"{self.file.shard.name}: its rows give other windows than before, and it is labelled anew")
            self.file.restart()
            self.tally = Tally(earlier=self.file.earlier)
            yield from super().runs()


def write(job: Job, pace: Pace, unit: ShardAtWork, rows: list[dict] | None) -> None:
    """Write rows of a shard, or None to finish it; every --logging_steps batches keep them and tell the progress."""
    if rows is None:
        finish(job, pace, unit)
        return
    for row in rows:
        unit.file.write(row)
    count(pace, unit, rows)
    steps, before = job.args.logging_steps, job.batches
    job.batches += -(-len(rows) // job.args.per_device_eval_batch_size)
    if job.batches // steps > before // steps:
        unit.file.keep(unit.tally.progress())
        if not shown():  # where there is a bar, it says that
            name, windows = unit.file.shard.name, unit.tally.rows
            job.accelerator.print(f"{name}: {windows:,} windows labelled; in all {pace}")
        job.trackers.log(pace.metrics(), job.batches)
    windows = job.turns.count("windows", len(rows))
    truncated = job.turns.count("truncated", sum(row["truncated"] for row in rows))
    if problem := job.truncation.early_problem(windows, truncated):
        unit.file.keep(unit.tally.progress())
        raise UserError(problem)


def count(pace: Pace, unit: ShardAtWork, rows: list[dict] | None) -> None:
    """Count what was labelled: seconds of audio, and the rows of the input that it is of, which None says are all.

    Reading is ahead of that. Of a row that was cut into windows, each counts until all that was read are counted. Rows
    whose earlier label stays count without their seconds.
    """
    labelled = unit.tally.read
    if rows is not None:
        parts = (row.get("utterance_ids") for row in rows)  # of packed windows
        labelled = min(unit.counted + sum(len(ids) if ids else 1 for ids in parts), labelled)
    seconds = unit.tally.decoded_seconds
    pace.add(labelled - unit.counted, seconds - unit.counted_seconds, unit.file.shard.stem)
    unit.counted, unit.counted_seconds = labelled, seconds


def finish(job: Job, pace: Pace, unit: ShardAtWork) -> None:
    """Make the file of a shard, and push it; without one where the unit could not be read to its end.

    Raises UserError if too many of its rows were left out.
    """
    tally, shard = unit.tally, unit.file.shard
    unit.finished = True
    count(pace, unit, None)
    if unit.problem is not None:
        tqdm.write(f"{shard.name} is left out: {unit.problem}")
        unit.file.keep(tally.progress())  # the error may pass
        return
    unit.file.finish(tally.progress())
    facts = {"rows": tally.rows, "seconds": tally.seconds, "read": tally.read, "skipped": tally.skipped}
    finish_shard(job.folder, shard, {**facts, "contents": unit.file.contents, LIMIT: job.args.max_label_length})
    unit.file.forget()
    write_readme(job.folder, card(job, []))
    if job.uploads:
        job.uploads.add(shard.name, "README.md")
    job.read, job.skipped = job.read + tally.read, job.skipped + tally.skipped
    check_skipped(job.args, job.read, job.skipped)


def leave(unit: ShardAtWork, stop: StopRequest) -> None:
    """Asked to stop (SIGTERM, SIGINT), keep the windows that are labelled."""
    if not unit.finished:
        unit.file.keep(unit.tally.progress())
    tqdm.write(f"stopped behind {unit.tally.rows:,} windows of {unit.file.shard.name}; the same command goes on")
    raise SystemExit(stop.exit_code)


def check_skipped(args: Arguments, read: int, skipped: list[dict], at_least: int = 100) -> None:
    """Raise UserError if too many rows cannot be labelled. A few rows say little: they are judged at the end."""
    if read >= at_least and 100 * len(skipped) > args.max_skipped * read:
        raise UserError(
            f"{len(skipped)} of {read} rows cannot be labelled ({most_frequent(skipped)}), more than --max_skipped "
            f"{args.max_skipped:g} percent; {SKIPPED_FILE} in {args.output_dir} lists them: allow more to go on, or "
            "mend them (--long_audio split takes audio longer than the window) and label anew with "
            "--overwrite_output_dir"
        )


def check_unread(folder: OutputFolder, shards: list[ShardFile], max_label_length: int) -> None:
    """Raise UserError if there are shards that could not be read."""
    unread = [shard.name for shard in shards if not is_labelled(folder, shard, max_label_length)]
    if unread:
        raise UserError(
            f"{len(unread)} of {len(shards)} shards could not be read, as was said above ({', '.join(unread[:3])}"
            f"{', ...' if len(unread) > 3 else ''}); the others are finished: mend the files, and start the same "
            "command again"
        )


def card(job: Job, summaries: list[dict]) -> str:
    """The text of the dataset's README.md."""
    args = job.args

    def told(name: str) -> str:
        return ", ".join(sorted({part for summary in summaries for part in (summary[name] or "").split(", ") if part}))

    return hub.dataset_card(
        name=job.repo or str(job.folder.path),
        teacher=args.model_name_or_path,
        sources=args.dataset_name.split("+"),
        arguments=public_arguments(args),
        splits=summaries,
        columns=MEANINGS,
        facts={"Language": told("languages") or job.language, "Task": told("tasks") or job.task},
    )


def list_skipped(job: Job, sources: list[Source]) -> list[dict]:
    """Write the rows of the finished shards that were skipped into a file, and return them."""
    skipped = [
        {"split": f"{shard.config}/{shard.split}", **entry}
        for source in sources
        for shard in shards_of(source)
        for entry in (read_manifest(job.folder, shard) or {"skipped": []})["skipped"]
    ]
    if skipped:
        write_text(job.folder / SKIPPED_FILE, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in skipped))
    else:  # those of an earlier run were labelled since
        remove(job.folder / SKIPPED_FILE)
    return skipped


def report(job: Job, sources: list[Source], columns: list[Columns]) -> None:
    """Write and show what the labelled splits came to, and list the rows that were skipped."""
    summaries = [
        summarise(job.folder, shards_of(source), roles.text, job.normalisers, job.whisper.window.seconds)
        for source, roles in zip(sources, columns, strict=True)
    ]
    skipped = list_skipped(job, sources)
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
    check_skipped(job.args, sum(summary["read"] for summary in summaries), skipped, at_least=0)
    windows, truncated = (sum(summary[name] for summary in summaries) for name in ("rows", "truncated"))
    if problem := job.truncation.problem(windows, truncated):
        raise UserError(problem)


def make_decoder(args: Arguments, whisper: LoadedWhisper, device) -> Decoder:
    """What decodes the windows: both backends have one interface."""
    options = {
        "num_beams": args.generation_num_beams,
        "max_label_length": args.max_label_length,
        "return_timestamps": args.return_timestamps,
    }
    if args.backend == "torch":
        return Decoder(whisper, cuda_graphs=args.cuda_graphs, **options)
    from distil_whisper.ctranslate2_backend import CTranslate2Decoder  # which takes a while to import

    return CTranslate2Decoder(whisper, device=device, **options)


def fit_to_model(args: Arguments, accelerator: Accelerator, whisper: LoadedWhisper) -> Arguments:
    """The arguments with no more tokens for a label than the model has room for, which is said.

    Raises UserError for windows that are longer than the model's.
    """
    window, room = whisper.window, whisper.grammar.room(args.return_timestamps)
    if args.max_window_seconds is not None and args.max_window_seconds > window.seconds:
        raise UserError(
            f"--max_window_seconds is {args.max_window_seconds:g}, and the model's window has {window.seconds:g} s; "
            f"give at most {window.seconds:g}"
        )
    if args.max_label_length > room:
        accelerator.print(
            f"--max_label_length {args.max_label_length} is more than the decoder has room for; {room} is taken"
        )
    return replace(args, max_label_length=min(args.max_label_length, room))


def begin(args: Arguments, accelerator: Accelerator, folder: OutputFolder | None) -> Job:
    """Load the teacher and settle what it is told."""
    whisper = load_whisper(
        args.model_name_or_path,
        dtype=args.dtype,
        attn_type=args.attn_type,
        cache_dir=args.cache_dir,
        device=accelerator.device if args.backend == "torch" else "cpu",
    )
    args = fit_to_model(args, accelerator, whisper)
    language, task = language_and_task(args.language, args.task, whisper.grammar, whisper.model.generation_config)
    decoder = make_decoder(args, whisper, accelerator.device)
    normalisers = Normalisers(args.normalizer, whisper.tokenizer)
    room = whisper.grammar.room(args.return_timestamps)
    longest = (args.max_window_seconds or whisper.window.seconds) if packs_or_splits(args) else None
    truncation = TruncationLimit(args.max_label_length, room, args.max_truncated, longest)
    turns = Turns(accelerator)
    return Job(args, accelerator, folder, whisper, decoder, language, task, normalisers, turns, truncation)


def print_plan(args: Arguments, accelerator: Accelerator, sources: list[Source], columns: list[Columns]) -> None:
    """Say what labelling would take, after a trial on this machine. Writes nothing into the output folder."""
    if not accelerator.is_main_process:
        return
    job = begin(args, accelerator, None)
    loaded = time.time() - psutil.Process().create_time()
    plans = [estimate(s, *make_labeller(job, s, roles)) for s, roles in zip(sources, columns, strict=True)]
    for plan in [*plans, total(plans)] if len(plans) > 1 else plans:
        print("\n".join(plan.lines(accelerator.num_processes, loaded)))
    tried = total(plans)
    if problem := job.truncation.problem(tried.windows, tried.truncated):
        print(problem)


def publish_to(args: Arguments, accelerator: Accelerator) -> str | None:
    """The repository that every process pushes its shards to, made first so that a refusal comes first."""
    repo = [None]
    if args.push_to_hub and accelerator.is_main_process:
        private = args.hub_private_repo
        repo = [hub.resolve_repo(args.output_dir, args.hub_model_id, repo_type="dataset", private=private)]
    return broadcast_object_list(repo)[0] if args.push_to_hub else None


def label(job: Job, sources: list[Source], columns: list[Columns]) -> None:
    """Label what is not finished, and push it while that goes on."""
    args = job.args
    labellers = [(source, *make_labeller(job, source, roles)) for source, roles in zip(sources, columns, strict=True)]
    job.trackers = Trackers(job.accelerator, job.folder, args.wandb_project, args.wandb_name, public_arguments(args))
    job.accelerator.wait_for_everyone()
    share_folder(job.folder, job.accelerator)
    if job.accelerator.is_main_process:
        write_readme(job.folder, card(job, []))
    if job.repo:
        job.uploads = BackgroundUploads(job.folder.path, job.repo, tqdm.write)
    try:
        label_missing(job, labellers)
    except UserError:
        list_skipped(job, sources)
        raise
    finally:
        if job.uploads:
            job.uploads.finish()
    job.turns.wait_at("labelled")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()
    accelerator = make_accelerator(args)
    sources = open_sources(args)
    columns = columns_for(args, sources)
    check_names(args, sources)
    if args.dry_run:
        print_plan(args, accelerator, sources, columns)
        return
    with OutputFolder(args.output_dir, STAGE, args.overwrite_output_dir, accelerator.is_main_process) as folder:
        check_arguments(args, folder, sources)
        shards = [shard for source in sources for shard in shards_of(source)]
        folder.claim("README.md", SKIPPED_FILE, PARTS, *(name for s in shards for name in (s.name, s.manifest)))
        repo = publish_to(args, accelerator)
        job = begin(args, accelerator, folder)
        job.repo = repo
        label(job, sources, columns)
        if accelerator.is_main_process:
            report(job, sources, columns)
            if repo:
                names = ["README.md", *(shard.name for shard in shards)]
                url = hub.push_folder(folder.path, repo, names, repo_type="dataset", message="Pseudo-labels")
                print(f"pushed to {url}")
            check_unread(folder, shards, job.args.max_label_length)
            folder.remove(PARTS)  # of unread shards they stay
        job.turns.wait_at("reported")
        job.trackers.finish()


if __name__ == "__main__":
    exit_on_user_error(main)
