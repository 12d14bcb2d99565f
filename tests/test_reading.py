"""One reader for every source: the same units, rows and identities whether streamed or not, and errors that help."""

import functools
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audio_sources import (
    COUNTS,
    RATE,
    as_dataset,
    make_audio_folder,
    make_csv,
    make_folder_of_manifests,
    make_json,
    make_json_data,
    make_jsonl,
    make_parquet,
    make_saved,
    make_saved_splits,
    write_clips,
    write_parquet,
)
from conftest import ROOT, Utterance, launch, write_audio_dataset
from datasets import Audio, Value
from hub_server import HubServer
from stages import ENGLISH, label, rows_of, run, train_few
from torch.utils.data import DataLoader, IterableDataset

from distil_whisper import reading
from distil_whisper.audio import AudioError, decode
from distil_whisper.errors import UserError
from distil_whisper.reading import Source, Unit, require_columns


@pytest.fixture
def open_source(tmp_path):
    return functools.partial(reading.open_source, cache_dir=str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def spoken(utterances) -> list[Utterance]:
    return utterances[: sum(COUNTS)]


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
    streamed, prepared = (open_source(path, streaming=streaming) for streaming in (True, False))
    files = [(file.name, file.stat().st_size) for file in sorted(Path(path).rglob("*.parquet"))]
    assert prepared.units == [Unit(0, 3, 5, *files[0]), Unit(1, 3, 2, *files[1]), Unit(2, 3, 4, *files[2])]
    assert streamed.units == [Unit(n, 3, None, *file) for n, file in enumerate(files)]
    assert streamed.contents(1) == prepared.contents(1) == f"{files[1][0]}, {files[1][1]:,} bytes"
    assert streamed.num_rows is None
    assert [len(list(streamed.rows(index))) for index in range(3)] == COUNTS
    path = str(write_parquet(tmp_path / "one", as_dataset(spoken).data.table, counts=[11]))
    assert [unit.rows for unit in open_source(path).units] == [11]
    assert [unit.rows for unit in open_source(path, streaming=True).units] == [None]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_may_have_no_rows(tmp_path, spoken, open_source, streaming):
    path = str(write_parquet(tmp_path / "speech", as_dataset(spoken).data.table, counts=[5, 0, 6]))
    source = open_source(path, streaming=streaming)
    assert [len(list(source.rows(unit.index))) for unit in source.units] == [5, 0, 6]
    source.take_counts(source.count_rows())
    assert [len(list(source.rows(unit.index))) for unit in source.units] == [unit.rows for unit in source.units]


def test_the_contents_of_rows_are_what_they_say_and_the_names_of_their_audio(
    tmp_path, spoken, open_source, monkeypatch
):
    found = []
    kinds = [("one", 0, 4), ("one", 0, 4), ("two", 0, 4), ("one", 0, 5), ("one", 1, 4)]
    for number, (text, first, count) in enumerate(kinds):
        folder = tmp_path / str(number)
        names = write_clips(folder, spoken)[first : first + count]
        rows = [{"audio": name, "sentence": text} for name in names]
        (folder / "train.json").write_text(json.dumps(rows))
        monkeypatch.chdir(folder)
        for name in (str(folder / "train.json"), "train.json", f"../{number}/train.json"):
            source = open_source(name, rows_per_unit=4)
            found.append([source.contents(unit.index) for unit in source.units])
    assert found[::3] == found[1::3] == found[2::3]
    first, same, other_text, longer, other_files = found[::3]
    assert first == same != other_text and longer[0] == first[0] != longer[1] and other_files != first


def test_the_first_rows_sound_the_same_wherever_they_lie(tmp_path, spoken, open_source):
    def digest(make, folder, rows=spoken):
        return open_source(str(make(tmp_path / folder, rows))).audio_digest()

    assert digest(make_json, "a") == digest(make_json, "b") != digest(make_json, "c", spoken[1:])
    assert digest(make_parquet, "a") == digest(make_parquet, "b") != digest(make_parquet, "c", spoken[1:] + spoken[:1])
    (tmp_path / "d/wavs").mkdir(parents=True)
    (tmp_path / "d/train.json").write_text('[{"audio": "wavs"}, {"audio": "none.wav"}]')
    assert open_source(str(tmp_path / "d/train.json")).audio_digest() not in ("", digest(make_json, "e"))


@pytest.mark.parametrize(
    ("column", "before"), [("sentence", "rows b5cfaf6c218f73b5"), ("audio", "rows 107444feb6bb236d")]
)
def test_the_contents_begin_as_in_earlier_versions(column, before, tmp_path, spoken, open_source):
    names = write_clips(tmp_path / "set", spoken[:2])
    (tmp_path / "set/train.json").write_text(json.dumps([{"audio": name, column: name} for name in names]))
    assert open_source(str(tmp_path / "set/train.json")).contents(0).startswith(f"{before} of files ")


@pytest.fixture
def in_memory():
    """fsspec's file system of this process, in place of one that is far away."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/", recursive=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_at_a_url(tmp_path, spoken, open_source, in_memory, streaming):
    """Splits by the names of files, a configuration as a folder, one file."""
    path = make_parquet(tmp_path, spoken)
    in_memory.put(f"{path}/", "/bucket/speech/hi/", recursive=True)
    in_memory.pipe("/bucket/speech/hi/README.md", b"---\n---\n")
    expected = open_source(str(path), streaming=streaming)
    source = open_source("memory://bucket/speech", "hi", streaming=streaming)
    assert source.label == "speech/hi/train" and source.units == expected.units
    for counted in (False, True):
        for unit in range(3):
            assert list(source.rows(unit)) == list(expected.rows(unit))
        if not counted:
            source.take_counts(source.count_rows())
    single = open_source("memory://bucket/speech/hi/train-00001-of-00003.parquet", streaming=streaming)
    assert list(single.rows(0)) == list(expected.rows(1)) and len(single.units) == 1
    with pytest.raises(UserError, match=r"speech has no split tset \(allowed: train\)"):
        open_source("memory://bucket/speech", "hi", "tset", streaming=streaming)
    with pytest.raises(UserError, match="no Parquet files can be read at nowhere"):
        open_source("memory://key:secret@bucket/nowhere", streaming=streaming)
    with pytest.raises(UserError, match="no Parquet files can be read at speech"):
        open_source("nothing://bucket/speech", streaming=streaming)


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
    for _ in ("rows of streamed files not counted", "counted"):
        assert list(source.rows(2, columns=["n"], start=1)) == [{"n": n} for n in (8, 9, 10)]
        assert [row["n"] for row in source.rows(1)] == [5, 6]
        assert list(source.rows(1, start=2)) == list(source.rows(1, start=9)) == []
        source.take_counts(source.count_rows())


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


class Units(IterableDataset):
    """The text of every row, by every worker: a worker's share of a unit must be all of it."""

    def __init__(self, source: Source):
        self.source = source

    def __iter__(self):
        for unit in self.source.units:
            yield [row["text"] for row in self.source.rows(unit.index)]


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_of_a_loader_read_whole_units(tmp_path, spoken, open_source, streaming):
    source = open_source(str(make_parquet(tmp_path, spoken)), streaming=streaming)
    loader = DataLoader(Units(source), batch_size=None, num_workers=2, multiprocessing_context="fork")
    units = [[row["text"] for row in source.rows(unit.index)] for unit in source.units]
    assert sorted(loader) == sorted(units + units)


def test_a_fresh_process_reads_a_pickled_source(tmp_path, spoken, open_source):
    paths = [make_parquet(tmp_path / "files", spoken), make_json(tmp_path / "manifest", spoken)]
    sources = [open_source(str(path), streaming=streaming) for path in paths for streaming in (False, True)]
    program = """import json, pickle, sys
        sources = pickle.load(sys.stdin.buffer)
        print(json.dumps([[row["text"] for unit in s.units for row in s.rows(unit.index)] for s in sources]))"""
    command = [sys.executable, "-c", "\n".join(map(str.strip, program.splitlines()))]
    ran = subprocess.run(command, input=pickle.dumps(sources), capture_output=True, cwd=ROOT, check=True)
    assert json.loads(ran.stdout) == 4 * [[u.text for u in spoken]]


def test_streaming_reads_a_file_when_its_rows_are_asked_for(tmp_path, spoken, open_source):
    path = make_parquet(tmp_path, spoken)
    broken = path / "train-00002-of-00003.parquet"
    broken.write_bytes(broken.read_bytes()[:-100])
    streamed = open_source(str(path), streaming=True)
    assert [row["n"] for unit in (0, 1) for row in streamed.rows(unit)] == list(range(7))
    with pytest.raises(UserError, match=r"train-00002-of-00003.parquet of speech/default/train cannot be read: "):
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
    }
    if "path" in kind:
        paths = [str(folder / "wavs" / name) for name in write_clips(folder / "wavs", spoken)]
        arrays |= {"path": pa.array(paths), "large path": pa.array(paths, pa.large_string())}
    return table.replace_schema_metadata(None).set_column(0, "audio", arrays[kind])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["audio feature", "binary", "large binary", "only bytes", "path", "large path"])
