"""Accuracy of a budget on a CPU: predictions against fresh processes, `search` against `fit`, an epoch under a cap.

    python benchmarks/budget.py predict MODEL LENGTHS [--count 50] [--limit 512MiB] [--json FILE]
    python benchmarks/budget.py methods MODEL LENGTHS [--limit 192MiB] [--json FILE]
    python benchmarks/budget.py epoch   MODEL LENGTHS [--limit 256MiB] [--count 200] [--json FILE]
    python benchmarks/budget.py resting MODEL LENGTHS [--json FILE]

MODEL is a checkpoint, or `small`: Canter's model of the default size of `canter train`. Whisper is measured at its
utterances' lengths (no padding to 30 s). Memory is that of a fresh process, forked before anything was computed: it
makes model and optimiser state, takes a small step, runs the shape (twice, if it is short), and reports its peak
resident memory (VmHWM) above its resting level, with weights and optimiser state added. `resting` shows the parts of
that level: libraries and code that a first step loads, for any model. Time is the CPU time of the single computing
thread, so that other processes do not count. For some shapes, the bytes of live tensors and the memory with glibc's
default heap are reported too.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from canter.cli.lengths import open_lengths
from canter.corpus.index import LengthIndex
from canter.events import Printed
from canter.loading import load_model
from canter.models.model import SpeechModel
from canter.planning import Budget, Plan
from canter.planning.bins import Bins
from canter.planning.budget import parse_memory
from canter.planning.lengths import Lengths
from canter.planning.strategies import Bucket2D
from canter.planning.strategies.bucket_2d import batch_sizes
from canter.runtime import LiveBytes, is_out_of_memory, map_large_blocks, release_memory, resident
from canter.training.config import OptimizerConfig, TrainConfig
from canter.training.measure import SyntheticStep
from canter.training.subject import model_config
from canter.tuning.fit import MOST_PROBES, fit_budget, within
from canter.tuning.probe import Probe, ProbedStep, Prober
from canter.tuning.search import search

LIMITS = {"predict": "512MiB", "methods": "192MiB", "epoch": "256MiB", "resting": "1GiB"}
LONG = 2.0  # seconds of a step that is not run twice
GROUPS = Path("/sys/fs/cgroup/memory")  # control groups; `epoch` makes one, and needs root
A_PROCESS = 20  # batches that one process of `epoch` runs


def make_model(name: str) -> SpeechModel:
    torch.manual_seed(0)
    if name != "small":
        model = load_model(name)
        if hasattr(model.config.features, "pad_seconds"):
            model.set_features(pad_seconds=0.0)
        return model
    sizes = type("Sizes", (), {"vocab_size": 512, "pad": 0, "size": 30})()
    return SpeechModel(model_config(TrainConfig(), sizes, sizes))  # type: ignore[arg-type]


def make_step(model: Any, copied: bool = False) -> ProbedStep:
    config = TrainConfig(optimizer=OptimizerConfig(name="adamw"))
    return SyntheticStep(config, model, "float32", copied=copied)


def lengths(args: argparse.Namespace) -> LengthIndex:
    longest, most = (30.0, 448) if args.model != "small" else (40.0, 512)
    return within(open_lengths(args.lengths), longest, most)


# -- fresh processes --


def forked(work: Callable, *arguments: Any) -> list:
    """Return the values that ``work(send, *arguments)`` sends from its own process, up to its end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs.send, *arguments))
    process.start()
    theirs.close()
    found = []
    try:
        while True:
            found.append(ours.recv())
    except EOFError:
        process.join()
    group = GROUPS / f"canter-{process.pid}"
    if group.exists():
        group.rmdir()
    return found


def fitting(send: Callable, args: argparse.Namespace, journal: Path | None) -> None:
    """Send budget, probes, steps, out-of-memory failures and seconds of `fit`."""
    map_large_blocks()
    step = make_step(make_model(args.model))
    prober = Prober(step, parse_memory(args.limit), journal=journal, events=Printed(), clock=time.process_time)
    began = time.perf_counter()
    budget = fit_budget(prober, lengths(args), most_probes=args.probes)
    seconds = time.perf_counter() - began
    send((budget.as_json(), prober.probes, prober.steps, prober.out_of_memory, seconds))


def fitted(args: argparse.Namespace) -> tuple[Budget, list[Probe], dict]:
    [[value, probes, steps, events, seconds]] = forked(fitting, args, args.journal)
    budget = Budget.from_json(value)
    found = {name: budget.measured_on.get(name) for name in ("memory_error", "time_error", "margin")}
    return budget, probes, {"steps": steps, "out_of_memory": events, "seconds": round(seconds, 1), **found}


