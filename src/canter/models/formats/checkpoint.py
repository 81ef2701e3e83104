"""Models on disk: a folder of ``config.json``, ``model.safetensors`` and, if it has one, the tokenizer's
files."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor

from canter.errors import CheckpointError
from canter.models.formats.files import read_json, read_tensors, refuse_adapter, replacing_model, stored_bytes
from canter.models.formats.fitting import build, check_vocabulary, fit_tensors
from canter.models.formats.generation import check_generation
from canter.models.formats.huggingface import read_hf
from canter.models.formats.nemo import read_nemo
from canter.models.model import ENCODERS, FEATURES, ModelConfig, SpeechModel
from canter.runtime import choose_device
from canter.text import Characters, load_tokenizer
from canter.text.characters import FILE as CHARACTERS

FORMAT = "canter-model/1"
GENERATION = "generation_config.json"
MOST_NUMBER = 2**31
KINDS = {"features": FEATURES, "encoder": ENCODERS}


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The configuration as a JSON object; features and encoder say of which kind they are."""
    values = dataclasses.asdict(config)
    for part, kinds in KINDS.items():
        kind = next(name for name, cls in kinds.items() if cls is type(getattr(config, part)))
        values[part] = {"kind": kind, **values[part]}
    return values


def config_from_json(values: Any, source: str) -> ModelConfig:
    """The inverse of ``config_to_json``; fields left out take their defaults.

    Raises CheckpointError naming the ``source`` and the field for unknown fields and values of another type.
    """
    types = get_type_hints(ModelConfig)
    values = dict(values)
    for part, kinds in KINDS.items():
        if isinstance(values.get(part), dict):
            inner = dict(values[part])
            kind = inner.pop("kind", next(iter(kinds)))
            if not isinstance(kind, str) or kind not in kinds:
                raise CheckpointError(f"{source}: {part} of kind {kind!r:.80}; known: {', '.join(kinds)}")
            types[part], values[part] = kinds[kind], inner
    return _from_json(ModelConfig, types, values, source)


def _from_json(cls: type, types: dict[str, Any], values: Any, source: str) -> Any:
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: {values!r:.80} is not a JSON object")
    fields = {field.name for field in dataclasses.fields(cls)}
    known = {}
    for name, value in values.items():
        wanted = types.get(name)
        if name not in fields:
            raise CheckpointError(f"{source}: unknown field {name!r}; from a newer Canter, or misspelt?")
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            known[name] = _from_json(wanted, get_type_hints(wanted), value, f"{source}: {name}")
        elif type(value) is wanted or (wanted is float and type(value) is int and abs(value) < MOST_NUMBER):
            known[name] = value
        else:
            wanted = getattr(wanted, "__name__", wanted)
            raise CheckpointError(f"{source}: {name} is {value!r:.80}; it must be {wanted}")
    return cls(**known)


def save_model(
    model: SpeechModel,
    folder: str | Path,
    tokenizer: Any = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes ``model`` and ``tokenizer`` (by default the model's own) to ``folder``, which appears only when
    whole and replaces a model folder of that name. ``weights`` may stand in for the model's state dict: a copy of
    it from an earlier step, or an average. Returns the folder.

    Raises CheckpointError if the folder holds something else or the
    tokenizer has more ids than the model.
    """
    tokenizer = tokenizer or model.tokenizer
    check_vocabulary(model, tokenizer, folder)
    with replacing_model(folder) as fresh:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (weights or model.state_dict()).items()}
        save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(fresh)
        if model.ctc is not None and model.characters is not None:
            model.characters.save(fresh)
        if model.generation:
            text = json.dumps(model.generation, indent=2) + "\n"
            (fresh / GENERATION).write_text(text, encoding="utf-8")
        config = {"format": FORMAT, "tokenizer": tokenizer is not None, **config_to_json(model.config)}
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> SpeechModel:
    """Reads the model at ``path``, in evaluation mode, its weights as ``dtype`` on ``device``; the features
    stay float32. ``model.tokenizer`` is the folder's, or None if it has none.

    Raises CheckpointError for what is no model, is truncated, or whose tensors do not fit its configuration, and
    ConfigError for a device that is not here.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a model folder or a .nemo file")
    model = _read_folder(path) if path.is_dir() else read_nemo(path)
    check_vocabulary(model, model.tokenizer, path)
    for part in model.children():
        if part is not model.features:
            part.to(dtype)
    return model.to(choose_device(str(device))).eval()


def _read_folder(folder: Path) -> SpeechModel:
    config_file = folder / "config.json"
    refuse_adapter(folder)
    values = read_json(config_file)
    if "model_type" in values:
        return read_hf(folder)
    if values.pop("format", None) != FORMAT:
        raise CheckpointError(f"{config_file} is not a Canter model (its format is not {FORMAT})")
    has_tokenizer = values.pop("tokenizer", False)
    weights = folder / "model.safetensors"
    model = build(config_from_json(values, str(config_file)), config_file, stored_bytes(weights))
    fit_tensors(model, read_tensors(weights), weights)
    if has_tokenizer:
        model.tokenizer = load_tokenizer(folder)
    if model.ctc is not None and (folder / CHARACTERS).exists():
        model.characters = Characters.load(folder)
        if model.characters.size != model.config.ctc_vocabulary:
            raise CheckpointError(
                f"{folder / CHARACTERS} has {model.characters.size - 1} characters, but {config_file} has a CTC head "
                f"of {model.config.ctc_vocabulary} outputs; they do not belong together: copy both anew"
            )
    if (folder / GENERATION).exists():
        told, decoder = read_json(folder / GENERATION), model.config.decoder
        model.generation = check_generation(
            told, folder / GENERATION, decoder.vocabulary, (decoder.layers, decoder.heads)
        )
    return model
