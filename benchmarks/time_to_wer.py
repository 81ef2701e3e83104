"""Measure the time that batching strategies need to the same word error rate, on speech with a long tail of lengths.

    python benchmarks/time_to_wer.py -o FOLDER [--seeds 3] [--minutes 2.75 5.5 11] [--json FILE] [--figure FILE]
    python benchmarks/time_to_wer.py -o FOLDER --whisper MODEL --speech MANIFEST ... [...]

The first trains a small model from scratch on the demo's corpus, the second fine-tunes a Whisper at the clips' own
lengths on the English of manifests; every eighth speaker is held out for testing.

Every run is a `canter train` of its own length: the learning rate falls to its floor at the end of each, so that a run
of four minutes is not the first half of one of eight. Runs differ in seed, strategy and length only: they share corpus,
tokenizer, measured budget, model and the memory that a micro-batch may fill. Strategies take turns on the same core,
run by run. The time of a run is its number of updates times the strategy's mean step time; step times are measured in
turns too, step by step, after the runs, so that a machine that is slow for a while is slow for all. The sum of a run's
own step times is kept beside it. The time to a WER is interpolated between a strategy's two neighbouring lengths, in
the logarithm of the time. A strategy that has reached the lowest WER makes no longer run with that seed. The same
command continues where it stopped.
"""

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from convergence import Setting, keep, label, shared, step_seconds, train_rows
from convergence import run as trained
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table

from canter.cli.progress import TerminalEvents, say
from canter.corpus.manifest import write_manifest
from canter.errors import ConfigError
from canter.events import QUIET
from canter.reporting.figures import COLORS, styled
from canter.training.config import TrainConfig
from canter.training.defaults import decided
from canter.training.recipe import prepare_training


@dataclass(frozen=True)
class Options(Setting):
    first_seed: int = 0
    """First of the seeds, to share them out to several processes, each with a core and a --json of its own."""
    earlier: tuple[Path, ...] = ()
    """Results of other seeds, whose runs are included; the time of their updates is measured here."""
    minutes: tuple[float, ...] = (2.75, 5.5, 11.0)
    """Lengths of the runs, in minutes of training steps."""
    whisper: Path | None = None
    """Whisper to fine-tune on --speech (default: train on the synthesised corpus)."""
    speech: tuple[Path, ...] = ()
    """Manifests of real speech; rows of other languages than English are left out."""
    arms: tuple[str, ...] = ("random", "bucket_1d, 48 s", "bucket_2d, 48 s", "balanced, 48 s")
    """Strategies, with other settings after commas (see `settings_of`); the first is the baseline."""
    rates: tuple[float, ...] = (0.10, 0.08)
    """Word error rates to reach."""
    batch_seconds: float = 96.0
    """Maximum audio of a step, padding included."""
    rate_at: float | None = 45.0
    """Seconds of audio in a step for which the learning rates of `canter train` hold; those of a strategy are scaled
    with the square root of its audio in a step, without padding. None: the same learning rates for all."""
    layers: tuple[int, int] = (4, 2)
    """Layers of encoder and decoder."""
    timed: int = 60
    """Steps of each strategy that are timed before the runs, to choose their lengths, and twice as many after them."""
    figure: Path | None = None
    """File for a plot of WER against time."""


def settings_of(arm: str, base: TrainConfig) -> dict[str, Any]:
    """Return the settings of `canter train` of an arm: a strategy, and what differs from the defaults after commas.

    Such as "balanced, mixed steps", "balanced, 48 s", "random, rate 0.5" (both learning rates times 0.5) and
    "balanced, mixing 4".
    """
    name, *others = arm.split(", ")
    settings: dict[str, Any] = {"strategy": name}
    for other in others:
        word, _, value = other.partition(" ")
        if other == "mixed steps":
            settings["mix_steps"] = True
        elif value == "s":
            settings["batch_seconds"] = float(word)
        elif word == "mixing":
            settings["mixing"] = float(value)
        elif word == "rate":
            rates = decided(base).optimizer
            settings["optimizer"] = replace(
                base.optimizer,
                learning_rate=float(value) * (rates.learning_rate or 0.0),
                matrix_learning_rate=float(value) * rates.matrix_learning_rate,
            )
        else:
            raise ConfigError(f"arm {arm!r}: {other!r} is none of 'mixed steps', '48 s', 'rate 2' and 'mixing 4'")
    return settings


