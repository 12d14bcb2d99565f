"""Decoding of every kind of file, the window of a model, and log-mel equal to transformers'."""

import io
import struct

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor

from distil_whisper.audio import LOUDEST, AudioError, LogMel, Window, decode, duration, encode, stack
from distil_whisper.errors import UserError

RATE = 16_000
SECONDS = 0.75


def tone(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """440 Hz at 0.4, faded in and out so that resampling has no edge to ring at."""
    times = np.arange(round(rate * seconds)) / rate
    return (0.4 * np.sin(2 * np.pi * 440 * times) * np.sin(np.pi * times / seconds)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, format: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


# The last column is how far, in root mean square, the result may be from the tone.
KINDS = [
    ("WAV", "PCM_U8", 8_000, 1, 6e-3),
    ("WAV", "PCM_16", 16_000, 1, 2e-5),
    ("WAV", "PCM_16", 44_100, 2, 1e-4),
    ("WAV", "PCM_24", 96_000, 6, 1e-4),
    ("WAV", "PCM_32", 22_050, 3, 1e-4),
    ("WAV", "FLOAT", 48_000, 2, 1e-4),
    ("WAV", "DOUBLE", 11_025, 1, 1e-4),
    ("FLAC", "PCM_S8", 16_000, 1, 3e-3),
    ("FLAC", "PCM_16", 32_000, 4, 1e-4),
    ("FLAC", "PCM_24", 88_200, 2, 1e-4),
    ("OGG", "VORBIS", 44_100, 2, 5e-3),
    ("OGG", "OPUS", 48_000, 2, 2e-2),
    ("OGG", "OPUS", 16_000, 1, 2e-2),
    ("MP3", "MPEG_LAYER_III", 44_100, 2, 5e-3),
    ("MP3", "MPEG_LAYER_III", 16_000, 1, 5e-3),
]


@pytest.mark.parametrize(("format", "subtype", "rate", "channels", "distance"), KINDS)
def test_every_kind_of_file_becomes_mono_at_the_asked_rate(format, subtype, rate, channels, distance):
    # Channels of different loudness: only their average is the tone again.
    gains = np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1)
    audio = encoded(tone(rate)[:, None] * gains, rate, format, subtype)
    samples = decode(audio, RATE)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - SECONDS * RATE) <= 1
    expected = tone(RATE)
    shared = min(len(samples), len(expected))
    assert np.sqrt(np.mean((samples[:shared] - expected[:shared]) ** 2)) < distance
    assert duration(audio) == pytest.approx(SECONDS, abs=1e-3)


def test_bytes_paths_and_what_datasets_holds_are_the_same_audio(tmp_path):
    audio = encoded(tone(RATE), RATE, subtype="FLOAT")
    path = tmp_path / "tone.wav"
    path.write_bytes(audio)
    forms = [
        audio,
        path,
        str(path),
        {"bytes": audio, "path": "elsewhere.wav"},
        {"bytes": None, "path": str(path)},
        {"array": tone(RATE), "sampling_rate": RATE},
        {"array": np.stack([tone(RATE) * 0.5, tone(RATE) * 1.5]), "sampling_rate": RATE},
    ]
    for form in forms:
        np.testing.assert_allclose(decode(form, RATE), tone(RATE), atol=1e-6)
        assert duration(form) == SECONDS


@pytest.mark.parametrize(
    ("kind", "factor", "offset"),
    [
        ("int16", 2**15, 0),
        ("int32", 2**31, 0),
        ("int8", 2**7, 0),
        ("uint8", 2**7, 2**7),
        ("int32", 2**15, 0),
        ("int64", 2**15, 0),
    ],
)
def test_integers_are_scaled_by_their_type(kind, factor, offset):
    for samples in (tone(RATE), np.stack([tone(RATE) * 0.5, tone(RATE) * 1.5]), np.stack([tone(RATE)] * 2, axis=1)):
        array = np.round(samples * (factor - 1) + offset).astype(kind)
        audio = {"array": array, "sampling_rate": RATE}
        np.testing.assert_allclose(decode(audio, RATE), tone(RATE), atol=1.5 / 2**7 if "8" in kind else 1e-4)
        assert duration(audio) == SECONDS
    large = {"array": np.array([-(2**31), 2**30], "int64"), "sampling_rate": RATE}
    np.testing.assert_array_equal(decode(large, RATE), [-1, 0.5])


