"""From a few probes to a budget: two non-negative polynomials, one for memory and one for time."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from canter.planning.budget import TERMS, Budget, Polynomial
from canter.tuning.probe import Probe, Step, probe


def probe_shapes(frames: np.ndarray, tokens: np.ndarray, batch_frames: int) -> list[tuple[int, int, int]]:
    """Shapes (B, T, U) worth measuring: over the range of the utterances' lengths (N,), with few and with many
    tokens for each, alone and as many together as ``batch_frames`` padded frames hold."""
    shapes = []
    for share in (0.05, 0.5, 0.9, 1.0):
        t = int(np.quantile(frames, share))
        near = tokens[(frames >= 0.8 * t) & (frames <= 1.2 * t + 1)]
        for u in {int(np.quantile(near, q)) for q in (0.05, 1.0)}:
            full = max(1, batch_frames // t)
            shapes += [(b, t, u) for b in sorted({max(1, full // 3), full})]
    return shapes


def least_squares(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Non-negative coefficients (K,) that minimise the relative squared error of ``columns`` (N, K) against
    ``values`` (N,). Exact: with so few columns every choice of those above zero can be tried."""
    scaled, ones = columns / values[:, None], np.ones(len(values))
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0] = 1.0
    scaled = scaled / norms
    best, least = np.zeros(columns.shape[1]), np.inf
    for size in range(1, columns.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(columns.shape[1]), size)):
            solution = np.linalg.lstsq(scaled[:, chosen], ones, rcond=None)[0]
            error = np.square(scaled[:, chosen] @ solution - 1).sum()
            if (solution >= 0).all() and error < least:
                best, least = np.zeros(columns.shape[1]), error
                best[chosen] = solution
    return best / norms


def _with_a_slope(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares in which something grows with the batch: of steps so small that noise hides it, a budget without
    a fixed part is the careful reading."""
    found = least_squares(columns, values)
    if not found[1:].any():
        found[0], found[1:] = 0.0, least_squares(columns[:, 1:], values)
    return found


def fit(probes: Sequence[Probe], limit_bytes: float, frame_seconds: float, measured_on: dict) -> Budget:
    """The budget that explains the probes best. ``measured_on`` gains the median relative errors."""
    b, t, u = (np.array([getattr(p, name) for p in probes], float) for name in ("batch", "frames", "tokens"))
    columns = np.stack([np.ones_like(b), b * t, b * t * t, b * u, b * t * u, b * u * u], axis=1)
    size, seconds = (np.array([getattr(p, name) for p in probes], float) for name in ("bytes", "seconds"))
    memory, time = _with_a_slope(columns, size), _with_a_slope(columns, seconds)
    errors = {
        "memory_error": float(np.median(np.abs(columns @ memory / size - 1))),
        "time_error": float(np.median(np.abs(columns @ time / seconds - 1))),
    }
    return Budget(
        limit_bytes=float(limit_bytes),
        fixed_bytes=float(memory[0]),
        memory=Polynomial(**dict(zip(TERMS, memory[1:].tolist(), strict=True))),
        fixed_seconds=float(time[0]),
        time=Polynomial(**dict(zip(TERMS, time[1:].tolist(), strict=True))),
        frame_seconds=frame_seconds,
        measured_on=measured_on | {key: round(value, 4) for key, value in errors.items()},
    )


def measure_budget(
    step: Step,
    frames: np.ndarray,
    tokens: np.ndarray,
    *,
    limit_bytes: float,
    batch_frames: int,
    frame_seconds: float,
    measured_on: dict,
    track: Callable[[list], Iterable] = iter,
) -> Budget:
    """Probes ``step`` over the lengths (N,) of the data and fits a budget; ``track`` wraps the shapes to show
    progress."""
    shapes = probe_shapes(frames, tokens, batch_frames)
    step(*shapes[-1])  # the first step pays for one-off set-up
    return fit([probe(step, *shape) for shape in track(shapes)], limit_bytes, frame_seconds, measured_on)
