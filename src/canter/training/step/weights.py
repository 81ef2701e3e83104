"""What is done with weights besides updating them: frozen by name, averaged, compiled."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from canter.errors import ConfigError
from canter.models.model import SpeechModel
from canter.models.norm import MaskedBatchNorm


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Take parameters whose names match a pattern ('encoder.layers.0.*') out of training; return how many numbers
    they hold. Raises ConfigError as ``frozen_names``."""
    frozen = frozen_names(model, patterns)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def frozen_names(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the names of the parameters that match a pattern. Raises ConfigError for a pattern that matches none,
    and where nothing would be left to train."""
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, [*names, *(f"{_first_two(name)}.*" for name in names)], n=1)
            hint = f"did you mean '{near[0]}'? They" if near else "they"
            parts = sorted({_first_two(name) for name in names})
            raise ConfigError(f"--freeze {pattern!r} matches no parameter; {hint} begin with {', '.join(parts)}")
        frozen.update(matched)
    if names and len(frozen) == len(names):
        raise ConfigError(f"--freeze {' '.join(patterns)} leaves nothing to train")
    return frozen


def _first_two(name: str) -> str:
    return ".".join(name.split(".")[:2])


def to_training(model: nn.Module) -> None:
    """Training mode, but for BatchNorm that is frozen: it normalises by its running statistics and keeps them."""
    model.train()
    for module in model.modules():
        if isinstance(module, MaskedBatchNorm) and not module.weight.requires_grad:
            module.eval()


def compile_layers(model: SpeechModel, backend: str | Callable = "inductor") -> None:
    """Compiles each layer of encoder and decoder in place, for any length: names and state stay as they are."""
    for stack in (model.encoder, model.decoder):
        for layer in getattr(stack, "layers", ()):
            layer.compile(dynamic=True, backend=backend)
        stack.compiled = True


def copy_into(target: Tensor, source: Tensor) -> None:
    """Overwrites ``target``, which may be sharded, by a whole tensor."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


class Average:
    """The exponential moving average of a model's weights, buffers included as they are.

    The decay rises with the steps, (1 + step) / (10 + step) up to ``decay``, so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After the update of ``step`` (from 0)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        now = [p.detach() for name, p in model.named_parameters() if name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), now, share)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, shadow in self.shadow.items():
            copy_into(shadow, tensors[name])

    @contextmanager
    def in_place_of(self, model: nn.Module):
        """In this context ``model`` has the average's weights."""
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
