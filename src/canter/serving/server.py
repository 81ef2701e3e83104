"""The service on a socket: uvicorn, with clients that hang at the door shown out."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Sequence
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from canter.errors import ConfigError

ANY_ADDRESS = "*.*.*.*"
RECEIVED_BYTES = 2**14  # taken from a socket at once: what the event loop does before it looks at other clients
MOST_SHREDS = 1000  # chunks of a body (chunked transfer encoding) from which on they must be SHRED_BYTES on average
SHRED_BYTES = 64
HEADER_BYTES = 2**16  # of a request


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_address(name: str) -> bool:
    """Return whether a host is an IP address, of version 6 in brackets."""
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True


def host_names(host: str, others: Sequence[str]) -> frozenset[str] | None:
    """Return what a service that listens on ``host`` may be addressed by: this machine's name, the loopback's, the
    address it listens on (on every address: any address) and ``others``; None, anything, where ``*`` is among these."""
    if "*" in others:
        return None
    shown = f"[{host}]" if ":" in host else host
    names = {shown, "localhost", "127.0.0.1", "[::1]", *others}
    if not is_loopback(host):
        names |= {socket.gethostname(), f"{socket.gethostname()}.local"}
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            names.add(ANY_ADDRESS)
    return frozenset(name.lower().removesuffix(".") for name in names)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises ConfigError naming what is taken or not ours."""
    if not 0 <= port < 2**16:  # the C library would take its last 16 bits
        raise ConfigError(f"{port} is not a port (0 to 65535); choose another --host or --port")
    with contextlib.ExitStack() as undo:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(1024)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot listen on {host}, port {port} ({reason}); choose another --host or --port"
            ) from None
        undo.pop_all()
    return bound


class _Unshredded(h11.Connection):
    """Refuses bodies in very small chunks: a chunk of a byte takes the event loop as long as one of 16 KiB."""

    _chunks = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._chunks += 1
            self._bytes += len(event.data)
            tiny = self._chunks > MOST_SHREDS and self._bytes < SHRED_BYTES * self._chunks
            if tiny and self.our_state is h11.SEND_RESPONSE:  # later nothing can be answered, nor is it read for long
                raise h11.RemoteProtocolError("the body comes in too small chunks")
        elif isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        return event


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol, which closes a connection whose next request's header does not arrive within so
    many seconds of its first byte, or of the connection, and one whose client reads nothing of an answer for as
    long."""

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def __init__(self, config: uvicorn.Config, *arguments: Any, **options: Any):
            super().__init__(config, *arguments, **options)
            self.conn = _Unshredded(h11.SERVER, config.h11_max_incomplete_event_size or HEADER_BYTES)

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.max_size = RECEIVED_BYTES  # of asyncio's own transports; others keep theirs
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._read_on()
            super().resume_writing()

        def _read_on(self) -> None:
            if self._unread:
                self._unread.cancel()
                self._unread = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            self._read_on()
            super().connection_lost(exc)

        def _stop(self) -> None:
            if self._timer:
                self._timer.cancel()
                self._timer = None

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self._timer is None:
                self._timer = self.loop.call_later(seconds, self._close)

        def _close(self) -> None:
            self._timer = None
            if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
                self.transport.close()

    return TimedProtocol


class _Server(uvicorn.Server):
    """Server that ends at once on a signal before it serves: loading a model's kernels may take long."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        if not self.started:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)


def make_server(app: FastAPI, upload_timeout: float) -> uvicorn.Server:
    """A server for ``app``; ``server.run(sockets=[...])`` serves until it is told to stop."""
    config = uvicorn.Config(
        app,
        http=timed_protocol(upload_timeout),
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return _Server(config)
