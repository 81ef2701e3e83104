"""Everything a run needs before its first step: tokenizer, index, model, budget, plan."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import yaml

from canter.corpus.index import LengthIndex
from canter.corpus.mixture import is_weighted, mixture_of
from canter.corpus.utterance import Utterance
from canter.errors import BudgetError, CheckpointError, ConfigError
from canter.inference.engine.requests import EngineConfig
from canter.models.decoder import DecoderConfig
from canter.models.device import choose_device
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.checkpoint import load_model
from canter.models.hub import checkpoint_of
from canter.models.model import ModelConfig, SpeechModel
from canter.models.protocol import AnyModel, Capability, check_support
from canter.planning.budget import Budget
from canter.planning.lengths import ModelLimits
from canter.planning.metrics import BatchTable, figures
from canter.planning.plan import FIRST_VERSION, VERSION, Plan
from canter.planning.strategies import strategy
from canter.runtime import lasting_heap, steady_heap
from canter.text import Characters, Tokenizer, load_tokenizer
from canter.training.batches import MADE_BY, BatchLimits, BatchSizes, choose_limits, limited, probe_bounds
from canter.training.config import TrainConfig
from canter.training.defaults import decided, describe_defaults
from canter.training.distributed.ranks import ALONE, Ranks
from canter.training.feed.corpus import find_index, find_tokenizer, usable_rows, validation_rows
from canter.training.feed.data import MicroBatches
from canter.training.feed.skipped import list_problems
from canter.training.feed.speed import AtSpeed
from canter.training.measure import (
    DECIDING,
    choose_speed,
    measured_on,
    memory_limit,
    planned_frame_seconds,
    training_step,
)
from canter.training.run import trackers
from canter.training.run.checkpoints import Checkpoints
from canter.training.run.folder import Run, writing
from canter.training.step.weights import frozen_names
from canter.tuning.fit import measure_budget, within
from canter.tuning.probe import Prober

MORE_SPEED = 1.25  # than the fastest utterance's may be that of one to transcribe
LEAST_SPEED = 0.1  # tokens a frame
LEAST_WINDOW = 10  # seconds
SEEN_WINDOWS = 4  # of an endless plan, from which the mean of its steps is taken
BEGUN_WITH = "batch_seconds of 0.1"  # in run.json
PROBES = 16  # of a budget measured at the start of a run; 'canter tune' makes more


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` made or found."""

    config: TrainConfig
    run: Run
    tokenizer: Tokenizer
    characters: Characters
    index: LengthIndex
    model: SpeechModel
    budget: Budget
    plan: Plan
    data: MicroBatches
    steps: int
    precision: str
    valid: list[Utterance]
    """Rows of --valid that can be used."""
    predicted_seconds: float
    """Of all steps, by the budget."""


