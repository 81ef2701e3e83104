"""Test the service under load: speed beside `canter transcribe`, no error for a valid request, constant memory.

1. `canter transcribe` over the clips; 2. the same clips through `canter serve`, asked for by many clients at
once; 3. `canter transcribe` again; 4. a soak: clients that ask for random clips, of which some leave during
the upload or while they wait, and some send bad files. Both commands are one process with as many threads.

    CANTER_SHARED=... python benchmarks/serving.py [MODEL] [--clients 64] [--seconds 120] [--json FILE]
"""

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

SHARED = Path(os.environ.get("CANTER_SHARED", "."))
BOUNDARY = "canter-benchmark"


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path] = SHARED / "models/whisper-tiny.en"
    """Model folder."""
    manifests: tuple[Path, ...] = (
        SHARED / "data/speech/librivox_mini/manifest.jsonl",
        SHARED / "data/speech/an4/manifest.jsonl",
    )
    """Manifest of the audio to send."""
    clips: int = 160
    """Number of clips, from the first one."""
    clients: int = 64
    """Number of concurrent clients."""
    seconds: float = 120.0
    """Of the soak."""
    leaving: float = 0.15
    """Fraction of the soak's requests whose client disconnects: half during the upload, half while waiting."""
    bad: float = 0.1
    """Fraction of the soak's requests with broken files."""
    threads: int = 2
    """Threads of torch, in both commands."""
    lang: str = "en"
    """Language of the audio."""
    seed: int = 0
    """Of the soak."""
    json: Path | None = None
    """Write the figures to this file."""


@dataclass(frozen=True)
class Clip:
    name: str
    data: bytes
    seconds: float


@dataclass
class Tally:
    """Results of all clients, under one lock."""

    latencies: list[float] = field(default_factory=list)
    audio_seconds: float = 0.0
    outcomes: Counter = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def read_clips(options: Options) -> list[Clip]:
    clips: list[Clip] = []
    for manifest in options.manifests:
        for line in manifest.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            path = manifest.parent / row["audio_filepath"]
            clips.append(Clip(str(path), path.read_bytes(), row["duration"]))
    return clips[: options.clips]


def environment(options: Options) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(options.threads)}


def transcribe(options: Options, clips: list[Clip], folder: Path) -> tuple[float, dict[str, str]]:
    """Return the RTFx of the command on the clips, and the texts by name."""
    manifest, output = folder / "clips.jsonl", folder / "out.jsonl"
    rows = [{"audio_filepath": clip.name, "duration": clip.seconds, "lang": options.lang, "text": ""} for clip in clips]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "canter", "transcribe", str(options.model), str(manifest)]
    done = subprocess.run(
        [*command, "-o", str(output), "--json"], env=environment(options), capture_output=True, text=True, check=True
    )
    texts = {row["audio_filepath"]: row["pred_text"] for row in map(json.loads, output.read_text().splitlines())}
    output.unlink()
    return json.loads(done.stdout)["rtfx"], texts


