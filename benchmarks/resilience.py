"""Training that is hard to kill, at full size: SIGKILL at random points, broken audio, fuzzed manifests.

    python benchmarks/resilience.py kills  -o FOLDER [--trials 50] [--ranks 1] [--json FILE]
    python benchmarks/resilience.py broken -o FOLDER [--files 1000] [--json FILE]
    python benchmarks/resilience.py fuzz   -o FOLDER [--manifests 10000] [--json FILE]

kills: a run is killed again and again, at least a fifth of the times while a checkpoint is being written, and started
anew until it is through; its losses, rows and weights must be those of an undisturbed run to the last bit. broken: one
file in twenty is broken, in eight ways; the run must complete and name each. fuzz: manifests mutated at random go
through the reader that 'canter index' and 'canter train' share; anything but rows, problems or a CanterError fails.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import soundfile
import torch
import tyro
from safetensors.torch import load_file

from canter.corpus.manifest import write_manifest
from canter.corpus.sources import open_source
from canter.corpus.synthesis import synthesise
from canter.errors import CanterError
from canter.planning.budget import Budget

MODEL = shlex.split("""
    --model.encoder-layers 2 --model.decoder-layers 1 --model.width 64 --model.heads 4 --model.mels 40
    --model.subsampling-channels 8 --vocabulary 200 --precision float32 --threads 1 --batch-seconds 16
""")


@dataclass(frozen=True)
class Options:
    what: tyro.conf.Positional[Literal["kills", "broken", "fuzz"]]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for corpus and runs."""
    trials: int = 50
    """Kills."""
    ranks: int = 1
    """Processes of the killed run."""
    steps: int = 400
    """Of the killed run."""
    files: int = 1000
    """Of which one in twenty is broken."""
    manifests: int = 10_000
    """Fuzzed."""
    seed: int = 0
    json: Path | None = None
    """File for the figures."""


# -- kills --


def command(options: Options, corpus: Any, folder: Path, ranks: int, *more: str) -> list[str]:
    budget = options.output / "budget.json"
    if not budget.exists():
        Budget.from_batch_seconds(60.0).save(budget)
    start = [sys.executable, "-m", "canter"]
    if ranks > 1:
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            "-m",
            "canter",
        ]
    files = ["--manifest", str(corpus.train_manifest), "--output", str(folder), "--budget", str(budget)]
    return [*start, "train", *files, *MODEL, *more]


def in_the_middle_of_a_checkpoint(folder: Path) -> bool:
    return any(folder.glob("checkpoints/.step-*"))


def kills(options: Options) -> dict[str, Any]:
    corpus = synthesise(options.output / "corpus", utterances=200, test_utterances=6)
    every = 10
    more = [
        "--steps",
        str(options.steps),
        "--valid-every",
        str(every),
        "--workers",
        "1",
        "--track",
        "tensorboard",
    ]
    more += ["--micro-batches-per-step", str(options.ranks)]
    straight, killed = options.output / "straight", options.output / "killed"
    for folder in (straight, killed):
        shutil.rmtree(folder, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        command(options, corpus, straight, options.ranks, *more),
        env=environment,
        check=True,
        capture_output=True,
    )
    draw = random.Random(options.seed)
    taken, redone, writing, outputs = 0, [], 0, []
    trial = 0
    while True:
        last = last_step(killed)
        with subprocess.Popen(
            command(options, corpus, killed, options.ranks, *more),
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            if trial < options.trials:
                # where a run stands when it is killed decides how much is left for the other trials
                goal = options.steps * (trial + 1) // (options.trials + 1)
                aim_at_writing = trial % 4 == 0
                while process.poll() is None:
                    there = last_step(killed) >= goal
                    if there and (not aim_at_writing or in_the_middle_of_a_checkpoint(killed)):
                        break
                    time.sleep(0.0005 if there else 0.01)
                if not aim_at_writing:
                    time.sleep(draw.random() * 0.2)
                writing += in_the_middle_of_a_checkpoint(killed)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    taken += 1
            said = process.communicate()[1]
        if trial and last:
            redone.append(last - (resumed_at(said) or 0))
        outputs.append(said)
        trial += 1
        if process.returncode == 0:
            break
        if trial > options.trials + 5:
            raise SystemExit(f"the run does not come to its end:\n{said}")
    a, b = (steps_of(folder) for folder in (straight, killed))
    ours, theirs = (load_file(newest(folder) / "model.safetensors") for folder in (killed, straight))
    return {
        "kills": taken,
        "while_a_checkpoint_was_written": writing,
        "steps": options.steps,
        "interval": every,
        "losses_identical": [row[1] for row in a] == [row[1] for row in b],
        "utterances_identical": [row[0] for row in a] == [row[0] for row in b],
        "weights_identical": all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()),
        "torn_checkpoints_loaded": sum("is damaged" in said or "Traceback" in said for said in outputs),
        "steps_redone_at_most": max(redone, default=0),
    }


def last_step(folder: Path) -> int:
    rows = lines(folder / "metrics.jsonl")
    return max((row["step"] for row in rows), default=0)


def lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def resumed_at(said: str) -> int | None:
    found = [line.split() for line in said.splitlines() if line.startswith("continuing at step")]
    return int(found[-1][3]) if found else None


def steps_of(folder: Path) -> list[tuple[Any, float]]:
    used = {row["step"]: row["rows"] for row in lines(folder / "utterances.jsonl")}
    return [(used[r["step"]], r["loss"]) for r in lines(folder / "metrics.jsonl") if r["kind"] == "train"]


def newest(folder: Path) -> Path:
    return sorted(folder.glob("checkpoints/step-*"))[-1]


# -- broken audio --


