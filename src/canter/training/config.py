"""Settings of a training run: frozen dataclasses that YAML files and flags fill in.

Defaults that depend on other settings are in `canter.training.defaults`."""

import copy
import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import yaml

from canter.corpus.remote import is_url
from canter.errors import ConfigError, PlanError
from canter.fields import FileOnly, Read, from_mapping, to_mapping
from canter.models.hub import is_hub_name
from canter.planning.lengths import GivenLimits, rate_limits
from canter.untrusted import read_yaml_value


def _limits_given(value: object, _: Path | None) -> object:  # TrainConfig reads numbers, pairs and texts itself
    return None if value == "none" else value


def _initial_model(value: object, base: Path | None) -> Path | None:
    if value is None or isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"expected Path, found {value!r:.80}")
    if base is None or (not (base / value).exists() and is_hub_name(value)):
        return Path(value)
    return base / value


RENAMED = {
    "vocabulary": "vocab_size",
    "lang_column": "language_column",
    "window": "batching_window",
    "largest_first": "check_memory",
    "keep": "keep_checkpoints",
    "skip_limit": "max_skipped",
    "bad_steps": "max_bad_steps",
    "loss.ctc_alone": "loss.ctc_warmup",
}
"""New names of settings of Canter 0.1, which its run folders still have."""
REMOVED: dict[str, object] = {"short_first": False, "optimizer.matrix_every": 2}
"""Settings of Canter 0.1 that are gone, with the only value that they can have now."""

# Settings that may change between the starts of a run, as they do not change what its steps compute.
# fmt: off
FREE = frozenset((
    "output", "workers", "threads", "device", "parallel", "compile", "valid", "valid_every", "valid_utterances",
    "save_every", "keep_checkpoints", "upload", "max_skipped", "max_bad_steps", "rank_timeout", "data_timeout", "track",
    "log_utterances", "allow_changes", "check_memory", "license",
))
# fmt: on

# (names of settings, condition that they must meet, the condition in words)
# fmt: off
LIMITS = (
    ("batching_window micro_batches_per_step min_steps valid_every save_every valid_utterances keep_checkpoints "
     "max_bad_steps threads vocab_size model.encoder_layers model.decoder_layers model.width model.decoder_width "
     "model.heads model.kernel_size model.subsampling_channels model.mels model.positions",
     lambda value: value >= 1, "at least 1"),
    ("batch_seconds", lambda value: value == "auto" or value > 0, "auto, none or a positive number of seconds"),
    ("optimizer.clip", lambda value: value > 0, "positive"),
    ("minutes steps epochs rank_timeout data_timeout optimizer.learning_rate optimizer.matrix_learning_rate "
     "loss.teacher_temperature lora.alpha",
     lambda value: 0 < value < math.inf, "positive and finite"),
    ("seed", lambda value: 0 <= value < 2**63, "at least 0 and below 2^63"),
    ("workers lora.rank optimizer.weight_decay optimizer.warmup augment.frequency_masks augment.frequency_width "
     "augment.time_masks", lambda value: value >= 0, "0 or more"),
    ("max_skipped loss.ctc_weight loss.ctc_warmup loss.teacher_weight optimizer.floor augment.time_width",
     lambda value: 0 <= value <= 1, "between 0 and 1"),
    ("model.dropout loss.label_smoothing optimizer.ema lora.dropout",
     lambda value: 0 <= value < 1, "at least 0 and below 1"),
)
# fmt: on


