"""Measure training steps of a model on this device, and write the memory budget: what fits, and how long it takes.

MODEL is a checkpoint (a folder, a run, a .nemo file, a name on the hub) or a training configuration (.yaml). `canter
compare`, `canter plan` and `canter train --budget` read the result. Probes are kept beside it: an interrupted run
resumes.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from typing import Never

    from canter.corpus.index import LengthIndex
    from canter.events import Events
    from canter.models.protocol import AnyModel
    from canter.planning import Budget
    from canter.training.config import TrainConfig
    from canter.tuning.probe import Prober


@dataclass(frozen=True)
class Options:
    model: Annotated[Path | None, tyro.conf.Positional] = None
    """Checkpoint, or training configuration (.yaml) (default: the default configuration)."""
    index: Path | None = None
    """Lengths that plans will be made for: a length index, or a table with `duration` and `num_tokens` (default: the
    training data's)."""
    manifest: tuple[Path, ...] = ()
    """Training manifests, in place of the configuration's."""
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("budget.json")
    """Budget file to write."""
    method: Literal["fit", "search"] = "fit"
    """fit: two polynomials through at most --probes steps. search: OOMptimizer, bucket by bucket."""
    memory: str | None = None
    """Memory that a step may use, weights included, such as 80GiB, 80GB or 80 (GB) (default: 95 % of a GPU's free
    memory, half of a CPU's)."""
    probes: int = 40
    """Maximum number of steps that 'fit' measures."""
    minutes: float = 3.0
    """Approximate time that 'fit' may take on a CPU; slow steps are measured on smaller batches."""
    buckets: int = 30
    """Number of buckets by duration, for 'search', each divided in two by tokens."""
    figure: Path | None = None
    """PNG file to draw: predicted against measured costs, and the largest batch for every length."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Precision of the arithmetic. auto: the configuration's; for a checkpoint bf16 on a GPU, float32 on a CPU."""
    optimizer: Literal["muon", "adamw"] | None = None
    """Optimiser of the matrices (default: the configuration's)."""
    recompute: bool = False
    """Activation checkpointing: recompute each layer in the backward pass."""
    compile: bool = False
    """Compile the layers of encoder and decoder with torch.compile."""
    device: str = "auto"
    """Device: cpu, cuda or auto (a GPU if there is one)."""
    threads: int | None = None
    """CPU threads of the computation (default: the configuration's, or one a core)."""


def run(options: Options) -> None:
    import torch

    from canter.cli.progress import TerminalEvents, say
    from canter.errors import ConfigError
    from canter.planning.budget import parse_memory
    from canter.training.measure import make_prober
    from canter.training.subject import load_teacher
    from canter.tuning.fit import within

    began, events = time.perf_counter(), TerminalEvents()
    memory = parse_memory(options.memory, "--memory") if options.memory else None
    for name in ("probes", "buckets"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    config = choose_config(options)
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    # model -> lengths
    model, index = load_subject(config, options, events)
    lengths = index if index is not None else typical_lengths(model, events)
    lengths = within(lengths, model.longest_seconds, model.positions)
    teacher = load_teacher(config, model)
    precision = choose_precision(config, options, model, events, teacher)

    # probes -> budget
    options.output.parent.mkdir(parents=True, exist_ok=True)
    journal = options.output.with_suffix(".probes.jsonl")
    prober = make_prober(
        config, model, precision, teacher=teacher, memory=memory, exact=True, journal=journal, events=events
    )
    budget, bins = make_budget(options, prober, lengths)
    budget.save(options.output)

    if options.figure:
        from canter.reporting.figures import budget_figure

        figure = budget_figure(budget, prober.fitting, lengths.seconds, lengths.tokens)
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.figure, dpi=150, facecolor="white")
    for line in describe_budget(budget, prober, time.perf_counter() - began):
        say(line)
    say(f"{options.output} written" + (f", {options.figure} drawn" if options.figure else ""))
    if bins:
        print(bins)


def make_budget(options: Options, prober: Prober, index: LengthIndex) -> tuple[Budget, str]:
    """Return the budget, and the bucket settings for NeMo or Lhotse if they were searched."""
    from canter.integrations.nemo import bucketing_config
    from canter.planning import Budget
    from canter.planning.strategies import Bucket2D
    from canter.tuning.fit import fit_budget
    from canter.tuning.search import budget_of, search

    strategy = Bucket2D(options.buckets)
    if options.method == "search":
        unlimited = Budget.from_batch_seconds(1e9, frame_seconds=prober.step.frame_seconds)
        bins = strategy.bins(index, unlimited)
        found = search(prober, bins)
        return budget_of(prober, found), bucketing_config(bins, unlimited, found.sizes.tolist())
    slow = prober.step.device.type == "cpu"
    budget = fit_budget(
        prober,
        index,
        most_probes=options.probes,
        probe_seconds=2 * 60 * options.minutes / options.probes if slow else None,
    )
    return budget, ""


def describe_budget(budget: Budget, prober: Prober, seconds: float) -> list[str]:
    """Return a few lines on a budget whose measurement took ``seconds``."""
    found = budget.measured_on
    lines = [
        f"memory explained within {found['memory_error']:.1%}, time within {found['time_error']:.1%} (medians); "
        f"{prober.steps} steps, {prober.out_of_memory} out of memory, {seconds:.0f} s"
    ]
    if "margin" in found:
        lines.append(
            f"limit {budget.limit_bytes / 2**30:.2f} GiB, a margin of {found['margin']:.1%} below what a step may use; "
            f"the largest step measured took {found['largest_probe_bytes'] / 2**30:.2f} GiB"
        )
    t = [round(seconds / budget.frame_seconds) or 1 for seconds in (5.0, 10.0, 20.0)]
    sizes = ", ".join(f"{budget.max_batch(frames, 3 * s + 5)} of {s} s" for frames, s in zip(t, (5, 10, 20)))
    lines.append(f"utterances that fit: {sizes}")
    return lines


# -- the subject --


def is_configuration(path: Path | None) -> bool:
    return path is None or path.suffix in (".yaml", ".yml")


def choose_config(options: Options) -> TrainConfig:
    """Return the configuration of the training that is measured."""
    from canter.training.config import TrainConfig, load_config
    from canter.training.defaults import decided

    if is_configuration(options.model):
        config = load_config(options.model) if options.model else TrainConfig()
    else:
        config = TrainConfig(init=options.model)
    optimizer = dataclasses.replace(config.optimizer, name=options.optimizer or config.optimizer.name)
    config = dataclasses.replace(
        config,
        manifest=options.manifest or config.manifest,
        optimizer=optimizer,
        precision=config.precision if options.precision == "auto" else options.precision,
        device=config.device if options.device == "auto" else options.device,
        threads=options.threads or config.threads,
        compile=config.compile or options.compile,
        budget=None,
    )
    return decided(config)


def load_subject(config: TrainConfig, options: Options, events: Events[Never]) -> tuple[AnyModel, LengthIndex | None]:
    """Return the model on its device, and the lengths of --index or of the training data, if there are any.

    Without training data, a model from scratch has the vocabulary size of the configuration.
    """
    import numpy as np

    from canter.cli.lengths import open_lengths
    from canter.corpus.index import LengthIndex
    from canter.runtime import choose_device
    from canter.training.feed.corpus import find_index, find_tokenizer
    from canter.training.subject import build_model, load_initial

    device = choose_device(config.device)
    index = open_lengths(options.index) if options.index else None
    with tempfile.TemporaryDirectory() as folder:
        model = load_initial(config, events)
        tokenizer, characters = _Sizes(config.vocab_size), _Sizes(40)
        if config.manifest and (index is None or model is None):
            tokenizer, characters = find_tokenizer(config, Path(folder), model, events)
            if index is None:
                found = find_index(config, Path(folder), tokenizer, events)
                index = LengthIndex(np.array(found.seconds), np.array(found.tokens))  # outlives the folder
        if model is None:
            model = build_model(config, tokenizer, characters)  # type: ignore[arg-type]
    model.to(device)
    if options.recompute:
        model.recompute_activations()
    return model, index


@dataclass(frozen=True)
class _Sizes:
    """Stand-in for a tokenizer of which only the size counts."""

    vocab_size: int
    pad: int = 0

    @property
    def size(self) -> int:
        return self.vocab_size


def choose_precision(
    config: TrainConfig, options: Options, model: AnyModel, events: Events[Never], teacher: AnyModel | None = None
) -> str:
    """Return the precision of a step; a configuration that leaves it open gets the faster one, and its threads."""
    import torch

    from canter.training.measure import choose_speed

    if config.precision != "auto":
        return config.precision
    if next(model.parameters()).device.type == "cuda":
        return "bf16"
    if not is_configuration(options.model):
        return "float32"
    precision, threads = choose_speed(config, model, events, teacher)
    torch.set_num_threads(threads)
    return precision


def typical_lengths(model: AnyModel, events: Events[Never]) -> LengthIndex:
    """Return lengths that cover those of most data."""
    import numpy as np

    from canter.corpus.index import LengthIndex

    longest = min(30.0, model.longest_seconds)
    events.message(f"no --index: measured for utterances of 0.5 to {longest:g} s with 2 to 8 tokens a second")
    seconds = np.repeat(np.linspace(0.5, longest, 200), 4)
    tokens = np.maximum(3, seconds * np.tile((2, 3, 4, 8), 200)).astype(np.int64)
    return LengthIndex(seconds.astype(np.float32), np.minimum(tokens, model.positions))
