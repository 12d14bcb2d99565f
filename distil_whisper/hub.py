"""What a stage shares on the Hugging Face Hub: a repository, the files that it wrote, and a card."""

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from httpx2 import HTTPError
from huggingface_hub import EvalResult, HfApi, ModelCardData, get_token, metadata_update
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from distil_whisper.errors import UserError

TASK = "automatic-speech-recognition"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# The library answers with all of these: status codes and lost connections, no login and offline mode, failed uploads,
# refused metadata.
_FAILURES = (HTTPError, OSError, RuntimeError, ValueError)
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")
_LOCAL_ARGUMENTS = {"output_dir", "save_dir", "cache_dir", "overwrite_output_dir", "report_to", "wandb_project"}
_LOCAL_ARGUMENTS |= {"wandb_name", "push_to_hub", "hub_model_id", "hub_private_repo"}


@dataclass(frozen=True)
class Result:
    """Figures of one evaluated split: error rates in percent by their names (wer, cer), and others."""

    dataset: str
    split: str
    metrics: Mapping[str, float]
    config: str | None = None
    facts: Mapping[str, object] = field(default_factory=dict)  # columns of the card's table that are no metrics


def resolve_repo(
    output_dir: str | Path, hub_model_id: str | None = None, *, repo_type: str = "model", private: bool = False
) -> str:
    """Make the repository that a run will push to, where it is missing, and return its full id.

    Called before the work, so that what would refuse the push refuses it then. Without an id the repository is named
    after the output folder; without a namespace it is the user's. Raises UserError for a missing or refused login, no
    network, an impossible name, no right to write, and a public repository where a private one was asked for.
    """
    repo_id = hub_model_id or Path(output_dir).resolve().name
    _check_name(repo_id, "--hub_model_id" if hub_model_id else "--output_dir gives the repository name")
    if get_token() is None:
        raise UserError("--push_to_hub needs a login, and there is none; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with _one_sentence(f"--push_to_hub cannot use the repository {repo_id}"):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True).repo_id
        api.auth_check(repo_id, repo_type=repo_type, write=True)
        is_public = private and not api.repo_info(repo_id, repo_type=repo_type).private
    if is_public:
        raise UserError(
            f"--hub_private_repo was given, but the repository {repo_id} exists and is public; make it private on the "
            "Hub, or choose another --hub_model_id"
        )
    return repo_id


def push_folder(
    folder: str | Path, repo_id: str, names: Iterable[str], *, repo_type: str = "model", message: str
) -> str:
    """Upload files and folders (relative names; the folder may hold other people's) and return the page's address.

    A shard (`-00000-of-00002`) stands for its set: the folder's set replaces the repository's. Raises UserError if the
    Hub or the network refuses; the message says that the work is done and can be pushed later.
    """
    patterns = {_SHARD.sub("-[0-9]*-of-[0-9]*", glob.escape(name)) for name in names}
    with _one_sentence(
        f"pushing to {repo_id} failed", f"{folder} is complete; start the same command again to push it"
    ):
        HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type=repo_type,
            commit_message=message,
            allow_patterns=[*patterns, *(f"{pattern}/*" for pattern in patterns)],
            ignore_patterns=["*.partial", "*.partial/*"],
            delete_patterns=[pattern for pattern in patterns if "-[0-9]*-of-[0-9]*" in pattern] or None,
        )
    return f"{HfApi().endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"


def push_files(folder: str | Path, repo_id: str, names: Iterable[str], *, repo_type: str, message: str) -> None:
    """Upload these files of a folder and touch no others. Raises UserError if the Hub or the network refuses."""
    with _one_sentence(f"pushing to {repo_id} failed"):
        HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type=repo_type,
            commit_message=message,
            allow_patterns=[glob.escape(name) for name in names],
        )


def push_results(repo_id: str, results: Iterable[Result]) -> str:
    """Put figures into the metadata of a model's card, and return the page's address.

    Figures that are there stay; those of the same split and measure are replaced. Raises UserError if the Hub or the
    network refuses.
    """
    entries, title = [entry for result in results for entry in _eval_results(result)], PurePath(repo_id).name
    with _one_sentence(
        f"pushing to {repo_id} failed", "the evaluation is complete; start the same command again to push it"
    ):
        api = HfApi()
        if not api.file_exists(repo_id, "README.md"):  # the library would make one full of gaps
            card = f"# {title}\n".encode()
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo_id, commit_message="Card")
        if entries:
            index = {"model-index": eval_results_to_model_index(title, entries)}
            metadata_update(repo_id, index, overwrite=True, commit_message="Results of an evaluation")
    return f"{api.endpoint}/{repo_id}"


def model_card(
    name: str,
    base: str,
    description: str,
    arguments: Mapping[str, object],
    *,
    relation: str = "Teacher",
    datasets: Iterable[str] = (),
    languages: Iterable[str] = (),
    results: Iterable[Result] = (),
    facts: Mapping[str, object] | None = None,
) -> str:
    """A model's README.md: whose student it is, what it learnt from, how it was made and what it reached.

    name is its repository id or folder; relation says what the base model is to it; facts are further lines
    (parameters, hours of audio). Folders of this machine appear by their last name only, and only names on the Hub
    become links; no license is claimed.
    """
    datasets, results = list(dict.fromkeys(datasets)), list(results)
    title = PurePath(name).name
    metadata = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        datasets=[dataset for dataset in datasets if is_hub_id(dataset)] or None,
        eval_results=[entry for result in results for entry in _eval_results(result)] or None,
        language=_language_codes(languages) or None,
        library_name="transformers",
        metrics=sorted({metric for result in results for metric in result.metrics if metric in ("wer", "cer")})
        or None,
        model_name=title if results else None,
        pipeline_tag=TASK,
        tags=["whisper", "distillation", TASK],
    ).to_yaml()
    about = {relation: public_name(base), "Data": ", ".join(map(public_name, datasets)), **(facts or {})}
    use = (
        "```python\nfrom transformers import pipeline\n\n"
        f'transcribe = pipeline("{TASK}", model="{public_name(name)}")\nprint(transcribe("audio.wav")["text"])\n```'
    )
    return _sections(
        f"---\n{metadata}\n---\n\n# {title}\n\n{description}\n\n{_facts(about)}",
        ("Use", use),
        ("Results", _table([_result_row(result) for result in results])),
        ("Arguments", _arguments(arguments)),
    )


