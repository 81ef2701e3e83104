"""Lhotse cuts driven by a plan: a `CutSampler` whose batches are the plan's micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from lhotse import CutSet
from lhotse.dataset.sampling.base import CutSampler

from canter.corpus.index import LengthIndex
from canter.errors import PlanError
from canter.planning.plan import Plan
from canter.planning.sampler import Batch, PlanSampler, refuse_packed
from canter.text.tokenizer import Tokenizer


def index_of_cuts(cuts: CutSet, tokenizer: Tokenizer | None = None, prompt_tokens: int = 0) -> LengthIndex:
    """Return the lengths of cuts, in their order.

    Tokens are the cut's `num_tokens` (as Lhotse's and NeMo's token samplers set it), or else those of its supervisions'
    text by `tokenizer.encode` plus the prompt and an end token, or 0.
    """
    durations, tokens = [], []
    for cut in iter(cuts):  # type: ignore[call-overload]
        durations.append(cut.duration)
        count = (getattr(cut, "custom", None) or {}).get("num_tokens")
        if count is None and tokenizer is not None:
            text = " ".join(s.text for s in cut.supervisions if s.text)
            count = len(tokenizer.encode(text)) + prompt_tokens + 1
        tokens.append(int(count or 0))
    return LengthIndex(np.array(durations, np.float32), np.array(tokens, np.int64), ["cuts"])


class PlanCutSampler(CutSampler):
    """A Lhotse sampler that yields a `CutSet` for each micro-batch of this rank, in plan order.

    Use it as any Lhotse sampler: ``DataLoader(dataset, sampler=..., batch_size=None)``. A loader with workers draws
    batches long before the loop takes them. Iterate over ``follow(loader)``, so that the state counts finished batches
    and those read ahead come again on resuming::

        for batch in sampler.follow(loader):
            ...
            state = sampler.state_dict()  # this batch comes again

    Without ``follow``, a batch counts as taken once it is drawn, which is right where nothing reads ahead. Lhotse's
    `IterableDatasetWrapper` moves the sampler into a worker, where its state cannot be read: use a map-style dataset.

    cuts: in the order of the plan's index and accessible by position (an eager CutSet, or an indexed one). Unlike
    Lhotse's samplers, the state may be loaded on another number of ranks. The number of ranks must divide the plan's
    M, as Lhotse has no empty batch.
    """

    def __init__(self, cuts: CutSet, plan: Plan, *, world_size: int | None = None, rank: int | None = None) -> None:
        super().__init__(shuffle=True, drop_last=False, world_size=world_size, rank=rank, seed=plan.seed)
        if len(cuts) != len(plan.index):
            raise PlanError(f"{len(cuts)} cuts and an index of {len(plan.index)} rows: they must be the same, in order")
        if plan.micro_batches_per_step % self.world_size:
            raise PlanError(
                f"{self.world_size} ranks do not divide the plan's {plan.micro_batches_per_step} micro-batches per step"
            )
        self.cuts = cuts
        refuse_packed(plan, "Lhotse")
        self._sampler = PlanSampler(plan, self.rank, self.world_size)
        self._rows: Iterator[list[int]] | None = None
        self._followed = False
        self._owed: deque[int] = deque()  # number of the plan's batches for each batch drawn and not yet taken

    def set_epoch(self, epoch: int) -> None:
        self._sampler.set_epoch(epoch)
        super().set_epoch(epoch)

    def __iter__(self) -> PlanCutSampler:
        self._rows = iter(self._sampler)
        self._owed.clear()
        return self

    def _next_batch(self) -> CutSet:
        if self._rows is None:
            raise StopIteration
        self._owed.append(0)
        while True:
            rows = next(self._rows)
            self._owed[-1] += 1
            if rows:  # a window's last step may have no micro-batch for this rank
                return CutSet.from_cuts(self.cuts[row] for row in rows)

    def __next__(self) -> CutSet:
        # the plan has shared the batches out: there is nothing to draw for the other ranks
        try:
            batch = self._next_batch()
        except StopIteration:
            if not self._followed:
                self._took()
            raise
        if not self._followed:
            self._took()
        for transform in self._transforms:
            batch = transform(batch)
        self.diagnostics.keep(batch)
        return batch

    def _took(self) -> None:
        for _ in range(self._owed.popleft() if self._owed else 0):
            self._sampler.took()

    def follow(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the loader's batches; each counts as taken when the next one is asked for."""
        self._followed = True
        try:
            for batch in loader:
                yield batch
                self._took()
            self._took()  # empty batches at the end
        finally:
            self._followed = False

    @property
    def remaining_duration(self) -> float | None:
        return None

    @property
    def remaining_cuts(self) -> int | None:
        return None

    @property
    def num_cuts(self) -> int | None:
        return len(self.cuts)

    def state_dict(self) -> dict[str, object]:
        return self._sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._sampler.load_state_dict(state_dict)
        super().set_epoch(self._sampler.epoch)
