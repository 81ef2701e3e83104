"""From a few probes to a budget: two non-negative polynomials, one for memory and one for time.

Probes are chosen over the range of the data's lengths, small batches first, so that every larger one is expected to
fit; then the shapes that a plan will really ask for at its extremes are run, and what they teach is added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from canter.corpus.index import LengthIndex
from canter.errors import BudgetError
from canter.planning.budget import TERMS, Budget, Polynomial
from canter.planning.lengths import Index
from canter.planning.plan import Plan
from canter.tuning.probe import BatchShape, Probe, Prober, gib

MOST_PROBES = 40
MOST_EVENTS = 5  # out of memory, after which nothing is run that is not expected to fit easily
FILLED = 0.65  # of what the limit leaves for a batch, the most that exploring ones are expected to take
LARGE = 0.25  # power of a step's bytes by which its error counts more
LEAST_MARGIN = 0.01
OUTLIER = 3.0  # times the median residual of times: a step that something else on the machine held up
ROUNDS = 3  # of running the plan's extreme batches; a plan from a better budget has others
WINDOW = 50_000  # utterances of the plan whose extreme batches are run


def least_squares(columns: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Non-negative coefficients (K,) that minimise the squared errors of ``columns`` (N, K) against ``values`` (N,),
    each times its weight (N,); none: relative errors. Exact: with so few columns every choice of those above zero can
    be tried."""
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
    """Least squares in which something grows with the batch: of steps so small that noise hides it, a budget without
    a fixed part is the careful reading."""
    found = least_squares(columns, values, weights)
    if not found[1:].any():
        found[0], found[1:] = 0.0, least_squares(columns[:, 1:], values, weights)
    return found


def _without_outliers(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """As above, fitted again without the steps that took much longer than their like: noise only ever adds."""
    found = _with_a_slope(columns, values)
    residual = values / np.maximum(columns @ found, 1e-12) - 1
    keep = residual <= OUTLIER * max(float(np.median(np.abs(residual))), 0.02)
    return _with_a_slope(columns[keep], values[keep]) if keep.sum() > columns.shape[1] else found


def fit(
    probes: Sequence[Probe],
    limit_bytes: float,
    frame_seconds: float,
    measured_on: dict,
    state_bytes: float = 0.0,
) -> Budget:
    """The budget that explains the probes best, of whose bytes ``state_bytes`` are there whatever the batch.
    ``measured_on`` gains the median relative errors; they are what a plan may trust between the probes.

    Memory is fitted to the steps that fitted, time to those that were timed.
    """
    used = [probe for probe in probes if probe.fits]
    timed = [probe for probe in used if np.isfinite(probe.seconds)]
    if not timed:
        raise BudgetError("no step could be timed: every one came too close to the limit; raise the limit")
    size, seconds = np.array([p.bytes for p in used]), np.array([p.seconds for p in timed])
    columns = _columns(used)
    # errors count as shares of the whole, and more of large steps, which are those that must fit
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
        measured_on=measured_on | {key: round(value, 4) for key, value in errors.items()},
    )


def _columns(probes: Sequence[Probe]) -> np.ndarray:
    b, t, u = (np.array([getattr(p, name) for p in probes], float) for name in ("batch", "frames", "tokens"))
    return np.stack([np.ones_like(b), b * t, b * t * t, b * u, b * t * u, b * u * u], axis=1)


def anchors(frames: np.ndarray, tokens: np.ndarray, shares: Sequence[float]) -> list[tuple[int, int]]:
    """(T, U) over the range of the utterances' lengths (N,): at each share of the utterances sorted by T, with few
    and with many tokens for that T; ascending."""
    found = set()
    for share in shares:
        # of an utterance: between two there may be none near
        t = int(np.quantile(frames, share, method="lower"))
        near = tokens[(frames >= 0.8 * t) & (frames <= 1.2 * t + 1)]
        found |= {(t, max(1, int(np.quantile(near, q)))) for q in (0.05, 1.0)}
    return sorted(found)


def corners(index: Index, budget: Budget) -> list[BatchShape]:
    """Shapes that stand out among the micro-batches of a balanced plan of ``index``: largest in every respect the
    budget knows of, and smallest."""
    cut = Plan(index, budget, window=min(WINDOW, len(index)), min_steps=1).cut(0)
    if not len(cut.rows):
        return []
    b = np.diff(cut.batches)
    t = np.maximum.reduceat(cut.lengths.frames, cut.batches[:-1])
    u = np.maximum.reduceat(cut.lengths.tokens, cut.batches[:-1])
    size = budget.bytes(b, t, u)
    highest = (
        size,
        t,
        b,
        u,
        b * t,
        b * t * t,
        b * t * u,
        b * u * u,
        budget.step_seconds(b, t, u),
        -t,
        -u,
        size / t,
    )
    found: dict[BatchShape, None] = {}
    for values in highest:
        i = int(np.argmax(values))
        found[BatchShape(int(b[i]), int(t[i]), int(u[i]))] = None
    return list(found)


def margin(budget: Budget, probes: Sequence[Probe]) -> float:
    """By how much more than predicted a batch may take: the most that any of the larger probes did, and enough to
    keep clear of those that did not fit."""
    fitting = [p for p in probes if p.fits]
    large = max(p.bytes for p in fitting) / 2
    over = [p.bytes / budget.bytes(*p.shape) - 1 for p in fitting if p.bytes >= large]
    broke = [budget.limit_bytes / budget.bytes(*p.shape) - 1 for p in probes if not p.fits]
    return max(LEAST_MARGIN, *over, *(1.01 * share + 0.005 for share in broke))


