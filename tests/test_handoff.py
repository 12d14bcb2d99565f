"""The hand-off dataset is one that load_dataset reads, whatever part of it is finished."""

import hashlib

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Audio, Features, List, Value, load_dataset

from distil_whisper.handoff import (
    MEANINGS,
    ROWS_PER_GROUP,
    WRITTEN,
    ShardFile,
    finish_shard,
    read_manifest,
    schema,
    shard_writer,
    write_readme,
)
from distil_whisper.outputs import OutputFolder

TEXT = Value("string")
SOURCE = Features({"sound": Audio(), "text": TEXT, "duration": Value("int64"), "tags": List(TEXT)})
FEATURES, _ = schema(SOURCE, None, "sound", "text")


@pytest.fixture
def folder(tmp_path):
    with OutputFolder(tmp_path / "labelled", "run_pseudo_labelling") as opened:
        yield opened


@pytest.fixture
def load(folder, tmp_path):
    """load_dataset of the folder: its rows by split, the audio as it is stored."""

    def loaded(config=None):
        splits = load_dataset(str(folder.path), config, cache_dir=str(tmp_path / "cache"))
        assert all(split.features == FEATURES for split in splits.values())
        return {name: list(split.cast_column("sound", Audio(decode=False))) for name, split in splits.items()}

    return loaded


def row(number, **values):
    audio = {"bytes": bytes([number % 256]) * 10, "path": f"{number}.flac"}
    return {**dict.fromkeys(FEATURES), "sound": audio, "row_id": f"row-{number}", **values}


def write_unit(folder, shard, rows):
    with shard_writer(folder / shard.name, FEATURES) as write:
        for each in rows:
            write(each)
    finish_shard(folder, shard, {"rows": len(rows), "seconds": 1.5, "skipped": []})
    write_readme(folder, "# Labels\n")


def ids(loaded):
    return {split: [found["row_id"] for found in rows] for split, rows in loaded.items()}


def test_the_schema_keeps_the_source_and_adds_the_columns_of_the_contract():
    features, renamed = schema(SOURCE, None, "sound", "text")
    assert renamed == {"sound": "sound", "text": "text", "duration": "source_duration", "tags": "tags"}
    assert list(features)[:4] == list(renamed.values())
    assert features["source_duration"] == Value("int64") and features["tags"] == List(TEXT)
    assert {name: features[name] for name in WRITTEN} == WRITTEN
    assert features["sound"] == Audio()
    some, renamed = schema(SOURCE, ["sound", "text", "speaker"], "sound", "text")
    assert set(some) == {"sound", "text", *WRITTEN} and set(renamed) == {"sound", "text"}


def test_a_dataset_labelled_for_the_third_time_keeps_all_of_its_columns():
    once, _ = schema(SOURCE, None, "sound", "text")
    twice, _ = schema(once, None, "sound", "text")
    thrice, renamed = schema(twice, None, "sound", "text")
    assert len(set(renamed.values())) == len(twice) and set(thrice) == {*renamed.values(), *WRITTEN}
    assert renamed["wer"] == "source_source_wer" and renamed["source_wer"] == "source_wer"


def test_a_configuration_of_two_levels_is_one_folder(folder, load):
    write_unit(folder, ShardFile("indic/hi", "train", 0, 1), [row(0)])
    assert ids(load("indic_hi")) == {"train": ["row-0"]}


def test_every_column_that_we_write_is_explained():
    assert MEANINGS.keys() == WRITTEN.keys()


def test_rows_come_back_as_they_were_written(folder, load):
    rows = [
        row(0),
        row(
            1,
            text="नमस्ते, <|x|> \n",
            source_duration=7,
            tags=["a", "b"],
            whisper_token_ids=[50364, 1, 50414],
            condition_on_prev=[],
            utterance_ids=["u"],
            utterance_starts=[0.0],
            utterance_texts=[None],
            utterance_wer=[12.5],
            truncated=True,
            wer=12.5,
            errors=3,
            avg_logprob=-0.1235,
            duration=1.5,
        ),
    ]
    write_unit(folder, ShardFile("default", "train", 0, 1), rows)
    assert load() == {"train": rows}


def test_a_column_may_be_null_throughout_a_shard(folder, load):
    write_unit(folder, ShardFile("default", "train", 0, 2), [row(0)])
    write_unit(folder, ShardFile("default", "train", 1, 2), [row(1, whisper_token_ids=[3], text="x", wer=1.0)])
    assert [found["whisper_token_ids"] for found in load()["train"]] == [None, [3]]


