"""Audio: files of any common kind to mono samples at the model's rate, and samples to log-mel frames."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import nn

from distil_whisper import ffmpeg
from distil_whisper.containers import AudioError, whole
from distil_whisper.errors import UserError

ENCODER_STRIDE = 2  # log-mel frames to one position of Whisper's encoder
LOUDEST = 1e12  # samples; sound has 1, and the squares of a spectrum of much more are infinite
LOG_FLOOR, LOG_RANGE = 1e-10, 8.0  # smallest mel power, and how many powers of ten below the loudest are kept
_BLOCK = 1 << 20  # samples read at once: a header may claim any length, what is there decides
_UNKNOWN_LENGTH = 1 << 40  # a header that claims more frames than this does not know
_SMALL = 300_000  # bytes of a file
_MOST_EXPANDED = 50  # times, as speech in Opus at 12 kbit/s
_SLACK_S = 0.1  # seconds of audio that a file may lack of those that its header claims: codecs pad

Audio = bytes | str | Path | dict


def decode(audio: Audio, sampling_rate: int) -> np.ndarray:
    """Encoded audio as float32 mono samples [n] in [-1, 1] at sampling_rate (in hertz), channels averaged.

    audio is the bytes of a file, a path, or what datasets calls an undecoded audio: {"bytes", "path"}; a decoded one,
    {"array", "sampling_rate"}, is taken too. WAV, FLAC, MP3, OGG and Opus, integers or floats, any number of channels;
    other kinds through FFmpeg, where there is one. Louder audio than [-1, 1] is divided by its peak, so that what is
    stored of it is what was heard.
    Raises AudioError where there is nothing to use: empty, unreadable or missing files, no samples, NaN, infinity, or
    numbers that no sound has; and for a file that is cut short or damaged, as far as its container tells.
    """
    if isinstance(audio, dict) and audio.get("array") is not None:
        samples, rate = _from_array(np.asarray(audio["array"])), rate_of(audio)
    else:
        samples, rate = _read(audio)
    peak = np.abs(samples).max(initial=0.0)
    if not np.isfinite(peak):
        raise AudioError("NaN or infinite samples")
    if peak > LOUDEST:
        raise AudioError(f"samples of {peak:.0e}")
    samples = _in_full_scale(samples)
    if rate != sampling_rate and len(samples):
        samples = _in_full_scale(soxr.resample(samples, rate, sampling_rate, quality="HQ"))
    if not len(samples):
        raise AudioError("zero samples")
    return np.ascontiguousarray(samples, dtype=np.float32)


def duration(audio: Audio) -> float:
    """Length of encoded audio in seconds, from its header where the header knows.

    Raises AudioError as decode does, except for what only the samples can show.
    """
    if isinstance(audio, dict) and audio.get("array") is not None:
        return max(np.shape(audio["array"])) / rate_of(audio)
    try:
        with _opened(audio) as file:
            frames, rate = file.frames if file.frames < _UNKNOWN_LENGTH else len(_mono(file)), file.samplerate
    except _UnknownFormat as refusal:
        samples, rate = _by_ffmpeg(audio, refusal)
        frames = len(samples)
    if not frames:
        raise AudioError("zero samples")
    return frames / rate


def rate_of(audio: dict) -> int:
    """The sampling rate of {"array", "sampling_rate"}, in hertz. Raises AudioError for what is no rate."""
    rate = audio["sampling_rate"]
    if rate is None or not float(rate).is_integer() or rate < 1:
        raise AudioError(f"no sampling rate, but {rate}" if rate else "no sampling rate")
    return int(rate)


def decoded_size(audio: Audio, sampling_rate: int) -> int:
    """About how many bytes of memory audio takes once it is decoded, with those that it takes before that.

    For a small file that is the most that a codec lets expect, without a look into it.
    """
    if isinstance(audio, dict) and audio.get("array") is not None:
        return 8 * np.size(audio["array"])
    try:
        source = _file_of(audio)
        encoded = os.path.getsize(source) if isinstance(source, str) else source.getbuffer().nbytes
        here = 0 if isinstance(source, str) else encoded
        if encoded < _SMALL:
            return here + _MOST_EXPANDED * encoded
        with _opened(audio) as file:
            known = file.frames < _UNKNOWN_LENGTH
            decoded = 4 * sampling_rate * file.frames // file.samplerate
        return here + (decoded if known else _MOST_EXPANDED * encoded)
    except _UnknownFormat:
        return here + _MOST_EXPANDED * encoded
    except AudioError:
        return 0


def encode(samples: np.ndarray, sampling_rate: int, format: str = "FLAC") -> bytes:
    """Mono samples [n] in [-1, 1] as a 16-bit FLAC or WAV file; louder ones are clipped. sampling_rate in hertz."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1.0, 1.0), sampling_rate, format=format, subtype="PCM_16")
    return buffer.getvalue()


