"""Canary models as ``.nemo`` archives that NeMo restores: its configuration, its names, its tokenizer
files."""

import hashlib
import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import torch
import yaml

from canter.errors import CheckpointError
from canter.files import replacing
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.fitting import check_vocabulary, without_ctc
from canter.models.formats.nemo import EMBEDDING, HEAD_WEIGHT, NAMES, POSITIONS, WEIGHTS
from canter.models.model import ModelConfig, SpeechModel
from canter.text import SentencePieceTokenizer
from canter.text.archive import CONFIG
from canter.text.nemo import SPECIAL


def write_nemo(model: SpeechModel, path: str | Path, tokenizer: Any = None) -> Path:
    """Writes ``model`` and its tokenizer to an archive. A CTC head is left out, with a warning.

    Raises CheckpointError for what NeMo's Canary cannot be: another encoder, a decoder with Whisper's
    options, a tokenizer without a vocabulary for each language.
    """
    path = Path(path)
    tokenizer = tokenizer or model.tokenizer
    check_vocabulary(model, tokenizer, path)
    _check_expressible(model.config, path)
    files = _tokenizer_files(tokenizer, path)
    weights = io.BytesIO()
    torch.save(_their_tensors(model, path), weights)
    values = _their_config(model.config, tokenizer, files)
    config = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    members = dict(files.values())
    members |= {CONFIG: config.encode(), WEIGHTS: weights.getvalue()}
    with replacing(path) as fresh, tarfile.open(fresh, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))
    return path


def _check_expressible(config: ModelConfig, path: Path) -> None:
    encoder, decoder = config.encoder, config.decoder
    if not isinstance(encoder, FastConformerConfig) or not isinstance(config.features, FeatureConfig):
        raise CheckpointError(f"{path}: NeMo's Canary has a FastConformer encoder; keep it as a Canter folder")
    plain = DecoderConfig()
    for name in ("learned_positions", "embedding_norm", "activation", "key_bias", "head_bias"):
        if getattr(decoder, name) != getattr(plain, name):
            raise CheckpointError(f"{path}: NeMo's Canary has no decoder with {name} {getattr(decoder, name)!r}")
    if encoder.feedforward % encoder.width:
        raise CheckpointError(
            f"{path}: NeMo wants an encoder feed-forward that is a multiple of the width {encoder.width}, "
            f"not {encoder.feedforward}"
        )


def _tokenizer_files(tokenizer: Any, path: Path) -> dict[str, tuple[str, bytes]]:
    """Language -> name in the archive and SentencePiece model."""
    if tokenizer is None:
        raise CheckpointError(f"{path}: the model has no tokenizer, without which NeMo restores nothing")
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise CheckpointError(f"{path}: NeMo's Canary has SentencePiece tokenizers, not {type(tokenizer).__name__}")
    models = dict(tokenizer.models)
    if not tokenizer.special:
        raise CheckpointError(
            f"{path}: archives are written with an aggregate tokenizer; this one is a single SentencePiece model "
            "(canary-1b-v2's), so write a Canter or Hugging Face folder"
        )
    if "" in models:
        if len(tokenizer.languages) != 1:
            raise CheckpointError(
                f"{path}: NeMo's aggregate tokenizer has a vocabulary a language; this one is shared by "
                f"{', '.join(tokenizer.languages)}"
            )
        models = {tokenizer.languages[0]: models[""]}
    models = {SPECIAL: special_tokens_model(tokenizer.special), **models}
    return {
        lang: (f"{hashlib.md5(model, usedforsecurity=False).hexdigest()}_{lang}_tokenizer.model", model)
        for lang, model in models.items()
    }


def special_tokens_model(tokens: tuple[str, ...]) -> bytes:
    """A serialised SentencePiece model (``sentencepiece_model.proto``) of these pieces, the first for
    unknowns."""

    def field(number: int, content: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(content)) + content

    pieces = []
    for place, token in enumerate(tokens):
        kind = 2 if place == 0 else 4  # UNKNOWN, USER_DEFINED
        body = field(1, token.encode()) + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + _varint(kind)
        pieces.append(field(1, body))
    return b"".join(pieces)


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _their_tensors(model: SpeechModel, path: Path) -> dict[str, torch.Tensor]:
    theirs = NAMES.theirs(without_ctc(model, path))
    theirs = {name: x.float() if x.is_floating_point() else x for name, x in theirs.items()}
    theirs[HEAD_WEIGHT] = theirs[EMBEDDING]
    theirs[POSITIONS] = model.decoder.positions.detach().cpu().float()
    theirs["preprocessor.featurizer.window"] = model.features.taper.cpu()
    theirs["preprocessor.featurizer.fb"] = model.features.filters.cpu()[None]
    return theirs


