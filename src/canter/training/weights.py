"""What is done with weights besides updating them: frozen by name, averaged, compiled."""

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
    """Takes parameters whose names match a pattern ('encoder.layers.0.*') out of training; returns how many numbers
    they hold. Raises ConfigError for a pattern that matches none, and where all are taken."""
    names = dict(model.named_parameters())
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            parts = sorted({".".join(name.split(".")[:2]) for name in names})
            raise ConfigError(
                f"--freeze {pattern!r} matches no parameter; they begin with {', '.join(parts)}"
            )
        for name in matched:
            names[name].requires_grad_(False)
    if all(not p.requires_grad for p in names.values()):
        raise ConfigError(f"--freeze {' '.join(patterns)} leaves nothing to train")
    return sum(p.numel() for p in names.values() if not p.requires_grad)


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
