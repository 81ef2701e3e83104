import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from canter import runtime
from canter.runtime import LiveBytes, OutOfMemory, device_memory, is_out_of_memory, tensor_bytes

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


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/", {"memory.max": "1048576\n"}, MIB),  # a container
        ("0::/", {"memory.max": "max\n"}, None),
        ("0::/", {}, None),  # the machine itself
        ("0::/job/step", {"job/step/memory.max": "max\n", "job/memory.max": "2097152\n"}, 2 * MIB),
        ("0::/job/step", {"job/step/memory.max": "1048576\n", "job/memory.max": "2097152\n"}, MIB),
        ("0::/../other", {"memory.max": "1048576\n"}, MIB),  # a group outside of the container's namespace
        ("4:memory:/docker/1\n3:cpu:/", {"memory/memory.limit_in_bytes": "1048576\n"}, MIB),  # seen from inside
        ("4:cpu,memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": "1048576\n"}, MIB),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("4:cpu:/a", {"memory/a/memory.limit_in_bytes": "1048576\n"}, None),
        ("", {}, None),
    ],
)
def test_a_control_group_limits_the_memory_of_a_process(own, files, limit, tmp_path: Path, monkeypatch):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(runtime, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(runtime, "CONTROL_GROUPS", tmp_path)
    assert device_memory(torch.device("cpu")) == (limit or machine)


def test_a_system_without_control_groups_has_all_of_its_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(runtime, "OWN_GROUPS", tmp_path / "missing")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device_memory(torch.device("cpu")) == machine


def test_the_limit_of_a_real_control_group_is_found():
    first = Path("/sys/fs/cgroup/memory")
    version_1 = first.is_dir()
    group = (first if version_1 else Path("/sys/fs/cgroup")) / f"canter-test-{os.getpid()}"
    code = (
        "import os, sys, pathlib, torch; from canter.runtime import device_memory\n"
        "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "print(device_memory(torch.device('cpu')))"
    )
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        limit = group / ("memory.limit_in_bytes" if version_1 else "memory.max")
        if not limit.exists():
            pytest.skip("control groups have no memory controller here")
        limit.write_text(str(2048 * MIB))
        done = subprocess.run([sys.executable, "-c", code, str(group)], capture_output=True, text=True, check=True)
        assert int(done.stdout) == 2048 * MIB
    finally:
        group.rmdir()
