"""Measure a training step of a model here, and write what fits and how long it takes: the budget.

MODEL is a checkpoint (a folder, a run, a .nemo file), CONFIG.yaml a training configuration. `canter compare`, `canter
plan` and `canter train --budget` read the result. Probes are kept beside it: an interrupted run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from canter.corpus.index import LengthIndex
    from canter.planning import Budget
    from canter.training.config import TrainConfig
    from canter.tuning.probe import ProbedStep, Prober


@dataclass(frozen=True)
class Options:
    model: Annotated[Path | None, tyro.conf.Positional] = None
    """A checkpoint, or a training configuration (.yaml); none: the default configuration."""
    index: Path | None = None
    """Lengths that plans will be made for: a length index, or a table with `duration` and `num_tokens`."""
    manifest: tuple[Path, ...] = ()
    """Training manifests, in place of the configuration's, where there is no --index."""
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("budget.json")
    """The budget file to write."""
    method: Literal["fit", "search"] = "fit"
    """'fit': at most --probes steps and two polynomials; 'search': OOMptimizer, bucket by bucket."""
    memory: str | None = None
    """Memory that a step may use, weights included, such as 8GiB or 8 (GB) (default: 95 % of a GPU's free memory, half
    of a CPU's)."""
    probes: int = 40
    """Steps that 'fit' may measure."""
    minutes: float = 3.0
    """About how long 'fit' may take; where steps are slow, smaller batches are measured."""
    buckets: int = 30
    """Rows of buckets, by duration, of 'search' and --nemo."""
    sub_buckets: int = 2
    """Buckets in a row, by tokens; 1 makes 1-D buckets."""
    nemo: bool = False
    """Print bucket_duration_bins and bucket_batch_size for a NeMo or Lhotse configuration."""
    figure: Path | None = None
    """Write a PNG: predicted against measured, and the largest batch for every length."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of a checkpoint's steps; 'auto': bf16 on a GPU, float32 on a CPU, and a configuration's own."""
    optimizer: Literal["muon", "adamw"] | None = None
    """None: the configuration's."""
    recompute: bool = False
    """Activation checkpointing: layers are computed again in the backward pass."""
    compile: bool = False
    """Compile the layers of encoder and decoder, as a configuration's `compile` does."""
    device: str = "auto"
    """'cpu', 'cuda' or 'auto'."""
    threads: int | None = None
    """CPU threads; none: the configuration's, or one a core."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, how a step is made of (a copy of) it, and what that is called."""

    model: Any
    make: Callable[[Any, bool], ProbedStep]
    frame_seconds: float
    longest_seconds: float
    most_tokens: int
    measured_on: dict[str, Any]
    index: LengthIndex | None = None


def run(options: Options) -> None:
    import torch

    from canter.cli.progress import counting, say
    from canter.errors import ConfigError
    from canter.tuning.fit import within

    began = time.perf_counter()
    limit = parse_memory(options.memory) if options.memory else None  # before anything is loaded
    for name in ("probes", "buckets", "sub_buckets"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    subject = choose_subject(options, say)
    index = within(choose_index(options, subject, say), subject.longest_seconds, subject.most_tokens)
    total = options.probes if options.method == "fit" else options.buckets * options.sub_buckets
    with counting("measuring", total) as progress:
        prober = make_prober(options, subject, limit, say)
        budget, text = measure(options, prober, index, subject, lambda done: progress(min(done, total), total), say)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    budget.save(options.output)
    if options.figure:
        from canter.reporting.budget_figures import budget_figure

        figure = budget_figure(budget, prober.fitting, index.seconds, index.tokens)
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.figure, dpi=150, facecolor="white")
    for line in summary(budget, prober, time.perf_counter() - began):
        say(line)
    say(f"{options.output} written" + (f", {options.figure} drawn" if options.figure else ""))
    if text:
        print(text)


