"""Groups of utterances of like length, in which a packed micro-batch runs what looks across positions.

A packed micro-batch has no batch axis: its utterances stand one after the other, and linear layers and norms see no
padding. Attention, convolutions and features take groups, each padded to its longest utterance.
"""

from __future__ import annotations

from collections.abc import Sequence

RATIO = 0.85  # shortest utterance of a group over its longest


def group_sizes(lengths: Sequence[float]) -> list[int]:
    """Return the sizes of the groups of utterances that are sorted by descending length.

    A group ends before the first utterance that is shorter than RATIO times the group's first.
    """
    sizes: list[int] = []
    longest = 0.0
    for length in lengths:
        if sizes and length >= RATIO * longest:
            sizes[-1] += 1
        else:
            sizes.append(1)
            longest = length
    return sizes
