"""Hugging Face folders of SeamlessM4T v2, read without transformers and written so that it loads them.

Only what writes text from speech is read: of a complete model (``SeamlessM4Tv2Model``) the text encoder, the
text-to-unit model and the vocoder stay on disk. ``SeamlessM4Tv2ForSpeechToText`` is written.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from canter.errors import CheckpointError
from canter.models.decoder import DecoderConfig
from canter.models.features import KaldiFeatureConfig
from canter.models.formats.files import Settings, read_json, read_tensors, replacing_model, stored_bytes
from canter.models.formats.fitting import Renaming, build, check_vocabulary, fit_tensors, read_settings, without_ctc
from canter.models.formats.generation import check_generation
from canter.models.model import ModelConfig, SpeechModel
from canter.models.w2v_bert import STACKED, W2vBertConfig
from canter.text.seamless import SENTENCEPIECE, SERIALISED, SeamlessTokenizer

WEIGHTS, GENERATION, SOUND = "model.safetensors", "generation_config.json", "preprocessor_config.json"
MOST_GENERATION_BYTES = 2**24
"""Size of ``generation_config.json``; the released one lists the text of every token."""
OURS: Settings = {"tokens_per_frame": 2.0, "beam_search": "huggingface"}
"""Settings of Canter's engine: maximum tokens per encoder frame, 12.5 a second as for other models, and beam search."""

# Our names to theirs, as substrings, in this order.
NAMES = Renaming(
    ("encoder.norm_input.", "speech_encoder.feature_projection.layer_norm."),
    ("encoder.input.", "speech_encoder.feature_projection.projection."),
    ("encoder.layers.", "speech_encoder.encoder.layers."),
    ("encoder.norm.", "speech_encoder.encoder.layer_norm."),
    ("encoder.up.", "speech_encoder.intermediate_ffn.intermediate_dense."),
    ("encoder.down.", "speech_encoder.intermediate_ffn.output_dense."),
    ("encoder.adapter.", "speech_encoder.adapter.layers.0."),
    ("encoder.norm_out.", "speech_encoder.inner_layer_norm."),
    ("decoder.embedding.", "shared."),
    ("decoder.norm.", "text_decoder.layer_norm."),
    ("decoder.layers.", "text_decoder.layers."),
    (".feed_forward1.norm.", ".ffn1_layer_norm."),
    (".feed_forward2.norm.", ".ffn2_layer_norm."),
    (".feed_forward1.", ".ffn1."),
    (".feed_forward2.", ".ffn2."),
    ("adapter.layers.0.up.", "adapter.layers.0.ffn.up."),
    ("adapter.layers.0.down.", "adapter.layers.0.ffn.down."),
    (".ffn1.up.", ".ffn1.intermediate_dense."),
    (".ffn1.down.", ".ffn1.output_dense."),
    (".ffn2.up.", ".ffn2.intermediate_dense."),
    (".ffn2.down.", ".ffn2.output_dense."),
    (".ffn.up.", ".ffn.intermediate_dense."),
    (".ffn.down.", ".ffn.output_dense."),
    (".up.", ".ffn.fc1."),
    (".down.", ".ffn.fc2."),
    (".norm_attention.", ".self_attn_layer_norm."),
    (".norm_conv.", ".conv_module.layer_norm."),
    (".norm_depthwise.", ".conv_module.depthwise_layer_norm."),
    (".pointwise_conv", ".conv_module.pointwise_conv"),
    (".depthwise_conv.", ".conv_module.depthwise_conv."),
    (".norm_out.", ".final_layer_norm."),
    (".norm_residual.", ".residual_layer_norm."),
    (".conv_residual.", ".residual_conv."),
    (".conv_attention.", ".self_attn_conv."),
    (".attention.distances.", ".self_attn.distance_embedding."),
    (".attention.query.", ".self_attn.linear_q."),
    (".attention.key.", ".self_attn.linear_k."),
    (".attention.value.", ".self_attn.linear_v."),
    (".attention.out.", ".self_attn.linear_out."),
    (".self_attention.", ".self_attn."),
    (".norm_self.", ".self_attn_layer_norm."),
    (".norm_cross.", ".cross_attention_layer_norm."),
    (".norm_feed_forward.", ".ffn_layer_norm."),
    (".query.", ".q_proj."),
    (".key.", ".k_proj."),
    (".value.", ".v_proj."),
    (".out.", ".out_proj."),
)
EMBEDDINGS = ("shared.weight", "lm_head.weight", "text_decoder.embed_tokens.weight")
"""Names of the one matrix of embedding and head; a file has some of them."""
UNUSED = ("text_encoder.", "t2u_model.", "vocoder.", "text_decoder.embed_positions.")
UNUSED_SETTINGS = ("id_to_text", "char_to_id", "t2u_lang_code_to_id", "vocoder_lang_code_to_id", "_from_model_config")
LANGUAGES = "text_decoder_lang_to_code_id"
REQUIRED: Settings = {
    "layer_norm_eps": 1e-5,
    "activation_function": "relu",
    "scale_embedding": True,
    "tie_word_embeddings": True,
    "add_adapter": True,
    "num_adapter_layers": 1,
    "speech_encoder_hidden_act": "swish",
    "position_embeddings_type": "relative_key",
}
"""Settings with the one value that these modules compute, which is transformers' default too."""
FEATURES = (("sampling_rate", "sample_rate"), ("feature_size", "mels"), ("num_mel_bins", "mels"))
ENCODER = (
    ("speech_encoder_layers", "layers"),
    ("hidden_size", "width"),
    ("speech_encoder_attention_heads", "heads"),
    ("speech_encoder_intermediate_size", "feedforward"),
    ("conv_depthwise_kernel_size", "kernel_size"),
    ("left_max_position_embeddings", "most_before"),
    ("right_max_position_embeddings", "most_after"),
    ("speech_encoder_chunk_size", "chunk_frames"),
    ("speech_encoder_left_chunk_num", "chunks_before"),
    ("adaptor_kernel_size", "adapter_stride"),
    ("adaptor_stride", "adapter_stride"),
    ("speech_encoder_dropout", "dropout"),
    ("adaptor_dropout", "dropout_adapter"),
    ("speech_encoder_layerdrop", "layer_drop"),
)
DECODER = (
    ("decoder_layers", "layers"),
    ("hidden_size", "width"),
    ("decoder_attention_heads", "heads"),
    ("decoder_ffn_dim", "feedforward"),
    ("vocab_size", "vocabulary"),
    ("max_position_embeddings", "positions"),
    ("pad_token_id", "pad"),
    ("dropout", "dropout"),
    ("attention_dropout", "dropout_attention"),
    ("activation_dropout", "dropout_activation"),
    ("decoder_layerdrop", "layer_drop"),
)
KIND_OF_DECODER = {"fairseq_positions": True, "embedding_norm": False, "head_bias": False, "scale_embedding": True}


