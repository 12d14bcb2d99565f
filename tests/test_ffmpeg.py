"""Audio that libsndfile cannot read: through FFmpeg where there is one, else skipped with advice and tried again."""

import io
import json
import shutil
import socket
from fractions import Fraction

import numpy as np
import pytest
from stages import ENGLISH, label, rows_of

from distil_whisper import ffmpeg
from distil_whisper.audio import AudioError, decode, duration

RATE = 16_000
KINDS = {  # container, codec, name of the file
    "m4a": ("ipod", "aac", "a.m4a"),
    "AAC": ("adts", "aac", "a.aac"),
    "WebM": ("webm", "libopus", "a.webm"),
    "WMA": ("asf", "wmav2", "a.wma"),
    "G.722": ("g722", "g722", "a.g722"),
    "G.722 in WAV": ("wav", "g722", "a.wav"),
}
CUT = ["m4a", "WebM", "WMA", "G.722 in WAV"]  # the others do not tell how long they are


FILMS = {"MP4": ("mp4", "aac", "mpeg4"), "WebM": ("webm", "libopus", "libvpx"), "WMV": ("asf", "wmav2", "wmv2")}


def made(kind: str, samples: np.ndarray) -> bytes:
    """Mono samples at 16 kHz as a file of a kind."""
    return muxed(*KINDS[kind][:2], samples)


