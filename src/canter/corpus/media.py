"""Recognise audio and video files by their content; the name decides only where the content is unknown."""

import os
from pathlib import Path

from canter.corpus.headers import FRAMES
from canter.corpus.remote import is_url, read_bytes

HEAD = 8192  # bytes that are examined
_AUDIO = """
wav flac mp3 ogg oga opus m4a mp4 aac webm wma aif aiff au caf w64 sph nist mkv mka mov avi m4v m4b mpg mpeg ts mts 3gp
flv wmv amr mp2 mpga ac3 eac3 dts m2ts m4r 3g2 ogv spx ape wv tta rm ra mxf rf64 bwf snd
"""
_MANIFEST = "jsonl json tsv csv psv txt scp yaml yml tar parquet arrow feather"
AUDIO_SUFFIXES = frozenset("." + one for one in _AUDIO.split())
MANIFEST_SUFFIXES = frozenset("." + one for one in _MANIFEST.split())
SOURCE_CODE = {".ts", ".mts"}  # TypeScript as well as MPEG-TS

# first bytes of a file -> name of the format
_SIGNATURES = {
    b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3", b"\x1a\x45\xdf\xa3": "Matroska or WebM",
    bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"): "WMA or WMV", b"FLV\x01": "FLV",
    b"\x00\x00\x01\xba": "MPEG program stream", b".snd": "AU", b"dns.": "AU", b"caff": "CAF",
    b"riff\x2e\x91\xcf\x11": "Wave64", b"NIST_1A": "NIST SPHERE", b"#!AMR": "AMR", b"\x7f\xfe\x80\x01": "DTS",
    b"\xfe\x7f\x01\x80": "DTS", b"MAC ": "Monkey's Audio", b"wvpk": "WavPack", b"TTA1": "True Audio",
    b"MPCK": "Musepack", b"MP+": "Musepack", b"tBaK": "TAK", b"ajkg": "Shorten", b"Creative Voice File": "VOC",
    b".RMF": "RealMedia", b"DSD ": "DSF", b"\x06\x0e\x2b\x34\x02\x05\x01\x01": "MXF", b".SoX": "SoX", b"XoS.": "SoX",
    b"PVF1": "PVF", b"qoaf": "QOA", b"ADIF": "AAC",
}  # fmt: skip
_RIFF = {b"WAVE": "WAV", b"AVI ": "AVI"}
_FORM = {b"AIFF": "AIFF", b"AIFC": "AIFF", b"8SVX": "8SVX", b"16SV": "16SV"}
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # first in MP4 and QuickTime
_IMAGES = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis", b"crx ", b"jp2 ")


def container_format(head: bytes) -> str | None:
    """Return the name of the audio or video format of a file with these first bytes, or None."""
    for start, name in _SIGNATURES.items():
        if head.startswith(start):
            return name
    if head[4:8] == b"\xf8\x72\x6f\xba":
        return "TrueHD"
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
        return _RIFF.get(head[8:12])
    if head[:4] == b"FORM":
        return _FORM.get(head[8:12])
    if head[4:8] in _BOXES and not (head[4:8] == b"ftyp" and head[8:12] in _IMAGES):
        return "MP4 or QuickTime"
    for start, size in ((0, 188), (4, 192)):
        if len(head) > start + 2 * size and all(head[start + size * number] == 0x47 for number in range(3)):
            return "MPEG transport stream"
    return _framed(head)


def _framed(head: bytes) -> str | None:
    """Return the format of a raw stream that begins with two consecutive frames, or None."""
    if len(head) < 8:
        return None
    word = int.from_bytes(head[:2], "big")
    size, name = 0, None
    if word & 0xFFF6 == 0xFFF0:
        size, name = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5, "AAC"
    elif word >= 0xFFE0 and (frame := FRAMES.get(int.from_bytes(head[1:3], "big"))):
        size, name = frame[0], "MP3"
    elif word == 0x0B77 and head[5] >> 3 <= 16:
        following = head.find(b"\x0b\x77", 64)
        size, name = max(0, following), "AC-3"
    elif word & 0xFFE0 == 0x56E0:
        size, name = ((word & 0x1F) << 8 | head[2]) + 3, "AAC"
    again = head[size : size + 2]
    return name if size > 7 and len(again) == 2 and (again[0], again[1] & 0xF0) == (head[0], head[1] & 0xF0) else None


def is_data(head: bytes) -> bool:
    """Return whether a file with these first bytes is JSON, Arrow, Parquet, a tar or gzip."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return text.startswith((b"{", b"[", b"\x1f\x8b", b"PAR1", b"ARROW1")) or head[257:262] == b"ustar"


def is_text(head: bytes) -> bool:
    """Return whether these bytes are text in UTF-8."""
    try:
        head[:-4].decode() if len(head) == HEAD else head.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def head_of(path: str) -> bytes:
    """Return the first bytes of a file or URL, b"" where it cannot be read."""
    try:
        return read_bytes(path, 0, HEAD)
    except (OSError, ValueError, ImportError):
        return b""


def is_media(path: str) -> bool:
    """Return whether a path or URL names one audio or video file, not a folder or a manifest.

    The content decides: a ``talk.txt`` that holds a WAV is media, a ``talk.wav`` that holds JSON is a manifest. For
    other content the suffix decides, and a file without a known suffix is media.
    """
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    if os.path.isdir(path):
        return False
    there = os.path.isfile(path)
    if not there and (suffix in AUDIO_SUFFIXES or suffix in MANIFEST_SUFFIXES or not is_url(path)):
        return suffix in AUDIO_SUFFIXES
    head = head_of(path)
    if container_format(head):
        return True
    if is_data(head) or suffix in MANIFEST_SUFFIXES:
        return False
    return suffix in AUDIO_SUFFIXES or there


def media_in(folder: str) -> tuple[list[str], list[str]]:
    """Return all audio and video files below a folder, sorted, and all other files; hidden files are skipped."""
    media, others = list[str](), list[str]()
    for root, _, names in os.walk(folder):
        for name in names:
            if not name.startswith("."):
                path = os.path.join(root, name)
                (media if _is_media_in_folder(path) else others).append(path)
    return sorted(media), sorted(others)


def _is_media_in_folder(path: str) -> bool:
    if not os.path.isfile(path):  # reading from a pipe could block
        return False
    suffix, head = os.path.splitext(path)[1].lower(), head_of(path)
    if suffix in AUDIO_SUFFIXES and not (suffix in SOURCE_CODE and is_text(head)):
        return True  # the reader reports what is wrong with it
    return container_format(head) is not None
