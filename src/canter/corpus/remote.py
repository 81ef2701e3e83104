"""Files by path or URL.

URLs (``s3://``, ``gs://``, ``https://``, ``memory://``) are read by fsspec; the user installs the package that it needs
for a protocol. Local paths never use it. URLs in a manifest are trusted, unless CANTER_NO_URLS is set.
"""

import contextlib
import errno
import io
import os
import posixpath
import socket
import stat
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from canter.errors import ConfigError
from canter.extras import missing
from canter.redaction import redacted

NO_URLS = "CANTER_NO_URLS"
_OFF = ("", "0", "false", "no", "off")
_BUFFER = 2**16  # bytes read at once from fsspec


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL."""
    return "://" in os.fspath(path)


def forbid_urls() -> None:
    """Refuse every URL from now on, in this process and its child processes."""
    os.environ[NO_URLS] = "1"


def urls_forbidden() -> bool:
    """Return whether CANTER_NO_URLS is set, to anything but 0, false, no or off."""
    return os.environ.get(NO_URLS, "").strip().lower() not in _OFF


def absolute(path: str | os.PathLike[str]) -> str:
    """Return the absolute path; a URL is returned unchanged."""
    return os.fspath(path) if is_url(path) else os.path.abspath(path)


def suffix_of(path: str) -> str:
    """Return the suffix in lower case, without ``.gz`` and a URL's query."""
    if is_url(path):
        path = path.partition("?")[0]
    return os.path.splitext(path.removesuffix(".gz"))[1].lower()


def folder_of(path: str | os.PathLike[str]) -> str:
    """Return the folder that paths in the manifest at ``path`` are relative to, without a URL's query."""
    path = absolute(path)
    return os.path.dirname(path.split("?")[0] if is_url(path) else path)


def below(folder: str | os.PathLike[str], path: str) -> str:
    """Return ``path`` joined to ``folder``, which may be a URL; an absolute path or URL is returned unchanged."""
    folder = os.fspath(folder)
    if is_url(path) or path.startswith("/"):
        return path
    if not is_url(folder):
        return os.path.normpath(os.path.join(folder, path))
    protocol, place = folder.split("://", 1)
    return f"{protocol}://{posixpath.normpath(posixpath.join(place, path))}"


def from_working_folder(path: str) -> str:
    """Return the absolute form of a relative path that exists in the working folder, and any other path unchanged."""
    relative = not (is_url(path) or path.startswith("/") or "\0" in path)
    return os.path.abspath(path) if relative and os.path.exists(path) else path


def size_of(path: str) -> int:
    """Return the size in bytes. Raises OSError, as the functions below do, where there is no such file."""
    if not is_url(path):
        return os.path.getsize(path)
    with _file_system(path) as (files, place):
        return files.size(place) or 0


def stamp(path: str) -> str:
    """Return a value that changes when the file changes, as far as that shows without reading it."""
    if not is_url(path):
        facts = os.stat(path)
        return f"{facts.st_size} {facts.st_mtime_ns}"
    with _file_system(path) as (files, place):
        return repr(sorted((str(key), str(value)) for key, value in files.info(place).items()))


