"""Load and save models of any format: Canter's own model where Canter reads the checkpoint, else transformers'."""

# pyright: strict

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from canter.errors import CheckpointError, ConfigError
from canter.extras import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from canter.integrations.transformers import TransformersModel
    from canter.models.model import SpeechModel
    from canter.models.protocol import AnyModel

Precision = Literal["float32", "bf16", "int8"]
Backend = Literal["auto", "canter", "transformers"]


def load_module(
    path: Path,
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
    backend: Backend = "auto",
) -> Any:
    """Return the model at ``path`` in evaluation mode: a `SpeechModel`, or, of a Hugging Face folder of another
    architecture than ours (or where ``backend`` says so), a `TransformersModel`.

    Raises CheckpointError for what is no model, or one that cannot take the audio that it pads to, MissingExtraError
    where transformers is needed and not installed, ConfigError for a device that is not here, and for int8 anywhere but
    in a model of Canter's own on a CPU.
    """
    import torch

    from canter.inference.engine.int8 import load_in
    from canter.models.formats.huggingface import foreign_type
    from canter.runtime import choose_device

    device = choose_device(str(device))
    if backend == "canter" or (backend == "auto" and foreign_type(path) is None):
        model = load_in(precision, path, str(device))
        _check_window(model, path)
        return model
    require("transformers", f"{path}: this model")
    if precision == "int8":
        raise ConfigError(f"{path} runs through transformers, which has no int8 here: use float32 or bf16")
    from canter.integrations.transformers import TransformersModel

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return TransformersModel.from_pretrained(path, dtype=dtype).to(device)


def save_module(model: AnyModel, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write a model folder in the model's own format, whole or not at all, and return it.

    ``weights`` stand in for the model's state dict: those of an earlier step, or an average. Raises CheckpointError
    where the folder holds something else.
    """
    if model.format == "canter":
        from canter.models.formats.checkpoint import save_model

        return save_model(cast("SpeechModel", model), folder, weights=weights)
    return cast("TransformersModel", model).save(folder, weights)


def read_weights(model: AnyModel | None, folder: Path) -> dict[str, Tensor]:
    """Return the tensors that `save_module` wrote, by their names in the state dict of ``model``.

    None stands for a model in Canter's format. Raises CheckpointError for files that are missing or damaged.
    """
    if model is None or model.format == "canter":
        from canter.models.formats.files import read_tensors

        return read_tensors(folder / "model.safetensors")
    return cast("TransformersModel", model).read_weights(folder)


def _check_window(model: Any, path: Path) -> None:
    """Raise CheckpointError where audio is padded to more frames than the encoder has positions."""
    most, seconds = getattr(model.config.encoder, "positions", None), model.padded_seconds
    if most is not None and seconds and (frames := model.encoder_frames(seconds)) > most:
        raise CheckpointError(
            f"{path}: audio is padded to {seconds:g} s, which are {frames} frames, but the encoder has positions for "
            f"{most}; is preprocessor_config.json another model's, or missing?"
        )
