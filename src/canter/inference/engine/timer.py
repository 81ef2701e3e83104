"""Where the engine's time goes: seconds that are added to counters as they pass, on a GPU once the device is done."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch

from canter.inference.engine.requests import Counters


class Timer:
    """On a GPU the seconds are the device's own, between two events, which nobody waits for before the end."""

    def __init__(self, gpu: bool):
        self.gpu = gpu
        self.spans: deque[tuple[Counters, str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def timed(self, counters: Counters, name: str) -> Iterator[None]:
        """Adds the seconds to one of the counters, at once or, on a GPU, when they are collected."""
        if self.gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.spans.append((counters, name, start, end))
            return
        begun = time.perf_counter()
        yield
        _add(counters, name, time.perf_counter() - begun)

    def collect(self, wait: bool = False) -> None:
        """Adds up what the device has finished."""
        while self.spans and (wait or self.spans[0][-1].query()):
            counters, name, start, end = self.spans.popleft()
            end.synchronize()
            _add(counters, name, start.elapsed_time(end) / 1000)


def _add(counters: Counters, name: str, seconds: float) -> None:
    setattr(counters, name, getattr(counters, name) + seconds)
