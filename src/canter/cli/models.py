"""A checkpoint as commands take it: Canter's own model where Canter reads it, else transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from canter.loading import load_module


def load_any(
    path: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: Literal["auto", "canter", "transformers"] = "auto",
) -> Any:
    """Load a model as `canter.loading.load_module` does, with the precision given as a dtype."""
    return load_module(path, device, "bf16" if dtype == torch.bfloat16 else "float32", backend)
