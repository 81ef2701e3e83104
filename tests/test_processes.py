"""Workers that end with the process that started them, by SIGKILL too."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from .helpers import gone, leased

LONG = 120.0  # seconds that no test comes near to


def until(found, what):
    end = time.monotonic() + LONG
    while not found():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@contextmanager
def started(*command, **settings):
    """A process in a group of its own, none of which outlives the test."""
    with subprocess.Popen(command, start_new_session=True, **settings) as process:
        try:
            yield process
        finally:
            if not gone(process.pid):
                os.killpg(process.pid, signal.SIGKILL)


def workers_of(pid):
    """Process ids of the pool's workers that have been initialised: they ignore SIGINT."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in children:
        status = Path(f"/proc/{child}/status").read_text()
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
        if b"spawn_main" in command and ignored & 1 << (signal.SIGINT - 1):
            found.append(child)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_workers_of_an_index_that_is_killed_end_too(tmp_path):
    """One that reads a file which never answers, and one that waits for work."""
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16000)
    for name in ("one", "two"):
        row = {"audio_filepath": "a.wav" if name == "one" else "b.wav", "text": "a"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    soundfile.write(tmp_path / "b.wav", np.zeros(1600), 16000)
    command = (sys.executable, "-m", "canter", "index", "one.jsonl", "two.jsonl", "-o", "lengths.arrow")
    options = ("--workers", "2", "--measure-durations", "--tokenizer", "bytes")
    with leased(tmp_path / "a.wav"), started(*command, *options, cwd=tmp_path) as process:
        until(lambda: len(workers_of(process.pid)) == 2, "no workers")
        process.kill()
        process.wait()
        until(lambda: gone(process.pid), "a worker outlives the command")


def test_a_rank_ends_with_its_launcher(tmp_path):
    rank = (
        "import time, pathlib; from canter.processes import end_with_launcher; "
        "end_with_launcher('torchrun is gone'); pathlib.Path('ready').touch(); time.sleep(600)"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    with started(sys.executable, "-c", launcher, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        until((tmp_path / "ready").exists, "no rank")
        process.kill()
        process.wait()
        assert process.stderr.read() == b"canter: torchrun is gone\n"
        until(lambda: gone(process.pid), "the rank outlives its launcher")
