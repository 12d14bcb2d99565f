"""Training sets of two labelled datasets, for the tests of their order."""

import numpy as np
import pytest
from conftest import make_utterances
from datasets import Dataset, Features, List, Value

from distil_whisper.examples import ExampleMaker, LabelColumns, Labeller, LabelSettings
from distil_whisper.filtering import FilterSettings, RowFilter
from distil_whisper.mixing import TrainingSet
from distil_whisper.models import load_whisper
from distil_whisper.normalisation import Normalisers
from distil_whisper.reading import open_source
from distil_whisper.verdicts import Verdicts, judge

ROWS = {"first": 11, "second": 6}
SEED = 7
TEXT = Value("string")
FEATURES = Features(
    {
        "audio": {"bytes": Value("binary"), "path": TEXT},
        "whisper_transcript": TEXT,
        "condition_on_prev": List(Value("int32")),
        "row_id": TEXT,
        "text": TEXT,
    }
)


@pytest.fixture(scope="session")
def whisper(toy_teacher):
    return load_whisper(str(toy_teacher), device="cpu")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two labelled datasets, the first in three files; its row 4 is too long, and the second's rows have ids."""
    root = tmp_path_factory.mktemp("labelled")
    for name, count in ROWS.items():
        rows = [
            {
                "audio": {"bytes": u.encoded(), "path": None},
                "whisper_transcript": f"<|0.00|> {u.text}<|1.00|>" if (name, i) != ("first", 4) else "",
                "condition_on_prev": [1, 2, 3],
                "row_id": f"labelled/{i}" if name == "second" else None,
                "text": u.text,
            }
            for i, u in enumerate(make_utterances(count, seed=count))
        ]
        for index, part in enumerate(np.array_split(np.arange(count), 3 if name == "first" else 1)):
            (root / name).mkdir(exist_ok=True)
            table = Dataset.from_list([rows[i] for i in part], features=FEATURES)
            table.to_parquet(root / name / f"train-{index:05d}-of-00003.parquet")
    return root


@pytest.fixture(scope="session")
def make_sets(folders, whisper, tmp_path_factory):
    """The training sets of the folders, map-style or streamed."""
    cache = str(tmp_path_factory.mktemp("cache"))
    labeller = Labeller(whisper.grammar, LabelSettings(0.5, 0.5, SEED))
    columns = LabelColumns("text", True, "hi", "transcribe")
    rules = Normalisers(None, whisper.tokenizer)

    def make(streaming, names=tuple(ROWS), wer_threshold=None):
        row_filter = RowFilter(labeller, columns, rules, FilterSettings(wer_threshold, None, 4.0))
        sets = []
        for name in names:
            source = open_source(str(folders / name), streaming=streaming, cache_dir=cache)
            kept = np.array([i for i in range(ROWS[name]) if (name, i) != ("first", 4)])
            sets.append(TrainingSet(source, columns, row_filter, kept))
            if not streaming:
                rows = source.dataset.remove_columns("audio")
                sets[-1].lengths = Verdicts(judge(rows, row_filter, 1, lengths=True)).lengths
        return sets, ExampleMaker(labeller, whisper.window, "audio")

    return make


def identity(example):
    """What must be equal wherever and whenever an example is made."""
    sequence = example.sequence and (tuple(example.sequence.decoder_input_ids), tuple(example.sequence.labels))
    return example.row_id, sequence, None if example.samples is None else example.samples.tobytes()
