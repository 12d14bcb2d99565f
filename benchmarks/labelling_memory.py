"""Show that labelling's memory does not grow with the data: peak memory after few and after many shards.

python benchmarks/labelling_memory.py --json labelling_memory.json

Makes shards of about 100 MB (48 kHz stereo noise) and an untrained toy teacher, and lets run_pseudo_labelling.py
stream --few and --many of them, each in a process of its own.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from measuring import machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import toy_whisper

ROOT = Path(__file__).resolve().parent.parent
WINDOW_S, RATE = 4, 48_000


def write_shards(folder: Path, count: int, megabytes: int) -> None:
    """So many Parquet files of noise, each row almost as long as the toy's window."""
    draw = np.random.default_rng(0)
    buffer = io.BytesIO()
    noise = draw.standard_normal((int((WINDOW_S - 0.1) * RATE), 2)) * 0.1
    soundfile.write(buffer, noise, RATE, "PCM_24", format="WAV")
    data = buffer.getvalue()
    rows = max(megabytes * 1_000_000 // len(data), 1)
    for number in range(count):
        # a last byte of its own keeps Parquet from storing the row once
        audio = [{"bytes": data[:-4] + row.to_bytes(4, "big"), "path": None} for row in range(rows)]
        path = folder / "data" / f"train-{number:05d}-of-{count:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, pa.table({"audio": audio[:1]}).schema) as writer:
            for first in range(0, rows, 10):
                writer.write_table(pa.table({"audio": audio[first : first + 10]}))


def label(folder: Path, shards: int, megabytes: int) -> dict:
    """Label that many shards in a process of its own: its peak memory, and what it wrote."""
    data, output = folder / f"speech-{shards}", folder / f"labelled-{shards}"
    write_shards(data, shards, megabytes)
    flags = ["--model_name_or_path", folder / "teacher", "--dataset_name", data, "--language", "en", "--streaming"]
    flags += ["--max_label_length", 4, "--max_truncated", 100, "--report_to", "none", "--logging_steps", 8]
    flags += ["--output_dir", output]
    command = [sys.executable, ROOT / "run_pseudo_labelling.py", *flags]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"labelling {shards} shards ended with {process.returncode}")
    size = sum(path.stat().st_size for path in (output / "default").glob("*.parquet"))
    return {"shards": shards, "input_gb": _size(data) / 1e9, "output_gb": size / 1e9, "peak_gb": usage.ru_maxrss / 1e6}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.parquet"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=2)
    parser.add_argument("--many", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=100, help="Size of a shard.")
    parser.add_argument("--json", help="File for the results.")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        toy_whisper.save(Path(folder) / "teacher", ["one two three"], WINDOW_S, d_model=64)
        runs = [label(Path(folder), count, args.megabytes) for count in (args.few, args.many)]
    print(machine())
    for run in runs:
        print(
            f"{run['shards']:>4} shards: {run['input_gb']:.2f} GB read, {run['output_gb']:.2f} GB written, "
            f"peak memory {run['peak_gb']:.2f} GB"
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), "runs": runs}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
