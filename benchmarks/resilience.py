"""Test training at full size with SIGKILL at random points and broken audio.

    python benchmarks/resilience.py kills  -o FOLDER [--trials 50] [--ranks 1] [--minutes 10] [--json FILE]
    python benchmarks/resilience.py broken -o FOLDER [--files 1000] [--json FILE]

kills: a run is killed repeatedly, every other time while a checkpoint is being written, one time in ten while it
starts, and restarted until it finishes; its losses, rows and weights, and every checkpoint present after a kill, must
be bit-identical to those of an undisturbed run. With several ranks one of them is killed, and the others must end by
themselves. After --minutes it stops, and the same command resumes. broken: one file in twenty is broken, in eight ways;
the run must complete and name each. --json FILE gets the figures under the part's name; those of other parts are kept.
fuzzing.py tests damaged and hostile input of every kind.
"""

import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import soundfile
import torch
import tyro

from canter.corpus.manifest import write_manifest
from canter.demo.synthesis import synthesise
from canter.planning.budget import Budget

MODEL = shlex.split("""
    --model.encoder-layers 2 --model.decoder-layers 1 --model.width 64 --model.heads 4 --model.mels 40
    --model.subsampling-channels 8 --vocab-size 200 --precision float32 --threads 1 --batch-seconds 16
""")
SAME = ("model.safetensors", "training/optimizers.pt")  # of a checkpoint; state.json has the time spent
STARTING = 8.0  # seconds from its start in which a run is killed that is to be killed while it starts
WRITING = 0.03  # seconds, about, that a checkpoint takes to be written
INTERVAL = 10  # steps


@dataclass(frozen=True)
class Options:
    what: tyro.conf.Positional[Literal["kills", "broken"]]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for corpus and runs."""
    trials: int = 50
    """Number of kills."""
    ranks: int = 1
    """Processes of the killed run."""
    steps: int = 500
    """Steps of the killed run."""
    minutes: float = 10.0
    """Time after which this call begins no other kill."""
    files: int = 1000
    """Number of audio files, of which one in twenty is broken."""
    seed: int = 0
    json: Path | None = None
    """File for the figures."""


# -- kills --


def command(ranks: int, manifest: Path, folder: Path, *more: str) -> list[str]:
    """Return the command of a training run of MODEL, under torchrun where there are several ranks."""
    start = [sys.executable, "-m"]
    start += ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    budget = folder.parent / "budget.json"
    if not budget.exists():
        Budget.from_batch_seconds(60.0).save(budget)
    files = ["--manifest", str(manifest), "--output", str(folder), "--budget", str(budget)]
    return [*start, "canter", "train", *files, *MODEL, *more]


def kills(options: Options) -> dict[str, Any] | None:
    began = time.monotonic()
    corpus = synthesise(options.output / "corpus", utterances=200, test_utterances=6, workers=1)
    straight, killed, journal = (options.output / name for name in ("straight", "killed", "kills.jsonl"))
    more = ["--steps", str(options.steps), "--save-every", str(INTERVAL), "--workers", "1"]
    more += ["--micro-batches-per-step", str(options.ranks)]
    if not journal.exists():
        for folder in (straight, killed):
            shutil.rmtree(folder, ignore_errors=True)
        through = command(options.ranks, corpus.train_manifest, straight, *more, "--keep-checkpoints", "100000")
        subprocess.run(through, check=True, capture_output=True)
        journal.touch()
    draw = random.Random(options.seed)
    goals = sorted(draw.sample(range(1, options.steps), options.trials))
    while (trial := len(lines(journal))) < options.trials:
        if time.monotonic() - began > 60 * options.minutes:
            print(f"{trial} of {options.trials} kills; the same command goes on")
            return None
        way = "starting" if trial % 10 == 4 else "writing" if trial % 2 else "training"
        draw = random.Random(options.seed + trial)
        found = one_kill(command(options.ranks, corpus.train_manifest, killed, *more), killed, goals[trial], way, draw)
        found["differing"] = differing(killed, straight)
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        if found["traceback"]:
            raise SystemExit(found["said"])
    done = subprocess.run(command(options.ranks, corpus.train_manifest, killed, *more), capture_output=True, text=True)
    rows = [*lines(journal), {"resumed": resumed_at(done.stderr)}]
    redone = [a["last"] - b["resumed"] for a, b in itertools.pairwise(rows) if b["resumed"] is not None]
    a, b = (steps_of(folder) for folder in (straight, killed))
    return {
        "kills": len(rows) - 1,
        "ranks": options.ranks,
        "while_a_checkpoint_was_written": sum(row["writing"] for row in rows[:-1]),
        "while_starting": sum(row["way"] == "starting" for row in rows[:-1]),
        "steps": options.steps,
        "interval": INTERVAL,
        "completed": done.returncode == 0 and len(a) == options.steps,
        "losses_identical": [row[1] for row in a] == [row[1] for row in b],
        "utterances_identical": [row[0] for row in a] == [row[0] for row in b],
        "weights_identical": newest(killed).name == newest(straight).name and not differing(killed, straight),
        "checkpoints_after_kills_that_differ": sum(len(row["differing"]) for row in rows[:-1]),
        "checkpoints_found_damaged": sum("is damaged" in row["said"] for row in rows[:-1]),
        "steps_redone_at_most": max(redone),
        "steps_redone": sum(redone),
        **({} if options.ranks == 1 else ends_of_others(rows[:-1])),
    }


def ends_of_others(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seconds_until_the_others_ended": [round(row["seconds_to_end"], 1) for row in rows],
        "others_said_why": sum("another rank was lost" in row["said"] or "sign of life" in row["said"] for row in rows),
    }


def one_kill(run: list[str], folder: Path, goal: int, way: str, draw: random.Random) -> dict[str, Any]:
    """Start the run, kill it in the given ``way`` ("training": at a random moment after step ``goal``), and return the
    result."""
    since = time.time()
    with subprocess.Popen(
        run, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        if way == "starting":
            time.sleep(draw.random() * STARTING)
        else:
            while process.poll() is None and reached(folder, since) < goal:
                time.sleep(0.01)
            while way == "writing" and process.poll() is None and not half_written(folder):
                time.sleep(0.0005)
            time.sleep(draw.random() * (WRITING if way == "writing" else 0.5))
        ranks = children(process.pid) if "--nproc-per-node" in run else []
        victim = draw.choice(ranks) if ranks and way != "writing" else min(ranks, default=process.pid)
        os.kill(victim, signal.SIGKILL)
        at = time.monotonic()
        said = process.communicate()[1]
    return {
        "way": way,
        "last": last_step(folder),
        "resumed": resumed_at(said),
        "writing": half_written(folder),
        "seconds_to_end": time.monotonic() - at,
        # torchrun itself ends by one, and so does Python's fork server whose order for a worker breaks off
        "traceback": "Traceback" in said and "in _serve_one" not in said and not ranks,
        "said": said[-3000:],
    }


def children(pid: int) -> list[int]:
    """Return the ids of the processes that ``pid`` has started, oldest first; those of torchrun are the ranks."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def half_written(folder: Path) -> bool:
    return any(folder.glob("checkpoints/.step-*.partial"))


