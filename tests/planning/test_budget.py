import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.errors import BudgetError
from canter.planning import Budget, Polynomial, analytic_budget
from canter.planning.budget import parse_memory
from canter.planning.shapes import SHAPES


def test_cost_is_the_polynomial_of_the_design():
    budget = Budget(1e12, Polynomial(1, 2, 3, 4, 5), Polynomial(6, 7, 8, 9, 10), fixed_bytes=11, fixed_seconds=12)
    t, u, b = 13, 17, 3
    assert budget.bytes(b, t, u) == 11 + b * (t + 2 * t * t + 3 * u + 4 * t * u + 5 * u * u)
    assert budget.step_seconds(b, t, u) == 12 + b * (6 * t + 7 * t * t + 8 * u + 9 * t * u + 10 * u * u)


def test_frames_round_up(budget):
    assert budget.frames(0.081) == 2
    assert budget.frames(np.array([0.01, 1.0, 1.01])).tolist() == [1, 13, 13]


@given(st.integers(1, 3000), st.integers(0, 600))
def test_the_largest_batch_fits_and_one_more_does_not(frames, tokens):
    budget = analytic_budget("canary-1b")
    most = budget.max_batch(frames, tokens)
    assert budget.bytes(most, frames, tokens) <= budget.limit_bytes < budget.bytes(most + 1, frames, tokens)


def test_round_trip(tmp_path, budget):
    budget.save(tmp_path / "budget.json")
    assert Budget.load(tmp_path / "budget.json") == budget


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "canter-budget/9"}, "format is 'canter-budget/9'"),
        ({"memory": 3}, "memory: expected a mapping of settings, found 3"),
        ({"memory.limit_bytes": "40GB"}, "memory: limit_bytes: expected float, found '40GB'"),
        ({"memory.limit_bytes": float("nan")}, "memory.limit_bytes is nan"),
        ({"memory.limit_bytes": True}, "memory: limit_bytes: expected float, found True"),
        ({"memory.limit_bytes": 1}, "leaves nothing above memory.fixed_bytes"),
        ({"memory.per_utterance_bytes.TT": -1.0}, "memory.per_utterance_bytes.TT is -1.0"),
        ({"memory.per_utterance_bytes.TX": 1.0}, "memory: per_utterance_bytes: unknown setting 'TX'"),
        ({"time.per_utterance_seconds": {}}, "time.per_utterance_seconds is zero for every term"),
        ({"frame_seconds": 0}, "frame_seconds is 0"),
        ({"speed": 1}, "unknown setting 'speed'"),
        ({"time": None}, "time: expected a mapping of settings, found None"),
    ],
)
def test_a_malformed_budget_names_file_field_and_value(tmp_path, budget, change, message):
    value = budget.as_json()
    for path, new in change.items():
        *parents, last = path.split(".")
        inner = value
        for name in parents:
            inner = inner[name]
        inner[last] = new
    (tmp_path / "b.json").write_text(json.dumps(value))
    with pytest.raises(BudgetError) as caught:
        Budget.load(tmp_path / "b.json")
    assert "b.json" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[]"])
def test_what_is_not_json_is_one_error(tmp_path, text):
    (tmp_path / "b.json").write_bytes(text)
    with pytest.raises(BudgetError, match=r"b\.json"):
        Budget.load(tmp_path / "b.json")


def test_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(BudgetError, match="canter tune"):
        Budget.load(tmp_path / "none.json")


def test_a_budget_of_another_device_is_refused():
    budget = Budget(1e9, Polynomial(T=1), measured_on={"device": "H100", "precision": "bf16"})
    budget.require(device="H100", precision="bf16", model="anything: the budget does not say")
    with pytest.raises(BudgetError, match=r"device is 'A100' here and 'H100' in the budget.*canter tune"):
        budget.require(device="A100", precision="bf16")


def test_fingerprint_ignores_only_where_it_was_measured(budget):
    from dataclasses import replace

    assert replace(budget, measured_on={"device": "x"}).fingerprint == budget.fingerprint
    assert replace(budget, limit_bytes=11e9).fingerprint != budget.fingerprint


def test_batch_seconds():
    budget = Budget.from_batch_seconds(24)
    assert budget.max_batch(budget.frames(8.0), 10) == 3
    with pytest.raises(BudgetError, match="must be positive"):
        Budget.from_batch_seconds(0)


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_hold_two_long_utterances_on_80_gb(name):
    budget = analytic_budget(name, 80)
    assert budget.max_batch(budget.frames(30.0), 100) >= 2


def test_unknown_or_too_large_shape():
    with pytest.raises(BudgetError, match="did you mean 'canary-1b'"):
        analytic_budget("canary-1B")
    with pytest.raises(BudgetError, match="leave no room"):
        analytic_budget("canary-1b", 16)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80", 80e9), ("80GB", 80e9), ("80GiB", 80 * 2**30), ("0.5 tb", 5e11), ("512MiB", 2**29), (" 1.5KB", 1500)],
)
def test_sizes_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "80G", "1e3", "nan", "80 GB free", "1..5GB"])
def test_what_is_no_size_of_memory(text):
    with pytest.raises(BudgetError, match=r"--memory is .*such as 80GiB"):
        parse_memory(text, "--memory")