@dataclass(frozen=True)
class ModelShape:
    """Shape of a model trained from scratch: a FastConformer encoder and a Transformer decoder, as Canary has."""

    encoder_layers: int = 6
    """Number of FastConformer encoder layers."""
    decoder_layers: int = 2
    """Number of Transformer decoder layers."""
    width: int = 144
    """Model dimension of encoder and decoder; feed-forward layers are four times as wide."""
    decoder_width: Annotated[int | None, FileOnly()] = None
    """Model dimension of the decoder where it is another one, as canary-180m-flash has (default: --model.width)."""
    heads: int = 4
    """Number of attention heads."""
    kernel_size: Annotated[int, FileOnly()] = 9
    """Kernel size of the encoder's depthwise convolution, in 80 ms frames."""
    subsampling_channels: int = 32
    """Channels of the encoder's 8x subsampling."""
    mels: int = 80
    """Number of mel bins of the features."""
    dropout: float = 0.0
    """Dropout probability of inputs, residuals and attention."""
    positions: Annotated[int, FileOnly()] = 512
    """Maximum tokens of a sequence, prompt and end token included."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser and learning-rate schedule. Muon (orthogonalised momentum) or AdamW updates the matrices of encoder and
    decoder layers; AdamW updates everything else."""

    name: Literal["auto", "muon", "adamw"] = "auto"
    """Optimiser of the matrices. auto: muon from scratch, adamw with --init (Muon's learning rate would overwrite
    trained weights) and with --parallel shard."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW (default: 2e-3 from scratch, 3e-5 with --init)."""
    matrix_learning_rate: float = 0.01
    """Peak learning rate of Muon."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    schedule: Literal["cosine", "inverse_sqrt", "noam", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up. 'noam' is inverse_sqrt with both peaks multiplied by (width x warm-up
    steps)^-0.5 (Vaswani et al., 2017)."""
    warmup: float = 0.05
    """Warm-up: a fraction of the run's steps if below 1, else a number of steps."""
    floor: float = 0.01
    """Learning-rate floor of the cosine, as a fraction of the peak."""
    clip: float = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights, such as 0.999; 0: no average. It is validated and
    saved in place of the weights."""


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy of the attention decoder and an auxiliary CTC loss on characters (Hori et al., 2017)."""

    ctc_weight: float | None = None
    """Weight of the CTC loss, between 0 (no CTC head) and 1; cross-entropy has 1 - weight (default: 0.3 from scratch, 0
    with --init)."""
    ctc_warmup: float | None = None
    """CTC-only warm-up, as a fraction of the run's steps: the decoder cannot learn before the encoder does (default:
    0.2 from scratch, 0 with --init or without CTC)."""
    label_smoothing: float = 0.1
    """Label smoothing of the cross-entropy."""
    teacher_weight: float | None = None
    """Weight of the divergence from --teacher, between 0 and 1; cross-entropy has 1 - weight (default: 0.5 with
    --teacher)."""
    teacher_temperature: Annotated[float, FileOnly()] = 2.0
    """Temperature of the teacher's and the model's token probabilities (Hinton et al., 2015)."""


