"""Training speed of a Canary of 1 B parameters in bf16 on one GPU, for each strategy on real lengths: audio hours per
hour, MFU, memory filled, batches that ran out of memory.

    python benchmarks/gpu_training.py [LENGTHS] [--json FILE]            # under nine minutes on an H200
    python benchmarks/gpu_training.py --strategies balanced --compile --grid --budget FILE
    python benchmarks/gpu_training.py --device cpu --tiny                # the same path on a tiny model, in float32

LENGTHS is an index or a table with 'duration' and 'tokens'; without it, lengths are drawn (log-normal, 1 to 40 s).
Audio is noise of those lengths. The budget is measured first, for the memory of the device, and every strategy fills it
as far as it can; `packed` trains without padding. The matrix rate is that of products of square matrices on this
device. MFU is three times the FLOPs of a forward pass, per second and matrix rate, once with padding counted as work
and once without. A batch that does not fit is split as in `canter train`, counted, and its time counted with it. The
figures are written after every strategy, and every few seconds in between. `--grid` rounds shapes up, so that there are
fewer distinct ones; `canter train` does not do so.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch._dynamo.utils
import tyro
from gpu_budget import canary, lengths, training_flops
from ladder import Arm, Rig, distinct_shapes, few_shapes
from rich.console import Console
from rich.table import Table

from canter.corpus.index import LengthIndex
from canter.events import Printed
from canter.files import write_text
from canter.models.model import SpeechModel
from canter.planning import Budget
from canter.runtime import choose_device, map_large_blocks, release_memory
from canter.training.config import LossConfig, OptimizerConfig, TrainConfig
from canter.training.measure import SyntheticStep, memory_limit
from canter.training.step.weights import compile_layers
from canter.tuning.fit import fit_budget
from canter.tuning.probe import Prober

MATRIX = 8192  # width of the matrices whose product is timed
WARM_UP = 3  # steps without compilation before those that count
SAVE_SECONDS = 5.0  # of training, after which the figures so far are written
TINY_LIMIT = 80e6  # bytes


@dataclass(frozen=True)
class Options:
    lengths: tyro.conf.Positional[Path | None] = None
    strategies: tuple[str, ...] = ("random", "balanced", "packed", "bucket_2d", "duration", "bucket_1d")
    """Strategies in this order, the most informative first, in case the time runs out; none: only the budget."""
    seconds: float = 55.0
    """Seconds of training for each strategy."""
    probes: int = 30
    """Number of probes of the budget."""
    budget: Path | None = None
    """Use the budget in this file; where it does not exist, measure one and write it (default: measure)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    tiny: bool = False
    """A model of two layers of width 64, 400 utterances, little memory."""
    compile: bool = False
    """Compile the layers first, which takes minutes. A budget in a file may be that of layers not compiled."""
    backend: str = "inductor"
    """Backend of `--compile`; 'eager' compiles no kernels, to see that it runs."""
    grid: bool = False
    """Round shapes up to the grid that has the fewest distinct shapes for at most 1 % more padded compute."""
    json: Path | None = None
    """File for the figures."""


