"""Hugging Face folders of Canary and Whisper, read without transformers and written so that it loads them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from canter.errors import CheckpointError
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig, WhisperFeatureConfig
from canter.models.formats.files import Settings, read_json, read_tensors, replacing_model, stored_bytes, weights_file
from canter.models.formats.fitting import Renaming, build, check_vocabulary, fit_tensors, read_settings, without_ctc
from canter.models.formats.generation import LISTS, check_generation, with_defaults
from canter.models.model import ModelConfig, SpeechModel
from canter.models.whisper import WhisperEncoderConfig
from canter.text import Tokenizer, load_tokenizer
from canter.text.whisper import VOCABULARY

# Our names to theirs, as substrings, in this order.
CANARY_NAMES = Renaming(
    ("encoder.pre_encode.conv.", "model.encoder.subsampling.layers."),
    ("encoder.pre_encode.out.", "model.encoder.subsampling.linear."),
    ("encoder.layers.", "model.encoder.layers."),
    (".linear_q.", ".q_proj."),
    (".linear_k.", ".k_proj."),
    (".linear_v.", ".v_proj."),
    (".linear_out.", ".o_proj."),
    (".linear_pos.", ".relative_k_proj."),
    (".pos_bias_u", ".bias_u"),
    (".pos_bias_v", ".bias_v"),
    (".batch_norm.", ".norm."),
    ("decoder.embedding.", "model.decoder.embed_tokens."),
    ("decoder.embedding_norm.", "model.decoder.embedding_layernorm."),
    ("decoder.norm.", "model.decoder.norm."),
    ("decoder.head_bias", "proj_out.bias"),
    ("decoder.layers.", "model.decoder.layers."),
    (".self_attention.", ".self_attn."),
    (".cross_attention.", ".encoder_attn."),
    ("attn.query.", "attn.q_proj."),
    ("attn.key.", "attn.k_proj."),
    ("attn.value.", "attn.v_proj."),
    ("attn.out.", "attn.o_proj."),
    (".norm_self.", ".input_layernorm."),
    (".norm_cross.", ".post_attention_layernorm."),
    (".norm_feed_forward.", ".final_layernorm."),
    (".up.", ".mlp.fc1."),
    (".down.", ".mlp.fc2."),
)
WHISPER_NAMES = Renaming(
    ("encoder.conv", "model.encoder.conv"),
    ("encoder.positions", "model.encoder.embed_positions.weight"),
    ("encoder.norm.", "model.encoder.layer_norm."),
    ("encoder.layers.", "model.encoder.layers."),
    ("decoder.embedding.", "model.decoder.embed_tokens."),
    ("decoder.positions", "model.decoder.embed_positions.weight"),
    ("decoder.norm.", "model.decoder.layer_norm."),
    ("decoder.layers.", "model.decoder.layers."),
    (".attention.", ".self_attn."),
    (".self_attention.", ".self_attn."),
    (".cross_attention.", ".encoder_attn."),
    (".norm_attention.", ".self_attn_layer_norm."),
    (".norm_self.", ".self_attn_layer_norm."),
    (".norm_cross.", ".encoder_attn_layer_norm."),
    (".norm_feed_forward.", ".final_layer_norm."),
    ("attn.query.", "attn.q_proj."),
    ("attn.key.", "attn.k_proj."),
    ("attn.value.", "attn.v_proj."),
    ("attn.out.", "attn.out_proj."),
    (".up.", ".fc1."),
    (".down.", ".fc2."),
)
HEAD, EMBEDDING = "proj_out.weight", "model.decoder.embed_tokens.weight"
SAFETENSORS = "model.safetensors"
UNSET = [220, 50256]
"""begin_suppress_tokens that transformers writes into any Whisper's ``config.json``, right for English-only ones."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Layout:
    """An architecture's settings in transformers: names, sections, and constants."""

    architecture: str
    extractor: str
    names: Renaming
    features: type
    encoder: type
    sections: Mapping[str, str]
    """Part -> key of its settings inside ``config.json``; '' for the top level."""
    fields: Mapping[str, tuple[tuple[str, str], ...]]
    theirs: Mapping[str, Settings]
    """Section -> settings with the one value that our modules compute."""
    ours: Settings
    """Fields of DecoderConfig."""
    tokenizer: str
    """File of a tokenizer that we read."""
    sines_first: bool = False
    """Whether the decoder's sinusoids are all sines, then all cosines, where ours alternate."""


