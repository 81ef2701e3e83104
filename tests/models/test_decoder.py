"""The cached steps equal teacher forcing, for rows of any prompt, any age and any encoder length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import small_model, small_whisper

MODELS = {"canary": small_model().decoder, "whisper": small_whisper().decoder}


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 30)), min_size=1, max_size=4),
    st.integers(1, 8),
    st.integers(1, 3),
    st.integers(0, 99),
)
@torch.no_grad()
def test_steps_equal_teacher_forcing(name, rows, steps, at_once, seed):
    decoder = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    frames = [size for _, size in rows]
    encoded = torch.randn(len(rows), max(frames), decoder.config.width, generator=generator)
    following = torch.randint(3, 50, (len(rows), steps * at_once), generator=generator)
    prompts = [torch.randint(3, 50, (size,), generator=generator).tolist() for size, _ in rows]
    cache = decoder.cache()
    logits = [decoder.admit(prompts, encoded, frames, cache)[:, None]]
    for tokens in following.split(at_once, dim=1):
        logits.append(decoder.step(tokens, cache))
    stepped = torch.cat(logits, dim=1)
    for row, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt + following[row].tolist()])
        alone = encoded[row : row + 1, : frames[row]]
        forced = decoder(tokens, alone, torch.tensor([frames[row]]))[0, len(prompt) - 1 :]
        assert (stepped[row] - forced).abs().max() < 1e-4


def test_future_tokens_and_padding_do_not_matter():
    decoder = MODELS["canary"]
    encoded, lengths = torch.randn(1, 20, 32), torch.tensor([12])
    tokens = torch.randint(3, 50, (1, 10))
    other, noisy = tokens.clone(), encoded.clone()
    other[:, 6:] = 7
    noisy[:, 12:] = 9.0
    expected = decoder(tokens, encoded, lengths)
    assert torch.allclose(decoder(other, noisy, lengths)[:, :6], expected[:, :6], atol=1e-5)
    assert not torch.allclose(decoder(other, encoded, lengths)[:, 6:], expected[:, 6:], atol=1e-3)
