"""Bad audio, bad clients, too many clients, and an engine that fails: refused in time, without harm to others."""

import asyncio
import errno
import io
import json
import socket
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import soundfile
from uvicorn.protocols.http.h11_impl import H11Protocol

from canter.corpus.audio import audio_blocks
from canter.inference.engine.engine import Engine
from canter.serving import app, audio, service, upload
from canter.serving.config import ServiceConfig
from canter.serving.model import ModelSource
from canter.serving.protocol import ApiError, AudioRequest
from canter.serving.server import ANY_ADDRESS, MOST_SHREDS, RECEIVED_BYTES, SHRED_BYTES, host_names
from canter.serving.service import Service

from .conftest import BOUNDARY, PATIENCE, Running, came_about, connection, form, head, held, noise, running, wav


def post(live: Running, body: bytes, **headers: str) -> tuple[int, Any]:
    """Return status and JSON of a transcription."""
    kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    request = Request(f"{live.url}/v1/audio/transcriptions", body, {**kind, **headers})
    try:
        with urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]


def ask(live: Running, file: bytes, name: str = "a.wav", **fields: str) -> tuple[int, Any]:
    return post(live, form(file, name, **fields))


def broken(kind: str) -> bytes:
    good = wav(noise(1.0))
    not_finite = noise(1.0)
    not_finite[100] = np.nan
    return {
        "not audio": b"\x89PNG\r\n\x1a\n" + bytes(1000),
        "no bytes": b"",
        "header only": wav(np.zeros(0, np.float32)),
        "truncated": good[: len(good) // 2],
        "not finite": wav(not_finite, subtype="FLOAT"),
        "too long": wav(np.zeros(16000 * 400, np.float32)),
        "too long for its size": flac(400),
        "absurd rate": good[:24] + (1).to_bytes(4, "little") + good[28:],
        "a megahertz": wav(noise(1.0), 1_000_000),
        "many channels": wav(np.zeros((100, 64), np.float32)),
        "too much in its seconds": dense_flac(200),
    }[kind]


def flac(seconds: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16000 * seconds, np.float32), 16000, format="FLAC")
    return file.getvalue()


def dense_flac(seconds: int) -> bytes:
    """Return a short file whose header claims the given seconds of eight channels at FLAC's highest rate."""
    promise = 655_350 << 44 | 7 << 41 | 15 << 36 | 655_350 * seconds
    return (short := flac(1))[:18] + promise.to_bytes(8, "big") + short[26:]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not audio", "song.wav is not audio"),
        ("no bytes", "song.wav is empty"),
        ("header only", "holds no sample"),
        ("not finite", "sample 100 is not a finite number"),
        ("too long", "400 s long, over the limit of 300 s"),
        ("too long for its size", "400 s long"),
        ("absurd rate", "1 channels at 1 Hz, which no recording has"),
        ("a megahertz", "1 channels at 1,000,000 Hz, which no recording has (at most 32 channels"),
        ("many channels", "64 channels at 16,000 Hz"),
        ("too much in its seconds", "200 s of 5,242,800 samples a second"),
    ],
)
def test_bad_audio_is_named(live, kind, message):
    status, error = ask(live, broken(kind), "song.wav")
    assert (status, error["param"], error["type"]) == (400, "file", "invalid_request_error")
    assert message in error["message"]
    assert "/tmp" not in error["message"]
    assert "row" not in error["message"]
    assert live.quiet()


def test_what_is_left_of_damaged_audio_is_transcribed(live):
    status, answer = ask(live, broken("truncated"), response_format="verbose_json")
    assert (status, answer["duration"]) == (200, 0.499)
    assert answer["warnings"] == ["0.50 s of its audio are lost, from 0.50 s on: it is truncated"]


def test_unusual_audio_is_taken(live):
    mono = noise(1.0)
    for samples, rate in [(np.stack([mono, mono], 1), 16000), (mono, 8000), (mono, 96000), (mono[:1], 16000)]:
        assert ask(live, wav(samples, rate))[0] == 200
    lied = ask(live, wav(mono), "speech.mp3")
    assert lied == ask(live, wav(mono), "speech.wav")


