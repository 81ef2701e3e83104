"""Recognise, load and save models of every format; `FORMATS` lists them, and a new format is one line there."""

# pyright: strict

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from canter.errors import CheckpointError, ConfigError
from canter.extras import require
from canter.models.formats.files import read_json, read_tensors
from canter.models.formats.fitting import check_vocabulary
from canter.models.hub import adapter_folder, checkpoint_of, holds_adapter, refuse_adapter
from canter.models.model import SpeechModel
from canter.models.protocol import AnyModel, check_support, module_of
from canter.models.w2v_bert import W2vBertConfig
from canter.runtime import choose_device

if TYPE_CHECKING:
    from canter.integrations.transformers import TransformersModel

Precision = Literal["float32", "bf16", "int8"]
SEAMLESS = "seamless_m4t_v2"
StoredPrecision = Literal["float32", "bf16", "float16"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}
"""Type of the weights as they are read; int8 weights are made of float32 ones."""


@dataclass(frozen=True)
class Format:
    """A format that models are kept in on disk."""

    name: str
    files: str
    """Its name for documentation and messages."""
    recognises: Callable[[Path], bool]
    """Return whether a file or folder is of this format, once those before it in `FORMATS` were asked."""
    read: Callable[[Path, torch.dtype], AnyModel]
    write: Callable[[AnyModel, Path, Mapping[str, Tensor] | None], Path]
    """Write a model, complete or not at all, with these tensors in place of its state dict."""
    native: bool = True
    """True if it is read as Canter's own model, which any other native format can hold too."""


