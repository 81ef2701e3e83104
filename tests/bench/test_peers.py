"""The peers that Canter is measured beside compute the same: whisper-tiny.en says the same in all of them."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from canter import load_model
from canter.bench.peers import load_peer, parse_peer
from canter.bench.speed import Clip, EngineSystem
from canter.corpus.audio import load_audio
from canter.errors import CheckpointError, ConfigError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.text import SentencePieceTokenizer, train_tokenizer

from ..models.conftest import small_model

SHARED = Path(os.environ.get("CANTER_SHARED", ""))
needs_whisper = pytest.mark.skipif(
    not os.environ.get("CANTER_SHARED"), reason="CANTER_SHARED does not name the folder of shared models"
)


@pytest.fixture(scope="module")
def spoken():
    """A model, clips, and what Canter hears in them."""
    model = load_model(SHARED / "models" / "whisper-tiny.en")
    files = sorted((SHARED / "data/speech/an4/flac").iterdir())[:3]
    prompt = tuple(model.prompt(source_lang="en"))
    clips = [Clip(audio, len(audio) / 16000, prompt) for audio in map(load_audio, files)]
    return model, clips, EngineSystem(Engine(model, model.tokenizer.end, EngineConfig()))(clips)


@needs_whisper
@pytest.mark.filterwarnings("ignore")  # of the peers, while they load
@pytest.mark.parametrize("spec", ["transformers", "ctranslate2"])
def test_a_peer_says_the_same(spoken, tmp_path, spec):
    if not importlib.util.find_spec(spec):
        pytest.skip(f"{spec} is not installed")
    model, clips, expected = spoken
    peer = load_peer(model, *parse_peer(spec, "float32"), batch=2, work=tmp_path)
    assert peer(clips) == expected
    assert peer.details() == {}


def decoded(model, lengths, folder):
    """What transformers and our engine decode in clips of noise, and the limit on tokens."""
    random, prompt = np.random.default_rng(0), tuple(model.prompt(source_lang="en", target_lang="en"))
    audio = [(0.1 * random.standard_normal(size)).astype(np.float32) for size in lengths]
    clips = [Clip(samples, len(samples) / 16000, prompt) for samples in audio]
    peer = load_peer(model, *parse_peer("transformers", "float32"), batch=2, work=folder)
    config = EngineConfig(tokens_per_frame=99.0, max_repeats=0)  # no limits that generate lacks
    return peer(clips), EngineSystem(Engine(model, model.tokenizer.end, config))(clips)


@pytest.mark.filterwarnings("ignore:::transformers")
def test_cohere_decodes_the_same_even_beyond_its_window(tmp_path):
    pytest.importorskip("transformers")
    from ..small_cohere import save_cohere

    save_cohere(tmp_path / "cohere")
    peer, ours = decoded(load_model(tmp_path / "cohere"), (16000, 40 * 16000, 9000), tmp_path)
    assert peer == ours
    assert all(ours)


@pytest.mark.parametrize("vocabularies", [1, 2])
def test_canary_with_a_tokenizer_decodes_the_same(tmp_path, vocabularies):
    pytest.importorskip("transformers")
    tokenizer = train_tokenizer(["the doctor opened the window"] * 5, ["en", "de"], 60)
    if vocabularies == 2:
        models = {"en": tokenizer.models[""], "de": tokenizer.models[""]}
        defaults = {"source_lang": "en", "target_lang": "en"}
        tokenizer = SentencePieceTokenizer(tokenizer.special, models, "canary", defaults)
    model = small_model(
        encoder=FastConformerConfig(layers=2, width=32, heads=2, feedforward=48, subsampling_channels=8, mels=32),
        decoder=DecoderConfig(layers=2, width=32, heads=4, feedforward=64, vocabulary=tokenizer.vocab_size, pad=2),
        ctc_vocabulary=0,
    )
    model.tokenizer = tokenizer
    peer, ours = decoded(model, (16000, 9000, 30000), tmp_path)
    assert peer == ours


@pytest.mark.skipif(not importlib.util.find_spec("espnet2"), reason="ESPnet is not installed")
@pytest.mark.filterwarnings("ignore")  # of ESPnet, while it loads
@pytest.mark.parametrize(("kind", "beams"), [("v31", 1), ("v4", 1), ("v4", 5)])
def test_espnet_says_the_same(tmp_path, kind, beams):
    model = load_model(SHARED / "fixtures/owsm" / kind)
    arrays = load_file(SHARED / "fixtures/owsm" / kind / "arrays.safetensors")
    prompt = tuple(model.prompt(source_lang="en"))
    clips = [Clip(arrays[f"{clip}.audio"].numpy(), len(arrays[f"{clip}.audio"]) / 16000, prompt) for clip in range(2)]
    search = EngineConfig(beams=beams, tokens_per_frame=0.0, extra_tokens=20, max_repeats=0)
    peer = load_peer(model, "espnet", "float32", 1, tmp_path, search)
    found = peer(clips)
    assert found == EngineSystem(Engine(model, model.tokenizer.end, search))(clips)
    assert [len(tokens) for tokens in found] == [20, 20]
    assert peer.details() == {}


def test_espnet_has_only_owsm(tmp_path):
    with pytest.raises(CheckpointError, match="ESPnet's layout is for OWSM models"):
        load_peer(small_model(), "espnet", "float32", 1, tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("whisperx", "there are transformers, ctranslate2"), ("transformers:int8", "transformers has float32")],
)
def test_what_there_is_not(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_peer(spec, "float32")


def test_a_type_of_its_own(monkeypatch):
    import canter.bench.peers as module

    monkeypatch.setattr(module, "find_spec", lambda name: name == "ctranslate2")
    assert parse_peer("ctranslate2:int8", "float32") == ("ctranslate2", "int8")
    assert parse_peer("ctranslate2", "bfloat16") == ("ctranslate2", "bfloat16")
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    assert parse_peer("transformers", "int8") == ("transformers", "float32")
    assert parse_peer("espnet", "int8") == ("espnet", "float32")
    monkeypatch.setattr(module, "find_spec", lambda name: False)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'canter\[hf\]'"):
        parse_peer("transformers", "float32")
