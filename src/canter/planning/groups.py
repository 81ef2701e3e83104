"""Groups of utterances of like length, in which a packed micro-batch runs what looks across positions.

A packed micro-batch has no batch axis: its utterances stand one after the other, and linear layers and norms see no
padding. Attention, convolutions and features take groups, each padded to its longest utterance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RATIO = 0.85  # shortest utterance of a group over its longest


def group_sizes(lengths: Sequence[float]) -> list[int]:
    """Return the sizes of the groups of utterances that are sorted by descending length.

    A group ends before the first utterance that is shorter than RATIO times the group's first.
    """
    sizes: list[int] = []
    shortest = math.inf
    for length in lengths:
        if length >= shortest:
            sizes[-1] += 1
        else:
            sizes.append(1)
            shortest = RATIO * length
    return sizes


def packed_terms(frames: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the terms of the budget's polynomial for one packed micro-batch, (5,) int64.

    They are sums over utterances and over groups of B utterances, whose longest have T frames and U tokens:
    (sum of frames, sum of B T^2, sum of tokens, sum of B T U, sum of B U^2).

    frames, tokens: (n,) int64, in any order, n at least 1.
    """
    order = frames.argsort()[::-1]
    frames, tokens = frames[order], tokens[order]
    size = np.array(group_sizes(frames.tolist()))
    first = size.cumsum() - size
    longest, most = frames[first], np.maximum.reduceat(tokens, first)
    padded, total = size * longest, size * most
    return np.array([frames.sum(), padded @ longest, tokens.sum(), padded @ most, total @ most])