def matrix_rate(device: torch.device, dtype: torch.dtype, width: int, repeats: int = 20) -> float:
    """Return the FLOPs per second of products of square matrices."""
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))

    def timed(count: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        synchronise(device)
        return time.perf_counter() - start

    timed(3)
    return 2 * width**3 * repeats / min(timed(repeats) for _ in range(3))


def graphs() -> int:
    """Return the number of graphs that torch.compile has made."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(options: Options) -> None:
    began = time.perf_counter()
    device = choose_device(options.device)
    cuda = device.type == "cuda"
    if not cuda:
        map_large_blocks()
    precision = "bf16" if cuda else "float32"
    rate = matrix_rate(device, torch.bfloat16 if cuda else torch.float32, 256 if options.tiny else MATRIX)
    torch.manual_seed(0)
    config = canary(options.tiny)
    with device:
        model = SpeechModel(config).to(device)
    if options.compile:
        compile_layers(model, options.backend)
    index = lengths(options.lengths, options.tiny)
    settings = TrainConfig(optimizer=OptimizerConfig(name="adamw"), loss=LossConfig(ctc_weight=0.0, ctc_warmup=0.0))
    limit = TINY_LIMIT if options.tiny else memory_limit(device, events=Printed())
    if options.budget and options.budget.exists():
        budget = Budget.load(options.budget)
    else:
        budget = measure(SyntheticStep(settings, model, precision, 4, copied=False), limit, index, options.probes)
        if options.budget:
            budget.save(options.budget)
    flops = training_flops(config, model.frame_seconds)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "lengths": options.lengths.name if options.lengths else "drawn",
        "matrix_rate": rate,
        "limit_bytes": limit,
        "compiled": options.compile,
        "budget": budget.as_json(),
        "budget_seconds": time.perf_counter() - began,
        "strategies": {},
    }
    save(result, options.json)
    for name in options.strategies:
        rig = None  # only one optimiser has its state in memory
        release_memory()
        rig = Rig(replace(settings, strategy=name), model, precision)
        grid = few_shapes(index, budget, name) if options.grid else (1, 1)
        arm = Arm(name, rig, index, budget, grid=grid)
        started = time.perf_counter()
        steady = 0  # steps since the last one that compiled
        while steady < WARM_UP:
            before = graphs()
            arm.step(timed=False)
            steady = steady + 1 if graphs() == before else 0
        warm_up, compiled, saved = time.perf_counter() - started, graphs(), 0.0
        table = arm.plan.table()
        shapes = {"grid": grid, "micro_batches_an_epoch": len(table.size), "distinct_shapes": distinct_shapes(table)}
        while arm.seconds < options.seconds:
            arm.step()
            if arm.seconds >= min(options.seconds, saved + SAVE_SECONDS):
                saved = arm.seconds
                row = arm.figures() | work_of(arm, flops, rate) | memory_of(arm, limit)
                late = {"warm_up_seconds": warm_up, "compiled_while_timed": graphs() - compiled}
                result["strategies"][name] = row | late | shapes
                save(result, options.json)
        print(json.dumps({name: result["strategies"][name]}), flush=True)
    if result["strategies"]:
        show(result)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes")


def measure(step: SyntheticStep, limit: float, index: LengthIndex, probes: int) -> Budget:
    """Measure a budget; the optimiser of its steps is released with them."""
    began, prober = time.perf_counter(), Prober(step, limit, events=Printed())
    budget = fit_budget(prober, index, most_probes=probes)
    for probe in prober.probes:
        print(probe)
    spent = time.perf_counter() - began
    print(f"budget: {prober.steps} steps, {prober.out_of_memory} out of memory, {spent:.0f} s", flush=True)
    return budget


def save(result: dict[str, Any], path: Path | None) -> None:
    if path:
        write_text(path, json.dumps(result, indent=2) + "\n", durable=False)


def work_of(arm: Arm, flops: Callable[[Any, Any], Any], rate: float) -> dict[str, float]:
    """Return the MFU with padding counted as work, and without."""
    batch, frames, tokens = np.array(arm.shapes).T
    rows = np.concatenate(arm.rows)
    useful = flops(arm.budget.frames(arm.index.seconds[rows]), arm.index.tokens[rows].astype(np.int64)).sum()
    return {
        "mfu": float((batch * flops(frames, tokens)).sum() / arm.seconds / rate),
        "mfu_without_padding": float(useful / arm.seconds / rate),
    }


def memory_of(arm: Arm, limit: float) -> dict[str, float]:
    """Return fractions of the limit: mean peak memory of tensors in a step, and the memory reserved from the device; 0
    on a CPU."""
    reserved = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
    return {"memory_filled": float(np.mean(arm.peaks)) / limit, "memory_reserved": reserved / limit}


def show(result: dict[str, Any]) -> None:
    table = Table("strategy", "audio h/h", "predicted", "against random", "MFU", "without padding", "memory filled",
                  "reserved", "out of memory", "mean batch", "padded audio", "shapes")  # fmt: skip
    base = next(iter(result["strategies"].values()))["audio_hours_per_hour"]
    for name, row in result["strategies"].items():
        table.add_row(
            name,
            f"{row['audio_hours_per_hour']:.0f}",
            f"{row['predicted']:.0f}",
            f"{row['audio_hours_per_hour'] / base:.2f}x",
            f"{row['mfu']:.1%}",
            f"{row['mfu_without_padding']:.1%}",
            f"{row['memory_filled']:.1%}",
            f"{row['memory_reserved']:.1%}",
            str(row["out_of_memory"]),
            f"{row['mean_batch']:.1f}",
            f"{row['padded_audio']:.1%}",
            f"{row['distinct_shapes']:,}",
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
