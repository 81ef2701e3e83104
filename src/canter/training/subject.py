"""The model that is trained or measured: loaded from --init or built from scratch, on its device, in its precision."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Never, cast

import numpy as np
import torch

from canter.corpus.index import LengthIndex
from canter.errors import ConfigError
from canter.events import QUIET, Events
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.hub import is_hub_name
from canter.models.lora import LoraAdapter, attach, choose_modules, describe, fingerprint_of
from canter.models.model import ModelConfig, SpeechModel
from canter.models.protocol import AnyModel, Capability, check_support, module_of
from canter.planning.budget import Budget
from canter.planning.lengths import ModelLimits
from canter.planning.strategies import STRATEGIES
from canter.runtime import choose_device
from canter.text import load_tokenizer
from canter.text.characters import Characters
from canter.text.tokenizer import Tokenizer
from canter.training.config import TrainConfig
from canter.training.measure import choose_speed
from canter.training.run.folder import Record
from canter.training.step.weights import frozen_names

RATE_MARGIN = 1.25  # highest token rate in transcription, as a multiple of the highest in training
MIN_RATE = 0.1  # tokens per frame
MIN_WINDOW = 10  # seconds


@dataclass(frozen=True)
class Subject:
    """A model to train or to measure, with its device, its precision and the number of CPU threads."""

    model: AnyModel
    device: torch.device
    precision: str
    threads: int
    teacher: AnyModel | None = None

    @property
    def limits(self) -> ModelLimits:
        """Longest utterances that the model takes."""
        return ModelLimits(self.model.longest_seconds, self.model.positions)

    def usable(self, index: LengthIndex) -> LengthIndex:
        """Return the lengths that the model can take. Raise BudgetError if there are none."""
        from canter.tuning.fit import within

        return within(index, self.model.longest_seconds, self.model.positions)


def choose_subject(
    config: TrainConfig,
    model: AnyModel,
    record: Record | None = None,
    events: Events[Never] = QUIET,
    teacher: AnyModel | None = None,
) -> Subject:
    """Return ``model`` on its device, with the fastest precision and number of threads that ``config`` leaves open.

    record: decisions of a run that is resumed, which are kept.
    """
    device = choose_device(config.device)
    model.to(device)
    precision, threads = (record or {}).get("precision"), (record or {}).get("threads")
    if precision is None or threads is None:
        precision, threads = choose_speed(config, model, events, teacher)
    torch.set_num_threads(config.threads or threads)
    return Subject(model, device, precision, threads, teacher)


def build_model(config: TrainConfig, tokenizer: Tokenizer, characters: Characters) -> SpeechModel:
    """Return a model with random weights, drawn from the seed."""
    torch.manual_seed(config.seed)
    return SpeechModel(model_config(config, tokenizer, characters))


def model_config(config: TrainConfig, tokenizer: Tokenizer, characters: Characters) -> ModelConfig:
    """Return the shape of a model trained from scratch: Canary's architecture at the configured size."""
    shape = config.model
    wide = shape.decoder_width or shape.width
    shared = {"heads": shape.heads, "dropout": shape.dropout, "dropout_attention": shape.dropout}
    encoder = FastConformerConfig(
        layers=shape.encoder_layers,
        width=shape.width,
        feedforward=4 * shape.width,
        kernel_size=shape.kernel_size,
        subsampling_channels=shape.subsampling_channels,
        mels=shape.mels,
        dropout_input=shape.dropout,
        **shared,
    )
    vocabulary = {"vocabulary": tokenizer.vocab_size, "positions": shape.positions, "pad": tokenizer.pad}
    decoder = DecoderConfig(layers=shape.decoder_layers, width=wide, feedforward=4 * wide, **vocabulary, **shared)
    ctc_vocabulary = characters.size if config.loss.ctc_weight else 0
    return ModelConfig(FeatureConfig(mels=shape.mels), encoder, decoder, ctc_vocabulary=ctc_vocabulary)


# -- a checkpoint to start from --


