"""Confidence of words: the measures on outcomes of known quality, and the matching of words with their outcomes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.evaluation.confidence import calibration, calibration_error, word_outcomes
from canter.evaluation.transcripts import ScoredTranscript
from canter.evaluation.wer import score_texts


def drawn(utterances: int, seed: int, distort=lambda p: p) -> list[tuple[np.ndarray, np.ndarray]]:
    """Words that are right with probability p, whose stated confidence is ``distort(p)``."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(utterances):
        p = random.beta(4, 1, size=10)
        found.append((distort(p), (random.random(10) < p).astype(float)))
    return found


def test_calibrated_confidences_need_no_fit():
    found = calibration(drawn(2000, 0))
    assert found is not None
    assert found.words == 20_000
    assert found.error < 0.02
    assert found.mean == pytest.approx(found.right, abs=0.01)
    assert (found.slope, found.offset) == (pytest.approx(1.0, abs=0.1), pytest.approx(0.0, abs=0.1))
    assert found.cross_entropy > 0
    assert 0.6 < found.auc < 0.9


def test_the_fit_undoes_overconfidence():
    """A distorted confidence orders words as before, so only the errors differ, until the fit."""
    plain, sure = calibration(drawn(2000, 1)), calibration(drawn(2000, 1, lambda p: p**0.3))
    assert plain is not None
    assert sure is not None
    assert sure.auc == pytest.approx(plain.auc)
    assert sure.error > 4 * plain.error
    assert sure.fitted_error < 0.02
    assert sure.cross_entropy < plain.cross_entropy


def test_nothing_can_be_said_of_right_words_only():
    found = calibration([(np.full(10, 0.9), np.ones(10))])
    assert found is not None
    assert math.isnan(found.auc)
    assert math.isnan(found.cross_entropy)
    assert found.error == pytest.approx(0.1)
    assert math.isfinite(found.slope)
    assert calibration([]) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=60))
def test_area_and_error_of_any_outcomes(pairs):
    confidence, right = (np.array(values, dtype=float) for values in zip(*pairs))
    found = calibration([(confidence, right)])
    assert found is not None
    assert 0 <= calibration_error(confidence, right, bins=1) <= found.error + 1e-12 <= 1 + 1e-12
    above = [float(a > b) + 0.5 * float(a == b) for a in confidence[right > 0] for b in confidence[right == 0]]
    if above:
        assert found.auc == pytest.approx(np.mean(above))
    else:
        assert math.isnan(found.auc)


def test_words_are_matched_with_their_outcomes():
    """Normalisation may divide or drop words; an utterance in which it depends on the context is left out."""
    texts = ["he won't go, mister smith", "well known", "nothing"]
    rows = [(("He", 0.9), ("won't", 0.8), ("go,", 0.7), ("Mr.", 0.6), ("Smyth.", 0.5)), (("well-known", 0.4),), ()]
    guesses = ["He won't go, Mr. Smyth.", "well-known", "nothing"]
    transcripts = [
        ScoredTranscript(text, guess, "en", str(n), n, words)
        for n, (text, guess, words) in enumerate(zip(texts, guesses, rows))
    ]
    score = score_texts(texts, guesses, ["en"] * 3)
    first, second = word_outcomes(transcripts, score.utterances, "standard")
    assert first[0].tolist() == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert first[1].tolist() == [1, 1, 1, 1, 0]
    assert (second[0].tolist(), second[1].tolist()) == ([0.4], [1])
