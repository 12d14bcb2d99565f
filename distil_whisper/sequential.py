"""Transcription of long recordings window after window, each from the last timestamp of the one before.

The algorithm of the Whisper paper (https://arxiv.org/abs/2212.04356, section 3.8), for several recordings at once.
What is heard in one depends neither on those beside it nor on how many they are.
"""

import hashlib
import zlib
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import LogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from distil_whisper.attention import for_any_length
from distil_whisper.audio import ENCODER_STRIDE, LogMel
from distil_whisper.decoding import Decoded, SearchScores, decoded, first_logits
from distil_whisper.models import LoadedWhisper, encoder_states
from distil_whisper.tokens import plain_text
from distil_whisper.transcribers import Transcript, new_tokens, told

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # openai/whisper's
LOW_TEMPERATURE = 0.5  # text from above it is no prompt, as in openai/whisper


@dataclass(frozen=True)
class Fallback:
    """When a window is decoded again at a higher temperature, as in openai/whisper.

    compression_ratio is of token bytes (transformers' measure); a window with a lower mean logprob than `logprob` is
    repeated, or skipped as silence if its no-speech probability is above `no_speech`.
    """

    compression_ratio: float = 1.35
    logprob: float = -1.0
    no_speech: float = 0.6
    seed: int = 42

    def is_silence(self, found: Decoded) -> bool:
        """Whether the text of a window is to be left out."""
        return found.avg_logprob < self.logprob and found.no_speech_prob > self.no_speech

    def repeats(self, found: Decoded, tokens: bytes) -> bool:
        """Whether the text of a window, whose tokens as bytes are given, is too unlikely or too repetitive."""
        repetitive = len(tokens) / len(zlib.compress(tokens)) > self.compression_ratio
        return (repetitive or found.avg_logprob < self.logprob) and not self.is_silence(found)

    def draws(self, name: str, frame: int, attempt: int, count: int) -> np.ndarray:
        """Numbers from 0 to 1 for the tokens of an attempt at the window of a recording that begins at a frame."""
        recording = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        return np.random.default_rng([self.seed, recording, frame, attempt]).random(count, dtype=np.float32)


@dataclass(frozen=True)
class Segment:
    """Tokens between two timestamps, those included, and their times in seconds."""

    start: float
    end: float
    tokens: list[int]


