"""Being asked to stop."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AT_ONCE = 1.0  # seconds within which signals are one: 'timeout', 'uv run' and batch systems pass them twice


@contextmanager
def finish_step_on_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event, so that the step in hand can finish; one that comes later stops at once."""
    stopping = threading.Event()
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        if not stopping.is_set():
            first = time.monotonic()
            stopping.set()
        elif time.monotonic() - first > AT_ONCE:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
