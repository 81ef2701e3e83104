"""Measure how well the confidence of words says whether they are right.

The measures are the expected calibration error (Guo et al., 2017), the normalised cross-entropy of NIST's ASR
evaluations, and the area under the ROC curve. N: words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from canter.evaluation.normalize import Normalization, normalizer
from canter.evaluation.transcripts import ScoredTranscript
from canter.evaluation.wer import ScoredUtterance

BINS = 15
"""Number of bins of the calibration error, of about equally many words each."""
FOLDS = 5
EDGE = 1e-6  # least distance of a confidence from 0 and 1, whose logits are infinite
STEPS = 50  # of Newton's method, which takes about ten


@dataclass(frozen=True)
class Calibration:
    """Quality of the confidence of words."""

    words: int
    """Number of words with a confidence, of utterances whose words could be matched."""
    right: float
    """Fraction of words that are right."""
    mean: float
    """Mean confidence."""
    auc: float
    """Probability that a right word has a higher confidence than a wrong one; NaN without one of both kinds."""
    error: float
    """Expected calibration error: mean distance between confidence and fraction of right words, in bins."""
    cross_entropy: float
    """Normalised cross-entropy: 1 is perfect, 0 no better than the fraction of right words for each; NaN as above."""
    slope: float
    """Slope of the logistic fit, by which a word is right with probability
    1 / (1 + exp(-(slope x logit(confidence) + offset)))."""
    offset: float
    fitted_error: float
    """Calibration error after the fit, which was made on other utterances (cross-validation)."""


def word_outcomes(
    transcripts: Sequence[ScoredTranscript], utterances: Sequence[ScoredUtterance], normalize: Normalization
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the confidences of words and 1 for those that are right, float64 arrays (N,), of each utterance.

    Words are right where the alignment with the reference says so, all their parts after normalisation included.
    Utterances without confidences, and those whose words are normalised otherwise in context, are left out.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for one in utterances:
        transcript = transcripts[one.index]
        clean = normalizer(normalize, transcript.lang)
        parts = [clean(text).split() for text, _ in transcript.words]
        guesses = [(guess, operation == "equal") for operation, _, guess in one.alignment if guess]
        if not transcript.words or [part for word in parts for part in word] != [guess for guess, _ in guesses]:
            continue
        outcomes = iter(right for _, right in guesses)
        scored = [
            (confidence, [next(outcomes) for _ in word]) for (_, confidence), word in zip(transcript.words, parts)
        ]
        pairs = [(confidence, all(rights)) for confidence, rights in scored if rights]
        if pairs:
            values = np.array(pairs, dtype=np.float64)
            found.append((values[:, 0], values[:, 1]))
    return found


def calibration(outcomes: Sequence[tuple[np.ndarray, np.ndarray]]) -> Calibration | None:
    """Return the quality of confidences, given by utterance as by `word_outcomes`; None without any."""
    if not outcomes:
        return None
    confidence, right = (np.concatenate(values) for values in zip(*outcomes))
    slope, offset = _logistic_fit(confidence, right)
    fitted = np.concatenate(list(_cross_validated(outcomes)))
    order = [place for fold in range(FOLDS) for place in range(fold, len(outcomes), FOLDS)]
    fitted_right = np.concatenate([outcomes[place][1] for place in order])
    return Calibration(
        len(right),
        float(right.mean()),
        float(confidence.mean()),
        _auc(confidence, right),
        calibration_error(confidence, right),
        _normalised_cross_entropy(confidence, right),
        slope,
        offset,
        calibration_error(fitted, fitted_right),
    )


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error of confidences (N,), with 1 in ``right`` (N,) for words that are right."""
    order = np.argsort(confidence, kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    gaps = [len(group) * abs(confidence[group].mean() - right[group].mean()) for group in groups]
    return float(sum(gaps) / len(order))


def _auc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the area under the ROC curve, from the mean rank of right words; ties count half."""
    positive = right > 0
    pairs = positive.sum() * (~positive).sum()
    if not pairs:
        return float("nan")
    _, inverse, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2) / pairs)


def _normalised_cross_entropy(confidence: np.ndarray, right: np.ndarray) -> float:
    p, rate = np.clip(confidence, EDGE, 1 - EDGE), right.mean()
    if rate in (0.0, 1.0):
        return float("nan")
    before = -(rate * np.log2(rate) + (1 - rate) * np.log2(1 - rate))
    after = -np.mean(np.where(right > 0, np.log2(p), np.log2(1 - p)))
    return float((before - after) / before)


def _logits(confidence: np.ndarray) -> np.ndarray:
    p = np.clip(confidence, EDGE, 1 - EDGE)
    return np.log(p / (1 - p))


def _logistic_fit(confidence: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Return slope and offset of the logistic regression of ``right`` on the logits of confidences (Platt, 1999).

    The targets are Platt's, so that words which are all right, or all wrong, have a finite fit.
    """
    x = np.stack([_logits(confidence), np.ones_like(confidence)], axis=1)
    hits = right.sum()
    target = np.where(right > 0, (hits + 1) / (hits + 2), 1 / (len(right) - hits + 2))
    weights = np.array([1.0, 0.0])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-x @ weights))
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, x.T @ (target - p))
        weights = weights + np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-9:
            break
    return float(weights[0]), float(weights[1])


def _cross_validated(outcomes: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """Yield the fitted confidences of each fold of utterances, by the fit on the others."""
    for fold in range(FOLDS):
        here, others = outcomes[fold::FOLDS], [one for n, one in enumerate(outcomes) if n % FOLDS != fold]
        if not here:
            continue
        slope, offset = _logistic_fit(*(np.concatenate(v) for v in zip(*(others or here))))
        x = np.concatenate([confidence for confidence, _ in here])
        yield 1 / (1 + np.exp(-(slope * _logits(x) + offset)))
