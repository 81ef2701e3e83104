"""Processes and files of tests in several folders."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def gone(group: int) -> bool:
    """Return whether all processes of the group have ended."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """A process that opens the file waits until the block ends, because its lease is not given up."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with open(path, "rb+") as file:
            try:
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            except OSError as error:
                pytest.skip(f"no leases on this file system: {error}")
            yield
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    finally:
        signal.signal(signal.SIGIO, before)