CANARY = Layout(
    architecture="CanaryForConditionalGeneration",
    extractor="ParakeetFeatureExtractor",
    names=CANARY_NAMES,
    features=FeatureConfig,
    encoder=FastConformerConfig,
    sections={"encoder": "encoder_config", "decoder": "decoder_config"},
    fields={
        "features": (
            ("sampling_rate", "sample_rate"),
            ("feature_size", "mels"),
            ("n_fft", "n_fft"),
            ("win_length", "window"),
            ("hop_length", "hop"),
            ("preemphasis", "preemphasis"),
        ),
        "encoder": (
            ("num_hidden_layers", "layers"),
            ("hidden_size", "width"),
            ("num_attention_heads", "heads"),
            ("intermediate_size", "feedforward"),
            ("conv_kernel_size", "kernel_size"),
            ("subsampling_conv_channels", "subsampling_channels"),
            ("num_mel_bins", "mels"),
            ("attention_bias", "bias"),
            ("convolution_bias", "bias"),
            ("scale_input", "xscaling"),
            ("activation_dropout", "dropout"),
            ("dropout", "dropout"),
            ("attention_dropout", "dropout_attention"),
            ("layerdrop", "layer_drop"),
        ),
        "decoder": (
            ("num_hidden_layers", "layers"),
            ("hidden_size", "width"),
            ("num_attention_heads", "heads"),
            ("num_key_value_heads", "heads"),
            ("intermediate_size", "feedforward"),
            ("vocab_size", "vocabulary"),
            ("max_position_embeddings", "positions"),
            ("pad_token_id", "pad"),
            ("attention_dropout", "dropout_attention"),
        ),
    },
    theirs={
        "": {"model_type": "canary", "tie_word_embeddings": True},
        "encoder_config": {
            "model_type": "parakeet_encoder",
            "hidden_act": "silu",
            "subsampling_factor": 8,
            "subsampling_conv_kernel_size": 3,
            "subsampling_conv_stride": 2,
        },
        "decoder_config": {"model_type": "canary_decoder", "hidden_act": "relu", "attention_bias": True},
    },
    ours={},
    tokenizer="canter_tokenizer.json",
    sines_first=True,
)
WHISPER = Layout(
    architecture="WhisperForConditionalGeneration",
    extractor="WhisperFeatureExtractor",
    names=WHISPER_NAMES,
    features=WhisperFeatureConfig,
    encoder=WhisperEncoderConfig,
    sections={"encoder": "", "decoder": ""},
    fields={
        "features": (
            ("sampling_rate", "sample_rate"),
            ("feature_size", "mels"),
            ("n_fft", "n_fft"),
            ("hop_length", "hop"),
            ("chunk_length", "pad_seconds"),
            ("dither", "dither"),
        ),
        "encoder": (
            ("encoder_layers", "layers"),
            ("d_model", "width"),
            ("encoder_attention_heads", "heads"),
            ("encoder_ffn_dim", "feedforward"),
            ("num_mel_bins", "mels"),
            ("max_source_positions", "positions"),
            ("dropout", "dropout"),
            ("attention_dropout", "dropout_attention"),
            ("activation_dropout", "dropout_activation"),
            ("encoder_layerdrop", "layer_drop"),
        ),
        "decoder": (
            ("decoder_layers", "layers"),
            ("d_model", "width"),
            ("decoder_attention_heads", "heads"),
            ("decoder_ffn_dim", "feedforward"),
            ("vocab_size", "vocabulary"),
            ("max_target_positions", "positions"),
            ("pad_token_id", "pad"),
            ("dropout", "dropout"),
            ("attention_dropout", "dropout_attention"),
            ("activation_dropout", "dropout_activation"),
            ("decoder_layerdrop", "layer_drop"),
        ),
    },
    theirs={
        "": {
            "model_type": "whisper",
            "activation_function": "gelu",
            "scale_embedding": False,
            "tie_word_embeddings": True,
        }
    },
    ours={
        "learned_positions": True,
        "embedding_norm": False,
        "activation": "gelu",
        "key_bias": False,
        "head_bias": False,
    },
    tokenizer="tokenizer.json",
)
LAYOUTS = {"canary": CANARY, "whisper": WHISPER}


