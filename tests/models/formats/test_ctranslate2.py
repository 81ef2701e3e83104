"""CTranslate2's folders of Whisper: the tensors of transformers, from files of a writer of this test and real ones."""

import json
import math
import os
import random
import shutil
import struct
from contextlib import suppress

import numpy as np
import pytest
import torch

import canter
from canter.cli.main import main
from canter.errors import CheckpointError
from canter.loading import FORMATS, load_module, model_format, save_module
from canter.models.formats.ctranslate2 import read_ctranslate2, read_variables
from canter.text import WhisperTokenizer, load_tokenizer

from ...helpers import write_token_lists
from .test_huggingface import equal

transformers = pytest.importorskip("transformers")

TYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}
KINDS = ("float32", "float16", "bfloat16", "int8", "int8_float16", "int16")
WIDTH, LAYERS = 32, {"encoder": 3, "decoder": 2}


def variables_of(theirs: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A Whisper's tensors under the names of the format: projections of one input stand in one matrix."""
    state = theirs.state_dict()
    found: dict[str, torch.Tensor] = {}

    def copy(name: str, source: str, kinds=(("weight", "weight"), ("bias", "bias"))) -> None:
        for ours, kind in kinds:
            found[f"{name}/{ours}"] = state[f"{source}.{kind}"]

    def fused(name: str, sources: list[str]) -> None:
        weights = [state[f"{source}.weight"] for source in sources]
        biases = [state.get(f"{source}.bias", torch.zeros(WIDTH)) for source in sources]
        found[f"{name}/weight"], found[f"{name}/bias"] = torch.cat(weights), torch.cat(biases)

    norm = (("gamma", "weight"), ("beta", "bias"))
    for part, layers in LAYERS.items():
        root = f"model.{part}"
        found[f"{part}/position_encodings/encodings"] = state[f"{root}.embed_positions.weight"]
        copy(f"{part}/layer_norm", f"{root}.layer_norm", norm)
        found[f"{part}/num_heads"] = torch.tensor(2, dtype=torch.int16)
        for layer in range(layers):
            here, there = f"{part}/layer_{layer}", f"{root}.layers.{layer}"
            copy(f"{here}/self_attention/layer_norm", f"{there}.self_attn_layer_norm", norm)
            fused(f"{here}/self_attention/linear_0", [f"{there}.self_attn.{one}_proj" for one in "qkv"])
            copy(f"{here}/self_attention/linear_1", f"{there}.self_attn.out_proj")
            copy(f"{here}/ffn/layer_norm", f"{there}.final_layer_norm", norm)
            copy(f"{here}/ffn/linear_0", f"{there}.fc1")
            copy(f"{here}/ffn/linear_1", f"{there}.fc2")
            if part == "decoder":
                copy(f"{here}/attention/layer_norm", f"{there}.encoder_attn_layer_norm", norm)
                fused(f"{here}/attention/linear_0", [f"{there}.encoder_attn.q_proj"])
                fused(f"{here}/attention/linear_1", [f"{there}.encoder_attn.{one}_proj" for one in "kv"])
                copy(f"{here}/attention/linear_2", f"{there}.encoder_attn.out_proj")
    for conv in ("conv1", "conv2"):
        copy(f"encoder/{conv}", f"model.encoder.{conv}")
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    flags = {"activation": 3, "pre_norm": 1, "scale_embeddings": 0, "start_from_zero_embedding": 0, "alibi": 0,
             "alibi_use_positive_positions": 1, "scale_alibi": 1}  # fmt: skip
    found |= {f"decoder/{name}": torch.tensor(value, dtype=torch.int8) for name, value in flags.items()}
    return found


def converted(variables: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The tensors in a type: matrices as integers with a scale for each row or one for all, others as floats."""
    float_type = getattr(torch, kind.removeprefix("int8_") if kind not in ("int8", "int16") else "float32")
    found = {}
    for name, tensor in variables.items():
        if not tensor.is_floating_point():
            found[name] = tensor
        elif "int" in kind and name.endswith("/weight"):
            rows = tensor.flatten(1).abs().amax(1)
            scale = 127 / rows if "int8" in kind else 1024 / rows.max()
            whole = torch.round(tensor * scale.reshape(-1, *[1] * (tensor.ndim - 1)))
            found[name], found[f"{name}_scale"] = whole.to(torch.int8 if "int8" in kind else torch.int16), scale
        else:
            found[name] = tensor.to(float_type)
    return found


def text(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def record(name: str, tensor: torch.Tensor) -> bytes:
    kind = TYPES[str(tensor.dtype).removeprefix("torch.")]
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    shape = struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
    return text(name) + shape + struct.pack("<BI", kind, len(data)) + data


def binary(variables, aliases=(), version=6, kind="WhisperSpec", count=None) -> bytes:
    count = len(variables) if count is None else count
    head = struct.pack("<I", version) + text(kind) + struct.pack("<II", 3, count)
    body = b"".join(record(name, tensor) for name, tensor in variables.items())
    return head + body + struct.pack("<I", len(aliases)) + b"".join(text(one) + text(two) for one, two in aliases)


HEAD = ("decoder/projection/weight", "decoder/embeddings/weight")


@pytest.fixture(scope="module")
def theirs(whisper_bytes):
    tokenizer = WhisperTokenizer(whisper_bytes("en", "yue").to_str())
    config = transformers.WhisperConfig(
        vocab_size=tokenizer.vocab_size, num_mel_bins=80, d_model=WIDTH, encoder_layers=3, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=64, init_std=0.2,
        pad_token_id=tokenizer.pad, bos_token_id=tokenizer.end, eos_token_id=tokenizer.end,
        decoder_start_token_id=tokenizer.end + 1, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def original(theirs, whisper_bytes, tmp_path_factory):
    """The model as transformers saves it, with a tokenizer."""
    folder = tmp_path_factory.mktemp("original")
    theirs.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    whisper_bytes("en", "yue").save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def make(theirs, original, tmp_path_factory):
    """``make(kind)``: a folder of the type."""

    def made(kind: str = "float32", **files):
        folder = tmp_path_factory.mktemp("ct2")
        (folder / "model.bin").write_bytes(binary(converted(variables_of(theirs), kind), [HEAD]))
        settings = {"suppress_ids": [1, 5], "suppress_ids_begin": None, "alignment_heads": [[1, 0]], "lang_ids": [260]}
        (folder / "config.json").write_text(json.dumps(settings))
        shutil.copy(original / "tokenizer.json", folder)
        return folder

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_transformers(make, original, kind):
    """Exactly, or as rounded to the type; of integers each is within half a step of its scale."""
    model, reference = canter.load_model(make(kind)), canter.load_model(original)
    assert model.config == reference.config
    found = model.state_dict()
    for name, tensor in reference.state_dict().items():
        matrix = name.endswith("weight") and "norm" not in name
        if "int" in kind and matrix:
            rows = tensor.flatten(1)
            step = rows.abs().amax(1, keepdim=True) / 127 if "int8" in kind else rows.abs().max() / 1024
            if kind == "int16":  # one scale for all rows of a fused matrix, at most that of the largest value
                step = step.clamp_min(max(one.abs().max() for one in reference.parameters()).item() / 1024)
            assert ((found[name].flatten(1) - rows).abs() <= 0.5001 * step).all(), name
        else:
            rounded = tensor.to(torch.float16 if "float16" in kind and "bf" not in kind else torch.float32)
            rounded = tensor.bfloat16() if kind == "bfloat16" else rounded
            assert torch.equal(found[name], rounded.float()), name


def test_weights_of_a_precision(make):
    assert {x.dtype for x in load_module(make("int8"), precision="bf16").parameters()} == {torch.bfloat16}


def test_settings_and_transcripts(make, original):
    """Settings of its file, others of the tokenizer; the transcript is that of the Hugging Face folder."""
    folder = make("float32")
    model, reference = canter.load(folder, device="cpu"), canter.load(original, device="cpu")
    ours, theirs = model.module.generation, reference.module.generation
    expected = {**theirs, "suppress_tokens": [1, 5], "alignment_heads": [[1, 0]]}
    assert {**ours, "bos_token_id": theirs["bos_token_id"]} == expected
    reference.module.generation |= ours
    audio = np.random.default_rng(0).standard_normal(48000).astype(np.float32) / 9
    one, other = (
        each.transcribe(audio, language="yue", timestamps="segment", vad="none") for each in (model, reference)
    )
    assert one.text == other.text != ""
    assert one.segments == other.segments


def test_commands_read_it_and_write_other_formats(make, original, tmp_path, capsys):
    folder = make("float16")
    assert model_format(folder).name == "ctranslate2"
    assert main(["info", str(folder)]) == 0
    assert "3 layers, width 32" in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "hf"), "--format", "huggingface"]) == 0
    again = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert again.generation_config.suppress_tokens == [1, 5]
    assert main(["convert", str(folder), str(tmp_path / "own")]) == 0
    assert equal(canter.load_model(tmp_path / "own"), canter.load_model(folder))
    with pytest.raises(CheckpointError, match="CTranslate2's format is only read; write a Hugging Face folder"):
        save_module(load_module(folder), tmp_path / "x", form="ctranslate2")
    assert not (tmp_path / "x").exists()
    assert FORMATS["ctranslate2"].native


@pytest.mark.parametrize("name", ["vocabulary.json", "vocabulary.txt"])
def test_a_list_of_tokens_is_enough(make, original, name):
    """The tokenizer follows from it, as CTranslate2 writes it, with the tokens of times."""
    folder, complete = make(), load_tokenizer(original)
    (folder / "tokenizer.json").unlink()
    assert canter.load_model(folder).tokenizer is None
    tokens = [complete._backend.id_to_token(number) for number in range(complete._first_timestamp)]
    tokens += [f"<|{0.02 * step:.2f}|>" for step in range(1501)]
    (folder / name).write_text(json.dumps(tokens) if name.endswith("json") else "".join(f"{one}\n" for one in tokens))
    found = canter.load_model(folder).tokenizer
    assert found.encode(" Aé?") == complete.encode(" Aé?")
    assert found.languages == ("en", "yue")
    assert found.vocab_size == complete.vocab_size


def test_the_list_of_a_real_whisper_gives_its_tokenizer(shared, make):
    source = shared / "models/whisper-tiny.en/tokenizer.json"
    folder = make()
    (folder / "tokenizer.json").unlink()
    added = write_token_lists(source, folder)
    tokens = {**json.loads((folder / "vocab.json").read_text()), **added}
    (folder / "vocab.json").unlink()
    (folder / "vocabulary.json").write_text(json.dumps(sorted(tokens, key=tokens.__getitem__)))
    with pytest.raises(CheckpointError, match="the tokenizer has 51864 ids, the model only"):
        canter.load_model(folder)
    found, complete = read_ctranslate2(folder).tokenizer, load_tokenizer(source)
    for words in (" He could wait no longer.", "Größe, 日本 мир 👩‍👩‍👧"):
        assert found.encode(words) == complete.encode(words)
    assert found.generation() == complete.generation()


@pytest.mark.parametrize("content", ['{"a": 1}', '["a", "a"]', "[1]", "[", '["a"]'])
def test_lists_that_are_no_vocabulary_take_one_line(make, content):
    folder = make()
    (folder / "tokenizer.json").unlink()
    (folder / "vocabulary.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"vocabulary\.json") as refused:
        canter.load_model(folder)
    assert len(str(refused.value).splitlines()) == 1


def without(name):
    return lambda variables: variables.pop(name)


def changed(name, tensor):
    return lambda variables: variables.update({name: tensor})


FAULTS = {
    "a missing shape": (without("encoder/conv1/weight"), "encoder/conv1/weight is missing"),
    "a missing number": (without("decoder/num_heads"), "decoder/num_heads is missing"),
    "a missing tensor": (without("decoder/layer_1/ffn/linear_0/bias"), "1 missing: decoder.layers.1.up.bias"),
    "an unknown tensor": (changed("decoder/layer_0/gate", torch.ones(2)), "1 unexpected: decoder/layer_0/gate"),
    "an unknown flag": (changed("decoder/rms", torch.tensor(1, dtype=torch.int8)), "decoder/rms is 1; supported: 0"),
    "another activation": (changed("decoder/activation", torch.tensor(0)), "decoder/activation is 0; supported: 3"),
    "many layers": (changed("encoder/layer_7/x", torch.ones(2)), "missing: encoder.layers.3"),
    "heads of a vector": (changed("encoder/num_heads", torch.ones(2)), "encoder/num_heads has 1 dimensions instead"),
    "heads that are no number": (changed("encoder/num_heads", torch.tensor(math.nan)), "heads is nan; it must be int"),
    "no heads": (changed("encoder/num_heads", torch.tensor(0, dtype=torch.int16)), "heads is 0; it must be from 1"),
    "odd heads": (changed("encoder/num_heads", torch.tensor(7, dtype=torch.int16)), "not a multiple of its 7 heads"),
    "biases of keys": (
        changed("encoder/layer_0/self_attention/linear_0/bias", torch.ones(96)),
        "1 unexpected: encoder/layer_0/self_attention/key/bias",
    ),
    "a scale of 0": (changed("encoder/conv1/weight_scale", torch.zeros(32)), "weight_scale has .* not above 0"),
    "a scale that is no number": (changed("encoder/conv1/weight_scale", torch.full((32,), math.nan)), "not above 0"),
    "scales of other rows": (changed("encoder/conv1/weight_scale", torch.ones(31)), r"has the shape \(31,\)"),
    "another head": (changed("decoder/projection/weight", torch.ones(8, 32)), "the head must be tied"),
    "a short matrix": (changed("encoder/layer_0/self_attention/linear_0/weight", torch.ones(1, 32)), "do not fit"),
    "integers without a scale": (
        changed("decoder/layer_0/ffn/linear_0/bias", torch.ones(64, dtype=torch.int8)),
        "1 mistyped: decoder.layers.0.up.bias torch.int8",
    ),
    "another width": (changed("decoder/embeddings/weight", torch.ones(1769, 30)), "do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_misfits_take_one_line(make, theirs, fault):
    change, message = FAULTS[fault]
    folder, variables = make(), variables_of(theirs)
    change(variables)
    variables = {name: x.to(torch.int32) if x.dtype == torch.int64 else x for name, x in variables.items()}
    (folder / "model.bin").write_bytes(binary(variables))
    assert_refused(folder, message)


def assert_refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as refused:
        canter.load_model(folder)
    assert str(folder) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


GOOD = {"a": torch.ones(2, 3)}
DAMAGED = {
    "nothing": (b"", "is truncated: 4 bytes should follow where 0 do"),
    "another version": (binary(GOOD, version=5), "format version 5 is not read, only 6"),
    "another model": (binary(GOOD, kind="TransformerSpec"), "'TransformerSpec'; .* only Whisper is read"),
    "more records than there are": (binary(GOOD, count=9), "truncated|malformed"),
    "4 billion records": (binary(GOOD, count=2**32 - 1), "malformed: it has 4,294,967,295 names"),
    "an alias of nothing": (binary(GOOD, [("b", "c")]), "'b' stands for 'c', which is not in the file"),
    "a tensor of 4 GB": (binary({}, count=1) + text("a") + struct.pack("<BIBI", 1, 2**30, 0, 2**32 - 4), "malformed"),
    "a tensor longer than the file": (
        binary({}, count=1)[:-4] + text("a") + struct.pack("<BIBI", 1, 2**29, 0, 2**31),
        "truncated: 2,147,483,648 bytes should follow where 0 do",
    ),
    "a shape of more": (binary(GOOD).replace(struct.pack("<II", 2, 3), struct.pack("<II", 2, 4)), "'a' has 24 bytes"),
    "no values": (binary({"a": torch.ones(0)}), "malformed: 'a' has 0 bytes"),
    "an unknown type": (binary({}, count=1)[:-4] + text("a") + struct.pack("<BIBI", 1, 1, 9, 4) + b"1234", "type 9"),
    "200 dimensions": (
        binary({}, count=1)[:-4] + text("a") + b"\xc8" + struct.pack("<I", 1) * 200 + struct.pack("<BI", 1, 1) + b"1",
        "malformed: 'a' has 1 bytes",
    ),
    "names that are no text": (binary({}, count=1)[:-4] + struct.pack("<H", 2) + b"\xff\xfe", "is not a name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_take_one_line(tmp_path, within_200_mib, kind):
    data, message = DAMAGED[kind]
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_variables(tmp_path / "model.bin")
    assert str(tmp_path) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_truncated_and_altered_files_are_refused_or_read(make):
    """Cut anywhere, a file is refused; with any byte changed, it is refused or a model."""
    folder = make("int8")
    data = (folder / "model.bin").read_bytes()
    chance = random.Random(0)
    for _ in range(40):
        (folder / "model.bin").write_bytes(data[: chance.randrange(len(data))])
        assert_refused(folder, "truncated|malformed")
    heads = [place for place in range(len(data) - 8) if data[place : place + 6] in (b"encode", b"decode", b"weight")]
    for _ in range(80):
        altered = bytearray(data)
        altered[chance.choice(heads) + chance.randrange(40)] = chance.randrange(256)
        (folder / "model.bin").write_bytes(altered)
        with suppress(CheckpointError):
            canter.load_model(folder)
            continue
        assert_refused(folder, "model.bin")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suppress_ids": [10**6]}, "an entry of suppress_tokens is 1000000; it must be a token id below"),
        ({"suppress_ids_begin": "x"}, "begin_suppress_tokens is 'x'"),
        ({"alignment_heads": [[2, 0]]}, r"alignment_heads is \[\[2, 0\]\]"),
        ([], "holds a list, not a JSON object"),
    ],
)
def test_settings_out_of_range_take_one_line(make, settings, message):
    folder = make()
    (folder / "config.json").write_text(json.dumps(settings))
    assert_refused(folder, message)


def test_a_pipe_is_not_read(make, tmp_path):
    os.mkfifo(tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_variables(tmp_path / "model.bin")


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "int8_float16", "int16"])
def test_what_ctranslate2_converts(shared, tmp_path, kind):
    """The real library's file of whisper-tiny.en."""
    converters = pytest.importorskip("ctranslate2.converters", reason="ctranslate2 is not installed")
    source = shared / "models" / "whisper-tiny.en"
    converter = converters.TransformersConverter(str(source), copy_files=["preprocessor_config.json"])
    converter.convert(str(tmp_path / "x"), quantization=kind)
    model, reference = canter.load_model(tmp_path / "x"), canter.load_model(source)
    assert model.config == reference.config
    assert model.tokenizer.encode(" He could wait.") == reference.tokenizer.encode(" He could wait.")
    for name in ("suppress_tokens", "begin_suppress_tokens", "alignment_heads", "no_timestamps_token_id"):
        assert model.generation[name] == reference.generation[name]
    for name, tensor in model.state_dict().items():
        wanted = reference.state_dict()[name]
        exact = wanted.half().float() if kind == "float16" else wanted
        limit = 0.0 if kind.startswith("float") else wanted.abs().max() / (127 if "int8" in kind else 100)
        assert (tensor - exact).abs().max() <= limit, name
