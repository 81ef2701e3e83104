"""Batching strategies by name."""

import difflib
from dataclasses import fields

from canter.errors import PlanError
from canter.planning.strategies.balanced import Balanced
from canter.planning.strategies.base import Cut, Cutter, Strategy
from canter.planning.strategies.baselines import Bucket1D, Duration, Random
from canter.planning.strategies.bucket_2d import Bucket2D
from canter.planning.strategies.packed import Packed

STRATEGIES: dict[str, type] = {kind.name: kind for kind in (Random, Duration, Bucket1D, Bucket2D, Balanced, Packed)}

__all__ = [
    "STRATEGIES",
    "Balanced",
    "Bucket1D",
    "Bucket2D",
    "Cut",
    "Cutter",
    "Duration",
    "Packed",
    "Random",
    "Strategy",
    "strategy",
]


def strategy(name: str, **options: object) -> Strategy:
    """Return the strategy of that name. Raises PlanError for an unknown name or option."""
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PlanError(f"no strategy named {name!r}; {hint}known: {', '.join(STRATEGIES)}")
    kind = STRATEGIES[name]
    known = {field.name for field in fields(kind)}
    for option in options.keys() - known:
        raise PlanError(f"{name} has no option {option!r}; its options: {', '.join(sorted(known)) or 'none'}")
    return kind(**options)
