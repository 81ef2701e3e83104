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
    from canter.tuning.probe import Prober, TrainingStep


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
    simulate: str | None = None
    """Estimate for a device of so much memory, such as 80GiB, that is not here; nothing is run."""
    limit: str | None = None
    """What a step may use, weights included, such as 8GiB; none: 95 % of a GPU's free memory, half of a CPU's."""
    reserve: str | None = None
    """Of the limit, kept for your own needs."""
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
    figures: Path | None = None
    """Write a PNG: predicted against measured, and the largest batch for every length."""
    backend: Literal["auto", "canter", "transformers"] = "auto"
    """What trains a checkpoint; 'auto': Canter where it has the architecture, else transformers."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of a checkpoint's steps; 'auto': bf16 on a GPU, float32 on a CPU, and a configuration's own."""
    optimizer: Literal["muon", "adamw"] | None = None
    """None: the configuration's."""
    recompute: bool = False
    """Activation checkpointing: layers are computed again in the backward pass."""
    compile: bool = False
    """Compile the layers of encoder and decoder, as a configuration's `compile` does."""
    sharding: Literal["none", "replicate", "shard", "ddp", "fsdp"] = "none"
    """How --ranks share the model: 'replicate' or 'shard' as `canter train --parallel`, 'ddp' or 'fsdp' as elsewhere in
    PyTorch. What that adds is computed, and added to the budget."""
    ranks: int = 1
    """Of the training that is planned."""
    flops: float = 250e12
    """Operations a second of the device that --simulate stands for."""
    device: str = "auto"
    """'cpu', 'cuda' or 'auto'."""
    threads: int | None = None
    """CPU threads; none: the configuration's, or one a core."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, how a step is made of (a copy of) it, and what that is called."""

    model: Any
    make: Callable[[Any, bool], TrainingStep]
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
    from canter.tuning.sharding import Sharding, with_sharding
    from canter.tuning.simulate import parse_bytes

    began = time.perf_counter()
    sharding = Sharding(options.sharding, options.ranks)
    for amount in (options.simulate, options.limit, options.reserve):  # before anything is loaded
        _ = amount and parse_bytes(amount)
    for name in ("probes", "buckets", "sub_buckets"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    subject = choose_subject(options, say)
    index = within(choose_index(options, subject, say), subject.longest_seconds, subject.most_tokens)
    total = options.probes if options.method == "fit" else options.buckets * options.sub_buckets
    with counting("measuring", total) as progress:
        prober = make_prober(options, subject, say)
        budget, text = measure(options, prober, index, subject, lambda done: progress(min(done, total), total), say)
    state = prober.step.state_bytes
    budget = with_sharding(budget, sharding, subject.model, state)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    budget.save(options.output)
    if options.figures:
        from canter.reporting.figures import budget_figure

        figure = budget_figure(budget, prober.fitting, index.seconds, index.tokens)
        options.figures.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.figures, dpi=150, facecolor="white")
    for line in summary(budget, prober, time.perf_counter() - began):
        say(line)
    say(f"{options.output} written" + (f", {options.figures} drawn" if options.figures else ""))
    if text:
        print(text)


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
    from canter.tuning.fit import measure_budget
    from canter.tuning.search import budget_of, search

    strategy = Bucket2D(options.buckets, options.sub_buckets)
    if options.method == "search":
        everything = Budget.from_batch_seconds(1e9, frame_seconds=subject.frame_seconds)
        bins = strategy.bins(index, everything)
        found = search(prober, bins, subject.frame_seconds, told=lambda done, _: told(done))
        text = bucketing_config(bins, everything, found.sizes.tolist())
        return budget_of(prober, found, subject.frame_seconds), text
    prober.told = lambda _: told(prober.spent)
    slow = prober.step.device.type == "cpu" and options.simulate is None
    budget = measure_budget(
        prober,
        index,
        subject.frame_seconds,
        most_probes=options.probes,
        probe_seconds=2 * 60 * options.minutes / options.probes if slow else None,
        say=say,
    )
    return budget, bucketing_config(strategy.bins(index, budget), budget) if options.nemo else ""


def make_prober(options: Options, subject: Subject, say: Callable[[str], None]) -> Prober:
    from canter.runtime import MMAP_THRESHOLD, steady_heap
    from canter.training.measure import memory_limit
    from canter.tuning.probe import Prober
    from canter.tuning.simulate import OVERHEAD, Simulator, parse_bytes

    reserve = parse_bytes(options.reserve) if options.reserve else 0.0
    limit = parse_bytes(options.limit) if options.limit else None
    if options.simulate:
        told = {**subject.measured_on, "device": f"simulated {options.simulate}"}
        size = parse_bytes(options.simulate) * (1 - OVERHEAD) if limit is None else limit
        say(f"simulated: {size / 2**30:.1f} GiB, {options.flops:.3g} operations a second; a GPU will differ")
        make = subject.make
        return Simulator(subject.model, lambda m: make(m, False), size - reserve, told, flops=options.flops)
    step = subject.make(subject.model, True)
    journal = options.output.with_suffix(".probes.jsonl")
    journal.parent.mkdir(parents=True, exist_ok=True)
    told = subject.measured_on | ({"reserve_bytes": reserve} if reserve else {})
    if step.device.type == "cpu" and steady_heap():
        told["mmap_threshold"] = MMAP_THRESHOLD
    prober = Prober(step, memory_limit(step.device, say, limit, reserve), told, journal)
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
    from canter.models.protocol import Capability, check_support
    from canter.training.config import TrainConfig, load_config

    path = options.model
    if path is None or path.suffix in (".yaml", ".yml"):
        config = load_config(path) if path else TrainConfig()
        if options.manifest:
            config = dataclasses.replace(config, manifest=options.manifest)
        return of_config(adjusted(config, options), options, say)
    model = load_any(checkpoint_of(path), backend=options.backend)
    given = {"--simulate": bool(options.simulate), "--compile": options.compile}
    needed: dict[str, Capability] = {"--simulate": "cost_model", "--compile": "compile"}
    check_support(model, {name: needed[name] for name, on in given.items() if on}, path)
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
        compile=(config.compile or options.compile) and options.simulate is None,  # it needs values
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

    from canter.models.device import choose_device
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
    if options.simulate is None:
        model.to(device)
    if precision == "auto" and (options.simulate or device.type == "cuda"):
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