def test_however_the_audio_is_stored(kind, streaming, tmp_path, spoken, open_source):
    path = write_parquet(tmp_path / "speech", stored_as(kind, spoken, tmp_path))
    source = open_source(str(path), streaming=streaming)
    rows = list(all_rows(source).values())
    assert source.features["audio"] == (Value("large_string") if kind == "large path" else Audio(decode=False))
    for row, utterance in zip(rows, spoken, strict=True):
        assert list(row["audio"]) == ["bytes", "path"]
        np.testing.assert_allclose(decode(row["audio"], RATE), utterance.samples, atol=1e-4)
    assert streaming or source.row(0) == rows[0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["float32", "float64", "int16", "int32"])
def test_samples_with_their_rate(kind, streaming, tmp_path, spoken, open_source):
    largest = np.iinfo(kind).max if kind.startswith("int") else 1
    rows = [{"array": (u.samples * largest).astype(kind), "sampling_rate": RATE} for u in spoken]
    arrow = pa.struct({"array": pa.list_(pa.from_numpy_dtype(kind)), "sampling_rate": pa.int64()})
    table = as_dataset(spoken).data.table.replace_schema_metadata(None).set_column(0, "audio", pa.array(rows, arrow))
    source = open_source(str(write_parquet(tmp_path / "speech", table)), streaming=streaming)
    for number, (row, utterance) in enumerate(zip(all_rows(source).values(), spoken, strict=True)):
        assert row["audio"]["array"].dtype == kind
        np.testing.assert_allclose(decode(row["audio"], RATE), utterance.samples, atol=1e-4)
        if not streaming:
            np.testing.assert_array_equal(source.row(number)["audio"]["array"], row["audio"]["array"])


