"""A budget on a GPU: a Canary of 1 B parameters in bf16, `fit` and `search`, then the plan's most extreme batches.

    python benchmarks/gpu_budget.py [LENGTHS] [--json FILE] [--search-buckets 4] [--steps 200]
    python benchmarks/gpu_budget.py --device cpu --tiny              # the same path on a tiny model

LENGTHS has `duration` and `num_tokens`; without it, lengths are drawn (log-normal, 1 to 40 s). `search` is given few
buckets, so that everything fits in eight minutes. A prediction is of the bytes that the allocator reserves for a shape
from an empty cache; beside it is the memory that the shape needed among others.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from canter.corpus.index import LengthIndex
from canter.events import Printed
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.model import ModelConfig, SpeechModel, utterance_cost
from canter.planning import Budget, Plan
from canter.planning.bins import Bins
from canter.planning.budget import Polynomial
from canter.planning.strategies import Bucket2D
from canter.runtime import choose_device, is_out_of_memory, map_large_blocks, peak_of, release_memory
from canter.training.config import OptimizerConfig, TrainConfig
from canter.training.measure import SyntheticStep, memory_limit
from canter.tuning.fit import MOST_PROBES, corners, fit_budget, within
from canter.tuning.probe import BatchShape, ProbedStep, Prober
from canter.tuning.search import search

ERRORS = ("memory_error", "time_error", "margin", "error_unseen")
TINY_LIMIT = 60e6
PEAK_FLOPS = 989e12  # of an H100 or H200 in bf16, dense, as its maker states


def canary(small: bool) -> ModelConfig:
    layers, width = (2, 64) if small else (24, 1024)
    encoder = FastConformerConfig(
        layers=layers,
        width=width,
        heads=8,
        feedforward=4 * width,
        kernel_size=9,
        subsampling_channels=16 if small else 256,
        mels=128,
    )
    decoder = DecoderConfig(
        layers=layers, width=width, heads=8, feedforward=4 * width, vocabulary=5248, positions=1024, pad=0
    )
    return ModelConfig(FeatureConfig(mels=128), encoder, decoder)


def lengths(path: Path | None, small: bool) -> LengthIndex:
    if path is not None:
        from canter.cli.lengths import open_lengths

        return within(open_lengths(path), 40.0, 1024)
    rng, count = np.random.default_rng(0), 400 if small else 200_000
    seconds = np.clip(rng.lognormal(2.0, 0.7, count), 1.0, 8.0 if small else 40.0).astype(np.float32)
    return LengthIndex(seconds, np.clip(seconds * rng.normal(4.0, 1.2, count), 8, 512).astype(np.int64))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=Path, nargs="?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--probes", type=int, default=MOST_PROBES)
    parser.add_argument("--search-buckets", type=int, default=4, help="rows of two buckets each")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=150.0, help="for the steps, at most")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    device = choose_device(args.device)
    torch.manual_seed(0)
    if device.type == "cpu":
        map_large_blocks()
    config = canary(args.tiny)
    with device:
        model = SpeechModel(config).to(device)
    index = lengths(args.lengths, args.tiny)
    settings = TrainConfig(optimizer=OptimizerConfig(name="adamw"))
    precision = "float32" if device.type == "cpu" else "bf16"
    step = SyntheticStep(settings, model, precision, copied=False)
    limit = TINY_LIMIT if args.tiny else memory_limit(device, events=Printed())

    budget, fit = fitted(Prober(step, limit, events=Printed()), index, args.probes)
    bins = Bucket2D(args.search_buckets, 2).bins(index, budget)
    fit["sizes"] = [int(budget.max_batch(budget.frames(s), u)) for s, u in bins.edges]
    found = searched(Prober(step, limit), bins)
    flops = training_flops(config, model.frame_seconds)
    rows, events = run_extremes(step, index, budget, limit, args.steps, args.seconds)
    for row in rows:
        b, t, u = row["shape"]
        row["mfu"] = b * float(flops(t, u)) / row["seconds"] / PEAK_FLOPS
    late = rows[len(rows) // 4 :]  # kernels found, memory laid out
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": precision,
        "limit_bytes": limit,
        "wall_seconds": round(time.perf_counter() - began),
        "fit": fit,
        "search": found,
        "extreme_batches": {
            "steps": len(rows),
            "out_of_memory": events,
            "memory_error_median": median(abs(r["predicted"] / r["needed"] - 1) for r in rows),
            "needed_over_predicted_worst": max((r["needed"] / r["predicted"] for r in rows), default=None),
            "reserved_over_limit": max((r["reserved"] / limit for r in rows), default=None),
            "time_error_median": median(abs(r["predicted_seconds"] / r["seconds"] - 1) for r in late),
            "mfu_mean": float(np.mean([r["mfu"] for r in late])) if late else None,
        },
    }
    print(json.dumps(result, indent=2))
    if args.json:
        text = json.dumps(result, indent=1)[:-2]
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        args.json.write_text(f'{text},\n "rows": [\n  {lines}\n ]\n}}\n')


def median(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.median(values)) if values else None


def fitted(prober: Prober, index: LengthIndex, probes: int) -> tuple[Budget, dict[str, Any]]:
    began = time.perf_counter()
    budget = fit_budget(prober, index, most_probes=probes)
    found = {
        "steps": prober.steps,
        "out_of_memory": prober.out_of_memory,
        "seconds": round(time.perf_counter() - began, 1),
        **{name: budget.measured_on.get(name) for name in ERRORS},
    }
    print(f"fit: {found}", flush=True)
    return budget, found


def searched(prober: Prober, bins: Bins) -> dict[str, Any]:
    began = time.perf_counter()
    found = search(prober, bins)
    found = {
        "buckets": len(bins),
        "steps": found.steps,
        "out_of_memory": found.out_of_memory,
        "seconds": round(time.perf_counter() - began, 1),
        "sizes": found.sizes.tolist(),
    }
    print(f"search: {found}", flush=True)
    return found


def run_extremes(
    step: ProbedStep, index: LengthIndex, budget: Budget, limit: float, most: int, seconds: float
) -> tuple[list[dict[str, Any]], int]:
    """Run the corners and the largest micro-batches of the balanced plan in random order, in a process that may use
    ``limit`` bytes; return a row for each that fitted, and the number of those that did not.

    The cache is not emptied in between, as in training.
    """
    device, table = step.device, Plan(index, budget).batch_table(0)
    largest = np.argsort(-budget.bytes(table.size, table.frames, table.tokens))[:most]
    shapes = list(corners(index, budget))
    shapes += [BatchShape(int(table.size[i]), int(table.frames[i]), max(2, int(table.tokens[i]))) for i in largest]
    shapes = shapes[:most]
    random.Random(0).shuffle(shapes)
    release_memory()
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    rows, events, began = [], 0, time.perf_counter()
    for shape in shapes:
        if time.perf_counter() - began > seconds:
            break
        needed, spent = 0, 0.0
        try:
            needed, spent = taken(step, shape)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if not needed:  # outside of the handler: the traceback holds the step's tensors
            step.discard()
            release_memory()
            events += 1
            continue
        rows.append(
            {
                "shape": shape,
                "predicted": round(float(budget.bytes(*shape))),
                "needed": needed,
                "reserved": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else needed,
                "predicted_seconds": float(budget.step_seconds(*shape)),
                "seconds": spent,
            }
        )
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return rows, events


def taken(step: ProbedStep, shape: BatchShape) -> tuple[int, float]:
    """Return (peak bytes, seconds) of a step, weights and optimiser state included: of tensors on CUDA, resident on a
    CPU."""
    device, seconds = step.device, 0.0

    def run() -> None:
        nonlocal seconds
        began = time.perf_counter()
        step(*shape)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began

    if device.type != "cuda":
        return step.state_bytes + peak_of(run, device), seconds
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device), seconds


def training_flops(config: ModelConfig, frame_seconds: float) -> Callable[[Any, Any], Any]:
    """Return a function from (T, U) to the FLOPs of a training step for an utterance padded to them.

    They are three times those of the forward pass, a polynomial of T and U, counted at a few lengths on tensors without
    storage.
    """
    shapes = [(25, 8), (100, 60), (250, 8), (250, 200), (500, 60), (500, 200)]
    costs = [utterance_cost(config, t * frame_seconds, u) for t, u in shapes]
    t, u = np.array([(cost.frames, cost.tokens) for cost in costs], float).T
    flops = np.array([3.0 * (cost.encoder_flops + cost.decoder_flops) for cost in costs])
    terms = np.stack([t, t * t, u, t * u, u * u], 1) / flops[:, None]
    return Polynomial(*np.linalg.lstsq(terms, np.ones(len(t)), rcond=None)[0].tolist())


if __name__ == "__main__":
    main()
