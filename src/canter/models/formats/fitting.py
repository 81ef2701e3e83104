"""From a configuration and tensors of any origin to a model, with every misfit named."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from canter.errors import CheckpointError
from canter.models.formats.ranges import check_config
from canter.models.model import ModelConfig, SpeechModel


class NoInitialisation(TorchFunctionMode):
    """Modules built in this context keep their parameters as allocated: they are about to be overwritten, and
    drawing a billion normals takes longer than reading them."""

    SKIPPED = (torch.Tensor.normal_, torch.Tensor.uniform_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.SKIPPED or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def build(config: ModelConfig, source: str | Path, stored: int | None = None) -> SpeechModel:
    """Return the model of that shape with whatever its memory held: fill it next.

    ``stored`` is the size of its weights in bytes, where it is known. Raises CheckpointError for an impossible
    configuration, or one that these weights cannot fill; see `check_config`.
    """
    check_config(config, source, stored)
    try:
        with NoInitialisation():
            return SpeechModel(config)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{source} describes no possible model: {error}") from None


def fit_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copies ``tensors`` into the parameters and buffers of ``module``, which they must match exactly.

    Raises CheckpointError with the names of missing, unexpected, misshapen and mistyped tensors, before anything is
    copied.
    """
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & tensors.keys())
        if tensors[name].shape != wanted[name].shape
    ]
    mistyped = [
        f"{name} {tensors[name].dtype} instead of {wanted[name].dtype}"
        for name in sorted(wanted.keys() & tensors.keys())
        if tensors[name].is_complex()
        or tensors[name].is_quantized
        or tensors[name].is_floating_point() != wanted[name].is_floating_point()
    ]
    faults = [
        ("missing", missing),
        ("unexpected", unexpected),
        ("misshapen", misshapen),
        ("mistyped", mistyped),
    ]
    if missing or unexpected or misshapen or mistyped:
        parts = [f"{len(names)} {fault}: {_some(names)}" for fault, names in faults if names]
        raise CheckpointError(
            f"{source}: tensors do not fit the configuration. {'; '.join(parts)}. "
            "Was the configuration edited, or are the weights another model's?"
        )
    module.load_state_dict(dict(tensors))


def _some(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def check_vocabulary(model: SpeechModel, tokenizer: Any, source: str | Path) -> None:
    """CheckpointError if the tokenizer has ids that the model's embedding does not."""
    if tokenizer is not None and tokenizer.vocab_size > model.config.decoder.vocabulary:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the model only "
            f"{model.config.decoder.vocabulary}; they do not belong together"
        )


def without_ctc(tensors: Mapping[str, Tensor], target: str | Path) -> dict[str, Tensor]:
    """Return the tensors for a format that has no auxiliary CTC head; warn if there is one."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("ctc.")}
    if len(kept) < len(tensors):
        warnings.warn(f"{target}: the format has no auxiliary CTC head; it is left out", stacklevel=3)
    return kept


class Renaming:
    """Our tensor names to another project's: pairs of substrings (ours, theirs), replaced in this order.

    Theirs may be convolutions of kernel 1 where ours are linear: the last dimension is added and dropped.
    """

    def __init__(self, *pairs: tuple[str, str]):
        self.pairs = pairs

    def name(self, ours: str) -> str:
        """Their name of our tensor."""
        for our, their in self.pairs:
            ours = ours.replace(our, their)
        return ours

    def ours(self, theirs: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Their tensors under the names and shapes of ``model``; unknown ones keep their names."""
        theirs = dict(theirs)
        ours = {}
        for name, tensor in model.state_dict().items():
            their = theirs.pop(self.name(name), None)
            if their is not None:
                ours[name] = their.squeeze(-1) if their.shape == (*tensor.shape, 1) else their
        return ours | theirs

    def theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under their names and shapes, ready to be written."""
        theirs = {}
        for name, tensor in ours.items():
            kernel = ".pointwise_conv" in name and tensor.ndim == 2
            tensor = tensor.unsqueeze(-1) if kernel else tensor
            theirs[self.name(name)] = tensor.detach().cpu().contiguous()
        return theirs
