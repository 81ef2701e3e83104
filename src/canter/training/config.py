"""What a training run is configured by: frozen dataclasses, filled from YAML, overridden by flags."""

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from canter.errors import ConfigError

# Settings that may differ between the starts of a run: its steps compute the same.
# fmt: off
FREE = frozenset((
    "output", "workers", "threads", "device", "parallel", "compile", "valid", "valid_every", "valid_utterances",
    "save_every", "keep", "skip_limit", "bad_steps", "rank_timeout", "track", "log_utterances", "allow_changes",
    "largest_first",
))
# fmt: on

# What settings must be.
# fmt: off
LIMITS = (
    ("window micro_batches_per_step valid_every save_every valid_utterances keep bad_steps threads "
     "model.encoder_layers model.decoder_layers model.width model.heads model.kernel_size model.subsampling_channels "
     "model.mels model.positions optimizer.matrix_every", lambda value: value >= 1, "at least 1"),
    ("batch_seconds optimizer.clip", lambda value: value > 0, "positive"),
    ("minutes steps epochs rank_timeout optimizer.learning_rate optimizer.matrix_learning_rate",
     lambda value: 0 < value < math.inf, "positive and finite"),
    ("seed", lambda value: 0 <= value < 2**63, "at least 0 and below 2^63"),
    ("workers optimizer.weight_decay optimizer.warmup augment.frequency_masks augment.frequency_width "
     "augment.time_masks", lambda value: value >= 0, "0 or more"),
    ("skip_limit loss.ctc_weight loss.ctc_alone optimizer.floor augment.time_width",
     lambda value: 0 <= value <= 1, "between 0 and 1"),
    ("model.dropout loss.label_smoothing optimizer.ema", lambda value: 0 <= value < 1, "at least 0 and below 1"),
)
# fmt: on


@dataclass(frozen=True)
class ModelShape:
    """Shape of the model trained from scratch."""

    encoder_layers: int = 6
    """FastConformer layers."""
    decoder_layers: int = 2
    """Transformer decoder layers."""
    width: int = 144
    """Of encoder and decoder."""
    heads: int = 4
    """Attention heads."""
    kernel_size: int = 9
    """Of the encoder's depthwise convolution, in 80 ms frames."""
    subsampling_channels: int = 32
    """Of the 8x subsampling."""
    mels: int = 80
    """Mel bins of the features."""
    dropout: float = 0.0
    """Everywhere the recipe has one."""
    positions: int = 512
    """The longest token sequence, prompt and end token included."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon (orthogonalised momentum) on the matrices of the blocks, AdamW on everything else; or AdamW alone."""

    name: Literal["auto", "muon", "adamw"] = "auto"
    """Which optimiser has the matrices; by default Muon, and AdamW with --init: at a rate for random weights Muon soon
    overwrites trained ones."""
    learning_rate: float | None = None
    """AdamW's peak learning rate; by default 2e-3, and 3e-5 with --init."""
    matrix_learning_rate: float = 0.01
    """Muon's peak learning rate."""
    matrix_every: int = 2
    """Muon orthogonalises a matrix at every so many steps; between, it moves in its last direction."""
    weight_decay: float = 0.01
    """Decoupled, on matrices only."""
    schedule: Literal["cosine", "inverse_sqrt", "noam", "constant"] = "cosine"
    """What the learning rate does after its linear rise: falls as a cosine to --floor, or by 1/sqrt(step), or stays.
    'noam' is inverse_sqrt with both peaks multiplied by (width x warm-up steps)^-0.5 (Vaswani et al., 2017)."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises; from 1 on, a number of steps."""
    floor: float = 0.01
    """Where a cosine ends, as a share of the peak."""
    clip: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights that is validated and saved, such as 0.999; 0: none."""


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy of the attention decoder and an auxiliary CTC on characters (Hori et al., 2017)."""

    ctc_weight: float | None = None
    """Weight of CTC; the attention loss has the rest. 0 leaves the CTC head out. By default 0.3, and 0 with --init."""
    ctc_alone: float | None = None
    """Share of the steps, at the start, trained by CTC alone: the decoder cannot learn before the encoder has. By
    default 0.2, and 0 with --init or without CTC."""
    label_smoothing: float = 0.1
    """Of the cross-entropy."""


