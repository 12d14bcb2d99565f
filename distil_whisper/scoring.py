"""The figures of an evaluation, all of them from its rows as they were transcribed and the timings of its batches."""

from distil_whisper.alignment import word_errors
from distil_whisper.batch_log import Transcribed
from distil_whisper.metrics import RATES, score
from distil_whisper.normalisation import Normaliser
from distil_whisper.recordings import TOO_LONG


def predictions(found: Transcribed, normalise: Normaliser) -> list[dict]:
    """The rows in the order of the source: what was said, what was heard, and the normalised word errors."""
    return [_with_errors(row, normalise) for _, row in sorted(found.rows.items())]


def _with_errors(row: dict, normalise: Normaliser) -> dict:
    errors = word_errors(normalise(row["reference"]), normalise(row["prediction"]))
    return {
        **{name: row[name] for name in ("row_id", "reference", "prediction")},
        "errors": errors.errors,
        "reference_words": errors.reference_words,
        "wer": round(errors.rate, 4),
        **row,
    }


def figures(found: Transcribed, normalise: Normaliser) -> dict:
    """What is reported of a split: rates in percent, counts, what was skipped and why, seconds and RTFx."""
    rows = [row for _, row in sorted(found.rows.items())]
    rates = score([row["prediction"] for row in rows], [row["reference"] for row in rows], normalise)
    timed = [timing for timing in found.timings if not timing.warm_up] or found.timings
    audio, compute = (sum(getattr(timing, f"{what}_seconds") for timing in timed) for what in ("audio", "compute"))
    skipped = [problem for _, problem in sorted(found.problems.items()) if problem[1] != TOO_LONG]
    return {
        **{name: round(value, 4) if name in RATES and value is not None else value for name, value in rates.items()},
        "truncated": sum(row.get("truncated", False) for row in rows),
        "too_long": len(found.problems) - len(skipped),
        "skipped": len(skipped),
        "skipped_rows": [{"row_id": row_id, "reason": reason} for row_id, reason in skipped],
        "audio_seconds": round(sum(row["seconds"] for row in rows), 2),
        "timed_audio_seconds": round(audio, 2),
        "timed_compute_seconds": round(compute, 3),
        "rtfx": round(audio / compute, 2) if compute else None,
    }
