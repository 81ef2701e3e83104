"""What a budget is worth on a CPU: predictions against fresh processes, `search` against `fit`, an epoch under a cap.

    python benchmarks/budget.py predict MODEL LENGTHS [--count 50] [--limit 2GiB] [--json FILE]
    python benchmarks/budget.py methods MODEL LENGTHS [--limit 1GiB] [--json FILE]
    python benchmarks/budget.py epoch   MODEL LENGTHS [--limit 2GiB] [--count 200] [--json FILE]

MODEL is a checkpoint, or `small`: Canter's model of the size that `canter train` makes unless told otherwise.
Whisper is measured at its utterances' lengths (no padding to 30 s). Memory is a fresh process's: it makes model and
optimiser state, takes a small step, rests, runs the shape twice, and tells its peak resident memory (VmHWM) above its
resting level, weights and optimiser state added. Beside it: the bytes of the tensors alive, and what glibc takes where
its heap is left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from canter.cli.lengths import open_lengths
from canter.corpus.index import LengthIndex
from canter.models.checkpoint import load_model
from canter.models.model import SpeechModel
from canter.planning import Budget, Plan
from canter.planning.lengths import Lengths
from canter.planning.strategies import Bucket2D
from canter.planning.strategies.bucket_2d import batch_sizes
from canter.training.config import OptimizerConfig, TrainConfig
from canter.training.measure import training_step
from canter.training.prepare import model_config
from canter.tuning.fit import measure_budget, within
from canter.tuning.memory import LiveBytes, give_back, is_out_of_memory, resident, steady_heap
from canter.tuning.probe import Prober, TrainingStep
from canter.tuning.search import search
from canter.tuning.simulate import Simulator, parse_bytes


def make_model(name: str) -> SpeechModel:
    torch.manual_seed(0)
    if name != "small":
        model = load_model(name)
        if hasattr(model.config.features, "pad_seconds"):
            model.set_features(pad_seconds=0.0)
        return model
    sizes = type("Sizes", (), {"vocab_size": 512, "pad": 0, "size": 30})()
    return SpeechModel(model_config(TrainConfig(), sizes, sizes))  # type: ignore[arg-type]


def make_step(model: Any, copied: bool = False) -> TrainingStep:
    config = TrainConfig(optimizer=OptimizerConfig(name="adamw"))
    return training_step(config, model, "float32", 1, copied=copied)


def limits_of(name: str) -> tuple[float, int]:
    return (30.0, 448) if name != "small" else (40.0, 512)


def lengths(args: argparse.Namespace) -> LengthIndex:
    return within(open_lengths(args.lengths), *limits_of(args.model))


def fitted(args: argparse.Namespace, index: LengthIndex) -> tuple[Budget, Prober, float]:
    steady_heap()
    prober = Prober(make_step(make_model(args.model)), parse_bytes(args.limit))
    began = time.perf_counter()
    budget = measure_budget(prober, index, make_model(args.model).frame_seconds, say=print)
    return budget, prober, time.perf_counter() - began


# -- a fresh process --


def child(name: str, shapes: list[list[int]], cap: float, heap: bool) -> None:
    """Prints a line for each shape: peak resident bytes, seconds, the tensors' bytes. Runs in a process of its own."""
    if heap:
        steady_heap()
    torch.set_num_threads(1)
    step = make_step(make_model(name))
    step(
        1, *shapes[0][1:]
    )  # makes the optimiser's state, and loads about 100 MB of libraries that are no tensors
    give_back()
    rest = resident() - step.state_bytes
    if cap:
        held = resident("VmData") - step.state_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (int(held + cap), resource.RLIM_INFINITY))
    for shape in shapes:
        give_back()
        Path("/proc/self/clear_refs").write_text("5")
        try:
            times = []
            for _ in range(1 if cap else 2):
                began = time.perf_counter()
                step(*shape)
                times.append(time.perf_counter() - began)
            peak = resident("VmHWM") - rest
            tensors = 0
            if not cap:
                with LiveBytes() as count:
                    step(*shape)
                tensors = step.state_bytes + count.peak
            print(json.dumps([peak, min(times), tensors]), flush=True)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            step.clear()
            print(json.dumps([None, None, None]), flush=True)


def fresh(name: str, shapes: list[list[int]], cap: float = 0.0, heap: bool = True) -> list[list]:
    command = [sys.executable, __file__, "child", name, json.dumps(shapes), str(cap), str(int(heap))]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if len(lines) < len(shapes) and not cap:
        raise RuntimeError(done.stderr[-2000:])
    return lines + [[None, None, None]] * (len(shapes) - len(lines))


# -- what is shown --


