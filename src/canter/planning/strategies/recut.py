"""Local search for the least padding: two neighbouring batches at a time are thrown together and cut anew.

It halves the padding of a set of a hundred batches, most of whose batches lie at an edge of the (T, U) plane, where a
snake's turns cost most. It is slow: about 10,000 utterances a second.
"""

from __future__ import annotations

import numpy as np

from canter.planning.budget import Budget

ROUNDS = 8  # the last of them gain next to nothing
NEIGHBOURS = 8


def recut(
    batches: np.ndarray, frames: np.ndarray, tokens: np.ndarray, budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) positions and offsets of as many batches, none over the budget, that pad less.

    batches: offsets (K + 1,) in frames and tokens, (n,). Each round takes every batch with its nearest neighbours in
    the plane; pairs of which neither has changed since they were last tried are passed over.
    """
    members = np.split(np.arange(len(frames)), batches[1:-1])
    t, u = float(frames.mean()), float(tokens.mean())
    scale = np.array([budget.time(t + 1, u) - budget.time(t, u), budget.time(t, u + 1) - budget.time(t, u)])

    def middle(rows: np.ndarray) -> np.ndarray:
        return np.array([frames[rows].sum(), tokens[rows].sum()]) / len(rows) * scale

    middles = np.stack([middle(rows) for rows in members])
    changed, tried, now = np.zeros(len(members), np.int64), {}, 0
    for _ in range(ROUNDS):
        before = now
        for a in range(len(members)):
            apart = ((middles - middles[a]) ** 2).sum(axis=1)
            apart[a] = np.inf
            for b in np.argsort(apart, kind="stable")[: min(NEIGHBOURS, len(members) - 1)]:
                pair = (min(a, b), max(a, b))
                if tried.get(pair, -1) >= max(changed[a], changed[b]):
                    continue
                both = np.concatenate([members[a], members[b]])
                two = cut_in_two(frames[both], tokens[both], len(members[a]), budget, scale)
                if two is not None:
                    now += 1
                    changed[a] = changed[b] = now
                    members[a], members[b] = both[two[0]], both[two[1]]
                    middles[a], middles[b] = middle(members[a]), middle(members[b])
                tried[pair] = now
        if now == before:
            break
    return np.concatenate(members), np.concatenate([[0], np.cumsum([len(rows) for rows in members])])


def cut_in_two(
    frames: np.ndarray, tokens: np.ndarray, first: int, budget: Budget, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Two batches of these utterances (n,) that cost less than the `first` of them and the rest; None if none do.

    Tried are all cuts of four sequences: by T, by U, across the diagonal, and by distance from the common upper corner
    (so that one batch is a box and the other the L around it). scale: seconds that one frame and one token cost.
    """
    room = budget.limit_bytes - budget.fixed_bytes
    n, span = len(frames), int(max(frames.max(), tokens.max())) + 1
    x, y = (frames - frames.max()) * scale[0], (tokens - tokens.max()) * scale[1]
    keys = np.stack([frames * span - tokens, tokens * span - frames, x - y, np.maximum(x, y)])
    order = np.argsort(keys, axis=1, kind="stable")
    t, u = frames[order], tokens[order]
    low = np.maximum.accumulate(t, axis=1)[:, :-1], np.maximum.accumulate(u, axis=1)[:, :-1]
    high = (
        np.maximum.accumulate(t[:, ::-1], axis=1)[:, -2::-1],
        np.maximum.accumulate(u[:, ::-1], axis=1)[:, -2::-1],
    )
    size = np.arange(1, n)
    cost = size * budget.time(*low) + (n - size) * budget.time(*high)
    over = (size * budget.memory(*low) > room) | ((n - size) * budget.memory(*high) > room)
    cost[over] = np.inf
    best = int(np.argmin(cost))
    row, cut = divmod(best, n - 1)
    parts = (frames[:first], tokens[:first]), (frames[first:], tokens[first:])
    present = sum(len(a) * budget.time(int(a.max()), int(b.max())) for a, b in parts)
    if not cost[row, cut] < present * (1 - 1e-12):
        return None
    return order[row, : cut + 1], order[row, cut + 1 :]
