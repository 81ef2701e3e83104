import numpy as np
import pytest

from canter.corpus.index import LengthIndex
from canter.planning import Budget, Polynomial


def lengths(count: int, seed: int = 0, sources: int = 1) -> LengthIndex:
    """Speech-like lengths: short commands, read speech, long turns; tokens about proportional with a tail."""
    rng = np.random.default_rng(seed)
    seconds = np.where(rng.random(count) < 0.4, rng.gamma(3, 0.8, count) + 0.5, rng.uniform(2, 20, count)).round(3)
    tokens = np.round(seconds * 3.2 * np.exp(rng.normal(0, 0.35, count))) + 8
    names = [f"source{i}" for i in range(sources)]
    return LengthIndex(seconds, tokens.astype(np.int64), names, np.sort(rng.integers(0, sources, count)))


@pytest.fixture(scope="session")
def index() -> LengthIndex:
    return lengths(3000)


@pytest.fixture(scope="session")
def budget() -> Budget:
    """About 300 seconds of audio a batch, tokens counting a quarter."""
    return Budget(
        limit_bytes=10e9,
        fixed_bytes=1e9,
        memory=Polynomial(T=2.3e6, TT=2300, U=1.5e6, TU=1500, UU=1500),
        time=Polynomial(T=1.7e-5, TT=1.8e-9, U=8.6e-6, TU=1.2e-9, UU=6e-10),
        fixed_seconds=0.02,
    )