@pytest.mark.parametrize("rate", [None, 0, np.nan, np.inf, -1.0, 0.5])
def test_samples_need_a_rate(rate):
    np.testing.assert_array_equal(decode({"array": tone(RATE), "sampling_rate": float(RATE)}, RATE), tone(RATE))
    for read in (lambda audio: decode(audio, RATE), duration):
        with pytest.raises(AudioError, match="no sampling rate"):
            read({"array": tone(RATE), "sampling_rate": rate})


@pytest.mark.parametrize("rate", [RATE, 44_100])
@pytest.mark.parametrize("loudness", [1.3, 8, 20_000])
def test_what_is_stored_of_loud_audio_is_what_was_heard(loudness, rate):
    """Such as floats in the range of 16-bit integers."""
    loud = tone(rate) * loudness / np.abs(tone(rate)).max()
    for audio in (encoded(loud, rate, subtype="FLOAT"), {"array": loud.tolist(), "sampling_rate": rate}):
        heard = decode(audio, RATE)
        np.testing.assert_allclose(heard, tone(RATE)[: len(heard)] / np.abs(tone(RATE)).max(), atol=1e-3)
        np.testing.assert_allclose(decode(encode(heard, RATE), RATE), heard, atol=1 / 32_000)


BROKEN = [
    (b"", "empty file"),
    ({"bytes": b"", "path": "a.wav"}, "empty file"),
    ({"bytes": None, "path": None}, "no audio"),
    (None, "no audio"),
    ("no-such-file.wav", "missing file: no-such-file.wav"),
    (b"this is no sound at all, but text", "unreadable: Format not recognised"),
    (encoded(tone(RATE), RATE)[:20], "unreadable: "),
    (encoded(np.zeros(0, np.float32), RATE), "zero samples"),
]


@pytest.mark.parametrize(("audio", "reason"), BROKEN)
@pytest.mark.parametrize("read", [lambda audio: decode(audio, RATE), duration], ids=["decode", "duration"])
def test_what_cannot_be_used_says_why(audio, reason, read):
    with pytest.raises(AudioError) as error:
        read(audio)
    assert str(error.value).startswith(reason)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_samples_that_are_not_numbers_are_refused(value, rate):
    samples = tone(rate)
    samples[100] = value
    with pytest.raises(AudioError, match="NaN or infinite samples"):
        decode(encoded(samples, rate, subtype="FLOAT"), RATE)


def test_samples_so_loud_that_a_spectrum_overflows_are_refused():
    loudest = tone(RATE) / np.abs(tone(RATE)).max() * LOUDEST
    heard = decode(encoded(loudest, RATE, subtype="FLOAT"), RATE)
    assert torch.isfinite(LogMel(WhisperFeatureExtractor())(torch.from_numpy(heard)[None])).all()
    with pytest.raises(AudioError, match="samples of 2e\\+12"):
        decode(encoded(2 * loudest, RATE, subtype="FLOAT"), RATE)


def test_files_of_the_disk_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.flac").touch()
    (tmp_path / "samples.raw").write_bytes(bytes(3200))
    for name, reason in [("empty.flac", "empty file"), ("samples.raw", "unreadable: raw"), (".", "missing file")]:
        with pytest.raises(AudioError, match=reason):
            decode(tmp_path / name, RATE)


def test_too_short_to_resample_is_no_audio():
    with pytest.raises(AudioError, match="zero samples"):
        decode(encoded(np.full(1, 0.5, np.float32), 96_000), 8_000)