@dataclass(frozen=True)
class Window:
    """What the encoder takes at once: sampling_rate in hertz, samples of audio, log-mel frames, mel bins."""

    sampling_rate: int
    samples: int
    frames: int
    mels: int

    @property
    def seconds(self) -> float:
        return self.samples / self.sampling_rate

    @classmethod
    def from_models(cls, feature_extractor, model_config) -> "Window":
        """The window of a Whisper checkpoint. Raises UserError if its feature extractor and its config disagree."""
        frames = ENCODER_STRIDE * model_config.max_source_positions
        window = cls(
            sampling_rate=feature_extractor.sampling_rate,
            samples=frames * feature_extractor.hop_length,
            frames=frames,
            mels=model_config.num_mel_bins,
        )
        if feature_extractor.feature_size != window.mels:
            raise UserError(
                f"the feature extractor makes {feature_extractor.feature_size} mel bins, but the model's config has "
                f"{window.mels}; give a feature extractor and a model of the same checkpoint"
            )
        if feature_extractor.n_samples != window.samples:
            raise UserError(
                f"the feature extractor's window is {feature_extractor.n_samples / window.sampling_rate:g} s, but the "
                f"model's is {window.seconds:g} s; give a feature extractor and a model of the same checkpoint"
            )
        return window


class LogMel(nn.Module):
    """Whisper's log-mel spectrogram on whatever device the samples are, after openai/whisper's audio.py.

    Takes float32 samples [batch, samples], gives float32 [batch, mels, samples // hop]; equal to transformers'
    WhisperFeatureExtractor, from which its settings come, to 1e-5.
    """

    def __init__(self, feature_extractor):
        super().__init__()
        self.n_fft = feature_extractor.n_fft
        self.hop_length = feature_extractor.hop_length
        filters = torch.as_tensor(feature_extractor.mel_filters, dtype=torch.float32).T.contiguous()
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)

    @torch.no_grad()
    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        if samples.device.type == "cpu" and len(samples) > 1:  # memory of the size of a window is used again
            return torch.cat([self(window) for window in samples.split(1)])
        # A half-precision autocast around the model would otherwise reach the product with the filters.
        with torch.autocast(samples.device.type, enabled=False):
            spectrum = torch.stft(
                samples.float(), self.n_fft, self.hop_length, window=self.window, return_complex=True
            )
            spectrum = spectrum[..., :-1]
            power = spectrum.real.square() + spectrum.imag.square()  # abs() takes a root, which is then undone
            logarithm = (self.filters @ power).clamp(min=LOG_FLOOR).log10()
            loudest = logarithm.amax(dim=(-2, -1), keepdim=True)
            return (torch.maximum(logarithm, loudest - LOG_RANGE) + 4.0) / 4.0


def stack(waveforms: list[np.ndarray], window: Window, pinned: bool = False) -> torch.Tensor:
    """Waveforms of any lengths as float32 [batch, window.samples], zeros after each one's end.

    pinned: in memory that a GPU copies fast, and which is kept for the next batch. Raises ValueError for a waveform
    that is longer than the window: audio is never cut silently.
    """
    batch = torch.empty(len(waveforms), window.samples, pin_memory=pinned)
    for row, samples in zip(batch, waveforms, strict=True):
        if len(samples) > window.samples:
            raise ValueError(
                f"{len(samples) / window.sampling_rate:.2f} s of audio do not fit a window of {window.seconds:g} s"
            )
        row[: len(samples)] = torch.from_numpy(samples)
        row[len(samples) :] = 0
    return batch


