"""Read Hugging Face folders of Canary, Cohere Transcribe and Whisper, and write them for transformers to load."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
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
from canter.models.formats.nemo import EMBEDDING as NEMO_EMBEDDING
from canter.models.formats.nemo import HEAD_WEIGHT, POSITIONS
from canter.models.formats.nemo import NAMES as NEMO_NAMES
from canter.models.model import ModelConfig, SpeechModel
from canter.models.whisper import WhisperEncoderConfig
from canter.text import JsonTokenizer, SentencePieceTokenizer, Tokenizer, WhisperTokenizer, load_tokenizer
from canter.text.prompts import FORMATS
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
COHERE_MODULES = Renaming(
    ("projection.", "model.decoder.proj."),
    ("decoder.positions", "model.decoder.pos_emb.weight"),
    ("decoder.output", "proj_out.weight"),
    *CANARY_NAMES.pairs,
)
"""Names of the modules of transformers, which it writes where it is asked not to write the published ones."""
COHERE_NAMES = Renaming(("decoder.output", HEAD_WEIGHT), ("decoder.positions", POSITIONS), *NEMO_NAMES.pairs)
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
    defaults: Mapping[str, Settings] = field(default_factory=dict)
    """Section, or "preprocessor_config" -> settings for those that a file leaves out."""
    our_features: Settings = field(default_factory=dict)
    """Fields of the features' configuration."""
    projected: bool = False
    """Whether a projection follows the encoder, whatever its width."""
    head: str = HEAD
    embedding: str = EMBEDDING
    prefix: str = ""
    """Prefix of the names of all tensors but the head's, which may be missing."""


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
COHERE = Layout(
    architecture="CohereAsrForConditionalGeneration",
    extractor="CohereAsrFeatureExtractor",
    names=COHERE_NAMES,
    features=FeatureConfig,
    encoder=FastConformerConfig,
    sections={"encoder": "encoder_config", "decoder": ""},
    fields={
        "features": (*CANARY.fields["features"], ("dither", "dither")),
        "encoder": CANARY.fields["encoder"],
        "decoder": (
            ("num_hidden_layers", "layers"),
            ("hidden_size", "width"),
            ("num_attention_heads", "heads"),
            ("intermediate_size", "feedforward"),
            ("vocab_size", "vocabulary"),
            ("max_position_embeddings", "positions"),
            ("pad_token_id", "pad"),
            ("attention_dropout", "dropout_attention"),
            ("tie_word_embeddings", "tied"),
        ),
    },
    theirs={
        "": {"model_type": "cohere_asr", "hidden_act": "relu", "attention_bias": True},
        "encoder_config": CANARY.theirs["encoder_config"],
    },
    ours={"learned_positions": True},
    tokenizer="tokenizer.json",
    defaults={
        "": {
            "num_hidden_layers": 8,
            "hidden_size": 1024,
            "num_attention_heads": 8,
            "intermediate_size": 4096,
            "vocab_size": 16384,
            "max_position_embeddings": 1024,
            "pad_token_id": 2,
            "eos_token_id": 3,
            "bos_token_id": 4,
            "tie_word_embeddings": False,
        },
        "encoder_config": {
            "num_hidden_layers": 48,
            "hidden_size": 1280,
            "num_attention_heads": 8,
            "intermediate_size": 5120,
            "conv_kernel_size": 9,
            "subsampling_conv_channels": 256,
            "num_mel_bins": 128,
        },
        "preprocessor_config": {"dither": 1e-5, "max_audio_clip_s": 35.0},
    },
    our_features={"dither_by_length": True},
    projected=True,
    head=HEAD_WEIGHT,
    embedding=NEMO_EMBEDDING,
    prefix="model.",
)
LAYOUTS = {"canary": CANARY, "whisper": WHISPER, "cohere_asr": COHERE}


