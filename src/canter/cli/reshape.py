"""Move capacity from decoder to encoder: fewer decoder layers, more encoder layers, from trained weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from canter.models.model import SpeechModel
    from canter.models.timing import DecodingTime


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A Canter or Hugging Face folder, a .nemo file, a run's folder (its best checkpoint), or a hub name."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the new model."""
    decoder_layers: int | None = None
    """Layers that the decoder keeps; none: all."""
    encoder_layers: int | None = None
    """Layers of the new encoder; none: as many as before, or what --keep-parameters or --keep-flops asks for."""
    keep_parameters: bool = False
    """As many encoder layers as keep the number of parameters."""
    keep_flops: bool = False
    """As many encoder layers as keep the operations of an utterance."""
    growth: Literal["identity", "copy"] = "identity"
    """New encoder layers that change nothing at first, or copies of their neighbours."""
    kept: Literal["even", "spread", "first", "last"] = "even"
    """Which layers stay where a stack shrinks: `spread` from the first to the last, at `even` steps from the first on,
    or the `first` or `last` ones."""
    seconds: float = 10.0
    """The utterance that operations and times are told for."""
    tokens: int = 40
    """Its tokens."""
    batch: int = 4
    """Utterances decoded together, for the times."""
    json: bool = False
    """Figures as JSON on standard output."""


def run(options: Options) -> int | None:
    from canter.errors import ConfigError
    from canter.models.formats.checkpoint import load_model, save_model
    from canter.models.hub import checkpoint_of
    from canter.models.reshape import encoder_layers_that_keep, reshape
    from canter.models.timing import measure
    from canter.text.characters import FILE as ALPHABET
    from canter.text.characters import Characters

    asked = (options.encoder_layers is not None, options.keep_parameters, options.keep_flops)
    if sum(asked) > 1:
        raise ConfigError("--encoder-layers, --keep-parameters and --keep-flops exclude each other")
    if options.output.exists():
        raise ConfigError(f"{options.output} exists; choose another name")
    source = checkpoint_of(options.model)
    model = load_model(source)
    decoder = options.decoder_layers or model.config.decoder.layers
    encoder = options.encoder_layers or model.config.encoder.layers
    if options.keep_parameters or options.keep_flops:
        what = "parameters" if options.keep_parameters else "flops"
        encoder = encoder_layers_that_keep(what, model.config, decoder, options.seconds, options.tokens)
    reshaped = reshape(model, encoder_layers=encoder, decoder_layers=decoder, growth=options.growth, kept=options.kept)
    save_model(reshaped, options.output)
    if (source / ALPHABET).exists():  # of the CTC head
        Characters.load(source).save(options.output)
    times = measure(model, options.seconds, options.tokens, options.batch)
    figures = {
        "before": _figures(model, times, options),
        "after": _figures(reshaped, times, options),
        "output": str(options.output),
    }
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    _show(figures)
    if (options.keep_parameters or options.keep_flops) and encoder == model.config.encoder.layers:
        what = "parameters" if options.keep_parameters else "operations"
        print(f"the encoder keeps its {encoder} layers: the decoder gave up less than half a layer's {what}")
    if decoder < model.config.decoder.layers:
        print("train it on: the decoder lost what its layers knew")


def _figures(model: SpeechModel, times: DecodingTime, options: Options) -> dict[str, Any]:
    from canter.models.cost import parameters, utterance_cost

    encoder, decoder = model.config.encoder.layers, model.config.decoder.layers
    cost = utterance_cost(model.config, options.seconds, options.tokens)
    return {
        "encoder_layers": encoder,
        "decoder_layers": decoder,
        "parameters": sum(parameters(model).values()),
        "encoder_flops": cost.encoder_flops,
        "decoder_flops": cost.decoder_flops,
        "encoder_seconds": times.encoder.of(encoder),
        "decoder_seconds": times.decoder.of(decoder),
    }


ROWS = (
    ("encoder_layers", "encoder layers", 1, ",.0f"),
    ("decoder_layers", "decoder layers", 1, ",.0f"),
    ("parameters", "parameters", 1, ",.0f"),
    ("encoder_flops", "encoder operations, G", 1e-9, ",.3g"),
    ("decoder_flops", "decoder operations, G", 1e-9, ",.3g"),
    ("encoder_seconds", "encoder, predicted ms", 1e3, ",.1f"),
    ("decoder_seconds", "decoder, predicted ms", 1e3, ",.1f"),
)


def _show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "before", "after", "ratio", show_edge=False, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for key, name, scale, form in ROWS:
        old, new = figures["before"][key] * scale, figures["after"][key] * scale
        table.add_row(name, format(old, form), format(new, form), f"{new / old:.2f}" if old else "")
    Console(highlight=False, soft_wrap=True).print(table)
    print(f"written to {figures['output']}")
