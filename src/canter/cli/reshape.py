"""Move capacity from decoder to encoder: fewer decoder layers, more encoder layers, from trained weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from canter.models.model import SpeechModel
    from canter.models.reshape import DecodingTime

ROWS = (
    ("encoder_layers", "encoder layers", 1, ",.0f"),
    ("decoder_layers", "decoder layers", 1, ",.0f"),
    ("parameters", "parameters", 1, ",.0f"),
    ("encoder_flops", "encoder GFLOPs", 1e-9, ",.3g"),
    ("decoder_flops", "decoder GFLOPs", 1e-9, ",.3g"),
    ("encoder_seconds", "encoder, predicted ms", 1e3, ",.1f"),
    ("decoder_seconds", "decoder, predicted ms", 1e3, ",.1f"),
)
"""Figure, its name in the table, the factor to its unit, and its format."""


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A Canter or Hugging Face folder, a .nemo file, a run's folder (its best checkpoint), or a hub name."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write the new model to."""
    decoder_layers: int | None = None
    """Number of decoder layers to keep (default: all)."""
    encoder_layers: int | None = None
    """Number of encoder layers of the new model (default: as before, or as --match needs)."""
    match: Literal["parameters", "flops"] | None = None
    """Choose the number of encoder layers that keeps the number of parameters, or the FLOPs of an utterance."""
    new_layers: Literal["identity", "copy"] = "identity"
    """New encoder layers change nothing at first (identity), or are copies of their neighbours (copy)."""
    kept_layers: Literal["even", "spread", "first", "last"] = "even"
    """Layers to keep where a stack shrinks: at `even` steps from the first on, `spread` from the first to the last, or
    the `first` or `last` ones."""
    seconds: float = 10.0
    """Duration of the utterance whose FLOPs and times are shown."""
    tokens_per_second: float = 4.0
    """Tokens of that utterance per second, prompt and end token included."""
    batch_size: int = 4
    """Number of utterances decoded together when times are measured."""
    json: bool = False
    """Print one JSON object on stdout instead of a table."""


def run(options: Options) -> int | None:
    from canter.errors import ConfigError
    from canter.loading import load_model, save_module
    from canter.models.hub import checkpoint_of
    from canter.models.reshape import encoder_layers_that_keep, measure_times, reshape

    if options.encoder_layers is not None and options.match is not None:
        raise ConfigError("--encoder-layers and --match exclude each other")
    if options.output.exists():
        raise ConfigError(f"{options.output} exists; choose another name")
    model = load_model(checkpoint_of(options.model))
    before, tokens = model.config, max(1, round(options.seconds * options.tokens_per_second))
    decoder = options.decoder_layers or before.decoder.layers
    encoder = options.encoder_layers or before.encoder.layers
    if options.match:
        encoder = encoder_layers_that_keep(options.match, before, decoder, options.seconds, tokens)
    reshaped = reshape(
        model, encoder_layers=encoder, decoder_layers=decoder, growth=options.new_layers, kept=options.kept_layers
    )
    save_module(reshaped, options.output)
    times = measure_times(model, options.seconds, tokens, options.batch_size)
    figures = [_figures(one, times, options.seconds, tokens) for one in (model, reshaped)]
    if options.json:
        print(json.dumps({"before": figures[0], "after": figures[1], "output": str(options.output)}, indent=2))
        return
    _show(*figures)
    print(f"written to {options.output}")
    if options.match and encoder == before.encoder.layers:
        print(f"the encoder keeps its {encoder} layers: the decoder lost less than half a layer's {options.match}")
    if decoder < before.decoder.layers:
        print("train it further: the decoder lost what its removed layers computed")


def _figures(model: SpeechModel, times: DecodingTime, seconds: float, tokens: int) -> dict[str, float]:
    encoder, decoder = model.config.encoder.layers, model.config.decoder.layers
    cost = model.cost(seconds, tokens)
    return {
        "encoder_layers": encoder,
        "decoder_layers": decoder,
        "parameters": sum(model.parts().values()),
        "encoder_flops": cost.encoder_flops,
        "decoder_flops": cost.decoder_flops,
        "encoder_seconds": times.encoder.of(encoder),
        "decoder_seconds": times.decoder.of(decoder),
    }


def _show(before: dict[str, float], after: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "before", "after", "ratio", show_edge=False, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for key, name, scale, form in ROWS:
        old, new = before[key] * scale, after[key] * scale
        table.add_row(name, format(old, form), format(new, form), f"{new / old:.2f}" if old else "")
    Console(highlight=False, soft_wrap=True).print(table)
