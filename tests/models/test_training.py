"""Training features of models: seeded augmentation, dropout, layer drop, recomputed activations, bf16, compilation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.errors import ConfigError
from canter.models.augment import SpecAugmentConfig, change_speed, spec_augment
from canter.models.decoder import DecoderConfig
from canter.models.features import FeatureConfig, WhisperFeatureConfig
from canter.models.norm import MaskedBatchNorm
from canter.text import train_tokenizer

from .conftest import small_model, small_whisper
from .test_invariance import make_batch


def test_spec_augment_depends_only_on_the_seed():
    config = SpecAugmentConfig(frequency_width=8)
    features = torch.ones(3, 200, 32)
    lengths, seeds = torch.tensor([200, 120, 60]), [5, 6, 7]
    augmented = spec_augment(features, lengths, seeds, config)
    for row in range(3):
        size = int(lengths[row])
        alone = spec_augment(features[row : row + 1, :size], lengths[row : row + 1], seeds[row : row + 1], config)
        assert torch.equal(alone[0], augmented[row, :size])
    again = spec_augment(features, lengths, [8, 6, 7], config)
    assert not torch.equal(again[0], augmented[0])
    assert torch.equal(again[1:], augmented[1:])


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(0, 10**9), st.integers(0, 40), st.integers(0, 5), st.floats(0, 1))
def test_spec_augment_masks_no_more_than_configured(size, seed, width, count, share):
    config = SpecAugmentConfig(count, width, count, share)
    kept = spec_augment(torch.ones(1, size, 32), torch.tensor([size]), [seed], config)[0] != 0
    frames, mels = kept.any(1), kept.any(0)
    if mels.any() and frames.any():
        assert torch.equal(kept, frames[:, None] & mels[None])
    if frames.any():
        assert (~mels).sum() <= count * width
    if mels.any():
        assert (~frames).sum() <= count * int(size * share)


def test_spec_augment_masks_as_much_as_expected():
    """The mean fraction of masked bins over many seeds is about half of the widest mask, because widths are uniform."""
    config = SpecAugmentConfig(frequency_masks=1, frequency_width=20, time_masks=0)
    kept = spec_augment(torch.ones(500, 10, 80), torch.full((500,), 10), list(range(500)), config)
    assert (1 - kept.mean()).item() == pytest.approx(10 / 80, rel=0.1)


@pytest.mark.parametrize("config", [FeatureConfig(mels=32), WhisperFeatureConfig(mels=32, pad_seconds=0.0)])
def test_dither_depends_only_on_the_seed(config):
    features = replace(config, dither=1e-3).build().train()
    audio, sizes = 0.1 * torch.randn(2, 4000), torch.tensor([4000, 3200])

    def draw(*seeds):
        return features(audio, sizes, list(seeds))[0]

    assert torch.equal(draw(1, 2), draw(1, 2))
    assert torch.equal(draw(1, 2)[1], draw(3, 2)[1])
    assert not torch.equal(draw(1, 2)[0], draw(3, 2)[0])
    alone = features(audio[1:, :3200], sizes[1:], [2])[0][0]
    assert torch.allclose(draw(1, 2)[1, :20], alone, atol=1e-5)
    assert torch.equal(features(audio, sizes)[0], features.eval()(audio, sizes, [1, 2])[0])


def test_speed_moves_a_tone():
    time = torch.arange(16000) / 16000
    audio = torch.stack([torch.sin(2 * np.pi * 440 * time), torch.sin(2 * np.pi * 300 * time)])
    faster, lengths = change_speed(audio, torch.tensor([16000, 12000]), [1.1, 1.0])
    assert lengths.tolist() == [14545, 12000]
    assert torch.equal(faster[1, :12000], audio[1, :12000])
    spectrum = torch.fft.rfft(faster[0, :14545]).abs()
    assert spectrum.argmax().item() * 16000 / 14545 == pytest.approx(484, abs=1)
    assert faster[0].abs().max() == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="above 0"):
        change_speed(audio, lengths, [0.0, 1.0])


@pytest.mark.parametrize(
    ("make", "part", "rate"),
    [
        (small_model, "encoder", "dropout"),
        (small_model, "encoder", "dropout_input"),
        (small_model, "encoder", "dropout_attention"),
        (small_model, "encoder", "layer_drop"),
        (small_model, "decoder", "dropout"),
        (small_model, "decoder", "dropout_attention"),
        (small_model, "decoder", "dropout_activation"),
        (small_model, "decoder", "layer_drop"),
        (small_whisper, "encoder", "dropout"),
        (small_whisper, "encoder", "dropout_attention"),
        (small_whisper, "encoder", "dropout_activation"),
        (small_whisper, "encoder", "layer_drop"),
        (small_whisper, "decoder", "dropout"),
    ],
)
def test_each_dropout_acts_in_training_only(make, part, rate):
    plain = make()
    model = type(plain)(replace(plain.config, **{part: replace(getattr(plain.config, part), **{rate: 0.5})}))
    model.load_state_dict(plain.state_dict())
    model.eval()
    batch = make_batch([8000, 6000], 0, seed=3)

    def loss(seed):
        torch.manual_seed(seed)
        return model.loss(batch).attention.item()

    assert loss(0) == loss(1) == pytest.approx(plain.loss(batch).attention.item())
    model.train()
    assert loss(0) == loss(0)
    assert len({loss(seed) for seed in range(8)}) > 1


@pytest.mark.parametrize("make", [small_model, small_whisper])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_recomputed_activations_give_the_same_gradients(make, rate):
    def gradients(recompute):
        model = make()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = rate
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = rate
        model.train().recompute_activations(recompute)
        torch.manual_seed(4)
        loss = model.loss(make_batch([8000, 6000], 0, seed=3))
        (loss.attention + loss.ctc).backward()
        pending = [norm.pending for norm in model.modules() if isinstance(norm, MaskedBatchNorm)]
        return {name: parameter.grad for name, parameter in model.named_parameters()}, pending

    kept, pending = gradients(False)
    again, pending_again = gradients(True)
    for name, gradient in kept.items():
        assert torch.allclose(gradient, again[name], atol=1e-5), name
    assert [len(x) for x in pending_again] == [len(x) for x in pending]


def test_recomputing_keeps_less():
    def kept(recompute):
        model = small_model().train()
        model.recompute_activations(recompute)
        sizes = []

        def pack(x):
            sizes.append(0 if isinstance(x, torch.nn.Parameter) else x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.encode(torch.randn(2, 100, 32), torch.tensor([100, 80]))
        return sum(sizes)

    assert kept(True) < 0.7 * kept(False)


@pytest.mark.parametrize("make", [small_model, small_whisper])
def test_bfloat16_autocast(make):
    model = make().train()
    batch = make_batch([8000, 6000], 0, seed=3)
    exact = model.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(batch)
    assert loss.attention.item() == pytest.approx(exact.attention.item(), rel=0.05)
    (loss.attention + loss.ctc).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("make", [small_model, small_whisper])
def test_compiles_without_breaks_for_a_grid_of_shapes(make):
    """No graph break in encoder and decoder, and one graph for all batches of a cell of the grid."""
    model = make()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    encode = torch.compile(model.encode, fullgraph=True, dynamic=False, backend=backend)
    logits = torch.compile(model.logits, fullgraph=True, dynamic=False, backend=backend)
    for sizes in ([8000, 6000], [7000, 5000], [9500, 100]):
        batch = make_batch(sizes, 0, seed=3)
        grid = batch.on_grid(samples=16000, tokens=16)
        assert grid.audio.shape == (2, 16000)
        assert grid.tokens.shape == (2, 16)
        features = model.features(grid.audio, grid.audio_lengths)
        with torch.no_grad():
            scores = logits(*encode(*features), grid.tokens)
            encoded, lengths = model.encode(*model.features(batch.audio, batch.audio_lengths))
            expected = model.logits(encoded, lengths, batch.tokens)
        assert (scores[:, : expected.shape[1]] - expected).abs().max() < 1e-4
    assert len(graphs) == 2


def test_prompt():
    model = small_model(decoder=DecoderConfig(layers=1, width=32, heads=2, feedforward=32, vocabulary=400))
    with pytest.raises(ValueError, match="no tokenizer"):
        model.prompt(source_lang="en")
    model.tokenizer = train_tokenizer(["hello world and some more text to learn from"] * 4, ["en"], 45)
    prompt = model.prompt(source_lang="en", target_lang="en", pnc="yes")
    assert model.tokenizer.decode(prompt, special=True).count("<|") == len(prompt) == 5
    with pytest.raises(ConfigError, match="not a slot"):
        model.prompt(colour="red")


def test_more_tokens_than_positions():
    model = small_model()
    with pytest.raises(ValueError, match="65 tokens are more than the decoder's 64 positions"):
        model.decoder(torch.zeros(1, 65, dtype=torch.long), torch.zeros(1, 4, 32), torch.tensor([4]))


def test_features_can_be_switched():
    model = small_whisper()
    model.set_features(pad_seconds=2.0)
    assert model.config.features.pad_seconds == 2.0
    _, lengths = model.encode(*model.features(torch.zeros(1, 8000), torch.tensor([8000])))
    assert lengths.tolist() == [100]
