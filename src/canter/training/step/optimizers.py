"""Optimisers and schedules."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from canter.training.config import OptimizerConfig
from canter.training.step.muon import Muon

MATRIX_EVERY = 2
"""Steps between Newton-Schulz iterations; the steps in between reuse the last update direction."""


class Schedule:
    """Position in a learning-rate schedule of ``steps`` steps, of a run whose number of steps may change on the way.

    A step is one unit of the schedule until the run's length is estimated again; from then on the rest of the schedule
    is spread evenly over the rest of the run. So the learning rate never jumps, and ends where the schedule ends. What
    was estimated is kept in ``stretches``, (step, position, steps of the run from there on), for a checkpoint before
    it to take the same way.
    """

    def __init__(self, steps: int, stretches: Iterable[Sequence[float]] = ()):
        self.steps = max(1, steps)
        self.stretches = [(int(step), float(position), int(total)) for step, position, total in stretches]

    def position(self, done: float) -> float:
        """Return the position, from 0 to ``steps``, after ``done`` steps."""
        for step, position, total in reversed(self.stretches):
            if done > step:
                return position + (done - step) * (self.steps - position) / max(1, total - step)
        return done

    def stretch(self, step: int, total: int) -> None:
        """Spread what is left of the schedule at ``step`` over a run of ``total`` steps."""
        self.stretches.append((step, self.position(step), total))


class Optimizers:
    """One or two torch optimisers stepped as one, under one schedule.

    Muon (Jordan et al., 2024) has the matrices inside encoder and decoder blocks; embeddings, the output heads,
    convolutions, biases and norms have AdamW, as does everything where ``name`` is 'adamw'.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, steps: int, schedule: Schedule | None = None):
        self.config, self.schedule = config, schedule or Schedule(steps)
        if config.learning_rate is None:
            raise ValueError("no learning rate: `decided` settles what a configuration leaves open")
        self.peak = config.learning_rate
        self.width = getattr(model, "width", 512)
        matrices, others, flat = [], [], []
        self.names: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            self.names[parameter] = name
            if parameter.ndim == 2 and ".layers." in name and config.name != "adamw":
                matrices.append(parameter)
            else:
                (others if parameter.ndim >= 2 else flat).append(parameter)
        groups = [
            {"params": others, "weight_decay": config.weight_decay},
            {"params": flat, "weight_decay": 0.0},
        ]
        self.parameters = matrices + others + flat
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.AdamW(groups, self.peak, betas=(0.9, 0.98), fused=True),
                self.peak,
            )
        ]
        if matrices:
            muon = Muon(
                matrices,
                config.matrix_learning_rate,
                weight_decay=config.weight_decay,
                every=MATRIX_EVERY,
            )
            self.parts.append((muon, config.matrix_learning_rate))
        self._norm: float | None = None  # of a step that broke off once its gradient was clipped
        self._updated: set[tuple[int, int]] = set()  # parts and groups of that step that are updated

    def factor(self, step: int) -> float:
        """Return the learning rate at a step (from 0), as a fraction of the peak."""
        config, steps = self.config, self.schedule.steps
        warmup = config.warmup * (steps if config.warmup < 1 else 1)
        done = self.schedule.position(step + 1)
        if config.schedule in ("noam", "inverse_sqrt"):
            warmup = max(1.0, warmup)
            share = min(done / warmup, math.sqrt(warmup / done))
            return share * (self.width * warmup) ** -0.5 if config.schedule == "noam" else share
        if done < warmup:
            return done / warmup
        if config.schedule == "constant":
            return 1.0
        progress = (done - warmup) / max(1e-9, steps - warmup)
        return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def step(self, step: int) -> tuple[float, float]:
        """Clip, update the weights and clear the gradients; return (learning rate, gradient norm). A gradient that is
        not finite changes nothing.

        A step that ran out of memory may be called again: it resumes where it stopped, so its result is the same.
        """
        if self._norm is None:
            self._norm = float(self.clip())
        norm, factor = self._norm, self.factor(step)
        for number, (optimizer, peak) in enumerate(self.parts):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            if math.isfinite(norm):
                self._update(number, optimizer)
        for optimizer, _ in self.parts:
            optimizer.zero_grad(set_to_none=True)
        self._norm, self._updated = None, set()
        return self.peak * factor, norm

    def _update(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights of one optimiser, those left out that a step which broke off has updated."""
        if isinstance(optimizer, Muon):
            if (number, 0) not in self._updated:
                optimizer.step()
                self._updated.add((number, 0))
            return
        groups = optimizer.param_groups
        try:
            for place, group in enumerate(groups):
                if (number, place) in self._updated:
                    continue
                optimizer.param_groups = [group]  # the fused update of one group allocates before it changes any
                optimizer.step()
                self._updated.add((number, place))
        except BaseException:
            for weight, state in list(optimizer.state.items()):
                if "exp_avg_sq" not in state:  # made last: this state is not whole
                    del optimizer.state[weight]
            raise
        finally:
            optimizer.param_groups = groups

    def clip(self) -> Tensor:
        """Scales the gradient down to the largest norm allowed; returns the norm before."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip, foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def state_dict(self) -> list[dict]:
        """Of each torch optimiser, with parameters' names for their numbers: others may be trained when it is
        loaded."""
        found = []
        for (optimizer, _), names in zip(self.parts, self.numbered()):
            held = optimizer.state_dict()
            state = {names[number]: values for number, values in held["state"].items()}
            groups = [
                group | {"params": [names[number] for number in group["params"]]} for group in held["param_groups"]
            ]
            found.append({"state": state, "param_groups": groups})
        return found

    def load_state_dict(self, states: list[dict]) -> None:
        """Takes the state of what is trained now; what was not trained then starts without. Options (decay, betas)
        stay the configuration's."""
        for (optimizer, _), names, saved in zip(self.parts, self.numbered(), states):  # one may have none
            state = {n: saved["state"][name] for n, name in enumerate(names) if name in saved["state"]}
            groups = optimizer.state_dict()["param_groups"]
            for group, before in zip(groups, saved["param_groups"]):
                if "turn" in group:  # where Muon is, no option
                    group["turn"] = before["turn"] % group["every"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def numbered(self) -> list[list[str]]:
        """The parameters' names, of each torch optimiser in the order of its numbers."""
        return [
            [self.names[p] for group in optimizer.param_groups for p in group["params"]] for optimizer, _ in self.parts
        ]
