"""Compare the emulator of `ranks.py` with real training on two processes, each pinned to a core.

    python benchmarks/ranks_check.py -o FOLDER MANIFEST ... [--steps 80] [--rounds 2] [--json FILE]

First, one pinned process measures a budget. In every round, one pinned process measures a table of (B, T, U) -> seconds
and the spread of repeated steps; then `canter train` runs on two ranks (torchrun, gloo) with `random` and `balanced`.
The emulator gets the micro-batches of these runs and the round's table, and predicts the seconds of each rank. Both
clocks are reported: CPU time, without that of other processes on the core, and wall time, with it. What is finished in
FOLDER is kept.
"""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from ranks import Cluster, StepTimes, emulate

from canter.corpus.index import LengthIndex
from canter.planning import Budget
from canter.planning.metrics import BatchTable

MODEL = shlex.split("""
    --model.encoder-layers 4 --model.decoder-layers 2 --model.width 128 --model.subsampling-channels 32
    --vocab-size 1024 --optimizer.name adamw --precision float32 --threads 1 --workers 0
    --batch-seconds none --loss.ctc-warmup 0 --micro-batches-per-step 2 --device cpu
""")
RANKS = 2
STRATEGIES = ("random", "balanced")
REPEATS = 4  # steps of each shape in a round
WARM = 5  # first steps of a run, which are not compared
CLOCKS = ("cpu", "wall")


