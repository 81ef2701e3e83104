"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, with Hugging Face's names.

A model whose architecture transformers lacks has the names of Canter's modules. ``canter_adapter.json`` beside them
says which model the adapter changes, and what else a training run set.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from safetensors.torch import save_file
from torch import Tensor

from canter.errors import CheckpointError, ConfigError
from canter.files import replacing_folder
from canter.models.formats.files import Settings, read_json, read_tensors
from canter.models.formats.fitting import Renaming
from canter.models.formats.generation import check_generation
from canter.models.formats.huggingface import in_their_order, module_names
from canter.models.formats.seamless import NAMES as SEAMLESS_NAMES
from canter.models.hub import ADAPTER as CONFIG
from canter.models.hub import ADAPTER_WEIGHTS as WEIGHTS
from canter.models.hub import OUR_ADAPTER as OURS
from canter.models.hub import holds_adapter
from canter.models.lora import LoraAdapter, adapter_tensors, attach_bank, fingerprint_of, linear_layers, merge
from canter.models.model import SpeechModel
from canter.models.protocol import AnyModel, check_support, module_of
from canter.models.w2v_bert import W2vBertConfig

FORMAT = "canter-adapter/1"
PREFIX = "base_model.model."
MAX_RANK = 16_384
LIMITS = ("tokens_per_frame", "window_seconds")  # settings for decoding that training may raise
# Settings of peft and the values with which an adapter is two matrices a layer, added to a linear layer's weight.
# Settings that are not set, or that only say how training began, are none of these.
PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(
        (
            *("fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save"),
            *("rank_pattern", "alpha_pattern", "trainable_token_indices", "layer_replication", "target_parameters"),
            *("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
        ),
        (None, False, {}, []),
    ),
}


def base_of(folder: Path) -> str | None:
    """Return the path or hub name of the model that an adapter of Canter changes; None for one of another library."""
    if not (folder / OURS).is_file():
        return None
    base = _ours(folder).get("base")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / OURS}: base is {base!r:.80}; it must be a path or hub name")
    return base


def their_names(model: AnyModel) -> dict[str, str]:
    """Return the names that linear layers of ``model`` have in transformers' module, by their names in ours."""
    layers = linear_layers(module_of(model))
    if model.format == "transformers":
        return {name: name.removeprefix("model.") for name in layers}
    names = _renaming(cast(SpeechModel, model))
    return {name: names.name(f"{name}.weight").removesuffix(".weight") if names else name for name in layers}


def _renaming(model: SpeechModel) -> Renaming | None:
    return SEAMLESS_NAMES if isinstance(model.config.encoder, W2vBertConfig) else module_names(model)


# -- writing --


