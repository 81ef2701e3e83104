"""Rewrite a model in another format: a Canter, Hugging Face or ESPnet folder, or a .nemo archive."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A Canter, Hugging Face or CTranslate2 folder, a .nemo file, a run (its best checkpoint), or a hub name."""
    output: tyro.conf.Positional[Path]
    """Folder or file to write; a name that ends in .nemo asks for an archive."""
    format: Literal["auto", "canter", "huggingface", "nemo", "espnet"] = "auto"
    """Format to write (default: nemo for a name that ends in .nemo, canter for any other)."""
    precision: Literal["float32", "bf16", "float16"] = "float32"
    """Type of the weights as written; .nemo archives are always float32."""
    overwrite: bool = False
    """Replace an output that exists."""


def run(options: Options) -> int | None:
    from canter.errors import ConfigError

    output = options.output
    if output.exists() and not options.overwrite:
        raise ConfigError(f"{output} exists; choose another name, or --overwrite")

    from canter.loading import DTYPES, load_model, save_module
    from canter.models.hub import checkpoint_of

    checkpoint = checkpoint_of(options.model)
    for path in (options.model.resolve(), checkpoint.resolve()):
        if path == output.resolve():
            raise ConfigError(f"{output} is the model itself; choose another name")
        if output.resolve() in path.parents:
            raise ConfigError(f"{output} holds the model, {path}; choose another name")
    form = options.format
    if form == "auto":
        form = "nemo" if output.suffix == ".nemo" else "canter"
    model = load_model(checkpoint, dtype=DTYPES[options.precision])
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        save_module(model, output, form=form)
    for notice in notices:
        print(f"canter: {notice.message}", file=sys.stderr)
    tokenizer = "with its tokenizer" if model.tokenizer is not None else "without a tokenizer"
    print(f"{output}: {sum(model.parts().values()):,} parameters, {tokenizer}")
