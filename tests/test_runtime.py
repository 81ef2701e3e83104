import subprocess
import sys

import pytest
import torch
from torch import nn

from canter.runtime import LiveBytes, OutOfMemory, is_out_of_memory, tensor_bytes

MIB = 2**20


def test_live_bytes_count_what_is_alive_at_a_time():
    inputs = torch.ones(MIB // 4)
    with LiveBytes() as count:
        a = inputs * 2
        b = a + 1
        a.view(2, -1).mul_(3)  # a view, and in place: nothing new
        del a
        c = b * 2
        del b, c
        inputs.add_(1)
    assert count.peak == 2 * MIB
    assert count.live == 0


def test_live_bytes_see_the_backward_pass():
    weight = nn.Parameter(torch.randn(256, 256))
    with LiveBytes() as count:
        (torch.randn(1024, 256) @ weight).relu().square().sum().backward()
    activations = 1024 * 256 * 4
    assert 4 * activations <= count.peak <= 6 * activations + weight.nbytes
    assert count.live == weight.nbytes  # its gradient stays


def test_a_cap_ends_what_grows_above_it():
    with pytest.raises(OutOfMemory) as caught, LiveBytes(cap=3 * MIB):
        kept = [torch.zeros(MIB // 4) for _ in range(10)]
    assert caught.value.wanted == 4 * MIB
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert "kept" not in locals()


HELD = """
import torch
from canter.runtime import peak_of

def run():
    held = [torch.ones(2**23) for _ in range(3)]
    del held

print(peak_of(run, torch.device("cpu")), peak_of(lambda: None, torch.device("cpu")))
"""


def test_the_peak_of_a_process_is_what_it_held():
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    three, none = map(int, done.stdout.split())
    assert abs(three / (96 * MIB) - 1) < 0.1
    assert none < 8 * MIB


def test_shared_storage_counts_once():
    x = torch.zeros(100)
    assert tensor_bytes([x, x.view(10, 10), torch.zeros(10)]) == 440


HEAP = """
import resource, sys
import torch
from canter import runtime as memory

getattr(memory, sys.argv[1])(*map(int, sys.argv[2:]))

def step():  # 80 blocks of a megabyte, as many as the end of the heap may be large
    return len([torch.ones(2**18) for _ in range(80)])

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
held, before = memory.resident(), faults()
for _ in range(5):
    step()
print((faults() - before) / 5, held)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_what_is_freed_stays_for_the_next_step_or_goes_back_at_once():
    def run(*how: str) -> tuple[float, float]:
        command = [sys.executable, "-c", HEAP, *how]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return float(found[0]), float(found[1])

    pages = 80 * 2**20 / 4096
    lasting, steady = run("keep_freed_memory"), run("map_large_blocks")
    assert lasting[0] < 0.02 * pages
    assert steady[0] > 0.9 * pages
    assert steady[1] < lasting[1] - 60 * 2**20