def fit_budget(
    prober: Prober,
    index: Index,
    frame_seconds: float,
    *,
    most_probes: int = MOST_PROBES,
    most_frames: int | None = None,
    probe_seconds: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Budget:
    """Probes a step over the lengths of ``index`` and fits a budget, whose limit is the prober's less a margin.

    A probe holds at most ``most_frames`` padded frames and takes at most about ``probe_seconds``: costs grow with B in
    proportion, so smaller batches tell what larger ones will take. Raises BudgetError where not even the shortest
    utterances fit.
    """
    search = _Search(prober, index, frame_seconds, most_probes, most_frames, probe_seconds)
    points = search.alone(say)
    if most_probes >= 30:
        shares: tuple[float, ...] = (0.08, 0.25, FILLED)
    else:
        shares = (0.2, FILLED)
    for share in shares:
        for point in points:
            search.fill(point, share)
    budget, unseen = search.fitted(), []
    for _ in range(ROUNDS):
        for shape in [s for s in search.extremes(budget) if s not in prober.known]:
            if search.left and prober.out_of_memory < MOST_EVENTS:
                expected = float(budget.bytes(*shape))
                unseen.append(prober(*shape, expected=expected).bytes / expected - 1)
        if not search.left or prober.out_of_memory >= MOST_EVENTS:
            break
        budget = search.fitted()
    budget = search.fitted(unseen)
    if unseen:
        say(
            f"the plan's {len(unseen)} extreme batches took {min(unseen):+.1%} to {max(unseen):+.1%} of what was "
            "predicted before they were run"
        )
    return budget


def within(index: LengthIndex, seconds: float, tokens: int) -> LengthIndex:
    """The rows that a model can take at all: up to so many seconds and tokens."""
    keep = (np.asarray(index.seconds) <= seconds) & (np.asarray(index.tokens) <= tokens)
    if keep.all():
        return index
    if not keep.any():
        raise BudgetError(
            f"not one of {len(index):,} utterances is within the model's {seconds:g} s and {tokens} tokens"
        )
    return LengthIndex(np.asarray(index.seconds)[keep], np.asarray(index.tokens)[keep])


class _Search:
    """Which shapes to run next."""

    def __init__(
        self,
        prober: Prober,
        index: Index,
        frame_seconds: float,
        most_probes: int,
        most_frames: int | None,
        probe_seconds: float | None,
    ):
        self.prober, self.index, self.frame_seconds = prober, index, frame_seconds
        self.most_probes, self.most_frames, self.probe_seconds = most_probes, most_frames, probe_seconds
        lengths = np.asarray(index.seconds, np.float64)
        stride = slice(None, None, max(1, len(lengths) // 200_000))
        self.frames = np.maximum(1, np.ceil(lengths[stride] / frame_seconds)).astype(np.int64)
        self.tokens = np.maximum(2, np.asarray(index.tokens[stride]).astype(np.int64))

    @property
    def left(self) -> int:
        """Probes that may still be asked for, of which the last may have to run twice."""
        return self.most_probes - 1 - self.prober.spent

    def alone(self, say: Callable[[str], None]) -> list[tuple[int, int]]:
        """Runs one utterance of each anchor, from short to long; the anchors that fit."""
        shares = (0.05, 1.0)  # few probes: batches of several are what tells the parts of a step apart
        if self.most_probes >= 12:
            shares = (0.02, 0.5, 0.9, 1.0) if self.most_probes >= 30 else (0.05, 0.5, 1.0)
        points = anchors(self.frames, self.tokens, shares)
        self.prober.warm_up(1, *points[0])
        state, last, fit_ = self.prober.step.state_bytes, None, []
        always = state + self.prober.step.gradient_bytes
        for t, u in points:
            expected = 0.0  # the warm-up has shown that the shortest fits
            if last is not None:
                expected = always + (last.bytes - always) * max(t / last.frames, u / last.tokens, 1.0)
            probe = self.prober(1, t, u, expected=expected)
            if not probe.fits:
                say(
                    f"one utterance of {t * self.frame_seconds:.1f} s and {u} tokens asked for {gib(probe.bytes)} of "
                    f"{gib(self.prober.limit_bytes)}: such will be left out of plans; cut them, or raise the limit"
                )
                continue
            last, fit_ = probe, [*fit_, (t, u)]
        if not fit_:
            t, u = points[0]
            raise BudgetError(
                f"not even one utterance of {t * self.frame_seconds:.1f} s and {u} tokens fits in "
                f"{gib(self.prober.limit_bytes)}, {gib(state)} of which are weights and optimiser state; raise the "
                "limit, or use a smaller model"
            )
        return fit_

    def fill(self, point: tuple[int, int], share: float) -> None:
        """Runs as many utterances of an anchor as are expected to take ``share`` of the room for a batch."""
        budget, (t, u) = self.fitted(), point
        known = [p for p in self.prober.fitting if (p.frames, p.tokens) == point]
        if self.prober.out_of_memory >= MOST_EVENTS:
            share = min(share, 0.3)
        batch = self.bounded(budget, t, u, share)
        batch = min(batch, 16 * max(p.batch for p in known))  # no leap into the unknown
        shape = BatchShape(batch, t, u)
        if self.left and shape not in self.prober.known:
            self.prober(*shape, expected=float(budget.bytes(*shape)))

    def bounded(self, budget: Budget, frames: int, tokens: int, share: float) -> int:
        """The largest B that takes a share of the room and stays within the bounds on a probe."""
        room = share * (budget.limit_bytes - budget.fixed_bytes)
        batch = room / float(budget.utterance_bytes(frames, tokens))
        if self.most_frames is not None:
            batch = min(batch, share / FILLED * self.most_frames / frames)
        if self.probe_seconds is not None:
            batch = min(batch, share / FILLED * self.probe_seconds / float(budget.utterance_seconds(frames, tokens)))
        return max(1, int(batch))

    def extremes(self, budget: Budget) -> list[BatchShape]:
        """The plan's extreme batches, made smaller where a probe may not be as large."""
        shapes = [BatchShape(min(b, self.bounded(budget, t, u, 1.0)), t, u) for b, t, u in corners(self.index, budget)]
        return list(dict.fromkeys(shape for shape in shapes if shape.tokens > 1))

    def fitted(self, unseen: Sequence[float] = ()) -> Budget:
        prober = self.prober
        told = dict(prober.measured_on)
        budget = fit(prober.probes, prober.limit_bytes, self.frame_seconds, told, prober.step.state_bytes)
        spare = margin(budget, prober.probes)
        told |= dict(budget.measured_on) | {
            "margin": round(spare, 4),
            "probes": len(prober.known),
            "out_of_memory": sum(not p.fits for p in prober.probes),
            "largest_probe_bytes": max(p.bytes for p in prober.fitting),
        }
        if unseen:
            told["error_unseen"] = round(float(np.median(np.abs(unseen))), 4)
        return with_limit(budget, prober.limit_bytes / (1 + spare), told)


def with_limit(budget: Budget, limit_bytes: float, measured_on: dict) -> Budget:
    """The same costs under another limit. Raises BudgetError where it leaves nothing for a batch."""
    return Budget(
        limit_bytes=float(int(limit_bytes)),
        memory=budget.memory,
        time=budget.time,
        fixed_bytes=budget.fixed_bytes,
        fixed_seconds=budget.fixed_seconds,
        frame_seconds=budget.frame_seconds,
        measured_on=measured_on,
    )
