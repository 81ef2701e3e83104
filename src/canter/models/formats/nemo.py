"""NeMo's ``.nemo`` archives of Canary, read and written without NeMo.

An archive is a tar of ``model_config.yaml``, ``model_weights.ckpt`` (a ``torch.save`` of a state dict) and the
tokenizer's files. Only tensors are unpickled, and nothing is extracted to disk: members are read by name; links and
names that lead out of the archive are refused.
"""

import hashlib
import io
import math
import struct
import tarfile
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from canter.errors import CheckpointError
from canter.files import replacing
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.files import Settings
from canter.models.formats.fitting import MAX_NUMBER, Renaming, build, check_vocabulary, fit_tensors, without_ctc
from canter.models.formats.torchfile import load_tensors
from canter.models.model import ModelConfig, SpeechModel
from canter.text import SentencePieceTokenizer, Tokenizer
from canter.text.archive import CONFIG, Archive, open_archive
from canter.text.nemo import SPECIAL, nemo_tokenizer

WEIGHTS = "model_weights.ckpt"

HEAD_BIAS = "log_softmax.mlp.layer0.bias"
NEVER = -100.0  # logit of ids without a token: no probability, and yet no loss out of bounds with label smoothing

# Our names to theirs, as substrings, in this order; the encoder's are the same.
NAMES = Renaming(
    ("projection.", "encoder_decoder_proj."),
    ("decoder.embedding.", "transf_decoder._embedding.token_embedding."),
    ("decoder.embedding_norm.", "transf_decoder._embedding.layer_norm."),
    ("decoder.norm.", "transf_decoder._decoder.final_layer_norm."),
    ("decoder.head_bias", HEAD_BIAS),
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


class NemoArchive(Archive):
    """A ``.nemo`` archive with the weights of a model."""

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict; see `load_tensors`."""
        with self.open(WEIGHTS) as file:
            return load_tensors(file, f"{self.path}: {WEIGHTS}")


def opened(path: Path) -> AbstractContextManager[NemoArchive]:
    """Return a context manager that yields the archive at ``path``, checked; see `open_archive`."""
    return open_archive(path, NemoArchive)


def _section(config: Settings, name: str) -> Settings:
    for part in name.split("."):
        config = config.get(part) or {}
        if not isinstance(config, Mapping):
            return {}
    return config


def _our_config(config: Settings, source: str | Path) -> ModelConfig:
    """Return NeMo's configuration as ours.

    Raises CheckpointError that names a setting that is missing or that these modules lack.
    """
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

    def number(part: Settings, name: str, default: float | None = None) -> float:
        value = part.get(name, default)
        if value is None:
            raise CheckpointError(f"{source}: the configuration of a Canary lacks {name!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_NUMBER:
            raise CheckpointError(f"{source}: the configuration is not a Canary's ({name} is {value!r:.80})")
        return value

    def whole(part: Settings, name: str, default: int | None = None) -> int:
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


def read_nemo_archive(path: str | Path) -> SpeechModel:
    """Return the Canary in a ``.nemo`` archive (canary-1b, -flash, -v2 layouts).

    Raises CheckpointError for a file that is not an archive, truncated, unsafe, or another kind of model.
    """
    path = Path(path)
    with opened(path) as archive:
        values = archive.config()
        stored = archive.members[WEIGHTS].size if WEIGHTS in archive.members else 0
        model = build(_our_config(values, path), path, stored)
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


def write_nemo(
    model: SpeechModel,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``model`` and its tokenizer to an archive that NeMo restores; a CTC head is left out, with a warning.

    NeMo's vocabulary is that of the tokenizer, rounded up to a multiple of 8: further ids are written that are never
    decoded. NeMo has all special tokens before all pieces: those of an extension move there, with their rows. Raises
    CheckpointError for a model that NeMo's Canary cannot be: another encoder, a decoder with Whisper's options, more
    ids than the tokenizer has, a vocabulary beside the special tokens that several languages share.
    """
    path = Path(path)
    tokenizer = tokenizer or model.tokenizer
    check_vocabulary(model, tokenizer, path)
    _check_expressible(model.config, path)
    order: list[int] | None = None
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.added:
        tokenizer, order = _special_first(tokenizer, path)
    section, members = _their_tokenizer(tokenizer, path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    size = 8 * math.ceil(tokenizer.vocab_size / 8)
    if size < model.vocabulary:
        raise CheckpointError(
            f"{path}: the model has {model.vocabulary} ids, and NeMo's Canary {size} with a tokenizer of "
            f"{tokenizer.vocab_size}; keep it as a Canter folder"
        )
    stored = io.BytesIO()
    tensors = dict(weights or model.state_dict())
    if order is not None:
        for name in ("decoder.embedding.weight", "decoder.head_bias"):
            rest = torch.arange(len(order), model.vocabulary)
            tensors[name] = tensors[name][torch.cat([torch.tensor(order), rest]).to(tensors[name].device)]
    torch.save(_their_tensors(model, tensors, size, path), stored)
    decoder = replace(model.config.decoder, vocabulary=size)
    values = _their_config(replace(model.config, decoder=decoder), tokenizer, section)
    config = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    members |= {CONFIG: config.encode(), WEIGHTS: stored.getvalue()}
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


def _special_first(tokenizer: SentencePieceTokenizer, path: Path) -> tuple[SentencePieceTokenizer, list[int]]:
    """Return a tokenizer with all special tokens before all pieces, and the old id of each of its ids."""
    if not tokenizer.special:
        raise CheckpointError(
            f"{path}: NeMo has one SentencePiece model for this kind of Canary, to which nothing can be added "
            f"({', '.join(tokenizer.added)}); keep it as a Canter folder"
        )
    tokens = [one for one in tokenizer.added if one not in tokenizer.models]
    special = (*tokenizer.special, *tokens)
    first = SentencePieceTokenizer(special, tokenizer.models, tokenizer.prompt_format, tokenizer.defaults)
    order = [tokenizer.special_id(token) for token in special]
    for lang, model in tokenizer.models.items():
        size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
        order += range(tokenizer.offsets[lang], tokenizer.offsets[lang] + size)
    return first, order


def _their_tokenizer(tokenizer: Tokenizer | None, path: Path) -> tuple[Settings, dict[str, bytes]]:
    """Return the section of the configuration, and the files of the archive that it names.

    NeMo restores no SentencePiece model without its list of words, and saves the list of pieces again.
    """
    if tokenizer is None:
        raise CheckpointError(f"{path}: the model has no tokenizer, without which NeMo restores nothing")
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise CheckpointError(f"{path}: NeMo's Canary has SentencePiece tokenizers, not {type(tokenizer).__name__}")
    models = dict(tokenizer.models)
    kind = "nemo.collections.common.tokenizers.canary_tokenizer"
    if not tokenizer.special:  # canary-1b-v2's
        files = _named_files(models[""])
        custom = {"_target_": f"{kind}.CanaryBPETokenizer"}
        section = {"dir": None, "type": "bpe", **_settings(files), "custom_tokenizer": custom}
        return section, dict(files.values())
    if "" in models:
        sharing = [lang for lang in tokenizer.languages if lang not in models]
        if len(sharing) != 1:
            raise CheckpointError(
                f"{path}: NeMo's aggregate tokenizer has a vocabulary a language; this one is shared by "
                f"{', '.join(sharing)}"
            )
        models = {sharing[0] if lang == "" else lang: model for lang, model in models.items()}
    models = {SPECIAL: special_tokens_model(tokenizer.special), **models}
    named = {lang: _named_files(model) for lang, model in models.items()}
    langs = {lang: {"dir": lang, "type": "bpe", **_settings(files)} for lang, files in named.items()}
    custom = {"_target_": f"{kind}.CanaryTokenizer", "tokenizers": None}
    section = {"dir": None, "type": "agg", "langs": langs, "custom_tokenizer": custom}
    return section, dict(file for files in named.values() for file in files.values())


def _settings(files: Mapping[str, tuple[str, bytes]]) -> Settings:
    return {setting: f"nemo:{name}" for setting, (name, _) in files.items()}


def _named_files(model: bytes) -> dict[str, tuple[str, bytes]]:
    """Return the files of a SentencePiece model, by setting: the model, its pieces of text in WordPiece's notation, and
    all pieces with their scores. A hash of the content tells those of two languages apart."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    listed, words = "", ""
    for number in range(pieces.vocab_size()):
        piece = pieces.id_to_piece(number)
        listed += f"{piece}\t{pieces.get_score(number):g}\n"
        if not (piece.startswith("<") and piece.endswith(">")):
            words += (piece if piece == "▁" else piece[1:] if piece.startswith("▁") else f"##{piece}") + "\n"
    files = {
        "model_path": ("tokenizer.model", model),
        "vocab_path": ("vocab.txt", words.encode()),
        "spe_tokenizer_vocab": ("tokenizer.vocab", listed.encode()),
    }
    return {
        setting: (f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}_{name}", content)
        for setting, (name, content) in files.items()
    }


def special_tokens_model(tokens: tuple[str, ...]) -> bytes:
    """Return a serialised SentencePiece model (``sentencepiece_model.proto``); the first token is for unknowns."""

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


def _their_tensors(model: SpeechModel, weights: Mapping[str, Tensor], size: int, path: Path) -> dict[str, Tensor]:
    """Return NeMo's tensors, with a vocabulary of ``size`` ids."""
    theirs = NAMES.theirs(without_ctc(weights, path))
    theirs = {name: x.float() if x.is_floating_point() else x for name, x in theirs.items()}
    more = size - model.vocabulary
    theirs[EMBEDDING] = F.pad(theirs[EMBEDDING], (0, 0, 0, more))
    theirs[HEAD_BIAS] = F.pad(theirs[HEAD_BIAS], (0, more), value=NEVER)
    theirs[HEAD_WEIGHT] = theirs[EMBEDDING]
    theirs[POSITIONS] = model.decoder.positions.detach().cpu().float()
    theirs["preprocessor.featurizer.window"] = model.features.taper.cpu()
    theirs["preprocessor.featurizer.fb"] = model.features.filters.cpu()[None]
    return theirs


def _their_config(config: ModelConfig, tokenizer: SentencePieceTokenizer, section: Settings) -> Settings:
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
        "tokenizer": section,
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
