"""The commands of "Train on N GPUs and several nodes", on two nodes of one machine.

A node is a set of namespaces: its own network interface, host name, process numbers and /etc/hosts. Ending its first
process ends everything on it, as a power failure does. The nodes are joined by a bridge on a third one, the switch.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from canter.cli.main import main
from canter.corpus.remote import upload_file
from canter.planning.budget import Budget

from .conftest import CLIPS, write_manifest
from .test_guides import DOCS, blocks_of, rows, shell  # noqa: F401

PAGE = "guides/several-nodes.md"
ADDRESSES = {"switch": "", "node1": "10.87.0.1", "node2": "10.87.0.2"}
STARTED = "started"
BOOT = """
mount --make-rprivate / && mount --bind "$2" /etc/hosts && hostname "$1" && ip link set lo up && : > "$3" &&
exec sleep infinity
"""
SMALL = """
budget: budget.json
steps: 100
batch_seconds: 12.0
vocab_size: 60
workers: 0
threads: 1
precision: float32
device: cpu
rank_timeout: 15.0
model: {encoder_layers: 1, decoder_layers: 1, width: 32, heads: 2, subsampling_channels: 8, mels: 40}
"""
# Ranks share the micro-batches of a step out, so that its sums are added in another order.
ROUNDING = 2e-4


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{shlex.join(command)}: {done.stderr.strip()}")


class Node:
    """A machine that can be switched off, with commands that run on it in ``folder``."""

    numbers = itertools.count()

    def __init__(self, name: str, folder: Path, environment: dict[str, str]):
        self.name, self.folder, self.environment = name, folder, environment
        self.log = folder / f"{name}.log"
        ready = folder / f".{name}-{next(self.numbers)}"
        unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.outside = subprocess.Popen(
            [*unshare, "bash", "-c", BOOT, "boot", name, str(folder / "hosts"), str(ready)],
            stderr=subprocess.PIPE,
            text=True,
        )
        while not ready.exists():
            if self.outside.poll() is not None:
                assert self.outside.stderr
                raise OSError(f"{shlex.join(unshare)}: {self.outside.stderr.read().strip()}")
            time.sleep(0.01)
        children = Path(f"/proc/{self.outside.pid}/task/{self.outside.pid}/children").read_text()
        self.first = int(children.split()[0])

    def enter(self, *command: str) -> list[str]:
        return ["nsenter", "--target", str(self.first), "--net", "--uts", "--mount", "--pid", *command]

    def connect(self, switch: "Node") -> None:
        """Give this node the interface eth0, and the switch a port for it."""
        port = f"port{next(self.numbers)}"
        to_switch = ["peer", "name", port, "netns", str(switch.first)]
        call("ip", "link", "add", "eth0", "netns", str(self.first), "type", "veth", *to_switch)
        call(*self.enter("ip", "address", "add", f"{ADDRESSES[self.name]}/24", "dev", "eth0"))
        call(*self.enter("ip", "link", "set", "eth0", "up"))
        call(*switch.enter("ip", "link", "set", port, "master", "br0", "up"))

    def start(self, script: str) -> subprocess.Popen:
        with self.log.open("a") as log:
            command = self.enter(f"--wd={self.folder}", "bash", "-euo", "pipefail", "-c", script)
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    def ranks(self) -> list[int]:
        """Return the process numbers, outside of the node, of the ranks that torchrun runs there."""
        home, found = os.readlink(f"/proc/{self.first}/ns/pid"), []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(place / "ns/pid") == home and b"\0LOCAL_RANK=" in (place / "environ").read_bytes():
                    found.append(int(place.name))
            except OSError:
                continue  # it has ended
        return found

    def switch_off(self, silently: bool = False) -> None:
        """End all processes; ``silently``: without a last packet that tells other nodes."""
        if self.outside.poll() is None:
            if silently:
                call(*self.enter("ip", "link", "set", "eth0", "down"))
            os.kill(self.first, signal.SIGKILL)
            self.outside.wait()
        if self.outside.stderr:
            self.outside.stderr.close()


@pytest.fixture
def nodes(shell, tmp_path) -> Iterator[Callable[[str], Node]]:  # noqa: F811
    """``nodes(name)``: the node of that name, switched on and connected."""
    missing = [name for name in ("ip", "unshare", "nsenter") if not shutil.which(name)]
    if missing:
        pytest.skip(f"there is no {', '.join(missing)} to make two nodes of one machine")
    here = shell(None)
    hosts = [f"{address} {name}" for name, address in ADDRESSES.items() if address]
    (here.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
    log = {"LOGLEVEL": "INFO", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    environment = here.environment() | log
    started: list[Node] = []

    def make(name: str) -> Node:
        started.append(Node(name, here.folder, environment))
        if name == "switch":
            call(*started[-1].enter("ip", "link", "add", "br0", "type", "bridge"))
            call(*started[-1].enter("ip", "link", "set", "br0", "up"))
        else:
            started[-1].connect(started[0])
        return started[-1]

    try:
        make("switch")
    except OSError as error:
        for one in started:
            one.switch_off()
        pytest.skip(f"this system does not allow network namespaces: {error}")
    yield make
    for one in started:
        one.switch_off()


def script_of(command: str) -> str:
    """Return the block of the page that runs a command on both nodes."""
    blocks = [block for block in blocks_of((DOCS / PAGE).read_text()) if block.on_nodes]
    (found,) = [block for block in blocks if command in block.lines[-1]]
    return "\n".join(found.lines)


def wait_until(done: Callable[[], bool], what: str, *nodes: Node, seconds: float = 900.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            logs = "\n".join(node.log.read_text()[-5000:] for node in nodes)
            raise AssertionError(f"waited {seconds:g} s until {what}\n{logs}")
        time.sleep(0.02)


def finish(processes: dict[Node, subprocess.Popen]) -> None:
    for node, process in processes.items():
        assert process.wait(timeout=900) == 0, node.log.read_text()[-5000:]


def rejoin(nodes: Callable[[str], Node], first: Node, script: str) -> tuple[Node, subprocess.Popen]:
    """Switch node2 on again and give its command, while the only rank stands still, so that it does not end before."""
    (rank,) = first.ranks()
    os.kill(rank, signal.SIGSTOP)
    second = nodes("node2")
    process = second.start(script)
    wait_until(lambda: "Detected 1 new nodes" in first.log.read_text(), "torchrun sees the node", first, second)
    os.kill(rank, signal.SIGCONT)
    return second, process


def complete_lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1] if path.exists() else []


def steps_of(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in complete_lines(folder / "metrics.jsonl")]
    return [row for row in found if row["kind"] == "train"]


def options_of(script: str, output: str) -> list[str]:
    """Return the command's options of one process, with another output."""
    words = shlex.split(script.splitlines()[-1])
    words = words[words.index("canter") + 1 :]
    words[words.index("--output") + 1] = output
    return words


