"""ESPnet's folders of OWSM, read and written without ESPnet.

A folder, as ``espnet_model_zoo`` publishes it, has a ``meta.yaml`` that names the weights (``torch.save`` of a state
dict), a ``config.yaml`` that lists settings and tokens, and the SentencePiece model. Nothing in the YAML is
instantiated and nothing is unpickled but tensors; names that lead out of the folder are refused.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from canter.errors import CheckpointError
from canter.files import replacing_folder, write_text
from canter.models.decoder import DecoderConfig
from canter.models.ebranchformer import EPSILON, EBranchformerConfig
from canter.models.features import EspnetFeatureConfig
from canter.models.formats.fitting import Renaming, build, fit_tensors, read_settings
from canter.models.formats.torchfile import load_tensors
from canter.models.model import ModelConfig, SpeechModel
from canter.text.owsm import MOST_MODEL_BYTES, OwsmTokenizer
from canter.untrusted import parse_yaml, read_limited

META = "meta.yaml"
MODEL_FILE, CONFIG_FILE = "s2t_model_file", "s2t_train_config"
POSITIONS = 1024
"""Maximum tokens; ESPnet computes as many positions as it needs."""
PAD_SECONDS = 30.0
"""Length to which ESPnet pads every utterance."""
SUBSAMPLING = {"conv2d": 4, "conv2d8": 8}

# Our names to theirs, as substrings, in this order.
NAMES = Renaming(
    ("features.mean", "normalize.mean"),
    ("features.deviation", "normalize.std"),
    ("encoder.norm.", "encoder.after_norm."),
    ("encoder.subsampling.conv.0.", "encoder.embed.conv.0."),
    ("encoder.subsampling.conv.1.", "encoder.embed.conv.2."),
    ("encoder.subsampling.conv.2.", "encoder.embed.conv.4."),
    ("encoder.layers.", "encoder.encoders."),
    (".attention.query.", ".attn.linear_q."),
    (".attention.key.", ".attn.linear_k."),
    (".attention.value.", ".attn.linear_v."),
    (".attention.out.", ".attn.linear_out."),
    (".norm_attention.", ".norm_mha."),
    (".cgmlp.norm.", ".norm_mlp."),
    (".cgmlp.up.", ".cgmlp.channel_proj1.0."),
    (".cgmlp.norm_gate.", ".cgmlp.csgu.norm."),
    (".cgmlp.conv.", ".cgmlp.csgu.conv."),
    (".cgmlp.down.", ".cgmlp.channel_proj2."),
    (".feed_forward1.norm.", ".norm_ff_macaron."),
    (".feed_forward1.up.", ".feed_forward_macaron.w_1."),
    (".feed_forward1.down.", ".feed_forward_macaron.w_2."),
    (".feed_forward2.norm.", ".norm_ff."),
    (".feed_forward2.up.", ".feed_forward.w_1."),
    (".feed_forward2.down.", ".feed_forward.w_2."),
    (".merge_conv.", ".depthwise_conv_fusion."),
    (".merge.", ".merge_proj."),
    (".norm_out.", ".norm_final."),
    ("decoder.embedding.", "decoder.embed.0."),
    ("decoder.norm.", "decoder.after_norm."),
    ("decoder.output", "decoder.output_layer.weight"),
    ("decoder.head_bias", "decoder.output_layer.bias"),
    ("decoder.layers.", "decoder.decoders."),
    (".self_attention.query.", ".self_attn.linear_q."),
    (".self_attention.key.", ".self_attn.linear_k."),
    (".self_attention.value.", ".self_attn.linear_v."),
    (".self_attention.out.", ".self_attn.linear_out."),
    (".cross_attention.query.", ".src_attn.linear_q."),
    (".cross_attention.key.", ".src_attn.linear_k."),
    (".cross_attention.value.", ".src_attn.linear_v."),
    (".cross_attention.out.", ".src_attn.linear_out."),
    (".norm_self.", ".norm1."),
    (".norm_cross.", ".norm2."),
    (".norm_feed_forward.", ".norm3."),
    (".up.", ".feed_forward.w_1."),
    (".down.", ".feed_forward.w_2."),
    ("ctc.", "ctc.ctc_lo."),
)
OUT = "encoder.subsampling.out."
THEIR_OUT = {"conv2d": "encoder.embed.out.0.", "conv2d8": "encoder.embed.out."}
COMPUTED = ("frontend.logmel.melmat",)
# Settings with the values that these modules compute; the first one is ESPnet's default where a file leaves it out.
REQUIRED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "": {
        "frontend": ("default",),
        "normalize": ("global_mvn",),
        "preencoder": (None,),
        "postencoder": (None,),
        "encoder": ("rnn", "e_branchformer"),
        "decoder": ("rnn", "transformer"),
        "model": ("espnet",),
        "token_type": ("bpe",),
        "input_size": (None,),
    },
    "frontend_conf": {
        "window": ("hann",),
        "center": (True,),
        "normalized": (False,),
        "onesided": (True,),
        "fmin": (None, 0),
        "fmax": (None, 8000),
        "htk": (False,),
        "apply_stft": (True,),
    },
    "encoder_conf": {
        "attention_layer_type": ("rel_selfattn", "selfattn"),
        "pos_enc_layer_type": ("rel_pos", "abs_pos"),
        "use_linear_after_conv": (False,),
        "gate_activation": ("identity",),
        "positionwise_layer_type": ("linear",),
        "use_ffn": (False, True),
        "macaron_ffn": (False, True),
        "ffn_activation_type": ("swish",),
        "padding_idx": (-1,),
    },
    "decoder_conf": {
        "input_layer": ("embed",),
        "use_output_layer": (True,),
        "normalize_before": (True,),
        "concat_after": (False,),
        "layer_drop_rate": (0.0,),
    },
}
ONLY = {"encoder": "e_branchformer", "decoder": "transformer", "attention_layer_type": "selfattn",
        "pos_enc_layer_type": "abs_pos", "use_ffn": True, "macaron_ffn": True}  # fmt: skip
"""Settings whose default these modules do not compute."""
FIELDS: Mapping[str, tuple[tuple[str, str, Any], ...]] = {
    "frontend_conf": (("fs", "sample_rate", 16000), ("n_fft", "n_fft", 512), ("win_length", "window", None),
                      ("hop_length", "hop", 128), ("n_mels", "mels", 80)),
    "encoder_conf": (("output_size", "width", 256), ("attention_heads", "heads", 4), ("num_blocks", "layers", 12),
                     ("linear_units", "feedforward", 2048), ("cgmlp_linear_units", "cgmlp_units", 2048),
                     ("cgmlp_conv_kernel", "kernel_size", 31), ("merge_conv_kernel", "merge_kernel_size", 3),
                     ("dropout_rate", "dropout", 0.1), ("positional_dropout_rate", "dropout_input", 0.1),
                     ("attention_dropout_rate", "dropout_attention", 0.0), ("layer_drop_rate", "layer_drop", 0.0)),
    "decoder_conf": (("attention_heads", "heads", 4), ("linear_units", "feedforward", 2048),
                     ("num_blocks", "layers", 6), ("dropout_rate", "dropout", 0.1),
                     ("self_attention_dropout_rate", "dropout_attention", 0.0)),
}  # fmt: skip
"""Section -> (their setting, our field, their default)."""


@dataclass(frozen=True)
class _Parts:
    """The files of a folder, all inside it."""

    weights: Path
    config: Path


def is_espnet_folder(folder: str | Path) -> bool:
    """Return whether a folder is laid out as ESPnet publishes speech-to-text models."""
    try:
        values = _yaml(Path(folder) / META)
    except (OSError, CheckpointError):
        return False
    files = values.get("files") if isinstance(values, dict) else None
    return isinstance(files, dict) and MODEL_FILE in files


def read_espnet(folder: str | Path) -> SpeechModel:
    """Read the OWSM in a folder that ESPnet published, with its tokenizer.

    Raises CheckpointError for other architectures, settings that these modules lack, files outside of the folder or
    missing, a pickle of anything but tensors, and tensors or tokens that do not fit.
    """
    folder = Path(folder)
    parts = _parts(folder)
    values = _read_config(parts.config)
    tokens = _tokens(values, folder, parts.config)
    config = _our_config(values, len(tokens), parts.config)
    tokenizer = _tokenizer(values, tokens, folder, parts.config)
    model = build(config, parts.config, parts.weights.stat().st_size)
    with open(parts.weights, "rb") as file:
        tensors = load_tensors(file, str(parts.weights))
    for name in COMPUTED:
        tensors.pop(name, None)
    if not config.ctc_vocabulary and any(name.startswith("ctc.") for name in tensors):
        raise CheckpointError(f"{parts.config}: model_conf.ctc_weight is 0, but {parts.weights.name} has a CTC head")
    input_layer = values["encoder_conf"].get("input_layer", "conv2d")
    for kind in ("weight", "bias"):
        if (given := tensors.pop(THEIR_OUT[input_layer] + kind, None)) is not None:
            tensors[OUT + kind] = given
    fit_tensors(model, NAMES.ours(tensors, model), parts.weights)
    model.tokenizer = tokenizer
    model.generation = tokenizer.generation()
    return model


def _parts(folder: Path) -> _Parts:
    values = _yaml(folder / META)
    found = []
    for section, name in (("files", MODEL_FILE), ("yaml_files", CONFIG_FILE)):
        given = values.get(section) if isinstance(values, dict) else None
        path = given.get(name) if isinstance(given, dict) else None
        found.append(_inside(folder, path, f"{folder / META}: {section}.{name}"))
    return _Parts(*found)


def _inside(folder: Path, path: Any, what: str) -> Path:
    """Return a file of the folder by its relative path. Raises CheckpointError for any other."""
    if not isinstance(path, str) or not path or os.path.isabs(path) or ".." in Path(path).parts or "\0" in path:
        raise CheckpointError(f"{what} is {path!r:.80}; it must be the path of a file in the folder")
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{what} is {path!r:.80}, which leads out of the folder; refused")
    if not (folder / path).is_file():
        raise CheckpointError(f"{folder / path} is missing, which {what} names; copy the whole folder")
    return folder / path


def _yaml(path: Path) -> Any:
    try:
        return parse_yaml(read_limited(path, 2**20), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the whole folder") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None


def _read_config(path: Path) -> dict[str, Any]:
    values = _yaml(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a mapping of settings")
    for section in ("frontend_conf", "encoder_conf", "decoder_conf", "model_conf", "normalize_conf"):
        if not isinstance(values.setdefault(section, {}), dict):
            raise CheckpointError(f"{path}: {section} is {values[section]!r:.80}; it must be a mapping")
    return values


def _tokens(values: Mapping[str, Any], folder: Path, source: Path) -> list[str]:
    """Return the list of tokens: of the configuration, or of the file that it names."""
    tokens = values.get("token_list")
    if isinstance(tokens, str):
        text = read_limited(_inside(folder, tokens, f"{source}: token_list"), MOST_MODEL_BYTES)
        try:
            tokens = text.decode().splitlines()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{folder / str(tokens)} is not UTF-8 ({error.reason})") from None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{source}: token_list is no list of texts; quote those that YAML takes for numbers")
    return tokens


def _tokenizer(values: Mapping[str, Any], tokens: list[str], folder: Path, source: Path) -> OwsmTokenizer:
    path = _inside(folder, values.get("bpemodel"), f"{source}: bpemodel")
    try:
        return OwsmTokenizer(tokens, read_limited(path, MOST_MODEL_BYTES))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _our_config(values: Mapping[str, Any], vocabulary: int, source: Path) -> ModelConfig:
    for section, settings in REQUIRED.items():
        found = values[section] if section else values
        for name, allowed in settings.items():
            value, place = found.get(name, allowed[0]), f"{section}.{name}" if section else name
            if value not in allowed or (name in ONLY and value != ONLY[name]):
                supported = ONLY.get(name, allowed[-1] if len(allowed) == 1 else " or ".join(map(repr, allowed)))
                raise CheckpointError(f"{source}: {place} is {value!r:.80}; supported: {supported!r}")

    def given(section: str) -> dict[str, object]:
        settings = {theirs: default for theirs, _, default in FIELDS[section]} | values[section]
        if settings.get("win_length", 0) is None:  # ESPnet's default
            settings["win_length"] = settings["n_fft"]
        return settings

    def fields(section: str) -> list[tuple[str, str]]:
        return [(theirs, ours) for theirs, ours, _ in FIELDS[section]]

    input_layer = values["encoder_conf"].get("input_layer", "conv2d")
    if not isinstance(input_layer, str) or input_layer not in SUBSAMPLING:
        raise CheckpointError(
            f"{source}: encoder_conf.input_layer is {input_layer!r:.80}; supported: {' or '.join(SUBSAMPLING)}"
        )
    features = read_settings(EspnetFeatureConfig, fields("frontend_conf"), given("frontend_conf"), source)
    shared: dict[str, object] = {"mels": features.mels, "subsampling": SUBSAMPLING[input_layer]}
    encoder = read_settings(EBranchformerConfig, fields("encoder_conf"), given("encoder_conf"), source, shared)
    shared = {
        "width": encoder.width,
        "vocabulary": vocabulary,
        "positions": POSITIONS,
        "embedding_norm": False,
        "tied": False,
        "scale_embedding": True,
        "epsilon": EPSILON,
    }
    decoder = read_settings(DecoderConfig, fields("decoder_conf"), given("decoder_conf"), source, shared)
    weight = values["model_conf"].get("ctc_weight", 0.5)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise CheckpointError(f"{source}: model_conf.ctc_weight is {weight!r:.80}; it must be a number from 0 to 1")
    return ModelConfig(features, encoder, decoder, ctc_vocabulary=vocabulary if weight else 0, ctc_upsampling=1)


def write_espnet(model: SpeechModel, folder: str | Path, *, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write ``model`` as a folder that ESPnet's ``Speech2Text`` and its trainer load, and return the folder.

    ``weights`` stand in for the model's state dict. ESPnet pads every utterance to 30 s; a model that does not is
    written with a warning.

    Raises CheckpointError for a model of another architecture or tokenizer than OWSM's.
    """
    folder, config, tokenizer = Path(folder), model.config, model.tokenizer
    if folder.exists() and not is_espnet_folder(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an ESPnet model; choose another name")
    ours = isinstance(config.encoder, EBranchformerConfig) and isinstance(config.features, EspnetFeatureConfig)
    if not ours or not isinstance(tokenizer, OwsmTokenizer) or model.ctc is None or config.decoder.tied:
        raise CheckpointError(f"{folder}: ESPnet's layout is for OWSM models, with their tokenizer and CTC head")
    if tokenizer.models:
        raise CheckpointError(
            f"{folder}: ESPnet has one SentencePiece model for all languages, and {', '.join(tokenizer.models)} has "
            "its own; keep the model as a Canter folder"
        )
    assert isinstance(config.encoder, EBranchformerConfig)
    assert isinstance(config.features, EspnetFeatureConfig)
    if config.features.pad_seconds != PAD_SECONDS:
        warnings.warn(
            f"{folder}: ESPnet pads every utterance to {PAD_SECONDS:g} s, but this model pads to "
            f"{config.features.pad_seconds:g} s (0: not at all); its results will differ there, and here once it is "
            "read again",
            stacklevel=2,
        )
    tensors_now = weights or model.state_dict()
    tensors = NAMES.theirs({name: x for name, x in tensors_now.items() if not name.startswith(OUT)})
    input_layer = next(name for name, factor in SUBSAMPLING.items() if factor == config.encoder.subsampling)
    for kind in ("weight", "bias"):
        tensors[THEIR_OUT[input_layer] + kind] = tensors_now[OUT + kind].detach().cpu().contiguous()
    tensors["frontend.logmel.melmat"] = model.features.filters.T.contiguous().cpu()
    tokens, stats = Path("data/token_list/bpe_unigram"), Path("exp/s2t_stats_raw_bpe/train/feats_stats.npz")
    trained = Path("exp/s2t_train")
    stored = trained / "valid.total_count.ave.pth"
    with replacing_folder(folder) as fresh:
        for part in (tokens, trained, stats.parent):
            (fresh / part).mkdir(parents=True)
        torch.save(tensors, fresh / stored)
        (fresh / tokens / "bpe.model").write_bytes(tokenizer.model)
        write_text(fresh / tokens / "tokens.txt", "".join(f"{token}\n" for token in tokenizer.tokens))
        mean, deviation = (tensors[f"normalize.{name}"].double().numpy() for name in ("mean", "std"))
        np.savez(fresh / stats, count=1.0, sum=mean, sum_square=deviation**2 + mean**2)
        values = _their_config(config, tokenizer, input_layer) | {
            "bpemodel": str(tokens / "bpe.model"),
            "normalize_conf": {"stats_file": str(stats)},
            "output_dir": str(trained),
        }
        write_text(fresh / trained / "config.yaml", yaml.safe_dump(values, allow_unicode=True, sort_keys=False))
        meta = {"files": {MODEL_FILE: str(stored)}, "yaml_files": {CONFIG_FILE: str(trained / "config.yaml")}}
        write_text(fresh / META, yaml.safe_dump(meta))
    return folder


def _their_config(config: ModelConfig, tokenizer: OwsmTokenizer, input_layer: str) -> dict[str, Any]:
    """Return ESPnet's training configuration of a model of this shape."""

    def _part(section: str, ours: Any) -> dict[str, Any]:
        fixed = {name: ONLY.get(name, allowed[0]) for name, allowed in REQUIRED[section].items()}
        kept = {name: value for name, value in fixed.items() if name in ("use_ffn", "macaron_ffn", *ONLY)}
        return kept | {theirs: getattr(ours, field) for theirs, field, _ in FIELDS[section]}

    decoder = {
        "positional_dropout_rate": config.decoder.dropout,
        "src_attention_dropout_rate": config.decoder.dropout_attention,
    }
    return {
        "config": None,
        "ngpu": 0,
        "seed": 0,
        "num_workers": 1,
        "token_list": list(tokenizer.tokens),
        "token_type": "bpe",
        "init": None,
        "input_size": None,
        "ctc_conf": {},
        "frontend": "default",
        "frontend_conf": _part("frontend_conf", config.features),
        "specaug": None,
        "specaug_conf": {},
        "normalize": "global_mvn",
        "preencoder": None,
        "preencoder_conf": {},
        "postencoder": None,
        "postencoder_conf": {},
        "encoder": "e_branchformer",
        "encoder_conf": _part("encoder_conf", config.encoder) | {"input_layer": input_layer},
        "decoder": "transformer",
        "decoder_conf": _part("decoder_conf", config.decoder) | decoder,
        "model": "espnet",
        "model_conf": {"ctc_weight": 0.3, "lsm_weight": 0.1, "length_normalized_loss": False, "sym_na": "<na>"},
        "preprocessor": "s2t",
        "preprocessor_conf": {
            "text_prev_name": "text_prev",
            "text_ctc_name": "text_ctc",
            "fs": config.features.sample_rate,
            "na_symbol": "<na>",
            "speech_length": int(PAD_SECONDS),
            "speech_resolution": 0.02,
            "speech_init_silence": 30,
            "text_prev_apply_prob": 0.5,
            "time_apply_prob": 0.5,
            "notime_symbol": "<notimestamps>",
            "first_time_symbol": "<0.00>",
            "last_time_symbol": "<30.00>",
        },
    }