def real_speech(options: Options) -> TrainConfig:
    """Return the settings that all runs on real speech share; the budget is measured once.

    Texts are in lower case without punctuation, since the manifests differ in both.
    """
    rows: list[dict[str, Any]] = []
    for manifest in options.speech:
        for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()):
            if row.get("lang", "en").startswith("en") and row["duration"] <= options.longest:
                text = " ".join(re.sub(r"[^\w' ]", " ", row["text"].lower()).split())
                audio = str((manifest.parent / row["audio_filepath"]).resolve())
                speaker = f"{manifest.parent.name}/{row.get('speaker', row['audio_filepath'])}"
                rows.append({"audio_filepath": audio, "duration": row["duration"], "text": text, "speaker": speaker})
    held_out = set(sorted({row["speaker"] for row in rows})[3::8])
    options.output.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        write_manifest(
            options.output / f"{name}.jsonl", [r for r in rows if (r["speaker"] in held_out) == (name == "test")]
        )
    config = TrainConfig(
        manifest=(options.output / "train.jsonl",),
        valid=(options.output / "test.jsonl",),
        output=options.output / "shared",
        init=options.whisper,
        pad_seconds=0.0,
        batch_seconds=options.batch_seconds,
        valid_every=1_000_000,
        valid_utterances=len(rows),
        steps=1,
        threads=options.threads,
        precision="float32",
        workers=0,
        track=(),
    )
    folder = prepare_training(config, TerminalEvents()).run.folder
    return replace(config, budget=folder / "budget.json")


@dataclass(frozen=True)
class Planned:
    """What a strategy's plan predicts. speed: hours of audio an hour. audio: seconds of it in a step."""

    speed: float
    audio: float


def planned(base: TrainConfig, settings: dict[str, Any], folder: Path) -> Planned:
    """Return what the plan of a strategy predicts by the budget."""
    plan = prepare_training(replace(base, output=folder, **settings), QUIET).schedule.plan
    seconds = float(plan.table().audio_seconds.sum())
    return Planned(seconds / 3600 / plan.figures().hours, seconds / len(plan))


def arms_of(options: Options, base: TrainConfig) -> dict[str, tuple[dict[str, Any], Planned]]:
    """Return the settings of each strategy, with its learning rates, and what its plan predicts."""
    found = {}
    for name in options.arms:
        settings = settings_of(name, base)
        predicted = planned(base, settings, options.output / f"timed-{label(name)}")
        rates = decided(replace(base, **settings)).optimizer
        scale = math.sqrt(predicted.audio / options.rate_at) if options.rate_at else 1.0
        settings["optimizer"] = replace(
            settings.get("optimizer", base.optimizer),
            learning_rate=scale * (rates.learning_rate or 0.0),
            matrix_learning_rate=scale * rates.matrix_learning_rate,
        )
        found[name] = settings, predicted
    return found


def runs_of(
    options: Options, base: TrainConfig, arms: dict[str, dict[str, Any]], seconds: dict[str, float]
) -> Iterator[tuple[dict[str, Any], TrainConfig]]:
    """Yield (description, configuration) of every run: seed by seed, the shortest first, strategies in turns.

    seconds: step time of each strategy, from which the number of steps follows.
    """
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for minutes in sorted(options.minutes):
            for name, settings in arms.items():
                steps = max(10, round(60 * minutes / seconds[name]))
                folder = options.output / f"{label(name)}-{minutes:g}-{seed}"
                rate = settings["optimizer"].learning_rate
                about = {"arm": name, "seed": seed, "minutes": minutes, "learning_rate": rate}
                yield about, replace(base, output=folder, seed=seed, steps=steps, **settings)


def crossing(points: Sequence[tuple[float, float]], rate: float) -> float | None:
    """Return where a strategy reaches a WER, of its points (seconds, WER), one for each length; or (updates, WER).

    The shortest length from which on all are at or below the rate is the end of the crossing; None where the longest is
    above it. Between two lengths the WER is linear in the logarithm of the time; before the shortest, its own time is
    an upper bound and is returned.
    """
    ordered = sorted(points)
    after = len(ordered)
    while after and ordered[after - 1][1] <= rate:
        after -= 1
    if after == len(ordered):
        return None
    if after == 0:
        return ordered[0][0]
    (early, above), (late, below) = ordered[after - 1], ordered[after]
    part = (above - rate) / (above - below)
    return math.exp(math.log(early) + part * (math.log(late) - math.log(early)))