@dataclass(frozen=True)
class Options:
    manifests: tyro.conf.Positional[tuple[Path, ...]]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the runs."""
    steps: int = 80
    """Steps of a run."""
    rounds: int = 2
    """Runs of each strategy."""
    memory: float = 0.3
    """GB that a step may use, weights included."""
    probes: int = 40
    """Number of probes of the budget."""
    json: Path | None = None
    """File for the figures."""


# -- in the pinned processes --


def child(what: str, folder: Path, memory: float, probes: int, arguments: list[str]) -> int:
    """Run 'canter ARGUMENTS' on the core of this process's rank; measure steps before the first (what: "probe"), or log
    the seconds of every step."""
    from canter.cli.main import main
    from canter.training.loop import Trainer
    from canter.training.step.gradient import Gradient, TrainingStep

    rank = int(os.environ.get("LOCAL_RANK", 0))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    if what == "probe":
        Trainer.train = lambda self: measure(self, folder, memory, probes)  # type: ignore[method-assign]
        return main(arguments)
    compute, update, began = Gradient.compute, TrainingStep.update, [0.0, 0.0]
    log = (folder / f"rank-{rank}.jsonl").open("w", encoding="utf-8", buffering=1)

    def computing(self: Gradient, *values: Any) -> Any:
        began[:] = time.process_time(), time.perf_counter()
        found = compute(self, *values)
        used = time.process_time() - began[0], time.perf_counter() - began[1]
        log.write(json.dumps({"compute_cpu": used[0], "compute_wall": used[1]}) + "\n")
        return found

    def updating(self: TrainingStep, *values: Any, **named: Any) -> Any:
        started = time.process_time(), time.perf_counter()
        found = update(self, *values, **named)
        used = time.process_time() - started[0], time.perf_counter() - started[1]
        log.write(json.dumps({"update_cpu": used[0], "update_wall": used[1]}) + "\n")
        return found

    Gradient.compute, TrainingStep.update = computing, updating  # type: ignore[method-assign]
    return main(arguments)


def measure(trainer: Any, folder: Path, memory: float, probes: int) -> None:
    """Measure the step of a run in place of its training: the budget at the first call, then the shapes of its probes,
    each `REPEATS` times, in random order."""
    from canter.training.measure import SyntheticStep, make_prober
    from canter.tuning.fit import fit_budget

    if not (folder / "budget.json").exists():
        prober = make_prober(trainer.config, trainer.model, trainer.subject.precision, memory=memory, exact=True)
        prober.clock = time.process_time
        index = LengthIndex.open(trainer.run.folder / "lengths.arrow")
        budget = fit_budget(prober, index, most_probes=probes)
        shapes = [list(probe.shape) for probe in prober.fitting]
        count = sum(p.numel() for p in trainer.model.parameters())
        budget.save(folder / "budget.json")
        (folder / "shapes.json").write_text(json.dumps({"shapes": shapes, "parameters": count}), encoding="utf-8")
        raise SystemExit(0)
    shapes = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))["shapes"]
    step = SyntheticStep(trainer.config, trainer.model, trainer.subject.precision)
    step(*shapes[0])  # makes the optimiser's state
    order = shapes * REPEATS
    random.Random(0).shuffle(order)
    path = trainer.run.folder.parent / "steps.json"
    rows = []
    for shape in order:
        began = time.process_time(), time.perf_counter()
        step(*shape)
        rows.append([*shape, time.process_time() - began[0], time.perf_counter() - began[1]])
    path.write_text(json.dumps(rows), encoding="utf-8")
    raise SystemExit(0)


# -- the comparison --


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        what, folder, memory, probes, arguments = json.loads(sys.argv[2])
        sys.exit(child(what, Path(folder), memory, probes, arguments))
    options = tyro.cli(Options, description=__doc__)
    options.output.mkdir(parents=True, exist_ok=True)
    find_budget(options)
    rows, rounds = [], []
    for number in range(options.rounds):
        table, spread = medians(np.array(timed_steps(options, number)))
        rounds.append({"spread": spread, "table": table})
        for name in STRATEGIES:
            rows.append(compared(options, table, spread["cpu"], name, run(options, name, number)))
    shapes = json.loads((options.output / "shapes.json").read_text(encoding="utf-8"))
    result = {
        "machine": machine(),
        "parameters": shapes["parameters"],
        "errors": errors(rows),
        "runs": rows,
        "rounds": rounds,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, object]:
    from canter.reporting.machine import describe_machine

    return {**describe_machine(), "load": list(os.getloadavg())}


def medians(steps: np.ndarray) -> tuple[list[list[float]], dict[str, float]]:
    """Return the table of median CPU seconds (B, T, U, seconds) of steps (N, 5), and the spread of a shape's steps by
    both clocks: the standard deviation of the logarithm of seconds / their median."""
    shapes, owner = np.unique(steps[:, :3], axis=0, return_inverse=True)
    middle = np.array([np.median(steps[owner == number, 3:], axis=0) for number in range(len(shapes))])
    deviation = np.log(steps[:, 3:] / middle[owner.ravel()]).std(0)
    table = [[*map(int, shape), round(float(cpu), 5)] for shape, (cpu, _) in zip(shapes, middle)]
    return table, {clock: round(float(one), 4) for clock, one in zip(CLOCKS, deviation)}


def errors(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return predicted / measured CPU seconds - 1 of every run, by strategy, and the same of the ratio of paces."""
    found = {
        name: [r["predicted"]["seconds"] / r["cpu"]["seconds"] - 1 for r in rows if r["strategy"] == name]
        for name in STRATEGIES
    }
    paces = {
        kind: [[r[kind]["seconds"] / r["utterances"] for r in rows if r["strategy"] == name] for name in STRATEGIES]
        for kind in ("predicted", *CLOCKS)
    }
    gains = {f"gain, {kind}": [a / b for a, b in zip(*values)] for kind, values in paces.items()}
    return {name: [round(value, 4) for value in values] for name, values in (found | gains).items()}


