"""Model folders whose files lie, of Canter's own format and Hugging Face's: one clear line, in little memory."""

import json
import os
import shutil
import struct

import pytest

import canter
from canter.errors import CheckpointError
from canter.models.formats.checkpoint import save_model
from canter.models.formats.huggingface import write_hf
from canter.text import Characters, train_tokenizer

from ..conftest import small_model, small_whisper


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``own`` with a tokenizer and an alphabet, and ``whisper`` in Hugging Face's layout."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["hello world this is a text"] * 3, ["en"], 48)
    model = small_model()
    model.characters = Characters("abcdefghij")
    save_model(model, root / "own", tokenizer)
    whisper = small_whisper()
    whisper.generation = {"eos_token_id": 3, "suppress_tokens": [1, 2]}
    write_hf(whisper, root / "whisper")
    return root


@pytest.fixture
def folder(folders, tmp_path):
    """``folder(kind)``: a copy of that folder."""

    def copy(kind):
        return shutil.copytree(folders / kind, tmp_path / kind)

    return copy


def edit(file, changes):
    """Set values of a JSON file, by their paths: ``{"encoder.layers": 3}``."""
    values = json.loads(file.read_text())
    for path, value in changes.items():
        *above, name = path.split(".")
        place = values
        for part in above:
            place = place[part]
        place[name] = value
    file.write_text(json.dumps(values))


def assert_refused(path, message):
    with pytest.raises(CheckpointError, match=message) as refused:
        canter.load_model(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


BEYOND = (0, -1, 10**8, 10**400, True, 1.5, "6", None, [6], {"a": 1}, float("nan"), float("inf"))


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("own", f"{part}.{name}")
        for part, names in (
            ("features", "sample_rate mels n_fft window hop"),
            ("encoder", "width heads feedforward kernel_size subsampling_channels mels"),
            ("decoder", "width heads feedforward vocabulary positions"),
        )
        for name in names.split()
    ]
    + [
        ("whisper", name)
        for name in (
            *("d_model", "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim"),
            *("decoder_ffn_dim", "vocab_size", "max_source_positions", "max_target_positions", "num_mel_bins"),
        )
    ],
)
def test_every_size_has_a_range(folder, kind, setting, within_200_mib):
    path = folder(kind)
    for value in BEYOND:
        edit(path / "config.json", {setting: value})
        assert_refused(path, r"must be|missing|expected")


@pytest.mark.parametrize("setting", ["encoder.layers", "decoder.layers", "ctc_vocabulary", "decoder.pad"])
def test_counts_that_may_be_0_have_a_range_too(folder, setting, within_200_mib):
    path = folder("own")
    for value in BEYOND[1:]:
        edit(path / "config.json", {setting: value})
        assert_refused(path, "must be|expected")


@pytest.mark.parametrize(
    "setting", ["features.dither", "features.preemphasis", "encoder.dropout", "encoder.layer_drop", "decoder.dropout"]
)
def test_fractions_have_a_range(folder, setting):
    path = folder("own")
    for value in (-0.1, 1.1, 10**400, True, "0.1", None, float("nan"), float("inf")):
        edit(path / "config.json", {setting: value})
        assert_refused(path, "must be|expected")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("encoder.width", 16_000, r"more than [\d,]+ parameters, but its weights have only [\d,]+ bytes"),
        ("decoder.feedforward", 131_000, "parameters, but its weights have only"),
        ("decoder.positions", 1_000_000, "positions 1000000 of width 32 take more than"),
        ("encoder.heads", 5, "not a multiple of its 5 heads"),
        ("encoder.kernel_size", 8, "kernel_size 8 is even"),
        ("encoder.mels", 33, "encoder.mels is 33, but the features have 32"),
        ("decoder.pad", 50, "beyond the vocabulary of 50"),
        ("features.window", 600, "longer than n_fft"),
        ("features.hop", 600, "longer than n_fft"),
        ("ctc_vocabulary", 12, "has 10 characters, but|do not fit"),
        ("encoder.norm", "group", "must be 'batch' or 'layer'"),
        ("decoder.activation", "__import__", "must be 'relu' or 'gelu'"),
        ("encoder.kind", ["x"], r"kind \['x'\]"),
        ("encoder", 3, "encoder: expected a mapping of settings, found 3"),
        ("decoder", None, "decoder: expected a mapping of settings, found None"),
        ("model_type", ["whisper"], "model_type is"),
    ],
)
def test_what_must_agree(folder, setting, value, message, within_200_mib):
    path = folder("own")
    edit(path / "config.json", {setting: value})
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("sampling_rate", 0), ("n_fft", 1), ("hop_length", -5), ("chunk_length", 10**9), ("feature_size", 10**9)],
)
def test_the_extractor_has_ranges_too(folder, setting, value, within_200_mib):
    path = folder("whisper")
    edit(path / "preprocessor_config.json", {setting: value})
    assert_refused(path, "must be from")


