"""Make the quickstart's speech and its untrained toy teacher.

python scripts/quickstart_data.py --data_dir outputs/quickstart/data --model_dir outputs/quickstart/teacher_init

The folder has the splits train, test (unseen utterances), test_ood (unseen voices, noise) and long (recordings of a
minute and more, with pauses); and a configuration `windows`, on which the toy teacher is trained: windows of several
utterances whose times are known, in the form that labelling writes, with timestamps and previous text. Where a window
cuts through an utterance, its words are not written; of one cut at the end the beginning is marked, as Whisper marks
it, and a reader of long recordings goes on from there.
"""

import argparse
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import soxr
import toy_whisper
from datasets import Audio, Features, List, Value
from speech import SAMPLING_RATE, speak
from transformers import WhisperTokenizer

from distil_whisper.audio import encode
from distil_whisper.handoff import shard_writer
from distil_whisper.outputs import write_text
from distil_whisper.progress import bar, quiet_libraries
from distil_whisper.tokens import Grammar

RATE = 16_000
WINDOW_S = 4
# No numbers: the English normaliser would write "two three" as one word, 23.
WORDS = ["red", "blue", "green", "yellow", "black", "white", "north", "south", "apple", "river", "window", "garden"]
# No variant that eSpeak NG mixes noise into (f2, f3, f5): it seeds that with the time, and each run would differ.
VOICES = ["en-us", "en-gb-scotland", "en-us+f1", "en-us+m3"]
# A teacher has heard more than the data that it labels: these as well, but not the last.
TEACHERS_VOICES = [*VOICES, "en-gb-x-rp", "en-029", "en-us+m1", "en-us+m4", "en-us+m6", "en-gb-x-gbcwmd+f4"]
TEACHERS_VOICES += ["en-us+m7", "en-us+f4", "en-gb-x-rp+f4", "en-gb-scotland+m2", "en-029+f1", "en-gb-x-gbclan+m5"]
UNSEEN_VOICES = ["en-gb-x-rp+m3", "en-gb-x-gbclan+f1"]
TEXT = Value("string")
FEATURES = Features({"audio": Audio(), "text": TEXT, "id": TEXT, "speaker": TEXT, "recording": TEXT})
WINDOW_FEATURES = Features(
    {
        "audio": Audio(),
        "text": TEXT,
        "whisper_transcript": TEXT,
        "condition_on_prev": List(Value("int32")),
        "tokenizer_fingerprint": TEXT,
        "row_id": TEXT,
        "recording_id": TEXT,
    }
)
README = """---
configs:
- config_name: default
  default: true
  data_files:
{splits}
- config_name: windows
  data_files:
  - split: train
    path: windows/train-*.parquet
---

Synthetic speech: a small vocabulary spoken by eSpeak NG.
"""
SPLITS = {"train": 4000, "test": 400, "test_ood": 400}
EXCERPTS = 0.3  # share of the training recordings that are a window's length out of something longer
WRONG = 0.15  # share of the training utterances whose transcript is of something else, as in collected corpora
WINDOWS = 5000
LONG_RECORDINGS, LONG_S = 6, 62


class Speaker:
    """A voice with its own rate and pitch."""

    def __init__(self, voice: str, rate: int, pitch: int):
        self.name = f"{voice}-{rate}-{pitch}"
        self.voice, self.rate, self.pitch = voice, rate, pitch

    def say(self, words: list[str]) -> np.ndarray:
        """The words as float32 samples at 16 kHz."""
        samples = speak(" ".join(words), self.voice, self.rate, self.pitch)
        return soxr.resample(samples, SAMPLING_RATE, RATE).astype(np.float32)


def speakers(voices: list[str]) -> list[Speaker]:
    """Each voice at two rates and two pitches."""
    return [Speaker(*of) for of in product(voices, (170, 190), (45, 55))]


def write_utterances(folder: Path, split: str, count: int, voices: list[str], noise: float, draw) -> None:
    """Utterances of one to three words, in recordings of one to eight by one speaker; some training recordings are an
    excerpt of a window's length instead, and some training transcripts are wrong."""
    excerpts, wrong = (EXCERPTS, WRONG) if split == "train" else (0.0, 0.0)
    mistakes = draw.spawn(1)[0]
    everyone = speakers(voices)
    with shard_writer(folder / "data" / f"{split}-00000-of-00001.parquet", FEATURES) as write:
        made = recording = 0
        while made < count:
            speaker = everyone[draw.integers(len(everyone))]
            if draw.random() < excerpts:
                samples, _, words = compose([said(speaker, draw) for _ in range(6)], draw)
                spoken = [(words, samples)]
            else:
                spoken = [said(speaker, draw, split != "train") for _ in range(min(draw.integers(1, 9), count - made))]
                spoken = [(words, padded(samples, draw)) for words, samples in spoken]
            for words, samples in spoken:
                samples = noisy(samples, noise, draw)
                if mistakes.random() < wrong:
                    words = mistakes.choice(WORDS, size=len(words)).tolist()
                write(row(samples, words, f"{split}-{made}", speaker.name, f"{split}-recording-{recording}"))
                made += 1
            recording += 1


