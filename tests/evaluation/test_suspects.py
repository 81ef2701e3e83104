"""Suspicion follows each of the three measures, and a language is judged by its own rows."""

import math

import numpy as np
import pytest

from canter.evaluation.suspects import IMPROBABLE, LANGUAGE_ROWS, RATE, suspicions
from canter.inference.align import TextScore


def score(logprob: float = -0.5, end: float = -0.1, characters: int = 150, seconds: float = 10.0) -> TextScore:
    return TextScore(logprob, end, 30, characters, seconds)


def usual(count: int, middle: float = -0.5, seed: int = 0) -> list[TextScore]:
    chance = np.random.default_rng(seed)
    return [
        score(middle + 0.2 * chance.normal(), characters=round(150 * math.exp(0.2 * chance.normal())))
        for _ in range(count)
    ]


def test_usual_rows_are_rarely_suspects():
    found = suspicions(usual(500), ["en"] * 500)
    assert np.mean([one.is_suspect for one in found]) < 0.01


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (score(-3.0), "improbable"),
        (score(end=math.log(0.001)), "unfinished"),
        (score(characters=1500), "rate"),
        (score(characters=5), "rate"),
        (score(characters=0, seconds=0.0), "rate"),
    ],
)
def test_each_measure_is_a_reason(bad, reason):
    found = suspicions([*usual(50), bad], [None] * 51)
    assert found[-1].is_suspect
    assert found[-1].reason == reason
    assert found[-1].value == max(one.value for one in found)


def test_the_limit_is_a_suspicion_of_one():
    rows = [score(-0.5 + 0.1 * step) for step in (-2, -1, 0, 1, 2)] * 10
    deviation = 1.4826 * 0.1
    at_limit = score(-0.5 - IMPROBABLE * deviation)
    assert suspicions([*rows, at_limit], ["en"] * 51)[-1].value == pytest.approx(1.0)
    assert suspicions([score(end=math.log(0.01))], ["en"])[0].value == pytest.approx(1.0)


def test_a_language_is_judged_by_its_own_rows():
    rows = [*usual(60), *usual(LANGUAGE_ROWS, -3.0, seed=1)]
    own = suspicions(rows, ["en"] * 60 + ["de"] * LANGUAGE_ROWS)
    assert sum(one.is_suspect for one in own[60:]) <= 1
    few = suspicions(rows[:-1], ["en"] * 60 + ["de"] * (LANGUAGE_ROWS - 1))
    assert sum(one.is_suspect for one in few[60:]) > LANGUAGE_ROWS - 3


def test_rows_that_score_alike_are_no_suspects():
    found = suspicions([score()] * 10 + [score(-0.51)], ["en"] * 11)
    assert not any(one.is_suspect for one in found)
    assert suspicions([], []) == []
    assert RATE > IMPROBABLE
