"""Canter's model folders: ``config.json``, ``model.safetensors`` and, if it has one, the tokenizer's files."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from canter.errors import CheckpointError
from canter.fields import from_mapping, to_mapping
from canter.models.formats.files import read_json, read_tensors, replacing_model, stored_bytes
from canter.models.formats.fitting import build, check_vocabulary, fit_tensors
from canter.models.formats.generation import check_generation
from canter.models.model import ENCODERS, FEATURES, ModelConfig, SpeechModel, part_kind
from canter.text import Characters, Tokenizer, load_tokenizer
from canter.text.characters import FILE as CHARACTERS

FORMAT = "canter-model/1"
GENERATION = "generation_config.json"


def config_to_json(config: ModelConfig) -> dict[str, object]:
    """Return the configuration as a JSON object, with the kinds of its features and encoder."""
    values = to_mapping(config)
    for part in ("features", "encoder"):
        values[part] = {"kind": part_kind(getattr(config, part)), **values[part]}
    return values


def config_from_json(values: Mapping[str, object], source: str) -> ModelConfig:
    """Return the inverse of ``config_to_json``; fields left out take their defaults.

    Raises CheckpointError naming the ``source`` and the field for unknown fields and values of another type.
    """
    values, types = dict(values), {}
    for part, kinds in (("features", FEATURES), ("encoder", ENCODERS)):
        inner = values.get(part, {})
        kind = inner.get("kind", next(iter(kinds))) if isinstance(inner, dict) else next(iter(kinds))
        if not isinstance(kind, str) or kind not in kinds:
            raise CheckpointError(f"{source}: {part} of kind {kind!r:.80}; known: {', '.join(kinds)}")
        types[part] = kinds[kind]
        if isinstance(inner, dict):
            values[part] = {name: value for name, value in inner.items() if name != "kind"}
    return from_mapping(ModelConfig, values, source, error=CheckpointError, known=types, exact=True)


def save_model(
    model: SpeechModel,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``model`` and ``tokenizer`` (default: the model's own) to ``folder``, complete or not at all; return it.

    A model folder of that name is replaced. ``weights`` stand in for the model's state dict: those of an earlier step,
    or an average. Raises CheckpointError if the folder holds something else or the tokenizer has more ids than the
    model.
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


def read_canter_folder(folder: Path) -> SpeechModel:
    """Return the model of a folder that `save_model` wrote, with its tokenizer, characters and generation settings.

    Raises CheckpointError for a folder of something else, and for a model that is truncated or does not fit together.
    """
    config_file = folder / "config.json"
    values = read_json(config_file)
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
