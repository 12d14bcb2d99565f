"""One reader for every source: the same units, rows and identities whether streamed or not, and errors that help."""

import csv
import functools
import itertools
import json
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Utterance, launch, write_audio_dataset
from datasets import Audio, Dataset, DatasetDict, Features, Value
from hub_server import HubServer
from torch.utils.data import DataLoader, IterableDataset

from distil_whisper import reading
from distil_whisper.audio import AudioError, decode
from distil_whisper.errors import UserError
from distil_whisper.reading import Source, Unit, require_columns

RATE = 16_000
COUNTS = [5, 2, 4]  # rows of the three Parquet files of the fixtures
PLAIN = {"audio": {"bytes": Value("binary"), "path": Value("string")}, "text": Value("string"), "n": Value("int64")}


@pytest.fixture
def open_source(tmp_path):
    return functools.partial(reading.open_source, cache_dir=str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def spoken(utterances) -> list[Utterance]:
    return utterances[: sum(COUNTS)]


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


MAKERS = [
    make_parquet,
    make_saved,
    make_saved_splits,
    make_json,
    make_json_data,
    make_jsonl,
    make_csv,
    make_folder_of_manifests,
    make_audio_folder,
]


def all_rows(source: Source) -> dict[str, dict]:
    return {
        source.row_id(unit.index, row): values
        for unit in source.units
        for row, values in enumerate(source.rows(unit.index))
    }


@pytest.mark.parametrize("make", MAKERS, ids=[make.__name__.removeprefix("make_") for make in MAKERS])
def test_units_rows_and_ids_do_not_depend_on_streaming(make, tmp_path, spoken, open_source):
    path = make(tmp_path, spoken)
    whole, streamed = (open_source(str(path), streaming=streaming, rows_per_unit=4) for streaming in (False, True))
    rows = all_rows(whole)
    assert rows == all_rows(streamed)
    assert list(rows) == list(all_rows(streamed))
    assert [(unit.index, unit.of) for unit in whole.units] == [(unit.index, unit.of) for unit in streamed.units]
    assert len(whole.units) == 3 and whole.num_rows == len(spoken)
    assert whole.label == streamed.label == f"{path.name}/default/train"
    assert next(iter(rows)) == f"{path.name}/default/train/00000-00000000"
    assert [(row["text"], row["n"]) for row in rows.values()] == [(u.text, n) for n, u in enumerate(spoken)]
    assert whole.features == streamed.features and whole.column_names == list(next(iter(rows.values())))
    assert whole.features["audio"] == Audio(decode=False)
    for row, utterance in zip(rows.values(), spoken, strict=True):
        assert set(row["audio"]) == {"bytes", "path"}
        np.testing.assert_allclose(decode(row["audio"], RATE), utterance.samples, atol=1e-4)
    assert streamed.dataset is None
    assert [whole.dataset[i] for i in range(len(spoken))] == list(rows.values())


def test_a_unit_is_an_input_file(tmp_path, spoken, open_source):
    path = str(make_parquet(tmp_path, spoken))
    assert open_source(path).units == [Unit(0, 3, 5), Unit(1, 3, 2), Unit(2, 3, 4)]
    streamed = open_source(path, streaming=True)
    assert streamed.units == [Unit(0, 3, None), Unit(1, 3, None), Unit(2, 3, None)]
    assert streamed.num_rows is None
    assert [len(list(streamed.rows(index))) for index in range(3)] == COUNTS


def test_locate_finds_the_row_of_the_whole_dataset(tmp_path, spoken, open_source):
    source = open_source(str(make_parquet(tmp_path, spoken)))
    located = [source.locate(index) for index in range(len(spoken))]
    assert located == [(unit, row) for unit, count in enumerate(COUNTS) for row in range(count)]
    for index in (-1, len(spoken)):
        with pytest.raises(IndexError):
            source.locate(index)


@pytest.mark.parametrize("streaming", [False, True])
def test_some_columns_from_some_row_on(tmp_path, spoken, open_source, streaming):
    source = open_source(str(make_parquet(tmp_path, spoken)), streaming=streaming)
    assert list(source.rows(2, columns=["n"], start=1)) == [{"n": n} for n in (8, 9, 10)]
    assert [row["n"] for row in source.rows(1)] == [5, 6]
    assert list(source.rows(1, start=2)) == list(source.rows(1, start=9)) == []


def test_runs_of_rows_where_there_are_no_files(tmp_path, spoken, open_source):
    manifest = open_source(str(make_json(tmp_path, spoken)), rows_per_unit=5)
    assert [unit.rows for unit in manifest.units] == [5, 5, 1]
    sliced = open_source(str(make_parquet(tmp_path, spoken)), split="train[1:8]", rows_per_unit=5)
    assert [unit.rows for unit in sliced.units] == [5, 2]
    assert [row["n"] for unit in sliced.units for row in sliced.rows(unit.index)] == list(range(1, 8))
    part = open_source(str(tmp_path / "train.json"), split="train[:50%]")
    assert [row["n"] for row in part.rows(0)] == list(range(6))


def test_a_cache_that_another_program_filled(tmp_path, spoken, open_source, monkeypatch):
    path = str(make_parquet(tmp_path, spoken))
    monkeypatch.setattr(datasets.config, "SAVE_ORIGINAL_SHARD_LENGTHS", False)
    datasets.load_dataset(path, cache_dir=str(tmp_path / "cache"))
    assert [unit.rows for unit in open_source(path).units] == COUNTS
    assert [unit.rows for unit in open_source(path).units] == COUNTS


@pytest.mark.parametrize("num_proc", [1, 2])
def test_files_without_rows_keep_their_place(tmp_path, spoken, open_source, num_proc):
    path = str(write_parquet(tmp_path / "speech", as_dataset(spoken).data.table, counts=[5, 0, 6, 0]))
    whole = open_source(path, num_proc=num_proc)
    assert [unit.rows for unit in whole.units] == [5, 0, 6, 0]
    assert all_rows(whole) == all_rows(open_source(path, streaming=True))


def test_one_file_is_one_unit(tmp_path, spoken, open_source):
    path = str(write_parquet(tmp_path / "speech", as_dataset(spoken).data.table, counts=[11]))
    assert open_source(path).units == [Unit(0, 1, 11)]
    assert open_source(path, streaming=True).units == [Unit(0, 1, None)]


class Units(IterableDataset):
    """The text of every row, by every worker: a worker's share of a unit must be all of it."""

    def __init__(self, source: Source):
        self.source = source

    def __iter__(self):
        for unit in self.source.units:
            yield [row["text"] for row in self.source.rows(unit.index)]


@pytest.mark.parametrize(
    ("streaming", "method", "workers"), [(True, "spawn", 1), (True, "fork", 2), (False, "fork", 2)]
)
def test_workers_of_a_loader_read_whole_units(tmp_path, spoken, open_source, streaming, method, workers):
    source = open_source(str(make_parquet(tmp_path, spoken)), streaming=streaming)
    loader = DataLoader(Units(source), batch_size=None, num_workers=workers, multiprocessing_context=method)
    units = [[row["text"] for row in source.rows(unit.index)] for unit in source.units]
    assert sorted(loader) == sorted(units * workers)


@pytest.mark.parametrize("make", [make_parquet, make_json])
def test_a_source_survives_pickling(make, tmp_path, spoken, open_source):
    for streaming in (False, True):
        source = open_source(str(make(tmp_path / str(streaming), spoken)), streaming=streaming)
        assert all_rows(pickle.loads(pickle.dumps(source))) == all_rows(source)


def test_streaming_reads_a_file_when_its_rows_are_asked_for(tmp_path, spoken, open_source):
    path = make_parquet(tmp_path, spoken)
    broken = path / "train-00002-of-00003.parquet"
    broken.write_bytes(broken.read_bytes()[:-100])
    streamed = open_source(str(path), streaming=True)
    assert [row["n"] for unit in (0, 1) for row in streamed.rows(unit)] == list(range(7))
    with pytest.raises(UserError, match="unit 2 of speech/default/train cannot be read: "):
        next(streamed.rows(2))
    with pytest.raises(UserError, match=r"speech cannot be read: .*[Pp]arquet"):
        open_source(str(path))


def stored_as(kind: str, spoken: list[Utterance], folder: Path) -> pa.Table:
    """The audio column in the other forms that Parquet files have."""
    table = as_dataset(spoken).data.table
    encoded = [u.encoded() for u in spoken]
    if kind == "audio feature":
        return as_dataset(spoken).cast_column("audio", Audio(sampling_rate=RATE)).data.table
    arrays = {
        "binary": pa.array(encoded, pa.binary()),
        "large binary": pa.array(encoded, pa.large_binary()),
        "only bytes": pa.array([{"bytes": audio} for audio in encoded]),
        "path": pa.array([str(folder / "wavs" / name) for name in write_clips(folder / "wavs", spoken)]),
    }
    return table.replace_schema_metadata(None).set_column(0, "audio", arrays[kind])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["audio feature", "binary", "large binary", "only bytes", "path"])
