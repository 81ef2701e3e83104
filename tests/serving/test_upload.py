"""Multipart forms: accepted fields, and refusals before any expensive work."""

import asyncio
import codecs
import errno
import os
import tempfile
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from canter.serving import upload
from canter.serving.config import ServiceConfig
from canter.serving.protocol import ApiError
from canter.serving.upload import FIELD_BYTES, MOST_FIELDS, anonymous_file, path_of, read_form

KIND = "multipart/form-data; boundary=xb"


def part(name: str, value: bytes, extra: str = "", kind: str = "") -> bytes:
    head = f'--xb\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n'
    head += f"Content-Type: {kind}\r\n" if kind else ""
    return head.encode() + b"\r\n" + value + b"\r\n"


def file_part(value: bytes, name: str = "file", kind: str = "audio/wav") -> bytes:
    return part(name, value, '; filename="a.wav"', kind)


END = b"--xb--\r\n"


def read(chunks: Iterable[Any], kind: str = KIND, config: ServiceConfig | None = None, **headers: str) -> FormData:
    """Return the form of a body in these chunks; at None the client disconnects, at ... it hangs."""
    left = iter(chunks)

    async def receive() -> dict[str, Any]:
        chunk = next(left, b"")
        if chunk is None:
            return {"type": "http.disconnect"}
        if chunk is ...:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": chunk, "more_body": bool(chunk)}

    given = {"content-type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    return asyncio.run(
        read_form(Request({"type": "http", "method": "POST", "headers": raw}, receive), config or ServiceConfig())
    )


def refused(*chunks: Any, **options: Any) -> tuple[int, str]:
    with pytest.raises(ApiError) as found:
        read(chunks, **options)
    return found.value.status, str(found.value)


def contents(form: FormData) -> tuple[list[tuple[str, str]], bytes]:
    """Return the text fields and the content of the file."""
    file = form["file"]
    assert isinstance(file, UploadFile)
    with file.file:
        with open(path_of(file.file), "rb") as again:  # as the decoder reads it
            data = again.read()
        assert data == file.file.read()
    return [(name, value) for name, value in form.multi_items() if isinstance(value, str)], data


@settings(max_examples=25, deadline=None)
@given(
    st.binary(max_size=300) | st.sampled_from([b"\r\n--x", b"\r\n--xb-", b"\r" * 40, b"--xb"]),
    st.lists(st.text(max_size=20), max_size=5),
    st.integers(1, 400),
)
def test_what_was_sent_is_read(data, texts, size):
    """The result does not depend on how the body is split into chunks."""
    if b"\r\n--xb" in b"\r\n" + data:
        data = data.replace(b"--xb", b"--xc")
    body = b"".join(part("prompt", text.encode()) for text in texts) + file_part(data) + END
    form = read(body[start : start + size] for start in range(0, len(body), size))
    assert contents(form) == ([("prompt", text) for text in texts], data)


PIECES = [
    *(
        b"--xb",
        b"--xb--",
        b"\r\n",
        b"\n",
        b"\r",
        b":",
        b";",
        b'"',
        b"=",
        b"\\",
        b"%00",
        b"\xff",
        b"name=",
        b'"file"',
        b"*",
    ),
    b'Content-Disposition: form-data; name="file"; filename="a"',
    b'Content-Disposition: form-data; name="prompt"',
    b"Content-Type: text/plain; charset=",
    *(b"utf-7", b"filename*=utf-16''", b"Content-Transfer-Encoding: base64", b"x" * 5000),
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=8), max_size=25), st.booleans(), st.integers(1, 6000))
def test_whatever_comes_is_a_form_or_refused(pieces, begun, size):
    body = (b"--xb\r\n" if begun else b"") + b"".join(pieces)
    error = None
    try:
        form = read(body[start : start + size] for start in range(0, len(body), size))
    except ApiError as found:
        error = found
    else:
        asyncio.run(form.close())
    assert error is None or (error.status == 400 and len(str(error)) < 400)


def test_large_files_go_to_disk_in_order(monkeypatch):
    monkeypatch.setattr(upload, "WRITE_BYTES", 1000)
    data = os.urandom(40_000)
    body = file_part(data) + part("language", b"en") + END
    fields, found = contents(read([body[at : at + 777] for at in range(0, len(body), 777)]))
    assert found == data
    assert fields == [("language", "en")]


def test_the_last_line_may_have_no_end():
    assert contents(read([file_part(b"x") + b"--xb--"]))[1] == b"x"


class Counting(codecs.Codec):
    """A codec that must not be used."""

    used = 0

    def decode(self, data: bytes, errors: str = "strict") -> tuple[str, int]:
        Counting.used += 1
        return "", len(data)

    encode = decode  # type: ignore[assignment]


