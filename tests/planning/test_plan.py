import hashlib
import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.corpus.index import LengthIndex, Shard, Source
from canter.errors import PlanError
from canter.planning import Budget, Plan, Polynomial, Position
from canter.planning.lengths import rate_limits
from canter.planning.metrics import mixing_pool
from canter.planning.strategies import STRATEGIES, Balanced, Bucket1D, Bucket2D, Random

from .conftest import lengths
from .resuming import assert_plan_resumes, assert_same

KINDS = [
    *(kind() for kind in STRATEGIES.values()), Random(7), Bucket1D(5), Bucket2D(5, 2),
    Bucket2D(4, 2, synchronised=False),
    Bucket2D(4, 3, optimal=True), Bucket2D(3, 2, z_score=2.0), Balanced(0), Balanced(2.5), Balanced(mix_steps=True),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_strategy_resumes_at_every_step(kind, budget):
    index = lengths(240, sources=2)
    settings = {"seed": 3, "window": 80, "micro_batches_per_step": 2, "min_steps": 1}
    assert_plan_resumes(lambda: Plan(index, budget, kind, **settings))


@pytest.mark.parametrize(
    "options", [{"grid": (16, 8)}, {"block": 20}, {"window": 10**6}, {"epoch": 4}, {"min_steps": 30}], ids=str
)
def test_resumes_whatever_the_settings(options, budget):
    index = lengths(700)
    settings = {"window": 200, "micro_batches_per_step": 3, "min_steps": 1} | options
    assert_plan_resumes(lambda: Plan(index, budget, **settings))


def test_the_helper_finds_a_plan_that_does_not_resume(budget):
    index = lengths(450)

    class Forgetful(Plan):
        def walk(self, start=None):
            return super().walk(None)

    with pytest.raises(AssertionError, match="resumed at step 1"):
        assert_plan_resumes(lambda: Forgetful(index, budget, window=150, min_steps=1))


@pytest.mark.parametrize("grid", [(1, 1), (16, 8)])
def test_what_the_model_cannot_take_is_left_out_and_listed(budget, grid):
    index = lengths(300)
    seconds, tokens = np.array(index.seconds), np.array(index.tokens)
    seconds[3], seconds[4], tokens[5], tokens[6] = 30.5, 30.0, 449, 448
    plan = Plan(LengthIndex(seconds, tokens), budget, longest_seconds=30.0, most_tokens=448, window=100, grid=grid)
    out = {3: "longer than the model takes", 5: "more tokens than the model has positions for"}
    assert {row: reason for row, reason in plan.left_out() if row < 7} == out
    rows = sorted(row for step in plan for rows in step for row in rows.tolist())
    assert rows == sorted(set(range(300)) - {row for row, _ in plan.left_out()})
    whole = Plan(LengthIndex(seconds, tokens), budget, window=100, grid=grid)
    bounded = whole.within(30.0, 448)
    assert_same(list(bounded), list(plan))
    assert bounded.fingerprint == plan.fingerprint != whole.fingerprint
    assert whole.within(31.0, 449) is whole
    assert bounded.at_epoch(1).fingerprint == plan.fingerprint


def test_membership_depends_only_on_index_seed_epoch_and_window(index, budget):
    def members(**options):
        plan = Plan(index, **({"budget": budget, "seed": 1, "window": 500} | options))
        return [set(plan.cut(w).rows.tolist()) for w in range(plan.windows.count)]

    same = members()
    assert members(budget=replace(budget, limit_bytes=5e9)) == same
    assert members(micro_batches_per_step=7) == same
    assert members(strategy="bucket_2d") == same
    assert members(seed=2) != same
    assert members(epoch=1) != same


def test_epochs_and_seeds_differ(index, budget):
    plan = Plan(index, budget)
    other = plan.at_epoch(1)
    assert_same(list(other), list(Plan(index, budget, epoch=1)))
    assert mixing_pool(plan.batch_of_rows(), other.batch_of_rows()) < float("inf")
    with pytest.raises(AssertionError):
        assert_same(list(plan), list(other))
    with pytest.raises(AssertionError):
        assert_same(list(plan), list(Plan(index, budget, seed=1)))


def forbid_batching(plan):
    """Let the plan fail where it divides a window into batches."""
    object.__setattr__(plan, "cut", None)


def test_len_and_step_numbers(index, budget, tmp_path):
    plan = Plan(index, budget, window=700, micro_batches_per_step=2, cache=tmp_path)
    steps = list(plan)
    assert len(plan) == len(steps)
    for number in (0, len(plan) // 2, len(plan) - 1):
        assert_same(steps[number], plan.step(number))
        assert plan.number(plan.position(number)) == number
    with pytest.raises(PlanError, match="outside"):
        plan.step(len(plan))
    # the table is taken from the folder, whole
    again = Plan(index, budget, window=700, micro_batches_per_step=2, cache=tmp_path)
    forbid_batching(again)
    assert len(again) == len(plan)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"torn")  # made again
    assert len(Plan(index, budget, window=700, micro_batches_per_step=2, cache=tmp_path)) == len(plan)
    # figures cut every window: their table is kept too
    figures = Plan(index, budget, window=700, seed=5, cache=tmp_path).figures()
    known = Plan(index, budget, window=700, seed=5, cache=tmp_path)
    forbid_batching(known)
    assert len(known) == figures.steps


def test_a_sharded_index_is_drawn_in_blocks_and_another_sharding_is_another_plan(budget):
    some = lengths(4000)
    shards = [Shard(f"{i}.jsonl", f"{i}.tar", 1, 0, i * 500, (i + 1) * 500) for i in range(8)]
    sharded = LengthIndex(some.seconds, some.tokens, ["a"], shards=shards)
    plan = Plan(sharded, budget, window=1000)
    assert plan.windows.blocks == [3]
    assert plan.fingerprint != Plan(some, budget, window=1000).fingerprint
    assert plan.at_epoch(1).windows.blocks == [3]
    assert sorted(row for step in plan for batch in step for row in batch) == list(range(4000))


@settings(max_examples=25)
@given(st.lists(st.integers(1, 11), min_size=1, max_size=6), st.integers(1, 12), st.data())
def test_elastic_ranks_take_each_utterance_once(world_sizes, per_step, data):
    """The same steps follow, however often the number of ranks changes within an epoch."""
    index = lengths(400, seed=5)
    budget = Budget.from_batch_seconds(60)
    plan = Plan(index, budget, window=150, micro_batches_per_step=per_step)
    seen, number = [], 0
    for ranks in world_sizes:
        until = len(plan) if ranks is world_sizes[-1] else data.draw(st.integers(number, len(plan)))
        for step in range(number, until):
            shares = [plan.micro_batches_for(rank, ranks, step) for rank in range(ranks)]
            taken = sorted((b.number, b.rows.tolist()) for share in shares for b in share)
            assert taken == [(i, rows.tolist()) for i, rows in enumerate(plan.step(step))]
            seen += [row for _, rows in taken for row in rows]
        number = until
    if number == len(plan):
        assert sorted(seen) == list(range(len(index)))


def test_a_budget_that_changes_within_a_run_keeps_earlier_windows(index, budget):

    smaller = replace(budget, limit_bytes=4e9)
    before, after = Plan(index, budget, window=500), Plan(index, [(0, budget), (3, smaller)], window=500)
    alone = Plan(index, smaller, window=500)
    for window in range(6):
        expected = before if window < 3 else alone
        assert_same(expected.cut(window).step(0), after.cut(window).step(0))


def test_small_sets_and_small_batches_work_well():
    some = lengths(300)
    plan = Plan(LengthIndex(np.minimum(some.seconds, 6), some.tokens), Budget.from_batch_seconds(24))
    figures = plan.figures()
    assert figures.utterances == 300
    assert figures.over == 0
    assert figures.memory_filled > 0.85
    assert figures.padded_audio < 0.06


def test_more_ranks_than_utterances_is_reported_as_waiting():
    plan = Plan(lengths(3), Budget.from_batch_seconds(60), micro_batches_per_step=8)
    assert len(plan) == 1
    assert [len(b) for b in plan.step(0)] == [1, 1, 1]
    assert sum(bool(plan.micro_batches_for(rank, 8, 0)) for rank in range(8)) == 3
    assert plan.figures(8).waiting > 2


def test_rounding_to_a_grid_gives_few_shapes_and_counts_as_padding(index, budget):
    plain, rounded = Plan(index, budget), Plan(index, budget, grid=(32, 16))
    table = rounded.table()
    assert not (table.frames % 32).any()
    assert not (table.tokens % 16).any()
    assert rounded.figures().padded_audio > plain.figures().padded_audio
    assert rounded.figures().over == 0


def test_endless_mixture_resumes_without_a_length(budget):
    sources = [Source("a", weight=1.0), Source("b", weight=3.0)]
    index = LengthIndex(*(lengths(800).seconds, lengths(800).tokens), sources, np.repeat([0, 1], 400))
    plan = Plan(index, budget, endless=True, window=300)
    stream = plan.steps()
    head = [next(stream) for _ in range(40)]
    resumed = Plan(index, budget, endless=True, window=300).steps(head[24][0])
    for _, step in head[25:]:
        assert_same(step, next(resumed)[1])
    assert head[-1][0].window >= 2
    with pytest.raises(PlanError, match="endless"):
        len(plan)


def test_positions_of_other_plans_are_refused(index, budget):
    plan = Plan(index, budget, seed=1)
    position = plan.position(3)
    with pytest.raises(PlanError, match="another plan"):
        next(Plan(index, budget, seed=2).steps(position))
    with pytest.raises(PlanError, match="epoch 0"):
        next(plan.at_epoch(1).steps(position))
    for value in ({}, [], {"format": "canter-position/1"}, position.as_json() | {"step": -1}):
        with pytest.raises(PlanError):
            Position.from_json(value)
    assert Position.from_json(json.loads(json.dumps(position.as_json()))) == position


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batches_per_step": 0},
        {"window": 0},
        {"grid": (0, 1)},
        {"strategy": "magic"},
        {"epoch": -1},
        {"max_tokens_per_second": float("nan")},
        {"max_tokens_per_second": [(10, 0)]},
        {"max_tokens_per_second": [(10, 3), (10, 4)]},
        {"max_tokens_per_second": [(10, 3), 4]},
        {"max_tokens_per_second": "10:3 fast"},
        {"min_steps": 0},
    ],
)
def test_impossible_settings(index, budget, options):
    with pytest.raises(PlanError):
        Plan(index, budget, **options)


