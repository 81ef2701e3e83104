"""Equal to transformers' Whisper on the real whisper-tiny.en; right at any length up to 30 s."""

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import canter
from canter.models.batch import Batch
from canter.models.features import WhisperFeatureConfig

from .conftest import small_whisper

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "models" / "whisper-tiny.en"


@pytest.fixture(scope="module")
def ours(folder):
    return canter.load_model(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def speech(shared):
    """Two real utterances: a list of (S,) arrays."""
    files = sorted((shared / "data" / "speech" / "an4" / "flac").glob("*.flac"))[:20:10]
    return [soundfile.read(file, dtype="float32")[0] for file in files]


def padded(speech):
    """(B, S) and (B,) of arrays."""
    audio = torch.zeros(len(speech), max(map(len, speech)))
    for row, samples in zip(audio, speech, strict=True):
        row[: len(samples)] = torch.from_numpy(samples)
    return audio, torch.tensor([len(samples) for samples in speech])


@pytest.fixture(scope="module")
def extracted(folder, speech):
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    return extractor(speech, sampling_rate=16000, return_tensors="pt").input_features


def test_a_frame_is_20_ms_padded_or_not(ours):
    assert ours.frame_seconds == 0.02
    assert small_whisper().frame_seconds == 0.02


def test_features(ours, speech, extracted):
    features, lengths = ours.features(*padded(speech))
    assert lengths.tolist() == [3000] * 2
    assert (features.transpose(1, 2) - extracted).abs().max() < 1e-4


def test_features_of_a_full_thirty_seconds(ours, folder):
    audio = np.random.default_rng(0).normal(size=480000).astype(np.float32) * 0.1
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    expected = extractor([audio], sampling_rate=16000, return_tensors="pt").input_features
    features, _ = ours.features(torch.from_numpy(audio)[None], torch.tensor([480000]))
    assert (features.transpose(1, 2) - expected).abs().max() < 1e-4


def test_longer_than_thirty_seconds_is_refused(ours):
    with pytest.raises(ValueError, match=r"31\.00 s is longer than the model's 30 s"):
        ours.features(torch.zeros(1, 31 * 16000), torch.tensor([31 * 16000]))


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 40000), min_size=1, max_size=3),
    st.sampled_from([2.5, 2.501, 2.51, 2.515]),
    st.integers(0, 9),
)
def test_silence_is_computed_once(sizes, seconds, seed):
    """Features of the samples without padding equal those of the padded window.

    So do convolutions and their gradients over the audio and a little silence, for odd and even numbers of frames.
    """
    model = small_whisper()
    model.set_features(pad_seconds=seconds)
    generator = torch.Generator().manual_seed(seed)
    audio = torch.zeros(len(sizes), max(sizes))
    for row, size in enumerate(sizes):
        audio[row, :size] = 0.1 * torch.randn(size, generator=generator)
    whole = torch.zeros(len(sizes), round(seconds * 16000))
    whole[:, : audio.shape[1]] = audio
    lengths = torch.tensor(sizes)
    features, frames = model.features(audio, lengths)
    assert (features - model.features(whole, lengths)[0]).abs().max() < 1e-5
    encoder = model.encoder
    found, expected = [], []
    for results, shortens in ((found, True), (expected, False)):
        encoder.same_lengths = shortens  # without it, masks say that all is valid
        encoded, _ = encoder(features, frames)
        encoder.zero_grad()
        encoded.square().sum().backward()
        results += [encoded.detach(), encoder.conv1.weight.grad.clone(), encoder.conv2.bias.grad.clone()]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_the_convolutions_run_over_what_sounds(ours, speech):
    seen = []
    hook = ours.encoder.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2]))
    features, frames = ours.features(*padded(speech))
    ours.encode(features, frames)
    ours.encode(features + torch.rand(3000, 1), frames)
    hook.remove()
    assert seen[0] < max(map(len, speech)) / 160 + 12 < 3000 == seen[1]