def prepare(
    config: TrainConfig,
    say: Callable[[str], None] = lambda _: None,
    track: Callable[[list, str], Iterable] = lambda items, _: items,
    ranks: Ranks = ALONE,
    load: Callable[[Path], Any] = load_model,
) -> Prepared:
    """Makes or continues the run of ``config``; ``say`` is told what was decided, ``track`` shows progress. On ranks
    other than the first, call it once the first is through: everything is there then, and nothing is written.
    ``load`` reads --init and the checkpoints that follow from it: another library's model, with what a `SpeechModel`
    has for training, will do.

    Raises ConfigError where a setting cannot be, ManifestError where a manifest cannot be used.
    """
    if not config.manifest:
        raise ConfigError("no training data: name --manifest FILE, or a configuration file that does")
    config = as_begun(config, say)
    if ranks.first and (told := describe_defaults(config)):
        say(told)
    config = decided(config)
    dials = {"mixing": config.mixing, "mix_steps": config.mix_steps or None}
    chosen = strategy(config.strategy, **{name: dial for name, dial in dials.items() if dial is not None})
    trackers.check(config.track)
    device = choose_device(config.device)
    check_files(config)
    rows = validation_rows(config)
    run = Run.open(config, writes=ranks.first)
    if ranks.first:
        run.verify(config.allow_changes, say)
        Checkpoints(run.folder / "checkpoints", config.keep).tidy(say)
    initial = load_initial(config, run, say, load)
    if initial is not None:
        check_freeze(config, initial)
    tokenizer, characters = find_tokenizer(config, run, initial, say)
    index = find_index(config, run, tokenizer)
    if index.problems:
        listed = run.folder / "lengths.skipped.jsonl"
        say(f"{len(index.problems)} rows left out, listed in {listed}: {index.problems[0]}")
    torch.manual_seed(config.seed)
    model = initial or SpeechModel(model_config(config, tokenizer, characters))
    model.to(device).tokenizer = tokenizer
    valid, problems = usable_rows(rows, tokenizer, model.longest_seconds, model.positions)
    if ranks.first:
        list_problems(run.folder / "valid.skipped.jsonl", problems, say)
    if device.type == "cpu":
        lasting_heap()
    settled = run.settled()
    if settled and "batches" not in settled:  # Canter 0.1 began it
        settled[BEGUN_WITH] = config.batch_seconds
    precision, threads = settled.get("precision"), settled.get("threads")
    if precision is None or threads is None:
        precision, threads = choose_speed(config, model, say)
    torch.set_num_threads(config.threads or threads)
    micro_batches = settled.get("micro_batches_per_step") or config.micro_batches_per_step or ranks.size
    measures = config.budget is None and not (run.folder / "budget.json").exists()
    budget = find_budget(config, run, model, index, precision, micro_batches, say, track)
    if measures and ranks.first:
        say(
            f"budget measured here and kept in {run.folder}/budget.json: another run of this command measures its own, "
            f"and may make other batches and steps; '--budget {run.folder}/budget.json' gives it the same"
        )
    if device.type == "cpu" and "mmap_threshold" in budget.measured_on:
        steady_heap(int(budget.measured_on["mmap_threshold"]))  # memory as it was measured
    planned = AtSpeed(index, config.seed, 0, config.augment.speed) if config.augment.speed else index
    known = within(index, model.longest_seconds, model.positions)
    for name, value in (("tokens_per_frame", fastest(known, budget)), ("window_seconds", longest(known))):
        told = model.generation.get(name)
        if told or initial is None:  # what others have trained may have heard faster and longer speech
            model.generation[name] = max(told or 0.0, value)
    mixture = mixture_of(config.manifest)
    weighted = mixture is not None and is_weighted(mixture)
    if weighted and config.augment.speed:
        raise ConfigError(
            f"--augment.speed: a speed is drawn for each epoch, and {config.manifest[0]}, whose sources have weights, "
            "has none; leave one of them out"
        )
    if "batch_limits" in settled:
        limits = _limits(settled["batch_limits"], run)
    else:
        limits = choose_limits(config, known, budget, ranks.size, micro_batches, device.type == "cpu")
    slowest = min(config.augment.speed, default=1.0)
    bounds = ModelLimits(model.longest_seconds, model.positions)
    # a run that was begun before plans knew of them goes on without
    bounded = settled.get("model_limits", not settled)
    if not (bounded and bounds.exceeded(index, slowest)):
        bounds = ModelLimits()
    plan, sizes, step_seconds = plan_batches(
        limits,
        budget,
        planned,
        planned if bounds == ModelLimits() else known,
        slowest=slowest,
        longest_seconds=bounds.seconds,
        most_tokens=bounds.tokens,
        ranks=ranks.size,
        strategy=chosen,
        seed=config.seed,
        window=min(config.window, len(index)),
        micro_batches_per_step=micro_batches,
        max_tokens_per_second=config.max_tokens_per_second,
        endless=weighted,
        curriculum="short_first" if config.short_first else None,
        cache=run.folder / ".cache",
        version=FIRST_VERSION if BEGUN_WITH in settled else VERSION,
    )
    say(str(sizes))
    steps = settled.get("steps") or choose_steps(config, step_seconds, sizes.steps)
    found = {
        "precision": precision,
        "threads": threads,
        "steps": steps,
        "micro_batches_per_step": micro_batches,
        "batch_limits": dataclasses.asdict(limits),
        "batches": dataclasses.asdict(sizes),
        "model_limits": bounded,
    }
    run.settle(settled | found)
    data = MicroBatches(
        index,
        tokenizer,
        characters if config.loss.ctc_weight else None,
        model.sample_rate,
        config.augment.speed,
        config.seed,
        model.longest_seconds,
        model.positions,
    )
    return Prepared(
        config,
        run,
        tokenizer,
        characters,
        index,
        model,
        budget,
        plan,
        data,
        steps,
        precision,
        valid,
        steps * step_seconds,
    )


def check_files(config: TrainConfig) -> None:
    """Read what the configuration names and what is cheap to read, before anything is measured: the budget, the
    tokenizer, the patterns of parameters to freeze.

    Raises BudgetError, ConfigError or ManifestError for what cannot be used.
    """
    if config.budget is not None and not (config.output / "budget.json").exists():
        Budget.load(config.budget)
    if config.tokenizer is not None and not (config.output / "tokenizer").exists():
        load_tokenizer(config.tokenizer)
    if config.init is None and config.freeze:
        names = SimpleNamespace(vocab_size=config.vocabulary, pad=0)  # shapes do not matter here
        with torch.device("meta"):
            model = SpeechModel(model_config(config, cast(Tokenizer, names), Characters("ab")))
        check_freeze(config, model)


