from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.corpus.index import LengthIndex, Shard, Source
from canter.errors import PlanError
from canter.planning.windows import Windows, shuffled


@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_shuffle_is_a_bijection(count, key):
    assert np.array_equal(np.sort(shuffled(np.arange(count), count, key)), np.arange(count))


def test_shuffle_is_random():
    moved = shuffled(np.arange(20_000), 20_000, 7)
    assert abs(np.corrcoef(np.arange(20_000), moved)[0, 1]) < 0.03
    assert (np.abs(np.diff(moved)) == 1).sum() < 10
    assert (shuffled(np.arange(20_000), 20_000, 8) == moved).sum() < 10


def test_one_position_of_a_hundred_million():
    rows = shuffled(np.arange(1000) + 99_000_000, 100_000_000, 3)
    assert len(np.unique(rows)) == 1000
    assert 0 <= rows.min() <= rows.max() < 100_000_000


@given(
    st.integers(1, 500), st.integers(20, 300), st.integers(0, 5), st.integers(1, 40), st.integers(1, 4), st.booleans()
)
def test_windows_of_an_epoch_hold_every_row_once(count, size, epoch, block, sources, sorted_):
    source_of = np.arange(count) * sources // count if sorted_ else np.arange(count) % sources
    index = LengthIndex(np.ones(count), np.ones(count, int), [f"s{i}" for i in range(sources)], source_of)
    windows = Windows(index, 1, epoch, size, block=block)
    rows = [windows.rows(w) for w in range(windows.count)]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(count))
    for source in range(sources):  # each is spread evenly
        share = [np.count_nonzero(index.source_of[r] == source) for r in rows]
        assert max(share) - min(share) <= 1 or block > 1


def test_who_is_in_a_window_changes_with_the_epoch():
    index = LengthIndex(np.ones(10_000), np.ones(10_000, int))
    first, second = (set(Windows(index, 0, epoch, 1000).rows(0).tolist()) for epoch in (0, 1))
    assert 50 < len(first & second) < 160


def test_blocks_stay_together():
    index = LengthIndex(np.ones(1000), np.ones(1000, int))
    rows = Windows(index, 0, 0, 500, block=50).rows(0)
    assert len(np.unique(rows // 50)) == 10  # ten whole blocks, ...
    assert sum(np.diff(rows) == 1) < 20  # ... shuffled together


def test_sources_are_shuffled_together():
    index = LengthIndex(np.ones(1000), np.ones(1000, int), ["a", "b"], np.repeat([0, 1], 500))
    rows = Windows(index, 0, 0, 1000).rows(0)
    assert 30 < np.count_nonzero(rows[:100] < 500) < 70


def test_an_endless_stream_has_the_mixture_and_passes_each_source_once_a_pass():
    sources = [Source("a", weight=3.0), Source("b", weight=1.0)]
    index = LengthIndex(np.ones(1000), np.ones(1000, int), sources, np.repeat([0, 1], [100, 900]))
    windows = Windows(index, 5, 0, 200, endless=True)
    assert windows.count is None
    stream = [windows.rows(w) for w in range(18)]
    assert all(np.count_nonzero(r < 100) == 150 for r in stream)
    for first in range(0, 18, 2):  # two windows are three passes of a, 18 are one of b
        counts = np.bincount(np.concatenate(stream[first : first + 2]), minlength=1000)
        assert np.all(counts[:100] == 3)
    assert np.all(np.bincount(np.concatenate(stream), minlength=1000)[100:] == 1)
    assert not np.array_equal(stream[0], stream[2])


def test_no_window_outside_and_no_empty_stream():
    index = LengthIndex(np.ones(10), np.ones(10, int))
    with pytest.raises(PlanError, match="outside"):
        Windows(index, 0, 0, 5).rows(2)
    with pytest.raises(PlanError, match="at least 1"):
        Windows(index, 0, 0, 0)

    @dataclass
    class Unweighted:
        weight: float = 0.0

    index.sources = (Unweighted(),)
    with pytest.raises(PlanError, match="weight 0"):
        Windows(index, 0, 0, 5, endless=True)


def sharded(shards: int, rows: int, sources: int = 1, origin: str = "{}.tar") -> LengthIndex:
    """`shards` archives of `rows` rows for each source."""
    count = shards * rows * sources
    table = [
        Shard(f"part{i}.jsonl", origin.format(i), 1, i // shards, i * rows, (i + 1) * rows)
        for i in range(shards * sources)
    ]
    owner = np.arange(count) // (shards * rows)
    named = [f"s{i}" for i in range(sources)]
    return LengthIndex(np.ones(count), np.ones(count, int), named, owner, shards=table)


def test_blocks_follow_the_shards():
    # 200 rows a shard, 60 of which are a 256th of a window
    assert Windows(sharded(300, 200), 0, 0, 15_360).blocks == [58]  # of 4 windows of 15,000
    assert Windows(sharded(300, 200), 0, 0, 60_000).blocks == [200]  # no more than a shard
    assert Windows(sharded(300, 200, origin="part{}.jsonl"), 0, 0, 60_000).blocks == [200]  # shards of a manifest
    assert Windows(sharded(1, 60_000, origin="part{}.jsonl"), 0, 0, 60_000).blocks == [1]  # one manifest
    assert Windows(sharded(1, 60_000), 0, 0, 60_000).blocks == [234]  # one tar
    assert Windows(sharded(300, 200), 0, 0, 60_000, block=7).blocks == [7]  # what was asked for
    assert Windows(LengthIndex(np.ones(9), np.ones(9, int)), 0, 0, 9).blocks == [1]


@pytest.mark.parametrize("sources", [1, 3])
def test_windows_of_an_epoch_are_read_in_complete_blocks(sources):
    index = sharded(100, 120, sources)
    windows = Windows(index, 0, 0, 4000 * sources)
    size = len(index) // sources
    drawn = [windows.rows(w) for w in range(windows.count)]
    assert np.array_equal(np.sort(np.concatenate(drawn)), np.arange(len(index)))
    for source, block in enumerate(windows.blocks):
        assert block == 15
        for rows in drawn:
            local = rows[index.source_of[rows] == source] - source * size
            _, together = np.unique(local // block, return_counts=True)
            assert np.all(together == block)
            assert len(together) >= 256
    first, second = (Windows(index, 0, epoch, 4000 * sources).rows(0) for epoch in (0, 1))
    assert len(np.intersect1d(first, second)) < 0.6 * len(first)
    assert (np.diff(first) == 1).mean() < 0.01  # shuffled inside


def test_a_sharded_stream_keeps_its_mixture():
    index = sharded(40, 100, 2)
    index.sources = (Source("a", weight=3.0), Source("b", weight=1.0))
    windows = Windows(index, 0, 0, 2000, endless=True)
    assert windows.blocks == [5, 1]
    for window in range(4):
        assert np.count_nonzero(windows.rows(window) < 4000) == 1500
