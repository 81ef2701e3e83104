"""Ranks of training and of bulk transcription: how they start, exchange values and gradients, and end when one is lost.

``torchrun`` or SLURM's ``srun`` starts them; a single process is rank 0 of 1 and exchanges nothing. Small values travel
over gloo on the CPU, gradients over the device's backend (NCCL on GPUs).
"""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from canter.errors import CanterError, ConfigError
from canter.processes import end_with_launcher
from canter.runtime import is_out_of_memory, retry_once

BUCKET_BYTES = 64 * 2**20  # gradients that are reduced together
IN_FLIGHT = 2  # buckets that are reduced at a time
BEAT = 1.0  # seconds between heartbeats
GRACE = 5.0  # seconds that a rank has to end by itself after another has failed
FAILED = "failed"
MEETING = timedelta(minutes=10)  # for all ranks to start
LONGEST_WAIT = timedelta(minutes=30)  # of a rank for the others in a collective operation
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process of a process group, as it sees itself and the others."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Rank on this machine, which is the number of its GPU."""
    store: dist.Store | None = field(default=None, repr=False)
    failures: list[str] = field(default_factory=list, repr=False)
    """Reasons of other ranks that failed."""

    @property
    def first(self) -> bool:
        """True on rank 0, which writes files."""
        return self.rank == 0

    # -- small values --

    def all_gather(self, values: Sequence[float]) -> np.ndarray:
        """Return the values (K,) of all ranks, on every rank: (ranks, K) float64."""
        if self.size == 1:
            return np.array([values], np.float64)
        mine = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        with self._together():
            dist.all_gather(rows, mine)
        return torch.stack(rows).numpy()

    def all_gather_named(self, values: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Return the values of all ranks by their names, on every rank: (ranks,) float64 each."""
        return dict(zip(values, self.all_gather(list(values.values())).T, strict=True))

    def all_gather_objects(self, value: T) -> list[T]:
        """Return the values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(values, value)
        return values

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, and an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.first else []
        with self._together():
            dist.gather_object(value, values or None)
        return values

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        with self._together():
            dist.broadcast_object_list(values, 0)
        return values[0]

    def rank_0_first(self, work: Callable[[], T]) -> T:
        """Return ``work()``, called on rank 0 and, however long that takes, then on all others at the same time."""
        if self.size == 1 or self.store is None:
            return work()
        key = "rank 0 is done"
        if self.first:
            result = work()
            self.store.set(key, "1")
            return result
        while not self._known(key):
            self._raise_if_one_failed()
            time.sleep(0.1)
        return work()

    # -- tensors --

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over ranks, in place, and return it."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0."""
        if self.size > 1:
            with self._together(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum gradients over ranks, in buckets.

        A parameter that has no gradient on any rank stays without; a rank that computed nothing gets the others' sum.
        Memory for the buckets is allocated before the ranks exchange anything. If a rank lacks it, all ranks reduce
        gradient by gradient, in place, as a rank that stopped in the middle would leave the others waiting. So a call
        that raises an out-of-memory error has exchanged nothing, and may be repeated.
        """
        if self.size == 1 or not parameters:
            return
        room = _bucket_memory(parameters)
        have = torch.tensor([*(p.grad is not None for p in parameters), not room], dtype=torch.int32)
        with self._together():
            dist.all_reduce(have, dist.ReduceOp.MAX)
        *somewhere, short = have.tolist()
        gradients = []
        for parameter, one in zip(parameters, somewhere, strict=True):
            if one and parameter.grad is None:
                parameter.grad = self._zeros_like(parameter)
            if one and parameter.grad is not None:
                gradients.append(parameter.grad)
        flying: deque[tuple[Any, Tensor, list[Tensor]]] = deque()

        def land() -> None:
            work, flat, bucket = flying.popleft()
            work.wait()
            sums = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in bucket]), bucket)]
            torch._foreach_copy_(bucket, sums)

        with self._together():
            for number, bucket in enumerate([g] for g in gradients) if short else enumerate(_buckets(gradients)):
                if len(flying) == IN_FLIGHT:
                    land()
                if len(bucket) == 1 and bucket[0].is_contiguous():
                    dist.all_reduce(bucket[0])
                    continue
                flat = torch.cat([g.reshape(-1) for g in bucket], out=_part_of(room, number, bucket))
                flying.append((dist.all_reduce(flat, async_op=True), flat, bucket))
            while flying:
                land()

    def _zeros_like(self, parameter: Tensor) -> Tensor:
        """Return a gradient of zeros. Raise CanterError if it does not fit, as the ranks exchange gradients by then."""
        try:
            return retry_once(lambda: torch.zeros_like(parameter))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise CanterError(
                f"rank {self.rank} of {self.size}: memory ran out for the gradients themselves "
                f"({str(error)[:200]}); use a smaller model, --parallel shard, or fewer processes a device"
            ) from None

    # -- lost ranks --

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Context manager around collective operations, which raises CanterError with the reason if a rank is lost."""
        try:
            yield
        except RuntimeError as error:  # gloo's "Connection closed by peer", NCCL's DistBackendError
            for _ in range(10):  # the failed rank may be about to write its reason
                self._raise_if_one_failed()
                time.sleep(0.1)
            raise CanterError(self._lost(" ".join(str(error).split())[:200])) from None

    def _raise_if_one_failed(self) -> None:
        if reason := self.failures[0] if self.failures else self._known(FAILED):
            raise CanterError(reason)

    def _known(self, key: str) -> str:
        """Return the store's value of ``key``, or an empty string."""
        try:
            return self.store.get(key).decode() if self.store and self.store.check([key]) else ""
        except RuntimeError:
            raise CanterError(self._lost("the process with the ranks' store is gone")) from None

    def _lost(self, what: str) -> str:
        return (
            f"rank {self.rank} of {self.size}: another rank was lost ({what}); the same command resumes from what was "
            "saved last"
        )


SINGLE_RANK = Ranks()


def _bucket_memory(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return IN_FLIGHT flat buffers of bytes, or none if they do not fit in memory."""
    size = min(BUCKET_BYTES, sum(parameter.nbytes for parameter in parameters))
    device = parameters[0].device
    try:
        return retry_once(lambda: [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(IN_FLIGHT)])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return []


def _part_of(room: Sequence[Tensor], number: int, bucket: Sequence[Tensor]) -> Tensor | None:
    """Return a flat view for the bucket of this number, or None without such memory."""
    size = sum(tensor.nbytes for tensor in bucket)
    if not room or size > room[0].nbytes:
        return None
    return room[number % IN_FLIGHT][:size].view(bucket[0].dtype)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of neighbouring tensors of one type, up to BUCKET_BYTES together."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or filled + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.nbytes
    if bucket:
        yield bucket


@contextmanager
def process_group(device: str, timeout: float = 60.0, longest_wait: timedelta = LONGEST_WAIT) -> Iterator[Ranks]:
    """Context manager that connects this process to the ranks that its launcher started, and yields them.

    A rank that leaves with an exception ends the others with its message; one without a heartbeat for ``timeout``
    seconds counts as dead. Raises ConfigError if the launcher's environment is incomplete.
    """
    place = _place(os.environ)
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if place is None:
        if under_torchrun:  # with the only rank that is left of several, or the first of several to come
            end_with_launcher("torchrun is gone; the same command resumes from what was saved last")
        yield SINGLE_RANK
        return
    rank, size, local = place
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local)
    try:
        base, rank, size = next(dist.rendezvous("env://", timeout=MEETING))
        store = dist.PrefixStore("canter", base)  # torchrun's own store has a prefix for each attempt already
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("groups", store),
            rank=rank,
            world_size=size,
            timeout=longest_wait,
        )
    except RuntimeError as error:  # from the store, the network or the timeout
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise CanterError(
            f"rank {rank} of {size} did not meet the others at {where} ({' '.join(str(error).split())[:200]}); were "
            "all of them started, and is the port free and reachable?"
        ) from None
    ranks = Ranks(rank, size, local, store)
    if under_torchrun:
        end_with_launcher(ranks._lost("torchrun is gone"))
    pulse = _Pulse(ranks, store, timeout)
    pulse.start()
    try:
        yield ranks
        ranks.all_gather([0.0])  # no rank leaves while another may need it
    except BaseException as error:
        reason = str(error) or type(error).__name__
        message = reason if reason.startswith("rank ") else f"rank {rank} of {size} ended: {reason}"
        with suppress(RuntimeError):  # the connection may be lost
            if not store.check([FAILED]) and not isinstance(error, KeyboardInterrupt):
                store.set(FAILED, message)
                if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                    time.sleep(2 * BEAT)  # the store ends with this process: let the others read it before
        raise
    finally:
        pulse.stop()
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _place(environment: MutableMapping[str, str]) -> tuple[int, int, int] | None:
    """Return (rank, number of ranks, rank on this machine) from torchrun or srun; None for a single process."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in environment:
        job = int(environment.get("SLURM_JOB_ID", 0))
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
        environment.setdefault("MASTER_PORT", str(20000 + job % 20000))
        environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
    size = int(environment.get("WORLD_SIZE", 1))
    if size == 1:
        return None
    missing = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in environment]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start the ranks with "
            "'torchrun --nproc-per-node N -m canter ...' or with srun"
        )
    return int(environment["RANK"]), size, int(environment["LOCAL_RANK"])


def _first_host(nodes: str) -> str:
    """Return the first machine of a SLURM node list, which scontrol expands."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"cannot expand SLURM's node list {nodes!r} ({error}); set MASTER_ADDR to the first machine"
        ) from None
    return listed.stdout.split()[0]


class _Pulse(threading.Thread):
    """Thread with the heartbeat of this rank, which watches that of the rank before.

    It ends the process, whatever that waits for, if a rank has failed or has no heartbeat: gloo notices a dead peer
    itself, but NCCL waits for it.
    """

    def __init__(self, ranks: Ranks, store: dist.Store, timeout: float):
        super().__init__(daemon=True)
        self.ranks, self.timeout = ranks, timeout
        clone = getattr(store, "clone", None)  # a connection of this thread
        self.store = clone() if clone else store
        self.over = threading.Event()

    def stop(self) -> None:
        self.over.set()

    def run(self) -> None:
        ranks, watched = self.ranks, (self.ranks.rank - 1) % self.ranks.size
        last_beat, last, count = time.monotonic(), "", 0
        while not self.over.wait(BEAT):
            try:
                count += 1
                self.store.set(f"pulse/{ranks.rank}", str(count))
                if self.store.check([FAILED]):
                    return self._end(self.store.get(FAILED).decode())
                beat = self.store.get(f"pulse/{watched}").decode() if self.store.check([f"pulse/{watched}"]) else ""
            except RuntimeError:
                return self._end(ranks._lost("the process with the ranks' store is gone"))
            if beat != last:
                last_beat, last = time.monotonic(), beat
            elif time.monotonic() - last_beat > self.timeout:
                reason = (
                    f"rank {watched} of {ranks.size} gave no sign of life for {self.timeout:g} s; the same command "
                    "resumes from what was saved last"
                )
                with suppress(RuntimeError):
                    self.store.set(FAILED, reason)
                return self._end(reason)

    def _end(self, reason: str) -> None:
        """Give the main thread a moment to end in order, then end the process."""
        self.ranks.failures.append(reason)
        if self.over.wait(GRACE):
            return
        print(f"canter: {reason}", file=sys.stderr, flush=True)
        os._exit(1)