class Server:
    """Process of `canter serve`, whose memory is sampled every second."""

    def __init__(self, options: Options):
        command = [sys.executable, "-m", "canter", "serve", str(options.model), "--port", "0"]
        self.process = subprocess.Popen(command, env=environment(options), stderr=subprocess.PIPE, text=True, bufsize=1)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = re.search(r"http://[^:]+:(\d+)/", line)
        if not found:
            sys.exit(line + self.process.stderr.read())
        self.port = int(found[1])
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(0.1)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())

    def memory(self) -> float:
        """Return the resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def metrics(self) -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"}

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


def body(data: bytes, lang: str) -> bytes:
    return (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="language"\r\n\r\n{lang}\r\n--{BOUNDARY}\r\n'
        'Content-Disposition: form-data; name="file"; filename="clip.flac"\r\n\r\n'
    ).encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()  # fmt: skip


def ask(port: int, data: bytes, lang: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        connection.request("POST", "/v1/audio/transcriptions", body(data, lang), kind)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def leave(port: int, data: bytes, lang: str, chance: random.Random) -> None:
    """Send a part of a request, or all of it, and disconnect."""
    whole = body(data, lang)
    kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {len(whole)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=300) as client:
        client.sendall(f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\n{kind}".encode())
        if chance.random() < 0.5:
            client.sendall(whole[: chance.randrange(len(whole))])
        else:
            client.sendall(whole)
            time.sleep(chance.uniform(0.0, 3.0))


def bad_file(clip: Clip, chance: random.Random) -> bytes:
    return chance.choice(
        [b"", b"this is no sound", clip.data[: len(clip.data) // 3], os.urandom(5000), b"RIFF" + bytes(100)]
    )


def note_answer(tally: Tally, seconds: float, clip: Clip, status: int, answer: dict, expected: str) -> None:
    with tally.lock:
        if status != 200:
            tally.outcomes["error"] += 1
            tally.errors.append(f"{status}: {answer}")
            return
        tally.latencies.append(seconds)
        tally.audio_seconds += clip.seconds
        tally.outcomes["same text" if answer["text"] == expected else "another text"] += 1


def throughput(options: Options, server: Server, clips: list[Clip], texts: dict[str, str]) -> dict[str, Any]:
    """Send every clip once, distributed over all clients."""
    tally, left = Tally(), list(reversed(clips))

    def client() -> None:
        while True:
            with tally.lock:
                if not left:
                    return
                clip = left.pop()
            begun = time.perf_counter()
            status, answer = ask(server.port, clip.data, options.lang)
            note_answer(tally, time.perf_counter() - begun, clip, status, answer, texts[clip.name])

    seconds = together(client, options.clients)
    return summary(tally, seconds)


def soak(options: Options, server: Server, clips: list[Clip], texts: dict[str, str]) -> dict[str, Any]:
    tally, end = Tally(), time.monotonic() + options.seconds
    memory: list[float] = []
    numbers = iter(range(options.clients))

    def client() -> None:
        with tally.lock:
            chance = random.Random(options.seed * 1000 + next(numbers))
        while time.monotonic() < end:
            clip, kind = chance.choice(clips), chance.random()
            if kind < options.leaving:
                leave(server.port, clip.data, options.lang, chance)
                with tally.lock:
                    tally.outcomes["left"] += 1
            elif kind < options.leaving + options.bad:
                status, answer = ask(server.port, bad_file(clip, chance), options.lang)
                with tally.lock:
                    tally.outcomes[f"bad file: {status}"] += 1
                    if status != 400:
                        tally.errors.append(f"bad file: {status}: {answer}")
            else:
                begun = time.perf_counter()
                status, answer = ask(server.port, clip.data, options.lang)
                note_answer(tally, time.perf_counter() - begun, clip, status, answer, texts[clip.name])

    def watch() -> None:
        while time.monotonic() < end:
            memory.append(server.memory())
            time.sleep(min(1.0, options.seconds / 20))

    watching = threading.Thread(target=watch)
    watching.start()
    seconds = together(client, options.clients)
    watching.join()
    quarter = max(1, len(memory) // 4)
    second, last = np.mean(memory[quarter : 2 * quarter]), np.mean(memory[-quarter:])
    return {
        **summary(tally, seconds),
        "memory_mib": {
            "start": memory[0],
            "second_quarter": float(second),
            "last_quarter": float(last),
            "largest": max(memory),
        },
    }


def together(client: Any, clients: int) -> float:
    """Return the seconds until all clients have finished."""
    threads = [threading.Thread(target=client) for _ in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun


def summary(tally: Tally, seconds: float) -> dict[str, Any]:
    latencies = np.array(tally.latencies or [np.nan])
    return {
        "seconds": seconds,
        "rtfx": tally.audio_seconds / seconds,
        "requests_per_second": len(tally.latencies) / seconds,
        "p50": float(np.percentile(latencies, 50)),
        "p95": float(np.percentile(latencies, 95)),
        "largest": float(latencies.max()),
        "outcomes": dict(tally.outcomes),
        "errors": tally.errors[:20],
    }


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    clips = read_clips(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before, texts = transcribe(options, clips, folder)
        server = Server(options)
        try:
            served = throughput(options, server, clips, texts)
            again, _ = transcribe(options, clips, folder)
            soaked = soak(options, server, clips, texts)
            time.sleep(1.0)
            metrics = server.metrics()
        finally:
            server.close()
    left = {name: metrics[f"canter_{name}"] for name in ("requests_inside", "pieces_waiting", "pieces_inside")}
    result = {
        "model": options.model.name,
        "clips": len(clips),
        "clients": options.clients,
        "threads": options.threads,
        "transcribe_rtfx": [before, again],
        "served": served,
        "served_over_transcribe": served["rtfx"] / ((before + again) / 2),
        "soak": soaked,
        "left_inside": left,
        "cancelled": metrics["canter_cancelled_total"],
        "server_log": server.log[:20],
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if served["errors"] or soaked["errors"] or any(left.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