def test_however_the_audio_is_stored(kind, streaming, tmp_path, spoken, open_source):
    path = write_parquet(tmp_path / "speech", stored_as(kind, spoken, tmp_path))
    source = open_source(str(path), streaming=streaming)
    rows = list(all_rows(source).values())
    assert source.features["audio"] == Audio(decode=False)
    for row, utterance in zip(rows, spoken, strict=True):
        assert list(row["audio"]) == ["bytes", "path"]
        np.testing.assert_allclose(decode(row["audio"], RATE), utterance.samples, atol=1e-4)
    assert streaming or source.dataset[0] == rows[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_no_other_audio_column_is_decoded_either(tmp_path, spoken, open_source, streaming):
    table = as_dataset(spoken).cast_column("audio", Audio()).rename_column("audio", "noisy")
    table = table.add_column("clean", [f"{u.id}.wav" for u in spoken]).cast_column("clean", Audio())
    path = str(write_parquet(tmp_path / "speech", table.data.table))
    source = open_source(path, streaming=streaming, audio_column="clean")
    assert source.features["noisy"] == source.features["clean"] == Audio(decode=False)
    assert next(source.rows(0))["noisy"]["bytes"] == spoken[0].encoded()


def test_the_configs_of_a_readme_and_splits_with_like_names(tmp_path, spoken, open_source):
    table = as_dataset(spoken).data.table
    write_parquet(tmp_path / "set" / "hi", table, "test", [2])
    write_parquet(tmp_path / "set" / "hi", table, "test_ood", [3])
    write_parquet(tmp_path / "set" / "ta", table, "test", [4])
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: hi\n  default: true\n  data_files:\n"
        "  - {split: test, path: hi/test-*}\n  - {split: test_ood, path: hi/test_ood-*}\n"
        "- config_name: ta\n  data_files:\n  - {split: test, path: ta/test-*}\n---\n"
    )
    path = str(tmp_path / "set")
    for streaming in (False, True):
        asked = [(None, "test", 2), ("hi", "test_ood", 3), ("ta", "test", 4)]
        for config, split, count in asked:
            source = open_source(path, config, split, streaming=streaming)
            assert len(all_rows(source)) == count
            assert source.label == f"set/{config or 'hi'}/{split}"
        with pytest.raises(UserError, match=r"has no config tam \(allowed: hi, ta; did you mean ta\?\)"):
            open_source(path, "tam", "test", streaming=streaming)
        with pytest.raises(UserError, match=r"has no split test_oob \(allowed: test, test_ood; did you mean test_ood"):
            open_source(path, "hi", "test_oob", streaming=streaming)
    (tmp_path / "set" / "README.md").write_text((tmp_path / "set" / "README.md").read_text().replace("true", "false"))
    with pytest.raises(UserError, match=r"has several configs, and one must be named \(allowed: hi, ta\)"):
        open_source(path, None, "test")


