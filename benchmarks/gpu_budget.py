"""A budget on a GPU: a Canary of 1 B parameters in bf16, `fit` and `search`, then the plan's most extreme batches.

    python benchmarks/gpu_budget.py [LENGTHS] [--json FILE] [--search-buckets 6] [--steps 200] [--small]

LENGTHS has `duration` and `num_tokens`; without it, lengths are drawn (log-normal, 1 to 40 s). `search` is given few
buckets, so that all fits in eight minutes. `--small` runs the same path on a tiny model, on whatever device there is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from canter.corpus.index import LengthIndex
from canter.models.cost import utterance_cost
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.model import ModelConfig, SpeechModel
from canter.planning import Plan
from canter.planning.strategies import Bucket2D
from canter.training.config import OptimizerConfig, TrainConfig
from canter.training.measure import memory_limit, training_step
from canter.tuning.fit import corners, measure_budget, within
from canter.tuning.memory import OutOfMemory
from canter.tuning.probe import Prober, Shape
from canter.tuning.search import search

ERRORS = ("memory_error", "time_error", "margin", "error_unseen")
PEAK_FLOPS = 989e12  # of an H100 or H200 in bf16, dense, as its maker states


def canary(small: bool) -> ModelConfig:
    layers, width = (2, 64) if small else (24, 1024)
    encoder = FastConformerConfig(
        layers=layers,
        width=width,
        heads=8,
        feedforward=4 * width,
        kernel_size=9,
        subsampling_channels=256,
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lengths", type=Path, nargs="?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--search-buckets", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=150.0, help="for the steps, at most")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = canary(args.small)
    model = SpeechModel(config).to(device)
    index = lengths(args.lengths, args.small)
    settings = TrainConfig(optimizer=OptimizerConfig(name="adamw"))
    step = training_step(settings, model, "bf16", 1, copied=False)
    limit = 1e9 if args.small else memory_limit(device, print)

    began = time.perf_counter()
    fitting = Prober(step, limit)
    budget = measure_budget(fitting, index, model.frame_seconds, say=print)
    fit_seconds = time.perf_counter() - began
    print(
        f"fit: {fitting.steps} steps, {fitting.out_of_memory} out of memory, {fit_seconds:.0f} s", flush=True
    )

    began = time.perf_counter()
    searching = Prober(step, limit)
    bins = Bucket2D(args.search_buckets, 2).bins(index, budget)
    found = search(searching, bins, budget.frame_seconds)
    search_seconds = time.perf_counter() - began
    ours = [budget.max_batch(budget.frames(s), u) for s, u in bins.edges]
    print(
        f"search: {found.steps} steps, {found.out_of_memory} out of memory, {search_seconds:.0f} s",
        flush=True,
    )

    plan = Plan(index, budget)
    cut = plan.cut(0)
    b = np.diff(cut.batches)
    t = np.maximum.reduceat(cut.lengths.frames, cut.batches[:-1])
    u = np.maximum.reduceat(cut.lengths.tokens, cut.batches[:-1])
    largest = np.argsort(-budget.bytes(b, t, u))[: args.steps]
    shapes = [tuple(shape) for shape in corners(index, budget)]
    shapes += [(int(b[i]), int(t[i]), int(u[i])) for i in largest]
    shapes = shapes[: args.steps]
    np.random.default_rng(0).shuffle(shapes)
    rows, events, began = [], 0, time.perf_counter()
    running = Prober(step, limit)
    for shape in shapes:  # one after another without emptying the cache, as training does
        if time.perf_counter() - began > args.seconds:
            break
        shape = tuple(int(n) for n in shape)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            seconds = running._run(Shape(*shape), limit - step.state_bytes)
        except OutOfMemory:
            events += 1
            continue
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
        allocated = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        flops = training_flops(config, shape, model.frame_seconds)
        rows.append(
            {
                "shape": shape,
                "predicted": float(budget.bytes(*shape)),
                "reserved": peak,
                "allocated": allocated,
                "predicted_seconds": float(budget.step_seconds(*shape)),
                "seconds": seconds,
                "mfu": flops / seconds / PEAK_FLOPS,
            }
        )
    late = rows[len(rows) // 4 :]  # kernels found, memory laid out
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "limit_bytes": limit,
        "fit": {
            "steps": fitting.steps,
            "out_of_memory": fitting.out_of_memory,
            "seconds": fit_seconds,
            **{name: budget.measured_on.get(name) for name in ERRORS},
            "sizes": [int(n) for n in ours],
        },
        "search": {
            "buckets": len(bins),
            "steps": found.steps,
            "out_of_memory": found.out_of_memory,
            "seconds": search_seconds,
            "sizes": found.sizes.tolist(),
        },
        "extreme_batches": {
            "steps": len(rows),
            "out_of_memory": events,
            "allocated_over_predicted_worst": max(
                (r["allocated"] / r["predicted"] for r in rows), default=0.0
            ),
            "reserved_over_limit": max((r["reserved"] / limit for r in rows), default=0.0),
            "time_error_median": float(
                np.median([abs(r["predicted_seconds"] / r["seconds"] - 1) for r in late])
            ),
            "mfu_mean": float(np.mean([r["mfu"] for r in late])),
        },
        "rows": rows,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


_COSTS: dict[tuple[int, int], int] = {}


def training_flops(config: ModelConfig, shape: tuple[int, ...], frame_seconds: float) -> float:
    """Operations of a step: three times the forward pass, counted on shapes without storage."""
    batch, frames, tokens = shape
    key = (-(-frames // 10) * 10, -(-tokens // 10) * 10)  # few shapes are counted, to 10 frames and tokens
    if key not in _COSTS:
        cost = utterance_cost(config, key[0] * frame_seconds, key[1])
        _COSTS[key] = 3 * (cost.encoder_flops + cost.decoder_flops)
    return float(batch * _COSTS[key])


if __name__ == "__main__":
    main()