def save_adapter(model: AnyModel, folder: Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write the adapter of ``model``, complete or not at all, and return ``folder``.

    ``weights`` stand in for its matrices. Raises CheckpointError where something else is in ``folder``.
    """
    adapter = model.adapter
    assert adapter is not None
    if folder.exists() and any(folder.iterdir()) and not holds_adapter(folder):
        raise CheckpointError(f"{folder} exists and is not an adapter; choose another name")
    tensors = dict(weights or adapter_tensors(module_of(model)))
    theirs = their_names(model)
    convolutions: set[str] = set()
    if model.format != "transformers":
        ours = cast(SpeechModel, model)
        tensors = in_their_order(ours, tensors)
        if _renaming(ours):  # convolutions of kernel 1, where ours are linear
            convolutions = {name for name in adapter.modules if ".pointwise_conv" in name}
    stored = {}
    for name, tensor in tensors.items():
        module, _, matrix = name.rpartition(".")
        tensor = tensor[..., None] if module in convolutions else tensor
        stored[f"{PREFIX}{theirs[module]}.{matrix}.weight"] = tensor.detach().cpu().contiguous()
    config: Settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": [theirs[name] for name in adapter.modules],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    kept = {
        "format": FORMAT,
        "base": adapter.base,
        "fingerprint": adapter.fingerprint,
        "pad_seconds": model.padded_seconds if model.format != "transformers" else None,
        "generation": {name: model.generation[name] for name in LIMITS if name in model.generation},
    }
    with replacing_folder(folder) as fresh:
        save_file(stored, fresh / WEIGHTS, metadata={"format": "pt"})
        for name, content in ((CONFIG, config), (OURS, kept)):
            (fresh / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


# -- reading --


def read_adapter(folder: Path, model: AnyModel) -> tuple[LoraAdapter, dict[str, Tensor]]:
    """Return the adapter in ``folder`` and its matrices, named as in the state dict of ``model``.

    Raises CheckpointError for an adapter of another kind or model, and for files that are missing or damaged.
    """
    config, source = read_json(folder / CONFIG), folder / CONFIG
    for name, plain in PLAIN.items():
        if name in config and config[name] not in plain:
            value = json.dumps(config[name])
            raise CheckpointError(
                f"{source}: {name} is {value:.80}, which only peft supports; merge the adapter into its model there "
                "(merge_and_unload(), then save_pretrained(FOLDER)) and load that folder"
            )
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise CheckpointError(f"{source}: r is {rank!r:.80}; it must be from 1 to {MAX_RANK:,}")
    if type(alpha) not in (int, float) or not math.isfinite(cast(float, alpha)):
        raise CheckpointError(f"{source}: lora_alpha is {alpha!r:.80}; it must be a number")
    if type(dropout) not in (int, float) or not 0 <= cast(float, dropout) < 1:
        raise CheckpointError(f"{source}: lora_dropout is {dropout!r:.80}; it must be at least 0 and below 1")
    ours = {theirs: name for name, theirs in their_names(model).items()}
    layers = linear_layers(module_of(model))
    file = folder / WEIGHTS
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(file).items():
        module, matrix = _parts(name, file)
        if module not in ours:
            near = difflib.get_close_matches(module, ours, n=1, cutoff=0.5)
            hint = f", which has {near[0]}" if near else ""
            raise CheckpointError(
                f"{file} changes {module}, which is no linear layer of {model.shape}{hint}; is it the adapter of "
                "another model?"
            )
        layer = layers[ours[module]]
        shape = (rank, layer.in_features) if matrix == "lora_A" else (layer.out_features, rank)
        tensor = tensor[..., 0] if tensor.ndim == 3 and tensor.shape[2] == 1 else tensor
        if tensor.shape != shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{file}: {module}.{matrix} is {tuple(tensor.shape)}, {tensor.dtype}, instead of {shape}; is it the "
                "adapter of another model?"
            )
        tensors[f"{ours[module]}.{matrix}"] = tensor
    modules = {name.rpartition(".")[0] for name in tensors}
    for module in sorted(modules):
        for matrix in ("lora_A", "lora_B"):
            if f"{module}.{matrix}" not in tensors:
                raise CheckpointError(f"{file} has no {matrix} of {module}; copy the adapter again")
    if not modules:
        raise CheckpointError(f"{file} holds no adapter; copy it again")
    if model.format != "transformers":
        tensors = in_their_order(cast(SpeechModel, model), tensors, back=True)
    chosen = tuple(name for name in layers if name in modules)
    kept = _ours(folder) if (folder / OURS).is_file() else {}
    base, fingerprint = str(kept.get("base", "")), str(kept.get("fingerprint", ""))
    return LoraAdapter(rank, float(cast(float, alpha)), float(cast(float, dropout)), chosen, base, fingerprint), tensors


def _parts(name: str, file: Path) -> tuple[str, str]:
    """Return the module and the matrix of a tensor's name."""
    module, _, matrix = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    if not name.startswith(PREFIX) or not name.endswith(".weight") or matrix not in ("lora_A", "lora_B"):
        raise CheckpointError(
            f"{file} holds {name:.120}, which is not a LoRA matrix of a linear layer; merge the adapter into its model "
            "in peft (merge_and_unload(), then save_pretrained(FOLDER)) and load that folder"
        )
    return module, matrix


def _ours(folder: Path) -> Settings:
    values = read_json(folder / OURS)
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{folder / OURS}: format is {values.get('format')!r:.80}; supported: {FORMAT!r}")
    return values


def check_base(folder: Path, model: AnyModel, source: object) -> None:
    """Raise CheckpointError if Canter trained the adapter in ``folder`` on other weights than those of ``model``.

    source: where ``model`` is from.
    """
    stated = _ours(folder).get("fingerprint") if (folder / OURS).is_file() else None
    if stated and stated != (found := fingerprint_of(module_of(model))):
        raise CheckpointError(
            f"{folder} is an adapter of a model with the fingerprint {stated!s:.40}, and {source} has {found}: its "
            "weights were changed, or it is another model; restore it, or name the right one"
        )


def attach_adapters(model: AnyModel, folders: Mapping[str, Path], source: object) -> None:
    """Give ``model`` a bank of the adapters in ``folders``, by name, of which each row of a batch may have one.

    source: where ``model`` is from. Raises CheckpointError as `read_adapter` and `check_base`; ConfigError for a model
    that Canter's engine does not decode, in int8, or that was trained on audio padded to another length.
    """
    check_support(model, {"several adapters": "cached_decoding"}, source)
    ours = cast(SpeechModel, model)
    adapters: dict[str, tuple[LoraAdapter, dict[str, Tensor]]] = {}
    for name, folder in folders.items():
        check_base(folder, model, source)
        adapters[name] = read_adapter(folder, model)
        kept = _ours(folder) if (folder / OURS).is_file() else {}
        pad = kept.get("pad_seconds")
        if isinstance(pad, int | float) and pad != ours.padded_seconds:
            raise ConfigError(
                f"adapter {folder} was trained on audio padded to {pad:g} s, and {source} pads to "
                f"{ours.padded_seconds:g} s: the rows of a batch have one length, so serve that adapter alone, merged "
                "into the model"
            )
        limits = kept.get("generation")
        if isinstance(limits, dict):  # limits on tokens, of which the highest holds for all
            known = check_generation(
                {name: value for name, value in limits.items() if name in LIMITS}, folder / OURS, ours.vocabulary
            )
            ours.generation |= {n: max(value, ours.generation.get(n, value)) for n, value in known.items()}
    ours.set_bank(attach_bank(ours, adapters, folders))


def merge_adapter(model: AnyModel, folder: Path, source: object) -> None:
    """Add the adapter in ``folder`` to the float32 weights of ``model``, and take over what its training run set.

    source: where ``model`` is from. Raises CheckpointError as `read_adapter` and `check_base`.
    """
    check_base(folder, model, source)
    adapter, tensors = read_adapter(folder, model)
    merge(module_of(model), adapter, tensors)
    if model.format == "transformers" or not (folder / OURS).is_file():
        return
    ours, kept = cast(SpeechModel, model), _ours(folder)
    pad, limits = kept.get("pad_seconds"), kept.get("generation")
    if hasattr(ours.config.features, "pad_seconds") and isinstance(pad, int | float) and 0 <= pad <= 300:
        ours.set_features(pad_seconds=float(pad))
    if isinstance(limits, dict):
        decoder = ours.config.decoder
        known = {name: value for name, value in limits.items() if name in LIMITS}
        ours.generation |= check_generation(known, folder / OURS, decoder.vocabulary)