def test_the_values_of_manifests(tmp_path, open_source):
    (tmp_path / "m.json").write_text(
        json.dumps(
            [
                {"audio": "/abs/a.wav", "text": "a", "n": 1, "x": 1, "tags": ["p"], "none": None},
                {"audio": {"path": "b.wav"}, "text": "7", "n": None, "x": 0.5, "tags": [], "late": True},
                {"audio": None, "text": None, "n": 3, "x": 2, "tags": None},
            ]
        )
    )
    source = open_source(str(tmp_path / "m.json"))
    types = {name: feature.dtype for name, feature in source.features.items() if isinstance(feature, Value)}
    assert types == {"text": "string", "n": "int64", "x": "float64", "none": "string", "late": "bool"}
    rows = list(source.rows(0))
    assert [row["audio"]["path"] for row in rows] == ["/abs/a.wav", str(tmp_path / "b.wav"), None]
    assert [row["n"] for row in rows] == [1, None, 3] and [row["x"] for row in rows] == [1, 0.5, 2]
    assert [row["late"] for row in rows] == [None, True, None]
    (tmp_path / "m.csv").write_text('audio,text,id,n,x\na.wav,"one, ""two""",007,-1,.5\nb.wav,,008,,1.0e-4\n')
    values = [{**row, "audio": None} for row in open_source(str(tmp_path / "m.csv")).rows(0)]
    assert values == [
        {"audio": None, "text": 'one, "two"', "id": "007", "n": -1, "x": 0.5},
        {"audio": None, "text": "", "id": "008", "n": None, "x": 1e-4},
    ]


