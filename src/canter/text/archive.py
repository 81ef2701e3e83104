"""NeMo's tar archives (``.nemo``), read by member within limits on size and number; nothing is extracted by name."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Self, TypeVar

from canter.errors import CanterError, CheckpointError
from canter.untrusted import MOST_YAML_BYTES, Json, parse_yaml

CONFIG = "model_config.yaml"
MOST_MEMBERS = 1000
MOST_HEADER_BYTES = 2**20
"""Maximum size of a PAX header or a long name, which tarfile reads at once."""
MOST_EXPANSION = 20
"""Maximum ratio of unpacked to packed size of a compressed archive; weights hardly compress."""
LEAST_UNPACKED = 2**26
"""Bytes to which any compressed archive may unpack, whatever its size."""
_CHUNK = 2**20
_NAMING = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
"""Types of headers with attributes of the member after them."""


class _Header(tarfile.TarInfo):
    """A tar header, checked before tarfile uses it; only files, folders and headers with their names are allowed."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise CheckpointError(f"member {header.name!r} has a negative size")
        if header.type in _NAMING:
            if header.size > MOST_HEADER_BYTES:
                raise CheckpointError(f"a header of {header.size:,} bytes precedes a member")
        elif header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
            raise CheckpointError(f"member {header.name!r} is a link or a device")
        return header


class Archive:
    """An open ``.nemo`` file, whose members are found by name without a leading ``./``."""

    def __init__(self, tar: tarfile.TarFile, path: Path, size: int):
        """Read the headers of a tar of ``size`` uncompressed bytes. Raises CheckpointError for unsafe members."""
        self.tar, self.path = tar, path
        self.members: dict[str, tarfile.TarInfo] = {}
        total = 0
        for count, member in enumerate(tar, 1):
            name = PurePosixPath(member.name)
            if count > MOST_MEMBERS:
                raise CheckpointError(f"{path} unpacks to more than {MOST_MEMBERS} files; refused")
            if name.is_absolute() or ".." in name.parts or "\0" in member.name:
                raise CheckpointError(f"{path}: member {member.name!r} leads out of the archive; refused")
            if member.isdir():
                continue
            if member.issparse():
                raise CheckpointError(f"{path}: member {member.name!r} is a sparse file; refused")
            total += member.size
            if member.size < 0 or total > size:
                raise CheckpointError(
                    f"{path} is truncated or not a .nemo archive (member {member.name!r} claims {member.size:,} bytes)"
                )
            self.members[str(name)] = member

    def open(self, name: str) -> IO[bytes]:
        """Return a member, open for reading. Raises CheckpointError where there is none of that name."""
        if name not in self.members:
            held = ", ".join(sorted(self.members)[:20]) or "nothing"
            raise CheckpointError(f"{self.path} has no {name}; it holds {held}")
        file = self.tar.extractfile(self.members[name])
        assert file is not None  # because it is a regular file
        return file

    def read(self, name: str, most: int) -> bytes:
        """Return the bytes of a member. Raises CheckpointError for more than ``most`` bytes, or a missing member."""
        with self.open(name) as file:
            size = self.members[name].size
            if size > most:
                raise CheckpointError(
                    f"{self.path}: {name} has {size:,} bytes, more than the {most:,} that are read of such a file"
                )
            return file.read()

    def config(self) -> dict[str, Json]:
        """Return the archive's YAML as plain values. Raises CheckpointError where it is not a mapping."""
        values = parse_yaml(self.read(CONFIG, MOST_YAML_BYTES), f"{self.path}: {CONFIG}")
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path}: {CONFIG} is not a mapping")
        return values


ArchiveT = TypeVar("ArchiveT", bound=Archive)


@contextmanager
def open_archive(path: Path, kind: type[ArchiveT]) -> Iterator[ArchiveT]:
    """Yield the archive at ``path``, a tar or gzipped tar, after a check of all its members.

    Raises CheckpointError for anything else, and for an archive that unpacks to far more than its own size.
    """
    try:
        with open(path, "rb") as packed, tempfile.TemporaryFile() as unpacked:
            if not stat.S_ISREG(os.fstat(packed.fileno()).st_mode):
                raise CheckpointError(f"{path} is not a regular file")
            file = packed
            if packed.read(2) == b"\x1f\x8b":
                _unpack(packed, unpacked, path)
                file = unpacked
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                archive = kind(tar, path, size)
                yield archive
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if str(path) in text else f"{path}: {text}; refused") from None
    except CanterError:
        raise
    # tarfile and gzip raise undocumented errors for damaged headers, among them ValueError and RecursionError
    except (tarfile.TarError, EOFError, OSError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} is truncated or not a .nemo archive ({reason.rstrip(':')})") from None


def _unpack(packed: IO[bytes], unpacked: IO[bytes], path: Path) -> None:
    packed_size = packed.seek(0, os.SEEK_END)
    packed.seek(0)
    most = max(LEAST_UNPACKED, MOST_EXPANSION * packed_size)
    with gzip.GzipFile(fileobj=packed) as stream:
        while chunk := stream.read(_CHUNK):
            if unpacked.tell() + len(chunk) > most:
                raise CheckpointError(f"{path} unpacks to more than {most} bytes; refused")
            unpacked.write(chunk)