def write_long(folder: Path, draw) -> None:
    """Recordings of over a minute: utterances of one speaker with pauses of 0.2 to 1 s between them."""
    everyone = speakers(VOICES)
    with shard_writer(folder / "data" / "long-00000-of-00001.parquet", FEATURES) as write:
        for number in range(LONG_RECORDINGS):
            speaker, parts, spoken = everyone[draw.integers(len(everyone))], [], []
            while sum(map(len, parts)) < LONG_S * RATE:
                words, samples = said(speaker, draw, held_out=True)
                spoken += words
                parts += [samples, np.zeros(int(draw.uniform(0.2, 1.0) * RATE), np.float32)]
            samples = noisy(np.concatenate(parts), 0.005, draw)
            write(row(samples, spoken, f"long-{number}", speaker.name, f"long-{number}"))


def write_windows(folder: Path, grammar: Grammar, draw) -> None:
    """Windows of utterances at known times, labelled with the truth: what the toy teacher is taught."""
    pool = [[said(speaker, draw) for _ in range(50)] for speaker in speakers(TEACHERS_VOICES)]
    with shard_writer(folder / "windows" / "train-00000-of-00001.parquet", WINDOW_FEATURES) as write:
        previous = None
        for number in bar(range(WINDOWS), desc="making windows", unit="window"):
            known = pool[draw.integers(len(pool))]
            chosen = draw.integers(len(known), size=1 if draw.random() < 0.35 else draw.integers(2, 7))
            samples, transcript, words = compose([known[index] for index in chosen], draw)
            samples = noisy(samples, draw.uniform(0, 0.015), draw)
            write(
                {
                    "audio": {"bytes": encode(samples, RATE, "WAV"), "path": None},  # read sooner than FLAC
                    "text": " ".join(words),
                    "whisper_transcript": transcript,
                    "condition_on_prev": previous,
                    "tokenizer_fingerprint": grammar.fingerprint,
                    "row_id": f"windows/{number}",
                    "recording_id": f"windows/{number}",
                }
            )
            previous = grammar.encode_pseudo_label(transcript).ids


def compose(utterances: list[tuple[list[str], np.ndarray]], draw) -> tuple[np.ndarray, str, list[str]]:
    """A window cut out of utterances with pauses: samples, transcript with timestamps to a tenth of a second, and the
    words of the utterances that are wholly in it."""
    length = WINDOW_S * RATE
    stream = np.zeros(3 * length, np.float32)  # the window is the middle third
    draw = draw.spawn(1)[0]  # how long the utterances are then changes nothing that is drawn later
    at, transcript, spoken = draw.uniform(-1, -0.2) if draw.random() < 0.3 else draw.uniform(0.05, 0.4), "", []
    for words, samples in utterances:
        end = at + len(samples) / RATE
        stream[length + int(at * RATE) :][: len(samples)] += draw.uniform(0.6, 1.0) * samples
        if end > WINDOW_S:
            transcript += f"<|{at:.1f}0|>"
            break
        if at >= 0:
            transcript += f"<|{at:.1f}0|> {' '.join(words)}<|{end:.1f}0|>"
            spoken += words
        at = end + draw.uniform(0.2, 0.8)
        if at > WINDOW_S - 0.1:
            break
    return stream[length : 2 * length], transcript, spoken


def said(speaker: Speaker, draw, held_out: bool = False) -> tuple[list[str], np.ndarray]:
    """One to three words, and how they sound; for the tests two or three that no model is trained on."""
    while True:
        words = draw.choice(WORDS, size=draw.integers(1, 4)).tolist()
        if is_held_out(words) == held_out:
            return words, speaker.say(words)


def is_held_out(words: list[str]) -> bool:
    """Whether words in this order are kept for the tests."""
    return len(words) > 1 and zlib.crc32(" ".join(words).encode()) % 4 == 0


def padded(samples: np.ndarray, draw) -> np.ndarray:
    """A little silence around speech."""
    before, after = (int(draw.uniform(0.05, 0.4) * RATE) for _ in range(2))
    return np.pad(samples, (before, after))


def noisy(samples: np.ndarray, level: float, draw) -> np.ndarray:
    """White noise added."""
    return samples + level * draw.standard_normal(len(samples)).astype(np.float32)


def row(samples: np.ndarray, words: list[str], id: str, speaker: str, recording: str) -> dict:
    """A row of the dataset."""
    audio = {"bytes": encode(samples, RATE), "path": f"{id}.flac"}
    return {"audio": audio, "text": " ".join(words), "id": id, "speaker": speaker, "recording": recording}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--model_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    quiet_libraries()
    draw = np.random.default_rng(0)
    toy_whisper.save(
        args.model_dir,
        [" " + " ".join(WORDS)] * 3,
        WINDOW_S,
        d_model=128,
        encoder_layers=1,
        max_target_positions=96,
        max_initial_timestamp_index=WINDOW_S * 50,  # of a window that begins within an utterance, the next is first
    )
    tokenizer = WhisperTokenizer.from_pretrained(args.model_dir)
    for split, count in SPLITS.items():
        unseen = split == "test_ood"
        write_utterances(
            args.data_dir, split, count, UNSEEN_VOICES if unseen else VOICES, 0.01 if unseen else 0.003, draw
        )
    write_long(args.data_dir, draw)
    write_windows(args.data_dir, Grammar(tokenizer, True, 96), draw)
    lines = [f"  - split: {split}\n    path: data/{split}-*.parquet" for split in (*SPLITS, "long")]
    write_text(args.data_dir / "README.md", README.format(splits="\n".join(lines)))
    print(f"wrote {args.data_dir} and {args.model_dir}")


if __name__ == "__main__":
    main()
