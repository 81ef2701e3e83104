"""Canary folders with a tokenizer: what `AutoProcessor`, `AutoTokenizer` and `generate` make of what is written."""

import numpy as np
import pytest
import torch

import canter
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.huggingface import write_hf
from canter.text import JsonTokenizer, SentencePieceTokenizer, train_tokenizer

from ...text.test_nemo import UNIFIED, unified_model
from ..conftest import small_model

transformers = pytest.importorskip("transformers")

TEXTS = ["the doctor opened the window", "der Arzt kam an die Tür"] * 5
RANDOM = np.random.default_rng(0)
CLIPS = [(0.1 * RANDOM.standard_normal(size)).astype(np.float32) for size in (16000, 9000)]
MAKERS = {
    "one vocabulary beside the special tokens": lambda: train_tokenizer(TEXTS, ["en", "de"], 80),
    "canary-1b-v2's single model": lambda: SentencePieceTokenizer.of_model(
        unified_model(user_defined_symbols=list(UNIFIED)), defaults={"source_lang": "en", "target_lang": "en"}
    ),
}


@pytest.fixture(params=MAKERS)
def model(request):
    tokenizer = MAKERS[request.param]()
    model = small_model(
        features=FeatureConfig(mels=32),
        encoder=FastConformerConfig(layers=2, width=32, heads=2, feedforward=48, subsampling_channels=8, mels=32),
        decoder=DecoderConfig(
            layers=2, width=32, heads=4, feedforward=64, vocabulary=tokenizer.vocab_size, positions=64,
            pad=tokenizer.pad,
        ),
        ctc_vocabulary=0,
    )  # fmt: skip
    model.tokenizer = tokenizer
    return model


def decoded(model, prompt) -> list[list[int]]:
    config = EngineConfig(tokens_per_frame=99.0, max_repeats=0)
    found = Engine(model, model.tokenizer.end, config).decode([Request(clip, prompt) for clip in CLIPS])
    return [one.tokens for one in found]


@pytest.mark.filterwarnings("ignore")
def test_generate_is_our_engine(model, tmp_path):
    write_hf(model, tmp_path / "x")
    theirs = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "x").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "x")
    inputs = processor.apply_transcription_request(CLIPS, source_language="de", sampling_rate=16000)
    prompt = model.prompt(source_lang="de", target_lang="de")
    assert inputs.decoder_input_ids.tolist() == [prompt, prompt]
    expected = decoded(model, prompt)
    for clip, tokens in zip(CLIPS, expected, strict=True):
        inputs = processor.apply_transcription_request(clip, source_language="de", sampling_rate=16000)
        ids = theirs.generate(**inputs, max_new_tokens=64 - len(prompt), do_sample=False)[0].tolist()
        assert ids[: len(prompt)] == prompt
        text = ids[len(prompt) :]
        assert tokens == (text[: text.index(model.tokenizer.end)] if model.tokenizer.end in text else text)
        assert processor.decode(ids, skip_special_tokens=True) == model.tokenizer.decode(ids)

    theirs.save_pretrained(tmp_path / "y")
    processor.save_pretrained(tmp_path / "y")
    assert not (tmp_path / "y" / "preprocessor_config.json").exists()
    again = canter.load_model(tmp_path / "y")
    assert isinstance(again.tokenizer, JsonTokenizer)
    assert again.config == model.config
    assert again.prompt(source_lang="de", target_lang="de") == prompt
    assert decoded(again, prompt) == expected
    write_hf(again, tmp_path / "z")
    reader = transformers.AutoProcessor.from_pretrained(tmp_path / "z")
    inputs = reader.apply_transcription_request(CLIPS, source_language="de", sampling_rate=16000)
    assert torch.equal(inputs.decoder_input_ids, torch.tensor([prompt, prompt]))


def test_our_own_reading_keeps_the_sentencepiece_models(model, tmp_path):
    write_hf(model, tmp_path / "x")
    again = canter.load_model(tmp_path / "x")
    assert isinstance(again.tokenizer, SentencePieceTokenizer)
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert again.tokenizer.defaults == model.tokenizer.defaults
