"""Whispers as people have them: fine-tunes of older releases, distilled shapes; transformers is the reference."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import canter
from canter.errors import CheckpointError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request
from canter.loading import load_module, save_module
from canter.models.formats.huggingface import write_hf

from ...helpers import write_token_lists
from ..conftest import small_whisper
from .test_huggingface import equal, small_canary

transformers = pytest.importorskip("transformers")

LANGUAGES = (*(f"x{number:02}" for number in range(97)), "en", "de", "yue")
SHAPES = {"distil": (80, (), 6, 2), "distil-large-v3": (128, LANGUAGES, 6, 2), "turbo": (128, LANGUAGES, 6, 4)}


@pytest.fixture(scope="module", params=SHAPES)
def old_folder(request, shared, tmp_path_factory):
    """A random model of a distilled shape as an older release saved it: token lists, a pickle, no generation config."""
    folder = tmp_path_factory.mktemp("old")
    mels, languages, encoder, decoder = SHAPES[request.param]
    added = write_token_lists(shared / "models/whisper-tiny.en/tokenizer.json", folder, languages)
    end = added.get("<|endoftext|>", 50256)
    config = transformers.WhisperConfig(
        vocab_size=end + 1608 if not languages else added["<|notimestamps|>"] + 1502,
        num_mel_bins=mels, encoder_layers=encoder, decoder_layers=decoder, d_model=32, init_std=0.2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=end + 1,
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = transformers.WhisperForConditionalGeneration(config).eval()
    config.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=mels).save_pretrained(folder)
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    return folder, theirs, added


def state_of(kind: str, theirs: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights as fine-tunes have them."""
    tensors = dict(theirs.state_dict())
    head = tensors.pop("proj_out.weight")
    if kind == "with its head, in half":
        tensors = {name: tensor.half() for name, tensor in {**tensors, "proj_out.weight": head}.items()}
    if kind == "without model.":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize("kind", ["without its head", "with its head, in half", "without model.", "in shards"])