@dataclass(frozen=True)
class AugmentConfig:
    """SpecAugment (Park et al., 2019), drawn from (seed, epoch, row); helps where the data is small."""

    frequency_masks: int = 0
    """Bands of mel bins that are blanked (Canary's recipe: 2)."""
    frequency_width: int = 27
    """The widest of them, in mel bins."""
    time_masks: int = 0
    """Stretches of frames that are blanked (Canary's recipe: 10)."""
    time_width: float = 0.05
    """The widest of them, as a share of the utterance."""
    speed: tuple[float, ...] = ()
    """Speeds of which an utterance gets one in each epoch (Ko et al., 2015), such as 0.9 1.0 1.1; none: as it is."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on a manifest, or go on with the run that OUTPUT holds."""

    manifest: tuple[Path, ...] = ()
    """Training manifests (NeMo JSONL, or any other source that 'canter index' reads), or one mixture of such with
    weights (YAML, docs/corpus.md)."""
    valid: tuple[Path, ...] = ()
    """Validation manifests; none: the last checkpoint is the best."""
    output: Path = Path("runs/default")
    """The run's folder. One that holds a run of the same configuration is continued."""
    init: Path | None = None
    """Checkpoint to start from: its weights, shape and tokenizer; none: from scratch."""
    pad_seconds: float | None = None
    """With --init and a Whisper: seconds to which every utterance is padded; 0: each keeps its length, which is several
    times as fast; none: as the checkpoint says, 30 for a pretrained one."""
    tokenizer: Path | None = None
    """Folder of a tokenizer; none: one is trained on the transcripts."""
    vocabulary: int = 512
    """Size of a tokenizer trained on the way, special tokens included (lowered where the text is too small)."""
    minutes: float | None = None
    """Train for about so long: the number of steps is set at the start, from the measured step time."""
    steps: int | None = None
    """Optimiser steps; none: from --minutes, or else --epochs."""
    epochs: float = 20.0
    """Passes over the data, where neither --steps nor --minutes is given."""
    budget: Path | None = None
    """What fits and how long it takes, as 'canter tune' writes it; none: measured at the start."""
    strategy: str = "balanced"
    """How utterances are batched; 'canter compare' shows the choice."""
    mixing: float | None = None
    """Dial of 'balanced': 0 pads least, larger numbers mix more; none: its default."""
    batch_seconds: float | None = 24.0
    """Audio in a micro-batch, padding included; none: as much as the memory budget holds."""
    micro_batches_per_step: int | None = None
    """Gradients of so many micro-batches make one step; none: one for each rank of the run's first start."""
    window: int = 50_000
    """Utterances sorted at a time; larger pads less, smaller mixes more."""
    largest_first: bool = True
    """Compute the largest micro-batch once before the first step, so that what does not fit in memory is told at once;
    the steps stay the same."""
    short_first: bool = False
    """The first window of the first epoch goes from short to long utterances; on the demo's corpus that costs steps."""
    seed: int = 0
    """Of initial weights, order and dropout."""
    workers: int = 1
    """Processes that decode audio ahead; 0 decodes in the training process."""
    threads: int | None = None
    """CPU threads for computing; none: one, or one a core, whichever is measured to be faster."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """'auto' times a few training steps in each and takes the faster."""
    device: str = "auto"
    """'cpu', 'cuda' or 'auto'; each rank takes the GPU of its number."""
    parallel: Literal["replicate", "shard"] = "replicate"
    """What several ranks hold: all of the training state each, or (FSDP2) their part of it."""
    compile: bool = False
    """Compile the layers of encoder and decoder (torch.compile): a slow start, then faster steps on a GPU."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by pattern, such as 'encoder.*'; BatchNorm among them stops counting too."""
    valid_every: int = 500
    """Steps between validations, each with a checkpoint."""
    save_every: int | None = None
    """Steps between checkpoints; none: as --valid-every."""
    valid_utterances: int = 100
    """Utterances transcribed at a validation, evenly spread over the manifest."""
    keep: int = 2
    """Checkpoints kept, besides the best."""
    skip_limit: float = 0.1
    """Share of utterances that may turn out unusable before the run stops."""
    bad_steps: int = 10
    """Steps in a row without a finite loss and gradient, each left out, after which the run stops."""
    rank_timeout: float = 60.0
    """Seconds without a sign of life after which a rank is taken for dead, and the others end."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl; wandb and trackio need the extra 'log'."""
    log_utterances: bool = True
    """Write which rows each step was made of to utterances.jsonl."""
    allow_changes: bool = False
    """Go on with a run although settings differ from its own; they hold from there on."""
    model: ModelShape = field(default_factory=ModelShape)
    """Shape of the model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How weights are updated."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What is done to the features."""

    def __post_init__(self) -> None:
        _use_paths(self)
        for names, fits, must in LIMITS:
            for name in names.split():
                value = functools.reduce(getattr, name.split("."), self)
                if value is not None and not fits(value):
                    raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be {must}")
        if self.loss.ctc_weight == 0 and self.loss.ctc_alone:
            raise ConfigError("--loss.ctc-alone needs a --loss.ctc-weight above 0; set --loss.ctc-alone 0")
        if not all(0.3 <= speed <= 3 for speed in self.augment.speed):
            raise ConfigError(f"--augment.speed {self.augment.speed}: speeds must lie between 0.3 and 3")
        if self.parallel == "shard" and self.optimizer.name == "muon":
            raise ConfigError(
                "--parallel shard cannot go with Muon, which needs whole matrices; use --optimizer.name adamw"
            )
        if self.pad_seconds is not None and (self.init is None or not 0 <= self.pad_seconds < math.inf):
            raise ConfigError(
                f"--pad-seconds {self.pad_seconds:g} needs --init with a Whisper, and to be finite, 0 or more"
            )
        if self.init is not None:
            shape = dataclasses.fields(ModelShape)
            changed = [f.name for f in shape if getattr(self.model, f.name) != f.default]
            given = [f"--model.{name.replace('_', '-')}" for name in changed]
            given += ["--tokenizer"] if self.tokenizer is not None else []
            if given:
                raise ConfigError(
                    f"{', '.join(given)} cannot go with --init: shape and tokenizer are those of the checkpoint; leave "
                    "them out, or change its layers with 'canter reshape' first"
                )
        if self.model.width % self.model.heads:
            raise ConfigError(
                f"--model.width {self.model.width} is not a multiple of --model.heads {self.model.heads}"
            )


