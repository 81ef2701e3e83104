"""The decoder's cache in memory: room for rows to come costs nothing, and no row is lost when it grows."""

import pytest
import torch

from canter.models.cache import ALIGNED, DecoderCache, untouched_zeros

from .conftest import small_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 4), (1,)])
def test_untouched_zeros_are_zeros(shape, dtype):
    found = untouched_zeros(shape, torch.empty(0, dtype=dtype))
    assert found.shape == shape
    assert found.dtype == dtype
    assert not found.any()
    assert not found.numel() or found.data_ptr() % ALIGNED == 0
    found += 1
    assert found.sum() == found.numel()


def test_a_cache_that_grows_row_by_row_is_copied_few_times():
    """The rows keep their keys and values."""
    decoder = small_model().decoder
    cache = DecoderCache(decoder.config, like=decoder.embedding.weight)
    buffers = set()
    for row in range(40):
        cache.reserve(1, 24, before=4, after=1)
        cache.add([4], [24])
        cache.cross[:, :, row] = row + 1
        cache.own[:, :, row] = -row - 1
        buffers.add(cache.cross.data_ptr())
    assert len(buffers) <= 8
    assert cache.slots < 80
    for row in range(40):
        assert (cache.cross[:, :, row] == row + 1).all()
        assert (cache.own[:, :, row] == -row - 1).all()
    assert not cache.cross[:, :, 40:].any()
