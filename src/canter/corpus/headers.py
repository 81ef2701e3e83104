"""Compare the header of a sound file with the content of the file, without decoding audio.

libsndfile trusts the header. Three kinds of header cannot be trusted: sample data without a size, because the recorder
stopped before it wrote one; an MP3 whose length is a guess from the bit rate of its first frame; and any file that is
shorter than its header says.
"""

import functools
import io
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, cast

OPEN_SIZE = 0x7FFF0000  # writers to a pipe leave 32-bit data sizes of at least this in the header
ENDLESS = 1 << 40  # bytes claimed for an MP3 whose length must not be guessed from its size
TAG = 128  # bytes of an ID3v1 tag
MOST_CHUNKS, MOST_ELEMENTS = 10_000, 3_000_000  # examined of a RIFF and of a Matroska file
_W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")
_W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class LostAudio:
    """A part of a recording that cannot be decoded."""

    at: float
    """Seconds from the start of the file."""
    seconds: float | None
    """Length; None where it is unknown."""
    reason: str


@dataclass(frozen=True)
class Header:
    """Result of the check of a file's header."""

    patches: tuple[tuple[int, bytes], ...] = ()
    """Corrections of the header: positions and the bytes to read there."""
    first: int = 0
    """Number of bytes to skip at the start."""
    endless: bool = False
    """True if libsndfile must not estimate the length from the size of the file."""
    missing: float = 0.0
    """Fraction of the sample data stated in the header that is missing from the file."""
    samples: int | None = None
    """Number of samples, where they were counted."""
    guessed: bool = False
    """True if the length that libsndfile reports is a guess."""
    losses: tuple[LostAudio, ...] = ()

    def view(self, file: BinaryIO) -> BinaryIO:
        """Return the file with the header corrected, for libsndfile to read."""
        if not self.patches and not self.first and not self.endless:
            return file
        return cast(BinaryIO, _View(file, self))


