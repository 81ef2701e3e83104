"""Files by path or URL: what manifests, tars and audio have in common, wherever they lie.

URLs (``s3://``, ``gs://``, ``https://``, ``memory://``) go through fsspec, and what it needs for a protocol is the
user's to install. Local paths never do.
"""

import contextlib
import errno
import os
import posixpath
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO


def is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> str:
    """A URL as it is, any other path from the root on."""
    return os.fspath(path) if is_url(path) else os.path.abspath(path)


def suffix_of(path: str) -> str:
    """Return the suffix in lower case, ``.gz`` and a URL's query aside."""
    if is_url(path):
        path = path.partition("?")[0]
    return os.path.splitext(path.removesuffix(".gz"))[1].lower()


def folder_of(path: str | os.PathLike[str]) -> str:
    """What paths in the manifest at ``path`` are relative to."""
    return os.path.dirname(absolute(path))


def below(folder: str | os.PathLike[str], path: str) -> str:
    """``path`` as it is where it is absolute or a URL, else as it lies in ``folder``, which may be a URL."""
    folder = os.fspath(folder)
    if is_url(path) or path.startswith("/"):
        return path
    if not is_url(folder):
        return os.path.normpath(os.path.join(folder, path))
    protocol, place = folder.split("://", 1)
    return f"{protocol}://{posixpath.normpath(posixpath.join(place, path))}"


def size_of(path: str) -> int:
    """Bytes. Raises `OSError`, as all of these do, where there is no such file."""
    if not is_url(path):
        return os.path.getsize(path)
    with _told(path) as (files, place):
        return files.size(place) or 0


def stamp(path: str) -> str:
    """What changes when the file does, as far as can be told without reading it."""
    if not is_url(path):
        facts = os.stat(path)
        return f"{facts.st_size} {facts.st_mtime_ns}"
    with _told(path) as (files, place):
        return repr(sorted((str(key), str(value)) for key, value in files.info(place).items()))


def refuse_special(path: str | os.PathLike[str]) -> None:
    """Raise `OSError` for a named pipe, socket or device: opening one may wait for ever, and none can be read twice."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise OSError(errno.EINVAL, f"{kind}, not a regular file; write it to a file first", os.fspath(path))


def open_binary(path: str) -> BinaryIO:
    """For reading and seeking; of a URL a few MB at a time are fetched."""
    if not is_url(path):
        refuse_special(path)
        return open(path, "rb")
    with _told(path) as (files, place):
        return files.open(place, "rb")


def read_bytes(path: str, start: int = 0, size: int | None = None) -> bytes:
    """``size`` bytes from byte ``start`` on, fewer where the file ends; None: all. Of a URL by one request."""
    if not is_url(path):
        with open_binary(path) as file:
            file.seek(start)
            return file.read(-1 if size is None else size)
    with _told(path) as (files, place):
        data = files.cat_file(place, start=start or None, end=None if size is None else start + size)
    if size is not None and len(data) > size:
        raise OSError("the server gives whole files alone, no ranges of bytes")
    return data


def list_files(pattern: str) -> list[str]:
    """Return the URLs that a URL with ``*`` stands for. Raises `OSError` where they cannot be listed."""
    with _told(pattern) as (files, place):
        return [files.unstrip_protocol(one) for one in files.glob(place)]


@contextlib.contextmanager
def _told(url: str) -> Iterator[tuple[Any, str]]:
    """fsspec's file system for a URL, and its place there; each of them has errors of its own kind."""
    from fsspec.core import url_to_fs

    try:
        yield url_to_fs(url)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from None
