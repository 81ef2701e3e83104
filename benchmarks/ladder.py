"""Training speed of a strategy: a model takes the steps of its plan on synthetic audio of real lengths. Shared by
`training.py` and `gpu_training.py`."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from canter.cli.lengths import open_lengths
from canter.corpus.index import LengthIndex
from canter.models.batch import Batch
from canter.models.model import SpeechModel
from canter.planning import Budget, Plan
from canter.planning.lengths import Lengths
from canter.planning.metrics import BatchTable, figures
from canter.training.config import TrainConfig
from canter.training.defaults import decided
from canter.training.feed.data import Loaded, Steps
from canter.training.step.gradient import TargetCounts, TrainingStep

STRATEGIES = ("random", "duration", "bucket_1d", "bucket_2d", "balanced")
RATE = 16000
PROMPT = 4  # tokens; an end token follows the text
FRAME_GRIDS, TOKEN_GRIDS = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32)  # multiples that `few_shapes` tries


def lengths_of(path: Path, longest: float, most_tokens: int, most: int = 10**9) -> LengthIndex:
    """Return the lengths of a file's utterances of up to ``longest`` seconds and ``most_tokens`` tokens.

    Of more than ``most`` utterances, that many are taken, evenly spread.
    """
    every = open_lengths(path, prompt_tokens=PROMPT + 1)
    seconds, tokens = np.asarray(every.seconds), np.asarray(every.tokens)
    rows = np.flatnonzero((seconds <= longest) & (tokens >= 2) & (tokens <= most_tokens))
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)]
    return LengthIndex(seconds[rows], tokens[rows])


def batch_of(index: LengthIndex, rows: np.ndarray, vocabulary: int, noise: Tensor) -> Batch:
    """Return a batch of audio from ``noise`` (S,), padded to the longest utterance, and random tokens."""
    samples = torch.tensor(np.round(index.seconds[rows] * RATE).astype(np.int64))
    tokens = torch.tensor(index.tokens[rows].astype(np.int64))
    size = len(rows)
    audio = noise[: int(samples.max())].repeat(size, 1)
    one = torch.ones(size, dtype=torch.long)
    return Batch(
        audio=audio * (torch.arange(audio.shape[1]) < samples[:, None]),
        audio_lengths=samples,
        tokens=torch.randint(3, vocabulary, (size, int(tokens.max()))),
        token_lengths=tokens,
        prompt_lengths=PROMPT * one,
        characters=one[:, None],
        character_lengths=one,
        rows=torch.from_numpy(rows),
    )


def few_shapes(index: LengthIndex, budget: Budget, strategy: str, more: float = 0.01) -> tuple[int, int]:
    """Return the grid (frames, tokens) with which an epoch has the fewest distinct shapes, while the padded fraction of
    its compute grows by at most ``more``."""
    tables = {
        (frames, tokens): Plan(index, budget, strategy, grid=(frames, tokens)).table()
        for frames in FRAME_GRIDS
        for tokens in TOKEN_GRIDS
    }
    padded = {grid: figures(table, budget, 1).padded_compute for grid, table in tables.items()}
    allowed = [grid for grid in tables if padded[grid] <= padded[1, 1] + more]
    return min(allowed, key=lambda grid: (distinct_shapes(tables[grid]), padded[grid]))


def distinct_shapes(table: BatchTable) -> int:
    """Return the number of distinct shapes (B, T, U) among the micro-batches."""
    return len(np.unique(np.stack([table.size, table.frames, table.tokens], axis=1), axis=0))


class Rig:
    """A model and its training step, which all strategies share: the times do not depend on the weights."""

    def __init__(self, config: TrainConfig, model: SpeechModel, precision: str):
        self.model, self.device = model.train(), next(model.parameters()).device
        self.training_step = TrainingStep(decided(config), model, precision, steps=100_000)

    def step(self, loaded: list[Loaded], number: int) -> tuple[int, int]:
        """Take a step; return the number of micro-batches that did not fit in memory, and on a GPU the peak bytes."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        counts = TargetCounts.of([one.batch for one in loaded if one.batch is not None])
        computed = self.training_step.gradient.compute(loaded, counts, number, ctc_only=False)
        self.training_step.update(number, computed.numbers, len(loaded))
        if on_gpu:
            torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else 0
        return len(computed.splits) + len(computed.unfit), peak


class Arm:
    """A strategy, its plan, and the results of its timed steps; shapes are rounded up to ``grid`` (frames, tokens)."""

    def __init__(
        self, name: str, rig: Rig, index: LengthIndex, budget: Budget, seed: int = 0, grid: tuple[int, int] = (1, 1)
    ):
        self.name, self.rig, self.index, self.budget, self.grid = name, rig, index, budget, grid
        self.noise = 0.1 * torch.randn(round(float(np.max(index.seconds)) * RATE) + 1)
        self.plan = Plan(index, budget, name, seed=seed, grid=grid)
        self.packed = rig.training_step.gradient.packed
        self.steps = Steps(self.plan)
        self.addresses = self.steps.addresses(None, 0, 0)
        self.number = 0
        self.predicted: list[float] = []
        self.taken: list[float] = []
        self.filled: list[float] = []
        self.peaks: list[int] = []
        self.shapes: list[tuple[int, int, int]] = []
        self.rows: list[np.ndarray] = []
        self.cuts = 0

    def step(self, timed: bool = True) -> None:
        """Take one step of the plan. Its batches are made beforehand; everything from copying them to the device on is
        timed."""
        loaded: list[Loaded] = []
        while not loaded or not loaded[-1].address.last:
            address = next(self.addresses)
            batch = batch_of(self.index, address.rows, self.rig.model.config.decoder.vocabulary, self.noise)
            if self.grid != (1, 1):
                batch = batch.on_grid(round(self.grid[0] * self.budget.frame_seconds * RATE), self.grid[1])
            if self.rig.device.type == "cuda":
                batch = batch.pin_memory()
            loaded.append(Loaded(address, batch, []))
        start = time.perf_counter()
        cuts, peak = self.rig.step(loaded, self.number)
        taken = time.perf_counter() - start
        planned = self.steps.taken(self.number)
        self.number += 1
        if not timed:
            return
        self.taken.append(taken)
        self.predicted.append(float(planned.seconds.sum()))
        self.filled.append(planned.filled)
        self.peaks.append(peak)
        self.cuts += cuts
        for rows in planned.rows:
            lengths = Lengths.of(self.index, rows, self.budget, self.grid)
            if self.packed:  # an utterance's own lengths
                self.shapes += [(1, int(t), int(u)) for t, u in zip(lengths.frames, lengths.tokens)]
            else:
                self.shapes.append((len(rows), int(lengths.frames.max()), int(lengths.tokens.max())))
            self.rows.append(rows)

    @property
    def seconds(self) -> float:
        return sum(self.taken)

    def figures(self) -> dict[str, Any]:
        shapes, rows = np.array(self.shapes), np.concatenate(self.rows)
        frames = self.budget.frames(self.index.seconds[rows])
        audio = float(self.index.seconds[rows].sum())
        return {
            "audio_hours_per_hour": audio / self.seconds,
            "predicted": audio / sum(self.predicted),
            "padded_audio": 1 - float(frames.sum() / (shapes[:, 0] * shapes[:, 1]).sum()),
            "mean_batch": len(rows) / len(self.rows),
            "memory_filled_by_plan": float(np.mean(self.filled)),
            "out_of_memory": self.cuts,
            "steps": len(self.taken),
            "seconds": self.seconds,
            "left_out": len(self.plan.left_out()),
        }
