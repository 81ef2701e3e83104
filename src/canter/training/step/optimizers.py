"""Optimisers, learning-rate schedules and the moving average of the weights."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from canter.training.config import OptimizerConfig

MATRIX_EVERY = 2  # steps between Newton-Schulz iterations of a matrix
Key = tuple[int, int, int]


class Schedule:
    """Position in a learning-rate schedule of ``steps`` steps, for a run whose number of steps may change.

    A step is one unit of the schedule until the length of the run is estimated again; from there on the remaining
    schedule is spread evenly over the remaining steps. So the learning rate never jumps, and ends where the schedule
    ends. ``stretches`` holds each estimate as (step, position, steps of the run), so that a run that resumes from an
    earlier checkpoint has the same learning rates.
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
        """Spread the remaining schedule at ``step`` over a run of ``total`` steps."""
        self.stretches.append((step, self.position(step), total))


class Optimizers:
    """One or two torch optimisers that step as one, under one schedule.

    Muon (Jordan et al., 2024) updates the matrices inside encoder and decoder layers; AdamW updates embeddings, output
    heads, convolutions, biases and norms, and everything if ``name`` is 'adamw'.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, steps: int, schedule: Schedule | None = None):
        self.config, self.schedule = config, schedule or Schedule(steps)
        if config.learning_rate is None:
            raise ValueError("the learning rate is unset: `canter.training.defaults.decided` chooses it")
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
        groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": flat, "weight_decay": 0.0}]
        self.parameters = matrices + others + flat
        adamw = torch.optim.AdamW(groups, self.peak, betas=(0.9, 0.98), fused=True)
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [(adamw, self.peak)]
        if matrices:
            rate = config.matrix_learning_rate
            self.parts.append((Muon(matrices, rate, weight_decay=config.weight_decay, every=MATRIX_EVERY), rate))
        self._norm: float | None = None  # of a step that was interrupted after its gradient was clipped
        self._updated: set[tuple[int, int]] = set()  # parts and groups that the interrupted step has updated

    def factor(self, step: int) -> float:
        """Return the learning rate at a step (from 0), as a fraction of the peak."""
        config, steps = self.config, self.schedule.steps
        warmup = config.warmup * (steps if config.warmup < 1 else 1)
        done = self.schedule.position(step + 1)
        if config.schedule in ("noam", "inverse_sqrt"):
            warmup = max(1.0, warmup)
            fraction = min(done / warmup, math.sqrt(warmup / done))
            return fraction * (self.width * warmup) ** -0.5 if config.schedule == "noam" else fraction
        if done < warmup:
            return done / warmup
        if config.schedule == "constant":
            return 1.0
        progress = (done - warmup) / max(1e-9, steps - warmup)
        return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def step(self, step: int) -> tuple[float, float]:
        """Clip, update the weights and clear the gradients; return (learning rate, gradient norm).

        A gradient that is not finite changes nothing. A step that ran out of memory may be called again: it resumes
        where it stopped, so its result is the same.
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
        """Update the weights of one optimiser, except for those that the interrupted step has updated."""
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
                optimizer.param_groups = [group]  # the fused update of a group allocates before it changes anything
                optimizer.step()
                self._updated.add((number, place))
        except BaseException:
            for weight, state in list(optimizer.state.items()):
                if "exp_avg_sq" not in state:  # made last: this state is incomplete
                    del optimizer.state[weight]
            raise
        finally:
            optimizer.param_groups = groups

    def clip(self) -> Tensor:
        """Scale the gradient down to the maximum norm; return the norm before."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip, foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def missing_bytes(self) -> int:
        """Return the bytes of optimiser state that the first step will allocate.

        AdamW keeps two moments of a weight, Muon one, and the last direction where matrices take turns.
        """
        return sum(
            (2 if not isinstance(part, Muon) or group["every"] > 1 else 1) * weight.nbytes
            for part, _ in self.parts
            for group in part.param_groups
            for weight in group["params"]
            if weight not in part.state
        )

    def state_dict(self) -> list[dict]:
        """Return the state of each torch optimiser, keyed by parameter names instead of numbers.

        Other parameters may be trained when it is loaded.
        """
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
        """Load the state of the parameters that are trained now; parameters without one start from nothing.

        Options (weight decay, betas) stay those of the configuration.
        """
        for (optimizer, _), names, saved in zip(self.parts, self.numbered(), states):  # one may have none
            state = {n: saved["state"][name] for n, name in enumerate(names) if name in saved["state"]}
            groups = optimizer.state_dict()["param_groups"]
            for group, before in zip(groups, saved["param_groups"]):
                if "turn" in group:  # a position of Muon, not an option
                    group["turn"] = before["turn"] % group["every"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def numbered(self) -> list[list[str]]:
        """Return the names of each torch optimiser's parameters, in the order of its numbers."""
        return [
            [self.names[p] for group in optimizer.param_groups for p in group["params"]] for optimizer, _ in self.parts
        ]


