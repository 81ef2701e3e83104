"""CTranslate2's folders of Whisper, which faster-whisper uses, read without CTranslate2.

A folder has ``model.bin`` (format version 6 of ``ctranslate2/specs/model_spec.py``: named tensors, and names that stand
for others), ``config.json`` with settings for decoding, and a tokenizer or ``vocabulary.json``. Quantised weights are
stored with a scale for each row (int8) or one for all (int16), and read as ``weight / scale``.
"""

import math
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from canter.errors import CheckpointError
from canter.models.decoder import DecoderConfig
from canter.models.formats.files import Settings, read_json
from canter.models.formats.fitting import Renaming, build, fit_tensors, read_settings
from canter.models.formats.generation import check_generation, with_defaults
from canter.models.formats.huggingface import WHISPER
from canter.models.model import ModelConfig, SpeechModel
from canter.text import WhisperTokenizer, load_tokenizer, whisper
from canter.untrusted import read_json_value, read_limited

if TYPE_CHECKING:
    from io import BufferedReader

FILE = "model.bin"
VERSION, SPECIFICATION = 6, "WhisperSpec"
DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
"""Types of tensors, by the number in the file."""
MOST_VARIABLES = 50_000
MOST_DIMENSIONS = 4
SCALE = "_scale"
COMPUTED = {"decoder/activation": 3, "decoder/pre_norm": 1}
"""Flags with the values that these modules compute (3: GELU); any other flag must be 0."""
FREE = ("alignment_layer", "alignment_heads", "alibi_use_positive_positions", "scale_alibi", "num_heads")
"""Numbers that are read, or have no effect on a Whisper."""
GENERATION = {
    "suppress_ids": "suppress_tokens",
    "suppress_ids_begin": "begin_suppress_tokens",
    "alignment_heads": "alignment_heads",
}
"""Settings of their ``config.json``, and their names in Hugging Face's ``generation_config.json``."""
EMBEDDING, HEAD = "decoder/embeddings/weight", "decoder/projection/weight"

# Our names to theirs, as substrings, in this order.
NAMES = Renaming(
    (".layers.", ".layer_"),
    (".positions", ".position_encodings.encodings"),
    (".attention.", ".self_attention."),
    (".norm_attention.", ".self_attention.norm."),
    (".norm_self.", ".self_attention.norm."),
    (".norm_cross.", ".cross_attention.norm."),
    (".norm_feed_forward.", ".ffn.norm."),
    (".norm.weight", ".layer_norm.gamma"),
    (".norm.bias", ".layer_norm.beta"),
    (".up.", ".ffn.linear_0."),
    (".down.", ".ffn.linear_1."),
    ("decoder.embedding.", "decoder.embeddings."),
    (".", "/"),
)
FUSED = {
    "/self_attention/linear_0": ("query", "key", "value"),
    "/self_attention/linear_1": ("out",),
    "/attention/linear_0": ("query",),
    "/attention/linear_1": ("key", "value"),
    "/attention/linear_2": ("out",),
}
"""Projections of an attention, and the parts whose rows they hold."""
SHAPES = {
    "encoder/conv1/weight": ("d_model", "num_mel_bins", ""),
    "encoder/position_encodings/encodings": ("max_source_positions", ""),
    "encoder/layer_0/ffn/linear_0/weight": ("encoder_ffn_dim", ""),
    "decoder/embeddings/weight": ("vocab_size", ""),
    "decoder/position_encodings/encodings": ("max_target_positions", ""),
    "decoder/layer_0/ffn/linear_0/weight": ("decoder_ffn_dim", ""),
    "encoder/num_heads": (),
    "decoder/num_heads": (),
}
"""Tensors that the configuration is read from, and the setting that each of their dimensions gives."""


