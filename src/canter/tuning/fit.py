"""A budget from a few probes: two non-negative polynomials, one for memory and one for time.

Probes are chosen over the range of the data's lengths, small batches first, so that every larger one is expected to
fit. Then the most extreme shapes of a plan with that budget are measured, and the fit is repeated with them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from canter.corpus.index import LengthIndex
from canter.errors import BudgetError
from canter.planning.budget import TERMS, Budget, Polynomial
from canter.planning.lengths import Index
from canter.planning.plan import Plan
from canter.runtime import gib
from canter.tuning.probe import BatchShape, Probe, Prober

MOST_PROBES = 40
MOST_EVENTS = 5  # out-of-memory failures after which only probes that are expected to fit easily are run
FILLED = 0.65  # maximum fraction of the memory for a batch that an exploring probe is expected to take
LARGE = 0.25  # power of a step's bytes that weights its error
LEAST_MARGIN = 0.01
OUTLIER = 3.0  # multiple of the median residual above which a step's time is left out: another process delayed it
ROUNDS = 3  # of measuring the plan's extreme batches; a plan from a better budget has others
WINDOW = 50_000  # batching window of the plan whose extreme batches are measured


def least_squares(columns: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the non-negative coefficients (K,) of ``columns`` (N, K) that explain ``values`` (N,) best.

    They minimise the squared errors, each times its weight (N,) (default: relative errors). The result is exact: with
    so few columns, every subset of non-zero coefficients can be tried.
    """
    weights = 1 / values if weights is None else weights
    scaled, wanted = columns * weights[:, None], values * weights
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0] = 1.0
    scaled = scaled / norms
    best, least = np.zeros(columns.shape[1]), np.inf
    for size in range(1, columns.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(columns.shape[1]), size)):
            solution = np.linalg.lstsq(scaled[:, chosen], wanted, rcond=None)[0]
            error = np.square(scaled[:, chosen] @ solution - wanted).sum()
            if (solution >= 0).all() and error < least:
                best, least = np.zeros(columns.shape[1]), error
                best[chosen] = solution
    return best / norms