class _Forward(soundfile.SoundFile):
    """A file read once, from its start: soundfile's seeking fails where a header has no length (FLAC from a pipe).

    claimed: how many sample frames its container says that it has, 0 where that is not known.
    """

    def __init__(self, source: io.BytesIO | str, claimed: int | None):
        super().__init__(source)
        self.claimed = claimed or (self.frames if self.frames < _UNKNOWN_LENGTH else 0)

    def seekable(self) -> bool:
        return False


def _from_array(samples: np.ndarray) -> np.ndarray:
    """Samples of any type and number of channels as float32 mono in [-1, 1]: integers as large as their type allows.

    Those of 32 and 64 bits, the usual types of integers, are of 16 where all would fit, else of 32.
    """
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if kind in "iu":
        if bits >= 32:
            bits = 16 if np.abs(samples).max(initial=0) <= 1 << 15 else 32
        samples = (samples.astype(np.float64) - (1 << bits - 1) * (kind == "u")) / (1 << bits - 1)
    samples = samples.astype(np.float32)
    return samples.mean(axis=int(np.argmin(samples.shape))) if samples.ndim == 2 else samples


def _in_full_scale(samples: np.ndarray) -> np.ndarray:
    peak = np.abs(samples).max(initial=0.0)
    return samples / peak if peak > 1.0 else samples


class _UnknownFormat(AudioError):
    """A file that libsndfile does not open."""


def _read(audio: Audio) -> tuple[np.ndarray, int]:
    """A file's samples, channels averaged, and their rate."""
    try:
        with _opened(audio) as file:
            samples, rate = _mono(file), file.samplerate
            if file.claimed - len(samples) > _SLACK_S * rate:
                found = f"{len(samples) / rate:.2f} of {file.claimed / rate:.2f} s can be read"
                raise AudioError(f"cut short or damaged: {found}")
            return samples, rate
    except _UnknownFormat as refusal:
        return _by_ffmpeg(audio, refusal)


def _by_ffmpeg(audio: Audio, refusal: _UnknownFormat) -> tuple[np.ndarray, int]:
    source, name = _file_of(audio), str(audio.get("path") or "") if isinstance(audio, dict) else str(audio)
    if not ffmpeg.is_for_ffmpeg(source, name):
        raise refusal
    return ffmpeg.read(source, name)


@contextmanager
def _opened(audio: Audio) -> Iterator[_Forward]:
    source, claimed = whole(_file_of(audio))
    try:
        file = _Forward(source, claimed)
    except soundfile.LibsndfileError as error:
        raise _UnknownFormat(_reason(error)) from error
    except TypeError as error:  # soundfile asks for the format of a name that ends in .raw
        raise AudioError("unreadable: raw samples have no header") from error
    with file:
        try:
            yield file
        except soundfile.LibsndfileError as error:
            raise AudioError(_reason(error)) from error


def _reason(error: soundfile.LibsndfileError) -> str:
    reason = error.error_string.strip().rstrip(".")
    if "does not exist" in reason:  # what libsndfile says of a short MP3, too
        reason = "no file of a known format"
    return f"unreadable: {reason}"


def _file_of(audio: Audio) -> io.BytesIO | str:
    if isinstance(audio, dict):
        audio = audio.get("path") if audio.get("bytes") is None else audio["bytes"]
    if audio is None:
        raise AudioError("no audio")
    if isinstance(audio, bytes):
        if not audio:
            raise AudioError("empty file")
        return io.BytesIO(audio)
    if not os.path.isfile(audio):
        raise AudioError(f"missing file: {audio}")
    if not os.path.getsize(audio):
        raise AudioError("empty file")
    return str(audio)


def _mono(file: soundfile.SoundFile) -> np.ndarray:
    blocks = []
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block.mean(axis=1))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
