"""Padding and batch-mates change nothing: not a valid position, not a loss, not a gradient, not a
statistic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.models.batch import Batch
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import length_mask
from canter.models.norm import MaskedBatchNorm, merge_pending

from .conftest import small_model, small_w2v_bert

lengths = st.lists(st.integers(1600, 12000), min_size=1, max_size=4)
paddings = st.integers(0, 9000)
seeds = st.integers(0, 1000)


def make_batch(sizes: list[int], padding: int, seed: int, junk: float = 0.0) -> Batch:
    """Return random audio and tokens of these lengths in samples, padded by ``padding`` samples and some tokens.

    Padding is filled with ``junk``. An utterance's content depends only on its place and the seed.
    """
    wide, u = max(sizes) + padding, 12 + padding // 1000
    audio = torch.full((len(sizes), wide), junk)
    tokens = torch.full((len(sizes), u), int(junk != 0))
    token_lengths = []
    for row, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed + row)
        audio[row, :size] = 0.1 * torch.randn(size, generator=generator)
        token_lengths.append(6 + size % 6)
        drawn = torch.randint(3, 50, (token_lengths[-1],), generator=generator)
        tokens[row, : token_lengths[-1]] = drawn
    n = torch.tensor
    characters = torch.arange(1, 4).repeat(len(sizes), 1)
    ones = torch.ones(len(sizes), dtype=torch.long)
    return Batch(audio, n(sizes), tokens, n(token_lengths), 3 * ones, characters, ones, 0 * ones)


def run(model, batch):
    features, frames = model.features(batch.audio, batch.audio_lengths)
    encoded, encoded_lengths = model.encode(features, frames)
    return encoded, encoded_lengths, model.log_probs(encoded, encoded_lengths, batch.tokens)


@pytest.fixture(scope="module", params=[small_model, small_w2v_bert])
def model(request):
    return request.param()


@settings(max_examples=25)
@given(lengths, paddings, seeds)
@torch.no_grad()
def test_single_or_in_a_batch(model, sizes, padding, seed):
    """A single utterance equals the same one in a batch with longer ones and junk as padding, to 1e-4."""
    batch = make_batch(sizes, padding, seed, junk=7.0)
    encoded, encoded_lengths, log_probs = run(model, batch)
    for row, size in enumerate(sizes):
        single = make_batch([size], 0, seed + row)
        alone, alone_lengths, alone_log_probs = run(model, single)
        assert alone_lengths[0] == encoded_lengths[row] == model.encoder.frames(model.features.frames(size))
        t, u = alone_lengths[0], single.token_lengths[0]
        assert (encoded[row, :t] - alone[0, :t]).abs().max() < 1e-4
        assert (log_probs[row, :u] - alone_log_probs[0, :u]).abs().max() < 1e-4


@settings(max_examples=15)
@given(lengths, paddings, seeds, st.sampled_from(["batch", "layer", "w2v_bert"]), st.booleans())
def test_gradients_of_padded_and_unpadded(sizes, padding, seed, norm, xscaling):
    """Training mode, BatchNorm over the batch's own statistics: loss, gradients and statistics of a batch
    padded with junk equal those of the same batch as narrow as it can be."""

    def build():
        if norm == "w2v_bert":
            return small_w2v_bert()
        encoder = FastConformerConfig(
            layers=2, width=24, heads=2, feedforward=48, subsampling_channels=8, mels=32, norm=norm, xscaling=xscaling
        )
        return small_model(encoder=encoder)

    models = [build().train() for _ in range(2)]
    for model, batch in zip(
        models, (make_batch(sizes, 0, seed), make_batch(sizes, padding, seed, junk=7.0)), strict=True
    ):
        loss = model.loss(batch, label_smoothing=0.1)
        (loss.attention / loss.attention_count + loss.ctc / loss.ctc_count).backward()
        merge_pending(model)
    narrow, padded = (dict(model.named_parameters()) for model in models)
    total = sum(parameter.grad.square().sum() for parameter in narrow.values()).sqrt()
    for name, parameter in narrow.items():
        assert (parameter.grad - padded[name].grad).abs().max() < 1e-4 * total, name
    for (name, ours), (_, theirs) in zip(*(model.named_buffers() for model in models), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), name


@settings(max_examples=25)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), seeds)
def test_batch_norm_equals_torch_on_the_valid_positions(sizes, seed):
    """Against torch.nn.BatchNorm1d on the valid positions put one after the other."""
    torch.manual_seed(seed)
    x = torch.randn(len(sizes), max(sizes) + 2, 6) * 3 + 1
    valid = length_mask(torch.tensor(sizes), x.shape[1])
    if valid.sum() < 2:
        return  # torch refuses a single position
    ours, theirs = MaskedBatchNorm(6), torch.nn.BatchNorm1d(6)
    gradients = []
    for norm, run in ((ours, lambda x: ours(x, valid, valid.sum())[valid]), (theirs, lambda x: theirs(x[valid]))):
        norm.weight.data += torch.linspace(-0.5, 0.5, 6)
        inputs = x.clone().requires_grad_()
        outputs = run(inputs)
        (outputs * torch.linspace(-1, 2, outputs.numel()).view_as(outputs)).sum().backward()
        gradients.append((outputs, inputs.grad, norm.weight.grad, norm.bias.grad))
    for mine, expected in zip(*gradients, strict=True):
        assert torch.allclose(mine, expected, atol=1e-4)
    merge_pending(ours)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5), name


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_does_what_the_norm_after_it_would(bias):
    """Against torch.nn.Conv1d and BatchNorm1d in evaluation, one after the other."""
    torch.manual_seed(0)
    conv, theirs, ours = (torch.nn.Conv1d(6, 6, 5, groups=6, bias=bias), torch.nn.BatchNorm1d(6), MaskedBatchNorm(6))
    for tensor in (theirs.weight.data, theirs.bias.data, theirs.running_mean, theirs.running_var):
        tensor.uniform_(0.5, 2.0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 20)
    found = torch.nn.functional.conv1d(x, *ours.folded(conv.weight, conv.bias), groups=6)
    assert torch.allclose(found, theirs.eval()(conv(x)), atol=1e-5)


def test_running_statistics_move_once_a_step_in_order():
    """A forward pass moves nothing; merging in another order gives other statistics, so the order is kept."""
    norm = MaskedBatchNorm(3)
    inputs = [torch.randn(2, 5, 3) + shift for shift in range(3)]
    for x in inputs:
        norm(x, torch.ones(2, 5, dtype=torch.bool), torch.tensor(10))
    assert torch.equal(norm.running_mean, torch.zeros(3))
    reverse = MaskedBatchNorm(3)
    reverse.merge(reversed(norm.pending))
    merge_pending(norm)
    assert norm.num_batches_tracked == 3
    assert not norm.pending
    assert not torch.allclose(norm.running_mean, reverse.running_mean)
