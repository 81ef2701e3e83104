"""The plan: a pure function of (index, budget, strategy, seed, epoch, window, M) that gives every step its rows.

A step is a list of M micro-batches, a micro-batch a list of index rows. Windows are cut one at a time and on their
own, so any step of any epoch is at hand after cutting one window; how many steps each window has is counted in one
pass, kept in memory and, where a folder is given, on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from canter.errors import PlanError
from canter.files import replacing
from canter.planning.budget import Budget
from canter.planning.elastic import share_out
from canter.planning.lengths import (
    REASONS,
    Index,
    Lengths,
    ModelLimits,
    RateLimits,
    exclusions,
    rate_limits,
)
from canter.planning.limits import Cause, Limits
from canter.planning.metrics import BatchTable, Figures, figures
from canter.planning.strategies import Cutter, Strategy
from canter.planning.strategies import strategy as named
from canter.planning.strategies.balanced import Balanced, FirstBalanced
from canter.planning.strategies.base import maxima, reorder
from canter.planning.windows import Windows, mix

POSITION = "canter-position/1"
# to be raised when the same settings come to give other steps: positions and tables are then refused
VERSION = 4
FIRST_VERSION = 2  # of Canter 0.1, whose runs are still resumed
KEEP = 2  # cut windows held in memory
MIN_STEPS = 50  # of an epoch, unless others are asked for
LEAST_UTTERANCES = 16  # in a step, for that default
FULL = 0.9  # of the memory, below which something else than the memory limits the batches
SEEN = 4  # windows that `Plan.limits` looks at


class MicroBatch(NamedTuple):
    """`number` is its place in the step (it, not the rank, seeds dropout); rows: (B,) int64."""

    number: int
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run is: the next step to take, and which plan it belongs to. Less than 1 KB as JSON."""

    epoch: int
    window: int
    step: int  # in the window
    plan: str  # fingerprint, the epoch left out

    def as_json(self) -> dict[str, Any]:
        return {"format": POSITION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> Position:
        if not isinstance(value, dict) or value.get("format") != POSITION:
            raise PlanError(f"not a position of this version ({POSITION}): {str(value)[:80]}")
        try:
            epoch, window, step = (value[name] for name in ("epoch", "window", "step"))
            if not all(isinstance(n, int) and n >= 0 for n in (epoch, window, step)):
                raise PlanError(f"position: epoch, window and step must be whole numbers, zero or more: {value}")
            return cls(epoch, window, step, str(value["plan"]))
        except KeyError as error:
            raise PlanError(f"position: {error.args[0]} is missing") from None


@dataclass(frozen=True, slots=True)
class Window:
    """A cut window: rows in batch order, offsets of micro-batches in rows and of steps in micro-batches."""

    rows: np.ndarray
    batches: np.ndarray
    steps: np.ndarray
    lengths: Lengths  # of the rows, in the same order, rounded up to the grid

    def __len__(self) -> int:
        return len(self.steps) - 1

    def step(self, number: int) -> list[np.ndarray]:
        inside = range(self.steps[number], self.steps[number + 1])
        return [self.rows[self.batches[b] : self.batches[b + 1]] for b in inside]


class Plan:
    """Steps of one epoch (or of an endless weighted stream).

    index: lengths of N utterances; a `LengthIndex`.
    budget: what fits; or, where it changed in the middle of a run, [(first window, budget), ...].
    strategy: a name, or a strategy with options.
    window: utterances that are batched together; None is the strategy's default.
    micro_batches_per_step: M, the ranks times the accumulation of the run; fixed for the run.
    min_steps: least number of steps of the epoch, where there are utterances enough; batches are made smaller evenly
        to reach it. In an endless stream, of as many utterances as the index has. None: 50, or fewer where a step
        would have less than 16 utterances; 1: the largest batches.
    max_tokens_per_second: utterances beyond it are left out, counted and listed. One limit, or (duration, limit)
        pairs: an utterance is held to the limit of the first pair whose duration in seconds is not shorter than its
        own, and to that of the last pair where it is longer than all.
    longest_seconds, most_tokens: of the utterances that the model takes, prompt and end token included. Longer ones are
        left out, counted and listed.
    grid: (frames, tokens) up to multiples of which T and U are rounded, so that kernels see few shapes.
    block: rows that are read together; None follows the index's shards (see `Windows`).
    endless: a stream in which each source has its weight, and windows go on for ever.
    curriculum: "short_first" puts the steps of epoch 0's first window in ascending order of mean length.
    cache: folder for the table of steps.
    version: 2 plans as Canter 0.1 did, for the runs that it began.

    Raises PlanError for settings that cannot be.
    """

    def __init__(
        self,
        index: Index,
        budget: Budget | Sequence[tuple[int, Budget]],
        strategy: str | Strategy = "balanced",
        *,
        seed: int = 0,
        epoch: int = 0,
        window: int | None = None,
        micro_batches_per_step: int = 1,
        min_steps: int | None = None,
        max_tokens_per_second: float | Sequence[tuple[float, float]] | None = None,
        longest_seconds: float = math.inf,
        most_tokens: float = math.inf,
        grid: tuple[int, int] = (1, 1),
        block: int | None = None,
        endless: bool = False,
        curriculum: str | None = None,
        cache: str | Path | None = None,
        version: int = VERSION,
    ) -> None:
        chosen = named(strategy) if isinstance(strategy, str) else strategy
        if version == FIRST_VERSION and isinstance(chosen, Balanced):
            chosen = FirstBalanced(chosen.mixing, chosen.mix_steps)
        budgets = [(0, budget)] if isinstance(budget, Budget) else sorted(budget, key=lambda pair: pair[0])
        if not budgets or budgets[0][0] != 0:
            raise PlanError("the first budget must be in force from window 0")
        if micro_batches_per_step < 1:
            raise PlanError(f"micro_batches_per_step is {micro_batches_per_step}; it must be at least 1")
        if len({b.frame_seconds for _, b in budgets}) > 1:
            raise PlanError("budgets of one run must count frames alike (frame_seconds)")
        if curriculum not in (None, "short_first"):
            raise PlanError(f"no curriculum named {curriculum!r}; known: short_first")
        if epoch < 0:
            raise PlanError(f"epoch is {epoch}; epochs count from 0")
        if min_steps is None:
            min_steps = max(1, min(MIN_STEPS, len(index) // LEAST_UTTERANCES))
        if min_steps < 1:
            raise PlanError(f"min_steps is {min_steps}; it must be at least 1")
        if min(grid) < 1:
            raise PlanError(f"grid is {grid}; both numbers must be at least 1")
        self.index, self.strategy, self.budgets = index, chosen, budgets
        self.seed, self.epoch, self.endless, self.curriculum = seed, epoch, endless, curriculum
        self.micro_batches_per_step, self.grid, self.block = micro_batches_per_step, grid, block
        if endless and window is None and chosen.default_window is None:
            window = min(len(index), 200_000)
        self.window = window if window is not None else (chosen.default_window or max(1, len(index)))
        self.windows = Windows(index, seed, epoch, self.window, endless, block)
        self.cache = Path(cache) if cache is not None else None
        self.min_steps, self.version = min_steps, version
        self._max_tokens_per_second = rate_limits(max_tokens_per_second)
        limits = ModelLimits(longest_seconds, most_tokens)
        self.model = limits if limits != ModelLimits() else None
        self._cutters: dict[int, Cutter] = {}
        self._recent: OrderedDict[int, Window] = OrderedDict()

    # -- what it is a function of --

    def at_epoch(self, epoch: int) -> Plan:
        """The same plan for another epoch; what was learnt of the index is shared."""
        other = object.__new__(Plan)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("_fingerprint", "table_of_steps")})
        other.epoch, other._recent = epoch, OrderedDict()
        other.windows = Windows(self.index, self.seed, epoch, self.window, self.endless, self.block)
        return other

    def within(self, longest_seconds: float, most_tokens: float) -> Plan:
        """Return the plan without the utterances that are longer than a model takes; itself where there are none."""
        limits = ModelLimits(longest_seconds, most_tokens)
        if self.model is not None or not limits.exceeded(self.index):
            return self
        other = self.at_epoch(self.epoch)
        other.__dict__.pop("fingerprint", None)
        other.model = limits
        return other

    def _exclusions(self, lengths: Lengths, budget: Budget) -> np.ndarray:
        return exclusions(lengths, budget, self.max_tokens_per_second, self.model, self.grid[1])

    @cached_property
    def fingerprint(self) -> str:
        """Changes with anything that decides the steps but the epoch."""
        options = asdict(self.strategy) if is_dataclass(self.strategy) else {}  # type: ignore[call-overload]
        if not options.get("mix_steps", True):  # plans without it keep the fingerprint that they had
            del options["mix_steps"]
        parts = [
            self.version, self.index.fingerprint, [(w, b.fingerprint) for w, b in self.budgets],
            self.strategy.name, options, self.seed, self.window, self.micro_batches_per_step,
            self._max_tokens_per_second, self.grid, self.windows.blocks, self.endless, self.curriculum,
        ]  # fmt: skip
        if self.min_steps > 1:  # plans without it keep the fingerprint that they had
            parts.append(self.min_steps)
        if self.model is not None:
            parts.append([self.model.seconds, self.model.tokens])
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]

    def budget_of(self, window: int) -> Budget:
        return next(budget for first, budget in reversed(self.budgets) if first <= window)

    @cached_property
    def max_tokens_per_second(self) -> RateLimits:
        """The limits in force: those given, or the strategy's own."""
        if self._max_tokens_per_second is not None:
            return self._max_tokens_per_second
        return self.strategy.tokens_per_second(self.index, self.budgets[0][1])

    # -- windows --

    def cut(self, window: int) -> Window:
        """Cuts a window, or takes it from the few last cut."""
        if window in self._recent:
            self._recent.move_to_end(window)
            return self._recent[window]
        found = self._form(window, self.least_steps(window))
        if self.curriculum == "short_first" and self.epoch == 0 and window == 0:
            found = _short_first(found)
        self._recent[window] = found
        while len(self._recent) > KEEP:
            self._recent.popitem(last=False)
        return found

    def _form(self, window: int, least_steps: int) -> Window:
        budget = self.budget_of(window)
        if id(budget) not in self._cutters:
            self._cutters[id(budget)] = self.strategy.prepare(self.index, budget, self.grid)
        rows = self.windows.rows(window)
        lengths = Lengths.of(self.index, rows, budget, self.grid)
        out = self._exclusions(lengths, budget) != 0
        if out.any():
            usable = np.flatnonzero(~out)
            rows, lengths = rows[usable], lengths.take(usable)
        rng = np.random.default_rng(mix(self.seed, self.epoch, window))
        cut = self._cutters[id(budget)](lengths, self.micro_batches_per_step, rng, least_steps)
        return Window(rows[cut.order], cut.batches, cut.steps, lengths.take(cut.order))

    def least_steps(self, window: int) -> int:
        """Least number of steps of a window: its part of `min_steps`."""
        count = self.windows.count
        if count is None:
            return math.ceil(self.min_steps * self.window / len(self.index))
        before, after = (-(-self.min_steps * w // count) for w in (window, window + 1))
        return max(1, after - before)

    @cached_property
    def table_of_steps(self) -> np.ndarray:
        """(windows + 1,) int64: steps before each window. One pass over the epoch, kept in the cache folder."""
        if self.windows.count is None:
            raise PlanError("an endless stream has no last step: address it by position, not by number")
        path = self._table_path
        if path and path.exists():
            try:
                table = np.load(path)
            except (OSError, ValueError, EOFError):  # damaged: made again
                table = np.empty(0)
            if table.shape == (self.windows.count + 1,):
                return table
        return self._keep([len(self.cut(window)) for window in range(self.windows.count)])

    @property
    def _table_path(self) -> Path | None:
        return self.cache and self.cache / f"steps-{self.fingerprint}-{self.epoch}.npy"

    def _keep(self, counts: list[int]) -> np.ndarray:
        """The table of the steps in each window, written to the cache folder."""
        table = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if path := self._table_path:
            with replacing(path, durable=False) as fresh, open(fresh, "wb") as file:
                np.save(file, table)
        return table

    # -- steps --

    def __len__(self) -> int:
        """Steps in the epoch."""
        return int(self.table_of_steps[-1])

    def step(self, number: int) -> list[np.ndarray]:
        """Rows of each micro-batch of a step: at most M arrays (B,) int64, exactly M in all but a window's last."""
        window, inside = self._find(number)
        return self.cut(window).step(inside)

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        for _, step in self.steps():
            yield step

    def steps(self, start: Position | None = None) -> Iterator[tuple[Position, list[np.ndarray]]]:
        """(position after the step, its micro-batches) from a position on, without the ones before it."""
        for _, after, step in self.walk(start):
            yield after, step

    def walk(self, start: Position | None = None) -> Iterator[tuple[Position, Position, list[np.ndarray]]]:
        """(position of the step, position after it, its micro-batches) from a position on."""
        window, inside = (0, 0) if start is None else self.check(start)
        while self.windows.count is None or window < self.windows.count:
            cut = self.cut(window)
            for number in range(inside, len(cut)):
                last = number + 1 == len(cut)
                after = self._position(window + 1, 0) if last else self._position(window, number + 1)
                yield self._position(window, number), after, cut.step(number)
            window, inside = window + 1, 0

    def micro_batches_for(self, rank: int, ranks: int, number: int | Position) -> list[MicroBatch]:
        """A rank's part of a step: micro-batches shared out by predicted time; empty where others have it all."""
        if not 0 <= rank < ranks:
            raise PlanError(f"rank {rank} of {ranks}: ranks count from 0")
        window, inside = self.check(number) if isinstance(number, Position) else self._find(number)
        cut = self.cut(window)
        micro_batches = cut.step(inside)
        mine = share_out(self.step_seconds(window, inside), ranks)[rank]
        return [MicroBatch(b, micro_batches[b]) for b in mine]

    def step_seconds(self, window: int, step: int) -> np.ndarray:
        """(micro-batches,) predicted seconds of each micro-batch of a window's step."""
        cut, budget = self.cut(window), self.budget_of(window)
        edges = cut.batches[cut.steps[step] : cut.steps[step + 1] + 1]
        inside = slice(edges[0], edges[-1])
        frames = np.maximum.reduceat(cut.lengths.frames[inside], edges[:-1] - edges[0])
        tokens = np.maximum.reduceat(cut.lengths.tokens[inside], edges[:-1] - edges[0])
        return budget.step_seconds(np.diff(edges), frames, tokens)

    # -- positions --

    def position(self, number: int) -> Position:
        """Position of the step `number`: the state of a run that has taken the steps before it."""
        return self._position(*self._find(number)) if number < len(self) else self._position(self.windows.count or 0, 0)

    def number(self, position: Position) -> int:
        """The step number of a position."""
        window, inside = self.check(position)
        return int(self.table_of_steps[window]) + inside

    def _position(self, window: int, step: int) -> Position:
        return Position(self.epoch, window, step, self.fingerprint)

    def check(self, position: Position) -> tuple[int, int]:
        """(window, step in it) of a position. Raises PlanError where it is of another plan or epoch."""
        if position.plan != self.fingerprint:
            raise PlanError(
                f"the position belongs to another plan ({position.plan}, this one is {self.fingerprint}): index, "
                "budget, strategy, seed, window and micro-batches per step must be those of the run"
            )
        if position.epoch != self.epoch:
            raise PlanError(f"the position is in epoch {position.epoch}, this plan is of epoch {self.epoch}")
        return position.window, position.step

    def _find(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise PlanError(f"step {number} is outside the epoch's {len(self)}")
        window = int(np.searchsorted(self.table_of_steps, number, side="right")) - 1
        return window, number - int(self.table_of_steps[window])

    # -- what it amounts to --

    def batch_table(self, window: int) -> BatchTable:
        """Sizes and lengths of a window's micro-batches."""
        cut, budget = self.cut(window), self.budget_of(window)
        own = Lengths.of(self.index, cut.rows, budget)
        starts = cut.batches[:-1]

        def total(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values, starts) if len(starts) else values[:0]

        return BatchTable(
            size=np.diff(cut.batches),
            frames=maxima(cut.lengths.frames, cut.batches),
            tokens=maxima(cut.lengths.tokens, cut.batches),
            own_frames=total(own.frames),
            own_tokens=total(own.tokens),
            own_seconds=total(budget.utterance_seconds(own.frames, own.tokens)),
            audio_seconds=total(own.seconds.astype(np.float64)),
            steps=cut.steps,
        )

    def table(self, windows: int | None = None) -> BatchTable:
        """Of the epoch, or of the first `windows` windows."""
        count = self.windows.count if windows is None else windows
        if count is None:
            raise PlanError("an endless stream has no last step: say how many windows to look at")
        tables = [self.batch_table(window) for window in range(count)]
        if count == self.windows.count and "table_of_steps" not in self.__dict__:  # no need of another pass
            self.__dict__["table_of_steps"] = self._keep([len(table.steps) - 1 for table in tables])
        return BatchTable.concatenate(tables)

    def figures(self, ranks: int | None = None, windows: int | None = None) -> Figures:
        """Figures of the epoch with its steps shared out to `ranks` (None: M)."""
        return figures(self.table(windows), self.budgets[0][1], ranks or self.micro_batches_per_step)

    def limits(self, memory: Budget | None = None) -> Limits:
        """Return what limits the batches and how full the memory is, from the first windows.

        memory: the budget of the whole memory, where the plan was given a smaller one.
        """
        windows = min(SEEN, self.windows.count or SEEN)
        table = BatchTable.concatenate(self.batch_table(window) for window in range(windows))
        own = self.budgets[0][1]
        budget = memory or own
        count, steps = len(table.size), len(table.steps) - 1
        if not count:
            return Limits("memory", 0.0, 0.0, 0, self.min_steps, self.micro_batches_per_step, 0.0)
        if self.windows.count is None:
            steps = round(steps * len(self.index) / (windows * self.window))
        else:
            steps = round(steps * self.windows.count / windows)
        used = budget.bytes(table.size, table.frames, table.tokens)
        room = (own.bytes(table.size, table.frames, table.tokens) - own.fixed_bytes).mean()
        cut = self.cut(0)
        # hardly more steps than asked for: would there be fewer if none were?
        near = 1 < len(cut) <= 1.5 * self.least_steps(0) or len(cut) < self.least_steps(0)
        if near and len(self._form(0, least_steps=1).batches) < len(cut.batches):
            short = len(cut) < self.least_steps(0)
            by: Cause = "utterances" if short else "min_steps"
        elif len(cut.batches) <= self.micro_batches_per_step + 1 and room < FULL * (own.limit_bytes - own.fixed_bytes):
            by = "utterances"
        elif memory is not None and float(used.mean()) < FULL * budget.limit_bytes:
            by = "batch_seconds"
        elif self.strategy.name != "balanced" and float(used.mean()) < FULL * budget.limit_bytes:
            by = "strategy"
        else:
            by = "memory"
        return Limits(
            by,
            memory_filled=float(used.mean()) / budget.limit_bytes,
            room_filled=float((used - budget.fixed_bytes).mean()) / (budget.limit_bytes - budget.fixed_bytes),
            steps=steps,
            min_steps=self.min_steps,
            per_step=self.micro_batches_per_step,
            mean_batch=float(table.size.mean()),
        )

    def batch_of_rows(self) -> np.ndarray:
        """(N,) int64: the micro-batch of the epoch each row is in, -1 where it is in none."""
        owner = np.full(len(self.index), -1, np.int64)
        before = 0
        for window in range(self.windows.count or 0):
            cut = self.cut(window)
            owner[cut.rows] = before + np.repeat(np.arange(len(cut.batches) - 1), np.diff(cut.batches))
            before += len(cut.batches) - 1
        return owner

    def left_out(self) -> list[tuple[int, str]]:
        """(row, reason) of every utterance that the plan cannot use."""
        budget, found = self.budgets[0][1], []
        for begin in range(0, len(self.index), 1 << 20):
            lengths = Lengths.of(self.index, slice(begin, begin + (1 << 20)), budget, self.grid)
            reasons = self._exclusions(lengths, budget)
            found += [(begin + int(i), REASONS[reasons[i]]) for i in np.flatnonzero(reasons)]
        return found


def _short_first(cut: Window) -> Window:
    """The window with its steps in ascending order of mean frames."""
    frames = np.add.reduceat(cut.lengths.frames, cut.batches[cut.steps[:-1]])
    size = np.diff(cut.batches[cut.steps])
    turn = np.argsort(frames / size, kind="stable")
    sequence = np.concatenate([np.arange(int(cut.steps[s]), int(cut.steps[s + 1])) for s in turn])
    steps = np.concatenate([[0], np.cumsum(np.diff(cut.steps)[turn])])
    moved = reorder(np.arange(len(cut.rows)), cut.batches, sequence, steps)
    return Window(cut.rows[moved.order], moved.batches, moved.steps, cut.lengths.take(moved.order))