def read_hf(folder: str | Path) -> SpeechModel:
    """Return the Canary, Cohere Transcribe or Whisper in a folder that transformers wrote.

    Settings for decoding that neither ``generation_config.json`` nor ``config.json`` has are those of the tokenizer.
    Raises CheckpointError for settings that these modules lack, and tensors that do not fit.
    """
    folder = Path(folder)
    source = folder / "config.json"
    values = read_json(source)
    layout = LAYOUTS[values["model_type"]]
    values = {**layout.defaults.get("", {}), **values}
    for section in layout.defaults.keys() & layout.theirs.keys() - {""}:
        given = values.get(section) or {}
        if isinstance(given, dict):
            values[section] = {**layout.defaults[section], **given}
    sound, weights = _their_features(layout, folder), weights_file(folder)
    model = build(_our_config(layout, values, sound, source), source, stored_bytes(weights))
    stored = read_tensors(weights)
    if layout is COHERE and EMBEDDING in stored:
        layout = replace(layout, names=COHERE_MODULES, head=HEAD, embedding=EMBEDDING, prefix="")
    elif EMBEDDING not in stored and EMBEDDING.removeprefix("model.") in stored:  # saved without the head
        stored = {f"model.{name}": tensor for name, tensor in stored.items()}
    tensors = {
        name.removeprefix(layout.prefix): tensor
        for name, tensor in stored.items()
        if "preprocessor.featurizer." not in name  # tables, which the model computes
    }
    head = tensors.pop(layout.head, None) if model.config.decoder.tied else None
    if head is not None and layout.embedding in tensors and not torch.equal(head, tensors[layout.embedding]):
        raise CheckpointError(f"{weights}: {layout.head} differs from the embedding; the head must be tied")
    tensors = layout.names.ours(tensors, model)
    if layout.sines_first:
        tensors = _permuted(tensors, torch.argsort(_sines_first(model.config.decoder.width)))
    fit_tensors(model, tensors, folder)
    generation = folder / "generation_config.json"
    told = read_json(generation) if generation.exists() else {}
    if "max_audio_clip_s" in sound:
        told = {"window_seconds": sound["max_audio_clip_s"], "beam_search": "huggingface", **told}
    decoder = model.config.decoder
    known = range(decoder.vocabulary)
    ids = {name: values[name] for name in TOKEN_IDS if type(values.get(name)) is int and values[name] in known}
    told = check_generation(told, generation, decoder.vocabulary, (decoder.layers, decoder.heads))
    lists = {name: values[name] for name in LISTS if values.get(name) not in (None, UNSET)}
    lists = check_generation(lists, source, decoder.vocabulary)
    names = (layout.tokenizer, CANARY.tokenizer, WHISPER.tokenizer, *([VOCABULARY] if layout is WHISPER else []))
    if any((folder / name).exists() for name in names):
        model.tokenizer = load_tokenizer(folder)
    model.generation = with_defaults(model.tokenizer, ids, lists, told)
    return model


def _their_features(layout: Layout, folder: Path) -> Settings:
    """Return the settings of the feature extractor, from a file of its own or ``processor_config.json``."""
    source, found = folder / "preprocessor_config.json", None
    if source.exists():
        found = read_json(source)
    elif (processor := source.with_name("processor_config.json")).exists():
        source, found = processor, read_json(processor).get("feature_extractor")
    found = {**layout.defaults.get("preprocessor_config", {}), **(found if isinstance(found, dict) else {})}
    window = found.get("max_audio_clip_s", 35.0)
    if not isinstance(window, int | float) or isinstance(window, bool) or not 0.1 <= window <= 3600:
        raise CheckpointError(f"{source}: max_audio_clip_s is {window!r:.80}; it must be a number from 0.1 to 3,600")
    return found


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
    features = read_settings(
        layout.features, layout.fields["features"], heard, source, layout.our_features, complete=False
    )
    return ModelConfig(features, encoder, decoder, layout.projected)


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
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        if name.startswith("decoder."):
            added = "norm" in name or leaf in ("out", "down")
            read = kind in ("weight", "lora_A") and leaf in ("embedding", "up", "query")
            read = read or ("self_attention" in name and kind in ("weight", "lora_A") and leaf in ("key", "value"))
            axis = None if kind == "lora_A" and added else 0 if added else 1 if read else None
            if axis is not None and tensor.ndim > axis and tensor.shape[axis] == len(order):
                tensor = tensor.index_select(axis, order)
        permuted[name] = tensor
    return permuted


