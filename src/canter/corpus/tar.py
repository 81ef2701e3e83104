"""Tars by their headers: where each member lies. Nothing is ever unpacked."""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from canter.corpus.remote import open_binary, size_of
from canter.corpus.utterance import Problem
from canter.errors import ManifestError


class Member(NamedTuple):
    """A regular file in a tar: ``size`` bytes from byte ``start`` on; ``number`` counts members from 1."""

    name: str
    start: int
    size: int
    number: int


def walk_tar(path: str) -> Iterator[Member | Problem]:
    """Yield the regular files of a tar, by their headers. Unsafe names, links and a torn end are Problems.

    What macOS and pax write beside the files (``._name``, ``PaxHeaders/``) is passed over. Raises
    `ManifestError` where the file is missing or no plain tar.
    """
    try:
        end = size_of(path)
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error}") from None
    number = 0
    try:
        with open_binary(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for number, info in enumerate(tar, 1):
                if info.isdir():
                    continue
                name = posixpath.normpath(info.name)
                if _is_beside(name):
                    continue
                if info.name.startswith("/") or name.split("/")[0] == "..":
                    yield Problem(path, number, f"unsafe member name: {info.name!r} leads out of the tar")
                elif not info.isreg():
                    yield Problem(path, number, f"not a regular file: {info.name!r} is a link or a device")
                elif info.offset_data + info.size > end:
                    yield Problem(path, number, f"truncated tar: it ends within {name!r}")
                    return
                else:
                    yield Member(name, info.offset_data, info.size, number)
    except (tarfile.TarError, OSError, ValueError) as error:
        if not number:
            raise ManifestError(f"{path} is not a plain tar ({error}); unpack compressed ones first") from None
        yield Problem(path, number + 1, f"damaged tar: {error}")


def _is_beside(name: str) -> bool:
    """Return whether a member holds attributes of another: AppleDouble, or a pax header unpacked as a file."""
    *folders, base = name.split("/")
    return (
        base.startswith("._")
        or base == ".DS_Store"
        or any(one == "__MACOSX" or one.startswith("PaxHeaders") for one in folders)
    )