def running(send: Callable, name: str, shapes: Sequence[Sequence[int]], cap: float, heap: bool, count: bool) -> None:
    """Send for each shape peak resident bytes, seconds, and with ``count`` the tensors' bytes; None if it did not fit.

    Above ``cap``, weights included, the kernel ends the process. RLIMIT_DATA would count address space that glibc
    reserves without using it.
    """
    if heap:
        map_large_blocks()
    group = GROUPS / f"canter-{os.getpid()}"
    if cap:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(os.getpid()))
    step = make_step(make_model(name))
    step(1, *shapes[0][1:])  # makes the optimiser's state, and loads what is no tensor
    release_memory()
    rest = resident() - step.state_bytes
    if cap:
        held = int((group / "memory.usage_in_bytes").read_text()) - step.state_bytes
        (group / "memory.limit_in_bytes").write_text(str(int(held + cap)))
    for shape in shapes:
        release_memory()
        Path("/proc/self/clear_refs").write_text("5")
        try:
            times = []
            while len(times) < (1 if cap or sum(times) > LONG else 2):
                began = time.process_time()
                step(*shape)
                times.append(time.process_time() - began)
            peak, tensors = resident("VmHWM") - rest, None
            if count:
                with LiveBytes() as live:
                    step(*shape)
                tensors = step.state_bytes + live.peak
            send([peak, min(times), tensors])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            step.discard()
            send([None, None, None])


def fresh(
    name: str, shapes: Sequence[Sequence[int]], cap: float = 0.0, heap: bool = True, count: bool = False
) -> list[list]:
    found = forked(running, name, shapes, cap, heap, count)
    if len(found) < len(shapes) and not cap:
        raise RuntimeError(f"{shapes}: the process ended")
    return found + [[None, None, None]] * (len(shapes) - len(found))


# -- what is shown --


def predict(args: argparse.Namespace) -> dict:
    """Measure unseen shapes (T and U of random utterances, B at random up to what fits), each in its own process."""
    index = lengths(args)
    budget, probes, found = fitted(args)
    known = {tuple(probe.shape) for probe in probes}
    rng = np.random.default_rng(1)
    shapes: list[tuple[int, int, int]] = []
    while len(shapes) < args.count:
        row = int(rng.integers(len(index)))
        t, u = int(budget.frames(index.seconds[row])), max(2, int(index.tokens[row]))
        most = budget.max_batch(t, u)
        shape = (max(1, int(most ** rng.uniform(0.0, 1.0))), t, u)
        if most and shape not in known:
            shapes.append(shape)
    rows = []
    for shape in shapes:  # one process after another, shapes in random order
        [[peak, took, _]] = fresh(args.model, [shape])
        row = {"shape": shape, "predicted": round(float(budget.bytes(*shape))), "measured": peak}
        rows.append(row | {"predicted_seconds": float(budget.step_seconds(*shape)), "seconds": took})
    for row in rows[: args.compared]:
        [[row["glibc_default"], _, row["tensors"]]] = fresh(args.model, [row["shape"]], heap=False, count=True)

    def off(one: str, other: str, some: list[dict]) -> list[float]:
        return [abs(row[one] / row[other] - 1) for row in some]

    memory, times = off("predicted", "measured", rows), off("predicted_seconds", "seconds", rows)
    more = [row["glibc_default"] / row["measured"] - 1 for row in rows[: args.compared]]
    return {
        "fit": found,
        "memory_error_median": statistics.median(memory),
        "memory_error_worst": max(memory),
        "time_error_median": statistics.median(times),
        "time_error_worst": max(times),
        "glibc_default_takes_more_median": statistics.median(more),
        "glibc_default_takes_more_worst": max(more),
        "tensors_of_measured": statistics.median(row["tensors"] / row["measured"] for row in rows[: args.compared]),
        "budget": budget.as_json(),
        "probes": [[*p.shape, round(p.bytes), round(p.seconds, 4), p.fits] for p in probes],
        "rows": rows,
    }


def searching(send: Callable, args: argparse.Namespace, bins: Bins) -> None:
    map_large_blocks()
    prober = Prober(make_step(make_model(args.model)), parse_memory(args.limit))
    began = time.perf_counter()
    found = search(prober, bins)
    seconds = time.perf_counter() - began
    send((found.sizes, [round(p.bytes) for p in prober.probes], found.steps, found.out_of_memory, seconds))


def methods(args: argparse.Namespace) -> dict:
    """Run `search` and `fit` on the same 60 buckets under the same limit, and then the batches that they found."""
    index = lengths(args)
    budget, _, found = fitted(args)
    bins = Bucket2D(30, 2).bins(index, budget)
    corners = [(int(budget.frames(s)), max(2, u)) for s, u in bins.edges]
    [[sizes, _, steps, events, seconds]] = forked(searching, args, bins)
    counts = np.bincount(bins.assign(Lengths.of(index, slice(None), budget)), minlength=len(bins))
    limit = parse_memory(args.limit)

    def row(name: str, sizes: np.ndarray, steps: int, events: int, wall: float) -> dict:
        shapes = [(max(1, int(size)), *corner) for size, corner in zip(sizes, corners)]
        filled = np.array([peak for peak, _, _ in fresh(args.model, shapes)]) / limit
        batches = counts / np.maximum(1, sizes)
        return {
            "method": name,
            "steps": steps,
            "out_of_memory": events,
            "seconds": round(wall, 1),
            "mean_batch": float(counts.sum() / batches.sum()),
            "memory_filled": float((filled * batches).sum() / batches.sum()),
            "fullest": float(filled.max()),
            "over_limit": int((filled > 1).sum()),
            "sizes": [int(size) for size in sizes],
        }

    fit = row("fit", batch_sizes(bins, budget), found["steps"], found["out_of_memory"], found["seconds"])
    return {
        "buckets": len(bins),
        "margin": found["margin"],
        "rows": [row("search", sizes, steps, events, seconds), fit],
    }


