"""NeMo's ``.nemo`` archives of Canary, read and written without NeMo.

An archive is a tar of ``model_config.yaml``, ``model_weights.ckpt`` (a ``torch.save`` of a state dict) and
the tokenizer's files. Nothing in it is unpickled but tensors, and nothing is extracted to disk: members are
read by name, links and names that lead out of the archive are refused.
"""

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from canter.errors import CheckpointError
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.fitting import Renaming, build, fit_tensors
from canter.models.formats.torchfile import load_tensors
from canter.models.model import ModelConfig, SpeechModel
from canter.text.archive import Archive, open_archive
from canter.text.nemo import nemo_tokenizer

WEIGHTS = "model_weights.ckpt"

# Our names to theirs, as substrings, in this order; the encoder's are the same.
NAMES = Renaming(
    ("projection.", "encoder_decoder_proj."),
    ("decoder.embedding.", "transf_decoder._embedding.token_embedding."),
    ("decoder.embedding_norm.", "transf_decoder._embedding.layer_norm."),
    ("decoder.norm.", "transf_decoder._decoder.final_layer_norm."),
    ("decoder.head_bias", "log_softmax.mlp.layer0.bias"),
    ("decoder.layers.", "transf_decoder._decoder.layers."),
    (".norm_self.", ".layer_norm_1."),
    (".norm_cross.", ".layer_norm_2."),
    (".norm_feed_forward.", ".layer_norm_3."),
    ("attention.query.", "attention.query_net."),
    ("attention.key.", "attention.key_net."),
    ("attention.value.", "attention.value_net."),
    ("attention.out.", "attention.out_projection."),
    (".self_attention.", ".first_sub_layer."),
    (".cross_attention.", ".second_sub_layer."),
    (".up.", ".third_sub_layer.dense_in."),
    (".down.", ".third_sub_layer.dense_out."),
)
MOST_NUMBER = 2**31
HEAD_WEIGHT, EMBEDDING = "log_softmax.mlp.layer0.weight", "transf_decoder._embedding.token_embedding.weight"
POSITIONS = "transf_decoder._embedding.position_embedding.pos_enc"
COMPUTED = ("preprocessor.featurizer.window", "preprocessor.featurizer.fb", POSITIONS)

# Settings that a Canary may only have so, for these modules to compute the same: section, name, values.
REQUIRED = (
    ("preprocessor", "normalize", ("per_feature",)),
    ("preprocessor", "window", ("hann",)),
    ("preprocessor", "log", (True,)),
    ("preprocessor", "frame_splicing", (1,)),
    ("encoder", "subsampling", ("dw_striding",)),
    ("encoder", "subsampling_factor", (8,)),
    ("encoder", "causal_downsampling", (False,)),
    ("encoder", "reduction", (None,)),
    ("encoder", "self_attention_model", ("rel_pos",)),
    ("encoder", "att_context_size", (None, [-1, -1])),
    ("encoder", "conv_context_size", (None,)),
    ("encoder", "conv_norm_type", ("batch_norm", "layer_norm")),
    ("encoder", "untie_biases", (True,)),
    ("transf_encoder", "num_layers", (0,)),
    ("transf_decoder.config_dict", "learn_positional_encodings", (False,)),
    ("transf_decoder.config_dict", "num_token_types", (0,)),
    ("transf_decoder.config_dict", "hidden_act", ("relu",)),
    ("transf_decoder.config_dict", "pre_ln", (True,)),
    ("transf_decoder", "pre_ln_final_layer_norm", (True,)),
)


