"""Hugging Face folders: equal to transformers' Canary, read and written; what it lacks is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import canter
from canter.errors import CheckpointError
from canter.loading import model_format
from canter.models.batch import Batch
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.huggingface import write_hf

from ..conftest import small_model, small_whisper
from ..test_invariance import make_batch

transformers = pytest.importorskip("transformers")

SHAPES = {
    "plain": {},
    "scaled, no bias": {"bias": False, "xscaling": True, "kernel_size": 5},
    "wider, four heads": {"width": 64, "heads": 4, "layers": 3},
}


def small_canary(**encoder):
    shape = {"layers": 2, "width": 32, "heads": 2, "feedforward": 48, "subsampling_channels": 8, "mels": 32}
    encoder = FastConformerConfig(**{**shape, **encoder})
    decoder = DecoderConfig(layers=2, width=encoder.width, heads=4, feedforward=64, vocabulary=50, positions=64, pad=2)
    return small_model(features=FeatureConfig(mels=32), encoder=encoder, decoder=decoder, ctc_vocabulary=0)


@pytest.fixture(params=SHAPES)
def pair(request, tmp_path):
    """Our model, and transformers' reading of what we wrote."""
    model = small_canary(**SHAPES[request.param])
    model.generation = {"bos_token_id": 4, "eos_token_id": 3, "pad_token_id": 2, "decoder_start_token_id": 7}
    write_hf(model, tmp_path / "canary")
    theirs, report = transformers.CanaryForConditionalGeneration.from_pretrained(
        tmp_path / "canary", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model, theirs.eval(), tmp_path / "canary"


@torch.no_grad()
def test_canary_parity(pair):
    model, theirs, folder = pair
    batch = make_batch([16000, 9000, 12345], 0, seed=1)
    features, lengths = model.features(batch.audio, batch.audio_lengths)
    mask = torch.arange(features.shape[1]) < lengths[:, None]
    extractor = transformers.ParakeetFeatureExtractor.from_pretrained(folder)
    audio = [row[:size].numpy() for row, size in zip(batch.audio, batch.audio_lengths, strict=True)]
    extracted = extractor(audio, sampling_rate=16000, return_tensors="pt")
    difference = extracted.input_features[:, : features.shape[1]] - features
    assert (difference * mask[:, :, None]).abs().max() < 1e-4

    expected = theirs(input_features=features, attention_mask=mask, decoder_input_ids=batch.tokens)
    encoded, frames = model.encode(features, lengths)
    log_probs = model.log_probs(encoded, frames, batch.tokens)
    for row, t in enumerate(frames):
        assert (encoded[row, :t] - expected.encoder_last_hidden_state[row, :t]).abs().max() < 1e-4
    valid = torch.arange(batch.tokens.shape[1]) < batch.token_lengths[:, None]
    assert (log_probs - expected.logits.log_softmax(-1))[valid].abs().max() < 1e-4

    inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:].masked_fill(~valid[:, 1:], -100)
    scores = theirs(input_features=features, attention_mask=mask, decoder_input_ids=inputs).logits
    expected_loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
    loss = model.loss(Batch(**{**vars(batch), "prompt_lengths": torch.ones(3, dtype=torch.long)}))
    assert abs(loss.attention / loss.attention_count - expected_loss) < 1e-4


@torch.no_grad()
def test_canary_greedy(pair):
    model, theirs, _ = pair
    batch = make_batch([16000], 0, seed=2)
    features, lengths = model.features(batch.audio, batch.audio_lengths)
    prompt = torch.tensor([[7, 4, 9]])
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    expected = theirs.generate(
        features, attention_mask=mask, decoder_input_ids=prompt, max_new_tokens=20, do_sample=False, eos_token_id=3
    )[0].tolist()
    encoded, frames = model.encode(features, lengths)
    tokens = prompt
    while tokens.shape[1] < 23 and tokens[0, -1] != 3:
        tokens = torch.cat([tokens, model.logits(encoded, frames, tokens)[:, -1:].argmax(-1)], dim=1)
    assert tokens[0].tolist() == expected


