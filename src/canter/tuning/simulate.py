"""Memory and time of a training step on a device that is not there.

The step runs on tensors without values (PyTorch's fake tensors): every operation, forward and backward, says what
shapes it returns, and nothing is computed. Memory is the peak of the tensors alive; time is the operations counted over
a rate. What kernels use inside themselves, the allocator's fragmentation and the device's context are not seen:
`OVERHEAD` stands for them.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from canter.errors import BudgetError
from canter.runtime import LiveBytes
from canter.tuning.probe import Probe, Prober, Shape, TrainingStep

OVERHEAD = 0.06  # of a device's memory: the context, workspaces and fragmentation
FLOPS = 250e12  # reached by a current data-centre GPU in bf16, about 40 % of what its maker states
METHOD = "fake tensors: peak of live tensors, operations counted"


def parse_bytes(text: str) -> float:
    """'80GiB', '80GB', '512M' or a plain number of bytes. Raises BudgetError for anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?)(B?)\s*", text, re.IGNORECASE)
    value = 0.0
    if found:
        number, unit, binary, _ = found.groups()
        power = "KMGT".find(unit.upper()) + 1 if unit else 0
        value = float(number) * (1024 if binary or not text.strip().upper().endswith("B") else 1000) ** power
    if not value > 0 or not math.isfinite(value):
        raise BudgetError(f"{text!r} is no amount of memory; write it as '80GiB' or '12GB'")
    return value


def fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of ``model`` whose weights have shapes and no values."""
    model = copy.deepcopy(model)
    known: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in known:
                    known[id(weight)] = nn.Parameter(mode.from_tensor(weight.data), weight.requires_grad)
                module._parameters[name] = known[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    return model


class _Counting(LiveBytes):
    """Live bytes, and the shapes of the one operation of speech models that PyTorch will not tell."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._ctc_loss.Tensor:
            log_probs, targets = args[0], args[1]
            steps, batch, _ = log_probs.shape
            result = log_probs.new_empty(batch), log_probs.new_empty(batch, steps, 2 * targets.shape[1] + 1)
            self._see(result, new=True)
            return result
        if func is torch.ops.aten._ctc_loss_backward.Tensor:
            result = torch.empty_like(args[1])
            self._see([result], new=True)
            return result
        return super().__torch_dispatch__(func, types, args, kwargs)


class Simulator(Prober):
    """A prober whose steps are not run: it takes a model and how a step is made of one."""

    def __init__(
        self,
        model: nn.Module,
        make: Callable[[nn.Module], TrainingStep],
        limit_bytes: float,
        measured_on: dict[str, Any] | None = None,
        *,
        flops: float = FLOPS,
        told: Callable[[Probe], None] = lambda _: None,
    ):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.flops = flops
        model = fake(model, self.mode)
        with self.mode:
            step = make(model)
        super().__init__(step, limit_bytes, {"simulated": METHOD, **(measured_on or {})}, told=told)

    def _peak(self, shape: Shape, cap: float | None) -> tuple[int, float]:
        self.steps += 1
        with self.mode, FlopCounterMode(display=False) as counter, _Counting() as count:
            self.step(*shape)
        return count.peak, counter.get_total_flops() / self.flops

    def _measure(self, shape: Shape, expected: float | None) -> Probe:
        peak, seconds = self._peak(shape, None)
        size = self.step.state_bytes + peak
        return Probe(*shape, size, seconds, size <= self.limit_bytes)
