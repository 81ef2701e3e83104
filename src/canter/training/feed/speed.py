"""Speed perturbation known to the plan: speeds are drawn before utterances are batched by their lengths."""

from functools import cached_property

import numpy as np

from canter.corpus.index import LengthIndex, Shard, Source
from canter.planning.windows import mix

SALT = 0x5BEED


def speeds_of(rows: np.ndarray, seed: int, epoch: int, speeds: tuple[float, ...]) -> np.ndarray:
    """Return the speed of each of ``rows`` (N,) in an epoch, chosen by a hash of (seed, epoch, row): (N,) float64."""
    h = rows.astype(np.uint64) + np.uint64(mix(seed, epoch, SALT))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    return np.array(speeds)[((h ^ (h >> np.uint64(31))) % np.uint64(len(speeds))).astype(np.int64)]


class AtSpeed:
    """Length index whose seconds follow from an epoch's speeds; it has all else from another index."""

    def __init__(self, index: LengthIndex, seed: int, epoch: int, speeds: tuple[float, ...]):
        self.index, self.seed, self.epoch, self.speeds = index, seed, epoch, speeds

    def __len__(self) -> int:
        return len(self.index)

    @property
    def tokens(self) -> np.ndarray:
        return self.index.tokens

    @property
    def source_of(self) -> np.ndarray:
        return self.index.source_of

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.index.sources

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.index.shards

    @property
    def seconds(self) -> np.ndarray:
        """Seconds (N,) float32 at the epoch's speeds."""
        return self._seconds

    @cached_property
    def _seconds(self) -> np.ndarray:
        speeds = speeds_of(np.arange(len(self.index)), self.seed, self.epoch, self.speeds)
        return (self.index.seconds / speeds).astype(np.float32)

    @property
    def fingerprint(self) -> str:
        """Fingerprint, the same for all epochs, as that of a plan."""
        return f"{self.index.fingerprint}@{self.speeds}"

    def at_epoch(self, epoch: int) -> "AtSpeed":
        return AtSpeed(self.index, self.seed, epoch, self.speeds)
