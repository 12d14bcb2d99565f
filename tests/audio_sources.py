"""The same utterances as every kind of source that is read: Parquet, save_to_disk, manifests, audio folders."""

import csv
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import Utterance
from datasets import Audio, Dataset, DatasetDict, Features, Value

RATE = 16_000
COUNTS = [5, 2, 4]  # rows of the three Parquet files that make_parquet writes
PLAIN = {"audio": {"bytes": Value("binary"), "path": Value("string")}, "text": Value("string"), "n": Value("int64")}


def columns_of(utterances: list[Utterance]) -> dict:
    return {
        "audio": [{"bytes": u.encoded(), "path": f"{u.id}.wav"} for u in utterances],
        "text": [u.text for u in utterances],
        "n": list(range(len(utterances))),
    }


def as_dataset(utterances: list[Utterance]) -> Dataset:
    return Dataset.from_dict(columns_of(utterances), features=Features(PLAIN))


def write_parquet(folder: Path, table: pa.Table, split: str = "train", counts: list[int] = COUNTS) -> Path:
    """Files of so many rows each; a file of none has a schema and no row group."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = list(itertools.accumulate(counts))
    for index, (end, count) in enumerate(zip(ends, counts, strict=True)):
        name = folder / f"{split}-{index:05d}-of-{len(counts):05d}.parquet"
        with pq.ParquetWriter(name, table.schema) as writer:
            if count:
                writer.write_table(table.slice(end - count, count))
    return folder


def write_clips(folder: Path, utterances: list[Utterance], format: str = "wav") -> list[str]:
    folder.mkdir(parents=True)
    for u in utterances:
        (folder / f"{u.id}.{format}").write_bytes(u.encoded(format.upper()))
    return [f"{u.id}.{format}" for u in utterances]


def make_parquet(folder, spoken):
    return write_parquet(folder / "speech", as_dataset(spoken).data.table)


def make_saved(folder, spoken):
    as_dataset(spoken).save_to_disk(folder / "saved")
    return folder / "saved"


def make_saved_splits(folder, spoken):
    splits = DatasetDict({"train": as_dataset(spoken), "test": as_dataset(spoken[:2])})
    splits.cast_column("audio", Audio(sampling_rate=RATE)).save_to_disk(folder / "saved")
    return folder / "saved"


def manifest_rows(folder, spoken):
    names = write_clips(folder / "wavs", spoken)
    return [
        {"audio": f"wavs/{name}", "text": u.text, "n": i}
        for i, (name, u) in enumerate(zip(names, spoken, strict=True))
    ]


def make_json(folder, spoken):
    (folder / "train.json").write_text(json.dumps(manifest_rows(folder, spoken)))
    return folder / "train.json"


def make_json_data(folder, spoken):
    (folder / "train.json").write_text(json.dumps({"version": 1, "data": manifest_rows(folder, spoken)}))
    return folder / "train.json"


def make_jsonl(folder, spoken):
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, manifest_rows(folder, spoken))) + "\n")
    return folder / "train.jsonl"


def make_csv(folder, spoken):
    with open(folder / "train.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["audio", "text", "n"])
        writer.writeheader()
        writer.writerows(manifest_rows(folder, spoken))
    return folder / "train.csv"


def make_folder_of_manifests(folder, spoken):
    return make_csv(folder, spoken).parent


def make_audio_folder(folder, spoken):
    lines = [{**row, "file_name": row.pop("audio")} for row in manifest_rows(folder / "folder" / "train", spoken)]
    (folder / "folder" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "folder"
