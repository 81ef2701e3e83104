"""A queue shared out to the processes that ``torchrun`` starts, so that all of them end at the same time."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from canter.corpus.manifest import Utterance
from canter.models.model import SpeechModel
from canter.planning.elastic import share_out

TOKENS_PER_SECOND = 4.0  # of speech; it only weighs the decoder against the encoder
PATIENCE = timedelta(days=30)  # a rank may wait for the slowest as long as it takes


class Ranks:
    """The processes of one transcription; one alone needs no connection."""

    def __init__(self) -> None:
        """Connects to the others if ``torchrun`` started this process."""
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.size > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=PATIENCE)

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, to all of them, in their order."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value to rank 0, nothing to the others."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values or []

    def close(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def work(model: SpeechModel, utterances: Sequence[Utterance]) -> np.ndarray:
    """(N,) float64: the multiplications that each utterance is expected to take, which stand for time.

    Encoder: its parameters at every frame, and attention by the square. Decoder: its parameters at every token, and
    attention to all frames. Audio beyond what the model takes at once counts as so many full windows. Of another
    library's model only seconds are known.
    """
    seconds = np.array([utterance.duration for utterance in utterances], dtype=np.float64)
    if "cost_model" not in model.supports:
        return seconds
    config = model.config
    padded = getattr(config.features, "pad_seconds", 0.0)
    if padded:
        windows = np.maximum(1.0, np.ceil(seconds / padded))
        frames = np.full(len(seconds), float(model.encoder_frames(padded)))
    else:
        windows = np.ones(len(seconds))
        frames = np.ceil(seconds / model.frame_seconds)
    tokens = np.maximum(1.0, seconds * TOKENS_PER_SECOND)
    encoder, decoder = (sum(weight.numel() for weight in part.parameters()) for part in (model.encoder, model.decoder))
    wide, deep = config.encoder.width, config.encoder.layers
    return windows * frames * (encoder + 2 * deep * wide * frames) + tokens * (
        decoder + 2 * config.decoder.layers * config.decoder.width * frames
    )


def share(model: SpeechModel, utterances: Sequence[Utterance], ranks: int) -> list[list[int]]:
    """For each rank its indices of ``utterances``; the same on every rank, and about the same work for each."""
    if ranks == 1:
        return [list(range(len(utterances)))]
    return share_out(work(model, utterances), ranks)
