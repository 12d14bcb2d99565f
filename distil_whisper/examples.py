"""Training examples: a row of a dataset becomes a waveform and a token sequence, and rows become a batch."""

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import pad
from transformers.models.whisper.tokenization_whisper import TASK_IDS

from distil_whisper.audio import AudioError, Window, decode, stack
from distil_whisper.augmentation import WaveformAugment, at_speed
from distil_whisper.copies import on_device
from distil_whisper.cutting import REMOVED, cut_samples
from distil_whisper.errors import UserError
from distil_whisper.tokens import IGNORED, Grammar, Sequence, Target

TENSORS = ("waveforms", "decoder_input_ids", "labels", "valid_positions")  # of a batch


@dataclass(frozen=True)
class LabelSettings:
    """How rows become token sequences."""

    timestamp_probability: float
    condition_on_prev_probability: float
    seed: int


@dataclass(frozen=True)
class LabelColumns:
    """Where the labels of one dataset stand. pseudo: take `whisper_transcript`, else the text column.

    language and task hold for every row; where they are None the row's own columns do, and then the defaults. All four
    are None for an English-only model. told: each row says itself what its teacher was told, which goes first.
    """

    text: str | None
    pseudo: bool
    language: str | None = None
    task: str | None = None
    default_language: str | None = None
    default_task: str | None = None
    language_column: str = "language"
    task_column: str = "task"
    told: bool = False


@dataclass(frozen=True)
class Example:
    """One training example. Without a sequence it trains nothing, and `problem` says why if that is worth telling."""

    row_id: str
    samples: np.ndarray | None = None
    sequence: Sequence | None = None
    problem: str | None = None
    audio_key: str = ""


