"""Manifests and audio folders: their values, paths and splits, and what is wrong with those that cannot be read."""

import json
import shutil

import numpy as np
import pytest
from audio_sources import RATE, write_clips
from datasets import Value

from distil_whisper.audio import AudioError, decode
from distil_whisper.errors import UserError
from distil_whisper.reading import open_source


def test_the_values_of_manifests(tmp_path):
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


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_of_a_table_can_be_told_apart_as_they_are_written(tmp_path, streaming):
    (tmp_path / "m.csv").write_text("audio,text,id,n\na.wav,1.50,7,1.50\nb.wav,2,8,2\n")
    source = open_source(str(tmp_path / "m.csv"), streaming=streaming, exact={"text", "id"})
    source.as_text("text")
    source.as_text("id")
    rows = [(row["text"], row["id"], row["n"]) for row in source.rows(0)]
    assert rows == [("1.50", "7", 1.5), ("2", "8", 2)]
    with pytest.raises(UserError, match=r"column n of m.csv/default/train holds no text, but float64; store"):
        source.as_text("n")


def test_columns_without_a_name_are_passed_over(tmp_path):
    """As a spreadsheet writes them; a single one, such as the index of pandas, is a column."""
    (tmp_path / "m.csv").write_text("audio,,text, ,\na.wav,,one,,\nb.wav,x,two,,3\n")
    source = open_source(str(tmp_path / "m.csv"))
    assert source.column_names == ["audio", "text"]
    assert [row["text"] for row in source.rows(0)] == ["one", "two"]
    (tmp_path / "m.csv").write_text(",audio,text\n0,a.wav,one\n")
    assert [row[""] for row in open_source(str(tmp_path / "m.csv")).rows(0)] == [0]


def test_a_row_whose_audio_is_missing_is_left_to_the_decoder(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"audio": "gone.wav"}\n\n{"audio": null}\n')
    gone, none = open_source(str(tmp_path / "m.jsonl")).rows(0)
    with pytest.raises(AudioError, match=r"missing file: .*gone\.wav"):
        decode(gone["audio"], RATE)
    with pytest.raises(AudioError, match="no audio"):
        decode(none["audio"], RATE)


def test_common_voice_as_it_is_distributed(tmp_path, utterances):
    names = write_clips(tmp_path / "hi" / "clips", utterances, "mp3")
    lines = [f'{name}\t"{u.text}\t2' for name, u in zip(names, utterances, strict=True)]
    (tmp_path / "hi" / "train.tsv").write_text("\n".join(["path\tsentence\tup_votes", *lines]))
    for name in (tmp_path / "hi", tmp_path / "hi" / "train.tsv"):
        rows = list(open_source(str(name), "hi", audio_column="path").rows(0))
        assert [row["sentence"] for row in rows] == [f'"{u.text}' for u in utterances]
        assert {row["up_votes"] for row in rows} == {2}
        assert len(decode(rows[0]["path"], RATE)) == pytest.approx(len(utterances[0].samples), abs=1200)


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
    ("m.csv", "audio,text,text\na.wav,b,c\n", "m.csv has 2 columns called text; give each a name of its own"),
    ("m.json", '[{"audio": {"array": [0.1]}}]', "row 0 of .*m.json must give its audio as a path, not as a dict"),
    ("m.csv", b"audio,text\na.wav,\xff\n", "m.csv is not in UTF-8 at line 2; save it in that encoding"),
    ("m.csv", "audio,text\n".encode("utf-16"), "m.csv is not in UTF-8 at line 1; save it in that encoding"),
    ("m.csv", 'audio,text\na.wav,"b\n', "m.csv is not valid CSV at line 2: unexpected end of data"),
    ("m.jsonl", '{"audio": "a"}\n{"audio": "b", "n": "\\uD83D"}', r"row 1 of .* has \\ud83d, which is half of a char"),
    ("m.json", '[{"audio": "a", "\\ude00": 1}]', r"row 0 of .*m.json has \\ude00, which is half of a character"),
    ("m.json", f'[{{"audio": "a", "n": {10**30}}}]', "column n of .*m.json holds a whole number of more than 64 bits"),
    ("m.json", '[{"audio": "a", "n": "x", "n": "y"}]', "m.json has a row with 2 values called n; give each a name"),
    (
        "m.txt",
        "audio",
        r"m.txt is not a manifest: the name of one ends in \.json, \.jsonl, \.csv, \.tsv \(or \.parquet\)",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED)
def test_manifests_that_cannot_be_read(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as error:
        open_source(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_character_that_json_writes_as_two_halves_is_whole(tmp_path):
    (tmp_path / "m.json").write_text('[{"audio": "a.wav", "text": "\\uD83D\\uDE00"}]')
    (row,) = open_source(str(tmp_path / "m.json")).rows(0)
    assert row["text"] == "\N{GRINNING FACE}"


def test_an_audio_folder_without_metadata(tmp_path, utterances):
    for speaker, part in (("b", utterances[:2]), ("a", utterances[2:5])):
        write_clips(tmp_path / "set" / speaker, part, "flac")
    (tmp_path / "set" / "notes.txt").write_text("not audio")
    source = open_source(str(tmp_path / "set"))
    rows = list(source.rows(0))
    expected = [f"a/{u.id}.flac" for u in utterances[2:5]] + [f"b/{u.id}.flac" for u in utterances[:2]]
    assert source.column_names == ["audio", "file_name"]
    assert [row["file_name"] for row in rows] == expected
    np.testing.assert_allclose(decode(rows[0]["audio"], RATE), utterances[2].samples, atol=1e-4)


def test_the_splits_of_an_audio_folder(tmp_path, utterances):
    for split, part in (("train", utterances[:3]), ("test", utterances[3:5]), ("test_ood", utterances[5:6])):
        write_clips(tmp_path / "set" / split, part)
    (tmp_path / "set" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"test/{u.id}.wav,{u.text}\n" for u in reversed(utterances[3:5]))
    )
    path = str(tmp_path / "set")
    assert [row["file_name"] for row in open_source(path, split="train").rows(0)] == [
        f"{u.id}.wav" for u in utterances[:3]
    ]
    assert [row["text"] for row in open_source(path, split="test").rows(0)] == [utterances[4].text, utterances[3].text]
    assert open_source(path, split="test_ood").num_rows == 1
    with pytest.raises(UserError, match=r"has no split dev \(allowed: test, test_ood, train\)"):
        open_source(path, split="dev")
    (tmp_path / "set" / "train" / "metadata.csv").write_text("filename,text\na.wav,a\n")
    with pytest.raises(UserError, match=r"row 0 of .*metadata.csv has no file_name .*did you mean filename\?"):
        open_source(path)


def test_packed_audio_files_are_to_be_unpacked(tmp_path, utterances):
    write_clips(tmp_path / "clips", utterances[:2])
    (tmp_path / "set").mkdir()
    shutil.make_archive(str(tmp_path / "set" / "train"), "zip", tmp_path / "clips")
    for streaming in (False, True):
        with pytest.raises(UserError, match="set holds audio files that are not on this disk, or packed; fetch or"):
            open_source(str(tmp_path / "set"), streaming=streaming, cache_dir=str(tmp_path / "cache"))
