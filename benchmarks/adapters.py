"""Measure what a batch of several LoRA adapters costs: the engine with a bank of adapters against a merged one.

    python benchmarks/adapters.py MODEL MANIFEST [--adapters 4] [--rank 16] [--json FILE]

The adapters are random and small enough to leave most transcripts as they are. Arms, in turns: the model without
adapters, one adapter merged into its weights, a bank from which no request takes an adapter, and a bank whose adapters
the requests take in turn.
"""

import copy
import itertools
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from canter.corpus.audio import decode_utterance
from canter.corpus.manifest import Utterance
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request
from canter.inference.recording import Transcriber
from canter.loading import load_model
from canter.models.lora import LoraAdapter, attach_bank, choose_modules, linear_layers, merge
from canter.models.model import SpeechModel
from canter.reporting.machine import describe_machine

SCALE = 1e-4  # of the product of the matrices, against weights of about 0.05


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    manifest: tyro.conf.Positional[Path]
    clips: int = 32
    adapters: int = 4
    rank: int = 16
    repeats: int = 5
    json: Path | None = None
    """File for the figures."""


def random_adapter(model: SpeechModel, rank: int, seed: int) -> tuple[LoraAdapter, dict[str, torch.Tensor]]:
    """Return an adapter of the layers that `canter train --lora.rank` adapts."""
    layers = linear_layers(model)
    modules = choose_modules(model, (), (), {name: name for name in layers}, "the model")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        tensors[f"{name}.lora_A"] = torch.randn(rank, layers[name].in_features, generator=generator) * SCALE**0.5
        tensors[f"{name}.lora_B"] = torch.randn(layers[name].out_features, rank, generator=generator) * SCALE**0.5
    return LoraAdapter(rank, float(rank), 0.0, modules), tensors


def requests_of(model: SpeechModel, options: Options) -> list[Request]:
    transcriber = Transcriber(Engine(model, model.tokenizer.end), model.tokenizer)
    found = []
    rows = map(json.loads, options.manifest.read_text(encoding="utf-8").splitlines())
    for row in itertools.islice(rows, options.clips):
        path = str(options.manifest.parent / row["audio_filepath"])
        utterance = Utterance(path, row["duration"], text="", lang="en")
        request = transcriber.request(transcriber.slots(utterance))
        found.append(replace(request, audio=decode_utterance(utterance, model.sample_rate).samples, policy=None))
    return found


def main(options: Options) -> None:
    base = load_model(options.model)
    requests = requests_of(base, options)
    adapters = {str(n): random_adapter(base, options.rank, n) for n in range(options.adapters)}
    merged = copy.deepcopy(base)
    merge(merged, *adapters["0"])
    together = copy.deepcopy(base)
    together.set_bank(attach_bank(together, adapters, dict.fromkeys(adapters, "")))
    turns = [replace(one, adapter=1 + n % options.adapters) for n, one in enumerate(requests)]
    arms = {
        "no adapter": (base, requests),
        "one, merged": (merged, requests),
        "bank, none taken": (together, requests),
        f"bank of {options.adapters}, in turns": (together, turns),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    decoder: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.repeats + 1):  # the first one warms up
        for name, (model, asked) in arms.items():
            engine = Engine(model, model.tokenizer.end, EngineConfig())
            engine.decode(asked)
            seconds[name].append(engine.counters.seconds)
            decoder[name].append(engine.counters.decoder_seconds)
    first = statistics.median(seconds["no adapter"][1:])
    table = Table("", "seconds", "times those without adapters", "of them decoder")
    result = {}
    for name in arms:
        times = sorted(seconds[name][1:])
        result[name] = {"seconds": times, "decoder_seconds": sorted(decoder[name][1:])}
        median = statistics.median(times)
        spread = f"{median:.2f} ({times[0]:.2f} to {times[-1]:.2f})"
        table.add_row(name, spread, f"{median / first:.2f}", f"{statistics.median(decoder[name][1:]):.2f}")
    Console().print(table)
    if options.json:
        value = {"model": options.model.name, "clips": len(requests), "rank": options.rank, "arms": result,
                 "machine": describe_machine()}  # fmt: skip
        options.json.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
