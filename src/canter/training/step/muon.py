"""Muon: momentum, orthogonalised (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/)."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of each of (N, R, C), R <= C, roughly: singular values land in about
    0.7 ... 1.2. A quintic Newton-Schulz iteration, all matrices at once; in bfloat16 on a GPU, in float32 on a CPU,
    where bfloat16 without instructions of its own takes four times as long."""
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
    """The same iteration of wide (N, R, C) on their Gram matrices (N, R, R) alone: its polynomials commute, so their
    product can be applied to ``x`` at the end. Less work where C >= 2R; needs float32's digits."""
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
    """Equal to ``torch.optim.Muon``, but matrices of one shape are orthogonalised in one batched call: its loop
    takes 1.1 s a step for a 3.8 M-parameter model on two CPU cores, this 0.04 s.

    ``parameters`` must be matrices. Weight decay is decoupled. ``every``: a matrix is orthogonalised at every so
    many steps, the matrices of a shape in turns, and moves in its last direction between. Of a momentum that
    remembers 20 steps little changes in one, and on a CPU the iteration takes as long as a small batch's gradient.
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
        self._moved: set[tuple[int, int, int]] = set()  # in a step that broke off: the momenta that are updated
        self._updated: set[tuple[int, int, int]] = set()  # and the weights

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
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
        """Where ``parameters``, all of one shape, move: orthogonalised updates of those whose turn it is, and the
        last directions of the others."""
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
    """Each of them, all of one shape."""
    stacked = torch.stack(matrices)  # (N, R, C)
    tall = stacked.shape[1] > stacked.shape[2]
    found = orthogonalise(stacked.mT if tall else stacked)
    return list((found.mT if tall else found).unbind())
