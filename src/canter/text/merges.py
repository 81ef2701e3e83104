"""Learn further merges of a byte-pair encoding (Sennrich et al., 2016, arXiv 1508.07909) from a new text."""

# pyright: strict

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from itertools import pairwise

Pair = tuple[str, str]
MIN_COUNT = 2
"""Minimum number of times that a pair occurs to be merged."""


def learn_merges(words: Mapping[tuple[str, ...], int], pieces: int, known: Collection[str]) -> list[Pair]:
    """Return pairs to merge, in order, that make ``pieces`` new pieces of words that are already cut into pieces.

    words: words as pieces, with the number of times that they occur. known: pieces that exist; a merge whose result is
    one of them makes no new piece. The most frequent pair is merged first, of equally frequent ones the first in
    alphabetical order. Fewer are returned where no pair occurs twice.
    """
    cut = [list(word) for word in words]
    counts = list(words.values())
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for number, word in enumerate(cut):
        for pair in pairwise(word):
            pairs[pair] += counts[number]
            places[pair].add(number)
    merges: list[Pair] = []
    made = set(known)
    while pieces > 0 and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < MIN_COUNT:
            break
        merges.append(best)
        joined = "".join(best)
        pieces -= joined not in made
        made.add(joined)
        for number in places.pop(best):
            word, count = cut[number], counts[number]
            for pair in pairwise(word):
                pairs[pair] -= count
                places[pair].discard(number)
            cut[number] = word = _joined(word, best)
            for pair in pairwise(word):
                pairs[pair] += count
                places[pair].add(number)
        pairs = +pairs
    return merges


def _joined(word: list[str], pair: Pair) -> list[str]:
    """Return the word with every occurrence of the pair joined, from the left."""
    found: list[str] = []
    place = 0
    while place < len(word):
        if place + 1 < len(word) and (word[place], word[place + 1]) == pair:
            found.append(word[place] + word[place + 1])
            place += 2
        else:
            found.append(word[place])
            place += 1
    return found
