"""Read untrusted JSON, YAML and small files within limits on size, depth and memory.

Every reader takes the exception class to raise, because a manifest, a run's configuration and a model folder have
different errors. A file within the limits takes at most about 100 MiB while it is read.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import yaml

from canter.errors import CanterError, CheckpointError

MOST_JSON_BYTES = 4 * 2**20
MOST_YAML_BYTES = 2**20
MOST_DEPTH = 64
MOST_YAML_NODES = 100_000
"""Maximum nodes of a YAML document with every alias expanded."""
MOST_SCALAR = 10_000
"""Maximum characters of a YAML scalar that may be a number, whose conversion takes quadratic time."""
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
Json: TypeAlias = Any
"""A value parsed from JSON or YAML, which has no narrower type (`json.loads` is typed like this too)."""
if TYPE_CHECKING:
    from yaml import SafeLoader as _FastLoader
else:
    _FastLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_FastLoader):
    """The safe loader without dates: a value such as 2001-99-99 is read as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _FastLoader.yaml_implicit_resolvers.items()
}


def read_limited(path: str | Path, most: int, error: type[CanterError] = CheckpointError) -> bytes:
    """Return the bytes of a regular file.

    Raises ``error`` for more than ``most`` bytes and for a pipe or a device, which could block or never end; other
    errors are OSErrors.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as reason:  # a NUL in the name
        raise error(f"{str(path)!r} cannot be the name of a file ({reason})") from None
    with open(handle, "rb") as file:
        kind = os.fstat(handle)
        if stat.S_ISDIR(kind.st_mode):
            raise IsADirectoryError(f"{path} is a folder, not a file")
        if not stat.S_ISREG(kind.st_mode):
            raise error(f"{path} is not a regular file")
        data = b"" if kind.st_size > most else file.read(most + 1)
    if kind.st_size > most or len(data) > most:
        raise error(
            f"{path} has {max(kind.st_size, len(data)):,} bytes, more than the {most:,} that are read of such a file"
        )
    return data


def parse_json(
    text: bytes | str, source: str | Path, error: type[CanterError] = CheckpointError, most: int = MOST_JSON_BYTES
) -> Json:
    """Return the value of a JSON text of at most ``most`` bytes and MOST_DEPTH levels.

    Raises ``error`` for text that is not JSON, is nested deeper, or holds an integer of thousands of digits.
    """
    try:
        data = text.encode() if isinstance(text, str) else text.removeprefix(b"\xef\xbb\xbf")
        if len(data) > most:
            raise error(f"{source} has more than {most:,} bytes of JSON")
        if _json_depth(data) > MOST_DEPTH:
            raise error(f"{source} is JSON nested deeper than {MOST_DEPTH} levels")
        return json.loads(data.decode())
    except CanterError:
        raise
    except (ValueError, RecursionError) as reason:
        raise error(f"{source} is not JSON ({reason}); was it copied in full?") from None


def _json_depth(data: bytes) -> int:
    bare = np.frombuffer(_STRINGS.sub(b"", data), dtype=np.uint8)
    opened = np.isin(bare, (ord("["), ord("{"))).astype(np.int8)
    closed = np.isin(bare, (ord("]"), ord("}"))).astype(np.int8)
    return int(np.cumsum(opened - closed, dtype=np.int64).max(initial=0))


def parse_yaml(
    text: bytes | str,
    source: str | Path,
    error: type[CanterError] = CheckpointError,
    loader: type[yaml.SafeLoader] = _Loader,
) -> Json:
    """Return the value of a YAML document of plain values; no other objects are constructed.

    Raises ``error`` for text that is not YAML, for tags of other types, and for a document that is too long, nested too
    deeply, or exceeds MOST_YAML_NODES when its aliases are expanded.
    """
    if len(text) > MOST_YAML_BYTES:
        raise error(f"{source} has more than {MOST_YAML_BYTES:,} bytes of YAML")
    try:
        fault = _yaml_fault(yaml.parse(text, Loader=_FastLoader))
        if fault:
            raise error(f"{source} is YAML {fault}")
        return yaml.load(text, loader)
    except CanterError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as reason:
        raise error(f"{source} is not YAML ({' '.join(str(reason).split())[:300]})") from None


def _yaml_fault(events: Iterable[yaml.Event]) -> str | None:
    """Return why a document is refused, before any value is constructed, or None."""
    sizes = [0]  # nodes so far of the document and of each open collection
    names: list[str | None] = [None]
    anchors: dict[str, int] = {}
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            if len(sizes) > MOST_DEPTH:
                return f"nested deeper than {MOST_DEPTH} levels"
            sizes.append(1)
            names.append(event.anchor)
            continue
        if isinstance(event, yaml.ScalarEvent):
            if len(event.value) > MOST_SCALAR and (event.implicit[0] or event.tag):
                return f"with a plain value of more than {MOST_SCALAR:,} characters; put quotes around it"
            size, name = 1, event.anchor
        elif isinstance(event, yaml.CollectionEndEvent):
            size, name = sizes.pop(), names.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in names:
                return f"whose alias {event.anchor!r} contains itself"
            size, name = anchors.get(event.anchor, 1), None
        else:
            continue
        if name is not None:
            anchors[name] = size
        sizes[-1] += size
        if sum(sizes) > MOST_YAML_NODES:
            return f"of more than {MOST_YAML_NODES:,} values"
    return None


def read_json_value(path: str | Path, error: type[CanterError] = CheckpointError, most: int = MOST_JSON_BYTES) -> Json:
    """Return the value of a JSON file; see `read_limited` and `parse_json`."""
    return parse_json(read_limited(path, most, error), path, error, most)


def read_yaml_value(
    path: str | Path, error: type[CanterError] = CheckpointError, loader: type[yaml.SafeLoader] = _Loader
) -> Json:
    """Return the value of a YAML file; see `read_limited` and `parse_yaml`."""
    return parse_yaml(read_limited(path, MOST_YAML_BYTES, error), path, error, loader)


def is_file_name(name: object) -> TypeGuard[str]:
    """Return whether ``name`` is the bare name of a file, so that joining it to a folder stays in that folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(character in name for character in "/\\\0")