@pytest.fixture
def codec():
    info = codecs.CodecInfo(Counting().encode, Counting().decode, name="canter-slow")  # type: ignore[arg-type]

    def find(name: str) -> codecs.CodecInfo | None:
        return info if name in ("canter_slow", "canter-slow") else None

    codecs.register(find)
    yield "canter-slow"
    codecs.unregister(find)


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-16", "rot13", "zip", "no-such", "canter-slow"])
def test_text_is_utf_8_only(codec, charset):
    """Any other charset is refused by its name, before anything is decoded."""
    long = b"a" * 60_000
    body = part("prompt", long) + file_part(b"x") + END
    assert refused(body, kind=f"{KIND}; charset={charset}") == (400, f"the form is in charset {charset!r}; send UTF-8")
    body = part("prompt", long, kind=f"text/plain; charset={charset}") + file_part(b"x") + END
    assert refused(body) == (400, f"field 'prompt' is in charset {charset!r}; send UTF-8")
    assert Counting.used == 0


def test_utf_8_may_be_named():
    body = part("prompt", "größer".encode(), kind='text/plain; charset="UTF-8"') + file_part(b"x") + END
    assert contents(read([body], kind=f"{KIND}; charset=utf-8"))[0] == [("prompt", "größer")]
    assert contents(read([file_part(b"x", kind="audio/wav; charset=binary") + END]))[1] == b"x"
    assert refused(part("prompt", b"gr\xf6") + END) == (400, "field 'prompt' is not UTF-8 (byte 2); send UTF-8")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([part("timestamp_granularities[]", b"word")] * 100_000, f"more than {MOST_FIELDS} fields"),
        ([part("prompt", b"a" * (FIELD_BYTES + 1))], "'prompt' is too long"),
        ([part(f"f{n}", b"a" * FIELD_BYTES) for n in range(5)], "'f4' is too long"),
        ([b"--xb\r\nX: " + b"a" * 60_000] * 1000, "header"),
        ([b"--xb\r\n" + b"X: a\r\n" * 10_000] * 1000, "header"),
        ([part("a", b"", ";x=1" * 20_000)], "header"),
        ([part("a" * 50_000, b"")], "header"),
        ([b"--xb\r\nContent-Disposition: form-data\r\n\r\nx\r\n"], "names no field"),
        ([file_part(b"x"), file_part(b"y")], "more than one file"),
        ([file_part(b"x" * 100)], "ends before its last boundary"),
        ([b"no form"], "cannot be read"),
    ],
)
def test_what_costs_much_is_refused_early(body, message):
    """The body is refused after a few chunks, and its remainder is not read."""
    taken = 0

    def chunks() -> Iterable[bytes]:
        nonlocal taken
        for chunk in body:
            taken += 1
            yield chunk

    with pytest.raises(ApiError, match=message) as found:
        read(chunks())
    assert found.value.status == 400
    assert taken <= MOST_FIELDS + 1


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        ("multipart/form-data; boundary=" + "x" * 71, 400),
        ("multipart/form-data" + ";a=1" * 15_000 + "; boundary=xb", 400),
        ("application/json" + "x" * 60_000, 415),
    ],
)
def test_the_content_type_is_bounded(kind, status):
    found, message = refused(END, kind=kind)
    assert found == status
    assert len(message) < 200


@pytest.fixture
def opened(monkeypatch):
    """Record the files that reading forms opens."""
    found: list[Any] = []

    def recorded() -> Any:
        found.append(anonymous_file())
        return found[-1]

    monkeypatch.setattr(upload, "anonymous_file", recorded)
    return found


def test_whatever_goes_wrong_the_file_is_closed(opened):
    begun = file_part(b"x" * 100)[:-2]
    hasty = ServiceConfig(upload_timeout=0.01)
    for chunks, options, status in [
        ((begun, None), {}, 499),
        ((begun, b"\r\n--xb\r\nno header\r\n\r\n"), {}, 400),
        ((begun, b"x" * 2000), {"config": ServiceConfig(max_megabytes=1000 / 2**20)}, 413),
        ((begun,), {"content_length": "1001", "config": ServiceConfig(max_megabytes=1000 / 2**20)}, 413),
        ((begun,), {"content_length": "9" * 5000}, 413),
        ((begun, ...), {"config": hasty}, 408),
        ((file_part(b"x"), part("prompt", b"\xff"), END), {}, 400),
    ]:
        assert refused(*chunks, **options)[0] == status
    assert opened
    assert all(file.closed for file in opened)


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (errno.ENOSPC, 507, "no space left"),
        (errno.EDQUOT, 507, "no space left"),
        (errno.EMFILE, 503, "too many files open"),
    ],
)
def test_a_full_disk_says_so(opened, monkeypatch, number, status, message):
    def write(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(upload, "write_all", write)
    found, said = refused(file_part(b"x"), END)
    assert found == status
    assert message in said
    assert all(file.closed for file in opened)


def test_a_disk_that_is_really_full(monkeypatch):
    """The device /dev/full stands for a full disk."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(upload, "anonymous_file", lambda: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    assert refused(file_part(b"x" * 5000), END)[0] == 507


def test_files_have_no_name(monkeypatch, tmp_path):
    """The file has no name, so none is left when the process is killed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    form = read([file_part(b"x" * 5000) + END])
    assert not [*tmp_path.iterdir()]
    assert contents(form)[1] == b"x" * 5000