def read_hf(folder: str | Path) -> SpeechModel:
    """Return the Canary or Whisper in a folder that transformers wrote.

    Settings for decoding that neither ``generation_config.json`` nor ``config.json`` has are those of the tokenizer.
    Raises CheckpointError for settings that these modules lack, and tensors that do not fit.
    """
    folder = Path(folder)
    source = folder / "config.json"
    values = read_json(source)
    layout = LAYOUTS[values["model_type"]]
    features_file = folder / "preprocessor_config.json"
    sound = read_json(features_file) if features_file.exists() else {}
    weights = weights_file(folder)
    model = build(_our_config(layout, values, sound, source), source, stored_bytes(weights))
    tensors = read_tensors(weights)
    if EMBEDDING not in tensors and EMBEDDING.removeprefix("model.") in tensors:  # saved without the head
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    head = tensors.pop(HEAD, None)
    if head is not None and EMBEDDING in tensors and not torch.equal(head, tensors[EMBEDDING]):
        raise CheckpointError(f"{weights}: {HEAD} differs from the embedding; the head must be tied")
    tensors = layout.names.ours(tensors, model)
    if layout.sines_first:
        tensors = _permuted(tensors, torch.argsort(_sines_first(model.config.decoder.width)))
    fit_tensors(model, tensors, folder)
    generation = folder / "generation_config.json"
    told = read_json(generation) if generation.exists() else {}
    decoder = model.config.decoder
    known = range(decoder.vocabulary)
    ids = {name: values[name] for name in TOKEN_IDS if type(values.get(name)) is int and values[name] in known}
    told = check_generation(told, generation, decoder.vocabulary, (decoder.layers, decoder.heads))
    lists = {name: values[name] for name in LISTS if values.get(name) not in (None, UNSET)}
    lists = check_generation(lists, source, decoder.vocabulary)
    if (folder / layout.tokenizer).exists() or (layout is WHISPER and (folder / VOCABULARY).exists()):
        model.tokenizer = load_tokenizer(folder)
    model.generation = with_defaults(model.tokenizer, ids, lists, told)
    return model


def _our_config(layout: Layout, values: Settings, sound: Settings, source: Path) -> ModelConfig:
    for section, required in layout.theirs.items():
        given = values.get(section) if section else values
        if not isinstance(given, Mapping):
            raise CheckpointError(f"{source}: {section} is missing or no JSON object")
        for name, value in required.items():
            if given.get(name, value) != value:
                place = f"{section}.{name}" if section else name
                raise CheckpointError(f"{source}: {place} is {given[name]!r:.80}; supported: {value!r}")

    given = {name: values[key] if key else values for name, key in layout.sections.items()}
    encoder = read_settings(layout.encoder, layout.fields["encoder"], given["encoder"], source)
    decoder = read_settings(DecoderConfig, layout.fields["decoder"], given["decoder"], source, layout.ours)
    heard = {"feature_size": encoder.mels, **sound}
    features = read_settings(layout.features, layout.fields["features"], heard, source, complete=False)
    return ModelConfig(features, encoder, decoder)


def _sines_first(width: int) -> Tensor:
    """Return the order of columns that puts all sines before all cosines, from alternating ones."""
    return torch.arange(width).view(-1, 2).T.flatten()


