"""Make a model of a configuration and tensors of any origin, with every misfit named.

A configuration is a few bytes and decides how much memory and time building the model takes, so every value is checked
by range, and the total size by the bytes of weights that come with it.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from canter.errors import CheckpointError
from canter.models.layers import ACTIVATIONS
from canter.models.model import ModelConfig, SpeechModel
from canter.text import Tokenizer

Part = TypeVar("Part")
MAX_NUMBER = 2**31
"""Limit of integers in a configuration."""

# Field of any part -> least and greatest value. A new part may use these names and add its own.
RANGES: dict[str, tuple[float, float]] = {
    "sample_rate": (1000, 192_000),
    "mels": (1, 512),
    "n_fft": (2, 8192),
    "window": (2, 8192),
    "hop": (1, 8192),
    "preemphasis": (0, 1),
    "dither": (0, 1),
    "pad_seconds": (0, 300),
    "layers": (0, 256),
    "width": (1, 16_384),
    "heads": (1, 512),
    "feedforward": (1, 131_072),
    "kernel_size": (1, 1023),
    "subsampling_channels": (1, 8192),
    "subsampling": (4, 8),
    "cgmlp_units": (2, 131_072),
    "merge_kernel_size": (1, 1023),
    "most_before": (0, 100_000),
    "most_after": (0, 100_000),
    "chunk_frames": (1, MAX_NUMBER),
    "chunks_before": (-1, MAX_NUMBER),
    "adapter_stride": (1, 64),
    "epsilon": (0, 1e-2),
    "vocabulary": (1, 2_000_000),
    "positions": (1, 1_000_000),
    "pad": (0, 2_000_000),
    "ctc_vocabulary": (0, 2_000_000),
    "ctc_upsampling": (1, 64),
    "dropout": (0, 1),
    "dropout_input": (0, 1),
    "dropout_adapter": (0, 1),
    "dropout_attention": (0, 1),
    "dropout_activation": (0, 1),
    "layer_drop": (0, 1),
}
CHOICES: dict[str, tuple[str, ...]] = {"norm": ("batch", "layer"), "activation": tuple(ACTIVATIONS)}
MOST_POSITION_VALUES = 2**23
"""Positions times width of tables that are computed, not stored."""
SMALL = 2**24
"""A model of at most this many parameters is built before its weights are looked at."""


class NoInitialisation(TorchFunctionMode):
    """Mode in which new modules keep their parameters as allocated.

    They are about to be overwritten, and drawing a billion normals takes longer than reading them.
    """

    SKIPPED = (torch.Tensor.normal_, torch.Tensor.uniform_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.SKIPPED or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def build(config: ModelConfig, source: str | Path, stored: int | None = None) -> SpeechModel:
    """Return a model of that shape with uninitialised weights.

    ``stored`` is the size of its weights in bytes, if it is known. Raises CheckpointError for an impossible
    configuration, or one that these weights cannot fill; see `check_config`.
    """
    check_config(config, source, stored)
    try:
        with NoInitialisation():
            return SpeechModel(config)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{source} describes no possible model: {error}") from None


def check_config(config: ModelConfig, source: str | Path, stored: int | None = None) -> None:
    """Check every value of ``config`` by type and range, and what must agree between its parts.

    ``stored`` is the number of bytes of weights that come with it: more parameters than bytes are refused. Raises
    CheckpointError naming ``source``, the field, its value and its range.
    """
    _check_fields(config, f"{source}: ")
    features, encoder, decoder = config.features, config.encoder, config.decoder
    heads, mels = getattr(encoder, "heads", 1), getattr(encoder, "mels", features.mels)
    faults = (
        (encoder.width % heads, f"encoder.width {encoder.width} is not a multiple of its {heads} heads"),
        (
            decoder.width % decoder.heads,
            f"decoder.width {decoder.width} is not a multiple of its {decoder.heads} heads",
        ),
        (
            getattr(encoder, "kernel_size", 1) % 2 == 0,
            f"encoder.kernel_size {getattr(encoder, 'kernel_size', 1)} is even",
        ),
        (mels != features.mels, f"encoder.mels is {mels}, but the features have {features.mels} mel bins"),
        (
            getattr(features, "window", 0) > features.n_fft,
            f"features.window {getattr(features, 'window', 0)} is longer than n_fft {features.n_fft}",
        ),
        (features.hop > features.n_fft, f"features.hop {features.hop} is longer than n_fft {features.n_fft}"),
        (
            decoder.pad >= decoder.vocabulary,
            f"decoder.pad {decoder.pad} is beyond the vocabulary of {decoder.vocabulary}",
        ),
        (
            not decoder.learned_positions and decoder.positions * decoder.width > MOST_POSITION_VALUES,
            f"decoder.positions {decoder.positions} of width {decoder.width} take more than "
            f"{MOST_POSITION_VALUES:,} values",
        ),
    )
    for wrong, fault in faults:
        if wrong:
            raise CheckpointError(f"{source}: {fault}")
    parameters = least_parameters(config)
    if stored is not None and parameters > max(stored, SMALL):
        raise CheckpointError(
            f"{source} describes a model of more than {parameters:,} parameters, but its weights have only {stored:,} "
            "bytes; was the configuration edited, or are the weights another model's?"
        )


def _check_fields(part: Any, place: str) -> None:
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), field.name
        if dataclasses.is_dataclass(value):
            _check_fields(value, f"{place}{name}.")
        elif name in CHOICES and value not in CHOICES[name]:
            raise CheckpointError(f"{place}{name} is {value!r:.80}; it must be {' or '.join(map(repr, CHOICES[name]))}")
        elif name in RANGES:
            least, most = RANGES[name]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            whole = field.type not in ("int", int) or isinstance(value, int)
            if not (number and whole and least <= value <= most):
                raise CheckpointError(f"{place}{name} is {value!r:.80}; it must be from {least:,} to {most:,}")


def least_parameters(config: ModelConfig) -> int:
    """Return the parameters of attention, feed-forward and embedding: a lower bound for a model of this shape."""
    encoder, decoder = config.encoder, config.decoder
    feedforward = getattr(encoder, "feedforward", 0)
    return (
        encoder.layers * encoder.width * (4 * encoder.width + 2 * feedforward)
        + decoder.layers * decoder.width * (8 * decoder.width + 2 * decoder.feedforward)
        + (decoder.vocabulary + decoder.positions * decoder.learned_positions) * decoder.width
        + config.ctc_vocabulary * config.ctc_upsampling * encoder.width
        + getattr(encoder, "positions", 0) * encoder.width
        + getattr(encoder, "subsampling_channels", 0) * config.features.mels // 8 * encoder.width
    )


def read_settings(
    cls: type[Part],
    fields: Iterable[tuple[str, str]],
    given: Mapping[str, object],
    source: str | Path,
    fixed: Mapping[str, object] = MappingProxyType({}),
    *,
    complete: bool = True,
) -> Part:
    """Return a part's configuration ``cls`` of another project's settings.

    fields: (their setting, our field). fixed: fields that their models share. complete: integers may not be missing.
    Raises CheckpointError that names ``source`` and the setting, for values of another type and for settings of one
    field that differ.
    """
    values: dict[str, object] = dict(fixed)
    for theirs, ours in fields:
        kind = type(getattr(cls, ours))  # of the default
        if theirs not in given:
            if kind is int and complete:
                raise CheckpointError(f"{source}: {theirs} is missing")
            continue
        value = given[theirs]
        if kind is float and type(value) is int and abs(value) < MAX_NUMBER:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(f"{source}: {theirs} is {value!r:.80}; it must be {kind.__name__}")
        if values.setdefault(ours, value) != value:
            raise CheckpointError(f"{source}: {theirs} {value!r} differs from its like, {values[ours]!r}")
    return cls(**values)


def fit_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path, wanted: Mapping[str, Tensor] | None = None
) -> None:
    """Copy ``tensors`` into the parameters and buffers of ``module``, which they must match exactly.

    ``wanted``: the part of the state dict that they are (default: all of it). Raises CheckpointError with the names of
    missing, unexpected, misshapen and mistyped tensors, before anything is copied.
    """
    partial, wanted = wanted is not None, module.state_dict() if wanted is None else wanted
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
    faults = [("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen), ("mistyped", mistyped)]
    if missing or unexpected or misshapen or mistyped:
        parts = [f"{len(names)} {fault}: {_some(names)}" for fault, names in faults if names]
        raise CheckpointError(
            f"{source}: tensors do not fit the configuration. {'; '.join(parts)}. "
            "Was the configuration edited, or are the weights another model's?"
        )
    module.load_state_dict(dict(tensors), strict=not partial)


def _some(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def check_vocabulary(model: SpeechModel, tokenizer: Tokenizer | None, source: str | Path) -> None:
    """Raise CheckpointError if the tokenizer has ids that the model's embedding does not."""
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
        """Return their name of our tensor."""
        for our, their in self.pairs:
            ours = ours.replace(our, their)
        return ours

    def ours(self, theirs: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return their tensors under the names and shapes of ``model``; unknown ones keep their names."""
        theirs = dict(theirs)
        ours = {}
        for name, tensor in model.state_dict().items():
            their = theirs.pop(self.name(name), None)
            if their is not None:
                ours[name] = their.squeeze(-1) if their.shape == (*tensor.shape, 1) else their
        return ours | theirs

    def theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return our tensors under their names and shapes, ready to be written."""
        theirs = {}
        for name, tensor in ours.items():
            kernel = ".pointwise_conv" in name and tensor.ndim == 2
            tensor = tensor.unsqueeze(-1) if kernel else tensor
            theirs[self.name(name)] = tensor.detach().cpu().contiguous()
        return theirs
