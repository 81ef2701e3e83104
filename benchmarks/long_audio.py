"""Measure the memory of an hour of audio: in the service, in `canter transcribe`, and in Python with file and array.

Each way runs in a process of its own on a short clip and on the hour; the difference of their peaks is what the length
costs. The service gets the hour several times, alone and at once. The audio is LibriVox's clips one after another; the
model is small and random, so that an hour takes a minute, unless one is given.

    CANTER_SHARED=... python benchmarks/long_audio.py [MODEL] [--minutes 60] [--json FILE]
"""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import soundfile
import tyro

SHARED = Path(os.environ.get("CANTER_SHARED", "."))
RATE = 16000
BOUNDARY = "canter-benchmark"
MIB = 2**20


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path | None] = None
    """Model folder (default: a small random one)."""
    manifest: Path = SHARED / "data/speech/librivox_mini/manifest.jsonl"
    """Manifest of the audio that is repeated."""
    minutes: float = 60.0
    """Length of the long audio."""
    at_once: int = 2
    """Number of long uploads at the same time."""
    again: int = 4
    """Number of repetitions of the long upload."""
    most_mib: float = 300.0
    """Exit with status 1 where the hour takes more MiB than this."""
    json: Path | None = None
    """Write the figures to this file."""


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or random_model(folder / "random")
        short, long = (audio(options, folder / f"{m:g}.flac", 60 * m) for m in (1.0, options.minutes))
        figures: dict[str, dict[str, float]] = {"serve": served(model, short, long, options)}
        for way in ("transcribe", "python file", "python array"):
            before, peak = (peak_of(way, model, file, folder) for file in (short, long))
            given = 60 * (options.minutes - 1) * RATE * 4 / MIB if way == "python array" else 0.0  # by the caller
            figures[way] = {"minute": before, "hour": peak, "given": given, "above": peak - before - given}
            print(f"{way}: {figures[way]}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"minutes": options.minutes, **figures}, indent=2) + "\n")
    return 0 if max(one["above"] for one in figures.values()) < options.most_mib else 1


def random_model(folder: Path) -> Path:
    """Write a model of Canary's kind, whose decoder stops after a few tokens, and return its folder."""
    import torch

    from canter.models.decoder import DecoderConfig
    from canter.models.fastconformer import FastConformerConfig
    from canter.models.features import FeatureConfig
    from canter.models.formats.checkpoint import save_model
    from canter.models.model import ModelConfig, SpeechModel
    from canter.text import train_tokenizer

    tokenizer = train_tokenizer(["one two three", "four five"] * 20, languages=["en"], vocab_size=30)
    torch.manual_seed(0)
    encoder = FastConformerConfig(layers=1, width=32, heads=2, feedforward=64, subsampling_channels=8, mels=80)
    decoder = DecoderConfig(layers=1, width=32, heads=2, feedforward=64, vocabulary=tokenizer.vocab_size, positions=512)
    model = SpeechModel(ModelConfig(FeatureConfig(mels=80), encoder, decoder)).eval()
    with torch.no_grad():
        model.decoder.head_bias[tokenizer.end] = 5.0
    return save_model(model, folder, tokenizer)


def audio(options: Options, path: Path, seconds: float) -> Path:
    """Write ``seconds`` seconds of the manifest's clips in sequence, and return the path."""
    files = [
        options.manifest.parent / json.loads(line)["audio_filepath"]
        for line in options.manifest.read_text(encoding="utf-8").splitlines()
    ]
    clips = [soundfile.read(file, dtype="int16")[0] for file in files]
    left = round(seconds * RATE)
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as target:
        while left:
            for clip in clips:
                target.write(clip[:left])
                left -= min(left, len(clip))
    return path


def environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "2", **os.environ}


def status(process: int, name: str) -> float:
    """Return a figure of the process's memory in MiB."""
    text = Path(f"/proc/{process}/status").read_text()
    found = re.search(rf"{name}:\s+(\d+)", text)
    return int(found[1]) / 1024 if found else float("nan")


def served(model: Path, short: Path, long: Path, options: Options) -> dict[str, float]:
    """Return the MiB of the service after a minute of audio, and their maximum during the long uploads."""
    process = subprocess.Popen(
        [sys.executable, "-m", "canter", "serve", str(model), "--port", "0", "--timeout", "3600"],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"http://[^:]+:(\d+)/", line)
        if not found:
            sys.exit(line + process.stderr.read())
        port = int(found[1])
        post(port, short)
        figures = {"minute": status(process.pid, "VmRSS")}
        rounds = [("hour", 1), ("at_once", options.at_once)]
        for name, clients in [*rounds, *((f"again_{n}", 1) for n in range(1, options.again + 1))]:
            figures[name], seconds = watched(process.pid, port, long, clients)
            print(f"serve, {name}: {figures[name]:.0f} MiB, {seconds:.0f} s", flush=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        process.stderr.close()
    return figures | {"above": figures["hour"] - figures["minute"]}


def watched(process: int, port: int, file: Path, clients: int) -> tuple[float, float]:
    """Return the maximum MiB, sampled every 20 ms while the clients wait, and the seconds of waiting."""
    threads = [threading.Thread(target=post, args=(port, file)) for _ in range(clients)]
    begun, most = time.perf_counter(), 0.0
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, status(process, "VmRSS"))
        time.sleep(0.02)
    return most, time.perf_counter() - begun


def post(port: int, file: Path) -> None:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{file.name}"\r\n\r\n'
    body = head.encode() + file.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    connection.request(
        "POST", "/v1/audio/transcriptions", body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    )
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status != 200:
        sys.exit(f"{answer.status}: {text[:500]!r}")


def peak_of(way: str, model: Path, file: Path, folder: Path) -> float:
    """Return the peak of a process in MiB."""
    code = "from canter.cli.main import main; import sys; assert main(sys.argv[1:]) == 0"
    arguments = ["transcribe", str(model), str(file), "-o", str(folder / "out.txt")]
    if way != "transcribe":
        read = "path" if way == "python file" else "soundfile.read(path, dtype='float32')[0]"
        code = "import sys, soundfile, canter; model, path = sys.argv[1:]; "
        code += f"canter.load(model).transcribe({read})"
        arguments = [str(model), str(file)]
    code += "\nprint(open('/proc/self/status').read(), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True)
    found = re.search(r"VmHWM:\s+(\d+)", done.stderr)
    if done.returncode or not found:
        sys.exit(done.stderr)
    return int(found[1]) / 1024


if __name__ == "__main__":
    sys.exit(main())
