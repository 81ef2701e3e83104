"""Peak memory of a piece of code, in three ways: the CUDA allocator's, the process's resident memory on Linux, and a
count of the tensors alive, which needs no device and works on tensors without storage too."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP_THRESHOLD, LARGEST_THRESHOLD = 2**17, 2**25  # bytes; where glibc starts, and the most it takes
ALLOCATION_FAILED = re.compile(
    r"out of memory|(can't|could not|cannot) allocate memory|not enough memory|bad_alloc|alloc_failed"
    r"|could not (create|execute) a (primitive|memory)",  # oneDNN's, which does not say why
    re.IGNORECASE,
)


T = TypeVar("T")


class OutOfMemory(RuntimeError):
    """A step asked for more than the cap; ``wanted`` bytes at least, above what there was before it."""

    def __init__(self, wanted: int):
        super().__init__(f"out of memory: {wanted} bytes wanted")
        self.wanted = wanted


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocation that failed, on whatever device."""
    if isinstance(error, OutOfMemory | MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ALLOCATION_FAILED.search(str(error)) is not None


def retry_once(work: Callable[[], T]) -> T:
    """Return ``work()``; where it runs out of memory, return cached memory to the device and call it once more.

    ``work`` must be safe to repeat: it allocates before it changes anything, or resumes where it stopped.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    give_back()  # outside of the handler: the exception holds on to tensors
    return work()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages made inside it and still alive; ``peak`` is the most there were.

    With a ``cap``, the operation that would exceed it raises OutOfMemory. What operations use inside themselves
    and give back before they return is not seen. ``number`` stands for the value of tensors without storage where
    Python asks for one.
    """

    def __init__(self, cap: float | None = None, number: float = 1.0):
        super().__init__()
        self.live = self.peak = 0
        self.cap, self.number = cap, number
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and not _has_values(inputs[0]):
            return self.number if inputs[0].is_floating_point() else int(self.number)
        self._see(inputs, new=False)  # what was there before is free
        result = func(*args, **kwargs)
        self._see(tree_leaves(result), new=True)
        return result

    def _see(self, leaves: Iterable[Any], *, new: bool) -> None:
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key in self.sizes:
                continue
            self.sizes[key] = storage.nbytes() if new else 0
            weakref.finalize(storage, self._freed, key).atexit = False
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            if self.cap is not None and self.live > self.cap:
                raise OutOfMemory(self.live)

    def _freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def _has_values(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and not isinstance(tensor, torch._subclasses.FakeTensor)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def measures_resident() -> bool:
    """Whether the kernel tells, and lets us reset, the peak of this process's resident memory (Linux does)."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")
        return "VmHWM" in STATUS.read_text()
    return False


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in physical memory; with ``VmHWM`` the most there have been."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def give_back() -> None:
    """Returns freed memory to the device or to the system, so that it is not counted as in use."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def steady_heap(threshold: int = MMAP_THRESHOLD) -> bool:
    """Has glibc map every block from ``threshold`` bytes on for itself, and return it at once when it is freed.

    Left alone, glibc raises that threshold up to 32 MiB as blocks are freed, keeps what is below on a heap that
    fragments, and a CPU process comes to hold up to twice what its tensors take, the more the longer it runs. Returns
    whether it could be set (Linux with glibc). It is not free: the system clears every page of a mapped block, which a
    small model's training step, all of its tensors mapped, spends two fifths of its time on.
    """
    return _set_heap(threshold, 2 * threshold)  # glibc's own proportion


def lasting_heap() -> bool:
    """Has glibc keep what is freed, blocks of more than 32 MiB apart, for what is asked for next, as a training step or
    an encoder that runs again and again asks for the same. Left alone, it gives the end of its heap back after every
    step, and the system clears those pages anew: a tenth of a small model's training step. Returns as ``steady_heap``,
    which undoes it."""
    return _set_heap(LARGEST_THRESHOLD, 2**31 - 1)


def _set_heap(threshold: int, trim: int) -> bool:
    """Bytes from which blocks are mapped, and of its end that the heap may keep."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        return libc.mallopt(M_MMAP_THRESHOLD, threshold) == libc.mallopt(M_TRIM_THRESHOLD, trim) == 1
    return False


def peak_of(run: Callable[[], None], device: torch.device, cap: float | None = None) -> int:
    """Peak bytes above what was in use before while ``run`` runs.

    On CUDA what the allocator reserved; on a CPU the resident memory, or where the system does not tell, the tensors
    alive. On a CPU, ``cap`` ends a run whose tensors grow above it with OutOfMemory (and slows it down).
    """
    give_back()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device) - before
    told = measures_resident()
    if cap is None and told:
        before = resident()
        CLEAR.write_text("5")
        run()
        return max(0, resident("VmHWM") - before)
    before = resident() if told else 0
    with LiveBytes(cap) as count:
        run()
    return max(count.peak, resident("VmHWM") - before if told else 0)
