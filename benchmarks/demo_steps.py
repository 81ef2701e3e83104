"""Measure the WER of the demo's recipe after fixed numbers of steps, for several seeds, with every decoding method.

    python benchmarks/demo_steps.py -o FOLDER [--steps 1400 3500] [--seeds 3] [--json FILE]

`canter demo` takes the steps that fit its minutes, so how well it ends depends on the machine; here the number of steps
is given. All runs share the corpus (that of seed 0, as the demo's) and the measured budget, and differ in their seed:
initial weights and order. Each is decoded by attention only, by CTC only, and jointly at every --weights, by greedy
search and with --beam beams; decoder seconds are wall-clock. The same command resumes: finished runs and
decodings are kept.
"""

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from canter.cli.progress import TerminalEvents, say
from canter.corpus.manifest import Utterance, read_manifest
from canter.demo.config import FULL
from canter.demo.pipeline import recipe
from canter.demo.synthesis import Corpus, synthesise
from canter.evaluation.wer import score_texts
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig
from canter.inference.transcribe import transcribe
from canter.loading import load_model
from canter.models.hub import checkpoint_of
from canter.reporting.machine import describe_machine
from canter.training.recipe import run_training


@dataclass(frozen=True)
class Options:
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for corpus and runs."""
    steps: tuple[int, ...] = (1400, 3500)
    """Numbers of steps; each is a separate run, whose learning rate reaches its floor."""
    seeds: int = 3
    utterances: int = 6000
    """Training utterances of the corpus."""
    weights: tuple[float, ...] = (0.1, 0.3, 0.5)
    """Weights of CTC in joint decoding."""
    beam: int = 5
    """Beams; 1: greedy search only."""
    threads: int | None = None
    """Threads for training (default: measured at the start of each run)."""
    json: Path | None = None
    """File for the figures (default: FOLDER/DATE-demo-steps.json)."""


def runs_of(options: Options, corpus: Corpus) -> Iterator[tuple[int, int, Path, float]]:
    """Train each run, unless it is finished, and yield (steps, seed, folder, training seconds)."""
    budget = options.output / "budget.json"
    for steps in options.steps:
        for seed in range(options.seeds):
            folder = options.output / f"{steps}-{seed}"
            done = folder / "seconds.json"
            if not done.exists():
                say(f"{steps} steps, seed {seed}")
                settings: dict[str, Any] = {"steps": steps, "seed": seed, "save_every": 100, "keep_checkpoints": 1}
                if budget.exists():
                    settings["budget"] = budget
                config = replace(recipe(corpus.train_manifest, folder), threads=options.threads, track=(), **settings)
                finished = run_training(config, TerminalEvents())
                if not budget.exists():
                    finished.prepared.schedule.budget.save(budget)
                done.write_text(json.dumps(finished.progress.seconds), encoding="utf-8")
            yield steps, seed, folder, float(json.loads(done.read_text(encoding="utf-8")))


def decoded(options: Options, corpus: Corpus, folder: Path) -> dict[str, dict[str, float]]:
    """Return WER, CER and decoder seconds of a run by decoding method; each is decoded once."""
    ways = [("attention", 0.0, 1), *((f"joint {weight:g}", weight, 1) for weight in options.weights)]
    if options.beam > 1:
        beams = [(f"{name}, {options.beam} beams", weight, options.beam) for name, weight, _ in ways]
        ways += beams
    kept = folder / "decoded.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    missing = [way for way in ways if way[0] not in found]
    if not missing:
        return found
    model = load_model(checkpoint_of(folder))
    utterances = [row for row in read_manifest(corpus.test_manifest) if isinstance(row, Utterance)]
    references = [utterance.text for utterance in utterances]
    for name, weight, beams in missing:
        engine = Engine(
            model, model.tokenizer.end, EngineConfig(ctc_weight=weight, beams=beams), ctc=name == "attention"
        )
        began = time.perf_counter()
        results = transcribe(engine, model.tokenizer, utterances)
        rates = score_texts(references, [result.text for result in results], normalize="none").total
        found[name] = {
            "wer": rates.wer,
            "cer": rates.cer,
            "decoder_seconds": engine.counters.decoder_seconds,
            "seconds": time.perf_counter() - began,
        }
        if name == "attention" and model.characters is not None:
            texts = [model.characters.decode(result.ctc or ()) for result in results]
            rates = score_texts(references, texts, normalize="none").total
            found["CTC"] = {"wer": rates.wer, "cer": rates.cer}
        kept.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def main(options: Options) -> None:
    corpus = synthesise(options.output / "corpus", utterances=options.utterances, test_utterances=FULL.test_utterances)
    rows = []
    for steps, seed, folder, seconds in runs_of(options, corpus):
        for way, figures in decoded(options, corpus, folder).items():
            rows.append({"steps": steps, "seed": seed, "train_seconds": seconds, "way": way, **figures})
    show(rows)
    path = options.json or options.output / f"{date.today()}-demo-steps.json"
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "json")}
    figures = {"options": settings, "machine": describe_machine(), "runs": rows}
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    say(f"written: {path}")


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("steps", "decoded by", "WER, each seed", "mean", "decoder, s")
    for steps in dict.fromkeys(row["steps"] for row in rows):
        for way in dict.fromkeys(row["way"] for row in rows):
            part = [row for row in rows if (row["steps"], row["way"]) == (steps, way)]
            if not part:
                continue
            rates = [row["wer"] for row in part]
            seconds = [row["decoder_seconds"] for row in part if "decoder_seconds" in row]
            table.add_row(
                f"{steps:,}",
                way,
                " ".join(f"{rate:.1%}" for rate in rates),
                f"{statistics.mean(rates):.1%}",
                f"{statistics.mean(seconds):.1f}" if seconds else "",
            )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