@dataclass(frozen=True)
class AugmentConfig:
    """SpecAugment (Park et al., 2019), speed perturbation, noise and channels, drawn from (seed, epoch, row).

    Ranges are a low and a high value, or one value. Each effect has a probability per utterance and epoch."""

    frequency_masks: int = 0
    """Number of frequency masks (Canary's recipe: 2)."""
    frequency_width: Annotated[int, FileOnly()] = 27
    """Maximum width of a frequency mask, in mel bins."""
    time_masks: int = 0
    """Number of time masks (Canary's recipe: 10)."""
    time_width: Annotated[float, FileOnly()] = 0.05
    """Maximum width of a time mask, as a fraction of the utterance."""
    speed: tuple[float, ...] = ()
    """Speed perturbation: each utterance gets one of these speeds in each epoch (Ko et al., 2015), such as 0.9 1.0 1.1
    (default: no perturbation)."""
    rir: tuple[Path, ...] = ()
    """Manifests or folders of room impulse responses, with which utterances are convolved (default: no
    reverberation)."""
    rir_probability: Annotated[float, FileOnly()] = 0.5
    """Probability of reverberation."""
    noise: tuple[Path, ...] = ()
    """Manifests or folders of noise that is added to utterances (default: no noise)."""
    noise_probability: Annotated[float, FileOnly()] = 0.5
    """Probability of noise."""
    noise_snr: Annotated[tuple[float, ...], FileOnly()] = (0.0, 20.0)
    """Range of the signal-to-noise ratio in dB."""
    gain: Annotated[tuple[float, ...], FileOnly()] = ()
    """Range of the gain in dB, such as [-20, 6] (default: no gain)."""
    gain_probability: Annotated[float, FileOnly()] = 0.5
    """Probability of a gain."""
    clipping: Annotated[tuple[float, ...], FileOnly()] = ()
    """Range of the level at which samples are clipped, as a fraction of the utterance's peak, such as [0.2, 0.9]
    (default: no clipping)."""
    clipping_probability: Annotated[float, FileOnly()] = 0.1
    """Probability of clipping."""
    low_pass: Annotated[tuple[float, ...], FileOnly()] = ()
    """Range of the cutoff frequency of a low-pass filter in Hz, such as [2500, 7000] (default: no filter)."""
    low_pass_probability: Annotated[float, FileOnly()] = 0.2
    """Probability of a low-pass filter."""
    telephone: Annotated[tuple[Literal["mulaw", "alaw", "gsm"], ...], FileOnly()] = ()
    """Telephone codecs, one of which is drawn: G.711 with mu-law or A-law, GSM 06.10; each at 8 kHz and 300 to 3400 Hz
    (default: no telephone)."""
    telephone_probability: Annotated[float, FileOnly()] = 0.2
    """Probability of a telephone channel."""

    def __post_init__(self) -> None:
        for name in ("rir", "noise"):
            object.__setattr__(self, name, _several_paths(getattr(self, name)))
        ranges = {
            "noise_snr": (-math.inf, math.inf, "finite"),
            "gain": (-math.inf, math.inf, "finite"),
            "clipping": (0.0, 1.0, "above 0 and at most 1"),
            "low_pass": (0.0, math.inf, "above 0 and finite"),
        }
        for name, (above, most, must) in ranges.items():
            values = getattr(self, name)
            if len(values) > 2 or not all(above < one <= most and math.isfinite(one) for one in values):
                raise ConfigError(f"augment.{name} is {list(values)}; it must be one value or two, {must}")
            if list(values) != sorted(values):
                raise ConfigError(f"augment.{name} is {list(values)}; the lower value comes first")
        if self.noise and not self.noise_snr:
            raise ConfigError("augment.noise_snr is empty; give the range of the signal-to-noise ratio in dB")
        for one in dataclasses.fields(self):
            effect = re.sub("_(probability|snr)$", "", one.name)
            if effect == one.name:
                continue
            value = getattr(self, one.name)
            if one.name.endswith("_probability") and not 0 <= value <= 1:
                raise ConfigError(f"augment.{one.name} is {value}; it must be between 0 and 1")
            if value != one.default and not getattr(self, effect):
                raise ConfigError(f"augment.{one.name} has no effect without augment.{effect}; set it, or leave it out")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al., 2021): train low-rank additions to linear layers; the weights of --init stay as they are."""

    rank: int = 0
    """Rank of the additions, such as 16; 0: no LoRA, all weights are trained."""
    alpha: float | None = None
    """Factor of the additions, divided by the rank (default: twice the rank)."""
    targets: tuple[str, ...] = ()
    """Patterns of linear layers, by their names or ends of them in Hugging Face's module or Canter's, such as q_proj
    v_proj (default: attention and feed-forward of all layers of encoder and decoder)."""
    dropout: float = 0.0
    """Dropout probability of the inputs of the additions."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on a manifest, or resume the run in --output."""

    manifest: tuple[Path, ...] = ()
    """Training manifests (NeMo JSONL, or any other source that 'canter index' reads), or one mixture with weights
    (YAML, docs/corpus.md) (required)."""
    valid: tuple[Path, ...] = ()
    """Validation manifests (default: no validation; the last checkpoint counts as the best)."""
    output: Path = Path("runs/default")
    """Folder of the run. A folder that holds a run of the same configuration is resumed."""
    init: Annotated[Path | None, Read(_initial_model)] = None
    """Checkpoint to fine-tune, which gives weights, shape and, without --tokenizer, the tokenizer (default: train from
    scratch)."""
    teacher: Annotated[Path | None, Read(_initial_model)] = None
    """Checkpoint of a model with the same tokenizer to distil from, such as the one that --init was reshaped from
    (default: no teacher)."""
    pad_seconds: float | None = None
    """With --init and a Whisper or OWSM: pad every utterance to this many seconds; 0 keeps each at its own length,
    which is several times as fast (default: the checkpoint's setting, 30 for a pretrained model)."""
    tokenizer: Path | None = None
    """Folder of a tokenizer (default: that of --init, else train one on the transcripts). With --init, rows of
    embedding and head that both tokenizers have are kept, and the others start from means of them."""
    vocab_size: int = 512
    """Vocabulary size of a tokenizer trained on the transcripts, special tokens included. A text that is too small
    lowers it."""
    minutes: float | None = None
    """Training time in minutes. The number of steps follows from the measured step time and is estimated again during
    the run (default: --epochs decides)."""
    steps: int | None = None
    """Number of optimiser steps (default: --minutes or --epochs decides)."""
    epochs: float = 20.0
    """Passes over the data, if neither --steps nor --minutes is given."""
    text_column: str | None = None
    """Column, or JSON key, with the text in manifests and in --valid (default: text, sentence, transcription
    or another customary name)."""
    language_column: str | None = None
    """Column with the language (default: lang, language, locale or lang_id)."""
    audio_column: str | None = None
    """Column with the audio or its path (default: audio_filepath, audio, file_name, path or another customary name)."""
    budget: Path | None = None
    """Memory budget and step times, as 'canter tune' writes them (default: measured at the start of the run)."""
    strategy: str = "balanced"
    """Batching strategy: random, duration, bucket_1d, bucket_2d, balanced, or packed, which trains without padding;
    'canter compare' shows what each gives."""
    mixing: float | None = None
    """Mixing of 'balanced': 0 pads least, larger numbers mix more (default: 1)."""
    mix_steps: bool = False
    """With 'balanced': every optimiser step holds short and long utterances. Some micro-batches are smaller, unless
    each rank takes several of a step (gradient accumulation)."""
    batch_seconds: float | Literal["auto"] | None = "auto"
    """Maximum padded audio of a micro-batch, in seconds. auto: fill the memory budget, but use less if the run would
    have too few updates or, on a CPU, if larger batches are hardly faster. none: always fill the memory budget."""
    min_steps: int | None = None
    """Minimum optimiser steps per epoch; smaller batches make more steps (default: 50 with --batch-seconds auto, more
    for short runs; otherwise no minimum)."""
    max_tokens_per_second: Annotated[GivenLimits, Read(_limits_given)] = None
    """Leave out utterances with more tokens per second than one limit such as 25, than limits up to a duration in
    seconds such as 10:30 20:25 40:20, or, with auto, than mean + 4 standard deviations of 30 buckets of duration. They
    are listed in left_out.jsonl (default: no limit)."""
    micro_batches_per_step: int | None = None
    """Micro-batches per optimiser step over all ranks, for gradient accumulation (default: the number of ranks at the
    run's first start)."""
    batching_window: int = 50_000
    """Number of utterances that are batched together. Larger windows pad less, smaller ones mix more."""
    check_memory: Annotated[bool, FileOnly()] = True
    """Compute the largest micro-batch once before the first step, and warn if it does not fit in memory. The steps stay
    the same."""
    seed: int = 0
    """Seed of initial weights, order, augmentation and dropout."""
    workers: int = 1
    """Number of worker processes that decode audio ahead of training; 0 decodes in the training process."""
    threads: int | None = None
    """Number of CPU threads that compute (default: one or one per core, whichever is measured to be faster)."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Precision of the arithmetic; weights stay in float32. auto: the faster of both, measured on a few steps."""
    device: str = "auto"
    """Device: cpu, cuda or auto (a GPU if there is one). Each rank uses the GPU of its local rank."""
    parallel: Literal["replicate", "shard"] = "replicate"
    """Training state of several ranks: a full copy on each, or sharded with FSDP2."""
    compile: bool = False
    """Compile the layers of encoder and decoder with torch.compile: the start is slow, then steps on a GPU are
    faster."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters to freeze, such as 'encoder.*'. Frozen BatchNorm layers stop updating their statistics
    (default: train everything)."""
    valid_every: int = 500
    """Number of steps between validations; each validation saves a checkpoint."""
    save_every: int | None = None
    """Number of steps between checkpoints (default: --valid-every)."""
    valid_utterances: int = 100
    """Maximum number of utterances transcribed at a validation, evenly spread over the manifest."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep besides the best one."""
    upload: str | None = None
    """Folder in object storage, such as s3://bucket/run, to which checkpoints and logs are copied during the run. A run
    whose folder has no checkpoint is restored from it (default: none)."""
    max_skipped: Annotated[float, FileOnly()] = 0.1
    """Maximum fraction of utterances that turn out to be unusable; the run stops beyond it."""
    max_bad_steps: Annotated[int, FileOnly()] = 10
    """Maximum number of consecutive steps with a non-finite loss or gradient; each is skipped, then the run stops."""
    rank_timeout: Annotated[float, FileOnly()] = 60.0
    """Seconds without a heartbeat after which a rank counts as dead and the others stop."""
    data_timeout: float = 300.0
    """Seconds without data after which the run saves a checkpoint, names the files that it waits for and ends."""
    license: str | None = None
    """Licence of the model for its card, README.md beside the best checkpoint, as the Hugging Face hub names it: such
    as apache-2.0 (default: none is stated)."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Experiment trackers besides metrics.jsonl; wandb and trackio need the extra 'log'."""
    log_utterances: Annotated[bool, FileOnly()] = True
    """Log the rows of each step to utterances.jsonl."""
    allow_changes: bool = False
    """Resume a run with settings that differ from its own; the new settings hold from then on."""
    model: ModelShape = field(default_factory=ModelShape)
    """Shape of the model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser and learning-rate schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Training loss."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Data augmentation."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """LoRA adapters."""

    def __post_init__(self) -> None:
        _use_paths(self)
        for names, fits, must in LIMITS:
            for name in names.split():
                value = functools.reduce(getattr, name.split("."), self)
                if value is not None and not fits(value):
                    raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be {must}")
        try:
            object.__setattr__(self, "max_tokens_per_second", rate_limits(self.max_tokens_per_second))
        except (PlanError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"--max-tokens-per-second: {error}") from None
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ConfigError(
                f"--license {self.license!r:.80} is not the name of a licence on the Hugging Face hub, such as "
                "apache-2.0, cc-by-4.0 or other"
            )
        if self.upload is not None and not is_url(self.upload):
            raise ConfigError(
                f"--upload {self.upload} is not a URL; name a folder in object storage, such as s3://bucket/run"
            )
        if self.loss.ctc_weight == 0 and self.loss.ctc_warmup:
            raise ConfigError("--loss.ctc-warmup needs a --loss.ctc-weight above 0; set --loss.ctc-warmup 0")
        if self.loss.teacher_weight is not None and self.teacher is None:
            raise ConfigError(f"--loss.teacher-weight {self.loss.teacher_weight:g} needs a --teacher; name one")
        if not all(0.3 <= speed <= 3 for speed in self.augment.speed):
            raise ConfigError(f"--augment.speed {self.augment.speed}: speeds must lie between 0.3 and 3")
        if self.parallel == "shard" and self.optimizer.name == "muon":
            raise ConfigError(
                "--parallel shard cannot go with Muon, which needs whole matrices; use --optimizer.name adamw"
            )
        _check_lora(self)
        if self.pad_seconds is not None and (self.init is None or not 0 <= self.pad_seconds < math.inf):
            raise ConfigError(
                f"--pad-seconds {self.pad_seconds:g} needs --init with a Whisper, and to be finite, 0 or more"
            )
        if self.init is not None:
            shape = dataclasses.fields(ModelShape)
            changed = [f.name for f in shape if getattr(self.model, f.name) != f.default]
            given = [f"--model.{name.replace('_', '-')}" for name in changed]
            if given:
                raise ConfigError(
                    f"{', '.join(given)} cannot go with --init: the shape is that of the checkpoint; leave them out, "
                    "or change its layers with 'canter reshape' first"
                )
        for name, width in (("--model.width", self.model.width), ("model.decoder_width", self.model.decoder_width)):
            if width is not None and width % self.model.heads:
                raise ConfigError(f"{name} {width} is not a multiple of --model.heads {self.model.heads}")


def _check_lora(config: TrainConfig) -> None:
    """Raise ConfigError for settings of LoRA without a rank, and for those that cannot go with it."""
    if not config.lora.rank:
        given = [f.name for f in dataclasses.fields(LoraConfig) if getattr(config.lora, f.name) != f.default]
        if given:
            raise ConfigError(f"--lora.{given[0]} needs --lora.rank, such as 16; set it, or leave --lora out")
        return
    refused = (
        (config.init is None, "needs --init: it adapts a trained model; name one"),
        (config.parallel == "shard", "cannot go with --parallel shard; use --parallel replicate: adapters are small"),
        (config.optimizer.name == "muon", "cannot go with --optimizer.name muon; use adamw"),
        (bool(config.loss.ctc_warmup), "cannot go with a CTC-only warm-up; set --loss.ctc-warmup 0"),
        (config.tokenizer is not None, "cannot go with --tokenizer, whose new rows it would not train; leave one out"),
    )
    for wrong, why in refused:
        if wrong:
            raise ConfigError(f"--lora.rank {config.lora.rank} {why}")


def _use_paths(config: TrainConfig) -> None:
    """Replace the strings and lists that a program may give by paths and tuples."""
    for name in ("manifest", "valid"):
        object.__setattr__(config, name, _several_paths(getattr(config, name)))
    for name in ("output", "init", "teacher", "tokenizer", "budget"):
        value = getattr(config, name)
        object.__setattr__(config, name, None if value is None else Path(value))


def _several_paths(value: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> tuple[Path, ...]:
    return (Path(value),) if isinstance(value, str | os.PathLike) else tuple(map(Path, value))


def _was_url(path: Path) -> bool:
    """Return True for the path made of a URL, which keeps one slash of two."""
    return re.search(r"(^|/)[a-z][a-z0-9+]+:/", str(path)) is not None


def rooted(config: TrainConfig) -> TrainConfig:
    """Return the configuration with absolute paths of its inputs, so that it can be resumed from another folder.

    Raises ConfigError for manifests at URLs.
    """
    mixture, copy = "name it in a mixture's YAML (- path: URL), and that file here", "copy it to a disk"
    for name, way in (("manifest", mixture), ("valid", copy)):
        for path in getattr(config, name):
            if _was_url(path):
                raise ConfigError(f"--{name} {path} is a URL; {way}")
    for path in (*config.augment.noise, *config.augment.rir):
        if _was_url(path):
            raise ConfigError(f"--augment.noise and --augment.rir take no URL, as {path} is; {copy}")

    def absolute(path: Path | None) -> Path | None:  # a manifest may name its tars: MANIFEST::TAR
        return None if path is None else Path("::".join(map(os.path.abspath, str(path).split("::"))))

    return dataclasses.replace(
        config,
        manifest=tuple(map(absolute, config.manifest)),
        valid=tuple(map(absolute, config.valid)),
        init=config.init if is_hub_name(config.init) else absolute(config.init),
        teacher=config.teacher if is_hub_name(config.teacher) else absolute(config.teacher),
        tokenizer=absolute(config.tokenizer),
        budget=absolute(config.budget),
        augment=dataclasses.replace(
            config.augment,
            noise=tuple(map(absolute, config.augment.noise)),
            rir=tuple(map(absolute, config.augment.rir)),
        ),
    )


class _Loader(yaml.SafeLoader):
    """YAML loader that reads 10:30 as text, not as 630: YAML 1.1 has base-60 numbers."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, re.compile(r"(?![-+]?[0-9][0-9_]*:)" + pattern.pattern, re.X)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_config(path: Path) -> TrainConfig:
    """Read a user's YAML file of TrainConfig's fields; relative paths are relative to the file.

    Raises ConfigError that names the file, the setting and the nearest known or new name.
    """
    content = _read_settings(path)
    for old, _, _ in _old_settings(content):
        way = f"was renamed to '{RENAMED[old]}'" if old in RENAMED else "was removed; leave it out"
        raise ConfigError(f"{path}: '{old}' {way}")
    return from_mapping(TrainConfig, content, str(path), base=path.parent)