def load_initial(
    config: TrainConfig, events: Events[Never] = QUIET, checkpoints: Sequence[Path] = ()
) -> AnyModel | None:
    """Return the model of --init, if any; of a run with ``checkpoints``, that of the newest one.

    With LoRA it is always that of --init, with an adapter that changes nothing yet, as the checkpoints hold the adapter
    only. Raises ConfigError for settings that the model does not support, and CheckpointError if the adapter of the
    newest checkpoint is of another model.
    """
    if config.init is None:
        return None
    from canter.loading import load_module
    from canter.models.hub import checkpoint_of

    lora, newest = config.lora.rank > 0, checkpoints[-1] if checkpoints else None
    start = newest if newest and not lora else checkpoint_of(config.init)
    model: AnyModel = load_module(start)
    source = f"--init {config.init}"
    fingerprint = ""
    if lora:
        from canter.models.formats.peft import check_base

        fingerprint = fingerprint_of(module_of(model))
        if newest:
            check_base(newest, model, source)
    given: dict[str, tuple[Capability, bool]] = {
        "--pad-seconds": ("any_length", config.pad_seconds is not None),
        "--compile": ("compile", config.compile),
        f"--strategy {config.strategy}": ("packing", STRATEGIES[config.strategy].packed),
        "--parallel shard": ("shard", config.parallel == "shard"),
        "--augment masks": ("spec_augment", bool(config.augment.frequency_masks or config.augment.time_masks)),
    }
    check_support(model, {name: needed for name, (needed, on) in given.items() if on}, source)
    if model.tokenizer is None:
        raise ConfigError(f"{source}: the checkpoint has no tokenizer, without which it cannot be trained")
    if config.tokenizer is not None and not checkpoints:
        model = _with_tokenizer(config, model, source, events)
    if config.pad_seconds is not None:
        _set_padding(cast(SpeechModel, model), config.pad_seconds, config.init)
    if config.loss.ctc_weight and model.ctc is None:
        raise ConfigError(f"{source}: the checkpoint has no CTC head; leave --loss.ctc-weight out")
    if model.ctc is not None and not config.loss.ctc_weight and "characters" not in model.supports:
        if not checkpoints:
            events.message("the checkpoint's CTC head stays as it is; --loss.ctc-weight 0.3 trains it, as ESPnet does")
    elif model.ctc is not None and not config.loss.ctc_weight:
        if not checkpoints:
            events.message("the checkpoint's CTC head is left out; --loss.ctc-weight 0.3 trains it")
        ours = cast(SpeechModel, model)
        ours.ctc, ours.config = None, dataclasses.replace(ours.config, ctc_vocabulary=0)
    if lora:
        base = os.fspath(config.init) if is_hub_name(config.init) else os.path.abspath(start)
        _attach_adapter(config, model, base, fingerprint, events)
    else:
        check_freeze(config, model)
    return model


def _with_tokenizer(config: TrainConfig, model: AnyModel, source: str, events: Events[Never]) -> AnyModel:
    """Return the model with the tokenizer of --tokenizer; what both tokenizers have keeps its rows.

    Raises ConfigError for a model that only another library runs, and for a tokenizer that does not fit it.
    """
    from canter.models.vocabulary import replace_vocabulary

    assert config.tokenizer is not None
    check_support(model, {"--tokenizer": "vocabulary"}, source)
    tokenizer = load_tokenizer(config.tokenizer)
    try:
        change = replace_vocabulary(cast(SpeechModel, model), tokenizer)
    except ConfigError as error:
        raise ConfigError(f"--tokenizer {config.tokenizer} with {source}: {error}") from None
    events.message(f"--tokenizer {config.tokenizer}: {change}; all other weights are those of the checkpoint")
    return change.model


def _attach_adapter(
    config: TrainConfig, model: AnyModel, base: str, fingerprint: str, events: Events[Never] = QUIET
) -> None:
    """Freeze the model and give it an adapter. Raises ConfigError for patterns that match no linear layer."""
    from canter.models.formats.peft import their_names

    lora, module, names = config.lora, module_of(model), their_names(model)
    assert lora.alpha is not None
    chosen = choose_modules(module, lora.targets, config.freeze, names, config.init)
    model.adapter = LoraAdapter(lora.rank, lora.alpha, lora.dropout, chosen, base, fingerprint)
    attach(module, model.adapter, config.seed)
    events.message(describe(module, model.adapter, names))


def _set_padding(model: SpeechModel, seconds: float, source: Path) -> None:
    """Set the length to which the model pads utterances. Raise ConfigError if it pads to none, or not to that."""
    if not hasattr(model.config.features, "pad_seconds"):
        raise ConfigError(f"--pad-seconds: {source} is no Whisper or OWSM, and pads to no length; leave it out")
    positions = getattr(model.config.encoder, "positions", None)
    model.set_features(pad_seconds=0.0)
    if positions and seconds and model.encoder_frames(seconds) > positions:
        limit = positions * model.frame_seconds
        raise ConfigError(f"--pad-seconds {seconds:g}: {source} takes {limit:g} s at most")
    model.set_features(pad_seconds=seconds)


def check_freeze(config: TrainConfig, model: AnyModel | None = None) -> None:
    """Raise ConfigError if a pattern of --freeze matches nothing, or a step has nothing to train.

    Without ``model``, the patterns are those of a model from scratch.
    """
    if not config.freeze:
        return
    if model is None:
        sizes = SimpleNamespace(vocab_size=config.vocab_size, pad=0)  # the names of parameters do not depend on them
        with torch.device("meta"):
            model = SpeechModel(model_config(config, cast(Tokenizer, sizes), Characters("ab")))
    frozen = frozen_names(module_of(model), config.freeze)
    without_decoder = [name for name, _ in model.named_parameters() if not name.startswith("decoder.")]
    if config.loss.ctc_warmup and frozen.issuperset(without_decoder):
        raise ConfigError(
            f"--freeze {' '.join(config.freeze)} leaves nothing to train during the CTC-only warm-up; set "
            "--loss.ctc-warmup 0"
        )


def load_teacher(config: TrainConfig, student: AnyModel) -> AnyModel | None:
    """Return the model of --teacher on its device, in evaluation mode and frozen; None without one or with weight 0.

    Raises ConfigError for a teacher that encodes texts otherwise than ``student``, or takes less audio or fewer tokens.
    """
    if config.teacher is None or not config.loss.teacher_weight:
        return None
    from canter.loading import load_module
    from canter.models.hub import checkpoint_of

    teacher = load_module(checkpoint_of(config.teacher), choose_device(config.device)).requires_grad_(False)
    ours, theirs = ((m.tokenizer and m.tokenizer.fingerprint, m.vocabulary) for m in (student, teacher))
    of = "the new model" if config.init is None else f"--init {config.init}"
    if ours != theirs:
        names = [f"{name or 'none'} of {size} outputs" for name, size in (theirs, ours)]
        raise ConfigError(
            f"--teacher {config.teacher} has another tokenizer ({names[0]}) than {of} ({names[1]}); use a teacher with "
            "the same tokenizer, such as the model that 'canter reshape' started from"
        )
    limits = [(m.sample_rate, m.longest_seconds, m.positions) for m in (teacher, student)]
    if limits[0][0] != limits[1][0] or limits[0][1] < limits[1][1] or limits[0][2] < limits[1][2]:
        inputs = ["{} Hz, {:g} s and {} tokens".format(*one) for one in limits]
        raise ConfigError(
            f"--teacher {config.teacher} takes at most {inputs[0]}, and {of} {inputs[1]}; use a teacher that takes the "
            "same audio"
        )
    return teacher


# -- how it will be decoded --


def set_decoding_limits(model: AnyModel, index: LengthIndex, budget: Budget, scratch: bool) -> None:
    """Write what the training data says of speech into the model's generation settings, for transcription.

    tokens_per_frame: a rate a little above that of the fastest utterance; a hypothesis that reaches it is a repetition
    loop. window_seconds: a little more than the longest utterance; on longer audio the model is not trained. A model
    that starts from a checkpoint keeps what it has if that is larger.
    """
    from canter.inference.engine.requests import EngineConfig

    seconds, tokens = np.asarray(index.seconds), np.asarray(index.tokens, np.int64) - EngineConfig().extra_tokens
    rate = max(MIN_RATE, RATE_MARGIN * float(np.max(tokens / budget.frames(seconds))))
    window = max(MIN_WINDOW, math.ceil(1.1 * float(np.max(seconds))))
    settings = cast(dict[str, float], model.generation)
    for name, value in (("tokens_per_frame", round(rate, 3)), ("window_seconds", window)):
        if settings.get(name) or scratch:
            settings[name] = max(settings.get(name) or 0.0, value)
