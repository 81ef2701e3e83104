"""NeMo's ``.nemo`` archives of Canary, read and written without NeMo.

An archive is a tar of ``model_config.yaml``, ``model_weights.ckpt`` (a ``torch.save`` of a state dict) and
the tokenizer's files. Nothing in it is unpickled but tensors, and nothing is extracted to disk: members are
read by name, links and names that lead out of the archive are refused.
"""

import io
import math
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from torch import Tensor

from canter.errors import CheckpointError
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.fitting import Renaming, build, fit_tensors
from canter.models.model import ModelConfig, SpeechModel
from canter.text.nemo import nemo_tokenizer

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
MOST_MEMBERS = 1000
MOST_CONFIG_BYTES = 16 * 2**20
MOST_EXPANSION = 20  # unpacked over packed size of a compressed archive; weights hardly compress

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


class Archive:
    """The members of a ``.nemo`` file that is open for reading, by name without a leading ``./``."""

    def __init__(self, tar: tarfile.TarFile, path: Path):
        self.tar, self.path = tar, path
        self.members = self._checked()

    def _checked(self) -> dict[str, tarfile.TarInfo]:
        members: dict[str, tarfile.TarInfo] = {}
        size = 0
        most = max(2**26, MOST_EXPANSION * self.path.stat().st_size)
        for member in self.tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise CheckpointError(
                    f"{self.path}: member {member.name!r} leads out of the archive; refused"
                )
            if member.isdir():
                continue
            if not member.isreg():
                raise CheckpointError(f"{self.path}: member {member.name!r} is a link or a device; refused")
            size += member.size
            if size > most or len(members) >= MOST_MEMBERS:
                raise CheckpointError(
                    f"{self.path} unpacks to more than {most} bytes or {MOST_MEMBERS} files; refused"
                )
            members[str(name)] = member
        return members

    def open(self, name: str) -> io.BufferedReader:
        """A member for reading; CheckpointError if there is none of that name."""
        if name not in self.members:
            raise CheckpointError(
                f"{self.path} has no {name}; it holds {', '.join(sorted(self.members)) or 'nothing'}"
            )
        file = self.tar.extractfile(self.members[name])
        assert file is not None  # it is a regular file
        return file  # pyright: ignore[reportReturnType]

    def config(self) -> dict[str, Any]:
        """The archive's YAML as plain values."""
        text = self.open(CONFIG).read(MOST_CONFIG_BYTES)
        try:
            values = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: {CONFIG} is not YAML ({error})") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path}: {CONFIG} is not a mapping")
        return values

    def weights(self) -> dict[str, Tensor]:
        """The state dict; objects other than tensors and plain containers are never constructed."""
        try:
            tensors = torch.load(self.open(WEIGHTS), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{self.path}: {WEIGHTS} holds objects other than tensors, which could run code; refused"
            ) from None
        except (RuntimeError, EOFError, OSError, ValueError, tarfile.TarError) as error:
            raise CheckpointError(f"{self.path}: {WEIGHTS} is truncated or malformed ({error})") from None
        if not isinstance(tensors, dict) or not all(
            isinstance(tensor, Tensor) for tensor in tensors.values()
        ):
            raise CheckpointError(f"{self.path}: {WEIGHTS} is not a mapping from names to tensors")
        return tensors


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """The archive at ``path``, checked. CheckpointError if it is none, or what is in it could do harm."""
    try:
        with tarfile.open(path) as tar:
            yield Archive(tar, path)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        # on further lines: what each way to unpack said
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} is truncated or not a .nemo archive ({reason.rstrip(':')})") from None


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
    try:
        rate = int(sound["sample_rate"])
        width = int(encoder["d_model"])
        return ModelConfig(
            features=FeatureConfig(
                sample_rate=rate,
                mels=int(sound["features"]),
                n_fft=int(sound.get("n_fft") or 2 ** math.ceil(math.log2(sound["window_size"] * rate))),
                window=round(sound["window_size"] * rate),
                hop=round(sound["window_stride"] * rate),
                preemphasis=float(sound.get("preemph", 0.97)),
                dither=float(sound.get("dither", 1e-5)),
            ),
            encoder=FastConformerConfig(
                layers=int(encoder["n_layers"]),
                width=width,
                heads=int(encoder["n_heads"]),
                feedforward=width * int(encoder.get("ff_expansion_factor", 4)),
                kernel_size=int(encoder.get("conv_kernel_size", 31)),
                subsampling_channels=int(encoder["subsampling_conv_channels"]),
                mels=int(encoder["feat_in"]),
                bias=bool(encoder.get("use_bias", True)),
                xscaling=bool(encoder.get("xscaling", True)),
                norm=str(encoder.get("conv_norm_type", "batch_norm")).removesuffix("_norm"),
                dropout=float(encoder.get("dropout", 0.1)),
                dropout_input=float(encoder.get("dropout_pre_encoder", 0.1)),
                dropout_attention=float(encoder.get("dropout_att", 0.0)),
            ),
            decoder=DecoderConfig(
                layers=int(decoder["num_layers"]),
                width=int(decoder["hidden_size"]),
                heads=int(decoder["num_attention_heads"]),
                feedforward=int(decoder["inner_size"]),
                vocabulary=int(head["num_classes"]),
                positions=int(decoder["max_sequence_length"]),
                dropout=float(decoder.get("ffn_dropout", 0.0)),
                dropout_attention=float(decoder.get("attn_score_dropout", 0.0)),
            ),
        )
    except KeyError as error:
        raise CheckpointError(f"{source}: the configuration of a Canary lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: the configuration is not a Canary's ({error})") from None


def read_nemo(path: str | Path) -> SpeechModel:
    """The Canary in a ``.nemo`` archive (canary-1b, -flash, -v2 layouts).

    Raises CheckpointError for what is no archive, truncated, unsafe, or another kind of model.
    """
    path = Path(path)
    with opened(path) as archive:
        values = archive.config()
        model = build(model_config(values, path), path)
        tensors = archive.weights()
        head, embedding = tensors.get(HEAD_WEIGHT), tensors.get(EMBEDDING)
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise CheckpointError(f"{path}: {HEAD_WEIGHT} differs from the embedding; the head must be tied")
        tensors = {name: x for name, x in tensors.items() if name not in (*COMPUTED, HEAD_WEIGHT)}
        fit_tensors(model, NAMES.ours(tensors, model), path)
        if {"langs", "model_path"} & _section(values, "tokenizer").keys():
            model.tokenizer = nemo_tokenizer(values, lambda name: archive.open(name).read())
        else:
            warnings.warn(f"{path}: no tokenizer inside; none is attached", stacklevel=3)
    return model