def refuse_special(path: str | os.PathLike[str]) -> None:
    """Raise OSError for a named pipe, socket or device: opening one may block, and none can be read twice."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise OSError(errno.EINVAL, f"{kind}, not a regular file; write it to a file first", os.fspath(path))


def open_binary(path: str) -> BinaryIO:
    """Open a file for reading and seeking; a URL is fetched a few MB at a time."""
    if not is_url(path):
        refuse_special(path)
        return open(path, "rb")
    with _file_system(path) as (files, place):
        return cast(BinaryIO, io.BufferedReader(_RemoteFile(path, files.open(place, "rb")), _BUFFER))


def read_bytes(path: str, start: int = 0, size: int | None = None) -> bytes:
    """Return ``size`` bytes from byte ``start`` on (None: all), fewer where the file ends; a URL takes one request."""
    if not is_url(path):
        with open_binary(path) as file:
            file.seek(start)
            return file.read(-1 if size is None else size)
    with _file_system(path) as (files, place):
        data = files.cat_file(place, start=start or None, end=None if size is None else start + size)
    if size is not None and len(data) > size:
        raise OSError("the server gives only complete files, no ranges of bytes")
    return data


def list_files(pattern: str) -> list[str]:
    """Return the URLs that match a URL with ``*``. Raises OSError where they cannot be listed."""
    with _file_system(pattern) as (files, place):
        return [files.unstrip_protocol(one) for one in files.glob(place)]


def files_below(url: str) -> dict[str, int]:
    """Return the sizes in bytes of all files below a URL, by their paths relative to it; none if there is nothing.

    Raises OSError where they cannot be listed.
    """
    with _file_system(url) as (files, place):
        files.invalidate_cache()
        place = place.rstrip("/")
        try:
            found = files.find(place, detail=True)
        except FileNotFoundError:
            return {}
        return {name[len(place) + 1 :]: one["size"] for name, one in found.items() if name.startswith(f"{place}/")}


def upload_file(path: str | os.PathLike[str], url: str) -> None:
    """Copy a file of this machine to a URL. Raise OSError where it cannot be read or written."""
    with _file_system(url) as (files, place):
        files.put_file(os.fspath(path), place)


def download_file(url: str, path: str | os.PathLike[str]) -> None:
    """Copy the file at a URL to this machine. Raise OSError where it cannot be read or written."""
    with _file_system(url) as (files, place):
        files.get_file(place, os.fspath(path))


class _RemoteFile(io.RawIOBase):
    """A file of fsspec with a separate position (readers of ``memory://`` share one), whose errors are OSErrors."""

    def __init__(self, url: str, file: BinaryIO):
        self._url, self._file, self._place = url, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            with _file_system(self._url):
                place = self._file.seek(place, whence)
        elif whence == os.SEEK_CUR:
            place += self._place
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def readinto(self, target: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        with _file_system(self._url):
            if self._file.seekable():
                self._file.seek(self._place)
            data = self._file.read(len(target))
        target[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextlib.contextmanager
def _file_system(url: str) -> Iterator[tuple[Any, str]]:
    """Yield fsspec's file system for a URL and the path in it; every protocol's errors become OSError.

    FileNotFoundError is raised only where the server reports it, ConfigError where URLs are forbidden, and
    MissingExtraError where ``s3://`` needs the extra.
    """
    if urls_forbidden():
        raise ConfigError(
            f"{redacted(url)}: URLs are forbidden ({NO_URLS} is set, or --no-urls given); copy the file to this machine"
        )
    from fsspec.core import url_to_fs

    try:
        yield url_to_fs(url)
    except Exception as error:
        if isinstance(error, ImportError) and url.startswith(("s3://", "s3a://")) and not find_spec("s3fs"):
            raise missing("s3fs", redacted(url)) from None
        reason = _reason(url, error)
        if reason is None:
            raise
        raise OSError(reason) from None


def _reason(url: str, error: Exception) -> str | None:
    """Return why a URL cannot be read, or None where the error is an OSError that states it.

    fsspec reports any failure over HTTP as a missing file; the cause of the error has the reason.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 10:
        chain.append(cause)
    status = next((one for error in chain if isinstance(one := getattr(error, "status", None), int)), None)
    if status is not None:
        if status in (404, 410) and isinstance(error, FileNotFoundError):
            return None
        phrase = next((str(one) for error in chain if (one := getattr(error, "message", None))), "")
        hint = "; check its credentials, and that its signature has not expired" if status in (401, 403) else ""
        return f"the server answers {status} {phrase}".rstrip() + hint
    host = _host(url)
    for one in chain:
        if isinstance(one, socket.gaierror):
            return f"the name {host} cannot be resolved"
        if isinstance(one, ConnectionRefusedError):
            return f"{host} refuses the connection"
        if isinstance(one, TimeoutError) or "Timeout" in type(one).__name__:
            return f"{host} does not answer in time"
    if isinstance(error, FileNotFoundError) and len(chain) > 1 and type(chain[1]).__module__ != "builtins":
        return f"{type(chain[1]).__name__}: {redacted(str(chain[1]))}"
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        return None
    return f"{type(error).__name__}: {redacted(str(error))}"


def _host(url: str) -> str:
    try:
        parts = urlsplit(redacted(url))
        return parts.netloc or parts.path
    except ValueError:
        return "the server"
