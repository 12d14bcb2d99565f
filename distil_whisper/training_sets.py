"""The datasets of a training run: where their labels stand, and which of their rows are used."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice

from accelerate.utils import gather_object

from distil_whisper.engine import found_by_main_process
from distil_whisper.errors import UserError
from distil_whisper.examples import Batch, Collator, ExampleMaker, LabelColumns, Labeller
from distil_whisper.filtering import (
    LIMITS,
    NEEDED_COLUMNS,
    FilterSettings,
    RowFilter,
    counted,
    is_given,
    table,
)
from distil_whisper.handoff import require_kinds
from distil_whisper.mixing import (
    GROUPED_BATCHES,
    EpochOrder,
    LabelLengths,
    MapBatches,
    Share,
    TrainingSet,
    map_loader,
)
from distil_whisper.models import LoadedWhisper
from distil_whisper.normalisation import Normaliser, Normalisers, normaliser
from distil_whisper.reading import Source, require_columns
from distil_whisper.sources import SourceFlags, columns_of, first_row, open_sources
from distil_whisper.streams import Places, StreamBatches, StreamMixture, StreamParts
from distil_whisper.tokens import language_and_task
from distil_whisper.validation import ValidationSet
from distil_whisper.verdicts import VerdictFiles

PSEUDO_COLUMNS = ("whisper_transcript", "whisper_token_ids")
TRAINED_ON = (  # the columns of a labelled dataset that training reads
    *PSEUDO_COLUMNS,
    "condition_on_prev",
    "utterance_texts",
    "utterance_starts",
    "utterance_wer",
    "truncated",
    "wer",
    "avg_logprob",
    "no_speech_prob",
    "duration",
)
FIRST_ROWS = 200  # that show whether labels are of the student's tokenizer


def language_columns(args, student: LoadedWhisper, source: Source) -> LabelColumns:
    """What decides a row's language and task: what its teacher was told, if the dataset is one that we labelled; then
    the flags, the row's own columns, the first row of its dataset, the student's generation config."""
    grammar, names = student.grammar, (args.language_column_name, args.task_column_name)
    require_columns(
        source,
        language_column_name=names[0] if args.language_column_name != "language" else None,
        task_column_name=names[1] if args.task_column_name != "task" else None,
    )
    language, task = language_and_task(args.language, args.task, grammar, None)
    first = first_row(source, *names) if grammar.multilingual else {}
    default_language, default_task = language_and_task(
        *(first.get(name) for name in names), grammar, student.model.generation_config
    )
    task = task if args.task else None
    told = "tokenizer_fingerprint" in source.column_names
    return LabelColumns(None, False, language, task, default_language, default_task, *names, told)


def transcript_normaliser(args, student: LoadedWhisper, columns: LabelColumns) -> Normaliser:
    """The normaliser of a dataset's transcripts, by its language; translations are English."""
    translated = (columns.task or columns.default_task) == "translate"
    language = (columns.told and columns.default_language) or columns.language or columns.default_language
    language = "en" if translated else language
    return normaliser(args.normalizer, language, student.tokenizer)


def filter_settings(args, student: LoadedWhisper, labelled: list[Source]) -> FilterSettings:
    """What the flags leave out. Raises UserError for a limit on a figure that a dataset of pseudo-labels lacks."""
    limits = {name: getattr(args, name) for name in [*LIMITS, "drop_language_mismatch"]}
    for source in labelled:
        for name, column in NEEDED_COLUMNS.items():
            if is_given(limits[name]) and column not in source.column_names:
                raise UserError(
                    f"--{name} needs the column {column}, which {source.label} lacks; label it with "
                    "run_pseudo_labelling.py, or leave the limit out"
                )
    return FilterSettings(
        args.wer_threshold,
        args.max_label_length,
        student.window.seconds,
        args.drop_truncated,
        args.drop_empty,
        args.filter_metric == "cer",
        args.cut_utterances,
        **limits,
    )


def require_language(student: LoadedWhisper, source: Source, columns: LabelColumns) -> None:
    """Raise UserError for a multilingual model where nothing names the language."""
    known = columns.language or columns.default_language or "language" in source.column_names
    if student.grammar.multilingual and not known:
        raise UserError(f"--language is missing: the model is multilingual, and {source.label} names no language")


def label_columns(args, student: LoadedWhisper, sources: list[Source]) -> list[LabelColumns]:
    """Where the labels of each training dataset stand."""
    result = []
    texts = columns_of(args, "train", sources, "text_column_name")
    for source, text in zip(sources, texts, strict=True):
        labelled = any(name in source.column_names for name in PSEUDO_COLUMNS)
        pseudo = labelled if args.use_pseudo_labels is None else args.use_pseudo_labels
        if pseudo and not labelled:
            require_columns(source, use_pseudo_labels=PSEUDO_COLUMNS[0])
        if pseudo:
            require_kinds(source.features, TRAINED_ON, source.label)
        if text is None and not pseudo:
            require_columns(source, text_column_name="text")
            raise UserError(
                f"column text of {source.label} holds nothing but nulls; name the one with the transcripts with "
                "--text_column_name"
            )
        if text is None and args.wer_threshold is not None:
            raise UserError(
                f"--wer_threshold compares pseudo-labels with transcripts, and {source.label} has none in a column "
                "text; name theirs with --text_column_name"
            )
        columns = replace(language_columns(args, student, source), text=text, pseudo=pseudo)
        require_language(student, source, columns)
        if args.language_column_name in source.column_names:  # a row that names none is not trained on by guess
            guess, _ = language_and_task(None, None, student.grammar, student.model.generation_config)
            columns = replace(columns, default_language=guess)
        result.append(columns)
    return result


def open_training_sets(
    args, student: LoadedWhisper, labeller: Labeller, verdicts_on: VerdictFiles, say: Callable[[str], None]
) -> list[TrainingSet]:
    """The training datasets with their filters. Of map-style ones it is known now which rows are kept, and a table
    says why the others are not; streamed ones are filtered as they come. Raises UserError where no row is left."""
    sources = open_sources(args, "train")
    normalisers, labels_of = Normalisers(args.normalizer, student.tokenizer), label_columns(args, student, sources)
    labelled = [source for source, columns in zip(sources, labels_of, strict=True) if columns.pseudo]
    settings = filter_settings(args, student, labelled)
    say_what_changes_nothing(args, sources, labels_of, say)
    sets, counts = [], []
    for source, columns in zip(sources, labels_of, strict=True):
        require_same_tokenizer(source, columns, labeller)
        labels = "pseudo-labels" if columns.pseudo else f"transcripts in {columns.text}"
        say(f"{source.label}: training on the {labels}")
        row_filter = RowFilter(labeller, columns, normalisers, settings)
        sets.append(TrainingSet(source, columns, row_filter))
        if not args.streaming:
            rows = source.dataset.remove_columns(args.audio_column_name)
            rows = rows.select(range(min(len(rows), args.max_train_samples or len(rows))))
            verdicts = verdicts_on(len(counts), rows, row_filter, args.preprocessing_num_workers, args.group_by_length)
            sets[-1].kept, sets[-1].lengths = verdicts.kept, verdicts.lengths
            unused = dict.fromkeys(row_filter.limits() if columns.pseudo else (), 0)
            counts.append((source.label, Counter(unused | verdicts.reasons)))
            if not len(verdicts.kept):
                raise UserError(f"no row of {source.label} is left to train on ({counted(verdicts.reasons)})")
    if counts:
        say(table(counts))
    return sets