def parse_memory(text: str) -> float:
    """Return the bytes of '80GiB', '80GB', '512M', or '80' (GB). Raises BudgetError for anything else."""
    import math
    import re

    from canter.errors import BudgetError

    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?)(B?)\s*", text, re.IGNORECASE)
    value = 0.0
    if found:
        number, unit, binary, byte = found.groups()
        power = "KMGT".find(unit.upper()) + 1 if unit else 0 if byte else 3
        value = float(number) * (1024 if binary or (unit and not byte) else 1000) ** power
    if not value > 0 or not math.isfinite(value):
        raise BudgetError(f"{text!r} is no amount of memory; write it as '80GiB' or '12GB'")
    return value


def measure(
    options: Options,
    prober: Prober,
    index: LengthIndex,
    subject: Subject,
    told: Callable[[int], None],
    say: Callable[[str], None],
) -> tuple[Budget, str]:
    """The budget, and NeMo's settings where they were asked for."""
    from canter.integrations.nemo import bucketing_config
    from canter.planning import Budget
    from canter.planning.strategies import Bucket2D
    from canter.tuning.fit import fit_budget
    from canter.tuning.search import budget_of, search

    strategy = Bucket2D(options.buckets, options.sub_buckets)
    if options.method == "search":
        everything = Budget.from_batch_seconds(1e9, frame_seconds=subject.frame_seconds)
        bins = strategy.bins(index, everything)
        found = search(prober, bins, subject.frame_seconds, told=lambda done, _: told(done))
        text = bucketing_config(bins, everything, found.sizes.tolist())
        return budget_of(prober, found, subject.frame_seconds), text
    prober.told = lambda _: told(prober.spent)
    slow = prober.step.device.type == "cpu"
    budget = fit_budget(
        prober,
        index,
        subject.frame_seconds,
        most_probes=options.probes,
        probe_seconds=2 * 60 * options.minutes / options.probes if slow else None,
        say=say,
    )
    return budget, bucketing_config(strategy.bins(index, budget), budget) if options.nemo else ""


def make_prober(options: Options, subject: Subject, limit: float | None, say: Callable[[str], None]) -> Prober:
    from canter.runtime import MMAP_THRESHOLD, map_large_blocks
    from canter.training.measure import memory_limit
    from canter.tuning.probe import Prober

    step = subject.make(subject.model, True)
    journal = options.output.with_suffix(".probes.jsonl")
    journal.parent.mkdir(parents=True, exist_ok=True)
    told = dict(subject.measured_on)
    if step.device.type == "cpu" and map_large_blocks():
        told["mmap_threshold"] = MMAP_THRESHOLD
    prober = Prober(step, memory_limit(step.device, say, limit), told, journal)
    if prober.kept:
        say(f"{len(prober.kept)} probes of an earlier run are taken from {journal}")
    return prober


def summary(budget: Budget, prober: Prober, seconds: float) -> list[str]:
    """What was found, in a few lines."""
    told = budget.measured_on
    lines = [
        f"memory explained within {told['memory_error']:.1%}, time within {told['time_error']:.1%} (medians); "
        f"{prober.steps} steps, {prober.out_of_memory} out of memory, {seconds:.0f} s"
    ]
    if "margin" in told:
        lines.append(
            f"limit {budget.limit_bytes / 2**30:.2f} GiB, a margin of {told['margin']:.1%} below what a step may use; "
            f"the largest step measured took {told['largest_probe_bytes'] / 2**30:.2f} GiB"
        )
    t = [round(seconds / budget.frame_seconds) or 1 for seconds in (5.0, 10.0, 20.0)]
    sizes = ", ".join(f"{budget.max_batch(frames, 3 * s + 5)} of {s} s" for frames, s in zip(t, (5, 10, 20)))
    lines.append(f"utterances that fit: {sizes}")
    return lines


def choose_index(options: Options, subject: Subject, say: Callable[[str], None]) -> LengthIndex:
    """--index, or the training data's, or where there is neither lengths that most data has."""
    import numpy as np

    from canter.cli.lengths import open_lengths
    from canter.corpus.index import LengthIndex

    if options.index is not None:
        return open_lengths(options.index)
    if subject.index is not None:
        return subject.index
    longest = min(30.0, subject.longest_seconds)
    say(f"no --index: measured for utterances of 0.5 to {longest:g} s with 2 to 8 tokens a second")
    seconds = np.repeat(np.linspace(0.5, longest, 200), 4)
    tokens = np.maximum(3, seconds * np.tile((2, 3, 4, 8), 200)).astype(np.int64)
    return LengthIndex(seconds.astype(np.float32), np.minimum(tokens, subject.most_tokens))


