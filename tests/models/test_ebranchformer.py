"""Silence that pads all utterances is computed once, and changes nothing."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.models.ebranchformer import ConvolutionalSubsampling, EBranchformerConfig


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 3), st.integers(15, 120), st.integers(0, 120), st.integers(0, 99))
def test_padding_of_silence_is_convolved_once(factor, rows, frames, heard, seed):
    torch.manual_seed(seed)
    layer = ConvolutionalSubsampling(EBranchformerConfig(width=8, heads=2, mels=20, subsampling=factor))
    features = torch.randn(rows, frames, 20)
    features[:, heard:] = torch.randn(rows, 1, 20)
    with torch.no_grad():
        found, expected = layer(features), layer.convolve(features)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)


def test_only_what_is_heard_is_convolved():
    layer = ConvolutionalSubsampling(EBranchformerConfig(width=8, heads=2, mels=20))
    seen = []
    layer.conv[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[2]))
    features = torch.randn(2, 3000, 20)
    features[:, 500:] = -1.0
    with torch.no_grad():
        layer(features)
    assert seen == [63 * 8 + 15]  # 500 frames of speech end in the 63rd output
