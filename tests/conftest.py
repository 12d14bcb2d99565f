"""Speech, tiny models and launched scripts: what the tests share. Nothing here touches a network."""

import io
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Read when libraries are imported; a shell may have others, or a login.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "0"
os.environ.pop("HF_ENDPOINT", None)
os.environ.pop("HF_TOKEN", None)
os.environ.pop("WANDB_API_KEY", None)
os.environ.pop("WANDB_MODE", None)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")

import hypothesis
import numpy as np
import pytest
import soundfile
import soxr
import toy_whisper
from speech import SAMPLING_RATE, speak

# The same examples in every run, and no limit of time: machines are shared.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")
pytest_plugins = ["stages", "mixtures"]
ROOT = Path(__file__).resolve().parent.parent
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
REAL_TOKENIZER = ROOT.parent / "shared" / "whisper-tokenizer"


@dataclass(frozen=True)
class Utterance:
    """Some words as one voice speaks them, 16 kHz mono."""

    id: str
    text: str
    speaker: str
    samples: np.ndarray

    def encoded(self, format: str = "WAV", sampling_rate: int = 16_000, **options) -> bytes:
        """The utterance as a file of any format that soundfile writes."""
        samples = self.samples if sampling_rate == 16_000 else soxr.resample(self.samples, 16_000, sampling_rate)
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, sampling_rate, format=format, **options)
        return buffer.getvalue()


def make_utterances(count: int, seed: int = 0, words: int = 3) -> list[Utterance]:
    """Random words by three voices, in runs of four utterances a voice."""
    draw = np.random.default_rng(seed)
    voices = ["en-us", "en-gb-scotland", "en-us+f1"]
    result = []
    for index in range(count):
        voice = voices[(index // 4) % len(voices)]
        text = " ".join(draw.choice(WORDS, size=draw.integers(1, words + 1)))
        samples = soxr.resample(speak(text, voice), SAMPLING_RATE, 16_000).astype(np.float32)
        result.append(Utterance(f"utterance-{index}", text, voice, samples))
    return result


@pytest.fixture(scope="session", autouse=True)
def cache():
    """What `datasets` caches goes with the session: the same folder names hold other data in the next one."""
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"])


@pytest.fixture(scope="session")
def utterances() -> list[Utterance]:
    return make_utterances(24)


@pytest.fixture(scope="session")
def toy_teacher(tmp_path_factory) -> Path:
    """A random-weight Whisper: 4 s window, 2+4 layers, every special token."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    return toy_whisper.save(folder, [" " + " ".join(WORDS)] * 3, 4, d_model=32, heads=2)


@pytest.fixture(scope="session")
def toy_english_only(tmp_path_factory) -> Path:
    """The same, English-only."""
    folder = tmp_path_factory.mktemp("models") / "teacher.en"
    return toy_whisper.save(folder, [" " + " ".join(WORDS)] * 3, 4, d_model=32, heads=2, multilingual=False)


@pytest.fixture(scope="session")
def real_tokenizer():
    """The 51,865-token vocabulary of Whisper, where a copy of it lies beside the repository."""
    if not REAL_TOKENIZER.is_dir():
        pytest.skip(f"Whisper's own tokenizer is not at {REAL_TOKENIZER}, so tests of the real vocabulary do not run")
    from transformers import WhisperTokenizer

    return WhisperTokenizer.from_pretrained(REAL_TOKENIZER)


def write_audio_dataset(folder: Path, utterances: list[Utterance], split: str = "train", files: int = 2) -> Path:
    """A folder of Parquet files that load_dataset reads: audio (bytes), text, id, speaker."""
    from datasets import Dataset, Features, Value

    features = Features(
        {
            "audio": {"bytes": Value("binary"), "path": Value("string")},
            "text": Value("string"),
            "id": Value("string"),
            "speaker": Value("string"),
        }
    )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(np.array_split(np.arange(len(utterances)), files)):
        rows = [utterances[i] for i in part]
        columns = {
            "audio": [{"bytes": u.encoded(), "path": f"{u.id}.wav"} for u in rows],
            "text": [u.text for u in rows],
            "id": [u.id for u in rows],
            "speaker": [u.speaker for u in rows],
        }
        dataset = Dataset.from_dict(columns, features=features)
        dataset.to_parquet(folder / "data" / f"{split}-{index:05d}-of-{files:05d}.parquet")
    return folder


@pytest.fixture(scope="session")
def speech_folder(tmp_path_factory, utterances) -> Path:
    """24 utterances as split `train` in two Parquet files, the first 8 as `test`."""
    folder = tmp_path_factory.mktemp("speech")
    write_audio_dataset(folder, utterances)
    return write_audio_dataset(folder, utterances[:8], split="test", files=1)


@dataclass(frozen=True)
class Launched:
    """How a launched script ended."""

    code: int
    stdout: str
    stderr: str


def launch(
    *command, cwd: Path | None = None, env: dict | None = None, processes: int = 1, launcher: list[str] | None = None
) -> Launched:
    """Run a script of the repository as a user would; with several processes, on gloo ranks of this CPU.

    launcher: what Python is given in front of the script, in place of that.
    """
    script, *flags = [str(part) for part in command]
    path = script if Path(script).is_absolute() else str(ROOT / script)
    if launcher is None and processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "WANDB_MODE": "disabled"}
    environment = {**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    command = [sys.executable, *(launcher or []), path, *flags]
    ran = subprocess.run(command, cwd=cwd or ROOT, env=environment, capture_output=True, text=True, timeout=600)
    return Launched(ran.returncode, ran.stdout, ran.stderr)