def prepare(folder: Path) -> None:
    write_manifest(folder / "train.jsonl", list(CLIPS), [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15])
    Budget.from_batch_seconds(60.0).save(folder / "budget.json")
    (folder / "small.yaml").write_text(SMALL)


@pytest.mark.slow
def test_training_loses_a_node_and_gets_it_back(nodes, capsys):
    folder, script = Path.cwd(), script_of("canter train")
    prepare(folder)
    run = folder / "runs/two-nodes"
    first, second = nodes("node1"), nodes("node2")
    processes = {node: node.start(script) for node in (first, second)}
    wait_until(lambda: len(steps_of(run)) >= 6, "six steps are taken", first, second)
    lost = processes.pop(second)
    second.switch_off(silently=True)
    lost.wait()

    def on_one_rank() -> bool:
        return any(len(row["rank_seconds"]) == 1 for row in steps_of(run)) and len(first.ranks()) == 1

    wait_until(on_one_rank, "the remaining node resumes", first)
    second, processes[second] = rejoin(nodes, first, script)
    finish(processes)

    assert main(options_of(script, "runs/undisturbed")) in (0, None)
    capsys.readouterr()
    undisturbed = folder / "runs/undisturbed"
    assert rows(run / "utterances.jsonl") == rows(undisturbed / "utterances.jsonl")
    steps, expected = steps_of(run), steps_of(undisturbed)
    assert [row["step"] for row in steps] == [row["step"] for row in expected] == list(range(1, 101))
    assert [count for count, _ in itertools.groupby(len(row["rank_seconds"]) for row in steps)] == [2, 1, 2]
    assert [row["loss"] for row in steps] == pytest.approx([row["loss"] for row in expected], rel=ROUNDING)
    assert "rank 1 of 2 gave no sign of life for 15 s; the same command resumes" in first.log.read_text()