def read_seamless(folder: str | Path) -> SpeechModel:
    """Return the SeamlessM4T v2 in a folder that transformers wrote (only safetensors), with its tokenizer if it has
    one.

    Raises CheckpointError for settings that these modules lack, and for tensors, a tokenizer or token ids that do not
    fit.
    """
    folder = Path(folder)
    source, weights = folder / "config.json", folder / WEIGHTS
    values = read_json(source)
    sound = read_json(folder / SOUND) if (folder / SOUND).exists() else {}
    model = build(_our_config(values, sound, source), source, stored_bytes(weights))
    tensors = read_tensors(weights, without=UNUSED)
    embeddings = [tensors.pop(name) for name in EMBEDDINGS if name in tensors]
    if embeddings:
        tensors[EMBEDDINGS[0]] = embeddings[0]
        if not all(torch.equal(embeddings[0], other) for other in embeddings[1:]):
            raise CheckpointError(f"{weights}: {' and '.join(EMBEDDINGS)} differ; embedding and head must be tied")
    fit_tensors(model, NAMES.ours(tensors, model), folder)
    model.generation = _generation(folder, values, model.config.decoder)
    if (folder / SERIALISED).exists() or (folder / SENTENCEPIECE).exists():
        model.tokenizer = SeamlessTokenizer.load(folder)
        _check_ids(model, folder)
    model.generation.pop(LANGUAGES, None)
    return model


def _our_config(values: Settings, sound: Settings, source: str | Path) -> ModelConfig:
    for name, value in REQUIRED.items():
        if values.get(name, value) != value:
            raise CheckpointError(f"{source}: {name} is {values[name]!r:.80}; supported: {value!r}")
    features = read_settings(KaldiFeatureConfig, FEATURES, sound, source, complete=False)
    stacked, stride = values.get("feature_projection_input_dim"), sound.get("stride", STACKED)
    if stacked != STACKED * features.mels or stride != STACKED:
        raise CheckpointError(
            f"{source}: feature_projection_input_dim is {stacked!r:.80}, but {SOUND} has {stride!r:.80} x "
            f"{features.mels} features; supported: 2 x num_mel_bins"
        )
    encoder = read_settings(W2vBertConfig, ENCODER, values, source, {"mels": features.mels})
    if encoder.width % 2:
        raise CheckpointError(f"{source}: hidden_size {encoder.width} is odd; sines and cosines need an even one")
    return ModelConfig(features, encoder, read_settings(DecoderConfig, DECODER, values, source, KIND_OF_DECODER))