@torch.no_grad()
def test_encoder_and_logits(ours, theirs, speech, extracted):
    tokens = torch.tensor([[50257, 50362, 383, 2068, 7586, 21831]] * 2)
    expected = theirs(input_features=extracted, decoder_input_ids=tokens)
    encoded, lengths = ours.encode(*ours.features(*padded(speech)))
    assert (encoded - expected.encoder_last_hidden_state).abs().max() < 2e-4
    assert (ours.logits(encoded, lengths, tokens) - expected.logits).abs().max() < 1e-3  # of magnitude 50
    log_probs = ours.log_probs(encoded, lengths, tokens)
    assert (log_probs - expected.logits.log_softmax(-1)).abs().max() < 2e-4


def test_loss(ours, theirs, speech, extracted):
    tokens = torch.tensor([[50257, 50362, 383, 2068, 7586, 50256]] * 2)
    audio, sizes = padded(speech)
    expected = theirs(input_features=extracted, decoder_input_ids=tokens[:, :-1], labels=tokens[:, 1:]).loss
    n = torch.full((2,), 6)
    loss = ours.loss(Batch(audio, sizes, tokens, n, n * 0 + 1, n[:, None], n, n))
    assert abs(loss.attention / loss.attention_count - expected) < 1e-4


@torch.no_grad()
def test_greedy(ours, theirs, speech, extracted):
    """Argmax by teacher forcing from our side, generate with its cache from theirs."""
    prompt = [50257, 50362]
    nothing = {"suppress_tokens": None, "begin_suppress_tokens": None, "forced_decoder_ids": None}
    config = transformers.GenerationConfig(
        max_new_tokens=20, eos_token_id=50256, pad_token_id=50256, decoder_start_token_id=50257, **nothing
    )
    generate = super(transformers.WhisperForConditionalGeneration, theirs).generate
    theirs.generation_config = config
    expected = generate(extracted, decoder_input_ids=torch.tensor([prompt] * 2), generation_config=config)
    encoded, lengths = ours.encode(*ours.features(*padded(speech)))
    for row in range(2):
        tokens = torch.tensor([prompt])
        while tokens.shape[1] < 22 and tokens[0, -1] != 50256:
            logits = ours.logits(encoded[row : row + 1], lengths[row : row + 1], tokens)
            tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        found = [token for token in tokens[0].tolist() if token not in (50256, *prompt)]
        assert found == [token for token in expected[row].tolist() if token not in (50256, *prompt)]
        assert 3 < len(found) < 20


@settings(max_examples=25)
@given(st.lists(st.integers(100, 12000), min_size=1, max_size=4), st.integers(0, 9000), st.integers(0, 9))
@torch.no_grad()
def test_any_length_single_or_in_a_batch(sizes, padding, seed):
    model = small_whisper()
    generator = torch.Generator().manual_seed(seed)
    audio = torch.full((len(sizes), max(sizes) + padding), 7.0)  # what is past the end must not matter
    for row, size in enumerate(sizes):
        audio[row, :size] = 0.1 * torch.randn(size, generator=generator)
    tokens = torch.tensor([[3, 4, 5, 6]] * len(sizes))
    features, frames = model.features(audio, torch.tensor(sizes))
    encoded, lengths = model.encode(features, frames)
    log_probs = model.log_probs(encoded, lengths, tokens)
    for row, size in enumerate(sizes):
        alone, one = model.encode(*model.features(audio[row : row + 1, :size], torch.tensor([size])))
        assert one[0] == lengths[row] == model.encoder_frames(size / 16000)
        assert (encoded[row, : one[0]] - alone[0, : one[0]]).abs().max() < 1e-4
        assert (log_probs[row] - model.log_probs(alone, one, tokens[:1])[0]).abs().max() < 1e-4


def test_short_features_are_the_first_of_the_long_ones(speech):
    """Up to the last frames, whose windows reach past the end, and the loudest value, which decides the
    floor."""
    audio, sizes = padded(speech)
    long, _ = WhisperFeatureConfig().build()(audio, sizes)
    short, frames = WhisperFeatureConfig(pad_seconds=0.0).build()(audio, sizes)
    for row, size in enumerate(frames):
        assert (long[row, :size] - short[row, :size]).abs().max() < 1e-5
