"""URLs from a real server: errors are reported by their cause, without passwords and signatures."""

import http.server
import io
import json
import socket
import sys
import threading
from collections.abc import Iterator

import pytest
import soundfile

pytest.importorskip("aiohttp", reason="fsspec reads HTTP with it")

from canter.cli.main import main
from canter.corpus import remote
from canter.corpus.audio import load_audio
from canter.corpus.manifest import utterance_from_row
from canter.errors import AudioError, ConfigError
from canter.extras import MissingExtraError

SECRET = "s3cr3t"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /STATUS/... with that status, and a clip where it is 200."""

    def do_GET(self) -> None:
        status = int(self.path.split("/")[1])
        file = io.BytesIO()
        soundfile.write(file, [0.1, 0.2, 0.3] * 1000, 16000, format="WAV")
        body = file.getvalue() if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def closed() -> str:
    """An address without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"127.0.0.1:{found.getsockname()[1]}"


READ = [remote.size_of, remote.stamp, remote.read_bytes, lambda url: remote.open_binary(url).read(1)]


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (403, "the server answers 403 Forbidden; check its credentials"),
        (401, "the server answers 401 Unauthorized; check its credentials"),
        (500, "the server answers 500 Internal Server Error"),
    ],
)
def test_server_errors_are_reported(server, read, status, reason):
    with pytest.raises(OSError, match=reason) as found:
        read(f"http://u:{SECRET}@{server}/{status}/a.wav?sig={SECRET}")
    assert not isinstance(found.value, FileNotFoundError)
    assert SECRET not in str(found.value)


@pytest.mark.parametrize("read", READ)
def test_only_what_is_missing_does_not_exist(server, closed, read):
    with pytest.raises(FileNotFoundError):
        read(f"http://{server}/404/a.wav")
    with pytest.raises(FileNotFoundError):
        read("memory://absent.wav")
    with pytest.raises(OSError, match=f"{closed} refuses the connection") as found:
        read(f"http://u:{SECRET}@{closed}/a.wav?token={SECRET}")
    assert not isinstance(found.value, FileNotFoundError)


def test_a_name_that_cannot_be_resolved(monkeypatch):
    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(OSError, match=r"the name absent\.invalid cannot be resolved"):
        remote.size_of("http://absent.invalid/a.wav")


def test_audio_errors_name_the_url_without_its_secrets(server, closed):
    assert len(load_audio(f"http://u:{SECRET}@{server}/200/a.wav?sig={SECRET}")) == 3000
    for url, reason in [
        (f"http://u:{SECRET}@{server}/403/a.wav?sig={SECRET}", "cannot be read: the server answers 403 Forbidden"),
        (f"http://u:{SECRET}@{closed}/a.wav?sig={SECRET}", "refuses the connection"),
        (f"http://u:{SECRET}@{server}/404/a.wav?sig={SECRET}", "does not exist"),
    ]:
        with pytest.raises(AudioError, match=reason) as found:
            load_audio(url)
        assert SECRET not in str(found.value)
        assert "a.wav" in str(found.value)


def test_s3_without_its_extra_is_one_line(monkeypatch):
    from fsspec.registry import _registry  # of the file systems that are imported already

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(MissingExtraError, match=r"s3://bucket/a\.wav needs s3fs.*: pip install 'canter\[s3\]'"):
        remote.size_of("s3://bucket/a.wav")


class Breaking(io.BytesIO):
    def read(self, *_: object) -> bytes:
        raise KeyError("a reader's own kind of error")


def test_an_error_in_the_middle_is_one_of_reading():
    file = io.BufferedReader(remote._RemoteFile("memory://x", Breaking()))
    with file, pytest.raises(OSError, match="KeyError"):
        file.readline()


def test_a_manifest_with_a_signed_url_has_a_folder():
    assert remote.folder_of(f"https://host/data/m.jsonl?sig=a/b/{SECRET}") == "https://host/data"


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_urls_can_be_forbidden(monkeypatch, server, value):
    monkeypatch.setenv(remote.NO_URLS, value)
    for read in READ:
        with pytest.raises(ConfigError, match="URLs are forbidden"):
            read(f"http://u:{SECRET}@{server}/200/a.wav")
    with pytest.raises(AudioError, match="URLs are forbidden"):
        load_audio(f"http://{server}/200/a.wav")
    row = {"audio_filepath": f"http://{server}/200/a.wav", "duration": 1.0, "text": "a"}
    assert "URLs are forbidden" in str(utterance_from_row(row, ""))


@pytest.mark.parametrize("value", ["", "0", "false", "No"])
def test_and_allowed_again(monkeypatch, value):
    monkeypatch.setenv(remote.NO_URLS, value)
    assert not remote.urls_forbidden()


def test_the_option_holds_for_one_command(tmp_path, server, capsys, monkeypatch):
    """The row is left out and named; a later command takes it."""
    monkeypatch.delenv(remote.NO_URLS, raising=False)
    row = {"audio_filepath": f"http://u:{SECRET}@{server}/200/a.wav", "duration": 0.2, "text": "one", "num_tokens": 3}
    rows = [row, row | {"audio_filepath": "/data/b.wav"}]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(one) + "\n" for one in rows))
    command = ["index", str(manifest), "--output", str(tmp_path / "lengths.arrow")]
    assert main(["--no-urls", *command]) == 0
    said = "".join(capsys.readouterr())
    assert "URLs are forbidden" in said
    assert SECRET not in said
    assert main([*command]) == 0
    assert "forbidden" not in "".join(capsys.readouterr())
