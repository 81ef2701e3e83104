"""Local search for the least padding: a few neighbouring batches at a time are thrown together and cut anew.

What a batch costs, and how many utterances it holds, depends on its corner alone: its longest T and U. So corners are
moved, a few hundred moves of a group's corners at a time, and each move is judged by the best way to fill them: the
cheapest corner takes all it can, then the next. (Places that can be filled together form a matroid, where greedy is
best.) How many the first k corners can take together is, by max-flow min-cut, the least over their subsets S of

    utterances below any corner in S + what fits under the corners that are not in S

It takes more than a third off the padding of a set of a hundred batches, most of which lie at an edge of the (T, U)
plane, where a snake's turns cost most. It is slow: three thousand utterances a second.
"""

from __future__ import annotations

import numpy as np

from canter.planning.budget import Budget

GROUP = 6  # batches cut anew together: pairs get stuck a tenth earlier, and seven gain nothing more
NEAR = 9  # nearest batches of which a group is drawn
ROUNDS = 24  # groups drawn around each batch
IDLE = 100  # groups, and two rounds, that bring nothing before the search ends
MOVES = 256  # of a group's corners that are tried
REACH = 0.25  # of a group's extent that a corner is moved at most


def recut(
    batches: np.ndarray, frames: np.ndarray, tokens: np.ndarray, budget: Budget, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) positions and offsets of as many batches, none over the budget, that pad less.

    batches: offsets (K + 1,) in frames and tokens, (n,).
    """
    members = np.split(np.arange(len(frames)), batches[1:-1])
    count = len(members)
    together = min(GROUP, count)
    if together < 2:
        return members[0], batches
    t, u = float(frames.mean()), float(tokens.mean())
    scale = np.array([budget.time(t + 1, u) - budget.time(t, u), budget.time(t, u + 1) - budget.time(t, u)])

    def middle(rows: np.ndarray) -> np.ndarray:
        return np.array([frames[rows].sum(), tokens[rows].sum()]) / len(rows) * scale

    middles = np.stack([middle(rows) for rows in members])
    steps = random_steps(together, rng)
    idle = 0
    for _ in range(ROUNDS):
        if idle > 2 * count + IDLE:
            break
        for around in rng.permutation(count):
            apart = ((middles - middles[around]) ** 2).sum(axis=1)
            apart[around] = -1.0
            near = np.argsort(apart, kind="stable")[1 : NEAR + 1]
            group = np.append(rng.choice(near, together - 1, replace=False), around)
            rows = np.concatenate([members[b] for b in group])
            sizes = np.array([len(members[b]) for b in group])
            first = int(rng.integers(0, steps.shape[2] - MOVES))
            anew = cut_anew(frames[rows], tokens[rows], sizes, steps[:, :, first : first + MOVES], budget, scale)
            idle = 0 if anew else idle + 1
            for batch, inside in zip(group, anew):
                members[batch] = rows[inside]
                middles[batch] = middle(members[batch])
    return np.concatenate(members), np.concatenate([[0], np.cumsum([len(rows) for rows in members])])


def random_steps(corners: int, rng: np.random.Generator, count: int = 64 * MOVES) -> np.ndarray:
    """(2, corners, count) moves of corners' T and U, as parts of the group's extent: up to three numbers change, mostly
    little."""
    steps = np.zeros((2 * corners, count))
    for _ in range(3):
        chosen, part = rng.integers(0, 2 * corners, count), rng.uniform(-1, 1, count)
        steps[chosen, np.arange(count)] = np.where(rng.random(count) < 2 / 3, REACH * part * abs(part), 0.0)
    return steps.reshape(2, corners, count)


def cut_anew(
    frames: np.ndarray,
    tokens: np.ndarray,
    sizes: np.ndarray,
    steps: np.ndarray,
    budget: Budget,
    scale: np.ndarray,
) -> list[np.ndarray]:
    """As many batches of these utterances (n,) that cost less, as positions; none where no move of corners does.

    sizes: (q,) the batches at present, one after the other. steps: (2, q, moves). scale: seconds that one frame and one
    token cost.
    """
    n, q, starts = len(frames), len(sizes), np.cumsum(sizes) - sizes
    (long, i), (many, j) = (np.unique(values, return_inverse=True) for values in (frames, tokens))
    wide, high = len(long), len(many)  # corners are at lengths that occur
    below = np.bincount(i * high + j, minlength=wide * high).reshape(wide, high).cumsum(0).cumsum(1).ravel()
    here = np.maximum.reduceat(i, starts), np.maximum.reduceat(j, starts)
    present = float((sizes * budget.time(long[here[0]], many[here[1]])).sum())
    t, u = (
        np.clip(at[:, None] + np.rint(step * size), 0, size - 1).astype(np.int64)
        for at, step, size in zip(here, steps, (wide, high))
    )
    seconds = budget.time(long[t], many[u])
    cheapest = np.argsort(seconds, axis=0, kind="stable")
    t, u, seconds = (np.take_along_axis(values, cheapest, axis=0) for values in (t, u, seconds))
    placed = most_placed(below, t, u, high, budget.max_batch(long[t], many[u]))
    taken = np.diff(placed, axis=0)
    cost = (taken * seconds).sum(axis=0)
    cost[(placed[-1] < n) | (taken < 1).any(axis=0)] = np.inf
    best = int(np.argmin(cost))
    if not cost[best] < present * (1 - 1e-12):
        return []
    may = ((i <= t[:, best, None]) & (j <= u[:, best, None])).T @ (1 << np.arange(q))
    own = frames * scale[0] + tokens * scale[1]
    batches: list[list[np.ndarray]] = [[] for _ in range(q)]
    for corners, shares in assign(np.bincount(may, minlength=1 << q).tolist(), taken[:, best].tolist()).items():
        inside = np.flatnonzero(may == corners)
        inside = inside[np.argsort(own[inside], kind="stable")]  # the shorter to the cheaper corner
        for batch, part in zip(batches, np.split(inside, np.cumsum(shares)[:-1])):
            batch.append(part)
    return [np.concatenate(parts) for parts in batches]


def most_placed(below: np.ndarray, t: np.ndarray, u: np.ndarray, high: int, fits: np.ndarray) -> np.ndarray:
    """(q + 1, moves) how many utterances the first 0 ... q corners can take together.

    below: flat table of how many utterances are below each (t, u), `high` columns; t, u: (q, moves) corners; fits: (q,
    moves) how many each may hold. Row S of the tables inside is the subset of corners whose bits S has.
    """
    q, moves = t.shape
    low_t, low_u = (np.full((1 << q, moves), most, np.int64) for most in (len(below) // high - 1, high - 1))
    room = np.zeros((1 << q, moves), np.int64)
    for k in range(q):
        old, new = slice(0, 1 << k), slice(1 << k, 2 << k)
        np.minimum(low_t[old], t[k], out=low_t[new])
        np.minimum(low_u[old], u[k], out=low_u[new])
        np.add(room[old], fits[k], out=room[new])
    reached = below[low_t * high + low_u]  # below all corners of S; by inclusion and exclusion, below any of them
    reached[[s for s in range(1 << q) if s.bit_count() % 2 == 0]] *= -1
    reached[0] = 0
    for k in range(q):
        halves = reached.reshape(-1, 2, 1 << k, moves)
        halves[:, 1] += halves[:, 0]
    short = reached - room
    return np.stack([room[(1 << k) - 1] + short[: 1 << k].min(axis=0) for k in range(q + 1)])


def assign(counts: list[int], needs: list[int]) -> dict[int, list[int]]:
    """How many utterances of each kind go to each corner, so that corner k gets ``needs[k]``.

    counts: of each kind, a kind being the bits of the corners that it may go to. There must be a way: augmenting paths
    find it.
    """
    kinds = sorted((kind for kind, count in enumerate(counts) if count), key=int.bit_count)
    given = {kind: [0] * len(needs) for kind in kinds}
    needs = list(needs)
    left = {kind: counts[kind] for kind in kinds}
    for kind in kinds:  # the least free first, to the corner that costs most
        for k in reversed(range(len(needs))):
            if kind >> k & 1:
                some = min(left[kind], needs[k])
                given[kind][k] += some
                left[kind] -= some
                needs[k] -= some

    def place(kind: int, seen: set[int]) -> bool:
        for k in range(len(needs)):
            if not kind >> k & 1 or k in seen:
                continue
            seen.add(k)
            if needs[k]:
                needs[k] -= 1
            else:
                other = next((one for one in kinds if given[one][k] and place(one, seen)), None)
                if other is None:
                    continue
                given[other][k] -= 1
            given[kind][k] += 1
            return True
        return False

    for kind in kinds:
        while left[kind] and place(kind, set()):
            left[kind] -= 1
    assert not any(left.values())
    return given