def require_same_tokenizer(source: Source, columns: LabelColumns, labeller: Labeller) -> None:
    """Raise UserError where most labels or prompts of the first rows cannot be read: another tokenizer wrote them.

    Later on, single ones are skipped or left out.
    """
    if not columns.pseudo:
        return
    names = [name for name in source.column_names if name != source.audio_column]
    rows = list(islice(chain.from_iterable(source.rows(unit.index, names) for unit in source.units), FIRST_ROWS))
    mend = "label it with this teacher"
    require_readable(source, rows, lambda row: labeller.target(row, columns), mend)
    if labeller.settings.condition_on_prev_probability:
        prompted = [row for row in rows if row.get("condition_on_prev")]
        mend += ", or set --condition_on_prev_probability 0"
        require_readable(source, prompted, lambda row: labeller.prompt(row, True), mend)


def require_readable(source: Source, rows: list[dict], read: Callable[[dict], object], mend: str) -> None:
    """Raise UserError if most of some rows cannot be read."""
    problems = []
    for row in rows:
        try:
            read(row)
        except UserError as error:
            problems.append(error)
    if 2 * len(problems) > len(rows):
        raise UserError(f"{source.label}: {problems[0]}; {mend}")


def say_what_changes_nothing(args, sources: list[Source], columns: list[LabelColumns], say) -> None:
    """Name the flags that decide nothing of these datasets."""
    if not any(of_source.pseudo for of_source in columns):
        for name in ("wer_threshold", *LIMITS, "drop_language_mismatch"):
            if is_given(getattr(args, name)):
                say(f"--{name} changes nothing: none of the datasets is trained on pseudo-labels")
    if args.filter_metric != "wer" and args.wer_threshold is None:
        say(f"--filter_metric {args.filter_metric} changes nothing without --wer_threshold")
    name = args.language_column_name
    for source, of_source in zip(sources, columns, strict=True):
        own = first_row(source, name).get(name) if of_source.told else None
        if own and of_source.language not in (None, own):
            say(f"{source.label} names the language of its labels ({own}); --language {args.language} is for others")


def open_validation_sets(args, student: LoadedWhisper) -> list[ValidationSet]:
    """The datasets that training is evaluated on, all of their rows."""
    sources = open_sources(args, "eval")
    sets = []
    for source, text in zip(sources, columns_of(args, "eval", sources, "eval_text_column_name"), strict=True):
        columns = replace(language_columns(args, student, source), text=text)
        require_language(student, source, columns)
        sets.append(ValidationSet(source.label, source, columns, transcript_normaliser(args, student, columns)))
    return sets


