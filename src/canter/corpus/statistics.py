"""Statistics of lengths: quantiles, the joint histogram, and rows with implausible speaking rates."""

from dataclasses import dataclass

import numpy as np

from canter.corpus.index import LengthIndex

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
CHUNK = 1 << 22  # rows converted to float64 at a time, to bound the memory


@dataclass(frozen=True)
class SourceSummary:
    """One source of the mixture: rows, hours, fraction of the draws, and means over its rows."""

    name: str
    rows: int
    hours: float
    weight: float
    mean_seconds: float
    mean_tokens: float
    tokens_per_second: float


@dataclass(frozen=True)
class Outlier:
    """A row, its tokens per second, and their distance from the mean in standard deviations."""

    row: int
    seconds: float
    tokens: int
    tokens_per_second: float
    z: float


@dataclass(frozen=True)
class Summary:
    """Statistics of an index. ``quantiles`` are of each column at `QUANTILES`; rates are tokens per second."""

    rows: int
    hours: float
    tokens: int
    quantiles: dict[str, list[float]]
    mean_rate: float
    std_rate: float
    z_bound: float
    beyond_bound: int
    outliers: list[Outlier]
    sources: list[SourceSummary]
    skipped: dict[str, int]

    @property
    def rate_bound(self) -> float:
        """Tokens per second above which a row is an outlier."""
        return self.mean_rate + self.z_bound * self.std_rate


def summarise(index: LengthIndex, *, z_bound: float = 4.0, most_outliers: int = 10) -> Summary:
    """Return counts, quantiles and outliers of an index.

    The bound on tokens per second, mean + z standard deviations, is that of 2-D bucketing's bin estimation
    (Żelasko et al. 2025, section 3.1, and the scripts released with it).
    """
    rates = np.divide(index.tokens, index.seconds, dtype=np.float32)
    parts = [rates[start : start + CHUNK].astype(np.float64) for start in range(0, len(rates), CHUNK)]
    mean = sum(part.sum() for part in parts) / len(rates)
    std = float(np.sqrt(sum(((part - mean) ** 2).sum() for part in parts) / len(rates)))
    del parts
    deviation = np.abs(rates - np.float32(mean))
    count = min(most_outliers, len(rates))
    top = np.argpartition(deviation, len(rates) - count)[len(rates) - count :] if count else np.zeros(0, int)
    top = top[np.argsort(-deviation[top], kind="stable")]
    z = (rates[top].astype(np.float64) - mean) / std if std else np.zeros(count)
    outliers = [
        Outlier(int(row), float(index.seconds[row]), int(index.tokens[row]), float(rates[row]), float(score))
        for row, score in zip(top, z, strict=True)
        if abs(score) > z_bound
    ]
    columns = {"seconds": index.seconds, "tokens": index.tokens, "tokens_per_second": rates}
    seconds = np.bincount(index.source_of, index.seconds, len(index.sources))
    tokens = np.bincount(index.source_of, index.tokens, len(index.sources))
    sources = [
        SourceSummary(
            source.name,
            int(rows),
            float(seconds[number] / 3600),
            float(index.weights[number]),
            float(seconds[number] / max(rows, 1)),
            float(tokens[number] / max(rows, 1)),
            float(tokens[number] / seconds[number]) if rows else 0.0,
        )
        for number, (source, rows) in enumerate(zip(index.sources, index.rows_of, strict=True))
    ]
    return Summary(
        len(index),
        float(seconds.sum() / 3600),
        int(tokens.sum()),
        {name: [float(value) for value in np.quantile(column, QUANTILES)] for name, column in columns.items()},
        float(mean),
        std,
        z_bound,
        int((rates > mean + z_bound * std).sum()),
        outliers,
        sources,
        index.skipped,
    )


def joint_histogram(
    index: LengthIndex, seconds_bins: int, tokens_bins: int, upper: float = 0.995
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ``(counts (seconds_bins, <= tokens_bins), seconds' edges, tokens' edges)`` from 0 to quantile ``upper``.

    Bins of tokens have integer widths. Longer rows are counted in the last bins, so that the counts sum to all rows.
    """
    most_seconds = max(float(np.quantile(index.seconds, upper)), 1e-3)
    most_tokens = max(int(np.quantile(index.tokens, upper)), 1)
    width = -(-most_tokens // tokens_bins)
    tokens_bins = most_tokens // width + 1
    counts = np.zeros((seconds_bins, tokens_bins), np.int64)
    for start in range(0, len(index), CHUNK):
        part = slice(start, start + CHUNK)
        x = np.minimum((index.seconds[part] * (seconds_bins / most_seconds)).astype(np.int64), seconds_bins - 1)
        y = np.minimum(index.tokens[part] // width, tokens_bins - 1)
        counts += np.bincount(x * tokens_bins + y, minlength=counts.size).reshape(counts.shape)
    return counts, np.linspace(0, most_seconds, seconds_bins + 1), np.arange(tokens_bins + 1) * width