def summary(rows: Sequence[dict[str, Any]], options: Options) -> dict[str, dict[str, Any]]:
    """Return, by strategy, seconds, updates and hours of audio to each WER of every seed, and the speed-ups.

    A speed-up is the baseline's seconds to a WER over the strategy's, seed by seed.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm in options.arms:
        mine = [row for row in rows if row["arm"] == arm]
        seeds = sorted({row["seed"] for row in mine})
        found[arm] = {
            f"{key}_to": {
                f"{rate:g}": [crossing([(r[key], r["wer"]) for r in mine if r["seed"] == s], rate) for s in seeds]
                for rate in options.rates
            }
            for key in ("seconds", "steps", "audio_hours")
        }
    first = found[options.arms[0]]["seconds_to"]
    for one in found.values():
        one["speed_up"] = {
            rate: [theirs / ours if ours and theirs else None for ours, theirs in zip(times, first[rate])]
            for rate, times in one["seconds_to"].items()
        }
    return found


def show(found: dict[str, dict[str, Any]], options: Options) -> None:
    """Print a table: seconds to each WER, its spread over the seeds, and the speed-up over the baseline."""
    table = Table("strategy", *(f"to {rate:.0%} WER, minutes" for rate in options.rates), "times the baseline's speed")
    for arm, one in found.items():
        cells = []
        for times in one["seconds_to"].values():
            known = [seconds / 60 for seconds in times if seconds]
            missing = f" ({len(times) - len(known)} not reached)" if len(known) < len(times) else ""
            spread = f" ({min(known):.1f} to {max(known):.1f})" if len(known) > 1 else ""
            cells.append(f"{statistics.mean(known):.1f}{spread}{missing}" if known else "not reached")
        gains = [gain for gain in one["speed_up"][f"{options.rates[-1]:g}"] if gain]
        table.add_row(arm, *cells, ", ".join(f"{gain:.2f}" for gain in gains) or "-")
    Console().print(table)


@styled
def draw_wer(rows: Sequence[dict[str, Any]], arms: Sequence[str], minutes: Sequence[float]) -> Figure:
    """Return a figure of each strategy's WER against the minutes of its runs: mean, and range of the seeds."""
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    lowest = max(0.002, min(row["wer"] for row in rows))
    for color, arm in zip(itertools.cycle(COLORS), arms):
        lengths = [[row for row in rows if (row["arm"], row["minutes"]) == (arm, length)] for length in minutes]
        lengths = [some for some in lengths if some]
        taken = [statistics.mean(row["seconds"] for row in some) / 60 for some in lengths]
        rates = [[max(lowest, row["wer"]) for row in some] for some in lengths]
        means = [statistics.mean(some) for some in rates]
        ends = [
            [mean - min(some) for mean, some in zip(means, rates)],
            [max(some) - m for m, some in zip(means, rates)],
        ]
        axes.errorbar(taken, means, ends, color=color, marker="o", markersize=4, capsize=3, label=arm)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="minutes of training steps", ylabel="WER")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(length=0, which="both")
    axes.legend()
    return figure


def with_times(rows: Sequence[dict[str, Any]], step_seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Return the runs with the time that their updates take."""
    return [row | {"seconds": row["steps"] * step_seconds[row["arm"]]} for row in rows]


def figures_of(
    rows: Sequence[dict[str, Any]], arms: dict[str, tuple[dict[str, Any], Planned]], options: Options
) -> dict[str, Any]:
    """Return what is kept of the runs so far."""
    predicted = {name: vars(planned) for name, (_, planned) in arms.items()}
    return {"runs": rows, "summary": summary(rows, options), "predicted": predicted}


def main(options: Options) -> None:
    base = real_speech(options) if options.whisper else shared(options, options.layers)
    arms = arms_of(options, base)
    timed = {name: settings_of(name, base) for name in arms}
    seconds = step_seconds(base, timed, options.output / "step_seconds.json", options.timed)
    rows = [row for path in options.earlier for row in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    reached: set[tuple[str, int]] = set()
    for about, config in runs_of(options, base, {name: settings for name, (settings, _) in arms.items()}, seconds):
        if (about["arm"], about["seed"]) in reached:
            continue
        say(f"{about['arm']}, {about['minutes']:g} minutes, seed {about['seed']}, {config.steps} steps")
        figures = trained(config)
        rows.append(about | {"own_seconds": sum(row["seconds"] for row in train_rows(config.output))} | figures)
        if figures["wer"] <= min(options.rates):
            reached.add((about["arm"], about["seed"]))
        keep(options, **figures_of(with_times(rows, seconds), arms, options))  # after every run, so that none is lost
    rows = with_times(rows, step_seconds(base, timed, options.output / "turns.json", 2 * options.timed))
    keep(options, **figures_of(rows, arms, options))
    show(summary(rows, options), options)
    if options.figure:
        draw_wer(rows, options.arms, options.minutes).savefig(options.figure, dpi=150, facecolor="white")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
