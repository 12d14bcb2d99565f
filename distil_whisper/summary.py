"""What a labelled split came to, read from its finished shards."""

from collections import Counter
from collections.abc import Callable

from distil_whisper.alignment import Errors, count_errors
from distil_whisper.handoff import ShardFile, labelled_rows, read_manifest
from distil_whisper.normalisation import Normaliser
from distil_whisper.outputs import OutputFolder
from distil_whisper.tokens import plain_text


def summarise(
    folder: OutputFolder,
    shards: list[ShardFile],
    text_column: str | None,
    normalisers: Callable[[str | None], Normaliser],
    window_seconds: float,
) -> dict:
    """Rows, hours, how full the windows are on average (in percent), rows read and skipped, truncated labels and their
    percentage, what the teacher was told, and its WER and CER where there are transcripts. Only finished shards count.
    """
    manifests = [manifest for shard in shards if (manifest := read_manifest(folder, shard)) is not None]
    rows, seconds, read = (sum(manifest[name] for manifest in manifests) for name in ("rows", "seconds", "read"))
    summary = {
        "split": f"{shards[0].config}/{shards[0].split}",
        "rows": rows,
        "hours": round(seconds / 3600, 3),
        "mean_fill": round(100 * seconds / (rows * window_seconds), 1) if rows else None,
        "read": read,
        "skipped": sum(len(manifest["skipped"]) for manifest in manifests),
    }
    found = Counter()
    for row in labelled_rows(folder, shards, ["truncated", "language", "task"]):
        found.update([("truncated", row["truncated"]), ("languages", row["language"]), ("tasks", row["task"])])
    summary["truncated"] = found["truncated", True]
    summary["truncated_percent"] = round(100 * found["truncated", True] / rows, 1) if rows else None
    for name in ("languages", "tasks"):
        summary[name] = ", ".join(sorted(told for kind, told in found if kind == name and told)) or None
    return summary | (_error_rates(folder, shards, text_column, normalisers) if text_column else {})


def _error_rates(folder, shards, text_column, normalisers) -> dict:
    """The teacher's WER and CER over a split, normalised; rows without a transcript and translations do not count."""
    totals = {"wer": Errors(0, 0), "cer": Errors(0, 0)}
    names = set()
    for row in labelled_rows(folder, shards, [text_column, "whisper_transcript", "language", "task"]):
        if row[text_column] is None or row["task"] == "translate":
            continue
        normaliser = normalisers(row["language"])
        reference, spoken = normaliser(row[text_column]), normaliser(plain_text(row["whisper_transcript"]))
        names.add(normaliser.name)
        for rate, units in (("wer", str.split), ("cer", normaliser.characters)):
            totals[rate] += count_errors(units(reference), units(spoken))
    if not names:
        return {}
    return {rate: round(errors.rate, 2) for rate, errors in totals.items()} | {"normalizer": ", ".join(sorted(names))}
