"""Cohere Transcribe as transformers saves it: equal to transformers' own model, processor and generate."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import canter
from canter.errors import CheckpointError, ConfigError
from canter.inference.engine.alignment import Alignment
from canter.inference.engine.engine import Engine, default_window
from canter.inference.engine.requests import EngineConfig, Request
from canter.inference.transcript.reading import words_of
from canter.loading import model_format, save_module
from canter.models.formats.huggingface import write_hf
from canter.models.formats.nemo import write_nemo

from ...small_cohere import TOKENS, VOCABULARY, save_cohere, transformers

SHAPES = {
    "equal widths": {},
    "two widths, three layers": {"encoder_width": 48, "num_hidden_layers": 3},
    "tied head": {"tie_word_embeddings": True, "num_attention_heads": 2},
}
RANDOM = np.random.default_rng(0)
CLIPS = [(0.1 * RANDOM.standard_normal(size)).astype(np.float32) for size in (16000, 9000, 23456)]


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """Folder, transformers' model and processor, and our reading of the folder."""
    folder = tmp_path_factory.mktemp("cohere")
    theirs, processor = save_cohere(folder, **SHAPES[request.param])
    return folder, theirs, processor, canter.load_model(folder)


@pytest.fixture
def folder(tmp_path):
    save_cohere(tmp_path / "cohere")
    return tmp_path / "cohere"


def padded(clips):
    lengths = torch.tensor([len(clip) for clip in clips])
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True), lengths


@torch.no_grad()
def test_features_encoder_and_log_probs(pair):
    _, theirs, processor, model = pair
    inputs = processor(CLIPS, language="en", sampling_rate=16000)
    features, lengths = model.features(*padded(CLIPS))
    assert lengths.tolist() == inputs.attention_mask.sum(1).tolist()
    assert (features - inputs.input_features[:, : features.shape[1]]).abs().max() < 1e-5
    tokens = torch.randint(0, VOCABULARY, (3, 20))
    expected = theirs(
        input_features=inputs.input_features, attention_mask=inputs.attention_mask, decoder_input_ids=tokens
    )
    encoded, frames = model.encode(features, lengths)
    for row, size in enumerate(frames):
        assert (encoded[row, :size] - expected.encoder_last_hidden_state[row, :size]).abs().max() < 1e-5
    assert (model.log_probs(encoded, frames, tokens) - expected.logits.log_softmax(-1)).abs().max() < 1e-5


def test_dither_follows_from_the_length_and_not_from_the_batch(pair):
    _, _, _, model = pair
    silence = np.zeros(8000, np.float32)
    alone, _ = model.features(*padded([silence]))
    beside, frames = model.features(*padded([silence, CLIPS[0]]))
    assert (alone[0] - beside[0, : frames[0]]).abs().max() < 0.05  # rounding shows so near to silence
    assert alone.std() > 0.1  # that of the dither; silence without it would be constant


@pytest.mark.parametrize("punctuation", [True, False])
def test_the_prompt_is_that_of_the_processor(pair, punctuation):
    _, _, processor, model = pair
    expected = processor.get_decoder_prompt_ids("de", punctuation)
    assert len(expected) == 10
    found = model.prompt(source_lang="German", target_lang="de", pnc="yes" if punctuation else "no")
    assert found == expected
    assert model.tokenizer.languages == ("ar", "de", "en", "fr", "ja")


def test_the_tokenizer_is_that_of_the_folder(pair):
    _, _, processor, model = pair
    theirs, ours = processor.tokenizer, model.tokenizer
    for text in ("the doctor opened the window", "der Arzt  kam", "xyz QQ 東京", ""):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids
        prompt = model.prompt(source_lang="en", target_lang="en")
        assert ours.decode([*prompt, *ids, ours.end]) == theirs.decode(ids, skip_special_tokens=True).strip()
    assert (ours.pad, ours.end, ours.vocab_size) == (2, 3, len(theirs))
    assert TOKENS[4] in ours.decode([4], special=True)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.filterwarnings("ignore")
