"""What cutting utterances out of packed windows gets wrong and what it saves, on simulated windows of known truth.

python benchmarks/cutting.py --windows 3000 --json cutting.json

No model and no audio: windows of 30 s are packed with utterances of known words and times, 15% of which have a
transcript that is not what is said, of one kind (`KINDS`). The teacher writes what is said, with the small errors and
the rough timestamps below. Then `cut_utterances` does what training does at --wer_threshold 10. For each kind and each
style of timestamps is printed how many of the windows that were cut hold a text with more errors against what is said
in the audio that they keep than the teacher made there; and how much speech with right transcripts was thrown away, of
what is where all windows above the threshold are left out (--cut_utterances False).
"""

import argparse
import json
import random
import string
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, count, pairwise
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from distil_whisper.alignment import utterance_errors
from distil_whisper.cutting import cut_utterances
from distil_whisper.normalisation import Normaliser, normaliser
from distil_whisper.tokens import plain_text

WINDOW_S, THRESHOLD, WRONG_TRANSCRIPTS = 30.0, 10.0, 0.15
MISHEARD, UNHEARD, ADDED, UNHEARD_UTTERANCES = 0.013, 0.005, 0.003, 0.01  # shares of the words, and of the utterances
REPEATED = 0.02  # share of the utterances that say what the one before them said
SILENCE_S = (0.05, 0.6)  # at either end of an utterance
MARK_S, STRAY_MARKS, STRAY_S = 0.1, 0.02, 1.0  # deviation of timestamps, and how many are off by up to a second
JOINED_MARKS = 0.4  # share of the segments that end where the next begins, anywhere in the silence between
WITHIN = 0.05  # chance of a new segment before a word within an utterance, after three words of a segment
KINDS = (
    "another text",
    "a shorter text",
    "first words missing",
    "last words missing",
    "extra words",
    "empty",
    "border words",  # the last words of an utterance, at the head of the next one's transcript
    "swapped",  # with the next one's
    "mixed",
)
STYLES = {  # the share of the borders between utterances that lie within a segment, None without timestamps
    "no timestamps": None,
    "timestamps": 0.0,
    "timestamps, one border in ten within a segment": 0.1,
    "three in ten": 0.3,
}


@dataclass(frozen=True)
class Spoken:
    """An utterance: what is said, what its transcript says, what the teacher writes; where it begins, its seconds."""

    said: list[str]
    transcript: list[str]
    heard: list[str]
    start: float
    seconds: float
    lead: float
    tail: float

    @property
    def is_right(self) -> bool:
        """Whether the transcript is what is said."""
        return self.said == self.transcript


