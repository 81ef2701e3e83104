"""Preparation of a model for training: frozen parameters, training mode, compiled layers."""

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from canter.errors import ConfigError
from canter.models.model import SpeechModel
from canter.models.norm import MaskedBatchNorm


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Freeze the parameters whose names match a pattern ('encoder.layers.0.*'); return the number of frozen values.

    Raises ConfigError as `frozen_names` does.
    """
    frozen = frozen_names(model, patterns)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def frozen_names(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the names of the parameters that match a pattern.

    Raises ConfigError for a pattern that matches none, and if no parameter would be trained.
    """
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
    """Switch to training mode, except for frozen BatchNorm layers, which keep their running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, MaskedBatchNorm) and not module.weight.requires_grad:
            module.eval()


def compile_layers(model: SpeechModel, backend: str | Callable = "inductor") -> None:
    """Compile each layer of encoder and decoder in place, for any length; names and state stay the same."""
    for stack in (model.encoder, model.decoder):
        for layer in getattr(stack, "layers", ()):
            layer.compile(dynamic=True, backend=backend)
        stack.compiled = True
