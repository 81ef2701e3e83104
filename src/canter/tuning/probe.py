"""Measuring a training step of a given shape: peak memory and time."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Step = Callable[[int, int, int], None]
"""Runs one whole training step (forward, loss, backward, update) on a synthetic batch of B utterances, T encoder
frames and U tokens each."""


@dataclass(frozen=True)
class Probe:
    """What one step of shape (B, T, U) took."""

    batch: int
    frames: int
    tokens: int
    bytes: int
    """Peak memory above what was in use before the step."""
    seconds: float


def probe(step: Step, batch: int, frames: int, tokens: int, repeats: int = 2) -> Probe:
    """Runs ``step`` once to measure memory and ``repeats`` times to measure time, of which the least counts.

    On CUDA the peak is the allocator's; elsewhere it is the storage that autograd keeps for the backward pass,
    which is what grows with the batch.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(batch, frames, tokens)
        torch.cuda.synchronize()
        size = torch.cuda.max_memory_allocated() - before
    else:
        size = _saved_bytes(lambda: step(batch, frames, tokens))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(batch, frames, tokens)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return Probe(batch, frames, tokens, size, min(times))


def _saved_bytes(run: Callable[[], None]) -> int:
    """Bytes of distinct storages that autograd saved for backward while ``run`` ran, parameters left out."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())