def reached(folder: Path, since: float) -> int:
    """Return the last step logged since then."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 3000))
        tail = file.read().splitlines()
    for line in reversed(tail):
        try:
            row = json.loads(line)
            return row["step"] if row["time"] > since else 0
        except ValueError:  # torn, or begun before the tail
            continue
    return 0


def last_step(folder: Path) -> int:
    return max((row["step"] for row in lines(folder / "metrics.jsonl")), default=0)


def differing(folder: Path, other: Path) -> list[str]:
    """Return the checkpoint files whose tensors are not bit-identical to those of the undisturbed run."""
    return [
        f"{checkpoint.name}/{name}"
        for checkpoint in folder.glob("checkpoints/step-*")
        for name in SAME
        if not same(checkpoint / name, other / "checkpoints" / checkpoint.name / name)
    ]


def same(one: Path, other: Path) -> bool:
    """Return True where two files hold the same tensors; other members of an archive may differ."""
    if one.read_bytes() == other.read_bytes():
        return True
    return one.suffix == ".pt" and equal(torch.load(one), torch.load(other))


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, up to a torn one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def resumed_at(said: str) -> int | None:
    """Return the step at which a run resumed; 0 for one that began, None for one that ended before."""
    found = [line.split() for line in said.splitlines() if line.startswith("continuing at step")]
    if found:
        return int(found[-1][3])
    return 0 if "minutes by the budget" in said else None


def steps_of(folder: Path) -> list[tuple[Any, float]]:
    """Return (rows, loss) of each step."""
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

    return {f.__name__: f for f in (cut, missing, empty, noise, silent, wrong_rate, wrong_duration, not_finite)}


def broken(options: Options) -> dict[str, Any]:
    corpus = synthesise(options.output / "corpus", utterances=options.files, test_utterances=6, workers=1)
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
    more = ["--epochs", "1", "--workers", "1", "--valid-every", "1000"]
    done = subprocess.run(command(1, folder / "train.jsonl", run, *more), capture_output=True, text=True)
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
            name: next((named[p] for p in told if told[p] == name and p in named), "").replace(f"{folder}/", "")
            for name, _ in ways
        },
    }


# -- figures --


def keep(result: dict[str, Any], name: str, file: Path | None) -> None:
    """Print the figures, and write them beside those of other parts."""
    print(json.dumps(result, indent=2, ensure_ascii=False))
    if file:
        parts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        parts[name] = result
        file.write_text(json.dumps(parts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if options.what == "kills":
        result = kills(options)
    else:
        result = broken(options)
        result["seconds"] = round(time.perf_counter() - start, 1)
    if result is not None:
        name = f"kills, ranks: {options.ranks}" if options.what == "kills" else options.what
        keep(result, name, options.json)


if __name__ == "__main__":
    main()
