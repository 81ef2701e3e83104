"""Mutate bytes, JSON, tables, archives and tensors with knowledge of their structure, as a random generator decides."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 255, 2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, -1e308, 1e-308, 0.5,
    float("nan"),
    float("inf"), float("-inf"), "", " ", "x" * 5000, "é\u0000", "\ud800", "\u202e\u200b\ufeff", "1.5", "nan",
    "true", "null",
    "../../etc/passwd", "/dev/zero", "/dev/null", "/", ".", "a\nb", "a::b", "{0..9}", "%s%n",
    "http://127.0.0.1:1/x.wav",
    "file:///etc/passwd", "<|endoftext|>", "en", "zz", "auto", [], {}, [1], [[]], {"": None}, {"a": {"a": {}}},
    [None] * 100,
)  # fmt: skip
KEYS = ("", "text", "duration", "offset", "lang", "audio_filepath", "_skipme", "\ud800", "id", "type", "x" * 300)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 2**40)


def harm(draw: random.Random, data: bytes, times: int | None = None) -> bytes:
    """Return ``data`` with a few bytes flipped, removed, repeated, moved or inserted, or with an extreme integer."""
    harmed = bytearray(data)
    for _ in range(times or draw.choice((1, 1, 2, 5, 20))):
        if not harmed:
            return bytes(draw.randrange(256) for _ in range(draw.randint(0, 20)))
        place, what = draw.randrange(len(harmed)), draw.randrange(9)
        if what == 0:
            harmed[place] ^= 1 << draw.randrange(8)
        elif what == 1:
            harmed[place] = draw.randrange(256)
        elif what == 2:
            del harmed[place : place + draw.choice((1, 4, 100))]
        elif what == 3:
            harmed[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 16)))
        elif what == 4:
            del harmed[place:]
        elif what == 5:
            harmed[place:place] = harmed[place : place + draw.randint(1, 1000)]
        elif what == 6:
            other = draw.randrange(len(harmed))
            harmed[place : place + 64] = harmed[other : other + 64]
        elif what == 7:
            size = draw.choice((1, 2, 4, 8))
            number = draw.choice(NUMBERS) & (256**size - 1)
            harmed[place : place + size] = number.to_bytes(size, draw.choice(("little", "big")))
        else:  # near the front, where formats keep their headers
            harmed[min(place % 64, len(harmed) - 1)] = draw.randrange(256)
    return bytes(harmed)


def spoil(draw: random.Random, value: Any, times: int | None = None) -> Any:
    """Return a JSON value in which some entries, at any depth, are missing, new, moved, or of another type."""
    holder = json.loads(json.dumps([value]))
    for _ in range(times or draw.choice((1, 1, 2, 3))):
        places = list(_places(holder))
        parent, key = draw.choice(places)
        old, what = parent[key], draw.randrange(8)
        if what <= 2:
            parent[key] = copy.deepcopy(draw.choice(VALUES))
        elif what == 3 and len(places) > 1 and parent is not holder:
            del parent[key]
        elif what == 4 and isinstance(old, int | float) and not isinstance(old, bool):
            parent[key] = draw.choice((-old, old + 1, old * 10**9, old / 7, str(old), [old], old - 1e-9))
        elif what == 5 and isinstance(old, dict):
            old[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
        elif what == 6:
            other, name = draw.choice(places)
            parent[key] = copy.deepcopy(other[name])
        else:
            for _ in range(draw.choice((1, 1, 70, 300))):
                old = [old] if draw.random() < 0.5 else {"a": old}
            parent[key] = old
    return holder[0]


def _places(value: Any, depth: int = 0) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        if depth < 40:
            yield from _places(inner, depth + 1)


def to_json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000 + b"]" * 5000


def spoilt_json(draw: random.Random, data: bytes) -> bytes:
    """Return a JSON file with spoilt values, or one time in four with harmed bytes."""
    if draw.random() < 0.25:
        return harm(draw, data)
    return to_json(spoil(draw, json.loads(data)))


def spoilt_lines(draw: random.Random, data: bytes) -> bytes:
    """Return JSON lines, of which some are spoilt, repeated, or harmed as bytes."""
    lines = []
    for line in data.splitlines():
        if draw.random() < 0.6:
            line = spoilt_json(draw, line)
        lines += [line] * draw.choice((1, 1, 1, 0, 2))
    ending = draw.choice((b"\n", b"\r\n", b"\n\n", b",\n", b"\r", b""))
    whole = ending.join(lines)
    start = draw.choice((b"",) * 8 + (b"\xef\xbb\xbf", b"\xff\xfe", b"[", b"\x00"))
    return start + (harm(draw, whole) if draw.random() < 0.2 else whole)


def spoilt_table(draw: random.Random, data: bytes, separator: str) -> bytes:
    """Return a text table with missing, new or moved cells."""
    rows = [line.split(separator) for line in data.decode().splitlines()]
    for _ in range(draw.choice((1, 2, 5))):
        row = draw.choice(rows)
        place, what = draw.randrange(len(row)) if row else 0, draw.randrange(4)
        cell = str(draw.choice(VALUES))[:6000]
        if what == 0 and row:
            del row[place]
        elif what == 1:
            row.insert(place, cell)
        elif row:
            row[place] = cell
    text = "\n".join(separator.join(row) for row in rows).encode("utf-8", "surrogatepass")
    return harm(draw, text) if draw.random() < 0.3 else text


def spoilt_tar(draw: random.Random, data: bytes) -> bytes:
    """Return a tar of members that are spoilt by kind, renamed, dropped, or of another type; or harmed bytes."""
    if draw.random() < 0.3:
        return harm(draw, data)
    stream = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=stream, mode="w") as new:
        members = [(one.name, old.extractfile(one).read()) for one in old if one.isreg()]  # pyright: ignore
        chosen = draw.randrange(len(members))
        for number, (name, content) in enumerate(members):
            info = tarfile.TarInfo(name)
            if number == chosen:
                what = draw.randrange(6)
                if what == 0:
                    continue
                if what == 1:
                    info.name = draw.choice(("../x", "/etc/x", "a" * 300, "é\x01", ".", name + ".x", "x/" + name))
                elif what == 2:
                    info.type = draw.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S"))
                    info.linkname = draw.choice(("/etc/passwd", name, "../../x"))
                    new.addfile(info)
                    continue
                else:
                    content = spoilt_member(draw, name, content)
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def spoilt_member(draw: random.Random, name: str, content: bytes) -> bytes:
    """Return a file's bytes spoilt as its name says: JSON, YAML, tensors, a zip, lines, else bytes."""
    suffix = name.rsplit(".", 1)[-1]
    if suffix == "jsonl" or (suffix == "json" and content.count(b"}\n{")):
        return spoilt_lines(draw, content)
    if suffix == "json" and content:
        return spoilt_json(draw, content)
    if suffix in ("yaml", "yml"):
        return spoilt_yaml(draw, content)
    if suffix == "safetensors":
        return spoilt_tensors(draw, content)
    if suffix in ("ckpt", "pt") and draw.random() < 0.7:
        return spoilt_zip(draw, content)
    if suffix == "gz":
        return spoilt_gzip(draw, content, name.removesuffix(".gz"))
    if suffix in ("tar", "nemo"):
        return spoilt_tar(draw, content)
    return harm(draw, content)


