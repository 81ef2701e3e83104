"""Loading of a model and its engine: from a path or name to an `Engine`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from canter.errors import ConfigError
from canter.inference.engine.engine import Engine, engine_for
from canter.inference.engine.requests import DraftSource, EngineConfig
from canter.loading import Precision, load_module
from canter.models.hub import checkpoint_of
from canter.models.protocol import AnyModel, check_support
from canter.text.tokenizer import Tokenizer


def load_engine(
    model: str | os.PathLike[str],
    config: EngineConfig | None = None,
    *,
    device: str = "auto",
    precision: Precision = "float32",
    adapter: str | os.PathLike[str] | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    draft: str | os.PathLike[str] = "auto",
) -> Engine:
    """Load the model that ``model`` names, with an adapter if one is named (see `canter.load`); return its engine.

    adapters: adapters by name, of which each request may have one (see `Request.adapter`). draft: a `DraftSource`, or a
    smaller model with the same tokenizer, whose transcripts are drafts.

    Raises CheckpointError for a path that holds no model, and ConfigError for a missing device, an unsupported
    precision or option, or a model without a tokenizer.
    """
    chosen = None if adapter is None else Path(adapter)
    module = load_module(checkpoint_of(Path(model)), device, precision, chosen, adapters)
    config = config or EngineConfig()
    if config.ctc_weight:
        check_support(module, {"--ctc-weight": "joint_decoding"}, os.fspath(model))
    tokenizer = tokenizer_of(module, os.fspath(model))
    return drafting_engine(module, tokenizer, config, draft, precision)


def drafting_engine(
    module: AnyModel,
    tokenizer: Tokenizer,
    config: EngineConfig,
    draft: str | os.PathLike[str],
    precision: Precision = "float32",
) -> Engine:
    """Return the engine of a model with drafts from a `DraftSource`, or from a model, which is loaded in ``precision``
    on the same device.

    Raises CheckpointError for a path that holds no model, and ConfigError for a model whose tokens or sample rate are
    others, or where drafts are impossible.
    """
    name = os.fspath(draft)
    if name in get_args(DraftSource):
        return engine_for(module, tokenizer.end, replace(config, draft=cast(DraftSource, name)))
    smaller = load_module(checkpoint_of(Path(name)), str(next(module.parameters()).device), precision)
    theirs = smaller.tokenizer
    if theirs is None or theirs.fingerprint != tokenizer.fingerprint or smaller.sample_rate != module.sample_rate:
        raise ConfigError(
            f"--draft {name}: a model that writes drafts must have the tokenizer and sample rate of the other model; "
            "use another one of its family"
        )
    check_support(smaller, {"--draft": "cached_decoding"}, name)
    drafter = engine_for(smaller, theirs.end, EngineConfig(rows=config.rows, frames=config.frames))
    return engine_for(module, tokenizer.end, config, drafter)


def tokenizer_of(model: AnyModel, name: str) -> Tokenizer:
    """Return the model's tokenizer. Raises ConfigError, with the model's ``name``, where it has none."""
    if model.tokenizer is None:
        raise ConfigError(f"{name} has no tokenizer, so its tokens cannot be read as text")
    return model.tokenizer
