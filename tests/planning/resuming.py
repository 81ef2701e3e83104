"""Helpers that restore a plan or a sampler at every step and compare all following steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from canter.planning.plan import Plan, Position


class Resumable(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def assert_same(expected: Any, found: Any, where: str = "") -> None:
    """Fail unless these are equal: nested lists, tuples and dicts of numbers, strings and arrays."""
    if isinstance(expected, list | tuple):
        assert isinstance(found, list | tuple), f"{where}: {type(found).__name__} is not a sequence"
        assert len(expected) == len(found), f"{where}: {len(found)} items, expected {len(expected)}"
        for number, (one, other) in enumerate(zip(expected, found)):
            assert_same(one, other, f"{where}[{number}]")
    elif isinstance(expected, dict):
        assert isinstance(found, dict), f"{where}: {type(found).__name__} is not a dict"
        assert expected.keys() == found.keys(), f"{where}: other keys"
        for key, one in expected.items():
            assert_same(one, found[key], f"{where}[{key!r}]")
    elif isinstance(expected, str) or expected is None:
        assert expected == found, f"{where}: {found!r}, expected {expected!r}"
    else:
        assert np.array_equal(np.asarray(expected), np.asarray(found)), f"{where}: values differ"


def assert_plan_resumes(make: Callable[[], Plan]) -> None:
    """Fail unless `make()` gives the same steps each time, and a plan resumed at any of its steps, from the JSON of
    its position and without the steps before, gives all that follow."""
    whole = list(make().steps())
    for number, (_, expected) in enumerate(whole):
        assert_same(expected, make().step(number), f"step {number} by number")
    start = [make().position(0)] if whole else []
    for number, position in enumerate(start + [after for after, _ in whole]):
        text = json.dumps(position.as_json())
        assert len(text.encode()) < 1024, f"the position of step {number} has {len(text)} bytes"
        resumed = [step for _, step in make().steps(Position.from_json(json.loads(text)))]
        assert_same([step for _, step in whole[number:]], resumed, f"resumed at step {number}")


def assert_resumes_everywhere(make: Callable[[], tuple[Resumable, Iterator[Any]]]) -> None:
    """Fail unless what `make()` returns, (state holder, its iterator), resumes at every item.

    The state is read after each item has been taken; a fresh pair that loads it must give all the items that follow.
    The iterator must not begin before its first item is asked for.
    """
    holder, items = make()
    states, seen = [json.dumps(holder.state_dict())], []
    for item in items:
        seen.append(item)
        states.append(json.dumps(holder.state_dict()))
    for number, state in enumerate(states[:-1]):
        holder, items = make()
        holder.load_state_dict(json.loads(state))
        assert_same(seen[number:], list(items), f"resumed after {number} items")
