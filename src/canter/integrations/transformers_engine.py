"""Canter's engine over transformers' ``generate``: the same requests, hypotheses and counts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Hashable, Iterable
from typing import Any

from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Hypothesis, Request, Underway

FRAME_SECONDS = 0.08  # in which the engine's settings count encoder frames


class GenerateEngine(Engine):
    """`Engine` over the model's own ``generate``: a batch is decoded whole, by beam search where there are several
    beams. Of the settings ``rows``, ``frames`` (of 80 ms), ``beams`` and ``length_penalty`` count."""

    aligns = False

    def __init__(self, model: Any, end: int, config: EngineConfig):
        self.generation: dict[str, Any] = {}
        if config.beams > 1:
            self.generation = {"num_beams": config.beams, "length_penalty": config.length_penalty or 0.0}
        super().__init__(model, end, config)
        self.frames = round(self.frames * FRAME_SECONDS / model.frame_seconds)

    def events(
        self,
        batches: Iterable[list[Request]],
        cancelled: Callable[[Hashable], bool] | None = None,
    ) -> Generator[Hypothesis | Underway]:
        model: Any = self.model
        for batch in batches:
            requests = [one for one in batch if cancelled is None or not cancelled(one.key)]
            if not requests:
                continue
            began = time.perf_counter()
            audio, prompts = [one.audio for one in requests], [one.prompt for one in requests]
            limits = [model.limit(clip, prompt) for clip, prompt in zip(audio, prompts)]
            found = model.transcribe(audio, prompts, batch_seconds=math.inf, limits=limits, **self.generation)
            seconds = time.perf_counter() - began
            steps = max(map(len, found)) + 1
            self.counters.seconds += seconds
            self.counters.decoder_seconds += seconds
            self.counters.audio_seconds += sum(map(len, audio)) / model.sample_rate
            self.counters.steps += steps
            self.counters.row_steps += steps * len(found)
            self.counters.useful_row_steps += sum(len(tokens) + 1 for tokens in found)
            for request, tokens, limit in zip(requests, found, limits):
                prompt = tuple(request.prompt)
                yield Hypothesis(request.key, tokens, len(tokens) < limit, prompt=prompt)
