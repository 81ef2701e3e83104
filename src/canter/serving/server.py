"""The service on a socket: uvicorn, with clients that hang at the door shown out."""

import asyncio
import contextlib
import ipaddress
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from canter.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol, which closes a connection whose next request's header does not arrive within so
    many seconds of its first byte, or of the connection."""

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
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
        h11_max_incomplete_event_size=64 * 1024,
    )
    return uvicorn.Server(config)
