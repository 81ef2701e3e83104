import numpy as np
import pytest

from canter.errors import BudgetError
from canter.planning import Budget
from canter.planning.strategies import Bucket2D
from canter.tuning.probe import Prober
from canter.tuning.search import GAP, budget_of, search

from .conftest import small_step


def bins_of(index, rows=6, columns=2):
    return Bucket2D(rows, columns).bins(index, Budget.from_batch_seconds(1e9))


def test_every_bucket_is_filled_to_within_the_gap(known_costs, formula, index):
    limit = formula.bytes(30, 100, 40)
    prober, bins = Prober(known_costs, limit), bins_of(index)
    found = search(prober, bins)
    free = limit - prober.step.state_bytes
    for (seconds, tokens), size in zip(bins.edges, found.sizes, strict=True):
        frames = int(np.ceil(seconds / 0.08))
        assert formula.bytes(size, frames, tokens) <= free
        larger = max(int(size) + 1, int(np.ceil(size / (1 - GAP))) + 1)
        assert formula.bytes(larger, frames, tokens) > free
    assert found.out_of_memory >= len(bins)
    assert found.steps == len(formula.ran)
    assert formula.ran[1][1] == max(t for _, t, _ in formula.ran)  # after the warm-up, longest first


def test_the_neighbours_answer_saves_steps(known_costs, formula, index):
    limit, bins = formula.bytes(30, 100, 40), bins_of(index)
    near = search(Prober(known_costs, limit), bins).steps
    far = search(Prober(known_costs, limit), bins, first=4096).steps
    assert near < far < 2 * near  # only the first bucket pays


def test_a_search_gives_a_budget_too(known_costs, formula, index):
    prober, bins = Prober(known_costs, formula.bytes(30, 100, 40)), bins_of(index)
    monkey = prober._measure

    def timed(shape, expected):
        return monkey(shape, 0.0 if formula.bytes(*shape) < prober.limit_bytes else None)

    prober._measure = timed
    budget = budget_of(prober, search(prober, bins))
    assert len(budget.measured_on["buckets"]) == len(bins)
    assert abs(budget.bytes(10, 60, 30) / formula.bytes(10, 60, 30) - 1) < 0.02


def test_nothing_fits(known_costs, formula, index):
    limit = formula.bytes(1, 5, 3) + 1000
    with pytest.raises(BudgetError, match="not even one utterance"):
        search(Prober(known_costs, limit), bins_of(index))


def test_a_capped_search_of_a_real_model(model, index):
    step = small_step(model)
    step(8, 100, 40)  # loads libraries, which would count as memory of the first bucket
    prober = Prober(step, 60e6)
    found = search(prober, bins_of(index, 2, 1), first=4)
    assert found.out_of_memory >= 1
    assert (np.diff(found.sizes) <= 0).all()
    assert found.sizes.max() > 1