def read_ctranslate2(folder: str | Path) -> SpeechModel:
    """Return the Whisper in a folder that CTranslate2 converted, with its tokenizer.

    Weights of every type are returned as float32. Without a tokenizer's files, the tokenizer follows from
    ``vocabulary.json`` or ``vocabulary.txt``. Raises CheckpointError for other models, settings that these modules
    lack, and a file that is truncated or whose tensors do not fit.
    """
    folder = Path(folder)
    source, settings = folder / FILE, folder / "config.json"
    variables = read_variables(source)
    tokenizer = _tokenizer(folder)
    config = _our_config(variables, 0 if tokenizer is None else tokenizer.pad, folder)
    model = build(config, source, source.stat().st_size)
    fit_tensors(model, NAMES.ours(_unfused(variables, source), model), source)
    model.tokenizer = tokenizer
    given = read_json(settings) if settings.exists() else {}
    told = {ours: given[theirs] for theirs, ours in GENERATION.items() if given.get(theirs) is not None}
    decoder = config.decoder
    place = f"{settings} (suppress_ids are suppress_tokens)"
    told = check_generation(told, place, decoder.vocabulary, (decoder.layers, decoder.heads))
    model.generation = with_defaults(tokenizer, told)
    return model


def read_variables(path: Path) -> dict[str, Tensor]:
    """Return the variables of a ``model.bin`` by their names, aliases included, and quantised ones as float32.

    Raises CheckpointError for anything but a Whisper of format version 6, and for a truncated or malformed file. No
    more is read or allocated than the file has bytes.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            variables, aliases = _Reader(file, path.stat().st_size, path).read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    for name in [name for name in variables if name.endswith(SCALE) and name.removesuffix(SCALE) in variables]:
        scale, weight = variables.pop(name).float(), variables[name.removesuffix(SCALE)]
        if scale.shape not in ((), weight.shape[:1]) or not (scale > 0).all():
            raise CheckpointError(f"{path}: {name} has the shape {tuple(scale.shape)} or a scale that is not above 0")
        rows = scale.reshape(-1, *[1] * (weight.ndim - 1)) if scale.ndim else scale
        variables[name.removesuffix(SCALE)] = weight.float() / rows
    for name, target in aliases.items():
        if target not in variables:
            raise CheckpointError(f"{path}: {name!r:.80} stands for {target!r:.80}, which is not in the file")
        variables[name] = variables[target]
    return variables


class _Reader:
    """Reader of the records of a ``model.bin``, which never asks for more bytes than remain."""

    def __init__(self, file: "BufferedReader", remaining: int, path: Path):
        self.file, self.remaining, self.path = file, remaining, path

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return tensors by name, and aliases with the names that they stand for."""
        if (version := self.number("I")) != VERSION:
            raise CheckpointError(
                f"{self.path}: format version {version} is not read, only {VERSION}; if this is CTranslate2's, convert "
                "the model anew with ct2-transformers-converter"
            )
        if (kind := self.text()) != SPECIFICATION:
            raise CheckpointError(f"{self.path} is a {kind!r:.80}; of CTranslate2's models only Whisper is read")
        self.number("I")  # revision
        variables = {}
        for _ in range(self.count()):
            name = self.text()
            variables[name] = self.tensor(name)
        return variables, {self.text(): self.text() for _ in range(self.count())}

    def take(self, size: int) -> bytearray:
        if size > self.remaining:
            raise CheckpointError(f"{self.path} is truncated: {size:,} bytes should follow where {self.remaining:,} do")
        self.remaining -= size
        data = bytearray(size)
        if self.file.readinto(data) != size:
            raise CheckpointError(f"{self.path} is truncated")
        return data

    def number(self, kind: str) -> int:
        (number,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return number

    def count(self) -> int:
        if (count := self.number("I")) > MOST_VARIABLES:
            raise CheckpointError(
                f"{self.path} is malformed: it has {count:,} names, at most {MOST_VARIABLES:,} are read"
            )
        return count

    def text(self) -> str:
        text = self.take(self.number("H")).rstrip(b"\0").decode("ascii", "replace")
        if not (text.isascii() and text.isprintable()):
            raise CheckpointError(f"{self.path} is malformed: {text!r:.80} is not a name")
        return text

    def tensor(self, name: str) -> Tensor:
        rank = self.number("B")
        shape = [self.number("I") for _ in range(rank)]
        kind, size = self.number("B"), self.number("I")
        dtype = DTYPES[kind] if kind < len(DTYPES) else None
        if dtype is None or rank > MOST_DIMENSIONS or not size or math.prod(shape) * dtype.itemsize != size:
            raise CheckpointError(
                f"{self.path} is malformed: {name!r:.80} has {size:,} bytes, type {kind} and shape {shape!r:.80}"
            )
        return torch.frombuffer(self.take(size), dtype=dtype).reshape(shape)


def _our_config(variables: Mapping[str, Tensor], pad: int, folder: Path) -> ModelConfig:
    """Return the configuration that shapes and numbers give; raise CheckpointError for another architecture."""
    source = folder / FILE
    values: Settings = {}
    for name, fields in SHAPES.items():
        if name not in variables:
            raise CheckpointError(f"{source}: {name} is missing; was another model converted?")
        if variables[name].ndim != len(fields):
            raise CheckpointError(f"{source}: {name} has {variables[name].ndim} dimensions instead of {len(fields)}")
        values |= {field: size for field, size in zip(fields, variables[name].shape, strict=True) if field}
    values["pad_token_id"] = pad if pad < values["vocab_size"] else 0  # such a tokenizer is refused later
    for part in ("encoder", "decoder"):
        numbers = {found[1] for name in variables if (found := re.match(rf"{part}/layer_(\d+)/", name))}
        values[f"{part}_layers"] = len(numbers)
        values[f"{part}_attention_heads"] = variables[f"{part}/num_heads"].item()
    for name, tensor in variables.items():
        supported = COMPUTED.get(name, 0)
        if tensor.ndim == 0 and name.rpartition("/")[2] not in FREE and float(tensor) != supported:
            raise CheckpointError(f"{source}: {name} is {float(tensor):g}; supported: {supported}")
    sound = folder / "preprocessor_config.json"
    sounds = {"feature_size": values["num_mel_bins"]} | (read_json(sound) if sound.exists() else {})
    return ModelConfig(
        read_settings(WHISPER.features, WHISPER.fields["features"], sounds, sound, complete=False),
        read_settings(WHISPER.encoder, WHISPER.fields["encoder"], values, source),
        read_settings(DecoderConfig, WHISPER.fields["decoder"], values, source, WHISPER.ours),
    )


def _unfused(variables: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Return the tensors with a name for each projection, without flags and the biases of keys, which are zero."""
    tensors = {name: tensor for name, tensor in variables.items() if tensor.ndim}
    head = tensors.pop(HEAD, None)
    if head is not None and not torch.equal(head, tensors[EMBEDDING]):
        raise CheckpointError(f"{source}: {HEAD} differs from the embedding; the head must be tied")
    for name in list(tensors):
        above, _, kind = name.rpartition("/")
        for end, parts in FUSED.items():
            if not above.endswith(end):
                continue
            attention = above.removesuffix(end) + ("/self_attention/" if "self" in end else "/cross_attention/")
            for part, rows in zip(parts, tensors.pop(name).chunk(len(parts)), strict=False):
                if (part, kind) != ("key", "bias") or rows.any():
                    tensors[f"{attention}{part}/{kind}"] = rows
        if above.endswith("/attention/layer_norm"):
            tensors[name.replace("/attention/", "/cross_attention/")] = tensors.pop(name)
    return tensors


def _tokenizer(folder: Path) -> WhisperTokenizer | None:
    """Return the tokenizer of the folder, or the one that its list of tokens gives; None without either."""
    if (folder / whisper.FILE).exists() or (folder / whisper.VOCABULARY).exists():
        tokenizer = load_tokenizer(folder)
        assert isinstance(tokenizer, WhisperTokenizer)
        return tokenizer
    for name in ("vocabulary.json", "vocabulary.txt"):
        path = folder / name
        if not path.exists():
            continue
        try:
            if path.suffix == ".json":
                tokens = read_json_value(path)
            else:
                tokens = read_limited(path, whisper.MOST_TOKENIZER_BYTES).decode().removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from None
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise CheckpointError(f"{path} holds no list of tokens; add {whisper.FILE} to the folder")
        ids = {token: number for number, token in enumerate(tokens)}
        if len(ids) < len(tokens):
            raise CheckpointError(f"{path} has the same token twice; add {whisper.FILE} to the folder")
        return WhisperTokenizer.of_tokens(ids, None, path)
    return None