def test_limits_in_tokens_per_second_by_duration(budget):
    """An utterance is held to the limit of the first pair that reaches its duration, a longer one to the last."""
    seconds = np.array([5, 5, 10.1, 10.1, 15, 15, 60, 60], np.float32)
    tokens = np.array([150, 151, 303, 304, 375, 376, 1200, 1201])
    index = LengthIndex(seconds, tokens)
    plan = Plan(index, budget, max_tokens_per_second=[(20, 25), (10.1, 30), (40, 20)])
    assert plan.left_out() == [(row, "over the tokens-per-second bound") for row in (1, 3, 5, 7)]
    assert sorted(row for step in plan for batch in step for row in batch) == [0, 2, 4, 6]
    assert plan.rate_limits == ((10.1, 30.0), (20.0, 25.0), (40.0, 20.0))
    same = Plan(index, budget, max_tokens_per_second=rate_limits("10.1:30 20:25 40:20"))
    assert same.fingerprint == plan.fingerprint
    assert Plan(index, budget, max_tokens_per_second=plan.rate_limits).fingerprint == plan.fingerprint
    others = [None, 30, [(10.1, 30)], [(10.1, 30), (20, 25), (40, 21)]]
    assert len({Plan(index, budget, max_tokens_per_second=o).fingerprint for o in others} | {plan.fingerprint}) == 5
    assert rate_limits(["25"]) == rate_limits("25") == rate_limits(25) == 25.0
    assert rate_limits(()) is None