GENERATION = {
    "suppress_tokens": ([50], [-1], ["a"], [True], {"a": 1}, [1] * 200_000, 5),
    "begin_suppress_tokens": ([10**9], [[1]], "a"),
    "eos_token_id": (50, -1, "a", [50], True, 1.5),
    "decoder_start_token_id": (10**400, [None]),
    "no_timestamps_token_id": (50, [1], {}),
    "alignment_heads": ([[2, 0]], [[0, 4]], [[0]], [1], [[0, 0, 0]], 7, [[0.0, 0]]),
    "bos_token_id": (-1, {"a": 1}, "a", True, [1]),
    "lang_to_id": ({"<|en|>": 50}, {"<|en|>": [1]}, [1]),
    "max_length": (-1, 10**9, 1.5, "448", [1], float("nan")),
    "max_initial_timestamp_index": (-1, 10**9, "1"),
    "num_beams": (0, 10**6),
    "window_seconds": (0, -1, float("nan"), "40"),
    "tokens_per_frame": (-1, float("inf")),
}


@pytest.mark.parametrize("setting", GENERATION)
@pytest.mark.parametrize("kind", ["own", "whisper"])
def test_generation_settings_are_checked(folder, kind, setting):
    path = folder(kind)
    for value in GENERATION[setting]:
        (path / "generation_config.json").write_text(json.dumps({setting: value}))
        assert_refused(path, f"generation_config.json: (an entry of )?{setting} is .* must be")


def test_generation_settings_of_others_are_kept(folder):
    path = folder("whisper")
    settings = {"bos_token_id": 50256, "eos_token_id": [3, 4], "suppress_tokens": None, "language": "<|en|>", "x": [{}]}
    (path / "generation_config.json").write_text(json.dumps(settings))
    assert settings.items() <= canter.load_model(path).generation.items()


def test_a_window_beyond_the_encoder_is_refused(folder):
    """The small Whisper has 200 positions, and its folder pads to 30 s: it is loaded to be changed, not to be used."""
    path = folder("whisper")
    assert canter.load_model(path).padded_seconds == 30
    with pytest.raises(CheckpointError, match="30 s, which are 1500 frames, but the encoder has positions for 200"):
        canter.load(path)


def tensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


HEADERS = {
    "a length of 4 EB": struct.pack("<Q", 2**62) + b"{}",
    "a header of 8 MiB": tensors(b"{}" + b" " * 2**23),
    "a deep header": tensors(b'{"a":' + b"[" * 1_000_000),
    "a list": tensors(b"[]"),
    "a shape beyond the data": tensors(
        b'{"a":{"dtype":"F32","shape":[9999999,9999999],"data_offsets":[0,4]}}', b"1234"
    ),
    "offsets beyond the data": tensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[999999999,1000000003]}}', b"1234"
    ),
    "a shape below 0": tensors(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"),
    "an unknown type": tensors(b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "nothing": b"",
    "a text": b"not tensors at all",
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("kind", ["own", "whisper"])
def test_headers_that_lie(folder, kind, name, within_200_mib):
    path = folder(kind)
    (path / "model.safetensors").write_bytes(HEADERS[name])
    assert_refused(path, "truncated or not a safetensors file")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": "model.safetensors"}, "model.safetensors is missing"),
        ({"a": "model.safetensors.index.json"}, "is no name of a safetensors file"),
        ({"a": "../own/model.safetensors"}, "outside its folder"),
        ({"a": "/etc/passwd"}, "outside its folder"),
        ({"a": "x\0.safetensors"}, "outside its folder"),
        ({"a": ["x.safetensors"]}, "outside its folder"),
        (["x.safetensors"], "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
@pytest.mark.parametrize("kind", ["own", "whisper"])
def test_indexes_that_name_themselves_or_others(folder, kind, weights, message):
    path = folder(kind)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert_refused(path, message)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "generation_config.json"])
def test_files_that_never_end_or_never_answer(folder, file):
    path = folder("whisper") / file
    path.unlink()
    os.mkfifo(path)
    assert_refused(path.parent, "not a regular file")
    path.unlink()
    path.symlink_to("/dev/zero")
    assert_refused(path.parent, "not a regular file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"special": "abc"}, "must be texts"),
        ({"special": [1]}, "must be texts"),
        ({"defaults": {"target_lang": 1}}, "must be texts"),
        ({"prompt_format": "x"}, "'x' is not a prompt format"),
        ({"models": {"": "/etc/passwd"}}, "outside the folder"),
        ({"models": {"": 5}}, "outside the folder"),
        ({"models": [1]}, "not a tokenizer"),
        ({"models": {str(n): "tokenizer.model" for n in range(10_000)}}, "more than 8,388,608 bytes"),
    ],
)
def test_tokenizers_that_lie(folder, changes, message, within_200_mib):
    path = folder("own")
    edit(path / "canter_tokenizer.json", changes)
    assert_refused(path, message)


@pytest.mark.parametrize("data", [b"", b"\x0a\xff", b"text" * 100, bytes(2**23)])
def test_vocabularies_that_lie(folder, data):
    path = folder("own")
    (path / "tokenizer.model").write_bytes(data)
    assert_refused(path, "not a tokenizer")


def test_padding_that_a_tokenizer_asks_for_is_not_done(whisper_bytes):
    from canter.text import WhisperTokenizer

    backend = whisper_bytes("en", "de")
    backend.enable_padding(length=2_000_000)
    backend.enable_truncation(1)
    assert len(WhisperTokenizer(backend.to_str()).encode("a b")) == 3
