"""The largest micro-batch of a plan, computed once before the first step: what does not fit shows at the start, and a
device's allocator lays its memory out for the largest."""

from collections.abc import Callable

import numpy as np
import torch

from canter.planning.budget import Budget
from canter.planning.plan import Plan
from canter.runtime import is_out_of_memory
from canter.training.loop import Trainer
from canter.training.measure import planned_frame_seconds, synthetic_batch
from canter.training.step.gradient import Gradient, TargetCounts
from canter.training.step.muon import Muon
from canter.training.step.optimizers import Optimizers


def rehearse(trainer: Trainer, budget: Budget, say: Callable[[str], None]) -> None:
    """Computes the largest micro-batch of the window that ``trainer`` is about to begin, and says so where it does not
    fit. Nothing of the run changes. Not where ranks share the state: a pass that ends half-way on one of them leaves
    FSDP's ranks at odds over what they exchange next."""
    if trainer.shards:
        return
    progress, steps = trainer.progress, trainer.upcoming
    plan = steps.plan_of(progress.epoch)
    place = steps.position(progress.position, plan)
    window = place.window if place is not None else 0
    if window == plan.windows.count:  # the epoch is through
        window = 0
    shape = largest(plan, window, budget)
    if not shape[0]:
        return
    if not fits(trainer.gradient, trainer.optimizers, shape, budget.frame_seconds):
        seconds = shape[1] * budget.frame_seconds
        say(
            f"the largest micro-batch, {shape[0]} utterances of {seconds:.1f} s and {shape[2]} tokens, does not fit in "
            "memory: such will be cut, which costs time; measure the budget again with 'canter tune', or lower "
            "--batch-seconds"
        )


def largest(plan: Plan, window: int, budget: Budget) -> tuple[int, int, int]:
    """(B, T, U) of the micro-batch of a window of ``plan`` that takes most memory by ``budget``, padding included; B is
    0 where the window has none."""
    table = plan.batch_table(window)
    if not len(table.size):
        return 0, 0, 0
    at = int(np.argmax(budget.bytes(table.size, table.frames, table.tokens)))
    return int(table.size[at]), int(table.frames[at]), int(table.tokens[at])


def fits(gradient: Gradient, optimizers: Optimizers, shape: tuple[int, int, int], frame_seconds: float) -> bool:
    """Whether forward and backward of noise in ``shape`` (B, T, U) fit in memory beside the optimisers' state, made or
    still to be made. T counts ``frame_seconds``. Weights, statistics and the run's random numbers stay as they are."""
    (batch, frames, tokens), model, device = shape, gradient.model, gradient.device
    unit = planned_frame_seconds(model)
    seconds = min(frames * frame_seconds, model.longest_seconds)  # what is longer will be skipped
    frames, tokens = max(1, int(np.ceil(seconds / unit - 1e-6))), min(max(2, tokens), model.positions)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            state = torch.empty(missing_state(optimizers), dtype=torch.uint8, device=device)
            data = synthetic_batch(model, batch, frames, tokens, prompt=1)
            with gradient.weights():
                gradient.backward(data, TargetCounts.of([data]), ctc_only=False, epoch=0)
            fitted = True
            del state
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fitted = False
    gradient.discard()  # outside of the handler: the exception holds on to tensors
    return fitted


def missing_state(optimizers: Optimizers) -> int:
    """Bytes of optimiser state that the first step will make: AdamW keeps two moments of a weight, Muon one, and its
    last direction where matrices take turns."""
    return sum(
        (2 if not isinstance(part, Muon) or group["every"] > 1 else 1) * weight.nbytes
        for part, _ in optimizers.parts
        for group in part.param_groups
        for weight in group["params"]
        if weight not in part.state
    )
