"""Whether a file of audio is whole, as far as its container tells.

libsndfile reads what there is of a file that was cut short or damaged, and reports no error. What no container tells
is not found: payload that was changed inside of a frame or among the samples of a WAV, a missing end of an MP3 without
a length, or of an Ogg file cut between two pages, a WAV whose writer did not know its length, any IRCAM or PAF.
"""

import io
import math
import re
import struct
import zlib
from collections import Counter
from typing import BinaryIO

_UNKNOWN_SIZE = 0x7FFFF000  # bytes: who writes a WAV into a pipe gives this or more as its size, or 0
_NO_SIZE = 1 << 62  # bytes: the same of files with 64-bit sizes
_SLACK_BYTES = 512  # of samples; some programs count the header among them, or end a file with a few others
_CHUNKS = {  # by first bytes: where chunks begin, their header, how much of it their size counts, their alignment
    b"RIFF": (12, "<4sI", 0, 2),
    b"RF64": (12, "<4sI", 0, 2),
    b"RIFX": (12, ">4sI", 0, 2),
    b"FORM": (12, ">4sI", 0, 2),  # AIFF, SVX
    b"riff": (40, "<4s12xQ", 24, 8),  # W64
    b"caff": (8, ">4sQ", 0, 1),
}
_OF_SAMPLES = (b"data", b"SSND", b"BODY")
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_MP3_RATES = (44_100, 48_000, 32_000)
_MP3_KBITS = {  # by version (1, or 2 for MPEG 2 and 2.5) and layer
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_SAME = 0xFFFE0C00  # sync, version, layer and sampling rate: alike in all frames of a file
_LYRICS3 = re.compile(rb"LYRICSBEGIN.*?LYRICS(END|200)", re.DOTALL)
_END_TAG, _LONGEST_NAME = re.compile(rb"TAG|APETAGEX|LYRICSBEGIN"), 11  # bytes
_SEVERAL = "several recordings one after the other, of which only the first would be read"


class AudioError(Exception):
    """Audio that cannot be used; the message is the reason, in a few words, what is particular to the file last."""


def whole(source: io.BytesIO | str) -> tuple[io.BytesIO | str, int | None]:
    """A file (its path, or its contents) as libsndfile can read all of it, and how many sample frames it has, where
    libsndfile does not know.

    One that does not say how long it is (a WAV from a pipe, an MP3 of varying bit rate) comes back as contents that
    say so. Raises AudioError for a file that is not whole.
    """
    try:
        with open(source, "rb") if isinstance(source, str) else io.BytesIO(source.getbuffer()) as file:
            mended, frames = _mended(file)
    except OSError as error:
        raise AudioError(f"unreadable: {error.strerror}") from error
    return (source if mended is None else io.BytesIO(mended)), frames


def _mended(file: BinaryIO) -> tuple[bytes | None, int | None]:
    """The contents of a file with its length, None for one that needs none; and what libsndfile has to be told."""
    head = file.read(12)
    file.seek(0)
    if head[:4] in _CHUNKS:
        return _sized_wav(file), None
    if head[:3] == b"ID3" or _mp3_frame(head, 0):
        return _sized_mp3(file.read())
    if head[:4] == b"OggS":
        _check_ogg(file.read())
    for begin, check in ((b".snd", _check_au), (b"NIST_1A", _check_nist), (b"Creative Voi", _check_voc)):
        if head.startswith(begin):
            check(file)
    return None, None


def _sized_wav(file: BinaryIO) -> bytes | None:
    """A WAV with the size of its samples where it says 0, None where it says it. Other kinds have such chunks too."""
    kind = file.read(4)
    begin, claimed = _samples_of_chunks(file, *_CHUNKS[kind])
    there = file.seek(0, 2) - begin
    _require_bytes(claimed, there)
    if claimed or not begin or there < 8 or kind not in (b"RIFF", b"RIFX"):
        return None
    order = _CHUNKS[kind][1][0]
    file.seek(begin)
    if struct.unpack(f"{order}4xI", file.read(8))[0] in (there - 8, there - 9):  # another chunk: it is empty
        return None
    file.seek(0)
    data = bytearray(file.read())
    struct.pack_into(f"{order}I", data, begin - 4, min(there, _UNKNOWN_SIZE))
    struct.pack_into(f"{order}I", data, 4, min(len(data) - 8, _UNKNOWN_SIZE))
    return bytes(data)


def _samples_of_chunks(file: BinaryIO, place: int, header: str, counted: int, fill: int) -> tuple[int, int]:
    """Where the samples begin and how many bytes they are said to have, 0 and 0 if there are none."""
    long, length = 0, struct.calcsize(header)
    file.seek(place)
    while len(head := file.read(length)) == length:
        name, size = struct.unpack(header, head)
        size = max(size - counted, 0)
        if name in _OF_SAMPLES:
            return file.tell(), long or size
        if name == b"ds64":
            long = int.from_bytes(file.read(16)[8:], "little")
            file.seek(-16, 1)
        file.seek(min(size + -size % fill, _NO_SIZE), 1)
    return 0, 0


def _check_au(file: BinaryIO) -> None:
    begin, claimed = struct.unpack(">4xII", file.read(12).ljust(12, b"\0"))
    _require_bytes(claimed, file.seek(0, 2) - begin)


def _check_nist(file: BinaryIO) -> None:
    """NIST SPHERE, whose header is lines of text; samples that are compressed inside of it are for no one here."""
    head = file.read(16)
    begin = int(head[8:]) if head[8:].strip().isdigit() else 0
    head += file.read(max(begin - 16, 0))
    fields = dict(re.findall(rb"^(\w+) -i (\d+)", head, re.MULTILINE))
    sizes = [int(fields.get(name, 0)) for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    if b"embedded-" not in head:
        _require_bytes(math.prod(sizes), file.seek(0, 2) - begin)


def _check_voc(file: BinaryIO) -> None:
    file.seek(20)
    begin = int.from_bytes(file.read(2), "little")
    file.seek(begin + 1)  # the kind of the first block
    claimed = int.from_bytes(file.read(3), "little")
    _require_bytes(claimed, file.seek(0, 2) - begin - 4)


def _require_bytes(claimed: int, there: int) -> None:
    unknown = _UNKNOWN_SIZE <= claimed <= 0xFFFFFFFF or claimed >= _NO_SIZE
    if claimed - there > _SLACK_BYTES and not unknown:
        raise AudioError(f"cut short: {there:,} of {claimed:,} bytes of samples are there")


def _check_ogg(data: bytes) -> None:
    place, ended = 0, False
    while place < len(data):
        if data[place : place + 4] != b"OggS":
            if ended:  # something of another kind after the end
                return
            raise AudioError(f"damaged: no Ogg page at byte {place:,} of {len(data):,}")
        head = data[place : place + 27].ljust(27, b"\xff")
        if ended and head[5] & 2:
            raise AudioError(_SEVERAL)
        ended = ended or bool(head[5] & 4)
        end = place + 27 + head[26] + sum(data[place + 27 : place + 27 + head[26]])
        if end > len(data):
            raise AudioError("cut short: its last Ogg page is not complete")
        if _ogg_checksum(data[place : place + 22] + bytes(4) + data[place + 26 : end]) != head[22:26]:
            raise AudioError(f"damaged: the Ogg page at byte {place:,} of {len(data):,}")
        place = end


def _ogg_checksum(page: bytes) -> bytes:
    """The CRC-32 that an Ogg page holds in bytes 22 to 26, which are 0 here (RFC 3533): zlib's with the bits the other
    way around, and without its inversions."""
    reflected = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return reflected.to_bytes(4, "little").translate(_REVERSED_BITS)[::-1]


def _sized_mp3(data: bytes) -> tuple[bytes | None, int | None]:
    """An MP3 with a frame in front that says how many there are (Xing), None where none is needed, and its samples,
    None where the file says so itself.

    libsndfile guesses the length of others, tags included, from their first frames, which is too short where their bit
    rate varies, and reads no further.
    """
    begin = _first_mp3_frame(data)
    if begin is None:
        return None, None
    length = _mp3_frame(data, begin)
    mark = max(data.find(name, begin, begin + min(length, 48)) for name in (b"Xing", b"Info"))
    flags, frames, size = (
        struct.unpack(">III", data[mark + 4 : mark + 16].ljust(12, b"\0")) if mark >= 0 else (0, 0, 0)
    )
    if flags & 1 and frames:
        if flags & 2 and size > length and _mp3_frame(data, _after_tags(data, begin + size)):
            raise AudioError(_SEVERAL)
        return None, None
    found = _mp3_frames(data, begin)
    if data[begin + 36 : begin + 40] == b"VBRI":
        claimed = int.from_bytes(data[begin + 50 : begin + 54], "big")
        if claimed > found.total():
            raise AudioError(f"cut short: {found.total():,} of {claimed:,} MP3 frames are there")
    mpeg1, layer = data[begin + 1] >> 3 & 1, 4 - (data[begin + 1] >> 1 & 3)
    samples = found.total() * (384 if layer == 1 else 1152 if mpeg1 or layer == 2 else 576)
    one_rate = len(found) == 1 or layer != 3
    return (None if one_rate else _xing_frame(data[begin : begin + 4], found.total()) + data[begin:]), samples


def _mp3_frames(data: bytes, place: int) -> Counter:
    """How many frames of each bit rate follow from a frame on to the end, the last one complete or not.

    Raises AudioError for what is none, except for padding after the last.
    """
    begin, last, found = place, place, Counter()
    while place < len(data):
        frame = _mp3_frame(data, place) if _same_mp3(data, begin, place) else None
        if frame:
            found[data[place + 2] >> 4] += 1
            last, place = place, place + frame
        elif (after := _after_tags(data, place)) > place:
            place = after
        elif _is_rest(data, begin, last, place):
            break
        else:
            raise AudioError(f"damaged: no MP3 frame at byte {place:,} of {len(data):,}")
    return found


def _is_rest(data: bytes, first: int, last: int, place: int) -> bool:
    """Whether no frame follows where none begins: what is left is tags, padding of any length (one byte, repeated)
    and a few others, such as a line's end. A tag may begin within the last frame, if that is not complete."""
    tag = _END_TAG.search(data, last, place + _LONGEST_NAME)
    rest = data[_after_tags(data, tag.start()) if tag else place :]
    padding = max(Counter(rest).values(), default=0)
    if len(rest) - padding > _SLACK_BYTES:
        return False
    syncs = (len(data) - len(rest) + at.start() for at in re.finditer(rb"\xff", rest))
    return not any(_mp3_frame(data, at) and _same_mp3(data, first, at) for at in syncs)


def _xing_frame(head: bytes, frames: int) -> bytes:
    """A frame of no sound, of the kind that a header (4 bytes) begins, which says how many follow."""
    value = int.from_bytes(head, "big") & ~0xF200 | 0x10000 | 8 << 12  # of a usual bit rate, no padding, no checksum
    mono, first = value >> 6 & 3 == 3, value >> 19 & 3 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)  # bytes
    frame = value.to_bytes(4, "big") + bytes(side) + b"Xing" + struct.pack(">II", 1, frames)
    return frame.ljust(_mp3_frame(frame, 0), b"\0")


def _first_mp3_frame(data: bytes) -> int | None:
    """Where two frames follow each other for the first time; a file may begin with a tag, or in a frame's midst."""
    place = _after_tags(data, 0)
    while 0 <= (place := data.find(b"\xff", place)) < len(data) - 4:
        frame = _mp3_frame(data, place)
        if frame and (following := place + frame) <= len(data) and _same_mp3(data, place, following):
            return place
        place += 1
    return None


def _same_mp3(data: bytes, first: int, second: int) -> bool:
    """Whether frames of one stream begin at both places; the end of the data is taken for one."""
    if second >= len(data):
        return second == len(data)
    heads = [int.from_bytes(data[place : place + 4], "big") & _MP3_SAME for place in (first, second)]
    return heads[0] == heads[1]


def _mp3_frame(data: bytes, place: int) -> int | None:
    """Length in bytes of the frame that begins at a byte, None where none does."""
    head = int.from_bytes(data[place : place + 4], "big") if place + 4 <= len(data) else 0
    version, layer = head >> 19 & 3, 4 - (head >> 17 & 3)
    kbits, rate = head >> 12 & 15, head >> 10 & 3
    if head >> 21 != 0x7FF or version == 1 or layer == 4 or kbits in (0, 15) or rate == 3:
        return None
    first = version == 3  # MPEG 1; 2 is MPEG 2, 0 is MPEG 2.5
    rate = _MP3_RATES[rate] >> (0 if first else 1 if version == 2 else 2)
    bits, padding = 1000 * _MP3_KBITS[1 if first else 2, layer][kbits - 1], head >> 9 & 1
    if layer == 1:
        return 4 * (12 * bits // rate + padding)
    return (144 if first or layer == 2 else 72) * bits // rate + padding


def _after_tags(data: bytes, place: int) -> int:
    """Where the tags end that begin at a byte: ID3v2, ID3v1, APE and Lyrics3."""
    while True:
        if data[place : place + 3] == b"ID3" and len(data) >= place + 10:
            size = sum(byte << shift for byte, shift in zip(data[place + 6 : place + 10], (21, 14, 7, 0), strict=True))
            place += 10 + size + (10 if data[place + 5] & 16 else 0)
        elif data[place : place + 3] == b"TAG":
            place += 128
        elif data[place : place + 8] == b"APETAGEX" and len(data) >= place + 16:
            place += 32 + struct.unpack_from("<I", data, place + 12)[0]
        elif lyrics := _LYRICS3.match(data, place):
            place = lyrics.end()
        else:
            return min(place, len(data))