def _with_a_slope(columns: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return least squares in which something grows with the batch.

    If steps are so small that noise hides the growth, a budget without a fixed part is the safe reading.
    """
    found = least_squares(columns, values, weights)
    if not found[1:].any():
        found[0], found[1:] = 0.0, least_squares(columns[:, 1:], values, weights)
    return found


def _without_outliers(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Fit twice, the second time without steps that took much longer than others: noise only ever adds."""
    found = _with_a_slope(columns, values)
    residual = values / np.maximum(columns @ found, 1e-12) - 1
    keep = residual <= OUTLIER * max(float(np.median(np.abs(residual))), 0.02)
    return _with_a_slope(columns[keep], values[keep]) if keep.sum() > columns.shape[1] else found


def fit(
    probes: Sequence[Probe],
    limit_bytes: float,
    frame_seconds: float,
    measured_on: Mapping[str, object],
    state_bytes: float = 0.0,
) -> Budget:
    """Return the budget that explains the probes best.

    ``state_bytes`` of the probes' bytes do not depend on the batch. Memory is fitted to the steps that fitted, time to
    those that were timed. The budget's ``measured_on`` gains the median relative errors, which are the precision of a
    prediction between probes.
    """
    used = [probe for probe in probes if probe.fits]
    timed = [probe for probe in used if np.isfinite(probe.seconds)]
    if not timed:
        raise BudgetError("no step could be timed: every one came too close to the limit; raise the limit")
    size, seconds = np.array([p.bytes for p in used]), np.array([p.seconds for p in timed])
    columns = _columns(used)
    # relative errors, which count more for large steps: those are the ones that must fit
    weight = (size / size.max()) ** LARGE / size
    memory = _with_a_slope(columns, np.maximum(size - state_bytes, 1.0), weight)
    memory[0] += state_bytes
    time = _without_outliers(_columns(timed), seconds)
    errors = {
        "memory_error": float(np.median(np.abs(columns @ memory / size - 1))),
        "time_error": float(np.median(np.abs(_columns(timed) @ time / seconds - 1))),
    }
    return Budget(
        limit_bytes=float(limit_bytes),
        fixed_bytes=float(memory[0]),
        memory=Polynomial(**dict(zip(TERMS, memory[1:].tolist(), strict=True))),
        fixed_seconds=float(time[0]),
        time=Polynomial(**dict(zip(TERMS, time[1:].tolist(), strict=True))),
        frame_seconds=frame_seconds,
        measured_on=dict(measured_on) | {key: round(value, 4) for key, value in errors.items()},
    )


def _columns(probes: Sequence[Probe]) -> np.ndarray:
    b, t, u = (np.array([getattr(p, name) for p in probes], float) for name in ("batch", "frames", "tokens"))
    return np.stack([np.ones_like(b), b * t, b * t * t, b * u, b * t * u, b * u * u], axis=1)


def anchors(frames: np.ndarray, tokens: np.ndarray, fractions: Sequence[float]) -> list[tuple[int, int]]:
    """Return (T, U) over the range of the utterances' lengths (N,), ascending.

    They are the T at these quantiles, each with few and with many tokens for that T.
    """
    found = set()
    for fraction in fractions:
        # an utterance's own T: there may be none near a value between two
        t = int(np.quantile(frames, fraction, method="lower"))
        near = tokens[(frames >= 0.8 * t) & (frames <= 1.2 * t + 1)]
        found |= {(t, max(1, int(np.quantile(near, q)))) for q in (0.05, 1.0)}
    return sorted(found)


def corners(index: Index, budget: Budget) -> list[BatchShape]:
    """Return the extreme shapes among the micro-batches of a balanced plan of ``index``.

    They are the largest by each term of the budget, and the smallest.
    """
    cut = Plan(index, budget, window=min(WINDOW, len(index)), min_steps=1).cut(0)
    if not len(cut.rows):
        return []
    b = np.diff(cut.batches)
    t = np.maximum.reduceat(cut.lengths.frames, cut.batches[:-1])
    u = np.maximum.reduceat(cut.lengths.tokens, cut.batches[:-1])
    size = budget.bytes(b, t, u)
    seconds = budget.step_seconds(b, t, u)
    extremes = (size, t, b, u, b * t, b * t * t, b * t * u, b * u * u, seconds, -t, -u, size / t)
    found: dict[BatchShape, None] = {}
    for values in extremes:
        i = int(np.argmax(values))
        found[BatchShape(int(b[i]), int(t[i]), int(u[i]))] = None
    return list(found)


def margin(budget: Budget, probes: Sequence[Probe]) -> float:
    """Return the fraction by which a batch may exceed its prediction.

    It is the most by which any large probe did, and enough to stay clear of those that did not fit.
    """
    fitting = [p for p in probes if p.fits]
    large = max(p.bytes for p in fitting) / 2
    over = [p.bytes / budget.bytes(*p.shape) - 1 for p in fitting if p.bytes >= large]
    failed = [budget.limit_bytes / budget.bytes(*p.shape) - 1 for p in probes if not p.fits]
    return max(LEAST_MARGIN, *over, *(1.01 * excess + 0.005 for excess in failed))


def fit_budget(
    prober: Prober,
    index: Index,
    *,
    most_probes: int = MOST_PROBES,
    most_frames: int | None = None,
    probe_seconds: float | None = None,
) -> Budget:
    """Probe a step over the lengths of ``index`` and return the fitted budget: the prober's limit less a margin.

    A probe holds at most ``most_frames`` padded frames and takes at most about ``probe_seconds``: costs grow in
    proportion to B, so smaller batches predict larger ones. Raises BudgetError if not even the shortest utterances fit.
    """
    search = _Exploration(prober, index, most_probes, most_frames, probe_seconds)
    try:
        budget, unseen = search.run()
    finally:
        for _ in search.progress:  # fewer probes may have been enough
            pass
    if unseen:
        prober.events.message(
            f"the plan's {len(unseen)} extreme batches took {min(unseen):+.1%} to {max(unseen):+.1%} of what was "
            "predicted before they were measured"
        )
    return budget


def within(index: LengthIndex, seconds: float, tokens: int) -> LengthIndex:
    """Return the rows that a model can take, of up to ``seconds`` and ``tokens``. Raises BudgetError for none."""
    keep = (np.asarray(index.seconds) <= seconds) & (np.asarray(index.tokens) <= tokens)
    if keep.all():
        return index
    if not keep.any():
        raise BudgetError(
            f"not one of {len(index):,} utterances is within the model's {seconds:g} s and {tokens} tokens"
        )
    return LengthIndex(np.asarray(index.seconds)[keep], np.asarray(index.tokens)[keep])


class _Exploration:
    """Choice of the shapes to measure next."""

    def __init__(
        self, prober: Prober, index: Index, most_probes: int, most_frames: int | None, probe_seconds: float | None
    ):
        self.prober, self.index, self.frame_seconds = prober, index, prober.step.frame_seconds
        self.progress = iter(prober.events.progress(range(most_probes), "measuring"))
        self.shown = 0
        self.most_probes, self.most_frames, self.probe_seconds = most_probes, most_frames, probe_seconds
        lengths = np.asarray(index.seconds, np.float64)
        stride = slice(None, None, max(1, len(lengths) // 200_000))
        self.frames = np.maximum(1, np.ceil(lengths[stride] / self.frame_seconds)).astype(np.int64)
        self.tokens = np.maximum(2, np.asarray(index.tokens[stride]).astype(np.int64))

    @property
    def left(self) -> int:
        """Number of probes that may still be made; the last one may have to run twice."""
        return self.most_probes - 1 - self.prober.spent

    def run(self) -> tuple[Budget, list[float]]:
        """Return the fitted budget, and the relative errors of its predictions for shapes not measured before."""
        points = self.single_utterances()
        for fraction in (0.08, 0.25, FILLED) if self.most_probes >= 30 else (0.2, FILLED):
            for point in points:
                self.fill(point, fraction)
        budget, unseen = self.fitted(), []
        for _ in range(ROUNDS):
            for shape in [s for s in self.extremes(budget) if s not in self.prober.known]:
                if self.left and self.prober.out_of_memory < MOST_EVENTS:
                    expected = float(budget.bytes(*shape))
                    unseen.append(self.measure(shape, expected).bytes / expected - 1)
            if not self.left or self.prober.out_of_memory >= MOST_EVENTS:
                break
            budget = self.fitted()
        return self.fitted(unseen), unseen

    def measure(self, shape: BatchShape, expected: float) -> Probe:
        """Measure a batch and move the progress on."""
        probe = self.prober(*shape, expected=expected)
        while self.shown < self.prober.spent:
            next(self.progress, None)
            self.shown += 1
        return probe

    def single_utterances(self) -> list[tuple[int, int]]:
        """Measure one utterance of each anchor, from short to long; return the anchors that fit."""
        fractions = (0.05, 1.0)  # few probes: batches of several tell the terms of a step apart
        if self.most_probes >= 12:
            fractions = (0.02, 0.5, 0.9, 1.0) if self.most_probes >= 30 else (0.05, 0.5, 1.0)
        points = anchors(self.frames, self.tokens, fractions)
        self.prober.warm_up(1, *points[0])
        state, last, fitting = self.prober.step.state_bytes, None, []
        always = state + self.prober.step.gradient_bytes
        for t, u in points:
            expected = 0.0  # the warm-up has shown that the shortest fits
            if last is not None:
                expected = always + (last.bytes - always) * max(t / last.frames, u / last.tokens, 1.0)
            probe = self.measure(BatchShape(1, t, u), expected)
            if not probe.fits:
                self.prober.events.message(
                    f"one utterance of {t * self.frame_seconds:.1f} s and {u} tokens asked for {gib(probe.bytes)} of "
                    f"{gib(self.prober.limit_bytes)}: such utterances will be left out of plans; cut their audio, or "
                    "raise the limit"
                )
                continue
            last, fitting = probe, [*fitting, (t, u)]
        if not fitting:
            t, u = points[0]
            raise BudgetError(
                f"not even one utterance of {t * self.frame_seconds:.1f} s and {u} tokens fits in "
                f"{gib(self.prober.limit_bytes)}, {gib(state)} of which are weights and optimiser state; raise the "
                "limit, or use a smaller model"
            )
        return fitting

    def fill(self, point: tuple[int, int], fraction: float) -> None:
        """Measure the batch of an anchor that is expected to take ``fraction`` of the memory for a batch."""
        budget, (t, u) = self.fitted(), point
        known = [p for p in self.prober.fitting if (p.frames, p.tokens) == point]
        if self.prober.out_of_memory >= MOST_EVENTS:
            fraction = min(fraction, 0.3)
        batch = self.bounded(budget, t, u, fraction)
        batch = min(batch, 16 * max(p.batch for p in known))  # no far extrapolation
        shape = BatchShape(batch, t, u)
        if self.left and shape not in self.prober.known:
            self.measure(shape, float(budget.bytes(*shape)))

    def bounded(self, budget: Budget, frames: int, tokens: int, fraction: float) -> int:
        """Return the largest B that takes ``fraction`` of the memory and keeps to the bounds on a probe."""
        room = fraction * (budget.limit_bytes - budget.fixed_bytes)
        batch = room / float(budget.utterance_bytes(frames, tokens))
        scale = fraction / FILLED
        if self.most_frames is not None:
            batch = min(batch, scale * self.most_frames / frames)
        if self.probe_seconds is not None:
            batch = min(batch, scale * self.probe_seconds / float(budget.utterance_seconds(frames, tokens)))
        return max(1, int(batch))

    def extremes(self, budget: Budget) -> list[BatchShape]:
        """Return the plan's extreme batches, smaller where a probe may not be as large."""
        shapes = [BatchShape(min(b, self.bounded(budget, t, u, 1.0)), t, u) for b, t, u in corners(self.index, budget)]
        return list(dict.fromkeys(shape for shape in shapes if shape.tokens > 1))

    def fitted(self, unseen: Sequence[float] = ()) -> Budget:
        prober = self.prober
        budget = fit(prober.probes, prober.limit_bytes, self.frame_seconds, prober.measured_on, prober.step.state_bytes)
        spare = margin(budget, prober.probes)
        found = dict(budget.measured_on) | {
            "margin": round(spare, 4),
            "probes": len(prober.known),
            "out_of_memory": prober.out_of_memory,
            "largest_probe_bytes": max(p.bytes for p in prober.fitting),
        }
        if unseen:
            found["error_unseen"] = round(float(np.median(np.abs(unseen))), 4)
        limit = float(int(prober.limit_bytes / (1 + spare)))
        return dataclasses.replace(budget, limit_bytes=limit, measured_on=found)