def choose_subject(options: Options, say: Callable[[str], None]) -> Subject:
    """The model to measure. Raises ConfigError or CheckpointError for what is neither checkpoint nor configuration."""
    from canter.cli.models import load_any
    from canter.inference.transcribe import checkpoint_of
    from canter.models.protocol import check_support
    from canter.training.config import TrainConfig, load_config

    path = options.model
    if path is None or path.suffix in (".yaml", ".yml"):
        config = load_config(path) if path else TrainConfig()
        if options.manifest:
            config = dataclasses.replace(config, manifest=options.manifest)
        return of_config(adjusted(config, options), options, say)
    model = load_any(checkpoint_of(path))
    if options.compile:
        check_support(model, {"--compile": "compile"}, path)
    return of_speech_model(model, adjusted(TrainConfig(init=path), options), options, say)


def adjusted(config: TrainConfig, options: Options) -> TrainConfig:
    """The configuration with the flags that speak of training."""
    from canter.training.defaults import decided

    optimizer = config.optimizer
    if options.optimizer is not None:
        optimizer = dataclasses.replace(optimizer, name=options.optimizer)
    precision = config.precision if options.precision == "auto" else options.precision
    device = config.device if options.device == "auto" else options.device
    config = dataclasses.replace(
        config,
        optimizer=optimizer,
        precision=precision,
        device=device,
        budget=None,
        compile=config.compile or options.compile,
    )
    return decided(config)


def of_config(config: TrainConfig, options: Options, say: Callable[[str], None]) -> Subject:
    """The model that a configuration describes; without data, with a vocabulary of the size it asks for."""
    from canter.models.model import SpeechModel
    from canter.training.feed.corpus import find_index, find_tokenizer
    from canter.training.prepare import load_initial, model_config
    from canter.training.run.folder import Run

    with tempfile.TemporaryDirectory() as folder:
        inside = Run.open(dataclasses.replace(config, output=Path(folder) / "run"))
        initial = load_initial(config, inside, say)
        index, tokenizer = None, SimpleNamespace(vocab_size=config.vocabulary, pad=0)
        characters = SimpleNamespace(size=40)
        if config.manifest:
            tokenizer, characters = find_tokenizer(config, inside, initial, say)
            if options.index is None:
                index = find_index(config, inside, tokenizer)
        model = initial or SpeechModel(model_config(config, tokenizer, characters))  # type: ignore[arg-type]
        if index is not None:
            index = in_memory(index)
    return dataclasses.replace(of_speech_model(model, config, options, say), index=index)


def in_memory(index: LengthIndex) -> LengthIndex:
    """Lengths alone, which outlive the index's folder."""
    import numpy as np

    from canter.corpus.index import LengthIndex

    return LengthIndex(np.array(index.seconds), np.array(index.tokens))


def of_speech_model(model: Any, config: TrainConfig, options: Options, say: Callable[[str], None]) -> Subject:
    import torch

    from canter.runtime import choose_device
    from canter.training.measure import (
        choose_speed,
        measured_on,
        planned_frame_seconds,
        training_step,
    )

    device = choose_device(config.device)
    if options.recompute:
        model.recompute_activations()
    precision = config.precision
    model.to(device)
    if precision == "auto" and device.type == "cuda":
        precision = "bf16"
    elif precision == "auto" and options.model is not None and options.model.suffix not in (".yaml", ".yml"):
        precision = "float32"
    elif precision == "auto":
        precision, threads = choose_speed(config, model, say)
        torch.set_num_threads(options.threads or threads)
    return Subject(
        model=model,
        make=lambda m, copied: training_step(config, m, precision, prompt=1, copied=copied),
        frame_seconds=planned_frame_seconds(model),
        longest_seconds=model.longest_seconds,
        most_tokens=model.positions,
        measured_on=measured_on(config, model, precision),
    )