def _permuted(tensors: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Return the decoder's tensors with its residual stream in another order.

    Modules that write to the stream and those that read from it are permuted alike, so the function is the same with
    positions permuted so.
    """
    permuted = {}
    for name, tensor in tensors.items():
        leaf = name.rsplit(".", 2)[-2:]
        if name.startswith("decoder."):
            added = "norm" in name or leaf[0] in ("out", "down")
            read = leaf in (["embedding", "weight"], ["up", "weight"], ["query", "weight"])
            read = read or ("self_attention" in name and leaf in (["key", "weight"], ["value", "weight"]))
            axis = 0 if added else 1 if read else None
            if axis is not None and tensor.ndim > axis and tensor.shape[axis] == len(order):
                tensor = tensor.index_select(axis, order)
        permuted[name] = tensor
    return permuted


def write_hf(
    model: SpeechModel,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``model`` as a folder that transformers' Canary or Whisper loads, with the tokenizer's files.

    A CTC head is left out, with a warning. Raises CheckpointError for a model that transformers has no architecture
    for, naming what is in the way.
    """
    folder = Path(folder)
    config, tokenizer = model.config, tokenizer or model.tokenizer
    check_vocabulary(model, tokenizer, folder)
    ids = {"eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad} if tokenizer is not None else {}
    generation = {**ids, **model.generation}
    layout = next((x for x in LAYOUTS.values() if isinstance(config.encoder, x.encoder)), None)
    if layout is None or not isinstance(config.features, layout.features):
        raise CheckpointError(f"{folder}: transformers has no such architecture; keep it as a Canter folder")
    values, sound = _their_config(layout, config)
    _check_expressible(config, _our_config(layout, values, sound, folder), folder)
    values |= {name: generation[name] for name in TOKEN_IDS if name in generation}
    tensors = without_ctc(weights or model.state_dict(), folder)
    if layout.sines_first:
        tensors = _permuted(tensors, _sines_first(config.decoder.width).to(model.decoder.embedding.weight.device))
    with replacing_model(folder) as fresh:
        if tokenizer is not None:
            tokenizer.save(fresh)
        save_file(layout.names.theirs(tensors), fresh / SAFETENSORS, metadata={"format": "pt"})
        files = {"config": values, "preprocessor_config": sound, "generation_config": generation}
        for name, content in files.items():
            (fresh / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def _their_config(layout: Layout, config: ModelConfig) -> tuple[Settings, Settings]:
    """Return ``config.json`` and ``preprocessor_config.json``."""
    values: Settings = {"architectures": [layout.architecture]}
    for section, settings in layout.theirs.items():
        (values.setdefault(section, {}) if section else values).update(settings)
    for part, section in layout.sections.items():
        fields = getattr(config, part)
        settings = {theirs: getattr(fields, ours) for theirs, ours in layout.fields[part]}
        (values[section] if section else values).update(settings)
    sound = {theirs: getattr(config.features, ours) for theirs, ours in layout.fields["features"]}
    sound |= {"feature_extractor_type": layout.extractor, "padding_value": 0.0}
    if layout is WHISPER:
        seconds = sound["chunk_length"] = int(sound["chunk_length"]) or 30
        sound["n_samples"] = seconds * sound["sampling_rate"]
        sound["nb_max_frames"] = sound["n_samples"] // sound["hop_length"]
    else:
        decoder = config.decoder
        values |= {"vocab_size": decoder.vocabulary, "pad_token_id": decoder.pad}
        values["decoder_config"]["head_dim"] = decoder.width // decoder.heads
        sound["return_attention_mask"] = True
    return values, sound


FREE = ("dropout", "layer_drop", "dither", "pad_seconds")  # of training, or of how a model is fed


def _check_expressible(config: ModelConfig, theirs: ModelConfig, folder: Path) -> None:
    """Raise CheckpointError if ``theirs``, made from ``config`` by the layout, computes something else."""
    wrong = [
        f"{part}.{name} {value!r}"
        for part in ("features", "encoder", "decoder")
        for name, value in asdict(getattr(config, part)).items()
        if value != asdict(getattr(theirs, part))[name] and not name.startswith(FREE)
    ]
    wide, narrow = config.decoder.width, config.encoder.width
    if wide != narrow:
        wrong.append(f"decoder of width {wide} on an encoder of width {narrow}")
    if wrong:
        raise CheckpointError(
            f"{folder}: transformers has no such architecture: {', '.join(wrong)}. Keep it as a Canter folder"
        )