def _layout_of(config: ModelConfig) -> Layout | None:
    """Return the layout of the architecture that is most like ``config``; None if there is none."""
    alike = [one for one in LAYOUTS.values() if isinstance(config.encoder, one.encoder)]
    learned = config.decoder.learned_positions
    return next((one for one in alike if one.ours.get("learned_positions", False) == learned), (alike or [None])[0])


def module_names(model: SpeechModel) -> Renaming | None:
    """Return the names of the modules that transformers has for this architecture; None if it has none."""
    layout = _layout_of(model.config)
    return layout and (COHERE_MODULES if layout is COHERE else layout.names)


def in_their_order(model: SpeechModel, tensors: Mapping[str, Tensor], back: bool = False) -> dict[str, Tensor]:
    """Return tensors of ``model``, or of its adapter, with the decoder's residual stream in transformers' order.

    ``back``: they are in that order, and are returned in ours.
    """
    layout = _layout_of(model.config)
    if layout is None or not layout.sines_first:
        return dict(tensors)
    order = _sines_first(model.config.decoder.width)
    return _permuted(tensors, torch.argsort(order) if back else order)


def write_hf(
    model: SpeechModel,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``model`` as a folder that transformers' Canary, Cohere Transcribe or Whisper loads, with the tokenizer's
    files.

    A CTC head is left out, with a warning. Raises CheckpointError for a model that transformers has no architecture
    for, naming what is in the way.
    """
    folder = Path(folder)
    config, tokenizer = model.config, tokenizer or model.tokenizer
    check_vocabulary(model, tokenizer, folder)
    ids = {"eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad} if tokenizer is not None else {}
    if isinstance(tokenizer, JsonTokenizer | SentencePieceTokenizer):
        first = next(part for part in FORMATS[tokenizer.prompt_format] if part.startswith(("<|", "▁")))
        ids["decoder_start_token_id"] = tokenizer.special_id(first)
    generation = {**ids, **model.generation}
    layout = _layout_of(config)
    if layout is None or not isinstance(config.features, layout.features):
        raise CheckpointError(f"{folder}: transformers has no such architecture; keep it as a Canter folder")
    if isinstance(tokenizer, WhisperTokenizer) and tokenizer.added_text:
        warnings.warn(
            f"{folder}: the {len(tokenizer.added_text)} added pieces have ids after the timestamps, which generate of "
            "transformers takes for times and cuts the text there; an extension by a language only has none",
            stacklevel=3,
        )
    values, sound = _their_config(layout, config)
    if layout is COHERE:
        sound["max_audio_clip_s"] = generation.get("window_seconds", 35.0)
    _check_expressible(config, _our_config(layout, values, sound, folder), folder)
    values |= {name: generation[name] for name in TOKEN_IDS if name in generation}
    tensors = without_ctc(weights or model.state_dict(), folder)
    if layout.sines_first:
        tensors = _permuted(tensors, _sines_first(config.decoder.width).to(model.decoder.embedding.weight.device))
    with replacing_model(folder) as fresh:
        if tokenizer is not None:
            tokenizer.save(fresh)
        if isinstance(tokenizer, SentencePieceTokenizer) and layout is not WHISPER:
            JsonTokenizer.of(tokenizer).save(fresh)
        named = layout.names.theirs(tensors)
        named = {name if name.startswith("log_softmax.") else layout.prefix + name: x for name, x in named.items()}
        save_file(named, fresh / SAFETENSORS, metadata={"format": "pt"})
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
    elif layout is COHERE:
        sound["return_attention_mask"] = True
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
    if (config.projected or wide != narrow) != theirs.projected:
        missing = " without a projection" if theirs.projected else ""
        wrong.append(f"decoder of width {wide} on an encoder of width {narrow}{missing}")
    if wrong:
        raise CheckpointError(
            f"{folder}: transformers has no such architecture: {', '.join(wrong)}. Keep it as a Canter folder"
        )
