"""Show the shape of a model and its cost: layers, widths, parameters by part, FLOPs, memory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from canter.models.cost import UtteranceCost
    from canter.models.protocol import AnyModel

OPTIMIZER_BYTES = 16  # a parameter in training: weight, gradient and two moments, float32


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A Canter, Hugging Face or CTranslate2 folder, a .nemo file, a run (its best checkpoint), or a hub name."""
    seconds: float = 10.0
    """Duration of the utterance whose FLOPs and memory are shown."""
    tokens_per_second: float = 4.0
    """Tokens of that utterance per second, prompt and end token included."""
    json: bool = False
    """Print one JSON object on stdout instead of a table."""


def run(options: Options) -> int | None:
    from canter.errors import ConfigError
    from canter.loading import FORMATS, load_module
    from canter.models.abilities import abilities
    from canter.models.hub import checkpoint_of

    if options.seconds <= 0 or options.tokens_per_second <= 0:
        raise ConfigError("--seconds and --tokens-per-second must be above 0")
    model = load_module(checkpoint_of(options.model))
    tokens = max(1, min(model.positions, round(options.seconds * options.tokens_per_second)))
    cost = model.cost(options.seconds, tokens)
    supported = abilities(model, FORMATS[model.format].native)
    if options.json:
        print(json.dumps({**_figures(model, cost), "supports": supported}, indent=2))
        return
    _show(model, cost, str(options.model))
    for title, asked in (("supports", True), ("not", False)):
        names = [name for name, works in supported.items() if works == asked]
        if names:
            print(f"{title}: {', '.join(names)}")


def _figures(model: AnyModel, cost: UtteranceCost) -> dict[str, object]:
    total = sum(model.parts().values())
    tokenizer = model.tokenizer
    return {
        "config": model.layers(),
        "parameters": {**model.parts(), "total": total},
        "utterance": asdict(cost),
        "flops_per_second_of_audio": {
            "encoder": round(cost.encoder_flops / cost.seconds),
            "decoder": round(cost.decoder_flops / cost.seconds),
        },
        "training_bytes": {"fixed": OPTIMIZER_BYTES * total, "utterance": cost.training_bytes},
        "decoding_bytes": {"weights": 4 * total, "cache_of_an_utterance": 4 * cost.cache_values},
        "tokenizer": tokenizer and {"ids": tokenizer.vocab_size, "languages": list(tokenizer.languages)},
    }


def _show(model: AnyModel, cost: UtteranceCost, name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{name}[/bold]")
    for part in ("encoder", "decoder"):
        settings = model.layers()[part]
        kind = f"{settings['kind']}, " if "kind" in settings else ""
        sizes = ", ".join(f"{key} {settings[key]}" for key in ("width", "heads", "feedforward") if key in settings)
        console.print(f"  {part}: {kind}{settings['layers']} layers, {sizes}")
    described = "none"
    if model.tokenizer is not None:
        names = model.tokenizer.languages
        languages = ", ".join(names) if len(names) <= 8 else f"{len(names)} languages"
        described = f"{model.tokenizer.vocab_size} ids" + (f", {languages}" if names else "")
    console.print(f"  vocabulary: {model.vocabulary}; tokenizer: {described}")

    table = Table("parameters", "", "", show_edge=False, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    total = sum(model.parts().values())
    for part, count in {**model.parts(), "total": total}.items():
        table.add_row(part, f"{count:,}", f"{count / total:.1%}")
    console.print(table)
    console.print(
        f"an utterance of {cost.seconds:g} s: {cost.frames} encoder frames, {cost.tokens} tokens\n"
        f"  FLOPs per second of audio: encoder {cost.encoder_flops / cost.seconds / 1e9:.3g} G, "
        f"decoder {cost.decoder_flops / cost.seconds / 1e9:.3g} G\n"
        f"  training, float32 with Adam: {_size(OPTIMIZER_BYTES * total)} fixed, "
        f"{_size(cost.training_bytes)} for the utterance\n"
        f"  decoding, float32: {_size(4 * total)} of weights, "
        f"{_size(4 * cost.cache_values)} of cached keys and values for the utterance"
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError
