"""Loading of a model and its engine: from a path or name to an `Engine`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from canter.errors import ConfigError
from canter.inference.engine.engine import Engine, engine_for
from canter.inference.engine.requests import EngineConfig
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
) -> Engine:
    """Load the model that ``model`` names, with an adapter if one is named (see `canter.load`); return its engine.

    adapters: adapters by name, of which each request may have one (see `Request.adapter`).

    Raises CheckpointError for a path that holds no model, and ConfigError for a missing device, an unsupported
    precision or option, or a model without a tokenizer.
    """
    chosen = None if adapter is None else Path(adapter)
    module = load_module(checkpoint_of(Path(model)), device, precision, chosen, adapters)
    config = config or EngineConfig()
    if config.ctc_weight:
        check_support(module, {"--ctc-weight": "joint_decoding"}, os.fspath(model))
    return engine_for(module, tokenizer_of(module, os.fspath(model)).end, config)


def tokenizer_of(model: AnyModel, name: str) -> Tokenizer:
    """Return the model's tokenizer. Raises ConfigError, with the model's ``name``, where it has none."""
    if model.tokenizer is None:
        raise ConfigError(f"{name} has no tokenizer, so its tokens cannot be read as text")
    return model.tokenizer
