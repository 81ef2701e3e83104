"""Rewrite a model in another format: a Canter, Hugging Face or ESPnet folder, or a .nemo archive."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

MOST_CARD_BYTES = 2**20


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A Canter, Hugging Face or CTranslate2 folder, a .nemo file, a run (its best checkpoint), or a hub name."""
    output: tyro.conf.Positional[Path]
    """Folder or file to write; a name that ends in .nemo asks for an archive."""
    format: Literal["auto", "canter", "huggingface", "nemo", "espnet"] = "auto"
    """Format to write (default: nemo for a name that ends in .nemo, canter for any other)."""
    merge: bool = False
    """Write the model with its LoRA adapter merged; needed for a run that trained one, and for --adapter."""
    adapter: Path | None = None
    """LoRA adapter to merge into the model: a folder of Canter or peft, or a run (default: none)."""
    precision: Literal["float32", "bf16", "float16"] = "float32"
    """Type of the weights as written; .nemo archives are always float32."""
    overwrite: bool = False
    """Replace an output that exists."""


def run(options: Options) -> int | None:
    from canter.errors import ConfigError

    output = options.output
    if output.exists() and not options.overwrite:
        raise ConfigError(f"{output} exists; choose another name, or --overwrite")

    from canter.files import write_text
    from canter.loading import DTYPES, base_folder, load_model, load_module, model_format, save_module
    from canter.models.hub import checkpoint_of
    from canter.untrusted import read_limited

    checkpoint = checkpoint_of(options.model)
    base = base_folder(checkpoint)
    adapted = options.adapter is not None or base != checkpoint
    if adapted != options.merge:
        raise ConfigError(
            f"{options.model} has no adapter to merge; leave --merge out, or name an --adapter"
            if options.merge
            else f"{options.adapter or checkpoint} is a LoRA adapter, which is not converted by itself; add --merge to "
            "write the model with the adapter merged into its weights"
        )
    for path in (options.model.resolve(), checkpoint.resolve(), base.resolve()):
        if path == output.resolve():
            raise ConfigError(f"{output} is the model itself; choose another name")
        if output.resolve() in path.parents:
            raise ConfigError(f"{output} holds the model, {path}; choose another name")
    form = options.format
    if form == "auto":
        form = "nemo" if output.suffix == ".nemo" else "canter"
    if adapted and options.format in ("auto", "huggingface") and not model_format(base).native:
        model, form = load_module(checkpoint, precision=options.precision, adapter=options.adapter), "transformers"
    else:
        model = load_model(checkpoint, dtype=DTYPES[options.precision], adapter=options.adapter)
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        save_module(model, output, form=form)
    for notice in notices:
        print(f"canter: {notice.message}", file=sys.stderr)
    card = checkpoint / "README.md"
    if output.is_dir() and card.is_file():
        from canter.training.run.card import with_library

        text = read_limited(card, MOST_CARD_BYTES).decode(errors="replace")
        write_text(output / card.name, with_library(text, "transformers" if form == "huggingface" else "canter"))
    tokenizer = "with its tokenizer" if model.tokenizer is not None else "without a tokenizer"
    print(f"{output}: {sum(model.parts().values()):,} parameters, {tokenizer}")