def epoch(args: argparse.Namespace) -> dict:
    """Run the largest batches of an epoch planned with the budget, in processes whose memory is capped at the limit."""
    index = lengths(args)
    budget, _, found = fitted(args)
    table = Plan(index, budget).table()
    size = budget.bytes(table.size, table.frames, table.tokens)
    largest = np.argsort(-size)[: args.count]
    shapes = [(int(table.size[i]), int(table.frames[i]), max(2, int(table.tokens[i]))) for i in largest]
    limit = parse_memory(args.limit)
    results = []
    for start in range(0, len(shapes), A_PROCESS):
        results += fresh(args.model, shapes[start : start + A_PROCESS], cap=limit)
    peaks = [peak or math.nan for peak, _, _ in results]
    return {
        "fit": found,
        "batches": len(shapes),
        "out_of_memory": sum(peak is None for peak, _, _ in results),
        "largest_peak_of_limit": float(np.nanmax(peaks)) / limit,
        "mean_peak_of_limit": float(np.nanmean(peaks)) / limit,
        "predicted_filled": float(size[largest].mean()) / limit,
        "rows": [{"shape": s, "measured": r[0]} for s, r in zip(shapes, results)],
    }


def resting(args: argparse.Namespace) -> dict:
    """Measure the memory besides tensors, from an empty process to its resting level."""
    return {"rows": forked(coming_to_rest, args.model)}


def coming_to_rest(send: Callable, name: str) -> None:
    map_large_blocks()
    held: dict[str, Any] = {}

    def look(what: str, tensors: int) -> None:
        release_memory()
        now = {"anonymous": resident("RssAnon"), "file": resident("RssFile"), "tensors": tensors}
        files, modules = mapped(), set(sys.modules)
        if held:
            more = {key: round((now[key] - held[key]) / 2**20, 1) for key in now}
            grown = Counter({name: files[name] - held["files"][name] for name in files})
            new = Counter(".".join(module.split(".")[:2]) for module in modules - held["modules"])
            send(
                {
                    "stage": what,
                    **more,
                    "not_tensors": round(more["anonymous"] + more["file"] - more["tensors"], 1),
                    "files": {name: round(size / 2**20, 1) for name, size in grown.most_common(3)},
                    "modules": dict(new.most_common(4)),
                }
            )
        held.update(now, files=files, modules=modules)

    look("", 0)
    model = make_model(name)
    look("model", sum(x.nbytes for x in [*model.parameters(), *model.buffers()]))
    step = make_step(model)
    look("optimiser", step.state_bytes)
    for what, shape in (("first step", (1, 30, 10)), ("second step", (1, 30, 10)), ("large", (8, 200, 50))):
        step(*shape)
        look(what, step.state_bytes)


def mapped() -> Counter:
    """Return resident bytes by mapped file."""
    sizes, name = Counter(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)", line):
            name = found[1].rsplit("/", 1)[-1] or "anonymous"
        elif line.startswith("Rss:"):
            sizes[name] += int(line.split()[1]) * 1024
    return sizes


def written(result: dict) -> str:
    """Return JSON with one line per row."""
    rest = {key: value for key, value in result.items() if key not in ("rows", "probes")}
    text = json.dumps(rest, indent=1)[:-2]
    for key in ("probes", "rows"):
        if key in result:
            text += f',\n "{key}": [\n  ' + ",\n  ".join(json.dumps(row) for row in result[key]) + "\n ]"
    return text + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(LIMITS))
    parser.add_argument("model")
    parser.add_argument("lengths", type=Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--limit")
    parser.add_argument("--probes", type=int, default=MOST_PROBES)
    parser.add_argument("--compared", type=int, default=5, help="number of shapes with more measurements")
    parser.add_argument("--journal", type=Path, help="file for the probes of `fit`")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.limit = args.limit or LIMITS[args.what]
    args.count = args.count or (200 if args.what == "epoch" else 50)
    torch.set_num_threads(1)
    began = time.perf_counter()
    name = args.model if args.model == "small" else Path(args.model).name
    result = {"what": args.what, "model": name, "lengths": args.lengths.name, "limit": args.limit}
    result |= {"torch": torch.__version__}
    shown = {"predict": predict, "methods": methods, "epoch": epoch, "resting": resting}[args.what](args)
    result |= {"wall_seconds": round(time.perf_counter() - began)} | shown
    brief = ("rows", "probes", "budget") if args.what in ("predict", "epoch") else ()
    print(json.dumps({key: value for key, value in result.items() if key not in brief}, indent=1))
    if args.json:
        args.json.write_text(written(result))


if __name__ == "__main__":
    main()