def test_the_folder_can_be_read_whenever_a_unit_is_finished(folder, load):
    """Units of several configurations and of splits that begin alike finish in any order; one is being written."""
    order = [
        ("hi", "test_ood", 0),
        ("hi", "test", 1),
        ("en", "train", 2),
        ("hi", "train", 0),
        ("hi", "test", 0),
        ("hi", "test_ood", 1),
    ]
    finished: dict = {}
    with shard_writer(folder / ShardFile("hi", "test", 2, 3).name, FEATURES) as write:
        for number in range(ROWS_PER_GROUP + 1):  # so many that some are on the disk
            write(row(number))
        for number, (config, split, unit) in enumerate(order):
            write_unit(folder, ShardFile(config, split, unit, 3), [row(10 * number), row(10 * number + 1)])
            of_unit = {unit: [f"row-{10 * number}", f"row-{10 * number + 1}"]}
            finished.setdefault(config, {}).setdefault(split, {}).update(of_unit)
            expected = {
                split: [row_id for unit in sorted(units) for row_id in units[unit]]
                for split, units in finished[config].items()
            }
            assert ids(load(config)) == expected
    default = min(finished)
    assert ids(load()) == ids(load(default))


def test_a_unit_without_rows_leaves_no_file_and_no_split(folder, load):
    for split, rows in [("train", [row(1)]), ("test", [])]:
        write_unit(folder, ShardFile("default", split, 0, 1), rows)
    assert ids(load()) == {"train": ["row-1"]}
    assert [path.name for path in folder.path.rglob("*.parquet")] == ["train-00000-of-00001.parquet"]
    write_unit(folder, ShardFile("default", "train", 1, 2), [])
    assert ids(load()) == {"train": ["row-1"]}


def test_before_any_row_is_finished_nothing_else_is_read_for_labels(folder, load):
    """Such as metrics.jsonl, which `datasets` would take for the rows."""
    write_unit(folder, ShardFile("default", "train", 0, 1), [])
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    assert (folder / "README.md").read_text().endswith("---\n\n# Labels\n")
    with pytest.raises(FileNotFoundError, match="data files found"):
        load()


def test_labels_made_afresh_are_not_read_from_the_cache(folder, load):
    shard = ShardFile("default", "train", 0, 1)
    for text in ("first", "later"):  # of one length, so that the files have the same size
        write_unit(folder, shard, [row(1, whisper_transcript=text)])
        assert [found["whisper_transcript"] for found in load()["train"]] == [text]


def test_the_readme_lists_what_is_there_and_keeps_its_text(folder):
    write_unit(folder, ShardFile("hi", "test", 0, 2), [row(0)])
    write_unit(folder, ShardFile("en", "train", 0, 2), [row(0)])
    _, head, body = (folder / "README.md").read_text().split("---\n")
    configs = yaml.safe_load(head)["configs"]
    assert [(config["config_name"], config.get("default")) for config in configs] == [("en", True), ("hi", None)]
    assert [[files["split"] for files in config["data_files"]] for config in configs] == [["train"], ["test"]]
    assert body == "\n# Labels\n"


@pytest.mark.parametrize("rows", [1, ROWS_PER_GROUP, 2 * ROWS_PER_GROUP + 1])
def test_a_file_appears_whole_and_rows_go_to_disk_in_groups(tmp_path, rows):
    path = tmp_path / "hi" / "train-00000-of-00001.parquet"
    with shard_writer(path, FEATURES) as write:
        for number in range(rows):
            write(row(number))
            assert not path.exists()
    written = pq.ParquetFile(path)
    assert written.metadata.num_rows == rows
    assert written.metadata.num_row_groups == -(-rows // ROWS_PER_GROUP)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("rows", [0, 1, ROWS_PER_GROUP + 1])
def test_nothing_is_left_of_a_unit_that_failed(tmp_path, rows):
    path = tmp_path / "hi" / "train-00000-of-00001.parquet"
    with pytest.raises(KeyboardInterrupt), shard_writer(path, FEATURES) as write:
        for number in range(rows):
            write(row(number))
        raise KeyboardInterrupt
    assert not list(tmp_path.rglob("*.*"))


def test_a_failed_unit_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    with shard_writer(path, FEATURES) as write:
        write(row(0))
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(RuntimeError), shard_writer(path, FEATURES) as write:
        for number in range(ROWS_PER_GROUP + 1):
            write(row(number))
        raise RuntimeError
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_what_is_said_of_a_unit_is_read_again(folder):
    shard = ShardFile("default", "train", 3, 12)
    assert shard.name == "default/train-00003-of-00012.parquet"
    assert read_manifest(folder, shard) is None
    facts = {"rows": 0, "seconds": 0.0, "skipped": [{"row_id": "ä/ह", "reason": "empty file"}]}
    finish_shard(folder, shard, facts)
    assert read_manifest(folder, shard) == facts
    assert read_manifest(folder, ShardFile("default", "train", 3, 13)) is None


@pytest.mark.parametrize(
    "splits",
    [
        {"train[:100]": "train_to100", "train[100:]": "train_100to", "train[-100:]": "train__100to"},
        {"train[10%:20%]": "train_10pctto20pct", "dev-clean": "dev_clean"},
    ],
)
def test_a_slice_of_a_split_has_a_name_that_can_be_read(folder, load, splits):
    for number, split in enumerate(splits):
        write_unit(folder, ShardFile("default", split, 0, 1), [row(number)])
    assert ids(load()) == {name: [f"row-{number}"] for number, name in enumerate(splits.values())}
