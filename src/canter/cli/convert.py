"""Rewrite a model in another format: a Canter folder, a Hugging Face folder or a .nemo archive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Options:
    source: tyro.conf.Positional[Path]
    """A model: a Canter or Hugging Face folder, a .nemo file, a run's folder (its best checkpoint), or a hub name."""
    destination: tyro.conf.Positional[Path]
    """What to write; a name that ends in .nemo asks for an archive."""
    to: Literal["auto", "canter", "huggingface", "nemo"] = "auto"
    """The format: 'auto' is 'nemo' for a name that ends in .nemo and 'canter' for any other."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights as written; .nemo archives are always float32."""
    overwrite: bool = False
    """Replace a destination that exists."""


def run(options: Options) -> int | None:
    from canter.errors import ConfigError

    source, destination = options.source, options.destination
    if destination.exists() and not options.overwrite:
        raise ConfigError(f"{destination} exists; choose another name, or --overwrite")

    import torch

    from canter.models.formats.checkpoint import load_model, save_model
    from canter.models.formats.huggingface import write_hf
    from canter.models.formats.nemo_export import write_nemo
    from canter.models.hub import checkpoint_of

    checkpoint = checkpoint_of(source)
    for path in (source.resolve(), checkpoint.resolve()):
        if path == destination.resolve():
            raise ConfigError(f"{destination} is the source itself; choose another name")
        if destination.resolve() in path.parents:
            raise ConfigError(f"{destination} holds the source, {path}; choose another name")
    kind = options.to
    if kind == "auto":
        kind = "nemo" if destination.suffix == ".nemo" else "canter"
    write = {"canter": save_model, "huggingface": write_hf, "nemo": write_nemo}[kind]
    model = load_model(checkpoint, dtype=getattr(torch, options.dtype))
    write(model, destination)
    tokenizer = "with its tokenizer" if model.tokenizer is not None else "without a tokenizer"
    print(f"{destination}: {sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer}")
