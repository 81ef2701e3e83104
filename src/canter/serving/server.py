"""Run the service on a socket: uvicorn, with time limits for slow clients."""

import asyncio
import contextlib
import ipaddress
import math
import signal
import socket
from collections.abc import Sequence
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from canter.errors import ConfigError

ANY_ADDRESS = "*.*.*.*"
RECEIVED_BYTES = 2**14  # read from a socket at once, before the event loop serves other clients
MOST_SHREDS = 1000  # chunks of a body (chunked transfer encoding); beyond, they must have SHRED_BYTES on average
SHRED_BYTES = 64
HEADER_BYTES = 2**16  # maximum size of a request's header


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_address(name: str) -> bool:
    """Return whether a host is an IP address; one of version 6 may be in brackets."""
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True


def host_names(host: str, others: Sequence[str]) -> frozenset[str] | None:
    """Return the names under which a service that listens on ``host`` may be addressed; None if ``others`` has ``*``.

    They are ``others``, the loopback's names, the address itself and, if it is not a loopback, this machine's name. A
    service that listens on every address has `ANY_ADDRESS` among them.
    """
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
    """Return a listening socket; port 0 is any free one. Raise ConfigError if the address or port is not available."""
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
            text = f"cannot listen on {host}, port {port} ({reason}); choose another --host or --port"
            raise ConfigError(text) from None
        undo.pop_all()
    return bound


class _Unshredded(h11.Connection):
    """Connection that refuses bodies in tiny chunks: a chunk of a byte costs the event loop as much as 16 KiB."""

    _chunks = _bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._chunks += 1
            self._bytes += len(event.data)
            tiny = self._chunks > MOST_SHREDS and self._bytes < SHRED_BYTES * self._chunks
            if tiny and self.our_state is h11.SEND_RESPONSE:  # later no answer is possible, and reading ends soon
                raise h11.RemoteProtocolError("the body comes in too small chunks")
        elif isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        return event


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol with a limit in seconds on receiving a header and on an unread answer.

    The time of a header runs from the connection, or from its first byte; at its end the connection is closed.
    """

    class TimedProtocol(H11Protocol):
        _header: asyncio.TimerHandle | None = None
        _answer: asyncio.TimerHandle | None = None

        def __init__(
            self,
            config: uvicorn.Config,
            server_state: ServerState,
            app_state: dict[str, object],
            _loop: asyncio.AbstractEventLoop | None = None,
        ):
            super().__init__(config, server_state, app_state, _loop)
            self.conn = _Unshredded(h11.SERVER, config.h11_max_incomplete_event_size or HEADER_BYTES)

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            transport.max_size = RECEIVED_BYTES  # pyright: ignore[reportAttributeAccessIssue]  # read by asyncio's own
            self._time_header()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._time_header()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._answer = _cancelled(self._answer)
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._header, self._answer = _cancelled(self._header), _cancelled(self._answer)
            super().connection_lost(exc)

        @property
        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _time_header(self) -> None:
            if self._answering:
                self._header = _cancelled(self._header)
            elif self._header is None:
                self._header = self.loop.call_later(seconds, self._close)

        def _close(self) -> None:
            self._header = None
            if not self.transport.is_closing() and not self._answering:
                self.transport.close()

    return TimedProtocol


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class _Server(uvicorn.Server):
    """Server that ends at once on a signal that arrives before it serves: warming up may take long."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)


def make_server(app: FastAPI, upload_timeout: float, drain_seconds: float = 10.0) -> uvicorn.Server:
    """Return a server for ``app``; its ``run(sockets=[...])`` serves until a signal ends it.

    Open requests are answered within ``drain_seconds`` of the signal; a second signal closes their connections.
    """
    config = uvicorn.Config(
        app,
        http=timed_protocol(upload_timeout),
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=math.ceil(drain_seconds),
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return _Server(config)