def test_pickled_weights(kind, old_folder, tmp_path):
    """What torch.save wrote of a fine-tune, in one file or several."""
    folder, theirs, _ = old_folder
    shutil.copytree(folder, tmp_path / "copy")
    tensors = state_of(kind, theirs)
    if kind == "in shards":
        (tmp_path / "copy" / "pytorch_model.bin").unlink()
        names = {name: f"pytorch_model-0000{1 + place % 2}-of-00002.bin" for place, name in enumerate(tensors)}
        for shard in set(names.values()):
            part = {name: tensors[name] for name in names if names[name] == shard}
            torch.save(part, tmp_path / "copy" / shard)
        index = json.dumps({"metadata": {}, "weight_map": names})
        (tmp_path / "copy" / "pytorch_model.bin.index.json").write_text(index)
    else:
        torch.save(tensors, tmp_path / "copy" / "pytorch_model.bin")
    model = canter.load_model(tmp_path / "copy")
    reference = canter.load_model(folder).state_dict()
    exact = {name: tensor.half().float() if "half" in kind else tensor for name, tensor in reference.items()}
    assert all(torch.equal(tensor, exact[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(reference["decoder.embedding.weight"], theirs.proj_out.weight)


def test_pickled_weights_of_canary(tmp_path):
    write_hf(small_canary(), tmp_path / "x")
    theirs = transformers.CanaryForConditionalGeneration.from_pretrained(tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "x" / "pytorch_model.bin")
    assert equal(canter.load_model(tmp_path / "x"), small_canary())


class Runs:
    """An object whose unpickling writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    write_hf(small_whisper(), tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").unlink()
    torch.save({"a": Runs(tmp_path / "marker")}, tmp_path / "x" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds objects .* could run code; refused"):
        canter.load_model(tmp_path / "x")
    index = json.dumps({"weight_map": {"a": "../pytorch_model.bin"}})
    (tmp_path / "x" / "pytorch_model.bin").rename(tmp_path / "pytorch_model.bin")
    (tmp_path / "x" / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="names a shard outside its folder"):
        canter.load_model(tmp_path / "x")
    assert not (tmp_path / "marker").exists()


def test_safetensors_go_before_a_pickle(tmp_path):
    write_hf(small_whisper(), tmp_path / "x")
    (tmp_path / "x" / "pytorch_model.bin").write_bytes(b"damaged")
    assert equal(canter.load_model(tmp_path / "x"), small_whisper())
    (tmp_path / "x" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is truncated or malformed"):
        canter.load_model(tmp_path / "x")
    (tmp_path / "x" / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing; copy the whole model folder"):
        canter.load_model(tmp_path / "x")


def sound(seconds: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    time = np.arange(int(16000 * seconds)) / 16000
    return (0.3 * np.sin(time * 300 * seed) + 0.05 * generator.standard_normal(len(time))).astype(np.float32)


@pytest.mark.parametrize("timestamps", [False, True])
def test_tokens_are_those_of_transformers(old_folder, timestamps):
    """Without a generation config here, and with the one that transformers is given, all ids from the tokenizer."""
    folder, theirs, added = old_folder
    model = canter.load_model(folder)
    tokenizer = model.tokenizer
    multilingual = "<|yue|>" in added
    settings = transformers.GenerationConfig(**tokenizer.generation())
    clips = [sound(2.0, 1), sound(3.5, 2)]
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    features = extractor(clips, sampling_rate=16000, return_tensors="pt").input_features
    slots = {"source_lang": "yue", "task": "translate"} if multilingual else {}
    prompt = tokenizer.prompt_ids({**slots, "timestamp": "yes" if timestamps else "no"})
    names = ["<|startoftranscript|>", *(["<|yue|>", "<|translate|>"] if multilingual else [])]
    assert prompt == [added[name] for name in (*names, *(() if timestamps else ["<|notimestamps|>"]))]
    processors = transformers.LogitsProcessorList([
        transformers.SuppressTokensLogitsProcessor(settings.suppress_tokens),
        transformers.SuppressTokensAtBeginLogitsProcessor(settings.begin_suppress_tokens, len(prompt)),
        *([transformers.WhisperTimeStampLogitsProcessor(settings, len(prompt))] if timestamps else []),
    ])  # fmt: skip
    found = transformers.GenerationMixin.generate(
        theirs,
        features,
        decoder_input_ids=torch.tensor([prompt] * 2),
        generation_config=transformers.GenerationConfig(eos_token_id=tokenizer.end, pad_token_id=tokenizer.end),
        logits_processor=processors,
        max_new_tokens=24,
    )
    expected = [[token for token in row[len(prompt) :] if token != tokenizer.end] for row in found.tolist()]
    engine = Engine(model, tokenizer.end, EngineConfig(tokens_per_frame=0, extra_tokens=24, max_repeats=0))
    tokens = [one.tokens for one in engine.decode([Request(clip, prompt) for clip in clips])]
    assert tokens == expected
    assert len(set(tokens[0])) > 2
    assert not timestamps or tokens[0][0] > added["<|notimestamps|>"]


def test_distilled_shapes_are_written_back(old_folder, tmp_path):
    folder, theirs, _ = old_folder
    model = load_module(folder)
    save_module(model, tmp_path / "theirs", form="huggingface")
    again, report = transformers.WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert equal(again, theirs)
    assert again.config.decoder_layers < again.config.encoder_layers
    assert again.generation_config.no_timestamps_token_id == model.generation["no_timestamps_token_id"]
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert read.encode(" He waits.", add_special_tokens=False) == model.tokenizer.encode(" He waits.")
    save_module(model, tmp_path / "ours")
    assert load_module(tmp_path / "ours").generation == model.generation


@pytest.fixture
def real(shared, tmp_path):
    """A copy of whisper-tiny.en without its generation config."""
    folder = shutil.copytree(shared / "models/whisper-tiny.en", tmp_path / "real")
    folder.chmod(0o755)
    (folder / "generation_config.json").unlink()
    return folder


def clip_of(shared: Path) -> Path:
    return next(iter(sorted((shared / "data/speech/an4/flac").glob("*.flac"))))


def test_a_missing_generation_config_changes_nothing(shared, real, tmp_path):
    """Transcripts, timestamps and the probability of silence; only the heads that word times come from are unknown."""
    complete, derived = (canter.load(folder, device="cpu") for folder in (shared / "models/whisper-tiny.en", real))
    ours, theirs = (one.module.generation for one in (derived, complete))
    assert theirs.keys() - ours.keys() == {"alignment_heads", "max_length", "return_timestamps", "transformers_version"}
    assert ours == {name: theirs[name] for name in ours}
    soundfile.write(tmp_path / "silence.wav", 0.001 * sound(3.0, 5), 16000)
    for path in (clip_of(shared), tmp_path / "silence.wav"):
        one, other = (model.transcribe(path, timestamps="segment", vad="none") for model in (complete, derived))
        assert other.segments == one.segments
        assert other.text == one.text
        assert one.segments[0].no_speech_prob > 0


def test_word_times_without_alignment_heads_are_announced(shared, real):
    model = canter.load(real, device="cpu")
    with pytest.warns(UserWarning, match="real names no alignment_heads .*: times of words come from all heads"):
        words = model.transcribe(clip_of(shared), timestamps="word").words
    assert words
    decoder = model.module.decoder
    layers, heads = range(2, 4), range(6)
    model.module.generation["alignment_heads"] = [[layer, head] for layer in layers for head in heads]
    assert len(decoder.layers) == 4
    assert model.transcribe(clip_of(shared), timestamps="word").words == words


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, {}),
        ({"suppress_tokens": [5, 6]}, {}, {"suppress_tokens": [5, 6]}),
        ({"suppress_tokens": []}, {}, {"suppress_tokens": []}),
        ({"suppress_tokens": None}, {"suppress_tokens": None}, {}),
        ({"suppress_tokens": [5]}, {"suppress_tokens": []}, {"suppress_tokens": []}),
        ({"begin_suppress_tokens": [220, 50256]}, {}, {}),
        ({"begin_suppress_tokens": [7]}, {"begin_suppress_tokens": [8]}, {"begin_suppress_tokens": [8]}),
        ({}, {"no_timestamps_token_id": 9, "alignment_heads": [[1, 0]]},
         {"no_timestamps_token_id": 9, "alignment_heads": [[1, 0]]}),
    ],
)  # fmt: skip
def test_settings_of_a_folder_go_before_those_of_the_tokenizer(old_folder, tmp_path, config, generation, expected):
    folder, _, _ = old_folder
    shutil.copytree(folder, tmp_path / "x")
    derived = canter.load_model(folder).generation
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps({**values, **config}))
    if generation:
        (tmp_path / "x" / "generation_config.json").write_text(json.dumps(generation))
    assert canter.load_model(tmp_path / "x").generation == {**derived, **expected}


def test_suppressed_tokens_beyond_the_vocabulary_are_named(tmp_path):
    write_hf(small_whisper(), tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "suppress_tokens": [3, 60]}))
    with pytest.raises(
        CheckpointError, match=r"config\.json: an entry of suppress_tokens is 60; it must be a token id"
    ):
        canter.load_model(tmp_path / "x")