def test_limits_say_why_batches_are_no_larger(budget):
    def limits(count, strategy="balanced", memory=None, own=budget, **options):
        return Plan(lengths(count), own, strategy, micro_batches_per_step=4, **options).limits(memory)

    full = limits(6000, min_steps=1)
    assert (full.by, full.min_steps) == ("memory", 1)
    assert full.memory_filled > full.room_filled > 0.95
    assert full.steps == len(Plan(lengths(6000), budget, micro_batches_per_step=4, min_steps=1))
    small = limits(1600)
    assert (small.by, small.steps, small.min_steps) == ("min_steps", 50, 50)
    assert "50 steps an epoch; limited by min_steps 50; min_steps 1 makes the largest batches" in str(small)
    assert limits(100).min_steps == 6
    few = limits(100, min_steps=50)
    assert (few.by, few.steps) == ("utterances", 25)
    assert "no more than 25 steps of 4 micro-batches" in str(few)
    assert limits(12, min_steps=1).by == "utterances"
    assert limits(6000, "random", min_steps=1).by == "strategy"
    seconds = limits(3000, memory=budget, own=Budget.from_batch_seconds(24))
    assert seconds.by == "batch_seconds"
    assert seconds.memory_filled < 0.3
    assert "--batch-seconds; a larger value" in seconds.line(batch_seconds="--batch-seconds")
    tiny = replace(budget, limit_bytes=1e9 + 1)
    assert limits(20, own=tiny).steps == 0


