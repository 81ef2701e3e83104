"""A packed micro-batch gives the losses, gradients and statistics of the padded one."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.models.batch import Batch, SoftTargets, packing_of_tokens
from canter.models.ebranchformer import EBranchformerConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import EspnetFeatureConfig
from canter.models.norm import MaskedBatchNorm, frozen_statistics
from canter.models.packing import Packing
from canter.planning.groups import RATIO

from .conftest import small_model, small_w2v_bert, small_whisper
from .test_invariance import make_batch

sizes = st.lists(st.integers(1600, 20000), min_size=1, max_size=8)
seeds = st.integers(0, 1000)


def small_ebranchformer():
    encoder = EBranchformerConfig(
        layers=2, width=24, heads=2, feedforward=48, cgmlp_units=48, mels=32, kernel_size=5, merge_kernel_size=3
    )
    return small_model(features=EspnetFeatureConfig(mels=32, pad_seconds=0.0), encoder=encoder)


def layer_normed():
    encoder = FastConformerConfig(
        layers=2, width=24, heads=2, feedforward=48, subsampling_channels=8, mels=32, norm="layer", xscaling=True
    )
    return small_model(encoder=encoder)


MODELS = [small_model, layer_normed, small_ebranchformer, small_whisper]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param().train()


def result_of(model, loss):
    """Return the sums of the loss, its gradient and the statistics of the norms."""
    model.zero_grad()
    total = loss.attention + loss.ctc + (0.0 if loss.distillation is None else loss.distillation)
    total.backward()
    gradient = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    norms = [module for module in model.modules() if isinstance(module, MaskedBatchNorm)]
    statistics = [torch.stack(one).double() for norm in norms for one in norm.pending if one is not None]
    for norm in norms:
        norm.pending.clear()
    counts = int(loss.attention_count), int(loss.ctc_count)
    return loss.attention.item(), loss.ctc.item(), counts, gradient, statistics


def check_same(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-6)
    assert found[2] == expected[2]
    assert found[3].keys() == expected[3].keys()
    error = sum(((found[3][name] - one) ** 2).sum() for name, one in expected[3].items()).sqrt()
    assert error <= tolerance * sum((one**2).sum() for one in expected[3].values()).sqrt()
    assert len(found[4]) == len(expected[4])
    for one, other in zip(found[4], expected[4]):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(sizes, seeds, st.booleans())
def test_equals_the_padded_batch(model, sizes, seed, ctc_only):
    """The gradient may differ by rounding: as much as that of the same utterances in another order."""
    batch = make_batch(sizes, 3000, seed, junk=7.0)
    ctc_only = ctc_only and model.ctc is not None
    expected = result_of(model, model.loss(batch, attention=not ctc_only, label_smoothing=0.1))
    other = model.loss(batch.take(torch.arange(len(sizes)).flip(0)), attention=not ctc_only, label_smoothing=0.1)
    reordered = result_of(model, other)
    rounding = sum(((reordered[3][k] - one) ** 2).sum() for k, one in expected[3].items()).sqrt()
    rounding /= sum((one**2).sum() for one in expected[3].values()).sqrt() + 1e-30
    groups = batch.by_length()
    found = result_of(model, model.packed_loss(groups, attention=not ctc_only, label_smoothing=0.1))
    check_same(found, expected, max(3e-5, 8 * float(rounding)))


def test_distillation_and_recomputed_layers(model):
    batch = make_batch([12000, 5000, 11500, 3000, 4800], 0, seed=5)
    with frozen_statistics():
        teacher = SoftTargets(1.3 * model.token_logits(batch).detach() + 0.3, 2.0)
    expected = result_of(model, model.loss(batch, teacher=teacher))
    groups = batch.by_length()
    order = batch.audio_lengths.argsort(descending=True, stable=True)
    rows = dict(zip(order.tolist(), teacher.logits[order]))
    parts, start = [], 0
    for group in groups:
        some = order[start : start + len(group.rows)].tolist()
        parts.append(torch.stack([rows[row][: group.tokens.shape[1] - 1] for row in some]))
        start += len(some)
    packed = SoftTargets(packing_of_tokens(groups).pack(parts), 2.0)
    model.recompute_activations()
    try:
        found = result_of(model, model.packed_loss(groups, teacher=packed))
    finally:
        model.recompute_activations(False)
    check_same(found, expected, 1e-5)


def test_each_utterance_is_its_own(model):
    """What an utterance is encoded to depends on no other, where statistics are fixed."""
    model.eval()
    try:
        batch = make_batch([12000, 5000, 11500, 3000], 0, seed=6)
        groups = batch.by_length()
        with torch.no_grad(), frozen_statistics():
            encoded, packing = model.encode_packed([model.features(one.audio, one.audio_lengths) for one in groups])
            each = [row[:size] for part, sizes in zip(packing.split(encoded), packing.lengths)
                    for row, size in zip(part, sizes.tolist())]  # fmt: skip
            for size, found in zip([12000, 11500, 5000, 3000], each):
                row = batch.take((batch.audio_lengths == size).nonzero()[:, 0])
                alone, _ = model.encode(*model.features(row.audio, row.audio_lengths))
                assert torch.allclose(found, alone[0], atol=1e-5)
    finally:
        model.train()


def test_groups_are_of_like_length():
    sizes = [16000, 15000, 14000, 9000, 8000, 7700, 2000, 15500]
    groups = make_batch(sizes, 500, seed=0).by_length()
    assert sorted(size for one in groups for size in one.audio_lengths.tolist()) == sorted(sizes)
    for one in groups:
        assert one.audio.shape[1] == one.audio_lengths.max()
        assert one.audio_lengths.min() >= RATIO * one.audio_lengths.max()
    firsts = [int(one.audio_lengths.max()) for one in groups]
    assert firsts == sorted(firsts, reverse=True)
    assert all(second < RATIO * first for first, second in pairwise(firsts))
    assert isinstance(groups[0], Batch)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 3), seeds)
def test_packing_and_back(groups, gap, seed):
    """Every position has one packed place; gradients return to where the values came from, and none to padding."""
    torch.manual_seed(seed)
    packing = Packing([torch.tensor(one) for one in groups], [max(one) + seed % 2 for one in groups])
    padded = [torch.randn(len(one), size, 3) for one, size in zip(groups, packing.sizes)]
    own = [row[:n] for part, some in zip(padded, groups) for row, n in zip(part, some)]
    for part in padded:
        part.requires_grad_()
    packed = packing.pack(padded)
    assert torch.equal(packed[0], torch.cat(own))
    assert len(packing) == packed.shape[1] == sum(map(sum, groups))
    assert [valid.sum(1).tolist() for valid in packing.valid] == groups
    assert torch.equal(packing.pack(packing.split(packed)), packed)
    spread, within = packing.spread(packed, gap)
    assert spread.shape[1] == len(packing) + gap * (sum(map(len, groups)) - 1)
    assert torch.equal(spread[within], packed[0])
    assert torch.equal(packing.gather(spread, gap), packed)
    weights = torch.randn_like(packed)
    (packing.gather(spread, gap) * weights).sum().backward()
    assert torch.equal(torch.cat([part.grad[valid] for part, valid in zip(padded, packing.valid)]), weights[0])
    assert all((part.grad[~valid] == 0).all() for part, valid in zip(padded, packing.valid))


def test_too_many_tokens_are_refused():
    batch = make_batch([5000, 4000], 0, seed=1)
    long = replace(batch, tokens=batch.tokens.repeat(1, 12), token_lengths=batch.token_lengths * 12)
    with pytest.raises(ValueError, match="more than the decoder's 64 positions"):
        small_model().train().packed_loss(long.by_length())


def test_models_say_whether_they_can():
    assert all("packing" in make().supports for make in MODELS)
    assert "packing" not in small_w2v_bert().supports