@pytest.mark.slow
def test_transcription_loses_a_node_and_gets_it_back(nodes, capsys):
    folder, script = Path.cwd(), script_of("canter transcribe")
    prepare(folder)
    training = ["train", "small.yaml", "--steps", "200", "--manifest", "train.jsonl", "--output", "runs/two-nodes"]
    assert main(training) in (0, None)
    manifest = [
        row | {"offset": round(0.02 * part, 2), "duration": 1.5, "id": f"{number}-{part}"}
        for number, row in enumerate(rows(folder / "train.jsonl"))
        for part in range(25)  # so many that the nodes cannot end before one is lost, however late this test is
    ]
    (folder / "large.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest))
    mine, theirs = folder / "out.jsonl.partial", folder / "out.jsonl.partial-1"
    first, second = nodes("node1"), nodes("node2")
    processes = {node: node.start(script) for node in (first, second)}
    wait_until(lambda: min(len(complete_lines(one)) for one in (mine, theirs)) > 2, "both have rows", first, second)
    lost = processes.pop(second)
    second.switch_off()
    lost.wait()
    wait_until(lambda: "Worker group FAILED" in first.log.read_text(), "the remaining rank ends", first)
    kept = len(complete_lines(mine))
    wait_until(lambda: len(complete_lines(mine)) > kept, "the remaining node resumes", first)
    before = len(complete_lines(theirs))
    second, processes[second] = rejoin(nodes, first, script)
    shared = False
    while not shared and processes[first].poll() is None:
        shared = len(complete_lines(theirs)) > before
        time.sleep(0.005)
    finish(processes)
    assert shared, "the node that came back transcribed nothing"

    assert main(options_of(script, "alone.jsonl")) == 0
    capsys.readouterr()
    found = rows(folder / "out.jsonl")
    assert [row["id"] for row in found] == [row["id"] for row in manifest]
    assert found == rows(folder / "alone.jsonl")
    assert len({row["pred_text"] for row in found}) > 1
    assert not list(folder.glob("out.jsonl.partial*"))


def test_one_machine_and_object_storage(shell, bucket):  # noqa: F811
    """The other commands of the page, whose bucket is called ``speech``."""
    import fsspec

    here = shell(None)
    prepare(here.folder)
    write_manifest(here.folder / "valid.jsonl", list(CLIPS), [1.07])
    fsspec.filesystem("s3").mkdir("speech")
    for path in (here.folder / "train.jsonl", *(here.folder / "wav").glob("train_*")):
        upload_file(path, f"s3://speech/{path.relative_to(here.folder).as_posix()}")
    manifest = rows(here.folder / "train.jsonl")
    for shard in (0, 1):
        half = manifest[shard::2]
        with tarfile.open(f"audio_{shard}.tar", "w") as tar:
            for row in half:
                tar.add(row["audio_filepath"], Path(row["audio_filepath"]).name)
        lines = [row | {"audio_filepath": Path(row["audio_filepath"]).name} for row in half]
        Path(f"manifest_{shard}.json").write_text("".join(json.dumps(row) + "\n" for row in lines))
        for name in (f"audio_{shard}.tar", f"manifest_{shard}.json"):
            upload_file(name, f"s3://speech/{name}")
    (mixture,) = re.findall(r"```yaml\n(.*?)```", (DOCS / PAGE).read_text(), re.DOTALL)
    Path("s3.yaml").write_text(mixture)
    here.run_page("guides/several-nodes.md")
    assert [len(row["rank_seconds"]) for row in steps_of(Path("runs/one-machine"))] == [2, 2, 2]
    assert [row["step"] for row in steps_of(Path("runs/s3"))] == [1, 2, 3, 4]  # restored after its folder was removed
    transcripts = rows(Path("s3-out.jsonl"))
    assert len(transcripts) == len(manifest)
    assert all("pred_text" in row for row in transcripts)
