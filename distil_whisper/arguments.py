"""Arguments that stages share, and how a command line or a configuration file becomes a dataclass of them."""

import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import yaml
from transformers import HfArgumentParser
from transformers.models.whisper.tokenization_whisper import TASK_IDS

from distil_whisper.errors import UserError, nearest

ArgumentsT = TypeVar("ArgumentsT")
CONFIG_SUFFIXES = (".json", ".yaml", ".yml")
DTYPES = ("float32", "bfloat16", "float16")
MOST_WORKERS = 1024  # more would fill a machine's memory before they read a row
MOST_BEAMS = 100  # each has caches of its own
ATTENTION = {  # what may be asked for -> what transformers calls it
    "eager": "eager",
    "sdpa": "sdpa",
    "flash_attn": "sdpa",
    "flash_attn_2": "flash_attention_2",
    "flash_attention_2": "flash_attention_2",
}


@dataclass(frozen=True)
class Range:
    """The numbers that a flag takes. Infinity and NaN are in no range."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.above is None and self.below is None and None not in (self.at_least, self.at_most):
            return f"between {self.at_least:,} and {self.at_most:,}"
        if self.at_least is not None and self.at_most is None and self.below is None:
            return f"{self.at_least:,} or more"
        if self.at_most is not None and self.at_least is None and self.above is None:
            return f"{self.at_most:,} or less"
        bounds = dataclasses.asdict(self).items()
        said = " and ".join(f"{name.replace('_', ' ')} {bound:,}" for name, bound in bounds if bound is not None)
        return said or "a number"


def option(
    default,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    only_with: dict[str, object] | None = None,
    **metadata,
):
    """A dataclass field with its help text and, for a number or a list of numbers, the range that they must be in.

    only_with: what other arguments must be for this one to have an effect, by their names: a value, or True and False
    for any that count as such. A list default is copied for each instance.
    """
    known = {"range": Range(at_least, above, at_most, below), "only_with": only_with or {}}
    metadata = {"help": help, **known, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelFields:
    """How a checkpoint is loaded and computed with, and what it is told of the speech."""

    dtype: str = option(
        "float32",
        "Compute type: float32, bfloat16 or float16. Trained weights and optimizer state stay float32.",
        choices=list(DTYPES),
    )
    attn_type: str | None = option(
        None,
        "Attention: eager, sdpa (also called flash_attn) or flash_attention_2 (also called flash_attn_2, needs the "
        "flash-attn package and a GPU). Unset, the fastest that transformers finds.",
        choices=list(ATTENTION),
        only_with={"backend": "torch"},
    )
    cache_dir: str | None = option(None, "Where models and datasets from the Hub are cached.")
    language: str | None = option(
        None, "Language of the speech, a code or a name (hi, Hindi). None for an English-only model."
    )
    task: str | None = option(None, "transcribe or translate.", choices=sorted(TASK_IDS))
    normalizer: str | None = option(
        None, "Text normaliser of the WER: english, multilingual, basic or basic_keep_marks. Default: by language."
    )


@dataclass
class DataFields:
    """How audio is read."""

    streaming: bool = option(False, "Read from the source as it is needed, with no copy on disk.")
    audio_column_name: str = option("audio", "Column that holds the audio.")
    preprocessing_num_workers: int = option(
        1, "Processes that prepare a dataset (download, conversion, filtering).", at_least=1, at_most=MOST_WORKERS
    )
    dataloader_num_workers: int = option(
        0, "Processes that read and decode audio while the model computes.", at_least=0, at_most=MOST_WORKERS
    )


@dataclass
class HubFields:
    """Whether what a run makes goes to the Hub."""

    push_to_hub: bool = option(False, "Push what this stage makes to the Hugging Face Hub.")
    hub_model_id: str | None = option(
        None,
        "Repository on the Hub. Default: the name of the folder that is written.",
        only_with={"push_to_hub": True},
    )
    hub_private_repo: bool = option(False, "Make the repository on the Hub private.", only_with={"push_to_hub": True})


@dataclass
class RunFields(HubFields):
    """What a run writes and whom it tells."""

    output_dir: str = option("", "Folder for everything that this stage writes.")
    overwrite_output_dir: bool = option(
        False, "Start afresh: remove what this stage wrote there before (and nothing else)."
    )
    report_to: list[str] = option(
        ["default"],
        "Trackers: any of wandb, tensorboard, trackio, or none. Default: tensorboard, and wandb where a login or "
        "WANDB_MODE is set. metrics.jsonl is always written.",
        nargs="+",
    )
    wandb_project: str = option("distil-whisper", "Project name for the trackers.")
    wandb_name: str | None = option(None, "Name of this run in the trackers.")
    seed: int = option(42, "Seed of every random draw.", at_least=0, at_most=2**32 - 1)
    ddp_timeout: int = option(
        1800,
        "Seconds that processes wait for one another before a run is given up.",
        at_least=1,
        at_most=366 * 86_400,
    )


def parse(arguments: type[ArgumentsT], argv: list[str] | None = None, description: str | None = None) -> ArgumentsT:
    """Parse a command line: an optional .json, .yaml or .yml file first, then flags, which override the file.

    Raises UserError (one sentence) for an unknown flag, a wrong value or an unreadable file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    names = [f.name for f in dataclasses.fields(arguments)]
    if argv and argv[0].endswith(CONFIG_SUFFIXES) and not argv[0].startswith("-"):
        argv = _flags_of_file(Path(argv[0]), names) + argv[1:]
    parser = _Parser(arguments, description=description, allow_abbrev=False)
    known = {flag for action in parser._actions for flag in action.option_strings}
    for token in argv:
        flag = token.split("=", 1)[0]
        if flag.startswith("--") and flag not in known:
            raise UserError(f"there is no argument {flag} {nearest(flag, _spellings(names))}")
    parsed, rest = parser.parse_args_into_dataclasses(_without_nones(argv, arguments), return_remaining_strings=True)
    if rest:
        raise UserError(f"{rest[0]!r} does not belong to any argument; give values as --name value")
    check_ranges(parsed)
    if os.environ.get("RANK", "0") == "0":
        for sentence in without_effect(parsed):
            print(sentence, file=sys.stderr)
    fused = ATTENTION.get(getattr(parsed, "attn_type", None)) == "flash_attention_2"
    if fused and parsed.dtype == "float32":
        raise UserError(
            f"--attn_type {parsed.attn_type} computes in bfloat16 or float16, and --dtype is float32; give one of "
            "those, or --attn_type sdpa"
        )
    return parsed


