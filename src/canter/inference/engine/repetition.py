"""The guard against repetition: it ends rows that run in circles, and changes no token.

A model that meets audio it was not trained for may write the same words over and over until the limit on tokens stops
it. People repeat themselves too (digits, "no no no", laughter), so repetition alone ends nothing: a row must also have
more tokens than anybody can say in the time. Its text is then cut after a few repeats, so what is left is the beginning
of what the model would have written without a guard.

B: live rows, N: the longest n-gram.
"""

from collections.abc import Sequence

import numpy as np

LEAST_REPEATS = 8
"""Times that an n-gram follows itself at the end of a row before the row is taken to run in circles."""


class RepetitionGuard:
    """Watches the tokens of the live rows; rows sit in slots as in the decoder's cache."""

    def __init__(self, ngram: int, repeats: int):
        """``ngram``: the longest n-gram that is looked at; ``repeats``: how often it may still follow itself in the
        text of a row that ran in circles. 0 of either turns the guard off."""
        self.repeats = repeats
        self.sizes = np.arange(1, ngram + 1 if repeats else 1)  # (N,)
        # (B, N) the latest tokens, the newest first
        self.last = np.zeros((0, len(self.sizes)), dtype=np.int64)
        # (B, N) how many of a row's latest tokens equal the one n before: n x r where an n-gram
        # followed itself r times
        self.equal = self.last.copy()
        self.allowed = np.zeros(0)  # (B,) tokens that the row's audio has time for
        self.counts = np.zeros(0, dtype=np.int64)  # (B,) tokens so far

    def add(self, allowed: Sequence[float]) -> None:
        """Add rows in the next slots, each with the number of tokens that its audio has time for (infinite: the row is
        not guarded)."""
        new = np.zeros((len(allowed), len(self.sizes)), dtype=np.int64)
        self.last, self.equal = np.concatenate([self.last, new - 1]), np.concatenate([self.equal, new])
        self.allowed = np.concatenate([self.allowed, np.array(allowed, dtype=float)])
        self.counts = np.concatenate([self.counts, np.zeros(len(allowed), dtype=np.int64)])

    def remove(self, slots: list[int]) -> None:
        """Remove rows; the last ones take their slots."""
        for slot in sorted(slots, reverse=True):
            for name in ("last", "equal", "allowed", "counts"):
                values = getattr(self, name)
                values[slot] = values[-1]
                setattr(self, name, values[:-1])

    def took(self, chosen: Sequence[int], first: int = 0) -> dict[int, int]:
        """Note the next tokens of the rows from slot ``first`` on.

        Returns the slots of rows that have gone round in circles for longer than their audio lasts: n-grams that follow
        one another take up all the tokens that there is time for. The value is the number of tokens to keep.
        """
        self.counts[first:] += 1
        if not len(self.sizes) or not len(chosen):
            return {}
        tokens = np.array(chosen)[:, None]
        last, equal = self.last[first:], self.equal[first:]
        equal[:] = np.where(last == tokens, equal + 1, 0)
        last[:, 1:] = last[:, :-1].copy()
        last[:, :1] = tokens
        span = equal + self.sizes
        circling = (equal >= LEAST_REPEATS * self.sizes) & (span > self.allowed[first:, None])
        return {first + int(row): self._kept(first + int(row)) for row in np.flatnonzero(circling.any(1))}

    def at_limit(self, slot: int) -> int:
        """Return how many tokens to keep of a row that has reached the limit on tokens: all, unless it has more than
        its audio has time for and ends in circles."""
        if not len(self.sizes) or self.counts[slot] < self.allowed[slot]:
            return int(self.counts[slot])
        return self._kept(slot)

    def _kept(self, slot: int) -> int:
        """Return the number of tokens up to the last repeat that is kept of the shortest n-gram that circles."""
        circling = np.flatnonzero(self.equal[slot] >= LEAST_REPEATS * self.sizes)
        if not len(circling):
            return int(self.counts[slot])
        size = int(self.sizes[circling[0]])
        span = int(self.equal[slot, circling[0]]) + size
        return int(self.counts[slot]) - max(0, span - size * (self.repeats + 1))