def harms(folder: Path) -> dict[str, Any]:
    """Eight ways to break an audio file of (samples, rate); each returns the path that the manifest then names."""

    def write(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
        soundfile.write(path, samples, rate)
        return path

    def cut(path: Path, samples: np.ndarray) -> Path:
        write(path, samples)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 3])
        return path

    def missing(path: Path, samples: np.ndarray) -> Path:
        return path

    def empty(path: Path, samples: np.ndarray) -> Path:
        path.write_bytes(b"")
        return path

    def noise(path: Path, samples: np.ndarray) -> Path:
        path.write_bytes(np.random.default_rng(0).bytes(4000))
        return path

    def silent(path: Path, samples: np.ndarray) -> Path:
        return write(path, np.zeros_like(samples))

    def wrong_rate(path: Path, samples: np.ndarray) -> Path:
        return write(path, samples, 8000)  # so it lasts twice as long as the manifest says

    def wrong_duration(path: Path, samples: np.ndarray) -> Path:
        return write(path, samples[: len(samples) // 2])

    def not_finite(path: Path, samples: np.ndarray) -> Path:
        bad = samples.astype(np.float32)
        bad[len(bad) // 2] = np.nan
        soundfile.write(path, bad, 16000, subtype="FLOAT")
        return path

    return {
        f.__name__: f for f in (cut, missing, empty, noise, silent, wrong_rate, wrong_duration, not_finite)
    }


def broken(options: Options) -> dict[str, Any]:
    corpus = synthesise(options.output / "corpus", utterances=options.files, test_utterances=6)
    folder = options.output / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = [json.loads(line) for line in corpus.train_manifest.read_text(encoding="utf-8").splitlines()]
    ways = list(harms(folder).items())
    told: dict[str, str] = {}
    for number, row in enumerate(rows):
        source = corpus.train_manifest.parent / row["audio_filepath"]
        row["audio_filepath"] = str(source)
        if number % 20 == 7:
            name, harm = ways[len(told) % len(ways)]
            samples, _ = soundfile.read(source)
            row["audio_filepath"] = str(harm(folder / f"{number}-{name}.wav", samples))
            told[row["audio_filepath"]] = name
    write_manifest(folder / "train.jsonl", rows)
    run = folder / "run"
    arguments = [
        "--manifest",
        str(folder / "train.jsonl"),
        "--epochs",
        "1",
        "--workers",
        "1",
        "--valid-every",
        "1000",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "canter", "train", "--output", str(run), *MODEL, *arguments],
        capture_output=True,
        text=True,
    )
    named = {row["file"]: row["reason"] for row in lines(run / "skipped.jsonl")}
    named |= {row["file"]: row["reason"] for row in lines(run / "lengths.skipped.jsonl")}
    found = {name: 0 for name, _ in ways}
    for path, name in told.items():
        found[name] += path in named
    used = sum(row["utterances"] for row in lines(run / "metrics.jsonl") if row["kind"] == "train")
    return {
        "files": len(rows),
        "broken": len(told),
        "completed": done.returncode == 0,
        "traceback": "Traceback" in done.stderr,
        "named": sum(path in named for path in told),
        "named_by_way": found,
        "named_though_sound": len(named.keys() - told.keys()),
        "trained_on": used,
        "examples": {
            name: next((named[p] for p in told if told[p] == name and p in named), "") for name, _ in ways
        },
    }


# -- fuzzed manifests --

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "é\u0000",
    [],
    {},
    [1],
    "1.5",
]
KEYS = [
    "audio_filepath",
    "duration",
    "text",
    "offset",
    "lang",
    "source_lang",
    "target_lang",
    "taskname",
    "pnc",
    "_skipme",
]


def mutated(draw: random.Random, row: dict[str, Any]) -> bytes:
    """A manifest of a few lines, spoilt in its values, its keys or its bytes."""
    written = []
    for _ in range(draw.randint(1, 4)):
        one = dict(row)
        for _ in range(draw.randint(0, 3)):
            how = draw.random()
            key = draw.choice(KEYS)
            if how < 0.6:
                one[key] = draw.choice(VALUES)
            elif how < 0.8:
                one.pop(key, None)
            else:
                one[draw.choice(["", "Text", "audio", "\ud800"])] = draw.choice(VALUES)
        written.append(json.dumps(one).encode())
    content = bytearray(b"\n".join(written))
    for _ in range(draw.choice([0, 0, 0, 1, 5, 50])):
        place = draw.randrange(len(content))
        harm = draw.random()
        if harm < 0.5:
            content[place] = draw.randrange(256)
        elif harm < 0.8:
            del content[place : place + draw.randint(1, 20)]
        else:
            content[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 8)))
        if not content:
            break
    return bytes(content)


def fuzz(options: Options) -> dict[str, Any]:
    corpus = synthesise(options.output / "corpus", utterances=40, test_utterances=6)
    row = json.loads(corpus.train_manifest.read_text(encoding="utf-8").splitlines()[0])
    row["audio_filepath"] = str(corpus.train_manifest.parent / row["audio_filepath"])
    draw = random.Random(options.seed)
    path = options.output / "fuzzed.jsonl"
    counts = {"manifests": options.manifests, "rows": 0, "problems": 0, "refused": 0}
    failures: list[str] = []
    for _ in range(options.manifests):
        content = mutated(draw, row)
        path.write_bytes(content)
        try:
            for found in open_source(path):
                counts["problems" if hasattr(found, "reason") else "rows"] += 1
        except CanterError:
            counts["refused"] += 1
        except Exception:
            failures.append(f"{content[:300]!r}\n{traceback.format_exc(limit=-3)}")
    return counts | {"tracebacks": len(failures), "first": failures[:3]}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    result = {"kills": kills, "broken": broken, "fuzz": fuzz}[options.what](options)
    result["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
