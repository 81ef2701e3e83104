"""Given texts: the CTC path is the best of all, and probabilities are those of a plain forward pass, in any batch."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.inference.engine.ctc import Spelling
from canter.inference.engine.engine import Engine
from canter.inference.engine.forced import ctc_spans, ctc_viterbi, symbols_of
from canter.inference.engine.requests import EngineConfig, Request
from canter.models.model import SpeechModel

from ..conftest import END, noises, small_model

PROMPT = (4, 5)
TEXTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 16], [], [20, 20, 21], [8, 30]]


def best_path(log_probs: np.ndarray, text: list[int], blank: int) -> tuple[float, list[int]] | None:
    """The most probable alignment of all that spell the text, and its states: None where there is none."""
    best = None
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        if [one for one, _ in itertools.groupby(path) if one != blank] == text:
            score = float(sum(log_probs[frame, one] for frame, one in enumerate(path)))
            best = max(best or (-math.inf, []), (score, list(path)))
    return best


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 3), max_size=4)), min_size=1, max_size=4),
    st.integers(0, 999),
    st.sampled_from([0, 2]),
)
def test_the_ctc_path_is_the_best_of_all(rows, seed, blank):
    """Rows of several lengths in one batch, with texts that repeat symbols, are empty, or too long."""
    texts = [[0 if symbol == blank else symbol for symbol in text] for _, text in rows]
    frames = [size for size, _ in rows]
    scores = torch.randn(len(rows), 5, 4, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    for row, (text, size, found) in enumerate(zip(texts, frames, ctc_viterbi(scores, frames, texts, blank))):
        expected = best_path(scores[row, :size].double().numpy(), text, blank)
        if expected is None:
            assert found is None
            continue
        assert found is not None
        assert found.logprob == pytest.approx(expected[0])
        runs = [(symbol, len(list(run))) for symbol, run in itertools.groupby(expected[1])]
        ends = list(itertools.accumulate(count for _, count in runs))
        spans = [(end - count, end) for (symbol, count), end in zip(runs, ends) if symbol != blank]
        assert list(zip(found.starts.tolist(), found.ends.tolist())) == spans


def test_a_long_text_in_time():
    """A path through an hour's symbols needs no more than a vector operation for each frame."""
    text = [1 + n % 3 for n in range(400)]
    scores = torch.randn(1, 3000, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    (found,) = ctc_viterbi(scores, [3000], [text])
    assert found is not None
    assert (found.ends > found.starts).all()
    assert (found.starts[1:] >= found.ends[:-1]).all()


def test_times_of_tokens_leave_out_separators():
    spelling = Spelling([(), (3, 1), (2,), (3,), (3, 1, 2)], separator=3)
    symbols, owners = symbols_of([1, 2, 0, 3, 4], spelling)
    assert (symbols, owners) == ([1, 2, 3, 3, 1, 2], [0, 1, 3, 4, 4, 4])
    scores = torch.full((1, 7, 4), -9.0)
    for frame, symbol in enumerate([1, 2, 3, 0, 3, 1, 2]):
        scores[0, frame, symbol] = -0.1
    (path,) = ctc_viterbi(scores, [7], [symbols])
    assert path is not None
    spans = ctc_spans(path, symbols, owners, 5, spelling, 0.5)
    assert spans == ((0.0, 0.5), (0.5, 1.0), None, None, (2.5, 3.5))


def requests(aligned: bool = False) -> list[Request]:
    return [Request(audio, PROMPT, aligned=aligned) for audio in noises(len(TEXTS))]


def test_probabilities_are_those_of_a_forward_pass(model: SpeechModel):
    for request, text, forced in zip(requests(), TEXTS, Engine(model, END).force(requests(), TEXTS)):
        audio = torch.from_numpy(request.audio)[None]
        with torch.inference_mode():
            encoded = model.encode(*model.features(audio, torch.tensor([audio.shape[1]])))
            tokens = torch.tensor([[*PROMPT, *text, END]])
            expected = model.log_probs(*encoded, tokens[:, :-1])[0].gather(1, tokens[0, 1:, None])[len(PROMPT) - 1 :, 0]
        assert forced.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert forced.spans == ()


@pytest.mark.parametrize("spelled", [False, True], ids=["attention", "ctc"])
def test_nothing_depends_on_the_batch(model: SpeechModel, spelled: bool):
    spelling = Spelling([(1 + token % 11,) for token in range(model.vocabulary)]) if spelled else None
    found = [
        Engine(model, END, EngineConfig(rows=rows, frames=frames)).force(requests(True), TEXTS, spelling)
        for rows, frames in ((1, 1), (8, 10_000))
    ]
    for one, other, text in zip(*found, TEXTS):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.spans == other.spans
        assert len(one.spans) == len(text)
        assert (one.ctc_logprob is None) == (not spelled)


def test_a_text_too_long_for_ctc_gets_times_from_attention(model: SpeechModel):
    spelling = Spelling([(1 + token % 11,) * 20 for token in range(model.vocabulary)])
    (forced,) = Engine(model, END).force(requests(True)[:1], [[7, 8, 9]], spelling)
    (expected,) = Engine(model, END).force(requests(True)[:1], [[7, 8, 9]])
    assert forced.ctc_logprob is None
    assert forced.spans == expected.spans


def test_a_text_too_long_for_the_decoder_is_refused():
    small = small_model(positions=8)
    engine = Engine(small, END)
    assert engine.force(requests()[:1], [[7] * 5])
    with pytest.raises(ValueError, match="at most 7"):
        engine.force(requests()[:1], [[7] * 6])
