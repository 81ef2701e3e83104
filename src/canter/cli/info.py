"""What a model is and costs: layers, widths, parameters by part, operations, memory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    pass

OPTIMIZER_BYTES = 16  # a parameter in training: weight, gradient and two moments, float32


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A Canter or Hugging Face folder, a .nemo file, a run's folder (its best checkpoint), or a hub name."""
    seconds: float = 10.0
    """Length of the utterance that operations and memory are told for."""
    tokens_per_second: float = 4.0
    """Its tokens, prompt and end token included."""
    json: bool = False
    """Figures as JSON on standard output."""


def run(options: Options) -> int | None:
    from canter.errors import ConfigError

    if options.seconds <= 0 or options.tokens_per_second <= 0:
        raise ConfigError("--seconds and --tokens-per-second must be above 0")
    from canter.cli.models import load_any
    from canter.models.hub import checkpoint_of

    figures = describe(load_any(checkpoint_of(options.model)), options.seconds, options.tokens_per_second)
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        show(figures, str(options.model))


def describe(model: Any, seconds: float, tokens_per_second: float) -> dict[str, Any]:
    """Everything that is shown, in numbers: operations, bytes, seconds, frames, tokens."""
    from canter.models.cost import parameters, utterance_cost
    from canter.models.formats.checkpoint import config_to_json

    tokens = max(1, min(model.positions, round(seconds * tokens_per_second)))
    if "cost_model" in model.supports:
        config, parts, cost = (
            config_to_json(model.config), parameters(model), utterance_cost(model.config, seconds, tokens)
        )  # fmt: skip
    else:
        config, parts, cost = model.layers(), model.parts(), model.cost(seconds, tokens)
    total = sum(parts.values())
    return {
        "config": config,
        "parameters": {**parts, "total": total},
        "utterance": asdict(cost),
        "flops_per_second_of_audio": {
            "encoder": round(cost.encoder_flops / seconds),
            "decoder": round(cost.decoder_flops / seconds),
        },
        "training_bytes": {"fixed": OPTIMIZER_BYTES * total, "utterance": cost.training_bytes},
        "decoding_bytes": {"weights": 4 * total, "cache_of_an_utterance": 4 * cost.cache_values},
        "tokenizer": None
        if model.tokenizer is None
        else {"ids": model.tokenizer.vocab_size, "languages": list(model.tokenizer.languages)},
    }


def show(figures: dict[str, Any], name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    config = figures["config"]
    encoder, decoder = config["encoder"], config["decoder"]
    console.print(f"[bold]{name}[/bold]")
    for part, shape in (("encoder", encoder), ("decoder", decoder)):
        kind = f"{shape['kind']}, " if "kind" in shape else ""
        sizes = ", ".join(f"{key} {shape[key]}" for key in ("width", "heads", "feedforward") if key in shape)
        console.print(f"  {part}: {kind}{shape['layers']} layers, {sizes}")
    tokenizer = figures["tokenizer"]
    described = "none"
    if tokenizer is not None:
        names = tokenizer["languages"]
        languages = ", ".join(names) if len(names) <= 8 else f"{len(names)} languages"
        described = f"{tokenizer['ids']} ids" + (f", {languages}" if names else "")
    console.print(f"  vocabulary: {decoder['vocabulary']}; tokenizer: {described}")

    table = Table("parameters", "", "", show_edge=False, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    total = figures["parameters"]["total"]
    for part, count in figures["parameters"].items():
        table.add_row(part, f"{count:,}", f"{count / total:.1%}")
    console.print(table)

    utterance, training = figures["utterance"], figures["training_bytes"]
    flops, decoding = figures["flops_per_second_of_audio"], figures["decoding_bytes"]
    console.print(
        f"an utterance of {utterance['seconds']:g} s: {utterance['frames']} encoder frames, "
        f"{utterance['tokens']} tokens"
    )
    console.print(
        f"  operations for a second of audio: encoder {flops['encoder'] / 1e9:.3g} G, "
        f"decoder {flops['decoder'] / 1e9:.3g} G"
    )
    console.print(
        f"  training, float32 with Adam: {_size(training['fixed'])} fixed, "
        f"{_size(training['utterance'])} for the utterance"
    )
    console.print(
        f"  decoding, float32: {_size(decoding['weights'])} of weights, "
        f"{_size(decoding['cache_of_an_utterance'])} of cached keys and values for the utterance"
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError
