import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.corpus.index import LengthIndex
from canter.planning import Budget, Plan, Polynomial
from canter.planning.groups import RATIO, packed_terms
from canter.planning.sampler import Stepper
from canter.planning.strategies import Packed

from .conftest import lengths
from .resuming import assert_same

UTTERANCES = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 400)), min_size=1, max_size=80)


def terms_by_hand(rows: list[tuple[int, int]]) -> list[int]:
    groups: list[list[tuple[int, int]]] = []
    for t, u in sorted(rows, reverse=True):
        if groups and t >= RATIO * groups[-1][0][0]:
            groups[-1].append((t, u))
        else:
            groups.append([(t, u)])
    found = [sum(t for t, _ in rows), 0, sum(u for _, u in rows), 0, 0]
    for group in groups:
        longest, most = max(t for t, _ in group), max(u for _, u in group)
        found[1] += len(group) * longest * longest
        found[3] += len(group) * longest * most
        found[4] += len(group) * most * most
    return found


@given(UTTERANCES)
def test_terms_are_sums_over_utterances_and_groups(rows):
    frames, tokens = np.array(rows, np.int64).T
    terms = packed_terms(frames, tokens)
    assert terms.tolist() == terms_by_hand(rows)
    budget = Budget(1e6, Polynomial(1, 2, 3, 4, 5), Polynomial(6, 7, 8, 9, 10), fixed_bytes=11, fixed_seconds=12)
    t, tt, u, tu, uu = terms.tolist()
    assert budget.bytes_of_terms(terms) == 11 + t + 2 * tt + 3 * u + 4 * tu + 5 * uu
    assert budget.seconds_of_terms(terms) == 12 + 6 * t + 7 * tt + 8 * u + 9 * tu + 10 * uu
    assert budget.bytes_of_terms(np.stack([terms, terms])).tolist() == [budget.bytes_of_terms(terms)] * 2
    alone = packed_terms(frames[:1], tokens[:1])
    assert budget.bytes_of_terms(alone) == budget.bytes(1, rows[0][0], rows[0][1])


def test_the_table_holds_the_terms_of_each_micro_batch(budget):
    index = lengths(700)
    plan = Plan(index, budget, "packed", micro_batches_per_step=2, window=300)
    table = plan.table()
    batches = [rows for step in plan for rows in step]
    by_hand = [
        terms_by_hand(list(zip(budget.frames(index.seconds[rows]).tolist(), index.tokens[rows].tolist())))
        for rows in batches
    ]
    assert table.terms is not None
    assert table.terms.tolist() == by_hand
    assert_same(table.bytes(budget), plan.predicted_bytes(batches, budget))
    seconds = [plan.step_seconds(w, s) for w in range(plan.windows.count or 0) for s in range(len(plan.cut(w)))]
    assert_same(table.seconds(budget), np.concatenate(seconds))
    step = next(Stepper(plan).draw())
    used = budget.bytes_of_terms(np.array(by_hand[: len(step.rows)])) / budget.limit_bytes
    assert step.filled == pytest.approx(used.mean())


def real_lengths() -> LengthIndex:
    """Return the lengths of LibriSpeech's dev and test sets where CANTER_SHARED has them, or else drawn ones."""
    path = Path(os.environ.get("CANTER_SHARED", "")) / "data/lengths/librispeech_devtest_en.parquet"
    if not path.is_file():
        return lengths(6000)
    table = pq.read_table(path)
    return LengthIndex(table["duration"].to_numpy(), table["tokens"].to_numpy())


def test_only_groups_of_like_length_are_padded(budget):
    figures = Plan(real_lengths(), budget, "packed", micro_batches_per_step=8).figures()
    assert figures.padded_audio == figures.padded_tokens == 0
    assert 0 < figures.padded_compute < 0.03
    assert figures.over == 0


def test_a_grid_counts_as_padding(budget):
    index = lengths(500)
    figures = Plan(index, budget, "packed", grid=(8, 4)).figures()
    frames = budget.frames(index.seconds)
    assert figures.padded_audio == pytest.approx(1 - frames.sum() / (-(-frames // 8) * 8).sum())


@pytest.mark.parametrize("per_step", [1, 8])
def test_packed_fills_the_memory_and_ranks_hardly_wait(per_step, budget):
    plan = Plan(lengths(40_000), budget, "packed", micro_batches_per_step=per_step)
    figures = plan.figures()
    assert figures.memory_filled > 0.965
    assert figures.waiting < 1.003
    assert figures.over == 0
    assert figures.micro_batches % per_step == 0
    assert figures.step_mixing > (0.7 if per_step > 1 else -1)
    assert plan.limits().by == "memory"


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(60, 400), st.integers(1, 4))
def test_there_are_hardly_more_micro_batches_than_the_memory_requires(seconds, limit, per_step):
    index = LengthIndex(np.array(seconds, float), np.zeros(len(seconds), int))
    budget = Budget(float(limit), Polynomial(T=1.0), frame_seconds=1.0)
    plan = Plan(index, budget, "packed", micro_batches_per_step=per_step, min_steps=1)
    least = sum(seconds) / (limit - max(seconds) + 1)  # each but the last leaves less than the next one takes
    assert plan.figures().micro_batches <= per_step * (least // per_step + 2)


def test_where_min_steps_makes_them_smaller_micro_batches_stay_even(budget):
    plan = Plan(lengths(3000), budget, Packed(), micro_batches_per_step=4, min_steps=120)
    figures, seconds = plan.figures(), plan.table().seconds(budget)
    assert figures.steps == 120
    assert figures.micro_batches == 478
    assert np.quantile(seconds, 0.95) < 1.5 * np.quantile(seconds, 0.05)


def test_memory_that_ran_out_lowers_the_limit_of_packed_batches(budget):
    stepper = Stepper(Plan(lengths(900), budget, "packed", window=300))
    step = next(stepper.draw())
    used = step.plan.predicted_bytes(step.rows, budget)
    limit = stepper.tighten(step, 0)
    assert limit == pytest.approx(budget.fixed_bytes + 0.9 * (used[0] - budget.fixed_bytes))
    later = stepper.plan_of(0).batch_table(1)
    assert later.bytes(budget).max() <= limit


def test_one_utterance_that_fits_alone_is_a_micro_batch(budget):
    index = LengthIndex(np.array([20.0, 1.0, 20.0]), np.array([10, 10, 10]))
    frames = budget.frames(20.0)
    small = replace(budget, limit_bytes=budget.bytes(1, frames, 10) * (1 + 1e-9))
    assert sorted(len(rows) for step in Plan(index, small, "packed") for rows in step) == [1, 1, 1]
