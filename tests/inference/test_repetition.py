"""The guard keeps its rule, and steps in only where the rule would be broken."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from canter.inference.repetition import RepetitionGuard


def most_repeats(tokens: list[int], n: int) -> int:
    """How often an n-gram follows itself at most."""
    most = 0
    for start in range(len(tokens) - n + 1):
        gram, times = tokens[start : start + n], 0
        while tokens[start + n * (times + 1) : start + n * (times + 2)] == gram:
            times += 1
        most = max(most, times)
    return most


@given(st.lists(st.permutations(range(4)), max_size=60), st.integers(1, 3), st.integers(1, 4))
def test_rule(rankings, repeats, ngram):
    """Each step ranks four tokens; the best that keeps the rule is taken, all that break it are forbidden."""
    guard, beforehand = RepetitionGuard(ngram, repeats), RepetitionGuard(ngram, repeats)
    guard.add(1)
    beforehand.add(1)
    tokens: list[int] = []
    for ranking in rankings:
        allowed = [
            token
            for token in ranking
            if all(most_repeats([*tokens, token], n) <= repeats for n in range(1, ngram + 1))
        ]
        logits = torch.zeros(1, 4)
        logits[0, list(ranking)] = torch.tensor([4.0, 3.0, 2.0, 1.0])
        others = logits.clone()
        beforehand.forbid(others)
        assert {token for token in range(4) if others[0, token] > 0} == set(allowed)
        beforehand.took([allowed[0]])
        tokens += guard.choose(logits)
        assert tokens[-1] == allowed[0]


def test_off():
    for guard in (RepetitionGuard(8, 0), RepetitionGuard(0, 3)):
        guard.add(1)
        assert [guard.choose(torch.tensor([[0.0, 1.0]]))[0] for _ in range(20)] == [1] * 20


def test_rows_are_independent_and_may_leave():
    guard = RepetitionGuard(2, 1)
    guard.add(2)
    assert guard.choose(torch.tensor([[0.0, 1.0], [1.0, 0.0]])) == [1, 0]
    guard.add(1)
    assert guard.choose(torch.tensor([[0.0, 1.0]]), first=2) == [1]
    guard.remove([0])  # the newest row takes slot 0
    assert guard.choose(torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == [1, 1]
    assert guard.choose(torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == [0, 1]
