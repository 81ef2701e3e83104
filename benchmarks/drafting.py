"""Several tokens a decoder step: time, steps and acceptance with drafts against the same engine without them.

    python benchmarks/drafting.py MODEL... --audio MANIFEST [--draft ctc MODEL] [--rows 1 16] [--widths 4 8] [--json F]

For every model, number of rows and source of drafts, engines with and without drafts decode the same clips in turns,
after a turn that warms up and lets the engine choose how many tokens a step checks. Ratios are medians over the turns,
with their range; below 1, drafts are faster. Texts are compared token for token. A width is a fixed number of tokens of
a row in a step.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import tyro

from canter.bench.speed import Clip, EngineSystem, load_clips
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import Counters, EngineConfig
from canter.inference.loading import drafting_engine, load_engine, tokenizer_of
from canter.reporting.machine import describe_machine


@dataclass(frozen=True)
class Options:
    models: tyro.conf.Positional[tuple[Path, ...]]
    """Models that decode; each is measured on its own."""
    audio: Path
    """Manifest of the clips."""
    draft: tuple[str, ...] = ("ctc",)
    """Sources of drafts: ctc, or models with the same tokenizer."""
    rows: tuple[int, ...] = (1, 8, 16, 64)
    """Rows that are decoded together."""
    widths: tuple[int, ...] = ()
    """Fixed numbers of tokens of a row in a step, beside the engine's own choice."""
    utterances: int = 100
    """Clips, evenly spaced over the manifest."""
    repeats: int = 5
    """Timed turns."""
    threads: int = 1
    """Threads that compute."""
    json: Path | None = None
    """Where to write the figures."""


def timed(system: EngineSystem, clips: list[Clip]) -> tuple[list[list[int]], Counters]:
    texts = system(clips)
    return texts, system.engine.counters


def shown(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def compare(engines: dict[str, Engine], clips: list[Clip], repeats: int) -> dict[str, dict[str, object]]:
    """Return the figures of all engines but the first, against the first."""
    systems = {name: EngineSystem(engine) for name, engine in engines.items()}
    texts = {name: timed(system, clips)[0] for name, system in systems.items()}
    runs: dict[str, list[Counters]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, system in systems.items():
            runs[name].append(timed(system, clips)[1])
    (plain, base), *others = runs.items()
    found: dict[str, dict[str, object]] = {}
    for name, counters in others:
        pairs = list(zip(counters, base, strict=True))
        found[name] = {
            "same_text": texts[name] == texts[plain],
            "decoder_time": shown([one.decoder_seconds / other.decoder_seconds for one, other in pairs]),
            "total_time": shown([one.seconds / other.seconds for one, other in pairs]),
            "steps_per_token": statistics.median(one.steps_per_token for one in counters),
            "acceptance": statistics.median(one.acceptance for one in counters),
            "decoder_seconds": statistics.median(one.decoder_seconds for one in counters),
            "decoder_seconds_without": statistics.median(one.decoder_seconds for one in base),
            "encoder_seconds": statistics.median(one.encoder_seconds for one in counters),
            "draft_seconds": statistics.median(one.draft_seconds for one in counters),
        }
    return found


def measure(options: Options, folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    """Return the figures of one model, by rows and source of drafts."""
    engine = load_engine(folder)
    model, tokenizer = engine.model, tokenizer_of(engine.model, folder.name)
    clips, _ = load_clips(engine, options.audio, None, options.utterances)
    found: dict[str, dict[str, dict[str, object]]] = {}
    for rows in options.rows:
        config = EngineConfig(rows=rows)
        engines = {"off": drafting_engine(model, tokenizer, config, "off")}
        for source in options.draft:
            name = source if source == "ctc" else Path(source).name
            engines[name] = drafting_engine(model, tokenizer, config, source)
            for width in options.widths:
                fixed = EngineConfig(rows=rows, draft_width=width)
                engines[f"{name} {width}"] = drafting_engine(model, tokenizer, fixed, source)
        found[str(rows)] = compare(engines, clips, options.repeats)
        for name, figures in found[str(rows)].items():
            decoder = cast("dict[str, float]", figures["decoder_time"])
            total = cast("dict[str, float]", figures["total_time"])
            print(
                f"{folder.name:24} {rows:3} rows  {name:14} decoder {decoder['median']:.2f} "
                f"({decoder['least']:.2f}-{decoder['most']:.2f})  total {total['median']:.2f}  "
                f"steps a token {figures['steps_per_token']:.3f}  accepted {figures['acceptance']:.2f}  "
                f"same text {figures['same_text']}",
                flush=True,
            )
    return found


def main(options: Options) -> dict[str, object]:
    """Measure all models; return and print the figures."""
    torch.set_num_threads(options.threads)
    result: dict[str, object] = {
        "machine": describe_machine("cuda" if torch.cuda.is_available() else "cpu", []),
        "audio": options.audio.name,
        "utterances": options.utterances,
        "repeats": options.repeats,
        "models": {},
    }
    for folder in options.models:
        cast("dict[str, object]", result["models"])[folder.name] = measure(options, folder)
        if options.json:  # after every model: what is finished is kept
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
