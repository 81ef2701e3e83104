"""LoRA (Hu et al., 2021, arXiv 2106.09685): trained low-rank additions to frozen linear layers.

A layer becomes a `LoraLinear` in place, so the names of all other tensors stay as they are.

I: inputs, O: outputs, R: rank.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canter.errors import ConfigError

SAMPLED = 1024  # values of each tensor that the fingerprint reads
LAYER = re.compile(r"(^|\.)layers\.\d+\.")
# Parts of a layer that are linear, but neither projections of attention nor feed-forward: convolutions of kernel 1,
# merges of branches, encodings of relative positions.
NO_DEFAULT = ("*pointwise_conv?", "*linear_pos", "*relative_k_proj", "*.merge", "*.cgmlp.*")

SHARED_INPUT = ("*linear_pos", "*relative_k_proj")


@dataclass(frozen=True)
class LoraAdapter:
    """Settings of a model's LoRA adapter: everything but its matrices."""

    rank: int
    alpha: float
    dropout: float
    modules: tuple[str, ...]
    """Names in the model of the linear layers that it changes."""
    base: str = ""
    """Path or hub name of the model that it changes."""
    fingerprint: str = ""
    """`fingerprint_of` that model."""

    @property
    def scale(self) -> float:
        """Factor of the product of the matrices."""
        return self.alpha / self.rank


class LoraLinear(nn.Linear):
    """A frozen linear layer plus ``scale`` times the product of lora_B (O, R) and lora_A (R, I), which are trained."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    dropout: float

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., O) for ``input`` (..., I); dropout, of the adapter's input only, follows torch's seed."""
        x = F.dropout(input, self.dropout, self.training) if self.dropout else input
        return torch.add(super().forward(input), F.linear(F.linear(x, self.lora_A), self.lora_B), alpha=self.scale)


class AdapterBank(threading.local):
    """Several LoRA adapters of one model, which stay apart from its weights: each row of a batch has one, or none.

    Engines in several threads may share the model.
    """

    rows: Tensor | None = None
    """Numbers (B,) of the rows of this thread's next calls of the model's layers; None: no row has an adapter."""

    def __init__(self, names: Sequence[str]):
        self.numbers = {name: number for number, name in enumerate(names, 1)}
        """Number of each adapter; 0 is the model without one."""

    def __deepcopy__(self, memo: object) -> AdapterBank:
        return AdapterBank(list(self.numbers))


class BankLinear(nn.Linear):
    """A linear layer to which the bank's adapters are added, row by row. K: adapters and one of zeros, for none."""

    bank: AdapterBank
    bank_A: Tensor  # (K, R, I)
    bank_B: Tensor  # (K, O, R), times the scale

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, N, O) for ``input`` (B, N, I)."""
        y, rows = super().forward(input), self.bank.rows
        if rows is None:
            return y
        low = torch.bmm(input, self.bank_A[rows].transpose(1, 2))
        return torch.baddbmm(y, low, self.bank_B[rows].transpose(1, 2))


# -- which layers --


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers by name, without those that share their weight with an embedding."""
    own = {name for name, _ in model.named_parameters()}
    shared = Counter(id(x) for _, x in model.named_parameters(remove_duplicate=False))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module) in (nn.Linear, LoraLinear)
        and f"{name}.weight" in own
        and shared[id(module.weight)] == 1
    }


def choose_modules(
    model: nn.Module, patterns: Sequence[str], frozen: Sequence[str], their_name: Mapping[str, str], source: object
) -> tuple[str, ...]:
    """Return the names of the linear layers that get adapters.

    patterns: names or ends of names, such as 'q_proj' or 'decoder.*.q_proj'; empty: attention and feed-forward of all
    layers. frozen: patterns of parameters that stay without. their_name: names in Hugging Face's module, by ours;
    patterns may be of either.

    Raises ConfigError, which names ``source``, for a pattern that matches nothing, and if no layer is left.
    """
    layers = linear_layers(model)

    def matches(name: str, pattern: str) -> bool:
        return any(fnmatchcase(f".{one}", f"*.{pattern}") for one in (name, their_name[name]))

    if patterns:
        chosen: set[str] = set()
        for pattern in patterns:
            found = {name for name in layers if matches(name, pattern)}
            if not found:
                raise ConfigError(_no_match(pattern, list(layers), their_name, source))
            chosen |= found
    else:
        chosen = {n for n in layers if LAYER.search(n) and not any(fnmatchcase(n, one) for one in NO_DEFAULT)}
    for pattern in frozen:
        kept_out = {name for name in chosen if fnmatchcase(f"{name}.weight", pattern)}
        if not kept_out:
            raise ConfigError(
                f"--freeze {pattern!r} has no effect with --lora.rank, which trains adapters only: no layer with an "
                "adapter matches it; leave it out"
            )
        chosen -= kept_out
    if not chosen:
        raise ConfigError(f"{source}: --freeze and --lora.targets leave no linear layer to adapt; change one of them")
    return tuple(name for name in layers if name in chosen)