# -- Muon --


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrix of each of (N, R, C), R <= C.

    A quintic Newton-Schulz iteration runs on all matrices at once, and takes singular values to about 0.7 ... 1.2. It
    runs in bfloat16 on a GPU and in float32 on a CPU, where bfloat16 takes four times as long without instructions for
    it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if x.dtype == torch.float32 and 2 * x.shape[1] <= x.shape[2]:
        return _by_gram(x, steps, (a, b, c)).to(matrices.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.to(matrices.dtype)


def _by_gram(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Run the same iteration for wide (N, R, C) on the Gram matrices (N, R, R) only.

    Its polynomials commute, so their product can be applied to ``x`` at the end. That is less work if C >= 2R, and
    needs the precision of float32.
    """
    a, b, c = coefficients
    gram = x @ x.mT
    product = None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    return x if product is None else product @ x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).

    The updates equal those of ``torch.optim.Muon``, but all matrices of one shape are orthogonalised in one batched
    call: the loop of the other takes 1.1 s a step for a 3.8 M-parameter model on two CPU cores, this 0.04 s.

    ``parameters`` must be matrices. Weight decay is decoupled. ``every``: run Newton-Schulz on a matrix every N steps,
    the matrices of a shape in turn, and reuse its last update direction in between. A momentum over 20 steps changes
    little in one, and on a CPU the iteration takes as long as the gradient of a small batch.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        every: int = 1,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "every": every, "turn": 0}
        super().__init__(parameters, defaults)
        self._moved: set[Key] = set()  # shapes whose momenta an interrupted step has updated
        self._updated: set[Key] = set()  # and those whose weights

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights. A step that ran out of memory may be called again, and resumes where it stopped."""
        for number, group in enumerate(self.param_groups):
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = parameter.shape
                    by_shape[rows, columns].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                key = (number, rows, columns)
                if key in self._updated:
                    continue
                gradients = [p.grad for p in parameters if p.grad is not None]
                buffers = [self._buffer(p) for p in parameters]
                if key not in self._moved:
                    torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                    self._moved.add(key)
                updates = list(torch._foreach_lerp(gradients, buffers, group["momentum"]))  # Nesterov
                directions = self._directions(parameters, updates, group["every"], group["turn"])
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, directions, alpha=-rate)
                self._updated.add(key)
        for group in self.param_groups:
            group["turn"] = (group["turn"] + 1) % group["every"]
        self._moved.clear()
        self._updated.clear()

    def _directions(self, parameters: list[Tensor], updates: list[Tensor], every: int, turn: int) -> list[Tensor]:
        """Return the update directions of ``parameters``, all of one shape.

        They are orthogonalised for those whose turn it is, and the last ones for the others.
        """
        if every == 1:
            return _orthogonalised(updates)
        states = [self.state[parameter] for parameter in parameters]
        due = [n for n, state in enumerate(states) if n % every == turn or "direction" not in state]
        if due:
            for n, direction in zip(due, _orthogonalised([updates[n] for n in due])):
                states[n]["direction"] = direction.clone(memory_format=torch.contiguous_format)
        return [state["direction"] for state in states]

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _orthogonalised(matrices: list[Tensor]) -> list[Tensor]:
    stacked = torch.stack(matrices)  # (N, R, C)
    tall = stacked.shape[1] > stacked.shape[2]
    found = orthogonalise(stacked.mT if tall else stacked)
    return list((found.mT if tall else found).unbind())


# -- the average --


class Average:
    """Exponential moving average of a model's weights; buffers are not averaged.

    The decay rises with the steps, (1 + step) / (10 + step) up to ``decay``, so that the initial weights are soon
    forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights of ``model`` after the update of ``step`` (from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        now = [p.detach() for name, p in model.named_parameters() if name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), now, weight)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, shadow in self.shadow.items():
            copy_into(shadow, tensors[name])

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Swap the average's weights into ``model`` within this context."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in self.shadow:
                held = parameter.detach().clone()
                parameter.copy_(self.shadow[name])
                self.shadow[name].copy_(held)


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a full tensor into ``target``, which may be sharded."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)
