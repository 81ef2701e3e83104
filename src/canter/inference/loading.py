"""Load a model and make the engine that decodes it: the one way from a path to an `Engine`."""

from __future__ import annotations

import os
from pathlib import Path

from canter.errors import ConfigError
from canter.inference.engine.engine import Engine, engine_for
from canter.inference.engine.requests import EngineConfig
from canter.loading import Precision, load_module
from canter.models.hub import checkpoint_of


def load_engine(
    model: str | os.PathLike[str],
    config: EngineConfig | None = None,
    *,
    device: str = "auto",
    precision: Precision = "float32",
) -> Engine:
    """Load the model that ``model`` names (see `canter.load`), and return its engine.

    Raises CheckpointError for what is no model, ConfigError for a device or precision that is not here, options that
    the model does not support, and a model without a tokenizer, whose tokens cannot be read as text.
    """
    module = load_module(checkpoint_of(Path(model)), device, precision)
    if module.tokenizer is None:
        raise ConfigError(f"{os.fspath(model)} has no tokenizer, so its tokens cannot be read as text")
    return engine_for(module, module.tokenizer.end, config or EngineConfig())
