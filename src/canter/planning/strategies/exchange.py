"""Exchange utterances between like batches at random, so that in small sets they meet others in every epoch.

The best batches of a small set are nearly the same in each epoch: of 3 h in 400 batches half of the pairs meet again,
and a third of the batches are identical. Two batches that are neighbours in length are thrown together and dealt out
anew; the exchange stays where it costs at most `TOLERANCE` more time and both still fit the memory.
"""

from __future__ import annotations

import numpy as np

from canter.planning.budget import Budget

ROUNDS = 2  # the first pairs batches by frames, the second by tokens
TOLERANCE = 0.02


def exchanged(
    order: np.ndarray,
    batches: np.ndarray,
    frames: np.ndarray,
    tokens: np.ndarray,
    budget: Budget,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return `order` with utterances exchanged between its batches, which keep their sizes.

    order: (n,) positions. batches: (count + 1,) offsets in it. frames, tokens: (n,) by position.
    """
    members = np.split(order, batches[1:-1])
    room = budget.limit_bytes - budget.fixed_bytes

    def bounds(rows: np.ndarray) -> tuple[int, int]:
        return int(frames[rows].max()), int(tokens[rows].max())

    found = [bounds(rows) for rows in members]
    for turn in range(ROUNDS):
        by_length = sorted(range(len(members)), key=lambda b: found[b][:: -1 if turn % 2 else 1])
        first = int(rng.integers(0, 2))
        for one, other in zip(by_length[first::2], by_length[first + 1 :: 2]):
            size, rest = len(members[one]), len(members[other])
            together = rng.permutation(np.concatenate([members[one], members[other]]))
            dealt = together[:size], together[size:]
            now = bounds(dealt[0]), bounds(dealt[1])
            if max(size * budget.memory(*now[0]), rest * budget.memory(*now[1])) > room:
                continue
            before = size * budget.time(*found[one]) + rest * budget.time(*found[other])
            if size * budget.time(*now[0]) + rest * budget.time(*now[1]) > (1 + TOLERANCE) * before:
                continue
            (members[one], members[other]), (found[one], found[other]) = dealt, now
    return np.concatenate(members)
