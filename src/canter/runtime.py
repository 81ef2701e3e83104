"""Memory, devices and limits of this process: what ran out, the peak that a piece of code took, the heap, the device.

Peak memory is measured in three ways: the CUDA allocator's, the resident memory of the process on Linux, and a count of
the live tensors, which works everywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from canter.errors import ConfigError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
OWN_GROUPS, CONTROL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP_THRESHOLD, LARGEST_THRESHOLD = 2**17, 2**25  # bytes: glibc's initial value, and the largest that it accepts
OPEN_FILES = 2**16  # limit where the system sets none
ALLOCATION_FAILED = re.compile(
    r"out of memory|(can't|could not|cannot) allocate memory|not enough memory|bad_alloc|alloc_failed"
    r"|could not (create|execute) a (primitive|memory)",  # oneDNN's, which does not say why
    re.IGNORECASE,
)
T = TypeVar("T")


# -- devices and limits --


def choose_device(name: str) -> torch.device:
    """Return the device called 'cpu', 'cuda' or 'cuda:1'; 'auto' is a GPU if there is one.

    Raises ConfigError for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: no GPU is available here; use --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: no such device; use cpu, cuda or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs here, cuda:0 the first")
    if device.type == "cuda":
        _suit_changing_shapes()
    return device


def _suit_changing_shapes() -> None:
    """Change two settings of PyTorch that assume repeating shapes, where ours change from batch to batch.

    cuDNN's attention makes a plan for every new shape, which takes milliseconds, and the allocator's blocks of fixed
    size fragment. The user's environment variables take precedence.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        with warnings.catch_warnings():  # its name is about to change
            warnings.simplefilter("ignore", FutureWarning)
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def upload(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return integers as a tensor on ``device``; a GPU copies them from pinned memory without a synchronisation."""
    pinned = torch.tensor(numbers, dtype=torch.long, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Return a context manager that submits a GPU's work to ``stream``; None: to the current one."""
    return torch.cuda.stream(stream) if stream else nullcontext()


def raise_file_limit() -> None:
    """Raise the soft limit on open files to the hard one, for this process and those that it starts."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = max(soft, OPEN_FILES) if hard == resource.RLIM_INFINITY else hard
    if wanted != soft:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# -- out of memory --


class OutOfMemory(RuntimeError):
    """The code asked for more than its cap: at least ``wanted`` bytes above those in use before it."""

    def __init__(self, wanted: int):
        super().__init__(f"out of memory: {wanted} bytes wanted")
        self.wanted = wanted


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` is a failed allocation, on any device."""
    if isinstance(error, OutOfMemory | MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ALLOCATION_FAILED.search(str(error)) is not None


def retry_once(work: Callable[[], T]) -> T:
    """Return ``work()``; if it runs out of memory, release cached memory and call it once more.

    ``work`` must be safe to repeat: it allocates before it changes anything, or resumes where it stopped.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory()  # outside of the handler: the exception holds on to tensors
    return work()


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of tensor storages that were made inside it and are still alive; ``peak`` is the maximum.

    With a ``cap``, the operation that would exceed it raises OutOfMemory. Memory that an operation allocates and
    frees internally is not counted.
    """

    def __init__(self, cap: float | None = None):
        super().__init__()
        self.live = self.peak = 0
        self.cap = cap
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        self._count(tree_leaves((args, kwargs)), new=False)  # existing storages are not counted
        result = func(*args, **kwargs)
        self._count(tree_leaves(result), new=True)
        return result

    def _count(self, leaves: Iterable[object], *, new: bool) -> None:
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


@contextmanager
def capped_allocator(device: torch.device, cap: float | None) -> Iterator[None]:
    """Have CUDA's allocator refuse more than ``cap`` bytes above what it holds; a CPU and None are not capped."""
    if device.type != "cuda" or cap is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap + torch.cuda.memory_reserved(device)) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


# -- memory in use --


def device_memory(device: torch.device) -> int:
    """Return the bytes that this process may use.

    They are a GPU's free memory and what the process has reserved there; on a CPU all memory of the machine, or of the
    container or job where that is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *control_group_limits()])


def control_group_limits() -> list[int]:
    """Return the limits, in bytes, of the control groups that hold this process: a container's, a SLURM job's.

    Both versions of Linux's control groups are read (the kernel's cgroup-v2.rst and cgroup-v1/memory.rst), each group
    with its parents. A container does not see groups outside of it.
    """
    limits: list[int] = []
    if not OWN_GROUPS.exists():  # another system than Linux
        return limits
    for line in OWN_GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = CONTROL_GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = CONTROL_GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # a group that is not seen from here; "max": no limit
                if folder.is_relative_to(root):
                    limits.append(int((folder / name).read_text()))
    return limits


def gib(size: float) -> str:
    """Return bytes as text in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages behind ``tensors``; oneDNN's packed ones count by their values."""
    sizes: dict[tuple[str, int], int] = {}
    tensors = [*tensors]  # so that no two have the same identity
    for tensor in tensors:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            sizes["storage", storage._cdata] = storage.nbytes()
        else:
            sizes["packed", id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def measures_resident() -> bool:
    """Reset the peak of this process's resident memory; return whether the system reports it, as Linux does."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")
        return "VmHWM" in STATUS.read_text()
    return False


def resident(field: str = "VmRSS") -> int:
    """Return the bytes of this process in physical memory; ``VmHWM`` is the peak."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def peak_of(run: Callable[[], None], device: torch.device, cap: float | None = None) -> int:
    """Return the peak bytes while ``run`` runs, above those in use before.

    On CUDA these are the bytes that the allocator reserved; on a CPU the resident memory, or the live tensors where the
    system does not report it. On a CPU, ``cap`` ends a run whose tensors exceed it with OutOfMemory, and slows it down.
    """
    release_memory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device) - before
    reported = measures_resident()
    if cap is None and reported:
        before = resident()
        CLEAR.write_text("5")
        run()
        return max(0, resident("VmHWM") - before)
    before = resident() if reported else 0
    with LiveBytes(cap) as count:
        run()
    return max(count.peak, resident("VmHWM") - before if reported else 0)


# -- the heap --


def release_memory() -> None:
    """Return freed memory to the device or the system, so that it does not count as in use."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def map_large_blocks(threshold: int = MMAP_THRESHOLD) -> bool:
    """Have glibc map every block of at least ``threshold`` bytes by itself, and unmap it as soon as it is freed.

    By default glibc raises the threshold up to 32 MiB as blocks are freed and keeps smaller ones on a heap that
    fragments: a CPU process comes to hold up to twice the bytes of its tensors. The price is that the system clears
    every page of a mapped block, which takes up to two fifths of a small model's training step. Returns whether the
    threshold could be set (Linux with glibc).
    """
    return _set_heap(threshold, 2 * threshold)  # glibc's own proportion


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 32 MiB for the next allocation, as loops over similar batches need them.

    By default it returns the end of its heap to the system after every step, which clears the pages again: a tenth of a
    small model's training step. `map_large_blocks` undoes it, and returns the same.
    """
    return _set_heap(LARGEST_THRESHOLD, 2**31 - 1)


def _set_heap(mmap_threshold: int, trim_threshold: int) -> bool:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        return libc.mallopt(M_MMAP_THRESHOLD, mmap_threshold) == libc.mallopt(M_TRIM_THRESHOLD, trim_threshold) == 1
    return False