def start(options: Options, what: str, ranks: int, folder: Path, *more: str) -> None:
    """Run `canter train` on pinned ranks."""
    manifests = [str(path.resolve()) for path in options.manifests]
    arguments = ["train", "--manifest", *manifests, "--output", str(folder), *MODEL, *more]
    base = options.output if what == "probe" else folder.parent
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    given = json.dumps([what, str(base), options.memory * 1e9, options.probes, arguments])
    done = subprocess.run([sys.executable, *launcher, __file__, "--child", given], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


def find_budget(options: Options) -> None:
    """Measure the budget of both strategies, unless an earlier call did."""
    if not (options.output / "budget.json").exists():
        probe(options, options.output / "probed")


def timed_steps(options: Options, number: int) -> list[list[float]]:
    """Return (B, T, U, CPU seconds, wall seconds) of the steps of a round, from an earlier call if there is one."""
    folder = options.output / f"steps-{number}"
    if not (folder / "steps.json").exists():
        probe(options, folder / "run")
    return json.loads((folder / "steps.json").read_text(encoding="utf-8"))


def probe(options: Options, folder: Path) -> None:
    """Measure steps in a pinned process, with the memory allocator as in the runs: the budget says how."""
    shutil.rmtree(folder, ignore_errors=True)
    budget = options.output / "budget.json"
    if not budget.exists():
        budget = options.output / "rough.json"
        Budget.from_batch_seconds(40.0).save(budget)
    start(options, "probe", 1, folder, "--steps", "1", "--budget", str(budget))


def run(options: Options, strategy: str, number: int) -> Path:
    """Return the folder of a real run on two ranks, from an earlier call if it is complete."""
    folder = options.output / f"{strategy}-{number}" / "run"
    if len(read(folder.parent / "rank-0.jsonl")) < 2 * options.steps:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir(parents=True)
        budget = ["--budget", str(options.output / "budget.json"), "--steps", str(options.steps)]
        start(options, "run", RANKS, folder, "--strategy", strategy, *budget, "--seed", str(number))
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def compared(options: Options, table: list[list[float]], jitter: float, strategy: str, folder: Path) -> dict[str, Any]:
    """Return what the emulator predicts of a run's steps, and what was measured."""
    budget = Budget.load(options.output / "budget.json")
    taken = [row["rows"] for row in read(folder / "utterances.jsonl")][WARM:]
    batches = table_of(taken, LengthIndex.open(folder / "lengths.arrow"), budget)
    cluster = Cluster(jitter=jitter)
    predicted = {
        "predicted": emulate(batches, budget, StepTimes.from_table(budget, table), RANKS, cluster, draws=20),
        "predicted by the budget": emulate(batches, budget, StepTimes(budget), RANKS, cluster, draws=20),
    }
    found: dict[str, Any] = {"strategy": strategy, "steps": len(taken), "utterances": int(batches.size.sum())}
    found |= {name: {"seconds": one.seconds, "waiting": one.waiting} for name, one in predicted.items()}
    logs = [read(folder.parent / f"rank-{rank}.jsonl") for rank in range(RANKS)]
    for clock in CLOCKS:  # the wall time of an update has the wait for the other rank in it
        measured = np.array(
            [
                [
                    a[f"compute_{clock}"] + (b["update_cpu"] if clock == "cpu" else 0.0)
                    for a, b in zip(log[::2], log[1::2])
                ]
                for log in logs
            ]
        ).T[WARM:]
        slowest = float(measured.max(1).sum())
        found[clock] = {"seconds": slowest, "waiting": 1 - float(measured.sum()) / (RANKS * slowest)}
    steps = [row for row in read(folder / "metrics.jsonl") if row["kind"] == "train"][WARM:]
    found["wall of complete steps"] = sum(row["seconds"] for row in steps)
    found["wait for data"] = sum(row["data_wait_seconds"] for row in steps)
    return json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 4))


def table_of(steps: list[list[list[int]]], index: LengthIndex, budget: Budget) -> BatchTable:
    """Return the table of the micro-batches of steps, each a list of rows for each micro-batch."""
    batches = [np.array(rows) for step in steps for rows in step]
    frames = [budget.frames(np.asarray(index.seconds[rows], np.float64)) for rows in batches]
    tokens = [np.asarray(index.tokens[rows]).astype(np.int64) for rows in batches]
    return BatchTable(
        size=np.array([len(rows) for rows in batches]),
        frames=np.array([values.max() for values in frames]),
        tokens=np.array([values.max() for values in tokens]),
        own_frames=np.array([values.sum() for values in frames]),
        own_tokens=np.array([values.sum() for values in tokens]),
        own_seconds=np.array([budget.utterance_seconds(t, u).sum() for t, u in zip(frames, tokens)]),
        audio_seconds=np.array([float(index.seconds[rows].sum()) for rows in batches]),
        steps=np.cumsum([0] + [len(step) for step in steps]),
    )


if __name__ == "__main__":
    main()