def test_samples_of_which_some_are_null(tmp_path, spoken, open_source):
    for values in ([[1, None]], [[[1, 2], [3]]]):
        rows = pa.array([{"array": values[0], "sampling_rate": RATE}] * len(spoken))
        table = as_dataset(spoken).data.table.replace_schema_metadata(None).set_column(0, "audio", rows)
        (tmp_path / "speech.parquet").unlink(missing_ok=True)
        pq.write_table(table, tmp_path / "speech.parquet")
        for row in open_source(str(tmp_path / "speech.parquet")).rows(0):
            with pytest.raises(AudioError, match="NaN or infinite samples"):
                decode(row["audio"], RATE)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([[0.1, 0.2]] * 11, "samples without their sampling rate"),
        (list(range(11)), "no audio, but Value('int64')"),
        (
            [{"array": [True], "sampling_rate": 8}] * 11,
            "no audio, but {'array': List(Value('bool')), 'sampling_rate': Value('int64')}",
        ),
        ([{"samples": [0.1]}] * 11, "no audio, but {'samples': List(Value('float64'))}"),
    ],
)
def test_a_column_that_can_hold_no_audio(values, found, streaming, tmp_path, spoken, open_source):
    table = as_dataset(spoken).data.table.replace_schema_metadata(None).set_column(0, "audio", pa.array(values))
    path = write_parquet(tmp_path / "speech", table)
    with pytest.raises(
        UserError, match=f"column audio of .*speech holds {re.escape(found)}; it must hold files, their"
    ):
        open_source(str(path), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_one_parquet_file_is_whatever_split_is_asked_for(tmp_path, spoken, open_source, streaming):
    file = str(make_parquet(tmp_path, spoken) / "train-00001-of-00003.parquet")
    for split in ("train", "test"):
        source = open_source(file, split=split, streaming=streaming)
        assert source.label == f"train-00001-of-00003.parquet/default/{split}" and len(source.units) == 1
        assert [row["n"] for row in source.rows(0)] == [5, 6]
    with pytest.raises(UserError, match="is a file and has no config hi; leave its config out"):
        open_source(file, "hi", streaming=streaming)
    Path(file).write_bytes(b"no Parquet")
    with pytest.raises(UserError, match=r"cannot be (read|streamed)"):
        list(open_source(file, streaming=streaming).rows(0))


def test_names_that_look_like_patterns(tmp_path, spoken, open_source):
    speech = make_parquet(tmp_path, spoken)
    for name in ("speech [de]", "speech*"):
        folder = speech.rename(tmp_path / name)
        with pytest.raises(UserError, match=r"has one of the characters \* \? \[ in it, .*; rename the folder"):
            open_source(str(folder))
        for streaming in (False, True):
            source = open_source(str(folder / "train-00001-of-00003.parquet"), streaming=streaming)
            assert [row["n"] for row in source.rows(0)] == [5, 6]
        speech = folder
    make_saved(tmp_path / "[de]", spoken)
    make_json(tmp_path / "[de]", spoken)
    for source in (tmp_path / "[de]").iterdir():
        assert open_source(str(source)).num_rows == 11


@pytest.mark.parametrize("split", ["train[11:]", "train[20:30]", "train[3:3]", "train[:0]", "train[5:2]"])
def test_a_slice_without_rows_is_refused(split, tmp_path, spoken, open_source):
    with pytest.raises(UserError, match=re.escape(f"the slice {split} is empty: there are 11 rows")):
        open_source(str(make_json(tmp_path, spoken)), split=split)


def test_a_slice_ends_with_the_rows(tmp_path, spoken, open_source):
    assert open_source(str(make_json(tmp_path, spoken)), split="train[9:50]").num_rows == 2


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
from distil_whisper.errors import UserError
from distil_whisper.reading import open_source

for name in sys.argv[1:]:
    try:
        for streaming in (False, True):
            source = open_source(name, streaming=streaming)
            for unit in source.units:
                for row, values in enumerate(source.rows(unit.index)):
                    print(streaming, source.row_id(unit.index, row), values["text"], len(values["audio"]["bytes"]))
    except UserError as error:
        print(error)
"""


def test_datasets_of_the_hub_and_of_its_cache(tmp_path, spoken):
    (tmp_path / "probe.py").write_text(PROBE)
    make_parquet(tmp_path, spoken)
    names = ("someone/digits", "someone/digit")
    with HubServer() as hub:
        hub.add("someone/digits", tmp_path / "speech", "dataset")
        environment = hub.environment(tmp_path) | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
        online = launch(tmp_path / "probe.py", *names, env=environment)
    offline = launch(tmp_path / "probe.py", *names, env=environment | {"HF_HUB_OFFLINE": "1"})
    places = [(unit, row) for unit, count in enumerate(COUNTS) for row in range(count)]
    lines = [
        f"{streaming} someone/digits/default/train/{unit:05d}-{row:08d} {u.text} {len(u.encoded())}"
        for streaming in (False, True)
        for (unit, row), u in zip(places, spoken, strict=True)
    ]
    unknown = "there is no dataset someone/digit: no such folder, and none on the Hub that you may read"
    unreachable = "there is no folder someone/digit, and the Hub cannot be reached for a dataset of that name"
    assert online.stdout.splitlines() == [*lines, unknown]
    assert offline.stdout.splitlines() == [*lines, unreachable]


def test_a_changed_folder_is_read_as_it_is_now(tmp_path, utterances, open_source):
    """datasets' own cache knows a local folder by its last name and its README.md alone."""
    readme = "---\nconfigs:\n- {config_name: default, data_files: data/train-*.parquet}\n---\n"
    texts = []
    for place, part in (("one", utterances[:2]), ("two", utterances[2:5]), ("one", utterances[5:6])):
        folder = write_audio_dataset(tmp_path / place / "speech", part, files=1)
        (folder / "README.md").write_text(readme)
        source = open_source(str(folder))
        texts.append([row["text"] for row in source.rows(0)])
    assert texts == [[u.text for u in part] for part in (utterances[:2], utterances[2:5], utterances[5:6])]


def test_samples_in_one_parquet_file_go_through_the_stages(taught, student, utterances, tmp_path):
    kept = utterances[:4]
    rows = [{"array": (u.samples * 32767).astype(np.int16), "sampling_rate": 16_000} for u in kept]
    kind = pa.struct({"array": pa.list_(pa.int16()), "sampling_rate": pa.int64()})
    pq.write_table(
        pa.table({"audio": pa.array(rows, kind), "text": [u.text for u in kept]}), tmp_path / "speech.parquet"
    )
    labels = rows_of(label(taught, tmp_path / "speech.parquet", tmp_path / "labels", *ENGLISH))
    assert [row["text"] for row in labels] == [u.text for u in kept]
    for row, u in zip(labels, kept, strict=True):
        np.testing.assert_allclose(decode(row["audio"], 16_000), u.samples, atol=1e-4)
    flags = [*ENGLISH, "--kl_weight", 0, "--max_steps", 1]
    train_few(student, tmp_path / "speech.parquet", tmp_path / "model", *flags)
    names = [*ENGLISH, "--model_name_or_path", student, "--report_to", "none"]
    run("run_short_form_eval", *names, "--dataset_name", tmp_path / "speech.parquet", "--output_dir", tmp_path / "out")
    lines = (tmp_path / "out/short_form_predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["reference"] for line in lines] == [u.text for u in kept]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_text_of_nulls_is_no_transcripts(taught, utterances, tmp_path, streaming):
    """In Parquet it has a type of its own, in a manifest it is text; one that the user names is text without words."""
    kept = utterances[:2]
    audio = [{"bytes": u.encoded(), "path": None} for u in kept]
    pq.write_table(pa.table({"audio": audio, "text": pa.nulls(2)}), tmp_path / "speech.parquet")
    names = write_clips(tmp_path / "clips", kept)
    (tmp_path / "clips/train.json").write_text(json.dumps([{"audio": name, "text": None} for name in names]))
    for number, (data, *named) in enumerate(
        [("speech.parquet",), ("speech.parquet", "--text_column_name", "text"), ("clips/train.json",)]
    ):
        flags = [*ENGLISH, "--streaming", streaming, *named]
        rows = rows_of(label(taught, tmp_path / data, tmp_path / f"labels{number}", *flags))
        assert [(row["text"], row["wer"]) for row in rows] == [(None, None)] * 2


def test_training_on_transcripts_that_are_all_null_is_refused(student, utterances, tmp_path):
    audio = [{"bytes": u.encoded(), "path": None} for u in utterances[:2]]
    pq.write_table(pa.table({"audio": audio, "text": pa.nulls(2)}), tmp_path / "speech.parquet")
    with pytest.raises(UserError, match=r"column text of .* holds nothing but nulls; name the one with the transc"):
        train_few(student, tmp_path / "speech.parquet", tmp_path / "model", *ENGLISH, "--kl_weight", 0)