def check_freeze(config: TrainConfig, model: Any) -> None:
    """Raise ConfigError where a pattern of --freeze matches nothing, or a step would have nothing to train."""
    frozen = frozen_names(model, config.freeze)
    heard = [name for name, _ in model.named_parameters() if not name.startswith("decoder.")]
    if config.freeze and config.loss.ctc_alone and frozen.issuperset(heard):
        raise ConfigError(
            f"--freeze {' '.join(config.freeze)} leaves nothing to train while CTC is trained alone; set "
            "--loss.ctc-alone 0"
        )


def _limits(values: dict[str, Any], run: Run) -> BatchLimits:
    try:
        return BatchLimits(**values)
    except TypeError as error:
        raise CheckpointError(f"{run.folder}/run.json: batch_limits is damaged ({error})") from None


def fastest(index: LengthIndex, budget: Budget) -> float:
    """Tokens an encoder frame of the fastest utterance, less those that an engine grants every utterance, and a little
    more. Hardly anybody will speak faster, so a decoder that goes round in circles ends there."""
    tokens = np.asarray(index.tokens, np.int64) - EngineConfig().extra_tokens
    rate = float(np.max(tokens / budget.frames(np.asarray(index.seconds))))
    return round(max(LEAST_SPEED, MORE_SPEED * rate), 3)


def longest(index: LengthIndex) -> float:
    """Seconds of the windows in which long audio is transcribed: little more than the longest utterance, for on longer
    ones nothing was learnt."""
    return max(LEAST_WINDOW, math.ceil(1.1 * float(np.max(np.asarray(index.seconds)))))


def model_config(config: TrainConfig, tokenizer: Tokenizer, characters: Characters) -> ModelConfig:
    """Shapes of a model trained from scratch: Canary's architecture at the size asked for."""
    shape = config.model
    return ModelConfig(
        features=FeatureConfig(mels=shape.mels),
        encoder=FastConformerConfig(
            layers=shape.encoder_layers,
            width=shape.width,
            heads=shape.heads,
            feedforward=4 * shape.width,
            kernel_size=shape.kernel_size,
            subsampling_channels=shape.subsampling_channels,
            mels=shape.mels,
            dropout=shape.dropout,
            dropout_input=shape.dropout,
            dropout_attention=shape.dropout,
        ),
        decoder=DecoderConfig(
            layers=shape.decoder_layers,
            width=shape.width,
            heads=shape.heads,
            feedforward=4 * shape.width,
            vocabulary=tokenizer.vocab_size,
            positions=shape.positions,
            pad=tokenizer.pad,
            dropout=shape.dropout,
            dropout_attention=shape.dropout,
        ),
        ctc_vocabulary=characters.size if config.loss.ctc_weight else 0,
    )


def load_initial(
    config: TrainConfig, run: Run, say: Callable[[str], None], load: Callable[[Path], Any] = load_model
) -> SpeechModel | None:
    """The model of --init; once the run has a checkpoint, that one's, for the other may be gone by then."""
    if config.init is None:
        return None
    goes_on = bool(run.checkpoints)
    model = load(run.checkpoints[-1] if goes_on else checkpoint_of(config.init))
    check_model(config, model)
    if model.tokenizer is None:
        raise ConfigError(f"--init {config.init}: the checkpoint has no tokenizer, without which it cannot be trained")
    if config.pad_seconds is not None:
        pad_to(model, config.pad_seconds, config.init)
    if not config.loss.ctc_weight and model.ctc is not None:
        if not goes_on:
            say("the checkpoint's CTC head is left out; --loss.ctc-weight 0.3 trains it on")
        model.ctc, model.config = None, dataclasses.replace(model.config, ctc_vocabulary=0)
    elif config.loss.ctc_weight and model.ctc is None:
        raise ConfigError(f"--init {config.init}: the checkpoint has no CTC head; leave --loss.ctc-weight out")
    return model


def check_model(config: TrainConfig, model: AnyModel) -> None:
    """Raise ConfigError for settings that the model of --init does not support."""
    given: dict[str, tuple[Capability, bool]] = {
        "--pad-seconds": ("any_length", config.pad_seconds is not None),
        "--compile": ("compile", config.compile),
        "--parallel shard": ("shard", config.parallel == "shard"),
        "--augment masks": ("spec_augment", bool(config.augment.frequency_masks or config.augment.time_masks)),
    }
    check_support(model, {name: needed for name, (needed, on) in given.items() if on}, f"--init {config.init}")


