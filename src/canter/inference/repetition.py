"""The guard against repetition, for models that fall into a loop on audio they were not trained for.

The rule: no n-gram of 1 to N tokens may follow itself more than R times. A token that would complete one
repeat too many is passed over for the next best one. End tokens end a row, so they are never passed over.

B: live rows, V: vocabulary, N: the longest n-gram.
"""

import math

import numpy as np
from torch import Tensor


class RepetitionGuard:
    """Chooses the best allowed token of each live row; rows sit in slots as in the decoder's cache."""

    def __init__(self, ngram: int, repeats: int):
        """``repeats``: R of the rule; 0 (or ``ngram`` 0) turns the guard off."""
        self.repeats = repeats
        self.sizes = np.arange(1, ngram + 1 if repeats else 1)  # (N,)
        self.last = np.zeros(
            (0, len(self.sizes)), dtype=np.int64
        )  # (B, N) the latest tokens, the newest first
        # (B, N) how many of a row's latest tokens equal the one n before: n x r where an n-gram
        # followed itself r times
        self.equal = self.last.copy()

    def add(self, rows: int) -> None:
        """New rows, in the next slots."""
        new = np.zeros((rows, len(self.sizes)), dtype=np.int64)
        self.last, self.equal = np.concatenate([self.last, new - 1]), np.concatenate([self.equal, new])

    def remove(self, slots: list[int]) -> None:
        """Rows leave, the last ones take their slots."""
        for slot in sorted(slots, reverse=True):
            self.last[slot], self.equal[slot] = self.last[-1], self.equal[-1]
            self.last, self.equal = self.last[:-1], self.equal[:-1]

    def choose(self, logits: Tensor, first: int = 0) -> list[int]:
        """logits (B, V) of the rows from slot ``first`` on -> their next tokens. Writes -inf where one is
        passed over."""
        chosen = logits.argmax(-1).cpu().numpy()
        if not len(self.sizes):
            return chosen.tolist()
        last = self.last[first:]
        equal = np.where(last == chosen[:, None], self.equal[first:] + 1, 0)
        too_often = (self.repeats + 1) * self.sizes
        for row in np.flatnonzero((equal >= too_often).any(1)):
            while (equal[row] >= too_often).any():
                logits[row, chosen[row]] = -math.inf
                chosen[row] = int(logits[row].argmax())
                equal[row] = np.where(last[row] == chosen[row], self.equal[first + row] + 1, 0)
        self._advance(first, chosen, equal)
        return chosen.tolist()

    def forbid(self, logits: Tensor, first: int = 0) -> None:
        """Write -inf in logits (B, V) of the rows from slot ``first`` on, at the tokens that the rule forbids."""
        too_often = self.equal[first:] + 1 >= (self.repeats + 1) * self.sizes
        for row, size in zip(*np.nonzero(too_often)):
            logits[row, self.last[first + row, size]] = -math.inf

    def took(self, chosen: list[int], first: int = 0) -> None:
        """Note the tokens that the rows from slot ``first`` on have taken."""
        if len(self.sizes):
            tokens = np.array(chosen)
            self._advance(
                first, tokens, np.where(self.last[first:] == tokens[:, None], self.equal[first:] + 1, 0)
            )

    def _advance(self, first: int, chosen: np.ndarray, equal: np.ndarray) -> None:
        last = self.last[first:]
        self.equal[first:] = equal
        self.last[first:, 1:] = last[:, :-1].copy()
        self.last[first:, 0] = chosen