def muxed(
    form: str, codec: str, samples: np.ndarray, pictures: tuple[str, int] | None = None, pause: tuple = ()
) -> bytes:
    """Mono samples at 16 kHz in a container; pictures: their codec and how many seconds of them there are; pause: the
    seconds between which packets of sound are left out."""
    av = pytest.importorskip("av", reason="PyAV, which makes files of these kinds, is not installed")
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=48_000 if codec == "libopus" else RATE, layout="mono")
        if pictures:
            film = container.add_stream(pictures[0], rate=10)
            film.width = film.height = 64
            film.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.bit_rate = 64_000
        context.open()
        fit = av.AudioResampler(context.format, "mono", context.sample_rate, frame_size=context.frame_size or None)
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), 0
        for part in [*fit.resample(frame), *fit.resample(None)]:
            packets = stream.encode(part)
            if not pause or not pause[0] <= part.time < pause[1]:
                container.mux(packets)
        container.mux(stream.encode(None))
        if pictures:
            for _ in range(10 * pictures[1]):
                picture = av.VideoFrame.from_ndarray(np.zeros((96, 64), np.uint8), format="yuv420p")
                container.mux(film.encode(picture))
            container.mux(film.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def tone() -> np.ndarray:
    times = np.arange(3 * RATE) / RATE
    return (0.4 * np.sin(2 * np.pi * 440 * times) * np.sin(np.pi * times / 3)).astype(np.float32)


@pytest.fixture(params=["PyAV", "program"])
def way(request, monkeypatch):
    """Each of the two that may be there, alone."""
    if request.param == "program":
        if shutil.which("ffmpeg") is None:
            pytest.skip("the program ffmpeg is not installed")
        monkeypatch.setattr(ffmpeg, "_has_pyav", lambda: False)
    return request.param


@pytest.fixture
def without_ffmpeg(monkeypatch):
    monkeypatch.setattr(ffmpeg, "_has_pyav", lambda: False)
    monkeypatch.setattr(ffmpeg.shutil, "which", lambda name: None)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_bytes_of_other_kinds_are_read(kind, way, tone, tmp_path):
    audio, name = made(kind, tone), KINDS[kind][2]
    (tmp_path / name).write_bytes(audio)
    for form in (str(tmp_path / name), {"bytes": audio, "path": name}):
        samples = decode(form, RATE)
        assert abs(len(samples) - len(tone)) < 0.13 * RATE and duration(form) == pytest.approx(3, abs=0.13)
        loudness = [np.square(part[: 40 * 1024].reshape(20, -1)).mean(axis=1) for part in (samples, tone)]
        np.testing.assert_allclose(*loudness, atol=8e-3)


@pytest.mark.parametrize("kind", CUT)
def test_those_that_are_cut_short_are_refused(kind, way, tone):
    audio = made(kind, tone)
    with pytest.raises(AudioError, match=r"^(cut short|unreadable|cut short or damaged): "):
        decode({"bytes": audio[: len(audio) * 2 // 3], "path": KINDS[kind][2]}, RATE)


@pytest.mark.parametrize("kind", FILMS)
@pytest.mark.parametrize("seconds", [2, 5])
def test_pictures_may_last_longer_than_the_sound_or_end_before(kind, seconds, way, tone):
    form, codec, of_pictures = FILMS[kind]
    film = muxed(form, codec, tone, (of_pictures, seconds))
    assert abs(len(decode({"bytes": film, "path": "film"}, RATE)) - len(tone)) < 0.13 * RATE


def test_what_a_webm_leaves_out_is_not_missing(way, tone):
    """As Opus does with silence."""
    audio = muxed("webm", "libopus", tone, pause=(1, 2))
    assert len(decode({"bytes": audio, "path": "a.webm"}, RATE)) == pytest.approx(2 * RATE, abs=0.13 * RATE)
    with pytest.raises(AudioError, match=r"^(cut short|unreadable|cut short or damaged): "):
        decode({"bytes": audio[: len(audio) * 2 // 3], "path": "a.webm"}, RATE)


@pytest.mark.parametrize("kind", KINDS)
def test_without_ffmpeg_the_reason_is_advice(kind, tone, without_ffmpeg):
    advice = r"needs FFmpeg: install PyAV \(pip install av\) or the program ffmpeg, and start again"
    with pytest.raises(AudioError, match=advice):
        decode({"bytes": made(kind, tone), "path": KINDS[kind][2]}, RATE)


@pytest.mark.parametrize("audio", [b"this is no sound at all", b"RIFF\x10\0\0\0WAVEfmt \x04\0\0\0"])
def test_what_is_no_audio_needs_no_ffmpeg(audio, without_ffmpeg):
    with pytest.raises(AudioError, match=r"^unreadable: "):
        decode(audio, RATE)


def test_a_file_cannot_make_it_reach_for_a_network(way, tmp_path):
    """A playlist is none of the kinds that are given to FFmpeg, and a name that makes it one opens no address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.m4a"
        playlist = f"#EXTM3U\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n".encode()
        (tmp_path / "a.m3u8").write_bytes(playlist)
        for form in (str(tmp_path / "a.m3u8"), {"bytes": playlist, "path": address}, address):
            with pytest.raises(AudioError):
                decode(form, RATE)
        with pytest.raises(AudioError):
            ffmpeg.read(str(tmp_path / "a.m3u8"), "a.m3u8")
        with pytest.raises(TimeoutError):
            server.accept()


def test_rows_that_need_ffmpeg_are_labelled_once_it_is_there(taught, utterances, tmp_path, monkeypatch, capsys):
    rows = []
    for number, utterance in enumerate(utterances[:4]):
        name = f"{number}.{'m4a' if number == 1 else 'wav'}"
        data = made("m4a", utterance.samples) if number == 1 else utterance.encoded()
        (tmp_path / name).write_bytes(data)
        rows.append({"audio": name, "text": utterance.text})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    flags = [*ENGLISH, "--max_skipped", 50]
    with monkeypatch.context() as absent:
        absent.setattr(ffmpeg, "_has_pyav", lambda: False)
        absent.setattr(ffmpeg.shutil, "which", lambda name: None)
        for _ in range(2):  # it is still not there: nothing is done again
            folder = label(taught, tmp_path / "train.json", tmp_path / "labels", *flags)
            assert len(rows_of(folder)) == 3
        assert "1 of 1 shards are finished" in capsys.readouterr().out
    (skipped,) = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert skipped["file"].endswith("1.m4a") and skipped["reason"].startswith("needs FFmpeg: install PyAV")
    label(taught, tmp_path / "train.json", folder, *flags)
    assert "0 of 1 shards are finished" in capsys.readouterr().out
    expected = rows_of(label(taught, tmp_path / "train.json", tmp_path / "fresh", *flags))
    assert rows_of(folder) == expected and len(expected) == 4 and not (folder / "skipped.jsonl").exists()
    label(taught, tmp_path / "train.json", folder, *flags)
    assert "1 of 1 shards are finished" in capsys.readouterr().out