def _generation(folder: Path, values: Settings, decoder: DecoderConfig) -> Settings:
    """Return the settings for decoding, without those of the parts that are not read."""
    source = folder / GENERATION
    found = read_json(source, MOST_GENERATION_BYTES) if source.exists() else {}
    found = {name: value for name, value in found.items() if name not in UNUSED_SETTINGS}
    ids = {name: values[name] for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id") if name in values}
    merged = {**OURS, **ids, **found}
    return check_generation(merged, source, decoder.vocabulary, (decoder.layers, decoder.heads))


def _check_ids(model: SpeechModel, folder: Path) -> None:
    """Raise CheckpointError where the tokenizer has other ids than the settings for decoding."""
    tokenizer, generation = model.tokenizer, model.generation
    wanted = {"pad_token_id": tokenizer.pad, "eos_token_id": tokenizer.end, "decoder_start_token_id": tokenizer.end}
    languages = generation.get(LANGUAGES) or {}
    for name, given, own in (
        *((name, generation.get(name, own), own) for name, own in wanted.items()),
        *((f"{LANGUAGES}.{name}", given, tokenizer.language_ids.get(name)) for name, given in languages.items()),
    ):
        if given not in (own, [own]):
            raise CheckpointError(
                f"{folder / GENERATION}: {name} is {given!r:.80}, but the tokenizer has {own}; copy both anew"
            )


def write_seamless(model: SpeechModel, folder: str | Path, *, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write ``model`` as a folder that transformers' ``SeamlessM4Tv2ForSpeechToText`` and ``AutoProcessor`` load.

    ``weights`` stand in for the model's state dict. A CTC head is left out, with a warning. Raises CheckpointError for
    another architecture or tokenizer than Seamless', naming what is in the way.
    """
    folder, config, tokenizer = Path(folder), model.config, model.tokenizer
    check_vocabulary(model, tokenizer, folder)
    if tokenizer is not None and not isinstance(tokenizer, SeamlessTokenizer):
        raise CheckpointError(f"{folder}: transformers' Seamless has no such tokenizer; keep it as a Canter folder")
    parts = ((config.encoder, ENCODER), (config.decoder, DECODER))
    values: Settings = {
        "architectures": ["SeamlessM4Tv2ForSpeechToText"],
        "model_type": "seamless_m4t_v2",
        **REQUIRED,
        **{theirs: getattr(part, ours) for part, fields in parts for theirs, ours in fields},
        "feature_projection_input_dim": STACKED * config.features.mels,
    }
    sound: Settings = {theirs: getattr(config.features, ours) for theirs, ours in FEATURES}
    sound |= {"feature_extractor_type": "SeamlessM4TFeatureExtractor", "processor_class": "SeamlessM4TProcessor"}
    sound |= {"stride": STACKED, "padding_value": 0.0, "padding_side": "right", "return_attention_mask": True}
    ours, theirs = asdict(config), asdict(_our_config(values, sound, folder))
    wrong = [
        f"{part}.{name} {value!r}"
        for part in ("features", "encoder", "decoder")
        for name, value in ours[part].items()
        if name != "dither" and theirs[part].get(name) != value
    ]
    if wrong:
        raise CheckpointError(
            f"{folder}: transformers has no such architecture: {', '.join(wrong)}. Keep it as a Canter folder"
        )
    generation = {name: value for name, value in model.generation.items() if name not in OURS}
    if tokenizer is not None:
        ids = {"pad_token_id": tokenizer.pad, "eos_token_id": tokenizer.end, "decoder_start_token_id": tokenizer.end}
        values |= ids
        generation = {**generation, **ids, LANGUAGES: tokenizer.language_ids}
    tensors = NAMES.theirs(without_ctc(weights or model.state_dict(), folder))
    with replacing_model(folder) as fresh:
        if tokenizer is not None:
            tokenizer.save(fresh)
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        for name, content in (("config.json", values), (SOUND, sound), (GENERATION, generation)):
            (fresh / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder
