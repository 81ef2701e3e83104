"""Child processes that end when their parent ends, even by SIGKILL."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.process import BaseProcess

LOOK_SECONDS = 0.2  # between checks of the parent process


def end_with_parent() -> None:
    """End this process, started by multiprocessing, at once when its parent ends, even by SIGKILL.

    Without this a worker of a pool would wait for its next task forever, because each worker holds both ends of the
    queue.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def ignore_signals(*numbers: int) -> None:
    """Ignore these signals, which the parent handles: Ctrl-C and a batch system's SIGTERM reach every process."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def start_pool_worker() -> None:
    """Initialise a worker of a process pool: the parent handles Ctrl-C, and the worker ends with the parent."""
    ignore_signals(signal.SIGINT)
    end_with_parent()


def end_with_launcher(message: str) -> None:
    """Print ``message`` and end this process, even if it is blocked, once its parent process has ended."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LOOK_SECONDS)
        print(f"canter: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
