"""Gather the quickstart's results into summary.json and print them as a table.

python scripts/quickstart_summary.py outputs/quickstart
"""

import json
import math
import sys
from pathlib import Path

from safetensors import safe_open

from distil_whisper.outputs import write_text

MODELS = ("teacher", "student", "student_without_distillation")
FIGURES = ("short_id", "short_ood", "long_chunked", "long_sequential")


def parameters(folder: Path) -> int:
    """The number of weights of a saved model."""
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        sizes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 (not a dict)
    return sum(math.prod(size) for size in sizes)


def results(out: Path, model: str) -> dict:
    """Size, error rates and speed of a model."""
    short = _datasets(out / "eval" / model / "short" / "short_form_results.json")
    rates = {"short_id": short["test"]["wer"], "short_ood": short["test_ood"]["wer"]}
    for kind in ("long_chunked", "long_sequential"):
        rates[kind] = _datasets(out / "eval" / model / kind / "long_form_results.json")["long"]["wer"]
    wer = {name: round(rate, 2) for name, rate in rates.items()}
    return {"parameters": parameters(out / model), "wer": wer, "rtfx": short["test"]["rtfx"]}


def table(summary: dict) -> str:
    """The summary as a person reads it."""
    header = f"{'':30}{'parameters':>12}" + "".join(f"{name:>17}" for name in FIGURES) + f"{'RTFx':>8}"
    lines = [header]
    for model in MODELS:
        entry = summary[model]
        rates = "".join(f"{entry['wer'][name]:>15.2f} %" for name in FIGURES)
        lines.append(f"{model:30}{entry['parameters']:>12,}{rates}{entry['rtfx']:>8.0f}")
    return "\n".join(
        [*lines, "", f"WER in percent; {sum(summary['seconds'].values())} s in all, installation left out"]
    )


def main(argv: list[str] | None = None) -> None:
    out = Path((argv or sys.argv[1:])[0])
    seconds = {path.name: int(path.read_text()) for path in sorted((out / "finished").iterdir(), key=_written)}
    summary = {**{model: results(out, model) for model in MODELS}, "seconds": seconds}
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(table(summary))


def _datasets(path: Path) -> dict[str, dict]:
    return {entry["split"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["datasets"]}


def _written(path: Path) -> float:
    return path.stat().st_mtime


if __name__ == "__main__":
    main()
