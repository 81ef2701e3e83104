import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.corpus.index import LengthIndex
from canter.errors import PlanError
from canter.integrations.nemo import bucketing_config
from canter.planning import STRATEGIES, Budget, Plan, Polynomial, strategy
from canter.planning.bins import (
    describe_limits,
    equal_sums,
    estimate_bins,
    optimal_bins,
    outlier_limits,
    resolve_limits,
    tokens_per_second_bound,
)
from canter.planning.lengths import Lengths, rate_limit_at, sample
from canter.planning.metrics import mixing_pool
from canter.planning.strategies import Balanced, Bucket1D, Bucket2D, Duration, Packed, Random
from canter.planning.strategies.balanced import even_accumulation, folded, without_drift
from canter.planning.strategies.base import maxima
from canter.planning.strategies.strips import strips

from .conftest import lengths
from .resuming import assert_same

KINDS = [Random(), Random(7), Duration(), Bucket1D(5), Bucket2D(5, 2), Bucket2D(4, 2, synchronised=False),
         Bucket2D(4, 3, optimal=True), Balanced(), Balanced(0), Balanced(2.5),
         Balanced(1.5, mix_steps=True), Packed()]  # fmt: skip
CANARY = Budget(
    limit_bytes=25e9,
    memory=Polynomial(T=2.3e6, TT=2300, U=1.5e6, TU=1500, UU=1500),
    time=Polynomial(T=1.7e-5, TT=1.8e-9, U=8.6e-6, TU=1.2e-9, UU=6e-10),
    fixed_seconds=0.04,
)


