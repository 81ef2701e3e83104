"""Read a request's multipart form within limits; its file is written to disk once, without a name.

Number, headers and sizes of the fields are bounded before they are decoded, and text is decoded as UTF-8 only: Python
has codecs that take seconds for a few hundred kilobytes, which would block the event loop.
"""

import asyncio
import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.requests import ClientDisconnect, Request

from canter.serving.config import ServiceConfig
from canter.serving.protocol import ApiError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MOST_FIELDS = 64  # fields of a form, including the file
FIELD_BYTES = 64 * 2**10  # maximum size of a field that is not the file
FIELDS_BYTES = 256 * 2**10  # maximum size of all these fields together
HEADER_BYTES = 4 * 2**10  # maximum size of a field's headers, and of the request's Content-Type
WRITE_BYTES = 2**20  # bytes of the file that are collected in memory before they are written
UTF8 = ("", "utf-8", "utf8", "us-ascii", "ascii")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_FILES = (errno.EMFILE, errno.ENFILE)


def anonymous_file() -> BinaryIO:
    """Return an unbuffered temporary file without a name: the system removes it however the process ends."""
    return tempfile.TemporaryFile(prefix="canter-", buffering=0)  # pyright: ignore[reportReturnType]


def write_all(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Write all of the data to an unbuffered file, whose ``write`` may take only a part of it."""
    left = memoryview(data)
    while len(left):
        left = left[file.write(left) :]


def path_of(file: BinaryIO) -> str:
    """Return a path under which an open file without a name can be opened again."""
    return f"/dev/fd/{file.fileno()}"


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Context manager that turns the error of a full disk into ApiError (507), of too many open files into 503."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_FILES:
            text = "the service has too many files open; try again in a moment"
            raise ApiError(503, text, code="overloaded") from None
        if error.errno not in _NO_SPACE:
            raise
        place = f"{tempfile.gettempdir()} ({os.strerror(error.errno)})"
        text = f"the service has no space left in {place}; try again later"
        raise ApiError(507, text, code="insufficient_storage") from None


async def read_form(request: Request, config: ServiceConfig) -> FormData:
    """Return the fields of a multipart body, with its file in an `anonymous_file`.

    Raises ApiError for a body that is too large (before it is read, if its length is stated), too slow, truncated, not
    a form or not UTF-8, and for a full disk.
    """
    boundary = _boundary(request)
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal() or len(stated) > 18 or int(stated) > config.max_bytes:
        raise _too_large(config)
    form = _Form(boundary)
    try:
        async with asyncio.timeout(config.upload_timeout):
            with disk_errors():
                await _read(request, form, config)
        return form.data()
    except BaseException as error:
        form.close()
        if isinstance(error, TimeoutError):
            text = f"the body did not arrive within {config.upload_timeout:g} s"
            raise ApiError(408, text, code="upload_timeout") from None
        if isinstance(error, FormParserError):
            raise ApiError(400, f"the form cannot be read: {str(error)[:200] or 'it is malformed'}") from None
        if isinstance(error, ClientDisconnect):
            raise ApiError(499, "the client left") from None
        raise


def _boundary(request: Request) -> bytes:
    """Return the boundary of the request's form. Raise ApiError if its Content-Type has none."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        shown = kind[:80] or "of no stated type"
        raise ApiError(415, f"the body is {shown}; send multipart/form-data with a 'file'")
    if len(kind) > HEADER_BYTES:
        raise ApiError(400, f"the Content-Type is over {HEADER_BYTES} bytes")
    _, options = parse_options_header(kind)
    _refuse_charset(options)
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046, section 5.1.1
        raise ApiError(400, "the form cannot be read: its Content-Type has no boundary of 1 to 70 characters")
    return boundary


def _refuse_charset(options: dict[bytes, bytes], field: str | None = None) -> None:
    charset = options.get(b"charset", b"").decode("latin-1").strip().lower()
    if charset not in UTF8:
        where = f"field {field!r}" if field else "the form"
        raise ApiError(400, f"{where} is in charset {charset[:40]!r}; send UTF-8", field)


async def _read(request: Request, form: "_Form", config: ServiceConfig) -> None:
    received = 0
    parser = MultipartParser(form.boundary, form.callbacks())
    async for chunk in request.stream():
        received += len(chunk)
        if received > config.max_bytes:
            raise _too_large(config)
        parser.write(chunk)
        if len(form.unwritten) >= WRITE_BYTES:
            await form.write()
    await form.write()
    if not form.ended:
        raise ApiError(400, "the form cannot be read: it ends before its last boundary")


def _too_large(config: ServiceConfig) -> ApiError:
    return ApiError(413, f"the body is over {config.max_bytes / 2**20:g} MiB; send less audio, or compress it", "file")


class _Form:
    """Fields of a form, filled by the parser's callbacks."""

    def __init__(self, boundary: bytes):
        self.boundary = boundary
        self.fields: list[tuple[str, str]] = []
        self.upload: BinaryIO | None = None
        self.unwritten = bytearray()
        """Bytes of the file that are not on disk yet."""
        self.ended = False
        self._upload_name, self._file_name, self._size = "", "", 0
        self._parts = self._text_bytes = 0
        self._headers: dict[bytes, bytes] = {}
        self._header_name, self._header_value, self._header_bytes = bytearray(), bytearray(), 0
        self._name = ""
        self._text: bytearray | None = None
        """Text of the field that is being read; None for the file."""

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_part,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    async def write(self) -> None:
        """Write the file's collected bytes in a thread, so that a slow disk does not block the event loop."""
        if self.upload is not None and self.unwritten:
            data, self.unwritten = self.unwritten, bytearray()
            self._size += len(data)
            await asyncio.to_thread(write_all, self.upload, data)

    def data(self) -> FormData:
        """Return the fields, with the file at its start."""
        found: list[tuple[str, str | UploadFile]] = [*self.fields]
        if self.upload is not None:
            self.upload.seek(0)
            file = UploadFile(self.upload, size=self._size, filename=self._file_name, headers=Headers())
            found.append((self._upload_name, file))
        return FormData(found)

    def close(self) -> None:
        if self.upload is not None:
            self.upload.close()

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MOST_FIELDS:
            raise ApiError(400, f"the form has more than {MOST_FIELDS} fields")
        self._headers, self._header_bytes = {}, 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_name += data[start:end]

    def _header_part(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADER_BYTES:
            raise ApiError(400, f"the headers of a field of the form are over {HEADER_BYTES} bytes")

    def _header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name, self._header_value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"name" not in options:
            raise ApiError(400, "the form cannot be read: a part's Content-Disposition names no field")
        self._name = options[b"name"].decode("utf-8", "replace")
        if b"filename" in options:
            if self.upload is not None:
                raise ApiError(400, "the form has more than one file; send one a request", "file")
            self.upload, self._text = anonymous_file(), None
            self._upload_name = self._name
            self._file_name = options[b"filename"].decode("utf-8", "replace")
            return
        _, kind = parse_options_header(self._headers.get(b"content-type"))
        _refuse_charset(kind, self._name[:40])
        self._text = bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._text is None:
            self.unwritten += memoryview(data)[start:end]
            return
        self._text_bytes += end - start
        if len(self._text) + end - start > FIELD_BYTES or self._text_bytes > FIELDS_BYTES:
            limits = f"at most {FIELD_BYTES // 1024} KiB a field, and {FIELDS_BYTES // 1024} in all"
            raise ApiError(400, f"field {self._name[:40]!r} is too long: {limits}", self._name[:40])
        self._text += memoryview(data)[start:end]

    def _part_end(self) -> None:
        if self._text is None:
            return
        try:
            self.fields.append((self._name, self._text.decode("utf-8")))
        except UnicodeDecodeError as error:
            text = f"field {self._name[:40]!r} is not UTF-8 (byte {error.start}); send UTF-8"
            raise ApiError(400, text, self._name[:40]) from None

    def _end(self) -> None:
        self.ended = True