def _their_config(config: ModelConfig, tokenizer: Any, files: dict[str, tuple[str, bytes]]) -> dict[str, Any]:
    features, encoder, decoder = config.features, config.encoder, config.decoder
    assert isinstance(features, FeatureConfig)
    assert isinstance(encoder, FastConformerConfig)
    asr = "nemo.collections.asr"
    rates = {
        "ffn_dropout": decoder.dropout,
        "attn_score_dropout": decoder.dropout_attention,
        "attn_layer_dropout": decoder.dropout,
    }
    return {
        "sample_rate": features.sample_rate,
        "label_smoothing": 0.0,
        "use_loss_mask_for_prompt": True,
        "log_prediction": True,
        "prompt_format": tokenizer.prompt_format,
        "prompt_defaults": [{"role": "user", "slots": dict(tokenizer.defaults)}],
        "model_defaults": {
            "asr_enc_hidden": encoder.width,
            "lm_enc_hidden": decoder.width,
            "lm_dec_hidden": decoder.width,
        },
        "train_ds": None,
        "validation_ds": None,
        "test_ds": None,
        "tokenizer": {
            "dir": None,
            "type": "agg",
            "langs": {
                lang: {"dir": lang, "type": "bpe", "model_path": f"nemo:{name}"} for lang, (name, _) in files.items()
            },
            "custom_tokenizer": {
                "_target_": "nemo.collections.common.tokenizers.canary_tokenizer.CanaryTokenizer",
                "tokenizers": None,
            },
        },
        "preprocessor": {
            "_target_": f"{asr}.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": features.sample_rate,
            "normalize": "per_feature",
            "window_size": features.window / features.sample_rate,
            "window_stride": features.hop / features.sample_rate,
            "window": "hann",
            "features": features.mels,
            "n_fft": features.n_fft,
            "log": True,
            "frame_splicing": 1,
            "preemph": features.preemphasis,
            "dither": features.dither,
            "pad_to": 0,
            "pad_value": 0.0,
        },
        "spec_augment": None,
        "encoder": {
            "_target_": f"{asr}.modules.ConformerEncoder",
            "feat_in": encoder.mels,
            "feat_out": -1,
            "n_layers": encoder.layers,
            "d_model": encoder.width,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": encoder.subsampling_channels,
            "causal_downsampling": False,
            "reduction": None,
            "reduction_position": None,
            "reduction_factor": 1,
            "ff_expansion_factor": encoder.feedforward // encoder.width,
            "self_attention_model": "rel_pos",
            "n_heads": encoder.heads,
            "att_context_size": [-1, -1],
            "xscaling": encoder.xscaling,
            "untie_biases": True,
            "pos_emb_max_len": 5000,
            "conv_kernel_size": encoder.kernel_size,
            "conv_norm_type": f"{encoder.norm}_norm",
            "conv_context_size": None,
            "use_bias": encoder.bias,
            "dropout": encoder.dropout,
            "dropout_pre_encoder": encoder.dropout_input,
            "dropout_emb": 0.0,
            "dropout_att": encoder.dropout_attention,
        },
        "transf_encoder": {
            "_target_": f"{asr}.modules.transformer.transformer_encoders.TransformerEncoder",
            "num_layers": 0,
            "hidden_size": decoder.width,
            "inner_size": decoder.feedforward,
            "num_attention_heads": decoder.heads,
            **rates,
            "mask_future": False,
            "pre_ln": True,
            "pre_ln_final_layer_norm": True,
        },
        "transf_decoder": {
            "_target_": f"{asr}.modules.transformer.get_nemo_transformer",
            "model_name": None,
            "pretrained": False,
            "encoder": None,
            "pre_ln_final_layer_norm": True,
            "config_dict": {
                "max_sequence_length": decoder.positions,
                "num_token_types": 0,
                "embedding_dropout": decoder.dropout,
                "learn_positional_encodings": False,
                "hidden_size": decoder.width,
                "inner_size": decoder.feedforward,
                "num_layers": decoder.layers,
                "num_attention_heads": decoder.heads,
                **rates,
                "hidden_act": "relu",
                "pre_ln": True,
                "vocab_size": "None",
            },
        },
        "head": {
            "_target_": f"{asr}.parts.submodules.token_classifier.TokenClassifier",
            "num_layers": 1,
            "activation": "relu",
            "log_softmax": True,
            "hidden_size": decoder.width,
            "num_classes": decoder.vocabulary,
            "dropout": 0.0,
            "use_transformer_init": True,
        },
        "decoding": {
            "strategy": "beam",
            "return_best_hypothesis": True,
            "beam": {"beam_size": 1, "len_pen": 0.0, "max_generation_delta": 50},
        },
        "loss": {
            "_target_": "nemo.collections.common.losses.smoothed_cross_entropy.SmoothedCrossEntropyLoss",
            "label_smoothing": 0.0,
            "pad_id": tokenizer.pad,
        },
        "optim": None,
        "target": f"{asr}.models.aed_multitask_models.EncDecMultiTaskModel",
    }
