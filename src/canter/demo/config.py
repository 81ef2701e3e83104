"""Settings of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoConfig:
    """Options of `canter demo`."""

    output: Path = Path("demo")
    """Folder for corpus, run, transcripts and report."""
    quick: bool = False
    """Run all stages in about a minute, on a small corpus with few steps; the WER is of no use."""
    utterances: int | None = None
    """Number of training utterances to synthesise (default: 6000; quick: 300)."""
    minutes: float | None = None
    """Minutes of training (default: the time remaining of ten minutes, 3 to 6.5; quick: 0.3). The number of steps
    follows from the measured step time."""
    seed: int = 0
    """Seed of corpus, weights and order."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the complete demo; `QUICK` has those of the quick one."""

    run: str = "run"
    """Name of the run folder."""
    utterances: int = 6000
    test_utterances: int = 200
    minutes: float | None = None
    """Minutes of training; None: what remains of `TOTAL_MINUTES`."""
    longest_in_memory: int = 20
    """Memory that the strategies are compared for, in utterances as long as the longest."""
    speed_seconds: float = 20.0
    """Time for measuring the training speed of strategies."""
    speed_longest: int = 4
    """Memory for that measurement, in utterances as long as the longest."""
    shift_batch: tuple[int, int, int] = (16, 8, 28)
    """Utterances, seconds and tokens of the batch that deep and shallow decoders are compared on."""
    shift_repeats: int = 2


FULL = Scale()
QUICK = Scale("run-quick", 300, 24, 0.3, 2, 2.0, 2, (4, 4, 12), 1)
# Minutes of the complete demo, of the stages after training, and bounds for training.
TOTAL_MINUTES, AFTER_TRAINING, TRAINING_MINUTES = 9.75, 1.5, (3.0, 6.5)
# A micro-batch of 24 s of audio suits so small a model on a CPU: larger ones cost updates, smaller ones speed.
BATCH_SECONDS = 24.0
# Weight of CTC in decoding; docs/inference.md compares 0.1 to 0.5.
CTC_WEIGHT = 0.3
# Most words are one token: the decoder learns to follow the audio in fewer steps than with 256.
VOCAB_SIZE = 600
# Encoder and decoder layers of two models of equal size: 6 decoder layers have the parameters of 4 encoder layers.
DEEP, SHALLOW = (6, 8), (10, 2)
SHIFT_WIDTH = 256