def check_ranges(parsed) -> None:
    """Raise UserError for a number outside of the range that its flag declares."""
    for each in dataclasses.fields(parsed):
        value = getattr(parsed, each.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and number not in each.metadata["range"]:
                raise UserError(f"--{each.name} is {number}; it must be {each.metadata['range']}")


def without_effect(parsed) -> list[str]:
    """A sentence for each flag that was given a value and has no effect beside the others, as its `only_with` says."""
    given = [each for each in dataclasses.fields(parsed) if getattr(parsed, each.name) != _default(each)]
    return [
        f"--{each.name} has no effect {_beside(name, getattr(parsed, name))}"
        for each in given
        for name, needed in each.metadata["only_with"].items()
        if hasattr(parsed, name) and not _is_met(needed, getattr(parsed, name))
    ]


def _is_met(needed: object, found: object) -> bool:
    return bool(found) == needed if isinstance(needed, bool) else found == needed


def _beside(name: str, found: object) -> str:
    if not found:
        return f"without --{name}"
    return f"with --{name}" if found is True else f"with --{name} {found}"


def _default(each: dataclasses.Field) -> object:
    return each.default if each.default_factory is dataclasses.MISSING else each.default_factory()


def split_plus(value: str | None, count: int | None = None, argument: str = "", of: str = "") -> list[str | None]:
    """Split a value at `+`; a list of length one (or an absent value) is broadcast to `count` entries."""
    parts = [None if part.strip() in ("", "none", "None") else part.strip() for part in (value or "").split("+")]
    if count is None or len(parts) == count:
        return parts
    if len(parts) == 1:
        return parts * count
    raise UserError(f"{argument} has {len(parts)} entries ({value}), but {of} has {count}; give one, or {count}")


def attention(attn_type: str | None) -> str | None:
    """transformers' name of an attention implementation. Raises UserError if flash-attn is asked for and missing."""
    if attn_type is None:
        return None
    implementation = ATTENTION[attn_type]
    if implementation == "flash_attention_2":
        import torch
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            why = "no GPU was found" if not torch.cuda.is_available() else "the package flash-attn is not installed"
            raise UserError(f"--attn_type {attn_type} cannot be used because {why}; use --attn_type sdpa")
    return implementation


class _Parser(HfArgumentParser):
    def add_argument(self, *names, range: Range | None = None, only_with: dict | None = None, **settings):
        return super().add_argument(*names, **settings)  # argparse knows neither of the two

    def error(self, message):
        raise UserError(message)


class _YamlLoader(yaml.SafeLoader):
    """YAML without booleans: `no` is a language, too. Flags that are booleans read the words themselves."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _spellings(names: list[str]) -> list[str]:
    return [f"--{name}" for name in names]


def _flags_of_file(path: Path, names: list[str]) -> list[str]:
    """A configuration file as flags, so that its values are typed and checked as those of a command line are."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, _YamlLoader)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as a configuration file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold names and values, one for each argument, not a {type(values).__name__}")
    flags = []
    for name, value in values.items():
        if name not in names:
            raise UserError(f"{path} names an unknown argument {name} {nearest(name, names)}")
        if isinstance(value, dict):
            raise UserError(f"{path} gives {name} names and values of its own; it must be one value or a list")
        # Behind "=" a value may begin with dashes; a list has no such form.
        flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def _without_nones(argv: list[str], arguments: type) -> list[str]:
    """Drop `--name none` for arguments that may be absent, and whatever was given for that name before it."""
    absent = {_spelling(f"--{f.name}") for f in dataclasses.fields(arguments) if f.default is None}
    groups: list[list[str]] = []  # a flag and its values
    for token in argv:
        if token.startswith("--") or not groups:
            groups.append([token])
        else:
            groups[-1].append(token)
    result: list[list[str]] = []
    for group in groups:
        name, _, value = group[0].partition("=")
        values = [value, *group[1:]] if value else group[1:]
        if _spelling(name) in absent and [value.lower() for value in values] == ["none"]:
            result = [earlier for earlier in result if _spelling(earlier[0]) != _spelling(name)]
        else:
            result.append(group)
    return [token for group in result for token in group]


def _spelling(flag: str) -> str:
    """A flag without its value, alike whether it was written with - or _."""
    return flag.partition("=")[0].replace("-", "_")
