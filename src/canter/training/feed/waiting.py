"""Waiting for data: what is said meanwhile, when a run gives up, and the open files that data workers need."""

import multiprocessing
import os
import queue
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from canter.errors import CanterError, ConfigError

NOTICE_SECONDS = 30.0  # of waiting, after each of which what is waited for is printed
STOP_SECONDS = 10.0  # that a run which was asked to stop waits for the data of the step in hand
POLL_SECONDS = 0.5  # between looks at the clock and at signals
CLOSE_SECONDS = 5.0  # that data workers have to end by themselves
ASK_SECONDS = 2.0  # to find out the name of a file that is waited for
PREFETCH = 8  # micro-batches that a worker loads ahead
TENSORS = 8  # of a micro-batch, each of which a worker hands over as an open file
OWN_FILES = 64  # that a process has open beside those, with room to spare
T = TypeVar("T")


class StoppedWaitingError(Exception):
    """The run was asked to stop, and the data of the step in hand did not come in time."""


@dataclass(frozen=True)
class Patience:
    """Wait for a run's data with messages, a limit, and an ear for signals."""

    limit: float = 300.0
    """Seconds of waiting after which the run ends."""
    stopping: Callable[[], bool] = lambda: False
    """Return whether the run was asked to stop."""
    say: Callable[[str], None] = lambda _: None


class _Done:
    """The iterator has no more."""


class Puller(Generic[T]):
    """Takes values from an iterator in a thread of its own, so that whoever waits for one can give up.

    ``children`` are the processes behind the iterator, killed where they do not end by themselves. ``being_read`` says
    what they are reading; it is called in a further thread, as it may wait for the same storage.
    """

    def __init__(self, values: Iterator[T], children: list[BaseProcess], being_read: Callable[[], str] = lambda: ""):
        self.children, self.being_read = children, being_read
        self.asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.given: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.hangs = False
        self.thread = threading.Thread(target=_pull, args=([values], self.asked, self.given), daemon=True)
        self.thread.start()

    def next(self, patience: Patience) -> T:
        """Return the next value.

        Raises StopIteration at the end, CanterError once the wait is over ``patience.limit``, StoppedWaitingError some
        seconds after the run was asked to stop, and what the iterator raises.
        """
        self.asked.put(True)
        began = time.monotonic()
        told, stopped = began, 0.0
        while True:
            try:
                value = self.given.get(timeout=POLL_SECONDS)
            except queue.Empty:
                pass
            else:
                if isinstance(value, _Done):
                    raise StopIteration
                if isinstance(value, BaseException):
                    raise value
                return value
            now = time.monotonic()
            if patience.stopping():
                stopped = stopped or now
                if now - stopped >= STOP_SECONDS:
                    self.hangs = True
                    raise StoppedWaitingError
            if now - began >= patience.limit:
                self.hangs = True
                raise CanterError(
                    f"no data for {now - began:.0f} s{self._reading()}; make the storage answer or remove these rows, "
                    "and the same command resumes from the checkpoint saved now; --data-timeout sets the limit"
                )
            if now - told >= NOTICE_SECONDS:
                told = now
                patience.say(
                    f"waiting for data for {now - began:.0f} s{self._reading()}; the run ends after "
                    f"{patience.limit:g} s (--data-timeout)"
                )

    def close(self) -> None:
        """End the iterator and the processes behind it, within some seconds."""
        self.asked.put(False)
        if not self.hangs:
            self.thread.join(CLOSE_SECONDS)
        self._kill()  # what hangs; and whoever holds on to what was raised keeps the iterator, and its processes, alive

    def _kill(self) -> None:
        for child in self.children:
            if child.is_alive():
                child.kill()  # data workers ignore SIGTERM, and the interpreter waits for them at its exit

    def _reading(self) -> str:
        told = answer_within(ASK_SECONDS, self.being_read)
        return f", while reading {told}" if told else ""


def _pull(values: list[Iterator[Any]], asked: queue.SimpleQueue, given: queue.SimpleQueue) -> None:
    """Answer each request by a value, by what was raised, or by _Done. The iterator ends with this thread."""
    iterator = values.pop()
    while asked.get():
        try:
            given.put(next(iterator))
        except StopIteration:
            given.put(_Done())
        except BaseException as error:  # raised where it is waited for
            given.put(error)


def answer_within(seconds: float, work: Callable[[], T]) -> T | None:
    """Return ``work()``, computed in a thread, or None where it takes longer or fails."""
    answers: queue.SimpleQueue[T] = queue.SimpleQueue()

    def compute() -> None:
        try:
            answers.put(work())
        except Exception:
            return

    threading.Thread(target=compute, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None


def children_of(start: Callable[[], T]) -> tuple[T, list[BaseProcess]]:
    """Return ``start()`` and the processes that it started."""
    before = set(multiprocessing.active_children())
    value = start()
    return value, [child for child in multiprocessing.active_children() if child not in before]


# -- open files --


def prefetch_within_limit(workers: int, held: int, say: Callable[[str], None] = lambda _: None) -> int:
    """Return the number of micro-batches that each worker may load ahead within the limit on open files.

    ``held`` micro-batches are in use by the training process beside those. Raises ConfigError where not even one fits:
    a worker that cannot hand a batch over would leave the run waiting for ever.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return PREFETCH
    mine = (limit - len(os.listdir("/dev/fd")) - OWN_FILES) // TENSORS - held
    prefetch = min(PREFETCH, mine // workers, (limit - OWN_FILES) // TENSORS)
    if prefetch < 1:
        needed = (workers + held) * TENSORS + 2 * OWN_FILES
        raise ConfigError(
            f"--workers {workers} needs about {needed} open files, and this process may have {limit}: raise the limit "
            f"(ulimit -n {max(1024, 2 * needed)}) or take fewer --workers; --workers 0 needs none"
        )
    if prefetch < PREFETCH:
        say(
            f"at most {limit} open files (ulimit -n): each of {workers} workers loads {prefetch} instead of {PREFETCH} "
            "micro-batches ahead"
        )
    return prefetch