class Gate:
    """Stand-in for ``audio_blocks`` that yields each block once the service has asked the reader to stop."""

    def __init__(self, service: Service):
        self.service, self.blocks = service, 0
        self.reached = threading.Event()

    def __call__(self, *asked: Any, **options: Any) -> "Gate":
        self.source = audio_blocks(*asked, **options)
        self.warnings = ()
        return self

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self.source:
            self.blocks += 1
            stops = [*self.service._reading]
            self.reached.set()
            for stop in stops:
                stop.wait(PATIENCE)
            yield block


def test_long_uploads_wait_on_disk(model):
    """Memory of a reading does not grow with the length of the audio, and waiting chunks hold no samples."""
    reader = Service([ModelSource(("small",), model)], ServiceConfig())
    peaks: list[int] = []
    for minutes in (2, 10):
        with upload.anonymous_file() as file:
            upload.write_all(file, wav(np.tile(noise(5.0), 12 * minutes)))
            tracemalloc.start()
            try:
                found = reader._read(
                    reader.models.loaded[0], file, "a.wav", AudioRequest("transcribe"), threading.Event()
                )
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
        assert found.seconds == 60 * minutes
        assert len(found.chunks) >= minutes
        assert not any(isinstance(chunk.samples, np.ndarray) for chunk in found.chunks)
        found.close()
    reader.close()
    assert peaks[1] - peaks[0] < 2**23  # where blocks begin makes a difference; eight minutes more have 29 MiB


def test_leaving_ends_the_reading(model, monkeypatch):
    """The thread is free again after one block of nine, not at the end of the file."""
    with running(model, readers=1) as live:
        gate = Gate(live.service)
        monkeypatch.setattr(service, "audio_blocks", gate)
        body = form(flac(250))
        with connection(live) as client:
            client.sendall(head(len(body)) + body)
            assert gate.reached.wait(PATIENCE)
        assert live.quiet()
        monkeypatch.undo()
        assert ask(live, wav(noise(1.0)))[0] == 200
        assert gate.blocks == 1