def pad_to(model: SpeechModel, seconds: float, source: Path) -> None:
    """Sets the length to which the model pads utterances. Raises ConfigError where it cannot be."""
    if not hasattr(model.config.features, "pad_seconds"):
        raise ConfigError(f"--pad-seconds: {source} is no Whisper, and pads to no length; leave it out")
    positions = getattr(model.config.encoder, "positions", None)
    model.set_features(pad_seconds=0.0)
    if positions and seconds and model.encoder_frames(seconds) > positions:
        most = positions * model.frame_seconds
        raise ConfigError(f"--pad-seconds {seconds:g}: {source} takes {most:g} s at most")
    model.set_features(pad_seconds=seconds)


def find_budget(
    config: TrainConfig,
    run: Run,
    model: SpeechModel,
    index: LengthIndex,
    precision: str,
    micro_batches: int,
    say: Callable[[str], None],
    track: Callable[[list, str], Iterable],
) -> Budget:
    """Return the run's budget, measured where it is not there yet."""
    path = run.folder / "budget.json"
    if path.exists():
        return Budget.load(path)
    here = measured_on(config, model, precision)
    if config.budget is not None:
        budget = Budget.load(config.budget)
        try:
            budget.require(**{name: here[name] for name in DECIDING})
        except BudgetError as error:
            raise BudgetError(f"{config.budget}: {error}") from None
        with writing(path):
            budget.save(path)
        return budget
    device = next(model.parameters()).device
    frame_seconds = planned_frame_seconds(model)
    known = within(index, model.longest_seconds, model.positions)
    most_frames, probe_seconds = probe_bounds(config, known, frame_seconds, micro_batches, device.type == "cpu")
    progress = iter(track(list(range(PROBES)), "measuring"))
    prober = Prober(
        training_step(config, model, precision, prompt=1),
        memory_limit(device, say),
        here,
        journal=run.folder / "budget.probes.jsonl",
        told=lambda _: next(progress, None),
    )
    budget = measure_budget(
        prober,
        known,
        frame_seconds,
        most_probes=PROBES,
        most_frames=most_frames,
        probe_seconds=probe_seconds,
        say=say,
    )
    for _ in progress:  # fewer may have been enough
        pass
    budget = dataclasses.replace(budget, measured_on=dict(budget.measured_on) | {MADE_BY: "canter train"})
    with writing(path):
        budget.save(path)
    return budget


def plan_batches(
    limits: BatchLimits,
    budget: Budget,
    index: Any,
    known: Any,
    *,
    slowest: float,
    ranks: int,
    **settings: Any,
) -> tuple[Plan, BatchSizes, float]:
    """Return the plan of ``index`` within budget and limits, its batch sizes and the predicted seconds of a step.

    known: the utterances that can be used, by which the batches' seconds are limited.
    """
    held = limited(budget, limits.seconds, known, slowest)
    plan = Plan(index, held, min_steps=1, **settings)
    table, seconds, steps = predicted(plan, ranks)
    enough = steps >= limits.min_steps
    if not enough:
        plan = Plan(index, held, min_steps=limits.min_steps, **settings)
        table, seconds, steps = predicted(plan, ranks)
    return plan, BatchSizes.of(table, steps, budget, held, limits, enough), seconds


def predicted(plan: Plan, ranks: int) -> tuple[BatchTable, float, int]:
    """Return (micro-batches, mean seconds of a step by the budget, its micro-batches shared out to so many ranks; steps
    of an epoch, where sources have weights in as many utterances as there are)."""
    table = plan.table(SEEN_WINDOWS if plan.endless else None)
    found = figures(table, plan.budgets[0][1], ranks)
    steps = found.steps
    if plan.endless:
        steps = round(steps * len(plan.index) / max(1, found.utterances))
    return table, found.hours * 3600 / max(1, found.steps), steps


def as_begun(config: TrainConfig, say: Callable[[str], None]) -> TrainConfig:
    """Return ``config`` with the --batch-seconds of a run that Canter 0.1 began, where it is 'auto': the default was
    another then, and the run's steps must stay the same."""
    if config.batch_seconds != "auto":
        return config
    settled = Run(config.output).settled()
    if settled and "batches" not in settled:
        held = config.output / "config.yaml"
        try:
            settled[BEGUN_WITH] = yaml.safe_load(held.read_text(encoding="utf-8")).get("batch_seconds", 24.0)
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"{held} cannot be read: {' '.join(str(error).split())}; put it back") from None
    if BEGUN_WITH not in settled:
        return config
    begun = settled[BEGUN_WITH]
    say(f"--batch-seconds {'none' if begun is None else begun}, with which the run began under Canter 0.1")
    return dataclasses.replace(config, batch_seconds=begun)


def choose_steps(config: TrainConfig, step_seconds: float, epoch_steps: int) -> int:
    """Return the number of steps, from --steps, --minutes or --epochs, in this order."""
    if config.steps is not None:
        return config.steps
    if config.minutes is not None:
        return max(1, round(config.minutes * 60 / step_seconds))
    return max(1, round(config.epochs * epoch_steps))