class Speech:
    """Draws of windows. Words are as frequent as Zipf's law has it, which makes frequent ones meet by chance."""

    def __init__(self, seed: str, spaceless: bool):
        self.draw = random.Random(seed)
        self.space = "" if spaceless else " "
        of_letters = (self._word(spaceless) for _ in count())
        self.words = list(dict.fromkeys(next(of_letters) for _ in range(4_000)))
        self.weights = list(accumulate(1 / (rank + 2.7) for rank in range(len(self.words))))

    def _word(self, spaceless: bool) -> str:
        if spaceless:
            return "".join(chr(0x4E00 + self.draw.randrange(1_000)) for _ in range(self.draw.randint(1, 2)))
        return "".join(self.draw.choices(string.ascii_lowercase, k=self.draw.randint(2, 9)))

    def seconds_of(self, word: str) -> float:
        """How long it takes to say a word."""
        return 0.06 + (0.07 if self.space else 0.2) * len(word)

    def some(self, number: int) -> list[str]:
        """So many words."""
        return self.draw.choices(self.words, cum_weights=self.weights, k=number)

    def sentence(self) -> list[str]:
        """The words of an utterance: 9 of them, more or less."""
        return self.some(max(2, min(25, round(self.draw.gauss(9, 4)))))

    def transcript(self, said: list[str], kind: str) -> list[str]:
        """A transcript of that kind (not of those that take in a neighbour's), which is not what is said."""
        few = self.draw.randint(1, max(1, len(said) // 2))
        place = self.draw.choice([0, len(said), self.draw.randint(0, len(said))])
        return {
            "another text": self.sentence(),
            "a shorter text": self.some(max(1, len(said) - few)),
            "first words missing": said[few:],
            "last words missing": said[:-few],
            "extra words": said[:place] + self.some(few) + said[place:],
            "empty": [],
        }[kind]

    def heard(self, said: list[str]) -> list[str]:
        """What the teacher writes of it."""
        if self.draw.random() < UNHEARD_UTTERANCES:
            return []
        words: list[str] = []
        for word in said:
            chance = self.draw.random()
            words += [] if chance < UNHEARD else self.some(1) if chance < UNHEARD + MISHEARD else [word]
            words += self.some(1) if self.draw.random() < ADDED else []
        return words

    def window(self, kind: str) -> list[Spoken]:
        """The utterances of a window, some with transcripts of a kind."""
        utterances = self.utterances()
        for place, utterance in enumerate(utterances):
            if self.draw.random() < WRONG_TRANSCRIPTS:
                wrong = self.draw.choice(KINDS[:-1]) if kind == "mixed" else kind
                if wrong in ("border words", "swapped"):
                    utterances[place : place + 2] = self.misplaced(utterances[place : place + 2], wrong)
                else:
                    utterances[place] = replace(utterance, transcript=self.transcript(utterance.said, wrong))
        return utterances

    def misplaced(self, utterances: list[Spoken], kind: str) -> list[Spoken]:
        """An utterance and the next, if there is one, with words of their transcripts in the other's."""
        first, *others = utterances
        if not others:
            return utterances
        before, after = first.transcript, others[0].transcript
        few = self.draw.randint(1, max(1, min(3, len(before) - 1))) if kind == "border words" else 0
        before, after = (before[:-few], [*before[-few:], *after]) if few else (after, before)
        return [replace(first, transcript=before), replace(others[0], transcript=after)]

    def utterances(self) -> list[Spoken]:
        """The utterances of a window, with transcripts that are what is said."""
        utterances: list[Spoken] = []
        start = 0.0
        while True:
            repeated = utterances and self.draw.random() < REPEATED
            said = utterances[-1].said if repeated else self.sentence()
            lead, tail = self.draw.uniform(*SILENCE_S), self.draw.uniform(*SILENCE_S)
            seconds = lead + tail + sum(self.seconds_of(word) for word in said)
            if start + seconds > WINDOW_S:
                return utterances
            utterances.append(Spoken(said, said, self.heard(said), start, seconds, lead, tail))
            start += seconds

    def label(self, utterances: list[Spoken], joined: float | None) -> str:
        """What the teacher writes of a window."""
        if joined is None:
            return self.space + self.space.join(word for utterance in utterances for word in utterance.heard)
        segments = self._segments(utterances, joined)
        times = [time for words in segments for time in (words[0][1] + self._error(), words[-1][2] + self._error())]
        for place, (left, right) in enumerate(pairwise(segments)):
            if self.draw.random() < JOINED_MARKS:
                between = self.draw.uniform(left[-1][2], right[0][1]) + self._error() / 2
                times[2 * place + 1] = times[2 * place + 2] = between
        steps = [0]
        for place, time in enumerate(times):  # as Whisper's grammar: never back, and every segment takes time
            steps.append(max(steps[-1] + place % 2, min(round(time / 0.02), round(WINDOW_S / 0.02))))
        marks = [f"<|{step * 0.02:.2f}|>" for step in steps[1:]]
        texts = [self.space + self.space.join(word for word, *_ in words) for words in segments]
        return "".join(f"{marks[2 * place]}{text}{marks[2 * place + 1]}" for place, text in enumerate(texts))

    def _segments(self, utterances: list[Spoken], joined: float) -> list[list[tuple[str, float, float]]]:
        """Words with their times, by segment."""
        segments: list[list[tuple[str, float, float]]] = []
        for utterance in utterances:
            time, letters = utterance.start + utterance.lead, len("".join(utterance.heard))
            for place, word in enumerate(utterance.heard):
                took = (utterance.seconds - utterance.lead - utterance.tail) * len(word) / letters
                new = joined if place == 0 else 1 - WITHIN if segments and len(segments[-1]) > 2 else 1
                if not segments or self.draw.random() >= new:
                    segments.append([])
                segments[-1].append((word, time, time + took))
                time += took
        return segments

    def _error(self) -> float:
        """Of a timestamp, in seconds."""
        stray = self.draw.random() < STRAY_MARKS
        return self.draw.uniform(-STRAY_S, STRAY_S) if stray else self.draw.gauss(0, MARK_S)


@dataclass
class Outcome:
    """Windows above the threshold, those that were cut, those of which the text is not what is said; seconds of
    speech with right transcripts that were thrown away, and that would be if all windows above it were left out."""

    above: int = 0
    cut: int = 0
    wrong: int = 0
    lost: float = 0.0
    lost_uncut: float = 0.0

    def __str__(self) -> str:
        return f"{self.wrong} of {self.cut:,} wrong, {self.lost / self.lost_uncut:.0%} lost"

    def count(self, utterances: list[Spoken], transcript: str, space: str, rules: Normaliser) -> None:
        """Cut a window as training does, and count what came of it."""
        texts = [space.join(utterance.transcript) for utterance in utterances]
        if max(pair.rate for pair in utterance_errors(texts, plain_text(transcript), rules)) <= THRESHOLD:
            return
        starts = [utterance.start for utterance in utterances]
        row = {"whisper_transcript": transcript, "utterance_texts": texts, "utterance_starts": starts}
        row["utterance_ids"] = list(range(len(texts)))
        cut = cut_utterances(row, THRESHOLD, rules)
        kept = [utterances[part] for part in cut["utterance_ids"]] if cut else []
        self.above += 1
        self.cut += cut is not None and cut is not row
        self.lost_uncut += sum(utterance.seconds for utterance in utterances if utterance.is_right)
        self.lost += sum(one.seconds for one in utterances if one.is_right and one not in kept)
        if cut:
            said, heard = (
                rules(space.join(word for one in kept for word in getattr(one, name))).split()
                for name in ("said", "heard")
            )
            written = rules(plain_text(cut["whisper_transcript"])).split()
            self.wrong += Levenshtein.distance(written, said) > Levenshtein.distance(heard, said)


def simulate(kind: str, joined: float | None, args) -> Outcome:
    """Cut windows in which wrong transcripts are of a kind."""
    speech, outcome = Speech(f"{args.seed} {kind} {joined}", args.spaceless), Outcome()
    rules = normaliser("basic", "zh" if args.spaceless else "de", None)
    for _ in range(args.windows):
        utterances = speech.window(kind)
        outcome.count(utterances, speech.label(utterances, joined), speech.space, rules)
    return outcome


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=3_000, help="For each line of the table.")
    parser.add_argument(
        "--spaceless", action="store_true", help="A language without spaces: characters are the words."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="File for the results.")
    args = parser.parse_args(argv)
    result: dict[str, dict[str, dict]] = {}
    print(f"| transcripts | {' | '.join(STYLES)} |\n| --- |{' --- |' * len(STYLES)}")
    for kind in KINDS:
        outcomes = {style: simulate(kind, joined, args) for style, joined in STYLES.items()}
        result[kind] = {style: asdict(outcome) for style, outcome in outcomes.items()}
        print(f"| {kind} | {' | '.join(map(str, outcomes.values()))} |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