def test_a_row_whose_audio_is_missing_is_left_to_the_decoder(tmp_path, open_source):
    (tmp_path / "m.jsonl").write_text('{"audio": "gone.wav"}\n\n{"audio": null}\n')
    gone, none = open_source(str(tmp_path / "m.jsonl")).rows(0)
    with pytest.raises(AudioError, match=r"missing file .*gone\.wav"):
        decode(gone["audio"], RATE)
    with pytest.raises(AudioError, match="no audio"):
        decode(none["audio"], RATE)


def test_common_voice_as_it_is_distributed(tmp_path, spoken, open_source):
    names = write_clips(tmp_path / "hi" / "clips", spoken, "mp3")
    lines = [f'{name}\t"{u.text}\t2' for name, u in zip(names, spoken, strict=True)]
    (tmp_path / "hi" / "train.tsv").write_text("\n".join(["path\tsentence\tup_votes", *lines]))
    for name in (tmp_path / "hi", tmp_path / "hi" / "train.tsv"):
        rows = list(open_source(str(name), "hi", audio_column="path").rows(0))
        assert [row["sentence"] for row in rows] == [f'"{u.text}' for u in spoken]
        assert {row["up_votes"] for row in rows} == {2}
        assert len(decode(rows[0]["path"], RATE)) == pytest.approx(len(spoken[0].samples), abs=1200)


MALFORMED = [
    ("m.json", "", "m.json holds no rows"),
    ("m.json", "[]", "m.json holds no rows"),
    ("m.json", '[{"audio": "a.wav"},\n{"audio": }]', "m.json is not valid JSON at line 2: Expecting value"),
    ("m.jsonl", '{"audio": "a.wav"}\n{"audio": ', "m.jsonl is not valid JSON at line 2: Expecting value"),
    ("m.json", '"a.wav"', "m.json must hold a list of rows, not a str"),
    ("m.json", '[{"audio": "a.wav"}, 3]', "row 1 of .*m.json must be names and values, not a int"),
    ("m.json", '[{"audio": 3}]', "row 0 of .*m.json must give its audio as a path, not as a int"),
    ("m.json", '[{"audio": "a", "n": 1}, {"audio": "b", "n": "x"}]', "column n of .*m.json mixes values .*: int, str"),
    ("m.json", '[{"audi": "a"}]', r"--audio_column_name audio is not a column of .*did you mean audi\?"),
    ("m.csv", "audio,text\na.wav\n", "row 0 of .*m.csv has not as many cells as the first line has names"),
    ("m.csv", "audio,text\na.wav,b\nc.wav,d,e\n", "row 1 of .*m.csv has not as many cells"),
    ("m.csv", b"audio,text\na.wav,\xff\n", "m.csv cannot be read: 'utf-8' codec"),
    ("m.txt", "audio", r"m.txt is not a manifest: the name of one ends in \.json, \.jsonl, \.csv, \.tsv"),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED)