def _use_paths(config: TrainConfig) -> None:
    """Make paths of the strings, and tuples of the lists, that a program may give for them."""
    for name in ("manifest", "valid"):
        value = getattr(config, name)
        several = [value] if isinstance(value, str | os.PathLike) else value
        object.__setattr__(config, name, tuple(map(Path, several)))
    for name in ("output", "init", "tokenizer", "budget"):
        value = getattr(config, name)
        object.__setattr__(config, name, None if value is None else Path(value))


def decided(config: TrainConfig) -> TrainConfig:
    """With what is left open decided: trained weights want other settings than random ones."""
    scratch, optimizer, loss = config.init is None, config.optimizer, config.loss
    name = ("muon" if scratch else "adamw") if optimizer.name == "auto" else optimizer.name
    rate = (2e-3 if scratch else 3e-5) if optimizer.learning_rate is None else optimizer.learning_rate
    weight = (0.3 if scratch else 0.0) if loss.ctc_weight is None else loss.ctc_weight
    alone = (0.2 if scratch and weight else 0.0) if loss.ctc_alone is None else loss.ctc_alone
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(optimizer, name=name, learning_rate=rate),
        loss=dataclasses.replace(loss, ctc_weight=weight, ctc_alone=alone),
    )


def rooted(config: TrainConfig) -> TrainConfig:
    """With the paths of what a run is made of absolute: it may be gone on with from another folder. Raises ConfigError
    for manifests at URLs."""
    mixture, copy = "name it in a mixture's YAML (- path: URL), and that file here", "copy it to a disk"
    for name, way in (("manifest", mixture), ("valid", copy)):
        for path in getattr(config, name):
            if re.search(r"(^|/)[a-z][a-z0-9+]+:/", str(path)):  # a Path keeps one slash of two
                raise ConfigError(f"--{name} {path} is a URL; {way}")

    def absolute(path: Path | None) -> Path | None:  # a manifest may name its tars: MANIFEST::TAR
        return None if path is None else Path("::".join(map(os.path.abspath, str(path).split("::"))))

    return dataclasses.replace(
        config,
        manifest=tuple(map(absolute, config.manifest)),
        valid=tuple(map(absolute, config.valid)),
        init=absolute(config.init),
        tokenizer=absolute(config.tokenizer),
        budget=absolute(config.budget),
    )


def load_config(path: Path, *, relative: bool = True) -> TrainConfig:
    """Reads a YAML file of TrainConfig's fields, nested as they are; relative paths are relative to the file, or,
    with ``relative=False``, to the working directory.

    Raises ConfigError naming the file, the key and the nearest known one.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; 'canter train --print-config' prints one to start from"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if content is None:
        content = {}
    return from_mapping(TrainConfig, content, str(path), path.parent if relative else None)


def from_mapping(cls: type, content: Any, where: str, base: Path | None = None) -> Any:
    """A mapping to the frozen dataclass ``cls``; ``base`` is what relative paths are relative to.

    Raises ConfigError for unknown keys and for values of the wrong type.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected a mapping of settings, found {content!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for key, value in content.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(fields))}"
            raise ConfigError(f"{where}: unknown setting '{key}'; {hint}")
        values[key] = _coerce(value, hints[key], f"{where}: {key}", base)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _coerce(value: Any, hint: Any, where: str, base: Path | None) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, where, base)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _coerce(value, next(a for a in arguments if a is not type(None)), where, base)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_coerce(item, arguments[0], where, base) for item in items)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: {value!r} is none of {', '.join(map(str, arguments))}")
        return value
    if hint is Path and isinstance(value, str):
        return base / value if base is not None else Path(value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 2e-3 as a string
        except (ValueError, OverflowError):
            pass
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}")


def to_mapping(config: Any) -> dict[str, Any]:
    """The configuration as plain values, for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def differences(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """'name: theirs -> ours' for each setting that would change what the steps of a run compute."""
    return [f"{name}: {before} -> {now}" for name, before, now in changes(ours, theirs)]


def changes(ours: TrainConfig, theirs: TrainConfig) -> list[tuple[str, Any, Any]]:
    """(name, theirs, ours) of each such setting."""

    def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for key, item in value.items():
            rows |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
        return rows

    a, b = flat(to_mapping(ours)), flat(to_mapping(theirs))
    return [(k, b.get(k), a[k]) for k in a if a[k] != b.get(k) and k not in FREE]