def test_min_steps_is_part_of_the_fingerprint(index, budget):
    assert Plan(index, budget, min_steps=7).fingerprint != Plan(index, budget, min_steps=8).fingerprint


def test_a_window_in_which_nothing_fits():
    plan = Plan(lengths(50), Budget(1.0, Polynomial(T=1.0)), window=20)
    assert list(plan) == []
    assert len(plan.left_out()) == 50
    assert plan.figures().steps == 0


@pytest.mark.parametrize("name", ["bucket_2d", "balanced"])
def test_an_outsider_finds_the_same_figures_in_the_emitted_plan(name, index, budget, tmp_path):
    """Compute the figures from plan.parquet, the lengths and the budget's JSON only, in plain Python."""
    ranks, per_step = 3, 4
    plan = Plan(index, budget, name, window=1000, micro_batches_per_step=per_step)
    plan.write(tmp_path / "plan.parquet", ranks)
    table = pq.read_table(tmp_path / "plan.parquet")
    assert table.schema.names == ["step", "micro_batch", "rank", "row"]
    values = budget.as_json()
    memory, time = values["memory"], values["time"]

    def poly(c, t, u):
        return c["T"] * t + c["TT"] * t * t + c["U"] * u + c["TU"] * t * u + c["UU"] * u * u

    lengths_of = {
        row: (int(np.ceil(float(index.seconds[row]) / values["frame_seconds"])), int(index.tokens[row]))
        for row in range(len(index))
    }
    batches: dict = {}
    seconds_of: dict = {}
    for step, number, rank, row in zip(*(table[c].to_pylist() for c in table.schema.names)):
        batches.setdefault((step, number, rank), []).append(lengths_of[row])
        seconds_of.setdefault(step, {}).setdefault(number, []).append(float(index.seconds[row]))
    own = padded = own_u = padded_u = own_c = padded_c = filled = over = 0
    loads: dict = {}
    for (step, _, rank), rows in batches.items():
        b, t, u = len(rows), max(t for t, _ in rows), max(u for _, u in rows)
        own, padded = own + sum(t for t, _ in rows), padded + b * t
        own_u, padded_u = own_u + sum(u for _, u in rows), padded_u + b * u
        own_c += sum(poly(time["per_utterance_seconds"], *row) for row in rows)
        padded_c += b * poly(time["per_utterance_seconds"], t, u)
        used = memory["fixed_bytes"] + b * poly(memory["per_utterance_bytes"], t, u)
        filled, over = filled + used / memory["limit_bytes"], over + (used > memory["limit_bytes"])
        load = loads.setdefault(step, [0.0] * ranks)
        load[rank] += time["fixed_seconds"] + b * poly(time["per_utterance_seconds"], t, u)
    f = plan.figures(ranks)
    assert f.padded_audio == pytest.approx(1 - own / padded)
    assert f.padded_tokens == pytest.approx(1 - own_u / padded_u)
    assert f.padded_compute == pytest.approx(1 - own_c / padded_c)
    assert f.mean_batch == pytest.approx(len(index) / len(batches))
    assert f.memory_filled == pytest.approx(filled / len(batches))
    assert f.over == over == 0
    assert f.steps == len(loads)
    assert f.hours == pytest.approx(sum(max(load) for load in loads.values()) / 3600)
    assert f.waiting == pytest.approx(np.mean([max(load) / (sum(load) / ranks) for load in loads.values()]))
    means = [[np.mean(batch) for batch in step.values()] for step in seconds_of.values()]
    within = [mean - np.mean(step) for step in means for mean in step]
    assert f.step_mixing == pytest.approx(np.mean(np.square(within)) / np.var(np.concatenate(means)))