@dataclass
class Batch:
    """What the training step is given, and what the record and the caches of it need.

    valid_positions [tokens] are where the flattened labels are not ignored: a GPU that had to look for them would be
    waited for. audio_keys are digests of the samples ("" if they were not asked for), lengths the decoder positions
    in use. row_ids are those of the rows that are trained on, in order. prompts_left_out counts the rows that were to
    have a prompt which could not be used.
    """

    waveforms: torch.Tensor
    decoder_input_ids: torch.Tensor
    labels: torch.Tensor
    valid_positions: torch.Tensor
    seconds: float
    problems: list[tuple[str, str]]
    audio_keys: list[str]
    lengths: list[int]
    row_ids: list[str]
    prompts_left_out: int

    @property
    def tokens(self) -> int:
        """How many labels are trained on."""
        return len(self.valid_positions)

    def inputs(self, device) -> dict[str, torch.Tensor]:
        """The training step's arguments, on a device."""
        return on_device({name: getattr(self, name) for name in TENSORS}, device)

    def pin_memory(self) -> "Batch":
        """The batch where a GPU copies from while the model computes; a DataLoader calls it."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in TENSORS})


class Labeller:
    """From a row to its token sequence. Whether a row keeps its timestamps and its prompt is drawn on each visit, from
    (seed, visit, row_id): repeats differ, and a resume changes nothing. The visit is how often the row came before,
    which the order of training tells."""

    def __init__(self, grammar: Grammar, settings: LabelSettings):
        self.grammar = grammar
        self.settings = settings

    def target(self, row: dict, columns: LabelColumns) -> Target:
        """The full transcript of a row as tokens, timestamps included if it has any."""
        if not columns.pseudo:
            return Target(self.grammar.encode_transcript(row[columns.text] or "", self.language(row, columns)), False)
        ids = row.get("whisper_token_ids")
        if ids is not None and row.get("tokenizer_fingerprint") in (None, self.grammar.fingerprint):
            return self.grammar.target_of_ids(ids)
        return self.grammar.encode_pseudo_label(row["whisper_transcript"] or "")

    def language(self, row: dict, columns: LabelColumns) -> str | None:
        """The language of a row: that of the run, else its own, else the default; None for an English-only model.

        Raises UserError for one that the model has not.
        """
        if not self.grammar.multilingual:
            return None
        own = row.get(columns.language_column)
        found = (columns.told and own) or columns.language or own
        return self.grammar.language_code(found) if found else columns.default_language

    def task(self, row: dict, columns: LabelColumns) -> str | None:
        """The task of a row, found as the language is."""
        own = row.get(columns.task_column)
        return (columns.told and own) or columns.task or own or columns.default_task

    def untold(self, row: dict, columns: LabelColumns) -> str | None:
        """Why nobody can say what the model is to be told of a row, None where that is known."""
        if not self.grammar.multilingual:
            return None
        try:
            language = self.language(row, columns)
        except UserError:
            return f"a language in column {columns.language_column} that the model has not"
        if language is None:
            return f"no language in column {columns.language_column}"
        return None if self.task(row, columns) in TASK_IDS else f"no task of Whisper's in column {columns.task_column}"

    def sequence(
        self,
        row: dict,
        columns: LabelColumns,
        row_id: str,
        visit: int,
        speed: float = 1.0,
        window_seconds: float = math.inf,
    ) -> Sequence | None:
        """What the decoders see of a row on a visit, its audio faster by a factor; None if the label does not fit.

        Raises UserError for a label that cannot be used.
        """
        target = at_speed(self.target(row, columns), speed, self.grammar, window_seconds)
        return self.variant(row, columns, target, *self.drawn(row_id, visit))

    def drawn(self, row_id: str, visit: int) -> tuple[bool, bool]:
        """Whether a row keeps its timestamps on a visit, and whether it is given its prompt."""
        timestamp_draw, prompt_draw = draws(self.settings.seed, visit, row_id)
        settings = self.settings
        return timestamp_draw < settings.timestamp_probability, prompt_draw < settings.condition_on_prev_probability

    def variant(
        self, row: dict, columns: LabelColumns, target: Target, timestamps: bool, prompted: bool
    ) -> Sequence | None:
        """What the decoders see of a target with or without its timestamps and the row's prompt; None if it does not
        fit. A prompt that cannot be used is left out."""
        target = target if timestamps else self.grammar.without_timestamps(target)
        prompt, left_out = [], False
        if columns.pseudo and prompted:
            try:
                prompt = self.prompt(row, target.has_timestamps)
            except UserError:
                left_out = True
        sequence = self.frame(row, columns, target, prompt)
        return replace(sequence, prompt_left_out=True) if sequence and left_out else sequence

    def frame(self, row: dict, columns: LabelColumns, target: Target, prompt: list[int] = ()) -> Sequence | None:
        """A target with the row's prefix, and with an end token unless the teacher never came to it."""
        truncated = columns.pseudo and bool(row.get("truncated"))
        return self.grammar.sequence(target, self.language(row, columns), self.task(row, columns), prompt, truncated)

    def prompt(self, row: dict, timestamps: bool) -> list[int]:
        """The previous window's tokens. Raises UserError where they cannot be used."""
        ids = row.get("condition_on_prev")
        fingerprint = row.get("tokenizer_fingerprint")
        if ids and fingerprint not in (None, self.grammar.fingerprint):
            raise UserError(
                f"condition_on_prev was written with another tokenizer ({fingerprint}) than the student's "
                f"({self.grammar.fingerprint})"
            )
        return self.grammar.prompt_of_ids(ids, timestamps)


class ExampleMaker:
    """From a row to an Example: its audio decoded, its sequence built. Runs in DataLoader workers."""

    def __init__(
        self,
        labeller: Labeller,
        window: Window,
        audio_column: str,
        augment: WaveformAugment | None = None,
        audio_keys: bool = False,
    ):
        self.labeller = labeller
        self.window = window
        self.audio_column = audio_column
        self.augment = augment
        self.audio_keys = audio_keys

    def __call__(self, row: dict, columns: LabelColumns, row_id: str, visit: int) -> Example:
        """The example of a row; one with a problem where its audio or its label cannot be used."""
        try:
            samples = decode(row[self.audio_column], self.window.sampling_rate)
        except AudioError as error:
            return Example(row_id, problem=str(error))
        samples = cut_samples(samples, row.get(REMOVED), self.window.sampling_rate)
        if len(samples) > self.window.samples:
            seconds = len(samples) / self.window.sampling_rate
            return Example(row_id, problem=f"longer than the window: {seconds:.1f} s of {self.window.seconds:g} s")
        speed = 1.0
        if self.augment:
            draw = np.random.default_rng(_digest("augment", self.labeller.settings.seed, visit, row_id))
            samples, speed = self.augment(samples, self.window.samples, draw)
        try:
            sequence = self.labeller.sequence(row, columns, row_id, visit, speed, self.window.seconds)
        except UserError as error:
            return Example(row_id, problem=str(error))
        if sequence is None:
            return Example(row_id, problem="label longer than the decoder's positions")
        key = hashlib.blake2b(samples.tobytes(), digest_size=12).hexdigest() if self.audio_keys else ""
        return Example(row_id, samples, sequence, audio_key=key)