class _View(io.RawIOBase):
    """A file with some bytes replaced or skipped, or that claims to be endless."""

    def __init__(self, file: BinaryIO, header: Header):
        self._file, self._header, self._place = file, header, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._place
        elif whence == os.SEEK_END:
            offset += ENDLESS if self._header.endless else self._file.seek(0, os.SEEK_END) - self._header.first
        self._place = max(0, offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        place = self._place + self._header.first
        if self._header.endless and 0 < ENDLESS - self._place <= TAG:  # mpg123 searches a tag at the end
            data = bytes(min(len(buffer), ENDLESS - self._place))
        else:
            self._file.seek(place)
            data = self._file.read(len(buffer))
        for start, wanted in self._header.patches:
            if start < place + len(data) and start + len(wanted) > place:
                changed = bytearray(data)
                for number, byte in enumerate(wanted, start - place):
                    if 0 <= number < len(changed):
                        changed[number] = byte
                data = bytes(changed)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def check_header(file: BinaryIO) -> Header:
    """Compare a sound file's header with its content, and rewind the file.

    Formats without such a check give an empty `Header`.
    """
    file.seek(0)
    head = file.read(16)
    size = file.seek(0, os.SEEK_END)
    try:
        if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
            found = _wav(file, head, size)
        elif head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
            found = _aiff(file, size)
        elif head[:4] in (b".snd", b"dns."):
            found = _au(head, size)
        elif head[:4] == b"caff":
            found = _caf(file, size)
        elif head == _W64_RIFF:
            found = _w64(file, size)
        elif head[:4] == b"OggS":
            found = Header(losses=tuple(_ogg_losses(_Window(file, size))))
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            found = Header(losses=tuple(_matroska_losses(_Window(file, size))))
        elif head[:3] == b"ID3" or head[:1] == b"\xff" or head[:8] == b"APETAGEX" or head == bytes(16):
            found = _mp3(_Window(file, size))
        else:
            found = Header()
    except struct.error:  # the header itself is truncated, which the decoder reports
        found = Header()
    file.seek(0)
    return found


class _Window:
    """Random access to a file of any size, with a few MB of it in memory."""

    SIZE = 1 << 22

    def __init__(self, file: BinaryIO, end: int):
        self._file, self.end = file, end
        self._data, self._base = b"", 0

    def around(self, place: int, size: int) -> tuple[bytes, int]:
        """Return the bytes in memory and the position of ``place`` in them; ``size`` bytes follow it if they exist."""
        begin = place - self._base
        if begin < 0 or begin + min(size, self.end - place) > len(self._data):
            self._file.seek(place)
            self._base, begin = place, 0
            self._data = self._file.read(self.SIZE)
        return self._data, begin

    def at(self, place: int, size: int) -> bytes:
        data, begin = self.around(place, size)
        return data[begin : begin + size]

    def find(self, wanted: bytes, place: int) -> int:
        """Return the position of ``wanted`` at or after ``place``, or -1."""
        while place + len(wanted) <= self.end:
            data, begin = self.around(place, len(wanted))
            found = data.find(wanted, begin)
            if found >= 0:
                return place + found - begin
            if len(data) - begin < len(wanted):  # the file has become shorter
                break
            place += len(data) - begin - len(wanted) + 1
        return -1


# -- sample data with a size in front --


def _chunks(
    file: BinaryIO, place: int, end: int, header: str, padding: int = 2, inclusive: bool = False
) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, first byte of the content, and stated size of each chunk of a file of ``end`` bytes.

    ``header`` is the format of a chunk's name and size; the size includes the header if ``inclusive``.
    """
    head = struct.calcsize(header)
    for _ in range(MOST_CHUNKS):
        if place + head > end:
            return
        file.seek(place)
        name, length = struct.unpack(header, file.read(head))
        yield name, place + head, length
        step = max(head, length) if inclusive else head + max(0, length)
        place += -(-step // padding) * padding


def _are_chunks(file: BinaryIO, place: int, end: int, order: str) -> bool:
    """Return whether only complete chunks, or nothing, follow ``place``."""
    for name, content, length in _chunks(file, place, end, f"{order}4sI"):
        if not name.isascii() or not name.decode().isprintable():
            return False
        place = content + length + length % 2
    return place - end in range(-7, 2)


def _data(declared: int, there: int, is_open: bool, patches: list[tuple[int, bytes]]) -> Header:
    """Return the check of a header that declares ``declared`` bytes of sample data, of which ``there`` exist.

    The patches apply if it leaves the size open.
    """
    if is_open and there > 0:
        return Header(tuple(patches))
    if declared > there:
        return Header(missing=1 - there / declared)
    return Header()


def _wav(file: BinaryIO, head: bytes, end: int) -> Header:
    order, long = (">" if head[:4] == b"RIFX" else "<"), None
    for name, place, length in _chunks(file, 12, end, f"{order}4sI"):
        there = end - place
        if name == b"ds64":
            file.seek(place + 8)
            long = (place + 8, struct.unpack("<Q", file.read(8))[0])
        elif name == b"data" and long and head[:4] == b"RF64" and length == 0xFFFFFFFF:
            declared, patch = long[1], [(long[0], struct.pack("<Q", there))]
            return _data(declared, there, declared in (0, 2**64 - 1), patch)
        elif name == b"data":
            patch = [(place - 4, struct.pack(f"{order}I", min(there, 0xFFFFFFFF)))]
            is_open = length >= OPEN_SIZE and length > there
            is_open |= length == 0 and not _are_chunks(file, place, end, order)
            return _data(length, there, is_open, patch)
    return Header()


def _aiff(file: BinaryIO, end: int) -> Header:
    frames = None
    for name, place, length in _chunks(file, 12, end, ">4sI"):
        there = end - place
        if name == b"COMM":
            file.seek(place)
            channels, _, bits = struct.unpack(">hIh", file.read(8))
            frames = (place + 2, max(1, channels * ((bits + 7) // 8)))
        elif name == b"SSND":
            patch = [(place - 4, struct.pack(">I", min(there, 0xFFFFFFFF)))]
            if frames:
                patch.append((frames[0], struct.pack(">I", max(0, there - 8) // frames[1])))
            is_open = length >= OPEN_SIZE and length > there
            is_open |= length in (0, 8) and not _are_chunks(file, place + length, end, ">")
            return _data(length, there, is_open, patch)
    return Header()


def _au(head: bytes, end: int) -> Header:
    order = ">" if head[:4] == b".snd" else "<"
    start, length = struct.unpack(f"{order}II", head[4:12])
    is_open = length in (0, 0xFFFFFFFF)
    return _data(length, end - start, is_open, [(8, struct.pack(f"{order}I", max(0, end - start)))])


def _caf(file: BinaryIO, end: int) -> Header:
    for name, place, length in _chunks(file, 8, end, ">4sq", padding=1):
        if name == b"data":
            there = end - place
            patch = (place - 8, struct.pack(">q", there))
            if length > there:  # libsndfile does not open such a file
                return Header((patch,), missing=1 - there / length)
            return _data(length, there, length in (-1, 0, 4), [patch])
    return Header()


def _w64(file: BinaryIO, end: int) -> Header:
    for name, place, length in _chunks(file, 40, end, "<16sQ", padding=8, inclusive=True):
        if name == b"data" + _W64_TAIL:
            there = end - place + 24
            is_open = length in (0, 24, 2**64 - 1) or length >= 2**63
            return _data(length, there, is_open, [(place - 8, struct.pack("<Q", there))])
    return Header()


# -- Ogg --


def _ogg_losses(window: _Window) -> Iterator[LostAudio]:
    """Yield a loss for every missing, damaged or truncated page (RFC 3533, section 6).

    Positions are those of the preceding pages, in seconds, for Vorbis, Opus, FLAC and Speex.
    """
    place, end, at, damage, tries = 0, window.end, 0.0, "", 0
    numbers, rates = dict[int, int](), dict[int, int]()
    while place + 27 <= end:
        page = window.at(place, 27 + 255 + 255 * 255)
        complete = page.startswith(b"OggS") and len(page) >= 27 + page[26]
        size = 27 + page[26] + sum(page[27 : 27 + page[26]]) if complete else 0
        if not complete or size > len(page) or _ogg_check(page[:size]) != int.from_bytes(page[22:26], "little"):
            following, tries = window.find(b"OggS", place + 1), tries + 1
            if following >= 0 and tries < MOST_LOSSES:
                place, damage = following, damage or "a page of the Ogg file is damaged"
                continue
            if page.startswith(b"OggS"):
                damage = "the last page of the Ogg file is damaged or cut short"
            break  # data after the last page is not audio
        kind, granule, serial, number = struct.unpack_from("<BqII", page, 5)
        if kind & 2:  # the first page of a stream
            rates[serial] = _granule_rate(page[27 + page[26] : size])
        elif serial in numbers and number > numbers[serial] + 1:
            damage = damage or "a page of the Ogg file is missing"
        numbers[serial] = number
        if damage:
            yield LostAudio(at, None, damage)
            damage = ""
        if granule > 0 and rates.get(serial):
            at = granule / rates[serial]
        place += size
    if damage:
        yield LostAudio(at, None, damage)


def _granule_rate(packet: bytes) -> int:
    """Return the granules a second according to the first packet of a stream; 0 where it is not audio."""
    if packet.startswith(b"OpusHead"):
        return 48000
    if packet.startswith(b"\x01vorbis") and len(packet) >= 16:
        return struct.unpack_from("<I", packet, 12)[0]
    if packet.startswith(b"\x7fFLAC") and len(packet) >= 30:
        return int.from_bytes(packet[27:30], "big") >> 4
    if packet.startswith(b"Speex   ") and len(packet) >= 40:
        return struct.unpack_from("<I", packet, 36)[0]
    return 0


def _ogg_check(page: bytes) -> int:
    """Return Ogg's CRC-32: zlib's polynomial, with the bits of bytes and sum reversed, starting from zero."""
    page = page[:22] + bytes(4) + page[26:]
    found = ~zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) & 0xFFFFFFFF
    return int(f"{found:032b}"[::-1], 2)


# -- Matroska and WebM --

_SEGMENT, _INFO, _CLUSTER, _TIMESTAMP, _SCALE = 0x18538067, 0x1549A966, 0x1F43B675, 0xE7, b"\x2a\xd7\xb1"
_VOID = {0xEC, 0xBF}  # padding and checksum
_IN_SEGMENT = {0x114D9B74, _INFO, 0x1654AE6B, _CLUSTER, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367} | _VOID
_IN_CLUSTER = {_TIMESTAMP, 0xA3, 0xA0, 0xAB, 0xA7, 0x5854, 0xAF} | _VOID


def _matroska_losses(window: _Window) -> Iterator[LostAudio]:
    """Yield a loss for every element that does not fit into its cluster (RFC 9559).

    FFmpeg skips to the next cluster without an error.
    """
    place, end, at, scale, tries = 0, window.end, 0.0, 1e-3, 0
    cluster_end = 0  # end of the cluster that holds the element at ``place``
    segment_end = end
    for _ in range(MOST_ELEMENTS):
        if place >= end:
            return
        name, size, begin = _element(window, place)
        after = begin + size
        if name == _SEGMENT:
            place, segment_end = begin, min(end, after)
            continue
        if place >= segment_end:  # data of another recording
            return
        fits = name in _IN_CLUSTER and place < cluster_end and (after <= cluster_end or after > end)
        if fits or name in _IN_SEGMENT or not place:
            if name == _CLUSTER:
                place, cluster_end = begin, after
                continue
            if name == _TIMESTAMP:
                at = int.from_bytes(window.at(begin, min(size, 8)), "big") * scale
            elif name == _INFO:
                scale = _scale(window.at(begin, min(size, 4096)))
            place = after
            continue
        following = window.find(_CLUSTER.to_bytes(4), place + 1)
        yield LostAudio(at, None, "a cluster of the Matroska file is damaged")
        tries += 1
        if following < 0 or tries == MOST_LOSSES:
            return
        place = following


def _element(window: _Window, place: int) -> tuple[int, int, int]:
    """Return name and size of an element, and the first byte of its content; an unknown size is `ENDLESS`."""
    head = window.at(place, 12)
    width = 9 - head[0].bit_length()
    rest = head[width : width + 1]
    if width > 4 or not rest or not rest[0]:
        return 0, 0, place + 1
    count = 9 - rest[0].bit_length()
    size = int.from_bytes(head[width : width + count], "big") & ((1 << 7 * count) - 1)
    if size == (1 << 7 * count) - 1:
        size = ENDLESS
    return int.from_bytes(head[:width], "big"), size, place + width + count


def _scale(info: bytes) -> float:
    """Return the seconds of one unit of the time stamps."""
    place = info.find(_SCALE)
    size = info[place + 3] & 0x7F if 0 <= place < len(info) - 4 else 0
    return int.from_bytes(info[place + 4 : place + 4 + min(size, 8)], "big") / 1e9 if size else 1e-3


# -- MPEG audio --

_BITRATES = {  # kbit/s by layer, of MPEG-1 and of MPEG-2 and 2.5 (ISO 11172-3, 13818-3)
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _frames() -> dict[int, tuple[int, int, int]]:
    """Return bytes, samples and sampling rate of an MPEG audio frame by the second and third byte of its header."""
    found: dict[int, tuple[int, int, int]] = {}
    for bits in range(0xE000, 0x10000):
        version, layer = bits >> 11 & 3, 4 - (bits >> 9 & 3)
        index, rate_index, pad = bits >> 4 & 15, bits >> 2 & 3, bits >> 1 & 1
        if version == 1 or layer == 4 or index in (0, 15) or rate_index == 3:
            continue
        rate = (44100, 48000, 32000)[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
        kilobits = _BITRATES[1 if version == 3 else 2, layer][index - 1]
        samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
        if layer == 1:
            size = (12000 * kilobits // rate + pad) * 4
        else:
            size = samples // 8 * 1000 * kilobits // rate + pad
        found[bits] = (size, samples, rate)
    return found


FRAMES = _frames()
MOST_FRAME = 4096  # bytes, more than the longest frame has
MOST_LOSSES = 1000  # after which the search stops
MOST_JUNK = 1 << 16  # bytes before the first frame
_SAME = 0xFE0C  # bits of a header that all frames of a stream share: version, layer, rate


def _mp3(window: _Window) -> Header:
    """Count the frames of an MPEG audio file, and compare the count with the tag that may state it."""
    start = _first_frame(window, _after_tags(window, 0))
    if start is None:
        return Header()
    bits = int.from_bytes(window.at(start + 1, 2), "big")
    size, per_frame, rate = FRAMES[bits]
    known = _alike(bits)
    frame = window.at(start, size)
    tagged = any(tag in frame for tag in (b"Xing", b"Info", b"VBRI"))
    frames, losses = _walk(window, start, known, per_frame / rate)
    stated = _stated_frames(frame) if tagged else None
    if stated is None:
        return Header((), start, True, samples=frames * per_frame, guessed=True, losses=losses)
    counted = frames - 1
    if stated + 2 < counted:  # joined files: the tag belongs to the first
        return Header((), start + size, True, samples=counted * per_frame, guessed=True, losses=losses)
    if stated > counted + 2:
        return Header(samples=counted * per_frame, losses=losses)
    return Header(losses=losses)


@functools.cache
def _alike(bits: int) -> dict[bytes, int]:
    """Return the first three bytes of every possible frame of the same stream, and the frame's size in bytes."""
    same = bits & _SAME
    return {b"\xff" + one.to_bytes(2): size for one, (size, *_) in FRAMES.items() if one & _SAME == same}


def _first_frame(window: _Window, place: int) -> int | None:
    """Return the start of the first frame near ``place`` that is followed by two others or the end of the file."""
    last = place + MOST_JUNK
    while 0 <= (place := window.find(b"\xff", place)) < last:
        bits = int.from_bytes(window.at(place + 1, 2), "big")
        if bits in FRAMES:
            known, after = _alike(bits), place
            for _ in range(3):
                size = known.get(window.at(after, 3))
                if size is None:
                    break
                after += size
                if after >= window.end or _after_tags(window, after) != after:
                    return place
            else:
                return place
        place += 1
    return None


def _walk(window: _Window, place: int, known: Mapping[bytes, int], seconds: float) -> tuple[int, tuple[LostAudio, ...]]:
    """Return the number of frames from ``place`` on, ``seconds`` long each, and the gaps between them."""
    frames, used, losses = 0, 0, list[LostAudio]()
    while place + 4 <= window.end:
        data, begin = window.around(place, MOST_FRAME)
        here, end = begin, len(data)
        while size := known.get(data[here : here + 3]):
            if here + size > end:
                break
            here, frames = here + size, frames + 1
        place, used = place + here - begin, used + here - begin
        if here > begin:  # to the end of the bytes in memory
            continue
        after = _after_tags(window, place)
        if after > place:
            place = after
            continue
        following = _resync(window, place + 1, known)
        if following < 0:
            break
        lost = (following - place) * frames / max(1, used) * seconds
        losses.append(LostAudio(frames * seconds, lost, "bytes between two frames of the MP3 are no frame"))
        if len(losses) == MOST_LOSSES:
            break
        place = following
    return frames, tuple(losses)


def _resync(window: _Window, place: int, known: Mapping[bytes, int]) -> int:
    """Return the position of the next two consecutive frames, or -1."""
    while (place := window.find(b"\xff", place)) >= 0:
        if size := known.get(window.at(place, 3)):
            after = place + size
            if after == window.end or window.at(after, 3) in known:
                return place
        place += 1
    return -1


def _after_tags(window: _Window, place: int) -> int:
    """Return the position after the ID3 and APE tags that begin at ``place``."""
    while True:
        head = window.at(place, 32)
        if head[:3] == b"ID3" and len(head) >= 10:
            size = sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
            place += 10 + size + (10 if head[5] & 16 else 0)
        elif head[:3] == b"TAG":
            place += TAG
        elif head[:8] == b"APETAGEX" and len(head) >= 24:
            place += 32 + (struct.unpack_from("<I", head, 12)[0] if head[23] & 32 else 0)
        else:
            return place


def _stated_frames(frame: bytes) -> int | None:
    """Return the number of frames in a Xing, Info or VBRI tag, or None."""
    for tag in (b"Xing", b"Info"):
        place = frame.find(tag)
        if place >= 0 and len(frame) >= place + 12:
            flags, number = struct.unpack_from(">II", frame, place + 4)
            return number if flags & 1 else None
    place = frame.find(b"VBRI")
    return struct.unpack_from(">I", frame, place + 14)[0] if 0 <= place <= len(frame) - 18 else None