def spoilt_yaml(draw: random.Random, content: bytes) -> bytes:
    """Return YAML with spoilt values, written as JSON, which it includes; or with tags, anchors or harmed bytes."""
    import yaml

    what = draw.random()
    if what < 0.2:
        return harm(draw, content)
    if what < 0.35:
        lines = content.decode().splitlines()
        place = draw.randrange(len(lines) + 1)
        lines.insert(place, draw.choice(("a: &a [*a]", "b: !!python/object/apply:os.getcwd []", "? [1]\n: 2", "- 1",
                                         "\t",
                                         "c: !!timestamp 2001-99-99", "d: *none", "<<: {a: 1}", "e: 1:1:1", "---",
                                         "%YAML 9.9",
                                         "f: !!int x", "g: 2001-99-99", "h: !!set {1, 2}", "i: .inf")))  # fmt: skip
        return "\n".join(lines).encode()
    return to_json(spoil(draw, yaml.safe_load(content)))


def spoilt_tensors(draw: random.Random, content: bytes) -> bytes:
    """Return a safetensors file with a spoilt header, a header of another length, or harmed bytes."""
    what = draw.random()
    if what < 0.3:
        return harm(draw, content)
    size = struct.unpack("<Q", content[:8])[0]
    header = to_json(spoil(draw, json.loads(content[8 : 8 + size])))
    length = draw.choice(NUMBERS) if what < 0.45 else len(header)
    return struct.pack("<Q", length) + header + content[8 + size :]


def spoilt_zip(draw: random.Random, content: bytes) -> bytes:
    """Return a zip with a harmed, missing, renamed, repeated or compressed record."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        records = old.infolist()
        pickles = [one for one in records if one.filename.endswith(".pkl")]
        chosen = draw.choice(pickles or records) if draw.random() < 0.6 else draw.choice(records)
        for record in records:
            data, name, kind = old.read(record), record.filename, zipfile.ZIP_STORED
            if record is chosen:
                what = draw.randrange(6)
                if what == 0:
                    continue
                if what == 1:
                    name = draw.choice(("../x", "x", "archive/data.pkl", name + "x"))
                elif what == 2:
                    kind = zipfile.ZIP_DEFLATED
                else:
                    data = harm(draw, data)
            new.writestr(zipfile.ZipInfo(name), data, kind)
    return stream.getvalue()


def spoilt_gzip(draw: random.Random, content: bytes, name: str) -> bytes:
    if draw.random() < 0.4:
        return harm(draw, content)
    return gzip.compress(spoilt_member(draw, name, gzip.decompress(content)), 1)


def spoilt_files(draw: random.Random, files: Mapping[str, bytes], among: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return the files of a folder, of which one to three are spoilt, missing, empty, or another's bytes.

    ``among`` are endings of the names to choose from.
    """
    spoilt = dict(files)
    names = sorted(name for name in files if not among or name.endswith(among))
    for _ in range(draw.choice((1, 1, 2, 3))):
        name, what = draw.choice(names), draw.randrange(12)
        if what == 0:
            spoilt.pop(name, None)
        elif what == 1:
            spoilt[name] = b""
        elif what == 2:
            spoilt[name] = files[draw.choice(names)]
        else:
            spoilt[name] = spoilt_member(draw, name, files[name])
    return spoilt