def model_format(path: str | Path) -> Format:
    """Return the format of the model at ``path``; what no format recognises counts as a damaged Canter folder.

    Raises CheckpointError where nothing is there, and for an adapter without its model.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a model folder or a .nemo file")
    if path.is_dir():
        refuse_adapter(path)
    return next(kept for kept in FORMATS.values() if kept.recognises(path))


def load_module(
    path: str | Path,
    device: str | torch.device = "cpu",
    precision: Precision | StoredPrecision = "float32",
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> AnyModel:
    """Return the model at ``path`` in evaluation mode, its weights in ``precision``; features stay float32.

    adapter: folder of a LoRA adapter, or run that trained one, which is merged into the weights. Where ``path`` itself
    is an adapter that Canter trained, the model is the one that it names.

    adapters: adapters by name that stay apart from the weights, of which each row of a batch may have one.

    Raises CheckpointError for a path without a model, and for one that is truncated, does not fit its configuration, or
    cannot take the audio that it pads to; MissingExtraError if transformers is needed and not installed; ConfigError
    for a device that is not here, and for int8 anywhere but in a native model on a CPU.
    """
    path, device = Path(path), choose_device(str(device))
    if precision == "int8" and device.type != "cpu":
        raise ConfigError(f"--precision int8 runs only on a CPU, not on {device}: use bf16 there")
    model = _read(path, DTYPES[precision], None if adapter is None else adapter_folder(adapter))
    if FORMATS[model.format].native:
        _check_window(cast(SpeechModel, model), path)
    if adapters:
        from canter.models.formats.peft import attach_adapters

        if precision == "int8":
            raise ConfigError("--precision int8: its layers take no adapters; use float32, or one adapter, merged")
        attach_adapters(model, {name: adapter_folder(folder) for name, folder in adapters.items()}, path)
    if precision == "int8":
        from canter.inference.engine.int8 import quantize

        check_support(model, {"--precision int8": "int8"}, path)
        quantize(cast(SpeechModel, model))
    module_of(model).to(device).eval()
    return model


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    adapter: str | Path | None = None,
) -> SpeechModel:
    """Return the model at ``path`` as Canter's own module, in evaluation mode; see `load_module` for what is raised.

    Raises CheckpointError for an architecture that only transformers runs.
    """
    path = Path(path)
    base = base_folder(path)
    if not model_format(base).native:
        from canter.models.formats.huggingface import LAYOUTS

        raise CheckpointError(
            f"{base / 'config.json'}: model_type is {model_type(base)!r:.80}, not one of "
            f"{', '.join((*LAYOUTS, SEAMLESS))}: only transformers runs it, so it cannot be converted, reshaped or "
            "extended ('canter info' lists what it supports)"
        )
    model = cast(SpeechModel, _read(path, dtype, None if adapter is None else adapter_folder(adapter)))
    return model.to(choose_device(str(device))).eval()


def base_folder(path: Path) -> Path:
    """Return the file or folder of the model that the adapter at ``path`` changes; of a model, ``path`` itself.

    Raises CheckpointError where it is not there any more.
    """
    from canter.models.formats.peft import base_of

    while path.is_dir() and holds_adapter(path) and (base := base_of(path)) is not None:
        path = _model_of(path, base)
    return path


def _model_of(adapter: Path, base: str) -> Path:
    try:
        return checkpoint_of(base)
    except CheckpointError as error:
        raise CheckpointError(
            f"{adapter} is an adapter, and its model is not where it was: {error}; name the model, and this folder "
            "with --adapter, or canter.load(MODEL, adapter=...)"
        ) from None


def _read(path: Path, dtype: torch.dtype, adapter: Path | None = None) -> AnyModel:
    """Return the model at ``path`` with weights of ``dtype`` and the adapter merged, on the CPU."""
    from canter.models.formats.peft import base_of, merge_adapter

    if adapter is None and path.is_dir() and holds_adapter(path) and (base := base_of(path)) is not None:
        return _read(_model_of(path, base), dtype, path)
    if adapter is None:
        return model_format(path).read(path, dtype)
    model = _read(path, torch.float32)  # whose weights are rounded once, when the adapter is merged
    merge_adapter(model, adapter, path)
    _cast(model, dtype)
    return model


def _cast(model: AnyModel, dtype: torch.dtype) -> None:
    if model.format == "transformers":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return
    for part in module_of(model).children():
        if part is not cast(SpeechModel, model).features:
            part.to(dtype)


def save_module(
    model: AnyModel, path: str | Path, weights: Mapping[str, Tensor] | None = None, form: str | None = None
) -> Path:
    """Write a model in the format ``form`` (default: its own), complete or not at all, and return ``path``.

    ``weights`` stand in for the model's state dict: those of an earlier step, or an average. Raises CheckpointError
    where something else is at ``path``, and for a model that the format cannot hold.
    """
    if model.adapter is not None:
        from canter.models.formats.peft import save_adapter

        return save_adapter(model, Path(path), weights)
    own, kept = FORMATS[model.format], FORMATS[form or model.format]
    if own != kept and not (own.native and kept.native):
        raise CheckpointError(f"{path}: {model.shape} can only be kept as {own.files}, not as {kept.files}")
    return kept.write(model, Path(path), weights)


def read_weights(model: AnyModel | None, folder: Path) -> dict[str, Tensor]:
    """Return the tensors that `save_module` wrote, by their names in the state dict of ``model``.

    None stands for a model in Canter's format. Raises CheckpointError for files that are missing or damaged.
    """
    if model is not None and model.adapter is not None:
        from canter.models.formats.peft import read_adapter

        return read_adapter(folder, model)[1]
    if model is not None and model.format == "transformers":
        return cast("TransformersModel", model).read_weights(folder)
    return read_tensors(folder / "model.safetensors")


def model_type(folder: Path) -> str | None:
    """Return the ``model_type`` of a Hugging Face folder; None of anything else.

    Raises CheckpointError for a ``config.json`` that is damaged.
    """
    source = folder / "config.json"
    kind: object = read_json(source).get("model_type") if source.is_file() else None
    if kind is not None and not isinstance(kind, str):
        raise CheckpointError(f"{source}: model_type is {kind!r:.80}; it must be a string")
    return kind


def _is_huggingface(path: Path) -> bool:
    from canter.models.formats.huggingface import LAYOUTS

    return model_type(path) in (*LAYOUTS, SEAMLESS)


def _read_canter(path: Path, dtype: torch.dtype) -> AnyModel:
    from canter.models.formats.checkpoint import read_canter_folder

    return _fitting(read_canter_folder(path), path, dtype)


def _read_huggingface(path: Path, dtype: torch.dtype) -> AnyModel:
    from canter.models.formats.huggingface import read_hf
    from canter.models.formats.seamless import read_seamless

    return _fitting((read_seamless if model_type(path) == SEAMLESS else read_hf)(path), path, dtype)


def _read_nemo(path: Path, dtype: torch.dtype) -> AnyModel:
    from canter.models.formats.nemo import read_nemo_archive

    return _fitting(read_nemo_archive(path), path, dtype)


def _fitting(model: SpeechModel, path: Path, dtype: torch.dtype) -> AnyModel:
    """Return the model with weights of ``dtype``; raise CheckpointError for a tokenizer that does not fit."""
    check_vocabulary(model, model.tokenizer, path)
    _cast(model, dtype)
    return model


def _check_window(model: SpeechModel, path: Path) -> None:
    """Raise CheckpointError where audio is padded to more frames than the encoder has positions."""
    most, seconds = getattr(model.config.encoder, "positions", None), model.padded_seconds
    if most is not None and seconds and (frames := model.encoder_frames(seconds)) > most:
        raise CheckpointError(
            f"{path}: audio is padded to {seconds:g} s, which are {frames} frames, but the encoder has positions for "
            f"{most}; is preprocessor_config.json another model's, or missing?"
        )


def _read_transformers(path: Path, dtype: torch.dtype) -> AnyModel:
    require("transformers", f"{path}: this model")
    from canter.integrations.transformers import TransformersModel

    return TransformersModel.from_pretrained(path, dtype=dtype)


def _is_espnet(path: Path) -> bool:
    return path.is_dir() and (path / "meta.yaml").is_file()


def _read_espnet(path: Path, dtype: torch.dtype) -> AnyModel:
    from canter.models.formats.espnet import read_espnet

    return _fitting(read_espnet(path), path, dtype)


def _write_espnet(model: AnyModel, path: Path, weights: Mapping[str, Tensor] | None) -> Path:
    from canter.models.formats.espnet import write_espnet

    return write_espnet(cast(SpeechModel, model), path, weights=weights)


def _is_ctranslate2(path: Path) -> bool:
    return (path / "model.bin").is_file() and not model_type(path)


def _read_ctranslate2(path: Path, dtype: torch.dtype) -> AnyModel:
    from canter.models.formats.ctranslate2 import read_ctranslate2

    return _fitting(read_ctranslate2(path), path, dtype)


def _write_ctranslate2(model: AnyModel, path: Path, weights: Mapping[str, Tensor] | None) -> Path:
    raise CheckpointError(
        f"{path}: CTranslate2's format is only read; write a Hugging Face folder and convert that with "
        "ct2-transformers-converter"
    )


def _write_canter(model: AnyModel, path: Path, weights: Mapping[str, Tensor] | None) -> Path:
    from canter.models.formats.checkpoint import save_model

    return save_model(cast(SpeechModel, model), path, weights=weights)


def _write_huggingface(model: AnyModel, path: Path, weights: Mapping[str, Tensor] | None) -> Path:
    from canter.models.formats.huggingface import write_hf
    from canter.models.formats.seamless import write_seamless

    ours = cast(SpeechModel, model)
    return (write_seamless if isinstance(ours.config.encoder, W2vBertConfig) else write_hf)(ours, path, weights=weights)


def _write_nemo(model: AnyModel, path: Path, weights: Mapping[str, Tensor] | None) -> Path:
    from canter.models.formats.nemo import write_nemo

    return write_nemo(cast(SpeechModel, model), path, weights=weights)


def _write_transformers(model: AnyModel, path: Path, weights: Mapping[str, Tensor] | None) -> Path:
    return cast("TransformersModel", model).save(path, weights)


FORMATS = {
    one.name: one
    for one in (
        Format("nemo", "a `.nemo` archive", lambda path: not path.is_dir(), _read_nemo, _write_nemo),
        Format("espnet", "an ESPnet folder of OWSM", _is_espnet, _read_espnet, _write_espnet),
        Format("ctranslate2", "a CTranslate2 folder of Whisper", _is_ctranslate2, _read_ctranslate2,
               _write_ctranslate2),
        Format("huggingface", "a Hugging Face folder of `canary`, `cohere_asr`, `whisper` or `seamless_m4t_v2`",
               _is_huggingface,
               _read_huggingface, _write_huggingface),
        Format("transformers", "a Hugging Face folder of another architecture", lambda path: bool(model_type(path)),
               _read_transformers, _write_transformers, native=False),
        Format("canter", "a Canter folder", Path.is_dir, _read_canter, _write_canter),
    )
}  # fmt: skip
"""Formats by name, in the order in which they are asked whether they recognise a path."""
