"""The plan: a pure function of (index, budget, strategy, seed, epoch, window, M) that lists every step's rows.

A step is a list of M micro-batches, a micro-batch a list of index rows. Each window is batched independently, so any
step of any epoch is available after batching one window. The number of steps of each window is counted in one pass and
kept in memory and, where a folder is given, on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from canter.errors import PlanError
from canter.files import replacing
from canter.planning.bins import resolve_limits
from canter.planning.budget import Budget
from canter.planning.elastic import share_out
from canter.planning.lengths import REASONS, Index, Lengths, ModelLimits, PerEpoch, RateLimits, exclusions, rate_limits
from canter.planning.metrics import BatchTable, Cause, Figures, Limits, figures
from canter.planning.strategies import Cutter, Strategy
from canter.planning.strategies import strategy as named
from canter.planning.strategies.balanced import Balanced, FirstBalanced
from canter.planning.windows import Windows, mix

POSITION = "canter-position/1"
VERSION = 4  # raise it when the same settings give other steps: saved positions and tables are then refused
FIRST_VERSION = 2  # of Canter 0.1, whose runs are still resumed
KEEP = 2  # windows held in memory
MIN_STEPS = 50  # default minimum of an epoch
LEAST_UTTERANCES = 16  # in a step, for that default
ENDLESS_WINDOW = 200_000  # default window of an endless stream whose strategy has none
FULL = 0.9  # fraction of the memory below which something else than the memory limits the batches
SEEN = 4  # windows that `Plan.limits` looks at


class MicroBatch(NamedTuple):
    """A micro-batch of a step. `number` is its place in the step, which seeds dropout; rows: (B,) int64."""

    number: int
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Position:
    """The next step of a run and the fingerprint of its plan. Less than 1 KB as JSON."""

    epoch: int
    window: int
    step: int  # in the window
    plan: str

    def as_json(self) -> dict[str, object]:
        return {"format": POSITION, **asdict(self)}

    @classmethod
    def from_json(cls, value: object) -> Position:
        """Return the position that `as_json` wrote. Raises PlanError for anything else."""
        if not isinstance(value, dict) or value.get("format") != POSITION:
            raise PlanError(f"not a position of this version ({POSITION}): {str(value)[:80]}")
        try:
            epoch, window, step = (value[name] for name in ("epoch", "window", "step"))
            if not all(isinstance(n, int) and n >= 0 for n in (epoch, window, step)):
                raise PlanError(f"position: epoch, window and step must be integers, zero or more: {value}")
            return cls(epoch, window, step, str(value["plan"]))
        except KeyError as error:
            raise PlanError(f"position: {error.args[0]} is missing") from None


@dataclass(frozen=True, slots=True)
class Window:
    """A window in batches: rows in batch order, offsets of micro-batches in rows and of steps in micro-batches."""

    rows: np.ndarray
    batches: np.ndarray
    steps: np.ndarray
    lengths: Lengths  # of the rows, in the same order, rounded up to the grid

    def __len__(self) -> int:
        return len(self.steps) - 1

    def step(self, number: int) -> list[np.ndarray]:
        """Return the rows of each micro-batch of a step."""
        inside = range(self.steps[number], self.steps[number + 1])
        return [self.rows[self.batches[b] : self.batches[b + 1]] for b in inside]


@dataclass(frozen=True, eq=False)
class Plan:
    """The optimiser steps of one epoch, or of an endless weighted stream.

    A plan is a frozen value: ``dataclasses.replace(plan, window=20_000)`` is another plan.

    index: lengths of N utterances; a `LengthIndex`.
    budget: memory and time of a micro-batch; or, where it changes in the middle of a run,
        [(first window, budget), ...].
    strategy: a name, or a strategy with options.
    window: number of utterances that are batched together; None is the strategy's default.
    micro_batches_per_step: M, the number of ranks times the gradient accumulation; fixed for the run.
    min_steps: minimum number of steps of the epoch, where there are enough utterances; batches are made smaller evenly
        to reach it. In an endless stream, the minimum in as many utterances as the index has. None: 50, or fewer where
        a step would have less than 16 utterances; 1: the largest batches.
    max_tokens_per_second: utterances above it are left out, counted and listed. One limit, or (duration, limit)
        pairs: an utterance is held to the limit of the first pair whose duration in seconds is not shorter than its
        own, and to that of the last pair where it is longer than all. "auto": those of
        `canter.planning.bins.outlier_limits`.
    longest_seconds, most_tokens: of the utterances that the model takes, prompt and end token included. Longer ones are
        left out, counted and listed.
    grid: (frames, tokens) up to multiples of which T and U are rounded, so that kernels see few shapes.
    block: number of rows that are read together; None follows the index's shards (see `Windows`).
    endless: plan a stream without end, in which each source has its weight.
    cache: folder for the table of steps.
    version: 2 plans as Canter 0.1 did, to resume its runs.

    Raises PlanError for invalid settings.
    """

    index: Index = field(repr=False)
    budget: Budget | Sequence[tuple[int, Budget]]
    strategy: str | Strategy = "balanced"
    _: KW_ONLY
    seed: int = 0
    epoch: int = 0
    window: int | None = None
    micro_batches_per_step: int = 1
    min_steps: int | None = None
    max_tokens_per_second: float | Sequence[tuple[float, float]] | Literal["auto"] | None = None
    longest_seconds: float = math.inf
    most_tokens: float = math.inf
    grid: tuple[int, int] = (1, 1)
    block: int | None = None
    endless: bool = False
    cache: str | Path | None = None
    version: int = VERSION
    _cutters: dict[int, Cutter] = field(init=False, repr=False, default_factory=dict)
    _recent: OrderedDict[int, Window] = field(init=False, repr=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        if not self.budgets or self.budgets[0][0] != 0:
            raise PlanError("the first budget must start at window 0")
        if len({budget.frame_seconds for _, budget in self.budgets}) > 1:
            raise PlanError("all budgets of a run must have the same frame_seconds")
        if self.micro_batches_per_step < 1:
            raise PlanError(f"micro_batches_per_step is {self.micro_batches_per_step}; it must be at least 1")
        if self.epoch < 0:
            raise PlanError(f"epoch is {self.epoch}; epochs count from 0")
        if self.minimum_steps < 1:
            raise PlanError(f"min_steps is {self.minimum_steps}; it must be at least 1")
        if min(self.grid) < 1:
            raise PlanError(f"grid is {self.grid}; both numbers must be at least 1")
        rate_limits(self.max_tokens_per_second)
        _ = self.windows  # checks window, block and the sources' weights

    # -- settings with their defaults filled in --

    @cached_property
    def budgets(self) -> list[tuple[int, Budget]]:
        """(first window, budget) pairs in ascending order."""
        if isinstance(self.budget, Budget):
            return [(0, self.budget)]
        return sorted(self.budget, key=lambda pair: pair[0])

    @cached_property
    def batching(self) -> Strategy:
        """The strategy with its options."""
        chosen = named(self.strategy) if isinstance(self.strategy, str) else self.strategy
        if self.version == FIRST_VERSION and isinstance(chosen, Balanced):
            return FirstBalanced(chosen.mixing, chosen.mix_steps)
        return chosen

    @cached_property
    def windows(self) -> Windows:
        size = self.batching.default_window if self.window is None else self.window
        if size is None:
            size = min(len(self.index), ENDLESS_WINDOW) if self.endless else max(1, len(self.index))
        return Windows(self.index, self.seed, self.epoch, size, self.endless, self.block)

    @property
    def minimum_steps(self) -> int:
        """Minimum number of steps of the epoch."""
        if self.min_steps is not None:
            return self.min_steps
        return max(1, min(MIN_STEPS, len(self.index) // LEAST_UTTERANCES))

    @cached_property
    def rate_limits(self) -> RateLimits:
        """Limits in tokens per second: those given, or else the strategy's."""
        limits = resolve_limits(rate_limits(self.max_tokens_per_second), self.index, self.budgets[0][1])
        return limits if limits is not None else self.batching.tokens_per_second(self.index, self.budgets[0][1])

    @cached_property
    def model(self) -> ModelLimits | None:
        """The longest utterance that the model takes; None without a limit."""
        limits = ModelLimits(self.longest_seconds, self.most_tokens)
        return limits if limits != ModelLimits() else None

    def budget_of(self, window: int) -> Budget:
        """Return the budget in force in a window."""
        return next(budget for first, budget in reversed(self.budgets) if first <= window)

    def at_epoch(self, epoch: int) -> Plan:
        """Return the plan of another epoch. An index that has lengths for each epoch is asked for that epoch's."""
        index = self.index.at_epoch(epoch) if isinstance(self.index, PerEpoch) else self.index
        other = replace(self, index=index, epoch=epoch)
        if index is self.index:
            other._cutters.update(self._cutters)  # bins are estimated once for all epochs
        return other

    def within(self, longest_seconds: float, most_tokens: float) -> Plan:
        """Return the plan without utterances that are longer than a model takes; the plan itself if there are none."""
        if self.model is not None or not ModelLimits(longest_seconds, most_tokens).exceeded(self.index):
            return self
        return replace(self, longest_seconds=longest_seconds, most_tokens=most_tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the steps except the epoch."""
        options = asdict(self.batching) if is_dataclass(self.batching) else {}  # type: ignore[call-overload]
        if not options.get("mix_steps", True):  # plans without it keep the fingerprint that they had
            del options["mix_steps"]
        if options.get("accumulation", 1) == 1:
            options.pop("accumulation", None)
        parts = [
            self.version, self.index.fingerprint, [(w, b.fingerprint) for w, b in self.budgets],
            self.batching.name, options, self.seed, self.windows.size, self.micro_batches_per_step,
            rate_limits(self.max_tokens_per_second), self.grid, self.windows.blocks, self.endless,
            None,  # the place of a setting of Canter 0.1
        ]  # fmt: skip
        if self.minimum_steps > 1:  # plans without it keep the fingerprint that they had
            parts.append(self.minimum_steps)
        if self.model is not None:
            parts.append([self.model.seconds, self.model.tokens])
        if options.get("mixing") == 0:  # Canter 0.1 searched for less padding there, and made other steps
            parts.append("no search")
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]

    # -- windows --

    def cut(self, window: int) -> Window:
        """Return a window in batches. The last few are kept."""
        if window in self._recent:
            self._recent.move_to_end(window)
            return self._recent[window]
        found = self._form(window, self.least_steps(window))
        self._recent[window] = found
        while len(self._recent) > KEEP:
            self._recent.popitem(last=False)
        return found

    def _form(self, window: int, least_steps: int) -> Window:
        budget = self.budget_of(window)
        if id(budget) not in self._cutters:
            self._cutters[id(budget)] = self.batching.prepare(self.index, budget, self.grid)
        rows = self.windows.rows(window)
        lengths = Lengths.of(self.index, rows, budget, self.grid)
        out = exclusions(lengths, budget, self.rate_limits, self.model, self.grid[1]) != 0
        if out.any():
            usable = np.flatnonzero(~out)
            rows, lengths = rows[usable], lengths.take(usable)
        rng = np.random.default_rng(mix(self.seed, self.epoch, window))
        cut = self._cutters[id(budget)](lengths, self.micro_batches_per_step, rng, least_steps)
        return Window(rows[cut.order], cut.batches, cut.steps, lengths.take(cut.order))

    def least_steps(self, window: int) -> int:
        """Return the minimum number of steps of a window: its fraction of `min_steps`."""
        count = self.windows.count
        if count is None:
            return math.ceil(self.minimum_steps * self.windows.size / len(self.index))
        before, after = (-(-self.minimum_steps * w // count) for w in (window, window + 1))
        return max(1, after - before)

    @cached_property
    def table_of_steps(self) -> np.ndarray:
        """Number of steps before each window, (windows + 1,) int64: one pass over the epoch, kept in the cache."""
        if self.windows.count is None:
            raise PlanError("an endless stream has no last step: address its steps by position, not by number")
        path = self._table_path
        if path and path.exists():
            try:
                table = np.load(path)
            except (OSError, ValueError, EOFError):  # damaged: count again
                table = np.empty(0)
            if table.shape == (self.windows.count + 1,):
                return table
        return self._keep([len(self.cut(window)) for window in range(self.windows.count)])

    @property
    def _table_path(self) -> Path | None:
        return Path(self.cache) / f"steps-{self.fingerprint}-{self.epoch}.npy" if self.cache is not None else None

    def _keep(self, counts: list[int]) -> np.ndarray:
        table = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if path := self._table_path:
            with replacing(path, durable=False) as fresh, open(fresh, "wb") as file:
                np.save(file, table)
        return table

    # -- steps --

    def __len__(self) -> int:
        """Return the number of steps in the epoch."""
        return int(self.table_of_steps[-1])

    def step(self, number: int) -> list[np.ndarray]:
        """Return the rows of each micro-batch of a step: M arrays (B,) int64, fewer in a window's last step."""
        window, inside = self._find(number)
        return self.cut(window).step(inside)

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        for _, step in self.steps():
            yield step

    def steps(self, start: Position | None = None) -> Iterator[tuple[Position, list[np.ndarray]]]:
        """Yield (position after the step, its micro-batches) from a position on."""
        for _, after, step in self.walk(start):
            yield after, step

    def walk(self, start: Position | None = None) -> Iterator[tuple[Position, Position, list[np.ndarray]]]:
        """Yield (position of the step, position after it, its micro-batches) from a position on."""
        window, inside = (0, 0) if start is None else self.check(start)
        while self.windows.count is None or window < self.windows.count:
            cut = self.cut(window)
            for number in range(inside, len(cut)):
                last = number + 1 == len(cut)
                after = self._position(window + 1, 0) if last else self._position(window, number + 1)
                yield self._position(window, number), after, cut.step(number)
            window, inside = window + 1, 0

    def micro_batches_for(
        self, rank: int, ranks: int, number: int | Position, most: int | None = None
    ) -> list[MicroBatch]:
        """Return a rank's micro-batches of a step, shared out by predicted time, at most `most` for each rank.

        Empty for some ranks where there are more ranks than micro-batches.
        """
        if not 0 <= rank < ranks:
            raise PlanError(f"rank {rank} of {ranks}: ranks count from 0")
        window, inside = self.check(number) if isinstance(number, Position) else self._find(number)
        cut = self.cut(window)
        micro_batches = cut.step(inside)
        mine = share_out(self.step_seconds(window, inside), ranks, most)[rank]
        return [MicroBatch(b, micro_batches[b]) for b in mine]

    def step_seconds(self, window: int, step: int) -> np.ndarray:
        """Return the predicted seconds of each micro-batch of a window's step, (micro-batches,)."""
        cut, budget = self.cut(window), self.budget_of(window)
        edges = cut.batches[cut.steps[step] : cut.steps[step + 1] + 1]
        lengths = cut.lengths.take(np.arange(edges[0], edges[-1]))
        return self._table_of(lengths, edges - edges[0], budget).seconds(budget)

    def predicted_bytes(self, micro_batches: Sequence[np.ndarray], budget: Budget) -> np.ndarray:
        """Return the peak bytes that a budget predicts for micro-batches, each an array of rows, (micro-batches,)."""
        batches = np.cumsum([0, *map(len, micro_batches)])
        lengths = Lengths.of(self.index, np.concatenate(micro_batches), budget)
        return self._table_of(lengths, batches, budget).bytes(budget)

    def _table_of(self, lengths: Lengths, batches: np.ndarray, budget: Budget) -> BatchTable:
        """Return the table of micro-batches that make one step."""
        steps = np.array([0, len(batches) - 1])
        return BatchTable.of(lengths, batches, steps, budget, packed=self.batching.packed)

    # -- positions --

    def position(self, number: int) -> Position:
        """Return the position of the step `number`: the state of a run that has taken the steps before it."""
        return self._position(*self._find(number)) if number < len(self) else self._position(self.windows.count or 0, 0)

    def number(self, position: Position) -> int:
        """Return the step number of a position."""
        window, inside = self.check(position)
        return int(self.table_of_steps[window]) + inside

    def _position(self, window: int, step: int) -> Position:
        return Position(self.epoch, window, step, self.fingerprint)

    def check(self, position: Position) -> tuple[int, int]:
        """Return (window, step in it) of a position. Raises PlanError for one of another plan or epoch."""
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

    # -- figures --

    def batch_table(self, window: int) -> BatchTable:
        """Return sizes and lengths of a window's micro-batches."""
        cut, budget = self.cut(window), self.budget_of(window)
        own = Lengths.of(self.index, cut.rows, budget)
        return BatchTable.of(cut.lengths, cut.batches, cut.steps, budget, packed=self.batching.packed, own=own)

    def table(self, windows: int | None = None) -> BatchTable:
        """Return sizes and lengths of the epoch's micro-batches, or of those of the first `windows` windows."""
        count = self.windows.count if windows is None else windows
        if count is None:
            raise PlanError("an endless stream has no last step: give the number of windows to look at")
        tables = [self.batch_table(window) for window in range(count)]
        if count == self.windows.count and "table_of_steps" not in self.__dict__:  # no need of another pass
            self.__dict__["table_of_steps"] = self._keep([len(table.steps) - 1 for table in tables])
        return BatchTable.concatenate(tables)

    def figures(self, ranks: int | None = None, windows: int | None = None) -> Figures:
        """Return the figures of the epoch with its steps shared out to `ranks` (None: M)."""
        return figures(self.table(windows), self.budgets[0][1], ranks or self.micro_batches_per_step)

    def limits(self, memory: Budget | None = None) -> Limits:
        """Return what limits the batches and how full the memory is, from the first windows.

        memory: the budget of the device's memory, where the plan's is smaller.
        """
        windows = min(SEEN, self.windows.count or SEEN)
        table = BatchTable.concatenate(self.batch_table(window) for window in range(windows))
        own = self.budgets[0][1]
        budget = memory or own
        count, steps = len(table.size), len(table.steps) - 1
        if not count:
            return Limits("memory", 0.0, 0.0, 0, self.minimum_steps, self.micro_batches_per_step, 0.0)
        if self.windows.count is None:
            steps = round(steps * len(self.index) / (windows * self.windows.size))
        else:
            steps = round(steps * self.windows.count / windows)
        used = table.bytes(budget)
        room = (table.bytes(own) - own.fixed_bytes).mean()
        cut = self.cut(0)
        # about the minimum number of steps: would there be fewer without a minimum?
        near = 1 < len(cut) <= 1.5 * self.least_steps(0) or len(cut) < self.least_steps(0)
        if near and len(self._form(0, least_steps=1).batches) < len(cut.batches):
            short = len(cut) < self.least_steps(0)
            by: Cause = "utterances" if short else "min_steps"
        elif len(cut.batches) <= self.micro_batches_per_step + 1 and room < FULL * own.room_bytes:
            by = "utterances"
        elif memory is not None and float(used.mean()) < FULL * budget.limit_bytes:
            by = "batch_seconds"
        elif not self.batching.fills_memory and float(used.mean()) < FULL * budget.limit_bytes:
            by = "strategy"
        else:
            by = "memory"
        return Limits(
            by,
            memory_filled=float(used.mean()) / budget.limit_bytes,
            room_filled=float((used - budget.fixed_bytes).mean()) / budget.room_bytes,
            steps=steps,
            min_steps=self.minimum_steps,
            per_step=self.micro_batches_per_step,
            mean_batch=float(table.size.mean()),
        )

    def batch_of_rows(self) -> np.ndarray:
        """Return the epoch's micro-batch of each row, (N,) int64; -1 for rows in none."""
        owner = np.full(len(self.index), -1, np.int64)
        before = 0
        for window in range(self.windows.count or 0):
            cut = self.cut(window)
            owner[cut.rows] = before + np.repeat(np.arange(len(cut.batches) - 1), np.diff(cut.batches))
            before += len(cut.batches) - 1
        return owner

    def left_out(self) -> list[tuple[int, str]]:
        """Return (row, reason) of every utterance that the plan cannot use."""
        budget, found = self.budgets[0][1], []
        for begin in range(0, len(self.index), 1 << 20):
            lengths = Lengths.of(self.index, slice(begin, begin + (1 << 20)), budget, self.grid)
            reasons = exclusions(lengths, budget, self.rate_limits, self.model, self.grid[1])
            found += [(begin + int(i), REASONS[reasons[i]]) for i in np.flatnonzero(reasons)]
        return found

    def write(self, path: str | Path, ranks: int = 1) -> None:
        """Write a Parquet table of (step, micro_batch in the step, rank, row), one line an utterance, in plan order.

        Anyone can check a plan by it without this code.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.windows.count is None:
            raise PlanError("an endless stream cannot be written out")
        names = {"step": pa.int64(), "micro_batch": pa.int32(), "rank": pa.int32(), "row": pa.int64()}
        schema, before = pa.schema(names), 0
        with replacing(path) as fresh, pq.ParquetWriter(fresh, schema) as writer:
            for window in range(self.windows.count):
                cut = self.cut(window)
                batches = np.diff(cut.steps)
                number = np.arange(len(cut.batches) - 1) - np.repeat(cut.steps[:-1], batches)
                rank = np.zeros(len(number), np.int32)
                for step in range(len(cut)) if ranks > 1 else ():
                    for r, share in enumerate(share_out(self.step_seconds(window, step), ranks)):
                        rank[cut.steps[step] + np.array(share, np.int64)] = r
                size = np.diff(cut.batches)
                columns = [np.repeat(np.arange(len(cut)) + before, batches), number, rank]
                arrays = [*(np.repeat(column, size) for column in columns), cut.rows]
                writer.write_table(pa.table([pa.array(a, f.type) for a, f in zip(arrays, schema)], schema=schema))
                before += len(cut)
