"""Measurements before a run, on synthetic batches: the memory budget, the fastest precision, the largest batch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Never, cast

import numpy as np
import torch
from torch import Tensor

from canter.errors import BudgetError
from canter.events import QUIET, Events
from canter.models.batch import Batch
from canter.models.model import SpeechModel
from canter.models.protocol import AnyModel, module_of
from canter.planning.budget import Budget
from canter.planning.plan import Plan
from canter.planning.strategies import STRATEGIES
from canter.runtime import MMAP_THRESHOLD, device_memory, is_out_of_memory, map_large_blocks
from canter.training.config import TrainConfig
from canter.training.defaults import decided
from canter.training.step.gradient import TrainingStep
from canter.training.step.weights import compile_layers, to_training
from canter.tuning.probe import BatchShape, ProbedStep, Prober

CHARACTERS_PER_SECOND = 15  # of synthetic batches
TIMED_STEPS = 5
TIMED_SECONDS = 6.0  # duration of the utterances of a timed step
WORTH_THREADS = 1.2  # speed-up from which on several threads are used
CPU_FRACTION = 0.5  # of a CPU's memory that a step may use by default
GPU_FRACTION = 0.95  # of a GPU's free memory
# entries of ``measured_on`` that must agree where a budget is used
DECIDING = ("model_shape", "device", "precision", "optimizer", "compile")


def synthetic_batch(
    model: AnyModel, batch: int, frames: int, tokens: int, prompt: int, ctc_weight: float | None = None
) -> Batch:
    """Return noise of B utterances of T encoder frames each, with U random tokens, on the device of the model.

    There are targets for its CTC head, unless ``ctc_weight`` is 0.
    """
    device = next(model.parameters()).device
    samples = max(1, round(frames * planned_frame_seconds(model) * model.sample_rate))
    characters = max(1, min(int(samples / model.sample_rate * CHARACTERS_PER_SECOND), 2 * frames))
    outputs = 2
    if model.ctc is not None:
        outputs = max(2, cast(SpeechModel, model).config.ctc_vocabulary)
        if "characters" not in model.supports:
            characters = min(tokens, frames)
    characters *= ctc_weight != 0
    with device:
        return Batch(
            audio=(torch.randn(samples) * 0.1).repeat(batch, 1),
            audio_lengths=torch.full((batch,), samples),
            tokens=torch.randint(0, model.vocabulary, (batch, tokens)),
            token_lengths=torch.full((batch,), tokens),
            prompt_lengths=torch.full((batch,), min(prompt, tokens - 1)),
            characters=torch.randint(1, outputs, (batch, characters)),
            character_lengths=torch.full((batch,), characters),
            rows=torch.zeros(batch, dtype=torch.long),
        )


class SyntheticStep(ProbedStep):
    """The training step of a configuration on synthetic batches, on a copy of the model unless ``copied`` is false."""

    def __init__(
        self,
        config: TrainConfig,
        model: AnyModel,
        precision: str,
        prompt: int = 1,
        *,
        copied: bool = True,
        teacher: AnyModel | None = None,
    ):
        model = copy.deepcopy(model) if copied else model
        self.model, self.frame_seconds, self.compiled = module_of(model), planned_frame_seconds(model), config.compile
        self.prompt = prompt
        to_training(self.model)
        if config.compile:
            compile_layers(cast(SpeechModel, model))
        self.step = TrainingStep(decided(config), model, precision, steps=1000, teacher=teacher)

    def __call__(self, batch: int, frames: int, tokens: int) -> None:
        data = synthetic_batch(self.step.model, batch, frames, tokens, self.prompt, self.step.config.loss.ctc_weight)
        self.step.backward(data)  # which stays in memory through the update, as a batch of training does
        self.step.update(0, numbers=[0], count=1)

    def tensors(self) -> Iterator[Tensor]:
        return self.step.tensors()

    def discard(self) -> None:
        self.step.gradient.discard()


def planned_frame_seconds(model: AnyModel) -> float:
    """Return the seconds of an encoder frame as plans count them.

    A model that pads every utterance to one length has frames of that length: all cost the same, and T is 1.
    """
    return model.padded_seconds or model.frame_seconds


# -- the budget --


def make_prober(
    config: TrainConfig,
    model: AnyModel,
    precision: str,
    *,
    teacher: AnyModel | None = None,
    memory: float | None = None,
    exact: bool = False,
    journal: Path | None = None,
    events: Events[Never] = QUIET,
) -> Prober:
    """Return a prober of the training step of ``config``, on a copy of ``model``.

    memory: bytes that a step may use (default: see `memory_limit`). exact: on a CPU, map large blocks, so that the
    process holds little more than its tensors; the budget notes it, and `canter train` does the same. journal: file
    that keeps the probes.
    """
    step = SyntheticStep(config, model, precision, teacher=teacher)
    conditions = measured_on(config, model, precision, teacher)
    if exact and step.device.type == "cpu" and map_large_blocks():
        conditions["mmap_threshold"] = MMAP_THRESHOLD
    prober = Prober(step, memory_limit(step.device, memory, events), conditions, journal, events)
    if prober.kept:
        events.message(f"{len(prober.kept)} probes of an earlier run are taken from {journal}")
    return prober


def memory_limit(device: torch.device, limit: float | None = None, events: Events[Never] = QUIET) -> float:
    """Return the bytes that a step may use, weights included.

    Without ``limit``, they are 95 % of a GPU's free memory, or half of the memory of a machine without one (of a
    container's or a job's, where that is less). Raises BudgetError for a limit that is more than there is.
    """
    room = device_memory(device)
    if device.type == "cuda":
        default, source = GPU_FRACTION * room, f"{GPU_FRACTION:.0%} of the free memory of this GPU"
    else:
        default, source = CPU_FRACTION * room, "half of the memory that this process may use"
    if limit is None:
        limit = default
        events.message(f"memory limit {limit / 2**30:.1f} GiB, {source}")
    if limit > room:
        raise BudgetError(
            f"the limit of {limit / 2**30:.1f} GiB is more than the {room / 2**30:.1f} GiB there are; lower it, or "
            "plan for another device with 'canter plan --model SHAPE --memory SIZE'"
        )
    return limit


def measured_on(
    config: TrainConfig, model: AnyModel, precision: str, teacher: AnyModel | None = None
) -> dict[str, object]:
    """Return the conditions of a measurement; those in DECIDING must agree where the budget is used."""
    device = next(model.parameters()).device
    count = sum(parameter.numel() for parameter in model.parameters())
    packed = ", packed" if STRATEGIES[config.strategy].packed else ""
    taught = f", teacher {teacher.shape}" if teacher else ""
    recompute = ", recomputed" if model.recomputes else ""
    if model.adapter is not None:
        recompute += f", LoRA of rank {model.adapter.rank} on {len(model.adapter.modules)} layers"
    return {
        "model": model.shape,
        "model_shape": f"{model.shape}, {count:,} parameters{recompute}{taught}{packed}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "optimizer": config.optimizer.name,
        "compile": config.compile,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


# -- precision and threads --


def choose_speed(
    config: TrainConfig, model: AnyModel, events: Events[Never] = QUIET, teacher: AnyModel | None = None
) -> tuple[str, int]:
    """Return the (precision, threads) with the shortest training step among those that the configuration leaves open.

    bf16 means float32 weights and bf16 arithmetic. All cores are not always fastest: on a machine that others use too,
    threads wait for one another.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    precisions = ("float32", "bf16") if config.precision == "auto" else (config.precision,)
    cores = torch.get_num_threads()
    threads = {config.threads} if config.threads else {1, cores} if on_cpu else {cores}
    if config.budget is not None:  # the conditions of its measurement
        given = Budget.load(config.budget).measured_on
        precisions = tuple(p for p in precisions if p == given.get("precision")) or precisions
        measured = given.get("threads")
        if not config.threads and on_cpu and isinstance(measured, int) and 1 <= measured <= cores:
            threads = {measured}
    if len(precisions) == len(threads) == 1:
        return precisions[0], next(iter(threads))
    frames = max(1, round(TIMED_SECONDS / planned_frame_seconds(model)))
    seconds: dict[tuple[str, int], float] = {}
    for precision in precisions:
        for count in sorted(threads):
            torch.set_num_threads(count)
            step = SyntheticStep(config, model, precision, prompt=4, teacher=teacher)
            times = []
            for _ in range(TIMED_STEPS):
                start = time.perf_counter()
                step(4, frames, 25)
                times.append(time.perf_counter() - start)
            seconds[precision, count] = sorted(times[1:])[len(times) // 2 - 1]
    # threads wait for one another whenever something else runs, so several must be worth it
    chosen = min(seconds, key=lambda way: seconds[way] * (1.0 if way[1] == 1 else WORTH_THREADS))
    timed = ", ".join(f"{p} on {n} threads {1000 * s:.0f} ms" for (p, n), s in seconds.items())
    events.message(f"{chosen[0]} on {chosen[1]} threads: a step takes {timed}")
    return chosen


# -- the largest batch --


def check_memory(step: TrainingStep, plan: Plan, window: int, budget: Budget, events: Events[Never] = QUIET) -> None:
    """Compute the largest micro-batch of a window of ``plan`` once, and report it if it does not fit in memory.

    So a batch that is too large shows before the first step, and a device's allocator lays its memory out for the
    largest. Weights, statistics and random numbers of the run stay as they are. Sharded training is not checked: a pass
    that fails half-way on one rank leaves FSDP's ranks at odds over what they exchange next.
    """
    shape = largest_shape(plan, window, budget)
    if step.shards or shape is None or fits(step, shape, budget.frame_seconds):
        return
    seconds = shape.frames * budget.frame_seconds
    events.message(
        f"the largest micro-batch, {shape.batch} utterances of {seconds:.1f} s and {shape.tokens} tokens, does not fit "
        "in memory: such batches will be split, which costs time; measure the budget again with 'canter tune', or "
        "lower --batch-seconds"
    )


def largest_shape(plan: Plan, window: int, budget: Budget) -> BatchShape | None:
    """Return the padded shape of the micro-batch that takes most memory in a window; None for a window without one.

    A packed micro-batch has no padded shape: utterances of its mean lengths that take about the same memory stand for
    it, as synthetic batches are uniform.
    """
    table = plan.batch_table(window)
    if not len(table.size):
        return None
    used = table.bytes(budget)
    at = int(np.argmax(used))
    if table.terms is not None:
        frames, tokens = (math.ceil(total[at] / table.size[at]) for total in (table.padded_frames, table.padded_tokens))
        room = float(used[at]) - budget.fixed_bytes
        return BatchShape(max(1, int(room / budget.utterance_bytes(frames, tokens))), frames, tokens)
    return BatchShape(int(table.size[at]), int(table.frames[at]), int(table.tokens[at]))


def fits(step: TrainingStep, shape: BatchShape, frame_seconds: float) -> bool:
    """Return whether forward and backward pass of ``shape`` fit in memory beside the complete optimiser state.

    ``frame_seconds`` is the unit of T.
    """
    model, device = step.model, step.gradient.device
    seconds = min(shape.frames * frame_seconds, model.longest_seconds)  # longer utterances will be skipped
    frames = max(1, math.ceil(seconds / planned_frame_seconds(model) - 1e-6))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            state = torch.empty(step.optimizers.missing_bytes(), dtype=torch.uint8, device=device)
            tokens = min(max(2, shape.tokens), model.positions)
            step.backward(synthetic_batch(model, shape.batch, frames, tokens, 1, step.config.loss.ctc_weight))
            fitted = True
            del state
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fitted = False
    step.gradient.discard()  # outside of the handler: the exception holds on to tensors
    return fitted
