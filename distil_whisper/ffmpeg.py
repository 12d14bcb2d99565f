"""Audio that libsndfile cannot read (m4a and other AAC, WebM, WMA, G.722, AMR), through FFmpeg where there is one.

PyAV comes first: it decodes in this process, from memory too. Else the program ffmpeg does, by way of temporary files.
Either is given files alone, and no protocol of a network.
"""

import contextlib
import importlib.util
import io
import re
import shutil
import subprocess
import tempfile

import numpy as np
import soundfile

from distil_whisper.containers import AudioError

NEEDED = "needs FFmpeg"  # how the reason begins of audio that is read once there is one
PROTOCOLS = {"protocol_whitelist": "file,pipe"}
_WAV_TAGS = (b"\x64\0", b"\x65\0", b"\x8f\2", b"\xff\0", b"\x60\1", b"\x61\1")  # G.726, G.722 (two), AAC, WMA (two)
_SLACK_S = 0.2  # seconds that may be missing: AAC pads its ends
_ROUNDED_S = 0.01  # to which the program rounds a length
# What states a length: each stream of MP4; of WebM and WMA the file, as long as its longest stream. The length of
# other kinds is a guess of FFmpeg's from their bit rate.
_STREAMS_STATE, _FILE_STATES = "mov", ("matroska", "asf")
_QUIETLY = ["-nostdin", "-hide_banner", "-nostats", "-v", "level+info", "-xerror"]
_TO_WAV = ["-map", "0:a:0", "-f", "wav", "-c:a", "pcm_f32le", "pipe:1"]
_BLOCK = 1 << 20  # samples


def is_for_ffmpeg(source: io.BytesIO | str, name: str) -> bool:
    """Whether a file that libsndfile refused is of a kind that FFmpeg reads, by its first bytes or its name."""
    with open(source, "rb") if isinstance(source, str) else io.BytesIO(source.getbuffer()) as file:
        head = file.read(22)
    aac = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0
    known = (b"\x1aE\xdf\xa3", b"0&\xb2u\x8ef\xcf\x11", b"#!AMR", b"ADIF", b"OggS")  # WebM, WMA; Ogg of other codecs
    in_wav = head[8:16] == b"WAVEfmt " and head[20:22] in _WAV_TAGS
    return aac or in_wav or head.startswith(known) or head[4:8] == b"ftyp" or _is_g722(name)


def is_there() -> bool:
    """Whether audio of such kinds can be read here."""
    return _has_pyav() or shutil.which("ffmpeg") is not None


def read(source: io.BytesIO | str, name: str) -> tuple[np.ndarray, int]:
    """Mono samples [n] as float32, channels averaged, and their rate in hertz. Raises AudioError for what cannot be
    read, and where there is nothing to read it with."""
    form = "g722" if _is_g722(name) else None
    if not is_there():
        raise AudioError(f"{NEEDED}: install PyAV (pip install av) or the program ffmpeg, and start again")
    blocks, rate, claimed = (_by_pyav if _has_pyav() else _by_program)(source, form)
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if claimed is None:
        return samples, rate
    if claimed - len(samples) / (rate or 1) > _SLACK_S:
        raise AudioError(f"cut short or damaged: {len(samples) / (rate or 1):.2f} of {claimed:.2f} s can be read")
    return samples[: round((claimed + _ROUNDED_S) * rate)], rate  # the rest is padding


def _is_g722(name: str) -> bool:
    return name.lower().endswith((".g722", ".722"))


def _has_pyav() -> bool:
    return importlib.util.find_spec("av") is not None


def _by_pyav(source: io.BytesIO | str, form: str | None) -> tuple[list[np.ndarray], int, float | None]:
    """Blocks of mono samples, their rate, and the seconds that the file says its audio has, None if it does not."""
    import av

    try:
        with (
            open(source, "rb") if isinstance(source, str) else io.BytesIO(source.getbuffer()) as file,
            av.open(file, format=form, options=PROTOCOLS) as container,
        ):
            if not container.streams.audio:
                raise AudioError("unreadable: no audio in it")
            stream = container.streams.audio[0]
            blocks, rate, left_out = _mono_blocks(container, stream)
            claimed = _claimed_length(container, stream, left_out)
    except (av.error.FFmpegError, ValueError) as error:  # a rate or layout that changes is a ValueError
        raise AudioError(f"unreadable: {getattr(error, 'strerror', None) or error}") from error
    return blocks, rate, claimed


def _claimed_length(container, stream, left_out: float) -> float | None:
    """The seconds that the audio stream of a file has by its header, None where that does not tell."""
    kind, alone = container.format.name, len(container.streams) == 1
    if not kind.startswith(_STREAMS_STATE) and not (alone and kind.startswith(_FILE_STATES)):
        return None
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 - left_out if alone and container.duration else None


def _mono_blocks(container, stream) -> tuple[list[np.ndarray], int, float]:
    """Blocks of samples, their rate, and the seconds that the stream leaves out between them, such as silence."""
    import av

    as_floats = av.AudioResampler(format="fltp")
    blocks, rate, end = [], 0, 0.0
    for frame in container.decode(stream):
        blocks += [part.to_ndarray().mean(axis=0) for part in as_floats.resample(frame)]
        rate = frame.sample_rate
        end = frame.time + frame.samples / rate if frame.time is not None else end
    return blocks, rate, max(end - sum(map(len, blocks)) / (rate or 1), 0.0)


def _by_program(source: io.BytesIO | str, form: str | None) -> tuple[list[np.ndarray], int, float | None]:
    """As _by_pyav."""
    with contextlib.ExitStack() as files:
        if not isinstance(source, str):
            copy = files.enter_context(tempfile.NamedTemporaryFile())  # its index may stand at its end
            copy.write(source.getbuffer())
            copy.flush()
            source = copy.name
        wav = files.enter_context(tempfile.TemporaryFile())
        options = [part for name, value in PROTOCOLS.items() for part in (f"-{name}", value)]
        options += ["-f", form] if form else []
        command = ["ffmpeg", *_QUIETLY, *options, "-i", f"file:{source}", *_TO_WAV]
        ended = subprocess.run(command, stdout=wav, stderr=subprocess.PIPE)
        said = ended.stderr.decode(errors="replace")
        wrong = [line for line in said.splitlines() if re.search(r"\[(error|fatal)\]", line)]
        if ended.returncode or wrong:
            raise AudioError(f"unreadable: ffmpeg says {wrong[0].strip() if wrong else ended.returncode}")
        wav.seek(0)
        with soundfile.SoundFile(wav) as file:
            blocks = [block.mean(axis=1) for block in file.blocks(_BLOCK, dtype="float32", always_2d=True)]
            return blocks, file.samplerate, _said_length(said)


def _said_length(said: str) -> float | None:
    """The seconds that a file of one stream says it has, in the words of the program.

    Of several streams it tells no lengths, and of WebM not what is left out between its samples.
    """
    header = said.partition("Stream mapping:")[0]
    found = re.search(r"Input #0, (mov|asf).*?Duration: (\d+):(\d+):([\d.]+)", header, re.DOTALL)
    if found is None or header.count("  Stream #0:") > 1:
        return None
    return 3600 * int(found[2]) + 60 * int(found[3]) + float(found[4])
