"""The guard ends rows that run in circles for longer than their audio lasts, and changes no token of any row."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given

from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request
from canter.inference.engine.search import LEAST_REPEATS, Greedy, RepetitionGuard, Row, Rules

from ..conftest import END, noises, small_model

FIRST = 5  # the least id that is no special token


def said(
    tokens: list[int], limit: int = 10**6, *, allowed: float = 20.0, repeats: int = 3, guarded: bool = True
) -> list[int]:
    """The tokens that greedy search keeps of a model that writes ``tokens``, then the end."""
    rules = Rules({}, END, torch.device("cpu"))
    search = Greedy(rules, RepetitionGuard(32, repeats))
    row = Row(limit, allowed=allowed if guarded else float("inf"))
    search.add([row])
    for number, token in enumerate([*tokens, END]):
        logits = torch.zeros(1, 1, max([*tokens, END]) + 1)
        logits[0, 0, token] = 1.0
        ended = search.choose(logits, 0, opening=not number).ended
        if ended:
            break
    return row.tokens


words = st.lists(st.integers(FIRST, FIRST + 3), max_size=4)


@given(
    words,
    st.lists(st.integers(FIRST, FIRST + 3), min_size=1, max_size=5),
    st.integers(0, 40),
    words,
    st.integers(1, 4),
    st.integers(5, 150),
    st.floats(1.0, 100.0),
)
@example([], [FIRST], 40, [], 1, 30, 20.0)
def test_the_text_is_that_without_a_guard_or_its_beginning(before, cycle, times, after, repeats, limit, allowed):
    tokens = before + cycle * times + after
    plain = said(tokens, limit, guarded=False)
    found = said(tokens, limit, allowed=allowed, repeats=repeats)
    assert found == plain[: len(found)]
    if len(plain) < min(limit, allowed):  # the audio has time for all of it
        assert found == plain
    if len(found) < len(plain):  # what is left out repeats what is kept
        assert any(
            found[-n:] * (repeats + 2) == plain[len(found) - n * (repeats + 1) : len(found) + n] for n in range(1, 33)
        )


@pytest.mark.parametrize(
    ("cycle", "times", "allowed"),
    [(1, 8, 12.5 * 6), (2, 9, 12.5 * 7.5 + 10), (1, 16, 12.5 * 4), (4, 12, 12.5 * 8)],
    ids=["digits", "No. No. No.", "an account number of equal digits", "ha ha ha ha"],
)
def test_people_may_repeat_themselves(cycle, times, allowed):
    """A repetition that fits the time is kept: digits, laughter, "No" nine times in seven seconds."""
    tokens = [*range(FIRST, FIRST + cycle)] * times + [FIRST + 9]
    assert said(tokens, round(allowed), allowed=allowed) == tokens


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_circles_end_long_before_the_limit(size):
    cycle = [*range(FIRST, FIRST + size)]
    opening = [FIRST + 40, FIRST + 41]
    assert said(opening + cycle * 200, 5000, allowed=50.0, repeats=3) == opening + cycle * 4


def test_a_row_that_reaches_its_limit_in_circles_is_cut():
    opening = [*range(FIRST, FIRST + 20)]
    assert said(opening + [FIRST] * 30, 40, allowed=40.0, repeats=2) == opening + [FIRST] * 3
    few = opening + [FIRST] * LEAST_REPEATS + opening
    assert said(few, 40, allowed=40.0) == few[:40]


@pytest.mark.parametrize("sizes", [(8, 0), (0, 3)])
def test_off(sizes):
    guard = RepetitionGuard(*sizes)
    assert [guard.kept([7] * count, 1.0, at_limit=False) for count in range(50)] == [None] * 50
    assert guard.kept([7] * 50, 1.0, at_limit=True) == 50


@given(st.lists(st.integers(0, 2), max_size=60), st.floats(0, 60), st.booleans(), st.integers(1, 10))
def test_what_is_kept(tokens, allowed, at_limit, repeats):
    """Compare with a search for the longest run of every n-gram."""
    runs = {}
    for size in range(1, 5):
        run = 0
        while run + size < len(tokens) and tokens[-1 - run] == tokens[-1 - run - size]:
            run += 1
        if run >= LEAST_REPEATS * size:
            runs[size] = run + size
    expected = len(tokens) if at_limit else None
    if any(span > allowed for span in runs.values()) or (at_limit and len(tokens) >= allowed and runs):
        size = min(runs)
        expected = len(tokens) - max(0, runs[size] - size * (repeats + 1))
    assert RepetitionGuard(4, repeats).kept(tokens, allowed, at_limit) == expected


@pytest.fixture(scope="module")
def circling():
    """A model without an end: all its hypotheses reach their limits, most of them in circles."""
    model = small_model(seed=3)
    with torch.no_grad():
        model.decoder.head_bias[END] = -100.0
    return model


def test_an_engine_gives_beginnings_and_only_where_it_guards(circling):
    requests = [Request(clip, [5, 7]) for clip in noises(12, longest=4.0)]
    found = {
        name: Engine(circling, END, EngineConfig(max_repeats=repeats)).decode(
            [replace(one, guarded=guarded) for one in requests]
        )
        for name, repeats, guarded in (("on", 2, True), ("off", 0, True), ("unguarded", 2, False))
    }
    for on, off, unguarded in zip(*(found[name] for name in ("on", "off", "unguarded")), strict=True):
        assert on.tokens == off.tokens[: len(on.tokens)]
        assert unguarded.tokens == off.tokens
        assert not on.finished
    assert np.mean([len(on.tokens) < len(off.tokens) for on, off in zip(found["on"], found["off"])]) > 0.2