@dataclass
class Recording:
    """How far a recording is transcribed. frames: its length in log-mel; frame: where the next window begins."""

    index: int
    name: str
    frames: int
    frame: int = 0
    segments: list[Segment] = field(default_factory=list)
    prompt_from: int = 0  # the first segment that may be in a prompt
    problem: str | None = None

    def prompt(self) -> list[int]:
        """The tokens of what came before."""
        return [token for segment in self.segments[self.prompt_from :] for token in segment.tokens]

    def take(self, tokens: list[int], begin: int, window: int, frame_seconds: float) -> None:
        """Take in what was heard in a window of so many frames, and go on after its last whole segment.

        begin: the first timestamp token. Where no segment is followed by another, the window is one.
        """
        at, step = self.frame * frame_seconds, ENCODER_STRIDE * frame_seconds
        is_time = [token >= begin for token in tokens]
        ends = [place + 1 for place, pair in enumerate(pairwise(is_time)) if all(pair)]
        if not ends:
            times = [token for token in tokens if token > begin]
            seconds = (times[-1] - begin if times else window // ENCODER_STRIDE) * step
            self.segments.append(Segment(at, at + seconds, tokens))
            self.frame += window
            return
        if is_time[-2:] == [False, True]:  # nothing was heard after the last segment
            ends.append(len(tokens))
            self.frame += window
        else:
            self.frame += (tokens[ends[-1] - 1] - begin) * ENCODER_STRIDE
        for first, end in pairwise([0, *ends]):
            part = tokens[first:end]
            self.segments.append(Segment(at + (part[0] - begin) * step, at + (part[-1] - begin) * step, part))


class Drawn(LogitsProcessor):
    """Leaves one token of each row, and keeps its log-probability before the temperature: the likeliest token, or at a
    temperature above 0 the one that the row's number of `draws` [B, T] falls on, from 0 to 1."""

    def __init__(self, temperature: float, draws: torch.Tensor | None):
        self.temperature = temperature
        self.draws = draws
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        logprobs = scores.float().log_softmax(-1)
        chosen = scores.argmax(-1, keepdim=True)
        if self.temperature > 0:
            upto = (logprobs.double() / self.temperature).softmax(-1).cumsum(-1)
            draw = self.draws[:, len(self.steps), None] * upto[:, -1:]
            chosen = torch.searchsorted(upto, draw, right=True)
        self.steps.append(logprobs.gather(1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def of_tokens(self, generated: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [B, T] of generated tokens [B, T]; what follows an end token has no meaning."""
        return torch.stack(self.steps[: generated.shape[1]], 1)


class WindowSearch:
    """Decodes windows with timestamps, each after a prompt of its own, by transformers' search."""

    def __init__(self, whisper: LoadedWhisper, num_beams: int, most: int):
        self.model = whisper.model
        self.grammar = whisper.grammar
        self.num_beams = num_beams
        self.most = most

    @for_any_length()
    def __call__(
        self,
        encoded: torch.Tensor,
        prompts: list[list[int]],
        language: str | None,
        task: str | None,
        temperature: float = 0.0,
        draws: torch.Tensor | None = None,
    ) -> list[Decoded]:
        """What is heard in encoder states [B, positions, width]; above temperature 0, by draws [B, T] and without
        beams."""
        prefix, width = self.grammar.prefix(language, task, True), max(map(len, prompts))
        rows = [[self.grammar.end] * (width - len(prompt)) + prompt + prefix for prompt in prompts]
        ids = torch.tensor(rows, device=encoded.device)
        kept = torch.arange(ids.shape[1]) >= torch.tensor([[width - len(prompt)] for prompt in prompts])
        beams = self.num_beams if temperature == 0 else 1
        scores = SearchScores(beams) if beams > 1 else Drawn(temperature, draws)
        with first_logits(self.model) as captured:
            output = self.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                attention_mask=torch.ones(encoded.shape[:2], dtype=torch.long, device=encoded.device),
                decoder_input_ids=ids,
                force_unique_generate_call=True,
                return_timestamps=True,
                num_beams=beams,
                max_new_tokens=self.most,
                logits_processor=[scores],
                return_dict_in_generate=beams > 1,
                **({"decoder_attention_mask": kept.to(ids)} if width else {}),
                **told(self.grammar, language, task),
            )
        if beams > 1:
            generated = output.sequences[:, ids.shape[1] :]
            logprobs = scores.of_tokens(generated, output.beam_indices)
        else:
            generated = output[:, ids.shape[1] :]
            logprobs = scores.of_tokens(generated)
        first = captured[0][::beams, width].float()
        return decoded(self.grammar, generated.tolist(), logprobs.tolist(), first)


class Sequential:
    """Transcribes recordings of any length, some of them at once.

    With a fallback, windows whose text is unlikely or repetitive are decoded again at higher temperatures.
    """

    def __init__(
        self,
        whisper: LoadedWhisper,
        batch_size: int,
        num_beams: int = 1,
        max_label_length: int | None = None,
        condition_on_prev_tokens: bool = False,
        fallback: Fallback | None = None,
        return_timestamps: bool = False,
    ):
        self.whisper = whisper
        self.batch_size = batch_size
        self.log_mel = LogMel(whisper.feature_extractor).to(whisper.model.device)
        self.fallback = fallback
        self.condition_on_prev_tokens = condition_on_prev_tokens
        self.return_timestamps = return_timestamps
        most = new_tokens(whisper, max_label_length, prompted=condition_on_prev_tokens)
        self.search = WindowSearch(whisper, num_beams, most)

    def is_full(self, waveforms: list[np.ndarray]) -> bool:
        """Whether so many recordings make a batch."""
        return len(waveforms) >= self.batch_size

    @torch.no_grad()
    def __call__(
        self, waveforms: list[np.ndarray], language: str | None, task: str | None, names: list[str]
    ) -> list[Transcript]:
        """Transcribe recordings (mono at the model's rate); a name and the seed decide what is drawn for one."""
        features = self._features(waveforms)
        lengths = [-(-len(waveform) // self.log_mel.hop_length) for waveform in waveforms]
        recordings = [Recording(*known) for known in zip(range(len(names)), names, lengths, strict=True)]
        while running := [recording for recording in recordings if recording.frame < recording.frames]:
            windows = torch.stack([self._window(features[recording.index], recording) for recording in running])
            encoded = encoder_states(self.whisper.model.get_encoder(), windows)
            for recording, found in zip(running, self._heard(encoded, running, language, task), strict=True):
                self._take(recording, *found)
        return [replace(self._transcript(recording.segments), problem=recording.problem) for recording in recordings]

    def _features(self, waveforms: list[np.ndarray]) -> torch.Tensor:
        """Log-mel frames [B, mels, frames] of the longest recording and some more: all end in silence."""
        longest = max(map(len, waveforms)) + self.log_mel.n_fft
        batch = torch.zeros(len(waveforms), longest)
        for row, waveform in zip(batch, waveforms, strict=True):
            row[: len(waveform)] = torch.from_numpy(waveform)
        return self.log_mel(batch.to(self.whisper.model.device)).to(self.whisper.model.dtype)

    def _window(self, features: torch.Tensor, recording: Recording) -> torch.Tensor:
        """The next window [mels, frames] of a recording, zeros after its end."""
        frames = self._frames(recording)
        part = features[:, recording.frame : recording.frame + frames]
        return pad(part, (0, self.whisper.window.frames - frames))

    def _frames(self, recording: Recording) -> int:
        return min(recording.frames - recording.frame, self.whisper.window.frames)

    def _heard(
        self, encoded: torch.Tensor, running: list[Recording], language: str | None, task: str | None
    ) -> list[tuple[Decoded, float]]:
        """What is heard in the next windows of recordings, and at which temperature."""
        prompts = [self._prompt(recording) for recording in running]
        found: dict[int, tuple[Decoded, float]] = {}
        left = list(range(len(running)))
        for attempt, temperature in enumerate(TEMPERATURES if self.fallback else TEMPERATURES[:1]):
            draws = self._draws([running[row] for row in left], attempt) if temperature else None
            rows = self.search(encoded[left], [prompts[row] for row in left], language, task, temperature, draws)
            found |= {row: (result, temperature) for row, result in zip(left, rows, strict=True)}
            left = [
                row for row in left if self.fallback and not found[row][0].problem and self._is_poor(found[row][0])
            ]
            if not left:
                break
        return [found[row] for row in range(len(running))]

    def _draws(self, recordings: list[Recording], attempt: int) -> torch.Tensor:
        of_rows = [self.fallback.draws(row.name, row.frame, attempt, self.search.most) for row in recordings]
        return torch.from_numpy(np.stack(of_rows)).double().to(self.whisper.model.device)

    def _is_poor(self, found: Decoded) -> bool:
        length = int(np.log2(self.whisper.model.config.vocab_size) / 8) + 1  # bytes of a token, as transformers counts
        tokens = [*found.ids, self.whisper.grammar.end][: self.search.most]
        return self.fallback.repeats(found, b"".join(token.to_bytes(length, "little") for token in tokens))

    def _prompt(self, recording: Recording) -> list[int]:
        prompt = recording.prompt() if self.condition_on_prev_tokens else []
        return [self.whisper.grammar.previous, *prompt[-self.whisper.grammar.max_prompt :]] if prompt else []

    def _take(self, recording: Recording, found: Decoded, temperature: float) -> None:
        if found.problem is not None:
            recording.problem, recording.frame = found.problem, recording.frames
            return
        window, frame_seconds = self._frames(recording), self.whisper.window.seconds / self.whisper.window.frames
        if self.fallback and self.fallback.is_silence(found):
            recording.frame += window
            return
        recording.take(found.ids, self.whisper.grammar.timestamp_begin, window, frame_seconds)
        if temperature > LOW_TEMPERATURE:
            recording.prompt_from = len(recording.segments)

    def _transcript(self, segments: list[Segment]) -> Transcript:
        texts = [self.whisper.grammar.decode(segment.tokens) for segment in segments]
        text = plain_text("".join(texts))
        if not self.return_timestamps:
            return Transcript(text)
        timed = [
            {"start": round(segment.start, 2), "end": round(segment.end, 2), "text": plain_text(part)}
            for segment, part in zip(segments, texts, strict=True)
        ]
        return Transcript(text, {"segments": timed})