def test_closing_ends_the_reading(model, monkeypatch, tmp_path):
    """Its files never have a name, so none is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    closing = Service([ModelSource(("small",), model)], ServiceConfig())
    gate = Gate(closing)
    monkeypatch.setattr(service, "audio_blocks", gate)

    async def read_and_close() -> None:
        file = upload.anonymous_file()
        upload.write_all(file, flac(250))
        reading = asyncio.create_task(
            closing.read(closing.models.loaded[0], file, "a.flac", AudioRequest("transcribe"))
        )
        await asyncio.to_thread(gate.reached.wait, PATIENCE)
        assert not [*tmp_path.iterdir()]
        closing.close()
        assert not [*tmp_path.iterdir()]
        with pytest.raises(ApiError, match="shutting down"):
            await reading

    asyncio.run(read_and_close())
    assert gate.blocks == 1


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"{}", "application/json", 415, "application/json"),
        (b"", "multipart/form-data", 400, "boundary"),
        (b"no form at all", f"multipart/form-data; boundary={BOUNDARY}", 400, "form"),
        (form(b"x").replace(b'filename="a.wav"', b""), f"multipart/form-data; boundary={BOUNDARY}", 400, "'file'"),
        (form(b"x", **{f"f{n}": "" for n in range(99)}), f"multipart/form-data; boundary={BOUNDARY}", 400, "64 fields"),
        (form(b"x", prompt="y" * 2**21), f"multipart/form-data; boundary={BOUNDARY}", 400, "too long"),
    ],
)  # fmt: skip
def test_bad_forms(live, body, kind, status, message):
    found, error = post(live, body, **{"Content-Type": kind})
    assert found == status
    assert message in error["message"]
    assert live.quiet()


@pytest.fixture(scope="module")
def strict(model):
    """A service that accepts only small bodies, and waits for them."""
    with running(model, max_megabytes=200_000 / 2**20, upload_timeout=PATIENCE) as found:
        yield found


@pytest.fixture(scope="module")
def hasty(model):
    """A service that waits half a second for a request, for tests that never send a complete one."""
    with running(model, upload_timeout=0.5) as found:
        yield found


def answer_of(client: socket.socket) -> bytes:
    """Return everything that arrives until the server closes."""
    found = b""
    while data := client.recv(1 << 16):
        found += data
    return found


def test_ten_gigabytes_are_refused_unread(strict):
    with connection(strict) as client:
        client.sendall(head(10 * 2**30) + bytes(100_000))
        found = answer_of(client)
    assert found.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in found.lower()
    assert strict.quiet()


def test_a_body_without_length_is_cut_off(strict):
    with connection(strict) as client:
        client.sendall(head(0))
        start = b"".join(form(b"").partition(b"audio/wav\r\n\r\n")[:2])
        client.sendall(b"%x\r\n%b\r\n" % (len(start), start))
        for _ in range(30):
            client.sendall(b"2710\r\n" + bytes(10_000) + b"\r\n")
        assert answer_of(client).startswith(b"HTTP/1.1 413 ")
    assert strict.quiet()


def test_a_body_that_hangs(hasty):
    with connection(hasty) as client:
        client.sendall(head(1000) + b"--")
        found = answer_of(client)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 0.5 s" in found
    assert hasty.quiet()


@pytest.mark.parametrize("start", [b"", b"POST /v1/audio", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_header_that_hangs(hasty, start):
    with connection(hasty) as client:
        client.sendall(start)
        assert answer_of(client) == b""


def test_a_client_that_drips_its_header(hasty):
    """The connection is closed, although another character arrives all the time."""

    def drip() -> bool:
        client.sendall(b"y")
        return False

    with connection(hasty) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            came_about(drip)


def test_a_body_in_shreds_is_refused(live):
    """A chunk of a byte costs the event loop as much as one of 16 KiB: after a thousand, no more are parsed."""
    with connection(live) as client:
        client.sendall(head(0) + b"1\r\n-\r\n" * (MOST_SHREDS + 1))
        assert answer_of(client).startswith(b"HTTP/1.1 400 ")
    assert live.quiet()
    with connection(live) as client:  # but small ones that carry something are taken
        body = form(wav(noise(1.0)))
        parts = [body[start : start + SHRED_BYTES] for start in range(0, len(body), SHRED_BYTES)]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        client.sendall(head(0, "Connection: close\r\n") + chunks + b"0\r\n\r\n")
        assert answer_of(client).startswith(b"HTTP/1.1 200 ")


def test_little_is_taken_at_once(live, monkeypatch):
    """The event loop serves other clients in between, however much one client has sent."""
    sizes: list[int] = []
    received = H11Protocol.data_received
    monkeypatch.setattr(
        H11Protocol, "data_received", lambda self, data: (sizes.append(len(data)), received(self, data))[1]
    )
    assert ask(live, wav(noise(5.0)))[0] == 200
    assert max(sizes) <= RECEIVED_BYTES


def test_a_client_that_reads_nothing_is_cut_off(model):
    """An unread answer that is larger than the sockets' buffers is given up, and the service is idle again."""
    with running(model, upload_timeout=0.3) as live:
        page = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with connection(live) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                came_about(lambda: client.sendall(page * 100))
        assert live.quiet()


@pytest.mark.parametrize("charset", ["punycode", "utf-16"])
def test_charsets_are_refused(live, charset):
    kind = f"multipart/form-data; boundary={BOUNDARY}; charset={charset}"
    status, error = post(live, form(wav(noise(1.0)), prompt="x" * 60_000), **{"Content-Type": kind})
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert "send UTF-8" in error["message"]


def test_a_full_disk_is_507(model, monkeypatch):
    """The disk may be full while the upload arrives, and while its samples are written."""
    with running(model) as live:
        for module in (upload, audio):
            with monkeypatch.context() as full:
                full.setattr(module, "write_all", fail_to_write)
                status, error = ask(live, wav(noise(1.0)))
            assert (status, error["code"], error["type"]) == (507, "insufficient_storage", "server_error")
        assert live.quiet()
        assert ask(live, wav(noise(1.0)))[0] == 200