def test_manifests_that_cannot_be_read(name, content, message, tmp_path, open_source):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as error:
        open_source(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_an_audio_folder_without_metadata(tmp_path, spoken, open_source):
    for speaker, part in (("b", spoken[:2]), ("a", spoken[2:5])):
        write_clips(tmp_path / "set" / speaker, part, "flac")
    (tmp_path / "set" / "notes.txt").write_text("not audio")
    source = open_source(str(tmp_path / "set"))
    rows = list(source.rows(0))
    expected = [f"a/{u.id}.flac" for u in spoken[2:5]] + [f"b/{u.id}.flac" for u in spoken[:2]]
    assert source.column_names == ["audio", "file_name"]
    assert [row["file_name"] for row in rows] == expected
    np.testing.assert_allclose(decode(rows[0]["audio"], RATE), spoken[2].samples, atol=1e-4)


def test_the_splits_of_an_audio_folder(tmp_path, spoken, open_source):
    for split, part in (("train", spoken[:3]), ("test", spoken[3:5]), ("test_ood", spoken[5:6])):
        write_clips(tmp_path / "set" / split, part)
    (tmp_path / "set" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"test/{u.id}.wav,{u.text}\n" for u in reversed(spoken[3:5]))
    )
    path = str(tmp_path / "set")
    assert [row["file_name"] for row in open_source(path, split="train").rows(0)] == [
        f"{u.id}.wav" for u in spoken[:3]
    ]
    assert [row["text"] for row in open_source(path, split="test").rows(0)] == [spoken[4].text, spoken[3].text]
    assert open_source(path, split="test_ood").num_rows == 1
    with pytest.raises(UserError, match=r"has no split dev \(allowed: test, test_ood, train\)"):
        open_source(path, split="dev")
    (tmp_path / "set" / "train" / "metadata.csv").write_text("filename,text\na.wav,a\n")
    with pytest.raises(UserError, match=r"row 0 of .*metadata.csv has no file_name .*did you mean filename\?"):
        open_source(path)


def test_packed_audio_files_are_to_be_unpacked(tmp_path, spoken, open_source):
    write_clips(tmp_path / "clips", spoken[:2])
    (tmp_path / "set").mkdir()
    shutil.make_archive(str(tmp_path / "set" / "train"), "zip", tmp_path / "clips")
    for streaming in (False, True):
        with pytest.raises(UserError, match="set holds audio files that are not on this disk, or packed; fetch or"):
            open_source(str(tmp_path / "set"), streaming=streaming)


def refuse_the_network(*_, **__):
    raise AssertionError("a name that is a path was looked for on the Hub")


MISSING = ["./speech", "../speech", "/no/such/speech", "~/speech", "a/b/speech", "train.json", "data/train.csv"]


@pytest.mark.parametrize("name", MISSING)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name, open_source, monkeypatch):
    monkeypatch.setattr(reading, "load_dataset_builder", refuse_the_network)
    with pytest.raises(UserError, match=f"there is no file or folder {name}"):
        open_source(name)