def test_decoding_is_that_of_generate(pair, beams):
    _, theirs, processor, model = pair
    prompt = model.prompt(source_lang="en", target_lang="en")
    most = model.positions - len(prompt)
    config = EngineConfig(beams=beams, tokens_per_frame=99.0, max_repeats=0)
    found = Engine(model, model.tokenizer.end, config).decode([Request(clip, prompt) for clip in CLIPS])
    single = Engine(model, model.tokenizer.end, replace(config, rows=1))
    assert [one.tokens for one in single.decode([Request(clip, prompt) for clip in CLIPS])] == [
        one.tokens for one in found
    ]
    for clip, hypothesis in zip(CLIPS, found, strict=True):
        inputs = processor(clip, language="en", sampling_rate=16000)
        ids = theirs.generate(**inputs, max_new_tokens=most, do_sample=False, num_beams=beams)[0].tolist()
        assert ids[: len(prompt)] == prompt
        text = ids[len(prompt) :]
        assert hypothesis.tokens == (text[: text.index(3)] if 3 in text else text)


@pytest.mark.filterwarnings("ignore")
def test_written_and_loaded_by_transformers(pair, tmp_path):
    _, theirs, processor, model = pair
    write_hf(model, tmp_path / "x")
    again, report = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(report.values())
    expected, found = theirs.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    reader = transformers.AutoProcessor.from_pretrained(tmp_path / "x")
    assert type(reader) is type(processor)
    inputs, wanted = (one(CLIPS, language="fr", sampling_rate=16000) for one in (reader, processor))
    assert torch.equal(inputs.input_features, wanted.input_features)
    assert torch.equal(inputs.decoder_input_ids, wanted.decoder_input_ids)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    assert tokenizer("the window").input_ids == processor.tokenizer("the window").input_ids
    ids = again.eval().generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(ids, theirs.generate(**wanted, max_new_tokens=20, do_sample=False))
    assert tokenizer.batch_decode(ids) == processor.batch_decode(ids)


def test_through_canters_format_and_back(folder, tmp_path):
    model = canter.load_model(folder)
    save_module(model, tmp_path / "ours", form="canter")
    again = canter.load_model(tmp_path / "ours")
    assert again.config == model.config
    assert again.generation == model.generation
    slots = {"source_lang": "fr", "target_lang": "fr"}
    assert again.prompt(**slots) == model.prompt(**slots)
    save_module(again, tmp_path / "theirs", form="huggingface")
    expected, found = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "theirs"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_windows_become_ours(folder):
    assert default_window(canter.load_model(folder)) == 35.0
    file = folder / "processor_config.json"
    values = json.loads(file.read_text())
    values["feature_extractor"]["max_audio_clip_s"] = 20.0
    file.write_text(json.dumps(values))
    model = canter.load_model(folder)
    assert default_window(model) == 20.0
    write_hf(model, folder.with_name("x"))
    written = json.loads((folder.with_name("x") / "preprocessor_config.json").read_text())
    assert written["max_audio_clip_s"] == 20.0


def test_the_published_layout(folder):
    """Names without a prefix, tables that the model computes, settings left out, and the features in a file of their
    own."""
    model = canter.load_model(folder)
    tensors = {name.removeprefix("model."): x for name, x in load_file(folder / "model.safetensors").items()}
    tensors["preprocessor.featurizer.fb"] = torch.zeros(1, 32, 257)
    save_file(tensors, folder / "model.safetensors")
    file = folder / "processor_config.json"
    features = json.loads(file.read_text())["feature_extractor"]
    for name in ("dither", "max_audio_clip_s"):
        del features[name]
    (folder / "preprocessor_config.json").write_text(json.dumps(features))
    file.unlink()
    config = json.loads((folder / "config.json").read_text())
    for name in ("tie_word_embeddings", "num_key_value_heads", "head_dim", "pad_token_id"):
        del config[name]
    del config["encoder_config"]["conv_kernel_size"]
    (folder / "config.json").write_text(json.dumps(config))
    again = canter.load_model(folder)
    assert again.config == model.config
    assert default_window(again) == 35.0
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_named_by_their_modules(tmp_path, tied):
    theirs, processor = save_cohere(tmp_path / "x", tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "y", save_original_format=False)
    processor.save_pretrained(tmp_path / "y")
    assert "model.decoder.embed_tokens.weight" in load_file(tmp_path / "y" / "model.safetensors")
    expected, found = (canter.load_model(tmp_path / name).state_dict() for name in "xy")
    assert all(torch.equal(x, found[name]) for name, x in expected.items())