class NemoArchive(Archive):
    """A ``.nemo`` archive with the weights of a model."""

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict; see `load_tensors`."""
        with self.open(WEIGHTS) as file:
            return load_tensors(file, f"{self.path}: {WEIGHTS}")


def opened(path: Path) -> AbstractContextManager[NemoArchive]:
    """Return a context manager that yields the archive at ``path``, checked; see `open_archive`."""
    return open_archive(path, NemoArchive)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    for part in name.split("."):
        config = config.get(part) or {}
        if not isinstance(config, Mapping):
            return {}
    return config


def model_config(config: Mapping[str, Any], source: str | Path) -> ModelConfig:
    """NeMo's configuration as ours. CheckpointError names a setting that is missing or that these modules
    lack."""
    for section, name, values in REQUIRED:
        value = _section(config, section).get(name, values[0])
        if value not in values:
            raise CheckpointError(
                f"{source}: {section}.{name} is {value!r}; supported: {' or '.join(map(repr, values))}"
            )
    sound, encoder = _section(config, "preprocessor"), _section(config, "encoder")
    decoder, head = _section(config, "transf_decoder.config_dict"), _section(config, "head")
    if encoder.get("dropout_emb"):
        warnings.warn(f"{source}: encoder.dropout_emb {encoder['dropout_emb']} is ignored", stacklevel=2)

    def number(part: Mapping[str, Any], name: str, default: float | None = None) -> float:
        value = part.get(name, default)
        if value is None:
            raise CheckpointError(f"{source}: the configuration of a Canary lacks {name!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MOST_NUMBER:
            raise CheckpointError(f"{source}: the configuration is not a Canary's ({name} is {value!r:.80})")
        return value

    def whole(part: Mapping[str, Any], name: str, default: int | None = None) -> int:
        value = number(part, name, default)
        if value != int(value):
            raise CheckpointError(f"{source}: the configuration is not a Canary's ({name} is {value!r})")
        return int(value)

    rate, width = whole(sound, "sample_rate"), whole(encoder, "d_model")
    window = round(number(sound, "window_size") * rate)
    return ModelConfig(
        features=FeatureConfig(
            sample_rate=rate,
            mels=whole(sound, "features"),
            n_fft=whole(sound, "n_fft", 0) if sound.get("n_fft") else 2 ** math.ceil(math.log2(max(1, window))),
            window=window,
            hop=round(number(sound, "window_stride") * rate),
            preemphasis=float(number(sound, "preemph", 0.97)),
            dither=float(number(sound, "dither", 1e-5)),
        ),
        encoder=FastConformerConfig(
            layers=whole(encoder, "n_layers"),
            width=width,
            heads=whole(encoder, "n_heads"),
            feedforward=width * whole(encoder, "ff_expansion_factor", 4),
            kernel_size=whole(encoder, "conv_kernel_size", 31),
            subsampling_channels=whole(encoder, "subsampling_conv_channels"),
            mels=whole(encoder, "feat_in"),
            bias=bool(encoder.get("use_bias", True)),
            xscaling=bool(encoder.get("xscaling", True)),
            norm=str(encoder.get("conv_norm_type", "batch_norm")).removesuffix("_norm"),
            dropout=float(number(encoder, "dropout", 0.1)),
            dropout_input=float(number(encoder, "dropout_pre_encoder", 0.1)),
            dropout_attention=float(number(encoder, "dropout_att", 0.0)),
        ),
        decoder=DecoderConfig(
            layers=whole(decoder, "num_layers"),
            width=whole(decoder, "hidden_size"),
            heads=whole(decoder, "num_attention_heads"),
            feedforward=whole(decoder, "inner_size"),
            vocabulary=whole(head, "num_classes"),
            positions=whole(decoder, "max_sequence_length"),
            dropout=float(number(decoder, "ffn_dropout", 0.0)),
            dropout_attention=float(number(decoder, "attn_score_dropout", 0.0)),
        ),
    )


def read_nemo(path: str | Path) -> SpeechModel:
    """The Canary in a ``.nemo`` archive (canary-1b, -flash, -v2 layouts).

    Raises CheckpointError for what is no archive, truncated, unsafe, or another kind of model.
    """
    path = Path(path)
    with opened(path) as archive:
        values = archive.config()
        stored = archive.members[WEIGHTS].size if WEIGHTS in archive.members else 0
        model = build(model_config(values, path), path, stored)
        tensors = archive.weights()
        head, embedding = tensors.get(HEAD_WEIGHT), tensors.get(EMBEDDING)
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise CheckpointError(f"{path}: {HEAD_WEIGHT} differs from the embedding; the head must be tied")
        tensors = {name: x for name, x in tensors.items() if name not in (*COMPUTED, HEAD_WEIGHT)}
        fit_tensors(model, NAMES.ours(tensors, model), path)
        if {"langs", "model_path"} & _section(values, "tokenizer").keys():
            model.tokenizer = nemo_tokenizer(values, archive.read)
        else:
            warnings.warn(f"{path}: no tokenizer inside; none is attached", stacklevel=3)
    return model