class Mixture:
    """The training datasets together: how long an epoch of them is, and their batches from any point on.

    position is where training stands in their order: the samples that were taken.
    """

    def __init__(self, args, sets: list[TrainingSet], maker: ExampleMaker, collator: Collator, share: Share):
        self.args, self.sets, self.maker, self.collator, self.share = args, sets, maker, collator, share
        self.weights = sampling_weights(args, sets)
        self.order = EpochOrder([len(s.kept) for s in sets], self.weights, args.seed)
        self.position = 0
        self._grouped_from = 0
        self._places: Places = {}
        self._streamed: StreamBatches | None = None

    @property
    def epoch(self) -> float | None:
        """The passes over the data that were made; None when streaming."""
        return None if self.args.streaming else self.position / len(self.order)

    def batches_until(self, epoch: float) -> float:
        """How many batches are left to the end of an epoch, which may be a part of one; not known when streaming."""
        return self._sizes.per_epoch * epoch - self._sizes.number(self.position)

    def resume(self, kept: dict, step: int, before: dict, say: Callable[[str], None]) -> None:
        """Go to where a checkpoint of an optimizer step stands: `kept` is what `to_keep` gave, `before` holds the
        arguments that the run had until then. With other batches than its own it goes on all the same."""
        batches = step * before["gradient_accumulation_steps"]
        if self.args.streaming:
            self.position = kept.get("samples", batches * self._stream_mixture.batch)
            self._places = self._stream_mixture.resumed(kept, self.position, say)
            return
        if "samples" not in kept:
            kept = self._of_earlier_version(batches, before, say)
        self.position = self._grouped_from = kept["samples"]
        if "places" in kept:
            say("the run was streamed before: from here on rows come in another order")
        if not kept.get("groups"):
            return
        grouped_from, size = kept["groups"]
        batches = MapBatches(self.order, Share(0, 1, size), grouped_from=grouped_from)
        if self.args.group_by_length and size == self._sizes.size:
            self._grouped_from = grouped_from
        elif not batches.begins_group(self.position):
            say(
                f"the run goes on within {GROUPED_BATCHES} batches of {size} rows that --group_by_length had sorted, "
                "with others than those: some of their rows come twice or not at all in this epoch"
            )

    def _of_earlier_version(self, batches: int, before: dict, say: Callable[[str], None]) -> dict:
        """What `to_keep` would have given after so many batches, for a checkpoint that lacks it."""
        share = replace(self.share, batch_size=before["per_device_train_batch_size"])
        say(f"an earlier version wrote the checkpoint: its {share.processes} processes are taken to be those of now")
        if self.weights:
            say("since then --train_dataset_samples visits all rows of a dataset before it repeats one: a new order")
        earlier = MapBatches(self.order, share)
        groups = [0, earlier.size] if before.get("group_by_length") else None
        return {"samples": earlier.after(0, batches), "groups": groups}

    def batches(self, say: Callable[[str], None]) -> Iterator[Batch]:
        """This process's batches without end, from the position on."""
        return self._streamed_batches(say) if self.args.streaming else self._map_batches()

    def _streamed_batches(self, say: Callable[[str], None]) -> Iterator[Batch]:
        workers = self.args.dataloader_num_workers
        mixture, number = self._stream_mixture, self.position // self._stream_mixture.batch
        parts = StreamParts(mixture, self.maker, self.collator, self.share, number, self._places)
        if workers > len(parts.shares):
            say(f"of --dataloader_num_workers {workers}, a batch of this size keeps {len(parts.shares)} busy")
        self._streamed = StreamBatches(parts, workers, self.collator.padding)
        for batch in self._streamed:
            self.position += self.share.batch_size * self.share.processes
            yield batch

    def _map_batches(self) -> Iterator[Batch]:
        grouping = self.args.group_by_length
        lengths = LabelLengths(self.sets, self.maker.labeller) if grouping else None
        batches = MapBatches(self.order, self.share, self.position, lengths, self._grouped_from)
        for batch in map_loader(self.sets, batches, self.maker, self.collator, self.args.dataloader_num_workers):
            self.position = batches.after(self.position, 1)
            yield batch

    def to_keep(self) -> dict:
        """What it takes to go on after the last batch. Every process must call it."""
        if not self.args.streaming:
            groups = [self._grouped_from, self._sizes.size] if self.args.group_by_length else None
            return {"samples": self.position, "groups": groups}
        places: Places = {}
        for of_process in gather_object([self._streamed.places]):
            places |= of_process
        return {"samples": self.position, **self._stream_mixture.to_keep(places)}

    @property
    def _sizes(self) -> MapBatches:
        """The batches of now, to count with."""
        return MapBatches(self.order, self.share)

    @cached_property
    def _stream_mixture(self) -> StreamMixture:
        for training_set in self.sets:
            training_set.source.take_counts(found_by_main_process(training_set.source.count_rows))
        args, size = self.args, self.share.batch_size * self.share.processes
        accumulated = args.gradient_accumulation_steps
        return StreamMixture(self.sets, self.weights, args.seed, args.shuffle_buffer_size, size, accumulated)


def sampling_weights(args, sets: list[TrainingSet]) -> list[float] | None:
    """The numbers of --train_dataset_samples, None without. Raises UserError for what is no positive number."""
    if args.train_dataset_samples is None:
        return None
    parts = SourceFlags.of(args, "train").spread("--train_dataset_samples", args.train_dataset_samples)
    weights = [_number(part) for part in parts]
    if any(not (weight > 0 and math.isfinite(weight)) for weight in weights):
        raise UserError(
            f"--train_dataset_samples is {args.train_dataset_samples}; it must be positive numbers separated by +"
        )
    return weights


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
