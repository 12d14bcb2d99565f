"""The token sequence: one grammar for every stage, student and teacher alike.

[<|startofprev|> previous text ...] <|startoftranscript|> [<|lang|> <|task|>] [<|notimestamps|>] text <|endoftext|>
"""

import functools
import hashlib
import re
import zlib
from dataclasses import dataclass

from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS, TO_LANGUAGE_CODE

from distil_whisper.errors import UserError, nearest

TIME_PRECISION = 0.02  # seconds between two timestamp tokens, in every Whisper vocabulary
IGNORED = -100  # a label that the loss passes over
SPACELESS_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km", "bo"})
TIMESTAMP_MARK = re.compile(r"<\|(\d+\.\d\d)\|>")
_TOKEN_OPENING = re.compile(r"(?<=<)(?=\|)")
_SPECIAL = re.compile(r"<\|[^|<>]*\|>")


@dataclass(frozen=True)
class Sequence:
    """What the decoders are given and what the loss compares: equal lengths, one is the other shifted by one.

    prompt_left_out: it was to have a prompt, which could not be used.
    """

    decoder_input_ids: list[int]
    labels: list[int]
    prompt_left_out: bool = False


@dataclass(frozen=True)
class Target:
    """A transcript as tokens, without prefix and end token."""

    ids: list[int]
    has_timestamps: bool