def equal(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("make", [small_canary, small_whisper])
def test_round_trip(make, tmp_path):
    model = make()
    model.generation = {"eos_token_id": 3, "suppress_tokens": [1, 2]}
    write_hf(model, tmp_path / "model")
    loaded = canter.load_model(tmp_path / "model")
    assert equal(loaded, model)
    assert loaded.config.encoder == model.config.encoder
    assert loaded.config.decoder == model.config.decoder
    assert loaded.generation["suppress_tokens"] == [1, 2]
    assert loaded.generation["eos_token_id"] == 3


def test_reads_what_transformers_writes(tmp_path):
    """Canary and Whisper with random weights saved by transformers itself, in shards too."""
    write_hf(small_canary(), tmp_path / "a")
    theirs = transformers.CanaryForConditionalGeneration.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    assert equal(canter.load_model(tmp_path / "b"), small_canary())
    write_hf(small_whisper(), tmp_path / "c")
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "c")
    theirs.save_pretrained(tmp_path / "d")
    assert equal(canter.load_model(tmp_path / "d"), small_whisper())


def test_whisper_written_and_loaded_by_transformers(shared, tmp_path):
    model = canter.load_model(shared / "models" / "whisper-tiny.en")
    write_hf(model, tmp_path / "whisper")
    theirs, report = transformers.WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "whisper", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    original = transformers.WhisperForConditionalGeneration.from_pretrained(
        shared / "models" / "whisper-tiny.en", dtype=torch.float32
    )
    assert equal(theirs, original)
    assert theirs.generation_config.suppress_tokens == original.generation_config.suppress_tokens


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: small_model(), "decoder of width 32 on an encoder of width 24"),
        (lambda: small_canary(norm="layer"), "encoder.norm 'layer'"),
    ],
)
def test_what_transformers_lacks_is_refused(model, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        write_hf(model(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "wav2vec2"},
            "model_type is 'wav2vec2', not one of canary, whisper, cohere_asr, seamless_m4t_v2",
        ),
        ({"activation_function": "relu"}, "activation_function is 'relu'; supported: 'gelu'"),
        ({"d_model": "wide"}, "d_model is 'wide'; it must be int"),
        ({"encoder_layers": None}, "encoder_layers is None"),
        ({"d_model": 16}, "tensors do not fit"),
    ],
)
def test_foreign_configurations(change, message, tmp_path):
    write_hf(small_whisper(), tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        canter.load_model(tmp_path / "x")


def test_untied_head_is_refused(tmp_path):
    write_hf(small_canary(), tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    save_file(
        {**tensors, "proj_out.weight": tensors["model.decoder.embed_tokens.weight"] + 1},
        tmp_path / "x" / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match="head must be tied"):
        canter.load_model(tmp_path / "x")


def test_shard_outside_the_folder_is_refused(tmp_path):
    write_hf(small_canary(), tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"model.norm": "../secret.safetensors"}}
    (tmp_path / "x" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        canter.load_model(tmp_path / "x")


def test_variable_length_whisper_is_still_a_whisper(tmp_path):
    model = small_whisper()
    model.config = replace(model.config, features=replace(model.config.features, pad_seconds=0.0))
    write_hf(model, tmp_path / "x")
    assert canter.load_model(tmp_path / "x").config.features.pad_seconds == 30.0


def test_nemo_to_transformers(shared, tmp_path):
    """A real NeMo archive, written as a folder and computed by transformers: NeMo's own log-probabilities."""
    archive = shared / "fixtures" / "nemo" / "a"
    arrays = load_file(archive / "arrays.safetensors")
    with pytest.warns(UserWarning, match="vocabulary of 'en' only, and decodes all of en, de"):
        write_hf(canter.load_model(archive / "model.nemo"), tmp_path / "x")
    theirs = transformers.CanaryForConditionalGeneration.from_pretrained(tmp_path / "x").eval()
    features = arrays["features"].transpose(1, 2)
    mask = torch.arange(features.shape[1]) < arrays["features_len"][:, None]
    with torch.no_grad():
        logits = theirs(features, attention_mask=mask, decoder_input_ids=arrays["tf_random.input_ids"]).logits
    assert (logits.log_softmax(-1) - arrays["tf_random.log_probs"]).abs().max() < 2e-4


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    write_hf(small_canary(), tmp_path / "model")
    before = load_file(tmp_path / "model" / "model.safetensors")

    def full(path):
        raise OSError("No space left on device")

    monkeypatch.setattr("canter.files.to_disk", full)
    for target in ("model", "new"):
        with pytest.raises(OSError, match="No space left"):
            write_hf(small_canary(layers=3), tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == before.keys()


def test_whose_architecture_a_folder_is(tmp_path):
    write_hf(small_canary(), tmp_path / "ours")
    assert model_format(tmp_path / "ours").name == "huggingface"
    (tmp_path / "config.json").write_text('{"model_type": "moonshine"}')
    assert model_format(tmp_path).name == "transformers"
    (tmp_path / "some.nemo").write_bytes(b"")
    assert model_format(tmp_path / "some.nemo").name == "nemo"
