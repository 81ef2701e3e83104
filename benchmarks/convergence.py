"""Measure the accuracy of batching strategies: WER of `random`, `bucket_2d` and `balanced` at two values of mixing on
the demo corpus, after equal updates and after equal time.

    python benchmarks/convergence.py -o FOLDER [--updates 2000] [--seeds 3] [--json FILE]

Every run is a `canter train` of the demo's recipe with a smaller model; all share tokenizer, measured budget, threads
and the maximum audio of a step, padding included, and differ only in seed and strategy. Equal updates: the same
number of steps; strategies differ in how much audio a step brings, and so in its time. Equal time: each takes the steps
that fit the time of `random`'s updates, by step times measured beforehand, strategies in turns. The learning rate
reaches its floor in every run. WER is of test sentences, decoded by attention only. The same command resumes.
"""

import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from ladder import Rig
from rich.console import Console
from rich.table import Table

from canter.cli.progress import TerminalEvents, say
from canter.corpus.audio import load_utterance
from canter.corpus.index import LengthIndex
from canter.corpus.manifest import Utterance
from canter.demo.synthesis import synthesise
from canter.files import write_text
from canter.inference.engine.engine import engine_for
from canter.inference.engine.requests import EngineConfig, Request
from canter.loading import load_model
from canter.models.hub import checkpoint_of
from canter.models.model import SpeechModel
from canter.reporting.machine import describe_machine
from canter.training.config import ModelShape, TrainConfig
from canter.training.feed.data import MicroBatches, Steps, collate
from canter.training.recipe import prepare_training, run_training


@dataclass(frozen=True)
class Setting:
    """Corpus and size of the runs that a benchmark compares."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for corpus and runs."""
    seeds: int = 3
    utterances: int = 12000
    """Utterances to synthesise for training; `longest` and `tail` keep some of them."""
    test_utterances: int = 600
    """Utterances to synthesise for testing."""
    longest: float = 16.0
    """Maximum seconds of an utterance, in training and testing."""
    tail: float | None = 1.5
    """Keep an utterance of d seconds with probability tail / d, so that most are short; None keeps all."""
    batch_seconds: float = 48.0
    """Maximum audio of a micro-batch, padding included."""
    width: int = 96
    threads: int = 1
    json: Path | None = None
    """File for the figures."""


@dataclass(frozen=True)
class Options(Setting):
    updates: int = 2000
    """Steps of the runs of equal updates."""
    utterances: int = 3000
    dials: tuple[float, float] = (1.0, 4.0)
    """Values of `mixing` of `balanced`."""
    test_utterances: int = 200
    longest: float = 8.0
    tail: float | None = None
    batch_seconds: float = 16.0
    """Maximum audio of a step, padding included; `random` has the batch size that fits the longest utterances."""
    layers: tuple[int, int] = (4, 2)
    """Layers of encoder and decoder."""
    timed: int = 60
    """Steps of each strategy that are timed before the runs."""


def arms_of(options: Options) -> dict[str, dict[str, Any]]:
    """Return settings by name; the first is the baseline of equal time."""
    dialled = {f"balanced, dial {dial:g}": {"strategy": "balanced", "mixing": dial} for dial in options.dials}
    return {"random": {"strategy": "random"}, "bucket_2d": {"strategy": "bucket_2d"}, **dialled}


def up_to(longest: float, manifest: Path, tail: float | None = None) -> Path:
    """Write a manifest of the utterances up to ``longest`` seconds beside ``manifest``, and return it.

    tail: keep an utterance of d seconds with probability tail / d, so that most are short and few are long.
    """
    rows = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
    draws = np.random.default_rng(0).random(len(rows))
    seconds = [json.loads(row)["duration"] for row in rows]
    kept = [s <= longest and (tail is None or draw * s < tail) for s, draw in zip(seconds, draws)]
    path = manifest.with_name(f"{manifest.stem}-{longest:g}{'' if tail is None else f'-{tail:g}'}.jsonl")
    path.write_text("".join(itertools.compress(rows, kept)), encoding="utf-8")
    return path


