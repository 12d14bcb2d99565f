"""What labelling takes beside decoding: reading, packing, word errors, files.

python benchmarks/labelling_host.py --json labelling_host.json

A decoder stands in for a GPU: it takes as long as one that decodes --pace seconds of windows a second (0: no time at
all), and no CPU. Clips of 6 s in MP3 are labelled as they are, a window each, and packed, by one process without
workers and with --workers. Printed are seconds of audio a second, and seconds of windows, which have 30 s whatever is
in them.
"""

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from measuring import machine, write_json

from distil_whisper.decoding import Decoded
from distil_whisper.handoff import schema, shard_writer
from distil_whisper.labelling import Columns, LabellingSettings, Tally, UnitAtWork, UnitLabeller, label_units
from distil_whisper.models import LoadedWhisper, load_whisper
from distil_whisper.normalisation import Normalisers
from distil_whisper.reading import Source, open_source

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import toy_whisper

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CLIP_S, CLIP_WORDS, WINDOW_S, RATE = 6, 15, 30, 44_100
COLUMNS = Columns("audio", "text", "id", "speaker")


def write_clips(folder: Path, shards: int, clips: int) -> None:
    """Noise and made-up transcripts, of speakers with 40 clips each."""
    draw = np.random.default_rng(0)
    sounds = []
    for _ in range(8):  # encoding takes longer than all else
        buffer = io.BytesIO()
        soundfile.write(buffer, draw.standard_normal(CLIP_S * RATE) * 0.1, RATE, format="MP3")
        sounds.append({"bytes": buffer.getvalue(), "path": None})
    for number in range(shards):
        rows = []
        for clip in range(clips):
            words = {"text": " ".join(draw.choice(WORDS, CLIP_WORDS)), "id": f"{number}-{clip}"}
            rows.append({"audio": sounds[clip % len(sounds)], **words, "speaker": str(clip // 40)})
        path = folder / f"train-{number:05d}-of-{shards:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)


class StandIn:
    """Takes a GPU's time for each window, and says the same of all."""

    def __init__(self, whisper: LoadedWhisper, pace: float):
        self.grammar, self.pace = whisper.grammar, pace
        text = "<|0.00|> " + " ".join(WORDS * 7) + "<|29.00|>"
        self.said = Decoded(self.grammar.encode_pseudo_label(text).ids, False, -0.1, 0.01, "en")

    def __call__(self, waveforms: torch.Tensor, _language, _task) -> list[Decoded]:
        if self.pace:
            time.sleep(len(waveforms) * WINDOW_S / self.pace)
        return [self.said] * len(waveforms)


def pace_of(whisper: LoadedWhisper, source: Source, packed: bool, workers: int, args) -> dict[str, float]:
    """Label all shards: seconds of audio and of windows a second."""
    settings = LabellingSettings("en", "transcribe", packed, False, True, args.batch_size, workers)
    kept = COLUMNS.kept_in_windows() if packed else None
    features, renamed = schema(source.features, kept, COLUMNS.audio, COLUMNS.text)
    rules = Normalisers(None, whisper.tokenizer)
    labeller = UnitLabeller(whisper, StandIn(whisper, args.pace), COLUMNS, settings, rules, renamed)
    units = [UnitAtWork(labeller, source, unit.index, Tally()) for unit in source.units]
    with tempfile.TemporaryDirectory() as folder, shard_writer(Path(folder) / "rows.parquet", features) as write:
        began = time.perf_counter()
        for _ in label_units(units, lambda _, rows: [write(row) for row in rows or ()], workers):
            pass
        took = time.perf_counter() - began
    tallies = [unit.tally for unit in units]
    windows = WINDOW_S * sum(tally.rows for tally in tallies)
    return {"audio": sum(tally.seconds for tally in tallies) / took, "windows": windows / took}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pace", type=float, default=0.0, help="Seconds of windows that the stand-in decodes a second."
    )
    parser.add_argument("--workers", type=int, default=4, help="As --dataloader_num_workers of labelling.")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--clips", type=int, default=800, help="Of 6 s each in a shard.")
    parser.add_argument("--json", help="File for the results.")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_clips(data, args.shards, args.clips)
        toy_whisper.save(Path(folder) / "teacher", [" " + " ".join(WORDS)], WINDOW_S, d_model=16, heads=2)
        whisper = load_whisper(str(Path(folder) / "teacher"), device="cpu")
        source = open_source(str(data), streaming=True)
        result = {"machine": machine(), "pace": args.pace, "workers": args.workers}
        print(f"{result['machine']}; a stand-in that decodes {args.pace or 'any number of'} s of windows a second")
        for name, packed in (("clips", False), ("packed", True)):
            for workers in (0, args.workers):
                found = result[f"{name}, {workers} workers"] = pace_of(whisper, source, packed, workers, args)
                print(
                    f"{name:8}{workers} workers {found['audio']:>8.0f} audio s/s, {found['windows']:>8.0f} in windows"
                )
    write_json(args, result)


if __name__ == "__main__":
    main()