class Collator:
    """From examples to a Batch, padded to the longest label of the batch (to a multiple of 8, for the sake of
    matrix units). A batch with no usable example holds one silent window whose labels are all ignored."""

    def __init__(self, window: Window, padding: int, multiple: int = 8):
        self.window = window
        self.padding = padding
        self.multiple = multiple

    def __call__(self, examples: list[Example]) -> Batch:
        """Examples as one batch; those with a problem are left out and listed."""
        problems = [(example.row_id, example.problem) for example in examples if example.problem]
        good = [example for example in examples if example.sequence is not None]
        sequences = [example.sequence for example in good] or [Sequence([self.padding], [IGNORED])]
        samples = [example.samples for example in good] or [np.zeros(0, np.float32)]
        longest = max(len(sequence.labels) for sequence in sequences)
        length = -(-longest // self.multiple) * self.multiple
        inputs = torch.full((len(sequences), length), self.padding)
        labels = torch.full((len(sequences), length), IGNORED)
        for row, sequence in enumerate(sequences):
            inputs[row, : len(sequence.labels)] = torch.tensor(sequence.decoder_input_ids)
            labels[row, : len(sequence.labels)] = torch.tensor(sequence.labels)
        seconds = sum(len(part) for part in samples) / self.window.sampling_rate
        keys = [example.audio_key for example in good] or [""]
        lengths = [len(sequence.labels) for sequence in sequences]
        ids, waveforms, valid = [example.row_id for example in good], stack(samples, self.window), positions_of(labels)
        left_out = sum(sequence.prompt_left_out for sequence in sequences)
        return Batch(waveforms, inputs, labels, valid, seconds, problems, keys, lengths, ids, left_out)


def positions_of(labels: torch.Tensor) -> torch.Tensor:
    """Where flattened labels are not ignored, in order."""
    return (labels.flatten() != IGNORED).nonzero()[:, 0]


def joined(parts: list[Batch], padding: int) -> Batch:
    """Parts of a batch as one, in their order; those that train nothing are left out, unless there is no other."""
    problems = [problem for part in parts for problem in part.problems]
    parts = [part for part in parts if part.tokens] or parts[:1]
    if len(parts) == 1:
        return replace(parts[0], problems=problems)
    length = max(part.labels.shape[1] for part in parts)

    def together(name: str, value: int) -> torch.Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([pad(tensor, (0, length - tensor.shape[1]), value=value) for tensor in tensors])

    labels = together("labels", IGNORED)
    return Batch(
        torch.cat([part.waveforms for part in parts]),
        together("decoder_input_ids", padding),
        labels,
        positions_of(labels),
        sum(part.seconds for part in parts),
        problems,
        [key for part in parts for key in part.audio_keys],
        [length for part in parts for length in part.lengths],
        [row_id for part in parts for row_id in part.row_ids],
        sum(part.prompts_left_out for part in parts),
    )


def draws(seed: int, visit: int, row_id: str) -> tuple[float, float]:
    """Two uniform numbers in [0, 1) that depend on nothing but the arguments."""
    return tuple(part / 2**64 for part in divmod(_digest(seed, visit, row_id), 2**64))


def _digest(*parts) -> int:
    """A number of 128 bits that the parts decide."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest(), "big")