def mp3_frames(audio: bytes) -> bytes:
    """An MP3 without the frame that says how many there are, as radio and pipes have it."""
    mark = max(audio.find(b"Xing"), audio.find(b"Info"))
    begin = audio.rfind(b"\xff", 0, mark)
    return audio[audio.find(audio[begin : begin + 2], mark) :]


SPEECH_S = 4.0
COMPRESSED = {
    "MP3 with a length": lambda: encoded(tone(RATE, SPEECH_S), RATE, "MP3"),
    "MP3 without": lambda: mp3_frames(encoded(tone(RATE, SPEECH_S), RATE, "MP3")),
    "MP3 of 44,100 Hz without": lambda: mp3_frames(encoded(tone(44_100, SPEECH_S), 44_100, "MP3")),
    "Opus": lambda: encoded(tone(RATE, SPEECH_S), RATE, "OGG", "OPUS"),
    "Vorbis": lambda: encoded(tone(RATE, SPEECH_S), RATE, "OGG", "VORBIS"),
    "FLAC": lambda: encoded(tone(RATE, SPEECH_S), RATE, "FLAC"),
}
SIZED = {
    "WAV": lambda: encoded(tone(RATE, SPEECH_S), RATE),
    "WAV of 24 bits": lambda: encoded(tone(RATE, SPEECH_S), RATE, "WAV", "PCM_24"),
    "WAV of 64-bit sizes": lambda: encoded(tone(RATE, SPEECH_S), RATE, "RF64"),
    "AIFF": lambda: encoded(tone(RATE, SPEECH_S), RATE, "AIFF"),
    **{
        kind: lambda kind=kind: encoded(tone(RATE, SPEECH_S), RATE, kind, "PCM_16")
        for kind in ("AU", "W64", "NIST", "CAF", "SVX", "VOC")
    },
}
DAMAGES = {
    "cut in half": lambda audio: audio[: len(audio) // 2],
    "without its last fifth": lambda audio: audio[: len(audio) * 4 // 5],
    "with a hole": lambda audio: audio[: len(audio) // 3] + audio[len(audio) // 3 + 1_003 :],
    "with zeros": lambda audio: audio[: len(audio) // 3] + bytes(1_003) + audio[len(audio) // 3 + 1_003 :],
    "with another end": lambda audio: audio[:-200] + bytes(100) + audio[-100:],
    "ending in zeros": lambda audio: audio[: len(audio) // 2].ljust(len(audio), b"\0"),
}
AT_THE_END = ("cut in half", "without its last fifth", "ending in zeros")  # not told by an MP3 without a length
HARMED = [
    (COMPRESSED[kind], harm)
    for kind in COMPRESSED
    for harm in DAMAGES
    if harm != "with another end" and not (kind.endswith("without") and harm in AT_THE_END)
]
HARMED += [(COMPRESSED[kind], "with another end") for kind in ("Opus", "Vorbis", "FLAC")]
HARMED += [(SIZED[kind], harm) for kind in SIZED for harm in ("cut in half", "with a hole")]


@pytest.mark.parametrize(("make", "harm"), HARMED)
def test_a_file_that_is_damaged_or_cut_short_is_refused(make, harm, tmp_path):
    """Bytes and files alike: what is left of it would be labelled as all of it."""
    audio = make()
    (tmp_path / "audio").write_bytes(DAMAGES[harm](audio))
    assert abs(len(decode(audio, RATE)) - SPEECH_S * RATE) < 0.15 * RATE
    for broken in (DAMAGES[harm](audio), str(tmp_path / "audio")):
        with pytest.raises(AudioError, match=r"^(cut short|damaged|cut short or damaged|unreadable): "):
            decode(broken, RATE)


@pytest.mark.parametrize("format", ["MP3", "OGG"])
def test_recordings_one_after_the_other_are_refused_where_one_would_be_read(format):
    first, second = (encoded(tone(RATE, seconds), RATE, format) for seconds in (1, 2))
    with pytest.raises(AudioError, match="several recordings one after the other"):
        decode(first + second, RATE)
    if format == "MP3":
        joined = mp3_frames(first) + mp3_frames(second)
        assert abs(len(decode(joined, RATE)) - 3 * RATE) < 0.3 * RATE


def test_an_mp3_of_varying_bit_rate_without_a_length_is_read_to_its_end():
    """libsndfile alone guesses its length from the first frames."""
    quiet_first = np.concatenate([np.zeros(3 * RATE, np.float32), tone(RATE, SPEECH_S)])
    buffer = io.BytesIO()
    soundfile.write(buffer, quiet_first, RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.2)
    whole, audio = decode(buffer.getvalue(), RATE), mp3_frames(buffer.getvalue())
    tags = b"ID3\x03\0\0\0\0\x01\0" + bytes(128), b"TAG" + bytes(125)
    for unsized in (audio, tags[0] + audio + tags[1]):
        samples = decode(unsized, RATE)
        assert 0 <= len(samples) - len(whole) < 0.15 * RATE
        loudness = [np.square(part[: 7 * RATE].reshape(14, -1)).mean(axis=1) for part in (samples, whole)]
        np.testing.assert_allclose(*loudness, atol=5e-3)


ENDS = {
    "newline": b"\n",
    "zeros": bytes(417),
    "4 KiB of zeros": bytes(4096),
    "ones and a tag": b"\xff" * 100_000 + b"TAG" + bytes(125),
    "ID3v1, twice": 2 * (b"TAG" + bytes(125)),
    "APE": b"APETAGEX" + struct.pack("<IIII", 2000, 96, 0, 0) + bytes(8 + 96),
    "Lyrics3": b"LYRICSBEGIN" + b"la" * 400 + b"000831LYRICS200" + b"TAG" + bytes(125),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=list(ENDS))
@pytest.mark.parametrize("missing", [0, 1, 40])
def test_what_comes_after_the_last_frame_of_an_mp3_is_no_damage(end, missing):
    """Nor are bytes that this frame lacks: it holds less than 0.1 s."""
    audio = mp3_frames(encoded(tone(RATE, SPEECH_S), RATE, "MP3"))
    assert abs(len(decode(audio[: len(audio) - missing] + end, RATE)) - len(decode(audio, RATE))) < 0.15 * RATE


@pytest.mark.parametrize("make", [COMPRESSED[kind] for kind in COMPRESSED if kind.startswith("MP3")])
def test_an_mp3_may_lack_a_byte_of_its_last_frame_with_a_length_or_without(make):
    assert abs(len(decode(make()[:-1], RATE)) - SPEECH_S * RATE) < 0.15 * RATE


def test_a_few_bytes_without_a_frame_before_others_are_damage():
    audio = mp3_frames(encoded(tone(RATE, SPEECH_S), RATE, "MP3"))
    with pytest.raises(AudioError, match="damaged: no MP3 frame at byte"):
        decode(audio + b"\n" + audio[:200], RATE)


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("of_file", [0, 36, 0xFFFFFFFF])
def test_a_wav_whose_writer_did_not_know_its_length_is_read(size, of_file, tmp_path):
    """As ffmpeg, sox, arecord and others write it into a pipe."""
    audio = bytearray(encoded(tone(RATE), RATE))
    audio[4:8], audio[40:44] = struct.pack("<I", of_file), struct.pack("<I", size)
    (tmp_path / "piped.wav").write_bytes(audio)
    for piped in (bytes(audio), str(tmp_path / "piped.wav")):
        np.testing.assert_allclose(decode(piped, RATE), tone(RATE), atol=1e-4)


def test_a_wav_without_samples_but_with_more_to_tell_has_none():
    audio = encoded(np.zeros(0, np.float32), RATE) + b"LIST\x08\0\0\0INFOnote"
    with pytest.raises(AudioError, match="zero samples"):
        decode(audio, RATE)


def test_a_header_without_the_length_is_no_obstacle():
    audio = bytearray(encoded(tone(RATE), RATE, "FLAC"))
    # STREAMINFO follows "fLaC" and a 4-byte block header; its total samples are the 36 bits before the MD5 sum.
    audio[4 + 4 + 13] &= 0xF0
    audio[4 + 4 + 14 : 4 + 4 + 18] = bytes(4)
    assert len(decode(bytes(audio), RATE)) == SECONDS * RATE
    assert duration(bytes(audio)) == SECONDS


def test_flac_keeps_the_samples_and_clips_the_loud_ones():
    np.testing.assert_allclose(decode(encode(tone(RATE), RATE), RATE), tone(RATE), atol=1 / 32_000)
    loud = decode(encode(4 * tone(RATE), RATE), RATE)
    np.testing.assert_allclose(loud, np.clip(4 * tone(RATE), -1, 1), atol=1 / 32_000)


def checkpoint(seconds: float, mels: int) -> tuple[WhisperFeatureExtractor, WhisperConfig]:
    config = WhisperConfig(max_source_positions=int(seconds * 50), num_mel_bins=mels)
    return WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds), config


@pytest.mark.parametrize(("seconds", "mels"), [(4, 80), (30, 128)])
def test_the_window_is_the_models(seconds, mels):
    window = Window.from_models(*checkpoint(seconds, mels))
    assert window == Window(sampling_rate=RATE, samples=RATE * seconds, frames=100 * seconds, mels=mels)
    assert window.seconds == seconds


def test_a_feature_extractor_of_another_model_is_refused():
    feature_extractor, _ = checkpoint(4, 80)
    with pytest.raises(UserError, match="80 mel bins, but the model's config has 128"):
        Window.from_models(feature_extractor, checkpoint(4, 128)[1])
    with pytest.raises(UserError, match="window is 4 s, but the model's is 30 s"):
        Window.from_models(feature_extractor, checkpoint(30, 80)[1])


@pytest.mark.parametrize(("seconds", "mels"), [(4, 80), (4, 128), (30, 80), (30, 128)])
def test_log_mel_equals_the_feature_extractor(seconds, mels, utterances):
    feature_extractor, config = checkpoint(seconds, mels)
    window = Window.from_models(feature_extractor, config)
    # Speech with silence after it, digital silence, and noise to the window's end.
    noise = np.random.default_rng(0).normal(0, 0.1, window.samples).astype(np.float32)
    waveforms = [utterances[0].samples, np.zeros(10, np.float32), noise]
    log_mel = LogMel(feature_extractor)(stack(waveforms, window))
    expected = feature_extractor(waveforms, sampling_rate=RATE, return_tensors="pt").input_features
    assert log_mel.shape == (3, window.mels, window.frames) and log_mel.dtype == torch.float32
    torch.testing.assert_close(log_mel, expected, atol=1e-5, rtol=0)


def test_log_mel_stays_exact_under_autocast_and_out_of_checkpoints():
    feature_extractor, config = checkpoint(4, 80)
    module = LogMel(feature_extractor)
    samples = stack([tone(RATE)], Window.from_models(feature_extractor, config))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(samples)
    assert torch.equal(inside, module(samples))
    assert not module.state_dict()


def test_stack_pads_with_zeros_and_never_cuts():
    window = Window(sampling_rate=RATE, samples=RATE, frames=100, mels=80)
    batch = stack([tone(RATE), tone(RATE, 1.0)], window)
    assert batch.shape == (2, RATE) and batch.dtype == torch.float32
    np.testing.assert_array_equal(batch[0, : len(tone(RATE))].numpy(), tone(RATE))
    assert not batch[0, len(tone(RATE)) :].any()
    with pytest.raises(ValueError, match=r"1\.50 s of audio do not fit a window of 1 s"):
        stack([tone(RATE), tone(RATE, 1.5)], window)