def test_a_window_out_of_range_is_named(folder):
    file = folder / "processor_config.json"
    file.write_text(file.read_text().replace("35.0", '"long"'))
    with pytest.raises(CheckpointError, match=r"processor_config\.json: max_audio_clip_s is 'long'"):
        canter.load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'relu'"),
        ({"attention_bias": False}, "attention_bias is False; supported: True"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; it must be int"),
        ({"encoder_config": {"hidden_act": "relu"}}, "encoder_config.hidden_act is 'relu'; supported: 'silu'"),
        ({"encoder_config": 7}, "encoder_config is missing or no JSON object"),
        ({"num_hidden_layers": 3}, "tensors do not fit the configuration. 26 missing: decoder.layers.2"),
    ],
)
def test_settings_that_the_modules_lack(folder, change, message):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        canter.load_model(folder)


def test_a_head_that_differs_though_it_is_tied(folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"log_softmax\.mlp\.layer0\.weight differs from the embedding"):
        canter.load_model(folder)


def test_what_nemo_lacks_is_refused(folder, tmp_path):
    model = canter.load_model(folder)
    with pytest.raises(CheckpointError, match="learned_positions"):
        write_nemo(model, tmp_path / "x.nemo")
    assert not (tmp_path / "x.nemo").exists()


def test_a_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text('{"model": "<|pnc|>"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer\.json"):
        canter.load_model(folder)
    shutil.rmtree(folder)
    save_cohere(folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<pad>", "<fill>"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a tokenizer\.json without <pad>"):
        canter.load_model(folder)


def test_a_damaged_table_of_characters_is_refused(folder):
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "=" * 9}
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer\.json"):
        canter.load_model(folder)


@pytest.mark.parametrize("start", [None, [3, 4]])
def test_a_start_token_that_is_no_id(folder, start):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder_start_token_id": start}))
    model = canter.load_model(folder)
    prompt = model.prompt(source_lang="en", target_lang="en")
    (found,) = Engine(model, 3).decode([Request(CLIPS[0], prompt)])
    assert found.prompt == tuple(prompt)


def test_the_format(folder):
    assert model_format(folder).name == "huggingface"


def test_it_transcribes_and_does_not_translate(folder):
    """Its prompt has two languages, but it was trained with equal ones only."""
    model = canter.load(folder)
    noise = np.random.default_rng(0).normal(scale=0.1, size=16000).astype(np.float32)
    with pytest.raises(ConfigError, match="transcribes and does not translate"):
        model.transcribe(noise, language="en", task="translate", target_language="de")
    with pytest.raises(ConfigError, match="it cannot write de of en"):
        model.tokenizer.prompt_ids({"source_lang": "en", "target_lang": "de"})


def test_words_hold_no_special_tokens(folder):
    model = canter.load(folder)
    tokens = [model.tokenizer.special_id("<|nospeech|>"), *model.tokenizer.encode("the door"), model.tokenizer.end]
    times = tuple(0.1 * place for place in range(len(tokens) + 1))
    words = words_of(Alignment(tuple(tokens), times, (0.5,) * len(tokens)), model.tokenizer)
    assert "".join(word.text for word in words).split() == ["the", "door"]
