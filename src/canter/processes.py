"""Processes that end with the one that started them, however that ends: nobody would stop them afterwards."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.process import BaseProcess

LOOK_SECONDS = 0.2  # between looks at who the parent is


def end_with_parent() -> None:
    """Have this process, started by multiprocessing, end at once when its parent ends, by SIGKILL too.

    A worker of a pool would wait for its next task for ever: each worker holds the other end of the queue.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def ignore_signals(*numbers: int) -> None:
    """Leave these signals to the parent: Ctrl-C and a batch system's SIGTERM reach all processes of a job."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def start_pool_worker() -> None:
    """Initialise a worker of a process pool: Ctrl-C is the parent's to handle, and the worker ends with it."""
    ignore_signals(signal.SIGINT)
    end_with_parent()


def end_with_launcher(message: str) -> None:
    """Have this process, whatever it waits for, print ``message`` and end once its parent process is another one."""
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