def fail_to_write(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_only_its_own_names_reach_it(model, bound):
    """A page of another site whose name resolves to this address (DNS rebinding) sends that name."""
    hosts = host_names(bound, ["Speech.example.com"])
    with running(model, hosts=hosts) as live:

        def status(host: str) -> int:
            with connection(live) as client:
                client.sendall(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                return int(answer_of(client)[9:12])

        ours = ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]", "[::1]:8000", "speech.example.com", "localhost."]
        assert {host: status(host) for host in ours} == dict.fromkeys(ours, 200)
        others = [
            "evil.example.com",
            "evil.example.com:8000",
            "localhost.evil.example.com",
            "127.0.0.1.evil.com",
            "",
            "x" * 9000,
        ]
        assert {host: status(host) for host in others} == dict.fromkeys(others, 403)
        assert status("192.168.1.5") == (200 if bound == "0.0.0.0" else 403)
        assert status(socket.gethostname()) == (200 if bound == "0.0.0.0" else 403)
        if bound == "0.0.0.0":
            assert ask(live, wav(noise(1.0)))[0] == 200


def test_names_of_a_service():
    assert host_names("0.0.0.0", ["*"]) is None
    assert host_names("::", []) == host_names("::", ["localhost"])
    assert "[fe80::1]" in (host_names("fe80::1", []) or ())
    assert ANY_ADDRESS not in (host_names("192.168.1.5", []) or ())


def test_keys_may_have_any_letters(model):
    """Clients send keys in UTF-8 or in Latin-1; any other encoding is a wrong key, not an error."""
    keys = frozenset({"schlüssel", "鍵", "plain"})
    with running(model, keys=keys) as live:

        def status(key: bytes) -> int:
            with connection(live) as client:
                head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                client.sendall(head + b"Authorization: Bearer " + key + b"\r\n\r\n")
                return int(answer_of(client)[9:12])

        good = [b"plain", "schlüssel".encode(), "schlüssel".encode("latin-1"), "鍵".encode()]
        assert [status(key) for key in good] == [200] * len(good)
        bad = [b"", b"schl\xffssel", "鍵".encode("utf-16-le"), b"plai", b"plain1", b"\xff" * 1000]
        assert [status(key) for key in bad] == [401] * len(bad)


def test_leaving_during_the_upload(strict):
    with connection(strict) as client:
        client.sendall(head(100_000) + b"--")
    assert strict.quiet()
    assert ask(strict, wav(noise(1.0)))[0] == 200


def test_leaving_takes_the_row_out_of_the_engine(endless):
    """When a client disconnects, its rows and waiting chunks go; the rows of others are decoded as before."""
    with running(endless, rows=2) as live, ThreadPoolExecutor(1) as pool:
        _, alone = ask(live, wav(noise(3.0)))
        steps = live.model.engine.counters.steps
        assert steps >= 40
        gone = [connection(live) for _ in range(4)]
        with held(live.model.engine, after=20):
            for number, client in enumerate(gone):
                body = form(wav(noise(30.0, number)))
                client.sendall(head(len(body)) + body)
            scheduler = live.model.scheduler
            assert came_about(lambda: scheduler.inside + scheduler.waiting == 4)
            other = pool.submit(ask, live, wav(noise(3.0)))
            assert came_about(lambda: live.service.requests == 5)
            for client in gone:
                client.close()
            assert came_about(lambda: live.service.requests == 1)
        assert other.result(PATIENCE) == (200, alone)
        assert live.quiet()
        counters = live.model.engine.counters
        assert counters.steps - steps < 400, "the rows of those who left were decoded to their end"
        text = urlopen(f"{live.url}/metrics").read().decode()
        assert 'canter_cancelled_total{model="small"} 4.0' in text


def test_leaving_a_stream(endless):
    with running(endless) as live, held(live.model.engine):
        body = form(wav(noise(30.0)), stream="true")
        with connection(live) as client:
            client.sendall(head(len(body)) + body)
            assert came_about(lambda: live.model.scheduler.inside == 1)
        assert live.quiet()


def test_a_full_service_says_so(endless):
    with running(endless, max_requests=2) as live:
        body = form(wav(noise(30.0)))
        with connection(live) as first, connection(live) as second, held(live.model.engine):
            for client in (first, second):
                client.sendall(head(len(body)) + body)
            assert came_about(lambda: live.service.requests == 2)
            status, error = ask(live, wav(noise(1.0)))
            assert (status, error["code"], error["type"]) == (503, "overloaded", "server_error")
        assert live.quiet()
        assert ask(live, wav(noise(1.0)))[0] == 200


def test_audio_inside_is_limited(endless):
    with running(endless, max_minutes=40 / 60) as live, ThreadPoolExecutor(1) as pool:
        body = form(wav(noise(30.0)))
        with connection(live) as client, held(live.model.engine) as go_on:
            client.sendall(head(len(body)) + body)
            assert came_about(lambda: live.model.scheduler.inside == 1)
            assert ask(live, wav(noise(20.0)))[0] == 503
            status, error = ask(live, wav(noise(20.0)), stream="true")
            assert (status, error["code"]) == (503, "overloaded")
            beside = pool.submit(ask, live, wav(noise(1.0)))
            assert came_about(lambda: live.service.seconds == 31.0)
            go_on()
            assert beside.result(PATIENCE)[0] == 200


@pytest.mark.parametrize("stream", ["true", "false"])
def test_time_that_is_over(endless, stream, monkeypatch):
    """The clock stands still until the audio has been read, and the engine never answers."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, perf_counter=time.perf_counter)
    monkeypatch.setattr(app, "time", clock)
    with running(endless, timeout=PATIENCE) as live, held(live.model.engine):
        read = live.service.read

        async def read_until_late(*upload: Any) -> Any:
            found = await read(*upload)
            clock.now = PATIENCE - 0.1
            return found

        live.service.read = read_until_late
        body = form(wav(noise(39.0)), stream=stream)
        with connection(live) as client:
            client.sendall(head(len(body), "Connection: close\r\n") + body)
            found = answer_of(client)
        assert b"not finished in time" in found
        assert found.startswith(b"HTTP/1.1 200 " if stream == "true" else b"HTTP/1.1 504 ")
        assert live.quiet()


class Failing(Engine):
    """Engine that fails on audio whose first sample is 0.5."""

    def _encode(self, batch, **options):
        if any(abs(item.audio[0] - 0.5) < 1e-3 for item in batch):
            raise RuntimeError("no memory is left")
        time.sleep(0.05)  # so that others wait, and share the next batch
        return super()._encode(batch, **options)


def test_an_engine_that_fails_on_one_request_serves_the_others(model):
    """Requests that shared a batch with the audio on which the engine fails are decoded all the same."""
    poison = noise(1.0, 9)
    poison[0] = 0.5
    with running(model) as live:
        clips = [noise(1.0, seed) for seed in range(8)]
        expected = [ask(live, wav(samples)) for samples in clips]
        live.model.engine.__class__ = Failing
        with ThreadPoolExecutor(9) as pool:
            bad = pool.submit(ask, live, wav(poison))
            good = list(pool.map(lambda samples: ask(live, wav(samples)), clips))
        assert good == expected
        status, error = bad.result()
        assert (status, error["type"]) == (500, "server_error")
        assert "no memory is left" in error["message"]
        assert live.model.scheduler.alive
        assert live.quiet()


def test_shutting_down_answers_who_waits(endless):
    answers: list[Any] = []
    with running(endless) as live:
        asking = threading.Thread(target=lambda: answers.append(ask(live, wav(noise(3.0)))))
        asking.start()
        assert came_about(lambda: live.model.scheduler.inside > 0 or bool(answers))
    asking.join()
    assert answers[0][0] == 200
