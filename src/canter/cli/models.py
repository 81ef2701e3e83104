"""A checkpoint as commands take it: Canter's own model where Canter reads it, else transformers'."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from canter.errors import CheckpointError
from canter.extras import install
from canter.models.checkpoint import load_model
from canter.models.hf import foreign_type


def load_any(
    path: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: Literal["auto", "canter", "transformers"] = "auto",
) -> Any:
    """A `SpeechModel`, or, of a Hugging Face folder of another architecture than ours (or where ``backend`` says so), a
    `TransformersModel`.

    Raises CheckpointError as ``load_model``, and where transformers is needed and not installed.
    """
    if backend == "canter" or (backend == "auto" and foreign_type(path) is None):
        return load_model(path, device=device, dtype=dtype)
    if not find_spec("transformers"):
        raise CheckpointError(
            f"{path}: this model runs through transformers, which is not installed; {install('transformers')}"
        )
    from canter.integrations.transformers import TransformersModel

    return TransformersModel.from_pretrained(path, dtype=dtype).to(device)