def predict(args: argparse.Namespace) -> dict:
    """Unseen shapes: T and U of random utterances, B at random up to what fits; a process for each."""
    index = lengths(args)
    budget, prober, seconds = fitted(args, index)
    rng = np.random.default_rng(1)
    shapes: list[list[int]] = []
    while len(shapes) < args.count:
        row = int(rng.integers(len(index)))
        t, u = int(budget.frames(index.seconds[row])), max(2, int(index.tokens[row]))
        most = budget.max_batch(t, u)
        shape = [max(1, int(most ** rng.uniform(0.0, 1.0))), t, u]
        if most and tuple(shape) not in prober.known:
            shapes.append(shape)
    rows = []
    for shape in shapes:  # interleaved in time: one process after another, shapes in random order
        [[peak, took, tensors]] = fresh(args.model, [shape])
        [[loose, _, _]] = fresh(args.model, [shape], heap=False)
        rows.append(
            {
                "shape": shape,
                "predicted": budget.bytes(*shape),
                "measured": peak,
                "measured_glibc_default": loose,
                "tensors": tensors,
                "predicted_seconds": budget.step_seconds(*shape),
                "seconds": took,
            }
        )
    simulator = Simulator(make_model(args.model), make_step, prober.limit_bytes)
    simulated = [simulator(*row["shape"]).bytes / row["tensors"] - 1 for row in rows[:10]]
    memory = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    loose = [row["measured_glibc_default"] / row["measured"] - 1 for row in rows]
    times = [abs(row["predicted_seconds"] / row["seconds"] - 1) for row in rows]
    return {
        "fit_steps": prober.steps,
        "fit_seconds": seconds,
        "memory_error_median": statistics.median(memory),
        "memory_error_worst": max(memory),
        "time_error_median": statistics.median(times),
        "time_error_worst": max(times),
        "glibc_default_takes_more_median": statistics.median(loose),
        "glibc_default_takes_more_worst": max(loose),
        "simulated_tensors_error_worst": max(map(abs, simulated)),
        "rows": rows,
    }


def methods(args: argparse.Namespace) -> dict:
    """`search` and `fit` on the same 60 buckets, under the same limit."""
    index = lengths(args)
    budget, prober, seconds = fitted(args, index)
    bins = Bucket2D(30, 2).bins(index, budget)
    corners = [(int(budget.frames(s)), max(2, u)) for s, u in bins.edges]
    searching = Prober(make_step(make_model(args.model)), parse_bytes(args.limit))
    began = time.perf_counter()
    found = search(
        searching, bins, budget.frame_seconds, told=lambda d, n: print(f"bucket {d} of {n}", file=sys.stderr)
    )
    spent = time.perf_counter() - began
    bucket = bins.assign(Lengths.of(index, slice(None), budget))
    counts = np.bincount(bucket, minlength=len(bins))

    def row(name: str, sizes: np.ndarray, steps: int, events: int, wall: float) -> dict:
        batches = counts / np.maximum(1, sizes)
        filled = np.array([budget.bytes(int(b), *c) for b, c in zip(sizes, corners)]) / parse_bytes(
            args.limit
        )
        return {
            "method": name,
            "steps": steps,
            "out_of_memory": events,
            "seconds": wall,
            "mean_batch": float(counts.sum() / batches.sum()),
            "memory_filled": float((filled * batches).sum() / batches.sum()),
            "over_limit": int((filled > 1).sum()),
        }

    return {
        "buckets": len(bins),
        "rows": [
            row("search", found.sizes, found.steps, found.out_of_memory, spent),
            row("fit", batch_sizes(bins, budget), prober.steps, prober.out_of_memory, seconds),
        ],
    }


def epoch(args: argparse.Namespace) -> dict:
    """The largest batches of an epoch planned with the budget, in processes whose memory is capped at the limit."""
    index = lengths(args)
    budget, _, _ = fitted(args, index)
    shapes = []
    for step in Plan(index, budget):
        for rows in step:
            t, u = int(budget.frames(index.seconds[rows].max())), int(index.tokens[rows].max())
            shapes.append([len(rows), t, max(2, u)])
    shapes.sort(key=lambda shape: -float(budget.bytes(*shape)))
    shapes = shapes[: args.count]
    results = []
    for start in range(0, len(shapes), 20):
        results += fresh(args.model, shapes[start : start + 20], cap=parse_bytes(args.limit))
    peaks = [peak for peak, _, _ in results if peak]
    return {
        "batches": len(shapes),
        "out_of_memory": sum(peak is None for peak, _, _ in results),
        "largest_peak_of_limit": max(peaks, default=math.nan) / parse_bytes(args.limit),
        "predicted_filled": float(np.mean([budget.bytes(*s) for s in shapes])) / parse_bytes(args.limit),
    }


def main() -> None:
    if sys.argv[1] == "child":
        child(sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4]), sys.argv[5] == "1")
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("predict", "methods", "epoch"))
    parser.add_argument("model")
    parser.add_argument("lengths", type=Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--limit", default="2GiB")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.count = args.count or (200 if args.what == "epoch" else 50)
    torch.set_num_threads(1)
    result = {"what": args.what, "model": args.model, "limit": args.limit, "torch": torch.__version__}
    result |= {"predict": predict, "methods": methods, "epoch": epoch}[args.what](args)
    print(
        json.dumps(
            {key: value for key, value in result.items() if key != "rows" or args.what == "methods"}, indent=2
        )
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