def commands_read_speech_and_talks(seed: int = 0) -> LengthIndex:
    rng = np.random.default_rng(seed)
    seconds = np.concatenate(
        [rng.uniform(1, 5, 15_000), 10 + 6.5 * rng.beta(2.2, 1.1, 25_000), 16 + 24 * rng.beta(1, 1.8, 10_000)]
    )
    return LengthIndex(seconds, (seconds * 3.2 * np.exp(rng.normal(0, 0.35, len(seconds))) + 8).astype(np.int64))


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.floats(0.05, 40), st.integers(0, 400)), min_size=1, max_size=120),
    st.sampled_from(KINDS),
    st.integers(1, 9),
    st.integers(1, 200),
    st.integers(100, 3000),
    st.booleans(),
)
def test_every_utterance_that_fits_is_used_once_and_no_batch_is_over(rows, kind, per_step, window, limit, gridded):
    index = LengthIndex(*np.array(rows).T[:1], np.array([u for _, u in rows]))
    budget = Budget(float(limit), Polynomial(T=1.0, TT=1e-4, U=0.3, TU=1e-3), fixed_bytes=50.0)
    plan = Plan(index, budget, kind, window=window, micro_batches_per_step=per_step, grid=(8, 4) if gridded else (1, 1))
    steps = list(plan)
    used = [row for step in steps for batch in step for row in batch]
    out = dict(plan.left_out())
    assert sorted([*used, *out]) == list(range(len(index)))
    assert all(1 <= len(step) <= per_step for step in steps)
    assert all(len(batch) for step in steps for batch in step)
    table = plan.table()
    if not isinstance(kind, Random) or kind.batch_size is None:
        lone = 1 + 1e-12 * (table.size == 1)  # of which the terms round otherwise than the bytes of one utterance
        assert not (table.bytes(budget) > budget.limit_bytes * lone).any()
    for row, reason in out.items():
        lone = Lengths.of(index, np.array([row]), budget, plan.grid)
        assert reason == "over the budget by itself"
        assert budget.bytes(1, lone.frames, lone.tokens)[0] > budget.limit_bytes


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.05, 40), st.integers(0, 400)), min_size=1, max_size=120),
    st.sampled_from(KINDS),
    st.integers(1, 9),
    st.integers(1, 200),
    st.integers(1, 80),
    st.integers(100, 3000),
)
def test_an_epoch_has_at_least_min_steps_where_there_are_utterances_enough(
    rows, kind, per_step, window, min_steps, limit
):
    index = LengthIndex(*np.array(rows).T[:1], np.array([u for _, u in rows]))
    budget = Budget(float(limit), Polynomial(T=1.0, TT=1e-4, U=0.3, TU=1e-3), fixed_bytes=50.0)
    options = {"strategy": kind, "window": window, "micro_batches_per_step": per_step}
    plan = Plan(index, budget, min_steps=min_steps, **options)
    assert plan.least_steps(0) * plan.windows.count >= min_steps
    for number in range(plan.windows.count):
        cut = plan.cut(number)
        possible = -(-len(cut.rows) // per_step)
        assert len(cut) >= min(plan.least_steps(number), possible)
        assert all(1 <= steps <= per_step for steps in np.diff(cut.steps))
        assert all(np.diff(cut.batches) >= 1)
    used = sorted(row for step in plan for batch in step for row in batch)
    assert used == sorted(set(range(len(index))) - {row for row, _ in plan.left_out()})
    if not isinstance(kind, Random) or kind.batch_size is None:
        assert plan.figures().over == 0
    again = Plan(index, budget, min_steps=min_steps, **options)
    assert_same(list(plan), list(again))
    if len(plan):
        assert_same(plan.step(len(plan) - 1), again.step(len(plan) - 1))


@pytest.mark.parametrize("kind", [*(kind() for kind in STRATEGIES.values()), Random(40)], ids=str)
@pytest.mark.parametrize("window", [None, 700])
def test_batches_become_smaller_evenly_to_reach_min_steps(kind, window, budget):
    index = lengths(3000)
    plans = [
        Plan(index, budget, kind, window=window, micro_batches_per_step=4, min_steps=steps) for steps in (1, 120, 300)
    ]
    figures = [plan.figures() for plan in plans]
    assert [f.utterances for f in figures] == [3000] * 3
    assert figures[0].steps < 120
    for wanted, found in ((120, figures[1]), (300, figures[2])):
        assert wanted <= found.steps <= 1.35 * wanted  # a fixed size of 6.25 utterances becomes one of 6
        assert found.over == 0
    assert figures[0].padded_compute > figures[1].padded_compute > figures[2].padded_compute


@pytest.mark.parametrize("count", [900, 1800])
@pytest.mark.parametrize("per_step", [1, 8])
def test_on_small_sets_balanced_pads_less_than_bucket_2d_in_as_many_steps(count, per_step, budget):
    index = lengths(count, seed=3)
    two = Plan(index, budget, Bucket2D(), micro_batches_per_step=per_step, min_steps=1).figures()
    ours = Plan(index, budget, micro_batches_per_step=per_step, min_steps=two.steps).figures()
    assert ours.steps == two.steps
    assert ours.padded_compute < two.padded_compute
    assert ours.hours <= two.hours
    assert Plan(index, budget, micro_batches_per_step=per_step).figures().steps >= 50


def test_utterances_of_a_small_set_meet_others_in_the_next_epoch(budget):
    index = lengths(1500)
    plan = Plan(index, budget, micro_batches_per_step=8, min_steps=50)
    this, following = (plan.at_epoch(epoch).batch_of_rows() for epoch in (0, 1))
    assert plan.figures().mean_batch / mixing_pool(this, following) < 0.4
    assert plan.figures().over == 0
    two = Plan(index, budget, "bucket_2d", micro_batches_per_step=8, min_steps=50).figures()
    assert plan.figures().padded_compute < 0.8 * two.padded_compute


def test_strips_of_a_small_window_pad_less_than_a_snake(budget):
    """The number of batches is as requested, none is over the budget, and they differ between epochs."""
    some = Lengths.of(lengths(900, seed=4), slice(None), budget)
    roomy = Budget(1e13, budget.memory, budget.time)
    for count in (2, 60, 400, 899):
        room = roomy if count == 2 else budget
        found = [strips(some.frames, some.tokens, room, count, np.random.default_rng(seed)) for seed in (0, 0, 1)]
        for order, batches in found:
            assert sorted(order.tolist()) == list(range(900))
            assert len(batches) - 1 == count
            assert np.all(np.diff(batches) > 0)
        assert_same(found[0], found[1])
        if count == 60:
            order, batches = found[0]
            longest, most = maxima(some.frames[order], batches), maxima(some.tokens[order], batches)
            assert not (budget.bytes(np.diff(batches), longest, most) > budget.limit_bytes).any()
            assert not np.array_equal(order, found[2][0])
    crowded = Budget(100.0, Polynomial(T=1.0))
    assert strips(np.full(30, 50), np.ones(30, int), crowded, 5, np.random.default_rng(0)) is None


def test_an_endless_stream_has_min_steps_in_as_many_utterances_as_the_index_has(budget):
    plan = Plan(lengths(3000), budget, endless=True, window=500, micro_batches_per_step=2, min_steps=90)
    assert [len(plan.cut(window)) for window in range(8)] == [15] * 8


@pytest.mark.parametrize("per_step", [1, 3, 8])
@pytest.mark.parametrize("mixing", [1.0, 3.0])
def test_balanced_gives_each_window_complete_full_and_even_steps(budget, per_step, mixing):
    plan = Plan(lengths(24_000), budget, Balanced(mixing), window=8000, micro_batches_per_step=per_step)
    for window in range(3):
        assert np.all(np.diff(plan.cut(window).steps) == per_step)
        table = plan.batch_table(window)
        used = budget.bytes(table.size, table.frames, table.tokens) / budget.limit_bytes
        assert used.mean() > 0.93
        assert np.quantile(used, 0.02) > 0.85
    figures = plan.figures()
    assert figures.waiting < 1.02
    assert figures.over == 0


@pytest.mark.parametrize("per_step", [8, 64])
def test_mixed_steps_hold_short_and_long_utterances_and_take_hardly_longer(per_step):
    """Commands, read speech and talks; a full batch of short utterances takes a third longer than one of long ones."""
    index, budget = commands_read_speech_and_talks(), CANARY
    full, mixed = (
        Plan(index, budget, Balanced(mix_steps=mix), micro_batches_per_step=per_step, min_steps=1).figures()
        for mix in (False, True)
    )
    assert full.step_mixing < 0.35 < 0.5 < mixed.step_mixing
    assert mixed.waiting < 1.015
    assert mixed.hours < 1.03 * full.hours
    assert mixed.padded_compute < 1.02 * full.padded_compute
    assert mixed.over == 0


@pytest.mark.parametrize(("ranks", "accumulation"), [(4, 2), (4, 3), (2, 4)])
def test_with_accumulation_steps_are_mixed_and_no_batch_is_smaller(ranks, accumulation):
    index, budget = commands_read_speech_and_talks(), CANARY
    full, mixed = (
        Plan(index, budget, strategy, micro_batches_per_step=ranks * accumulation, min_steps=1).figures(ranks)
        for strategy in (Balanced(), Balanced(mix_steps=True, accumulation=accumulation))
    )
    assert full.step_mixing < 0.5 < 0.8 < mixed.step_mixing
    assert mixed.waiting < 1.015
    for name in ("padded_audio", "padded_compute", "mean_batch", "memory_filled", "steps", "utterances"):
        assert getattr(mixed, name) == pytest.approx(getattr(full, name), rel=1e-12)


@given(st.integers(1, 6), st.integers(0, 20))
def test_folding_gives_each_batch_to_one_group(together, groups):
    table = folded(np.arange(together * groups), together)
    assert table.shape == (groups, together)
    assert sorted(table.ravel()) == list(range(together * groups))
    if together % 2 == 0:  # the times of a sequence that rises evenly add up to the same
        assert len(set(table.sum(axis=1))) <= 1


def test_accumulation_must_divide_the_micro_batches(index, budget):
    with pytest.raises(PlanError, match=r"4 micro-batches per step are not a multiple of accumulation \(3\)"):
        len(Plan(index, budget, Balanced(mix_steps=True, accumulation=3), micro_batches_per_step=4))
    with pytest.raises(PlanError, match="accumulation is 0"):
        len(Plan(index, budget, Balanced(mix_steps=True, accumulation=0)))
    assert [even_accumulation(*pair) for pair in ((8, 8), (8, 4), (8, 3), (4, 8))] == [1, 2, 1, 1]


def test_mixed_steps_make_another_plan(index, budget):
    plans = [Plan(index, budget, Balanced(mix_steps=mix)) for mix in (False, True)]
    assert plans[0].fingerprint != plans[1].fingerprint


def test_the_ladder_descends(budget):
    """Each strategy pads less than the one before, and balanced least at a good fraction of the mixing."""
    index = lengths(20_000)
    kinds = [Random(), Bucket1D(), Bucket2D(30, 2), Bucket2D(30, 5), Balanced()]
    padded = [Plan(index, budget, kind).figures().padded_compute for kind in kinds]
    assert padded == sorted(padded, reverse=True)
    assert padded[-1] < 0.6 * padded[2]


def test_more_mixing_pads_more_and_mixes_more(budget):
    index = lengths(12_000)
    plans = [Plan(index, budget, Balanced(mixing)) for mixing in (1, 2, 4, 8)]
    pools = [mixing_pool(p.batch_of_rows(), p.at_epoch(1).batch_of_rows()) for p in plans]
    assert pools == sorted(pools)
    padded = [p.figures().padded_compute for p in plans]
    assert padded == sorted(padded)
    assert pools[3] > 4 * pools[0]


def test_mixing_0_pads_least_and_mixes_least(budget):
    """Without the exchange of utterances, batches of a small set are nearly the same in each epoch."""
    index = lengths(1500)
    least, default = (Plan(index, budget, Balanced(mixing), micro_batches_per_step=8) for mixing in (0, 1))
    pools = [mixing_pool(p.batch_of_rows(), p.at_epoch(1).batch_of_rows()) for p in (least, default)]
    assert pools[0] < pools[1]
    assert least.figures().padded_compute < default.figures().padded_compute
    assert least.figures().over == 0


def test_length_does_not_drift_over_the_epoch(budget):
    plan = Plan(lengths(40_000), budget, Balanced(), window=10_000, micro_batches_per_step=2)
    table = plan.table()
    per_step = np.add.reduceat(table.audio_seconds, table.steps[:-1]) / np.add.reduceat(table.size, table.steps[:-1])
    part = len(per_step) // 10
    for end in (per_step[:part], per_step[-part:]):
        assert abs(end.mean() / per_step.mean() - 1) < 0.08


@pytest.mark.parametrize(("count", "within"), [(16, 0.2), (36, 0.08), (300, 0.03)])
def test_first_and_last_steps_are_as_long_as_others(count, within):
    """Even where few steps hold most utterances, as those of the shortest do."""
    rng = np.random.default_rng(count)
    starts = set()
    for _ in range(12):
        mean = np.sort(np.where(np.arange(count) < count // 12, 3.0, rng.uniform(12, 35, count)))
        size = np.round(80_000 / mean).astype(int)
        sequence = without_drift(size * mean, size, rng)
        assert sorted(sequence.tolist()) == list(range(count))
        starts.add(int(sequence[0]))
        for end in (sequence[: count // 4], sequence[-(count // 4) :]):
            assert abs(mean[end].mean() / mean.mean() - 1) < within
    assert len(starts) > 1
    assert without_drift(np.ones(1), np.ones(1), rng).tolist() == [0]


@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=60), st.floats(1, 100))
def test_duration_bounds_every_batch(seconds, cap):
    index = LengthIndex(np.array(seconds), np.ones(len(seconds), int))
    plan = Plan(index, Budget(1e12, Polynomial(T=1.0)), Duration(cap, quadratic=20.0))
    effective = index.seconds.astype(float) + index.seconds.astype(float) ** 2 / 20
    for step in plan:
        for batch in step:
            assert len(batch) == 1 or len(batch) * effective[batch].max() <= cap


def test_the_default_cap_fits_the_budget():
    small = Budget.from_batch_seconds(30)
    assert Plan(lengths(500), small, Duration()).figures().over == 0


def test_synchronised_ranks_draw_from_one_bucket(budget):
    index = lengths(20_000)
    kind = Bucket2D(6, 2)
    plan = Plan(index, budget, kind, micro_batches_per_step=4)
    bins = kind.bins(index, budget)
    same = sum(
        len({int(b) for batch in step for b in bins.assign(Lengths.of(index, batch, budget))}) == 1 for step in plan
    )
    assert same >= len(plan) - 12  # but for the buckets' rests
    waits = [
        Plan(index, budget, Bucket2D(6, 2, sync), micro_batches_per_step=4).figures().waiting for sync in (True, False)
    ]
    assert waits[0] < waits[1]


def test_outliers_in_tokens_per_second_are_left_out_and_listed(budget):
    index = LengthIndex(np.full(1000, 5.0), np.r_[np.full(990, 20), np.full(10, 200)])
    bound = tokens_per_second_bound(sample(index, budget), 3.0)
    assert 4 < bound < 40
    for plan in (Plan(index, budget, Bucket2D(2, 2, z_score=3.0)), Plan(index, budget, max_tokens_per_second=30)):
        assert plan.left_out() == [(row, "over the tokens-per-second bound") for row in range(990, 1000)]
        assert plan.figures().utterances == 990


def test_limits_of_each_bucket_follow_its_own_utterances(budget):
    """Short utterances have more tokens a second; a few utterances are held to the bound of their neighbours."""
    rng = np.random.default_rng(0)
    seconds = np.r_[rng.uniform(1, 2, 3000), rng.uniform(18, 20, 300), 30.0]
    tokens = np.r_[rng.normal(20, 2, 3000), rng.normal(60, 5, 300), 70].astype(np.int64)
    seconds[[5, 3100]] = 1.2, 19.5
    tokens[[5, 3100]] = 90, 200  # 200 tokens in 19 s are as fast as usual for 1 s, and outliers there
    index = LengthIndex(seconds, tokens)
    limits = outlier_limits(sample(index, budget), 3)
    assert [edge for edge, _ in limits] == equal_sums(seconds.astype(np.float32).astype(np.float64), 3).tolist()
    fast, slow = limits[0][1], limits[-1][1]
    assert 15 < fast < 40
    assert slow < 9
    rate = tokens / seconds
    plan = Plan(index, budget, max_tokens_per_second="auto")
    assert {5, 3100} <= {row for row, _ in plan.left_out()}
    assert {reason for _, reason in plan.left_out()} == {"over the tokens-per-second bound"}
    held = rate_limit_at(np.asarray(index.seconds), plan.rate_limits)
    assert [row for row, _ in plan.left_out()] == np.flatnonzero(rate > held).tolist()
    assert len(plan.left_out()) < 30
    same = Plan(index, budget, max_tokens_per_second=plan.rate_limits)
    assert same.left_out() == plan.left_out()
    assert plan.rate_limits[-1][1] < 12
    one = outlier_limits(sample(LengthIndex(np.full(40, 5.0), np.full(40, 20)), budget), 3)
    assert one == ((5.0, 4.0),)
    assert "tokens/s in 3 buckets of duration" in describe_limits(limits)
    assert (describe_limits(None), describe_limits(25.0)) == ("no limit", "25.0 tokens/s")


def test_nemo_gets_a_limit_for_each_bin(budget):
    """As long as the list of bins, equal in the bins of one duration, and outliers widen no bin."""
    index = LengthIndex(
        np.r_[np.full(700, 5.0), np.full(300, 10.0)], np.r_[np.arange(700) % 20 + 10, [400] * 3, [40] * 297]
    )
    limits = resolve_limits("auto", index, budget)
    kind = Bucket2D(2, 2)
    bins = kind.bins(index, budget, limits=limits)
    settings = yaml.safe_load(bucketing_config(bins, budget, limits=limits))
    assert len(settings["max_tps"]) == len(settings["bucket_duration_bins"]) == settings["num_buckets"]
    edges = settings["bucket_duration_bins"]
    by_duration = {edge[0]: rate for edge, rate in zip(edges, settings["max_tps"])}
    assert all(by_duration[edge[0]] == rate for edge, rate in zip(edges, settings["max_tps"]))
    assert max(edge[1] for edge in edges) == 40 < max(u for _, u in kind.bins(index, budget).edges)
    assert "max_tps" not in yaml.safe_load(bucketing_config(bins, budget))
    assert yaml.safe_load(bucketing_config(bins, budget, limits=12.34))["max_tps"] == [12.4] * len(bins)


def test_bins_hold_equal_audio_and_equal_tokens(index, budget):
    usable = sample(index, budget)
    bins = estimate_bins(usable, 5, 2)
    row = np.searchsorted(bins.seconds, usable.seconds)
    audio = np.bincount(row, usable.seconds)
    assert len(audio) == 5
    assert audio.max() / audio.min() < 1.1
    tokens = np.bincount(bins.assign(usable), usable.tokens)
    assert len(tokens) == 10
    for pair in tokens.reshape(5, 2):
        assert pair.max() / pair.min() < 1.15


def test_optimal_bins_cost_no_more_than_any_others(budget):
    rng = np.random.default_rng(0)
    usable = sample(LengthIndex(rng.integers(1, 30, 300) * 0.5, np.full(300, 10)), budget)

    def cost(edges):
        bucket = np.searchsorted(edges, usable.seconds)
        return sum(
            (bucket == b).sum() * budget.utterance_seconds(budget.frames(edge), 10) for b, edge in enumerate(edges)
        )

    found = cost(optimal_bins(usable, budget, 3).seconds)
    values = np.unique(usable.seconds)
    others = [cost(np.array([a, b, values[-1]])) for a in values[:-2] for b in values[:-1] if a < b]
    assert found == pytest.approx(min(others))


def test_strategies_by_name():
    assert strategy("balanced", mixing=2.0) == Balanced(2.0)
    assert set(STRATEGIES) == {"random", "duration", "bucket_1d", "bucket_2d", "balanced", "packed"}
    with pytest.raises(PlanError, match="did you mean 'balanced'"):
        strategy("balance")
    with pytest.raises(PlanError, match="its options: accumulation, mix_steps, mixing"):
        strategy("balanced", window=3)


@pytest.mark.parametrize("kind", [Random(0), Duration(0.0), Balanced(0.5), Bucket2D(0, 1)])
def test_impossible_options(kind, index, budget):
    with pytest.raises(PlanError):
        Plan(index, budget, kind).step(0)