def test_mixing_pool_counts_pairs():
    first, second = np.array([0, 0, 0, 1, 1, -1]), np.array([0, 0, 1, 1, 1, 0])
    # pairs of the first epoch: 3 + 1, of which (0, 1) and (3, 4) meet again; mean batch 5 / 2
    assert mixing_pool(first, second) == pytest.approx(2.5 / (2 / 4))
    assert mixing_pool(np.array([0, 0]), np.array([0, 1])) == float("inf")


KEPT = {  # (strategy, version): fingerprint and hash of the steps, as Canter 0.1 made them
    ("random", 2): ("76f711397ed7d55e", "7eade04035b2"),
    ("random", 4): ("2348ad348958c96e", "7eade04035b2"),
    ("duration", 2): ("65dc330df9f74c07", "c6dc0ac92f55"),
    ("duration", 4): ("4b11485d13c3c544", "c6dc0ac92f55"),
    ("bucket_1d", 2): ("49a2cdcb2a214600", "b9cda34d64c0"),
    ("bucket_1d", 4): ("1490b31d86897432", "b9cda34d64c0"),
    ("bucket_2d", 2): ("c42232c1a96a00c4", "fedc62691650"),
    ("bucket_2d", 4): ("62b8abb3e9e8580f", "fedc62691650"),
    ("balanced", 2): ("38ff5f198f398a86", "be77ca8c8399"),
    ("balanced", 4): ("efea0e3600f1aa9f", "1408b6c40513"),
}


@pytest.mark.parametrize(("name", "version"), KEPT)
def test_plans_of_earlier_versions_keep_fingerprint_and_steps(name, version):
    """Runs that were begun with them resume; whoever changes steps must raise VERSION."""
    number = np.arange(900)
    index = LengthIndex((1 + (number * 7 % 50) / 5).astype(np.float32), 5 + number * 11 % 60)
    budget = Budget(2e9, Polynomial(T=2e6, U=1e6, TU=1e3))
    settings = {"window": 400, "micro_batches_per_step": 3, "seed": 1, "min_steps": 1 if version == 2 else None}
    plan = Plan(index, budget, name, version=version, **settings)
    rows = np.concatenate([np.append(rows, -1) for step in plan for rows in step])
    assert (plan.fingerprint, hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()[:12]) == KEPT[name, version]


def test_mixing_0_of_canter_0_1_is_another_plan():
    """Its local search is gone, so a position of such a run must be refused."""
    index = LengthIndex((1 + (np.arange(900) * 7 % 50) / 5).astype(np.float32), np.full(900, 9))
    plan = Plan(index, Budget.from_batch_seconds(60), Balanced(0.0))
    assert plan.fingerprint != "9800e6f58a279792"


def test_a_plan_is_a_value(index, budget):
    plan = Plan(index, budget, window=700, seed=3)
    assert_same(list(replace(plan, epoch=2)), list(Plan(index, budget, window=700, seed=3, epoch=2)))
    assert replace(plan, strategy="random").fingerprint == Plan(index, budget, "random", window=700, seed=3).fingerprint
    with pytest.raises(FrozenInstanceError):
        plan.seed = 4  # type: ignore[misc]