def test_errors_name_the_nearest_valid_choice(tmp_path, spoken, open_source):
    path = str(make_parquet(tmp_path, spoken))
    with pytest.raises(UserError, match=r"there is no file or folder .*/speach; did you mean .*/speech\?"):
        open_source(path.replace("speech", "speach"))
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"has no split tran \(allowed: train; did you mean train\?\)"):
            open_source(path, split="tran", streaming=streaming)
        with pytest.raises(UserError, match=r"has no config hi \(allowed: default\)"):
            open_source(path, "hi", streaming=streaming)
        with pytest.raises(
            UserError, match=r"--audio_column_name adio .* \(allowed: audio, n, text; did you mean aud"
        ):
            open_source(path, audio_column="adio", streaming=streaming)
    with pytest.raises(UserError, match=r"a slice of a split \(train\[:3\]\) cannot be streamed"):
        open_source(path, split="train[:3]", streaming=True)
    for name in (path, str(make_json(tmp_path, spoken))):
        with pytest.raises(UserError, match=r"train\[:3"):
            open_source(name, split="train[:3")
    shutil.rmtree(path)
    make_saved_splits(tmp_path, spoken)
    with pytest.raises(UserError, match=r"has no split tests \(allowed: test, train; did you mean test\?\)"):
        open_source(str(tmp_path / "saved"), split="tests")


def test_required_columns(tmp_path, spoken, open_source):
    source = open_source(str(make_parquet(tmp_path, spoken)))
    require_columns(source, text_column_name="text", id_column_name=None, speaker_id_column_name="n")
    message = r"--text_column_name test is not a column of speech/default/train \(.*did you mean text\?\)"
    with pytest.raises(UserError, match=message):
        require_columns(source, id_column_name="n", text_column_name="test")


PROBE = """
import sys
from distil_whisper.errors import exit_on_user_error
from distil_whisper.reading import open_source

def main():
    for streaming in (False, True):
        source = open_source(sys.argv[1], split="train", streaming=streaming)
        for unit in source.units:
            for row, values in enumerate(source.rows(unit.index)):
                print(streaming, source.row_id(unit.index, row), values["text"], len(values["audio"]["bytes"]))

exit_on_user_error(main)
"""


def test_datasets_of_the_hub(tmp_path, spoken):
    (tmp_path / "probe.py").write_text(PROBE)
    make_parquet(tmp_path, spoken)
    with HubServer() as hub:
        hub.add("someone/digits", tmp_path / "speech", "dataset")
        environment = hub.environment(tmp_path)
        read = launch(tmp_path / "probe.py", "someone/digits", env=environment)
        unknown = launch(tmp_path / "probe.py", "someone/digit", env=environment)
    places = [(unit, row) for unit, count in enumerate(COUNTS) for row in range(count)]
    assert read.stdout.splitlines() == [
        f"{streaming} someone/digits/default/train/{unit:05d}-{row:08d} {u.text} {len(u.encoded())}"
        for streaming in (False, True)
        for (unit, row), u in zip(places, spoken, strict=True)
    ]
    assert (read.code, unknown.code) == (0, 2)
    missing = "there is no dataset someone/digit: no such folder, and none on the Hub that you may read"
    assert unknown.stderr.strip().splitlines()[-1] == f"error: {missing}"


def test_a_hub_that_cannot_be_reached(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    ended = launch(tmp_path / "probe.py", "someone/digits", env={"HF_HOME": str(tmp_path)})
    assert ended.code == 2
    assert ended.stderr.strip() == (
        "error: there is no folder someone/digits, and the Hub cannot be reached for a dataset of that name"
    )


def test_a_changed_folder_is_read_as_it_is_now(tmp_path, utterances, open_source):
    """datasets' own cache knows a local folder by its last name and its README.md alone."""
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n---\n"
    texts = []
    for place, part in (("one", utterances[:2]), ("two", utterances[2:5]), ("one", utterances[5:6])):
        folder = write_audio_dataset(tmp_path / place / "speech", part, files=1)
        (folder / "README.md").write_text(readme)
        source = open_source(str(folder))
        texts.append([row["text"] for row in source.rows(0)])
    assert texts == [[u.text for u in part] for part in (utterances[:2], utterances[2:5], utterances[5:6])]