class Grammar:
    """The special tokens of one tokenizer, looked up by name, and the sequences that are built of them.

    multilingual says whether the model takes a language and a task token; max_positions is the decoder's number of
    positions. Raises UserError for a tokenizer that lacks a token of the grammar.
    """

    def __init__(self, tokenizer, multilingual: bool, max_positions: int):
        self.tokenizer = tokenizer
        self.multilingual = multilingual
        self.max_positions = max_positions
        self.max_prompt = max_positions // 2 - 1
        self._vocabulary = tokenizer.get_vocab()
        self.end = self.id_of("<|endoftext|>")
        self.start = self.id_of("<|startoftranscript|>")
        self.previous = self.id_of("<|startofprev|>")
        self.no_timestamps = self.id_of("<|notimestamps|>")
        self.no_speech = self.id_of("<|nospeech|>", "<|nocaptions|>")
        self.timestamp_begin = self.id_of("<|0.00|>")
        self.timestamp_end = max(self._vocabulary.values())  # timestamps are the last tokens of every vocabulary

    def id_of(self, *names: str) -> int:
        """The id of a special token by its name (or the first of several names). Raises UserError if there is none."""
        for name in names:
            if name in self._vocabulary:
                return self._vocabulary[name]
        raise UserError(f"the tokenizer has no token {' or '.join(names)}; it is not a Whisper tokenizer")

    def language_code(self, language: str) -> str:
        """A language given as a code, a name or a token, as its code. Raises UserError for an unknown one."""
        code = str(language).strip().lower().removeprefix("<|").removesuffix("|>")
        code = TO_LANGUAGE_CODE.get(code, code)
        if f"<|{code}|>" not in self._vocabulary or code not in LANGUAGES:
            known = [c for c in LANGUAGES if f"<|{c}|>" in self._vocabulary]
            names = [LANGUAGES[c] for c in known]
            bare = re.split("[-_]", code)[0]  # en-US and pt_BR name a region, too
            found = bare if bare in known else str(language).lower()
            raise UserError(f"the model has no language {language!r} {nearest(found, known + names)}")
        return code

    @functools.cached_property
    def languages(self) -> dict[str, int]:
        """The tokens of a multilingual model's languages, by their codes."""
        return {
            c: self._vocabulary[f"<|{c}|>"] for c in LANGUAGES if self.multilingual and f"<|{c}|>" in self._vocabulary
        }

    @functools.cached_property
    def opening(self) -> frozenset[int]:
        """The tokens that begin a word with a space."""
        return frozenset(token for text, token in self._vocabulary.items() if text.startswith("Ġ"))

    def prefix(self, language: str | None, task: str | None, timestamps: bool) -> list[int]:
        """The tokens from <|startoftranscript|> to the text."""
        ids = [self.start]
        if self.multilingual:
            if language is None or task is None:
                raise UserError("a multilingual model needs a language and a task, and neither can be guessed")
            ids += [self.id_of(f"<|{self.language_code(language)}|>"), self.id_of(f"<|{task}|>")]
        return ids if timestamps else [*ids, self.no_timestamps]

    def room(self, timestamps: bool) -> int:
        """The most tokens of a label: what the prefix leaves of the decoder's positions."""
        return self.max_positions - (3 if self.multilingual else 1) - (not timestamps)

    def is_timestamp(self, token: int) -> bool:
        """Whether a token is one of the timestamp tokens."""
        return token >= self.timestamp_begin

    def timestamp(self, seconds: float) -> int:
        """The timestamp token nearest to a time in the window. Raises UserError for a time beyond the last of them."""
        token = self.timestamp_begin + round(seconds / TIME_PRECISION)
        if token > self.timestamp_end:
            last = (self.timestamp_end - self.timestamp_begin) * TIME_PRECISION
            raise UserError(f"a transcript holds the mark <|{seconds:.2f}|>, but the last timestamp is <|{last:.2f}|>")
        return token

    def encode_text(self, text: str) -> list[int]:
        """Ordinary text as tokens: whatever looks like a special token in it is text."""
        pieces = _TOKEN_OPENING.split(text)  # cut inside "<|", so that no piece spells a special token
        return [token for piece in pieces for token in self.tokenizer.encode(piece, add_special_tokens=False)]

    def encode_transcript(self, text: str, language: str | None) -> list[int]:
        """A human transcript as Whisper writes text: with a space before the first word, where words have spaces."""
        text = text.strip()
        spaced = language is None or self.language_code(language) not in SPACELESS_LANGUAGES
        return self.encode_text(f" {text}" if spaced and text else text)

    def encode_pseudo_label(self, text: str) -> Target:
        """A `whisper_transcript`: the teacher's text, its `<|1.20|>` marks, and the prefix and end token of datasets
        that were labelled elsewhere, which are dropped. Whatever else looks like a special token is text."""
        text = self._without_frame(text)
        pieces = TIMESTAMP_MARK.split(text)  # text, seconds, text, seconds, ..., text
        if len(pieces) == 1:
            return Target(self.encode_text(text), False)
        ids: list[int] = []
        for position, piece in enumerate(pieces):
            if position % 2:
                ids.append(self.timestamp(float(piece)))
            elif piece:
                ids += self.encode_text(piece)
        return Target(ids, True)

    def target_of_ids(self, ids: list[int]) -> Target:
        """Generated tokens as a target: everything up to the text and from the end token on is dropped."""
        ids = list(ids)
        if None in ids:
            raise UserError("whisper_token_ids lack the id of a token")
        if self.start in ids:
            ids = ids[ids.index(self.start) + 1 :]
            while ids and self.end < ids[0] < self.timestamp_begin:
                ids = ids[1:]
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        self._require_known(ids, "whisper_token_ids hold {}: they were written with another tokenizer")
        return Target(ids, any(self.is_timestamp(token) for token in ids))

    def spoken(self, ids: list[int]) -> list[int]:
        """Generated tokens without special ones, which a model may make up in the middle of a text."""
        return [token for token in ids if token < self.end or self.is_timestamp(token)]

    def without_timestamps(self, target: Target) -> Target:
        """The same words with no timestamp tokens."""
        return Target([token for token in target.ids if not self.is_timestamp(token)], False)

    def prompt_of_ids(self, ids: list[int] | None, timestamps: bool) -> list[int]:
        """The previous window's tokens for a prompt.

        Of datasets labelled elsewhere its frame may have come along: <|startofprev|>, the window's own prompt and
        prefix, end tokens. Raises UserError where other special tokens are left, which leave its meaning uncertain.
        """
        ids = list(ids or [])
        if None in ids:
            raise UserError("condition_on_prev lacks the id of a token")
        while ids and ids[-1] == self.end:
            ids.pop()
        if ids.count(self.start) == 1:
            ids = ids[ids.index(self.start) + 1 :]
        body = next((place for place, token in enumerate(ids) if token not in self._frame), len(ids))
        frame, ids = ids[:body], ids[body:]
        self._require_known(ids, "condition_on_prev holds {}: it was written with another tokenizer")
        plain = [token for token in ids if not self.is_timestamp(token)]
        if self.no_timestamps in frame and len(plain) < len(ids):  # by a tokenizer of fewer languages it is <|0.00|>
            raise UserError("condition_on_prev holds <|notimestamps|> and timestamps: one of them is wrong")
        return ids if timestamps else plain

    def sequence(
        self, target: Target, language: str | None, task: str | None, prompt: list[int] = (), truncated: bool = False
    ) -> Sequence | None:
        """Build what the decoders see and what the loss compares.

        The loss ignores everything up to and including <|startoftranscript|> as a target. A truncated target gets no
        end token. The prompt is cut from the left to half the decoder's positions less one, and further if the label
        needs the room; None is returned when the label alone does not fit, which is never cut.
        """
        label = self.prefix(language, task, target.has_timestamps) + target.ids + ([] if truncated else [self.end])
        room = self.max_positions - (len(label) - 1)
        if room < 0:
            return None
        keep = min(self.max_prompt, room - 1)
        prompt = [self.previous, *prompt[-keep:]] if prompt and keep > 0 else []
        tokens = prompt + label
        first_target = len(prompt) + 1
        labels = [IGNORED] * (first_target - 1) + tokens[first_target:]
        return Sequence(tokens[:-1], labels)

    def decode(self, ids: list[int]) -> str:
        """Tokens as `whisper_transcript` text: timestamps as `<|1.20|>` marks, no other special token."""
        text, run = "", []
        for token in [*ids, None]:
            if token is not None and token < self.end:
                run.append(token)
                continue
            if run:
                text += self.tokenizer.decode(run, clean_up_tokenization_spaces=False)
                run = []
            if token is not None and self.is_timestamp(token):
                text += f"<|{(token - self.timestamp_begin) * TIME_PRECISION:.2f}|>"
        return text

    def _require_known(self, ids: list[int], sentence: str) -> None:
        """Raise UserError for the first token that is neither text nor a timestamp; {} in the sentence names it."""
        for token in ids:
            if not 0 <= token <= self.timestamp_end:
                raise UserError(sentence.format(f"the id {token}, which is not in the vocabulary"))
            if self.end <= token < self.timestamp_begin:
                name = self.tokenizer.convert_ids_to_tokens(token)
                raise UserError(sentence.format(f"the special token {name} ({token})"))

    @functools.cached_property
    def _frame(self) -> frozenset[int]:
        """What may stand before the text of a window."""
        tasks = {self._vocabulary[f"<|{task}|>"] for task in TASK_IDS if f"<|{task}|>" in self._vocabulary}
        return frozenset({self.previous, self.start, self.no_timestamps, *tasks, *self.languages.values()})

    def _without_frame(self, text: str) -> str:
        """Text without the prefix and the end token that datasets labelled elsewhere carry."""
        if "<|startoftranscript|>" in text:
            text = text.split("<|startoftranscript|>", 1)[1]
            while match := _SPECIAL.match(text):
                if TIMESTAMP_MARK.fullmatch(match.group()):
                    break
                text = text[match.end() :]
        return text.split("<|endoftext|>", 1)[0]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Whose ids these are: a digest of the vocabulary with its special tokens."""
        digest = hashlib.sha256()
        for token, index in sorted(self._vocabulary.items(), key=lambda item: item[1]):
            digest.update(f"{index}\t{token}\n".encode())
        return digest.hexdigest()[:16]


def plain_text(transcript: str) -> str:
    """A `whisper_transcript` without its timestamp marks and without the frame of datasets labelled elsewhere."""
    return " ".join(_SPECIAL.sub("", transcript).split()) if "<|" in transcript else transcript.strip()


def compression_ratio(text: str) -> float:
    """How much zlib shrinks a text (as openai/whisper measures it): loops of repeated words give high values."""
    encoded = text.encode("utf-8")
    return len(encoded) / len(zlib.compress(encoded))


def language_and_task(
    language: str | None, task: str | None, grammar: Grammar, generation_config
) -> tuple[str | None, str | None]:
    """The language code and task that a model is told: the flag, else its generation config.

    (None, None) for an English-only model. Raises UserError where a flag contradicts the model.
    """
    if not grammar.multilingual:
        if language is not None:
            raise UserError(f"--language {language} was given, but the model is English-only; use --language None")
        if task not in (None, "transcribe"):
            raise UserError(f"--task {task} was given, but the model is English-only; it can only transcribe")
        return None, None
    language = language or getattr(generation_config, "language", None)
    task = task or getattr(generation_config, "task", None) or "transcribe"
    return (grammar.language_code(language) if language else None), task