def dataset_card(
    name: str,
    teacher: str,
    sources: Iterable[str],
    arguments: Mapping[str, object],
    *,
    splits: Iterable[Mapping[str, object]] = (),
    columns: Mapping[str, str] | None = None,
    facts: Mapping[str, object] | None = None,
) -> str:
    """The text of a labelled dataset's README.md, to be put below its YAML block.

    splits are the rows of a table (config, split, rows, hours, wer ...); columns says what the added columns mean.
    Folders of this machine appear by their last name only.
    """
    about = {"Teacher": public_name(teacher), "Audio": ", ".join(map(public_name, sources)), **(facts or {})}
    use = f'```python\nfrom datasets import load_dataset\n\ndataset = load_dataset("{public_name(name)}")\n```'
    return _sections(
        f"# {PurePath(name).name}\n\nSpeech with transcripts generated by a Whisper teacher, for distillation.\n\n"
        f"{_facts(about)}",
        ("Use", use),
        ("Splits", _table(list(splits))),
        ("Columns", _table([{"column": column, "meaning": meaning} for column, meaning in (columns or {}).items()])),
        ("Arguments", _arguments(arguments)),
    )


def is_hub_id(name: str) -> bool:
    """Whether a name of a model or dataset means a repository on the Hub rather than files of this machine."""
    return not os.path.exists(name) and _HUB_ID.fullmatch(name) is not None


def public_name(name: str) -> str:
    """A model's or dataset's name as others may read it: a URL, a file or a folder of this machine by its last name
    only."""
    if "://" in name:
        return name.rstrip("/").rpartition("/")[2]
    local = os.path.isabs(name) or name.startswith(("~", ".")) or os.path.exists(name)
    return (PurePath(name).name or Path(name).resolve().name) if local and name else name


def _check_name(repo_id: str, argument: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        valid = re.sub(r"-{2,}|\.{2,}", "-", re.sub(r"[^\w./-]+", "-", repo_id, flags=re.ASCII)).strip("-./")[:96]
        raise UserError(
            f"{argument} {repo_id}, which cannot name a repository (allowed: letters, digits, - _ . and one "
            f"namespace/); give --hub_model_id {valid or 'my-model'}"
        ) from error


@contextlib.contextmanager
def _one_sentence(what: str, remedy: str = "") -> Iterator[None]:
    """Turn the library's errors into one sentence. The request, which carries the token, is left out of it."""
    try:
        yield
    except _FAILURES as error:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            said = error.server_message or str(error).splitlines()[0]
            reason = f"the Hub answered {error.response.status_code}: {' '.join(said.split())}"
        else:
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            reason = (str(cause).splitlines() or [type(cause).__name__])[0].strip()
        raise UserError(f"{what}: {reason.rstrip('.')}{f'; {remedy}' if remedy else ''}") from error


def _language_codes(languages: Iterable[str]) -> list[str]:
    """Languages by code or name as the Hub takes them: it refuses a card with anything but codes."""
    codes = [TO_LANGUAGE_CODE.get(language.lower(), language.lower()) for language in languages]
    return sorted({code for code in codes if re.fullmatch("[a-z]{2,3}", code)})


def _eval_results(result: Result) -> list[EvalResult]:
    name = public_name(result.dataset)
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=name,
            dataset_name=name,
            dataset_config=result.config,
            dataset_split=result.split,
            metric_type=metric,
            metric_value=round(value, 2),
        )
        for metric, value in result.metrics.items()
        if metric in ("wer", "cer")
    ]


def _result_row(result: Result) -> dict[str, object]:
    figures = {metric: f"{value:.2f}" for metric, value in result.metrics.items()}
    config = {"config": result.config} if result.config else {}
    return {"dataset": public_name(result.dataset), **config, "split": result.split, **figures, **result.facts}


def _arguments(arguments: Mapping[str, object]) -> str:
    """A table of what was set; where files lie and who is told concerns nobody else."""
    rows = [
        {"argument": f"`--{name}`", "value": _public_value(value)}
        for name, value in arguments.items()
        if name not in _LOCAL_ARGUMENTS and value not in (None, "", [])
    ]
    return _table(rows)


def _public_value(value) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(_public_value(item) for item in value)
    return "+".join(public_name(part) for part in value.split("+")) if isinstance(value, str) else str(value)


def _facts(facts: Mapping[str, object]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value not in (None, ""))


def _sections(opening: str, *sections: tuple[str, str]) -> str:
    """Markdown of an opening and titled sections; empty sections are left out."""
    return "\n\n".join([opening, *(f"## {title}\n\n{body}" for title, body in sections if body)]) + "\n"


def _table(rows: list[Mapping[str, object]]) -> str:
    """A Markdown table with a column for every key that a row has; empty without rows."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