def _no_match(pattern: str, names: list[str], their_name: Mapping[str, str], source: object) -> str:
    known = sorted({one.rpartition(".")[2] for name in names for one in (name, their_name[name])})
    whole = [one for name in names for one in (name, their_name[name])]
    near = difflib.get_close_matches(pattern, [*known, *whole], n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? They" if near else "they"
    return f"--lora.targets {pattern!r} matches no linear layer of {source}; {hint} end in {', '.join(known)}"


def describe(model: nn.Module, adapter: LoraAdapter, their_name: Mapping[str, str]) -> str:
    """Return a line with the layers that have adapters and the number of parameters that are trained."""
    counts = Counter(their_name[name].rpartition(".")[2] for name in adapter.modules)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    layers = ", ".join(f"{name} {count}" for name, count in counts.items())
    return (
        f"LoRA of rank {adapter.rank} on {len(adapter.modules)} linear layers ({layers}): {trained:,} of {total:,} "
        f"parameters are trained ({trained / total:.1%})"
    )


# -- on a model --


def attach(model: nn.Module, adapter: LoraAdapter, seed: int) -> None:
    """Freeze ``model`` and give it an adapter that changes nothing yet, its matrices drawn from ``seed``.

    As in PEFT, lora_A is uniform within 1 / sqrt(I), and lora_B is zero.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = linear_layers(model)
    for name in adapter.modules:
        layer = layers[name]
        layer.__class__ = LoraLinear
        assert isinstance(layer, LoraLinear)
        bound = 1 / math.sqrt(layer.in_features)
        drawn = (2 * torch.rand(adapter.rank, layer.in_features, generator=generator) - 1) * bound
        layer.lora_A = nn.Parameter(drawn.to(layer.weight))
        layer.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, adapter.rank))
        layer.scale, layer.dropout = adapter.scale, adapter.dropout


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrices of a model's adapter by their names in its state dict; empty if it has none."""
    return {
        f"{name}.{matrix}": getattr(module, matrix).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
        for matrix in ("lora_A", "lora_B")
    }


@torch.no_grad()
def merge(model: nn.Module, adapter: LoraAdapter, tensors: Mapping[str, Tensor]) -> None:
    """Add an adapter's matrices, named as in `adapter_tensors`, to the weights of a model without adapters."""
    layers = linear_layers(model)
    for name in adapter.modules:
        weight = layers[name].weight
        a, b = (tensors[f"{name}.{matrix}"].to(weight.device, torch.float32) for matrix in ("lora_A", "lora_B"))
        weight.copy_(weight.float() + adapter.scale * (b @ a))


def attach_bank(
    model: nn.Module, adapters: Mapping[str, tuple[LoraAdapter, Mapping[str, Tensor]]], sources: Mapping[str, object]
) -> AdapterBank:
    """Give ``model`` a bank of adapters, each with its matrices, named as in `adapter_tensors`; return the bank.

    Raises ConfigError, which names the adapter by its entry in ``sources``, for one that changes a layer whose input is
    shared by all rows of a batch.
    """
    bank, layers = AdapterBank(list(adapters)), linear_layers(model)
    changed = dict.fromkeys(name for adapter, _ in adapters.values() for name in adapter.modules)
    for name in changed:
        if any(fnmatchcase(name, pattern) for pattern in SHARED_INPUT):
            source = next(sources[one] for one, (adapter, _) in adapters.items() if name in adapter.modules)
            raise ConfigError(
                f"{source} changes {name}, whose input all rows of a batch share; serve that adapter alone, merged "
                "into the model"
            )
        layer = layers[name]
        mine = [(a, t) if name in a.modules else None for a, t in adapters.values()]
        rank = max(adapter.rank for adapter, _ in filter(None, mine))
        down = layer.weight.new_zeros(len(mine) + 1, rank, layer.in_features)
        up = layer.weight.new_zeros(len(mine) + 1, layer.out_features, rank)
        for number, one in enumerate(mine, 1):
            if one:
                adapter, tensors = one
                down[number, : adapter.rank] = tensors[f"{name}.lora_A"].to(down)
                up[number, :, : adapter.rank] = (adapter.scale * tensors[f"{name}.lora_B"].float()).to(up)
        layer.__class__ = BankLinear
        assert isinstance(layer, BankLinear)
        layer.bank = bank
        layer.register_buffer("bank_A", down, persistent=False)
        layer.register_buffer("bank_B", up, persistent=False)
    return bank


def fingerprint_of(model: nn.Module) -> str:
    """Return 32 hex digits over the names, shapes and evenly spaced values of a model's parameters.

    Fine-tuning changes all values of a tensor, so a sample of each shows another model at no cost.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(_sampled(model)):
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()


def _sampled(model: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // SAMPLED)
        yield f"{name} {tuple(parameter.shape)}", flat[::step].float().cpu().numpy()