def shared(options: Setting, layers: tuple[int, int]) -> TrainConfig:
    """Return the settings that all runs share; corpus, tokenizer and budget are made once."""
    corpus = synthesise(
        options.output / "corpus", utterances=options.utterances, test_utterances=options.test_utterances
    )
    config = TrainConfig(
        manifest=(up_to(options.longest, corpus.train_manifest, options.tail),),
        valid=(up_to(options.longest, corpus.test_manifest, options.tail),),
        output=options.output / "shared",
        vocab_size=600,
        batch_seconds=options.batch_seconds,
        valid_every=1_000_000,
        valid_utterances=options.test_utterances,
        steps=1,
        threads=options.threads,
        precision="float32",
        workers=0,
        track=(),
        model=ModelShape(width=options.width, encoder_layers=layers[0], decoder_layers=layers[1]),
    )
    folder = prepare_training(config, TerminalEvents()).run.folder
    return replace(config, budget=folder / "budget.json", tokenizer=folder / "tokenizer")


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, unless the run is finished, and return its figures."""
    metrics = config.output / "metrics.jsonl"
    last = _logged(metrics)[-1] if metrics.exists() else {}
    if (last.get("kind"), last.get("step")) != ("valid", config.steps):
        run_training(config, TerminalEvents())
    lines = _logged(metrics)
    steps = [line for line in lines if line["kind"] == "train"]
    valid = next(line for line in reversed(lines) if line["kind"] == "valid")
    audio = sum(line["audio_seconds"] for line in steps)
    return {
        "steps": len(steps),
        "audio_hours": audio / 3600,
        "audio_a_step": audio / len(steps),
        "padding": 1 - audio / sum(line["audio_seconds"] / (1 - line["padding"]) for line in steps),
        "wer": valid["wer"],
        "cer": valid["cer"],
    }


@torch.no_grad()
def token_loss(model: SpeechModel, rows: Sequence[Utterance]) -> float:
    """Return the cross-entropy of a token with teacher forcing, over all tokens of the rows."""
    index = LengthIndex(np.array([row.duration for row in rows], np.float32), np.ones(len(rows), np.int64))
    data = MicroBatches(index, model.tokenizer, None, model.sample_rate)
    examples = sorted((data.example(row) for row in rows), key=lambda example: len(example.audio))
    batches = [collate(examples[at : at + 8], model.tokenizer.pad) for at in range(0, len(examples), 8)]
    sums = [model.eval().loss(batch) for batch in batches]
    return float(sum(x.attention for x in sums) / sum(x.attention_count for x in sums))


def decoded_jointly(folder: Path, rows: Sequence[Utterance], ctc_weight: float) -> dict[str, Any]:
    """Return a run's joint transcripts of rows and its cross-entropy a token; they are kept in the run's folder."""
    path = folder / f"joint-{ctc_weight:g}.json"
    if not path.exists():
        model = load_model(checkpoint_of(folder))
        requests = [Request(load_utterance(row, model.sample_rate), model.tokenizer.prompt(row)) for row in rows]
        done = engine_for(model, model.tokenizer.end, EngineConfig(ctc_weight=ctc_weight)).decode(requests)
        texts = [model.tokenizer.decode(one.tokens) for one in done]
        found = {"text": [row.text for row in rows], "pred_text": texts, "token_loss": token_loss(model, rows)}
        write_text(path, json.dumps(found))
    return json.loads(path.read_text(encoding="utf-8"))


def train_rows(folder: Path) -> list[dict[str, Any]]:
    """Return what a run logged of its training steps."""
    return [line for line in _logged(folder / "metrics.jsonl") if line["kind"] == "train"]


def keep(options: Setting, **figures: object) -> None:
    """Write the figures so far to --json, if that is given, with the options and the machine."""
    if options.json:
        given = {k: v for k, v in vars(options).items() if not isinstance(v, Path) and k not in ("speech", "earlier")}
        result = {"options": given, "machine": describe_machine(), **figures}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _logged(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def step_seconds(base: TrainConfig, arms: dict[str, dict[str, Any]], path: Path, timed: int) -> dict[str, float]:
    """Return the mean step time of each strategy over ``timed`` steps, measured in turns, each with its own model.

    The times are kept in ``path``, and only those that it lacks are measured.
    """
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = {name: settings for name, settings in arms.items() if name not in kept}
    if not missing:
        return kept
    taken: dict[str, list[float]] = {name: [] for name in missing}
    runs = {}
    for name, settings in missing.items():
        prepared = prepare_training(
            replace(base, output=path.parent / f"timed-{label(name)}", **settings), TerminalEvents()
        )
        addresses = Steps(prepared.schedule.plan).addresses(None, 0, 0)
        runs[name] = (
            Rig(base, prepared.subject.model, prepared.subject.precision),
            prepared.data.micro_batches,
            addresses,
        )
    for number in range(timed + 1):
        for name, (rig, data, addresses) in runs.items():
            start = time.perf_counter()
            rig.step([data[next(addresses)]], number)
            taken[name].append(time.perf_counter() - start)
    found = kept | {name: statistics.mean(seconds[1:]) for name, seconds in taken.items()}
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def label(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "")


def runs_of(options: Options) -> Iterator[tuple[dict[str, Any], TrainConfig]]:
    """Yield (description, configuration) of every run, seed by seed."""
    base, arms = shared(options, options.layers), arms_of(options)
    seconds = step_seconds(base, arms, options.output / "step_seconds.json", options.timed)
    first, *others = arms
    for seed in range(options.seeds):
        for equal in ("updates", "time"):
            for name in arms if equal == "updates" else others:
                steps = round(options.updates * (seconds[first] / seconds[name] if equal == "time" else 1))
                folder = options.output / f"{equal}-{label(name)}-{seed}"
                about = {"equal": equal, "arm": name, "seed": seed, "seconds": steps * seconds[name]}
                yield about, replace(base, output=folder, seed=seed, steps=steps, **arms[name])


def main(options: Options) -> None:
    rows: list[dict[str, Any]] = []
    for about, config in runs_of(options):
        say(f"{about['arm']}, equal {about['equal']}, seed {about['seed']}, {config.steps} steps")
        rows.append(about | run(config))
    first = next(iter(arms_of(options)))
    rows += [row | {"equal": "time"} for row in rows if row["arm"] == first]  # the same runs, by definition
    show(rows, list(arms_of(options)))
    keep(options, runs=rows)


def mean(rows: list[dict[str, Any]], equal: str, arm: str, key: str) -> float:
    return statistics.mean(row[key] for row in rows if (row["equal"], row["arm"]) == (equal, arm))


def show(rows: list[dict[str, Any]], arms: list[str]) -> None:
    table = Table("equal", "strategy", "steps", "minutes", "audio, s a step", "padding", "WER, each seed", "mean")
    for equal in ("updates", "time"):
        for name in arms:
            rates = [row["wer"] for row in rows if (row["equal"], row["arm"]) == (equal, name)]
            table.add_row(
                equal,
                name,
                f"{mean(rows, equal, name, 'steps'):.0f}",
                f"{mean(rows, equal, name, 'seconds') / 60:.1f}",
                f"{mean(rows, equal, name, 'audio_a_step'):.1f}",
                f"{mean(rows, equal, name, 'padding'):.1%}",
                " ".join(f"{rate:.1%}" for rate in rates),
                f"{statistics.mean(rates):.1%}",
            )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
