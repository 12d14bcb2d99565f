"""Several datasets by `+`: the lists of names, configurations, splits and columns, opened together."""

from dataclasses import dataclass
from itertools import chain

from datasets import Value

from distil_whisper.arguments import split_plus
from distil_whisper.errors import UserError
from distil_whisper.reading import Source, open_source, require_columns

DEFAULT_COLUMNS = ("text", "language", "task")  # taken where there is one and no flag names another


@dataclass(frozen=True)
class SourceFlags:
    """The flags of one + list of datasets, for messages: their names and what was given."""

    name_flag: str
    names: str
    config_flag: str
    configs: str | None
    split_flag: str
    splits: str

    @classmethod
    def of(cls, args, prefix: str) -> "SourceFlags":
        """Those of an argument dataclass, by the prefix of its fields: dataset, train or eval."""
        dataset = "dataset" if prefix == "dataset" else f"{prefix}_dataset"
        split = "dataset_split_name" if prefix == "dataset" else f"{prefix}_split_name"
        name, config = f"{dataset}_name", f"{dataset}_config_name"
        return cls(
            f"--{name}", getattr(args, name), f"--{config}", getattr(args, config), f"--{split}", getattr(args, split)
        )

    @property
    def count(self) -> int:
        """How many datasets: as many as the longest list, to which lists of length one are broadcast."""
        return max(len(split_plus(value)) for value in (self.names, self.configs, self.splits))

    def spread(self, flag: str, value: str | None) -> list[str | None]:
        """The entries of another + list of these datasets.

        Raises UserError for an empty entry, and where its length does not match.
        """
        if value and "+" in value and not all(part.strip() for part in value.split("+")):
            raise UserError(f"{flag} {value} has an empty entry; put a name between, before and after each +")
        longest = max((self.names, self.configs or "", self.splits), key=lambda text: len(split_plus(text)))
        longest_flag = {self.names: self.name_flag, self.configs: self.config_flag, self.splits: self.split_flag}[
            longest
        ]
        return split_plus(value, self.count, flag, f"{longest_flag} ({longest})")


def open_sources(args, prefix: str = "dataset") -> list[Source]:
    """The datasets that `--dataset_name`, `--train_dataset_name` or `--eval_dataset_name` lists.

    Raises UserError for lists that do not match, and for what open_source refuses.
    """
    flags = SourceFlags.of(args, prefix)
    if not flags.names or flags.names.strip().lower() == "none":
        raise UserError(f"{flags.name_flag} is missing; name a dataset on the Hub, a folder or a manifest")
    return [
        open_source(
            name,
            config,
            split or "train",
            streaming=args.streaming,
            cache_dir=args.cache_dir,
            num_proc=args.preprocessing_num_workers,
            audio_column=args.audio_column_name,
            exact=_columns_by_role(args),
        )
        for name, config, split in zip(
            flags.spread(flags.name_flag, flags.names),
            flags.spread(flags.config_flag, flags.configs),
            flags.spread(flags.split_flag, flags.splits),
            strict=True,
        )
    ]


def _columns_by_role(args) -> set[str]:
    """The columns that hold text or tell rows, speakers and recordings apart, of whichever dataset."""
    flags = (value for name, value in vars(args).items() if name.endswith("_column_name"))
    return {*DEFAULT_COLUMNS, *chain.from_iterable(map(split_plus, flags))} - {None}


def first_row(source: Source, *columns: str) -> dict:
    """What the first row of a dataset holds in those of the columns that there are."""
    there = [name for name in columns if name in source.column_names]
    rows = chain.from_iterable(source.rows(unit.index, there) for unit in source.units)
    return next(rows, {}) if there else {}


def columns_of(args, prefix: str, sources: list[Source], flag: str) -> list[str | None]:
    """One column for each source, from a + list; where none is named for transcripts, text, if there is such a column
    and it is not null in all rows.

    Raises UserError for a column that a source lacks, and for transcripts that are no text.
    """
    columns = SourceFlags.of(args, prefix).spread(f"--{flag}", getattr(args, flag))
    for number, source in enumerate(sources):
        require_columns(source, **{flag: columns[number]})
        if flag.endswith("text_column_name"):
            has_text = source.features.get("text", Value("null")) != Value("null")
            columns[number] = columns[number] or ("text" if has_text else None)
            if columns[number] is not None:
                source.as_text(columns[number])
    return columns