def load_run_config(path: Path) -> TrainConfig:
    """Read the config.yaml of a run folder, also under the names of Canter 0.1.

    Raises ConfigError as `load_config` and `config_of_run`.
    """
    return config_of_run(_read_settings(path), str(path))


def config_of_run(content: object, where: str) -> TrainConfig:
    """Return the configuration of a run from plain values, as config.yaml and run.json hold them.

    where: file that errors name. Raises ConfigError for settings that cannot be read, and for a removed setting of
    Canter 0.1 whose value is not the one that Canter always uses now.
    """
    if isinstance(content, dict):
        content = copy.deepcopy(content)
    for old, group, name in list(_old_settings(content)):
        value = group.pop(name)
        if old in RENAMED:
            group.setdefault(RENAMED[old].rpartition(".")[2], value)
        elif value != REMOVED[old]:
            raise ConfigError(
                f"{where}: '{old}' is {value!r:.80}, which this version of Canter no longer supports (it is always "
                f"{REMOVED[old]!r}); resume the run with Canter 0.1, or set it to {REMOVED[old]!r} there"
            )
    return from_mapping(TrainConfig, content, where)


def _old_settings(content: object) -> Iterator[tuple[str, dict[str, object], str]]:
    """Yield (dotted name, mapping that holds it, key) of each setting of Canter 0.1 that has no such name any more."""
    for old in (*RENAMED, *REMOVED):
        group, _, name = old.rpartition(".")
        inside = content.get(group) if group and isinstance(content, dict) else content
        if isinstance(inside, dict) and name in inside:
            yield old, inside, name


def _read_settings(path: Path) -> object:
    try:
        content = read_yaml_value(path, ConfigError, _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; 'canter train --print-config' prints one to start from") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from None
    return {} if content is None else content


def dump_config(config: TrainConfig, comments: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the configuration as YAML, with ``comments`` after the settings that they name."""
    text = yaml.safe_dump(to_mapping(config), sort_keys=False, width=math.inf)
    lines = []
    for line in text.splitlines():
        name = line.partition(":")[0]
        comment = comments.get(name) if line[:1].isalpha() else None
        lines.append(f"{line}  # {comment}" if comment else line)
    return "\n".join(lines) + "\n"


def changes(ours: TrainConfig, theirs: TrainConfig) -> list[tuple[str, object, object]]:
    """Return (name, their value, our value) of each setting that would change what the steps of a run compute."""

    def flat(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
        rows: dict[str, object] = {}
        for key, item in value.items():
            rows |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
        return rows

    a, b = flat(to_mapping(ours)), flat(to_mapping(theirs))
    return [(k, b.get(k), a[k]) for k in a if a[k] != b.get(k) and k not in FREE]
