"""What moving layers from decoder to encoder is worth, with and without caches (Żelasko et al., 2025, arXiv
2503.05931).

The paper's gain came with a decoder that projects the encoder output anew at every step; this measures the
shift and the cache apart, on random weights if need be: every row decodes a given number of tokens. `measure_shift`
does so cache by cache on one batch, `measure_ways` on a queue, each way as it is run: ours through the engine, the
released toolkit's in batches sorted by length, each of which waits for its longest row.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor

from canter.bench.naive import CACHES, generate
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request, encoder_batches
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.model import ModelConfig, SpeechModel


@dataclass(frozen=True)
class ShiftRow:
    """One model with one cache; seconds are medians over the repeats."""

    shape: str
    """Encoder and decoder layers, as 4/6."""
    cache: str
    """What is cached: see canter.bench.naive."""
    parameters: int
    encoder_seconds: float
    """Features and encoder."""
    decoder_seconds: float
    rtfx: float
    """Seconds of audio for each second of encoder and decoder."""
    speedup: float
    """Against the first row."""


def measure_shift(
    models: dict[str, SpeechModel],
    audio: Tensor,
    lengths: Tensor,
    tokens_per_row: int,
    repeats: int = 3,
    caches: Sequence[str] = CACHES,
    prompt_tokens: int = 4,
) -> list[ShiftRow]:
    """Times every model of ``models`` (by its shape's name) on one batch under every cache.

    audio (B, S) at the models' rate, lengths (B,) in samples. The repeats are interleaved, so that a slow
    moment of the machine falls on all rows alike, and each kind of run is warmed up by one token.
    """
    prompt = torch.ones(len(audio), prompt_tokens, dtype=torch.long, device=audio.device)
    encoders: dict[str, list[float]] = {shape: [] for shape in models}
    decoders: dict[tuple[str, str], list[float]] = {}
    with torch.inference_mode():
        for repeat in range(repeats + 1):  # the first warms up
            for shape, model in models.items():
                model.eval()
                begun = _now()
                encoded, frames = model.encode(*model.features(audio, lengths))
                encoded = model.projection(encoded)
                if repeat:
                    encoders[shape].append(_now() - begun)
                for cache in caches:
                    begun = _now()
                    generate(model.decoder, encoded, frames, prompt, tokens_per_row if repeat else 1, cache)
                    if repeat:
                        decoders.setdefault((shape, cache), []).append(_now() - begun)
    audio_seconds = int(lengths.sum()) / next(iter(models.values())).config.features.sample_rate
    rows: list[ShiftRow] = []
    for (shape, cache), seconds in decoders.items():
        encoder, decoder = median(encoders[shape]), median(seconds)
        rtfx = audio_seconds / (encoder + decoder)
        speedup = rtfx / rows[0].rtfx if rows else 1.0
        parameters = sum(parameter.numel() for parameter in models[shape].parameters())
        rows.append(ShiftRow(shape, cache, parameters, encoder, decoder, rtfx, speedup))
    return rows


WAYS = ("released", "engine")
"""The toolkit's way: hidden states cached, keys and values projected anew at each step; and ours."""


@dataclass(frozen=True)
class WayRow:
    """One model run one way over the whole queue; seconds are those of the median repeat."""

    shape: str
    way: str
    parameters: int
    seconds: float
    encoder_seconds: float
    """Features and encoder. On a GPU the engine's overlap with its decoder's."""
    decoder_seconds: float
    useful_rows: float
    """Share of the rows decoded that had not ended."""
    rtfx: float
    speedup: float
    """Against the first row."""


class ForcedLengths(Engine):
    """Rows end after as many tokens as their key says, and nowhere else."""

    def __init__(self, model: SpeechModel, config: EngineConfig):
        super().__init__(model, -1, config)

    def _limit(self, request: Request, frames: int) -> int:
        assert isinstance(request.key, tuple)
        return request.key[1]


def canary_config(encoder_layers: int, decoder_layers: int, width: int = 1024) -> ModelConfig:
    """A Canary of so many layers: of width 1024, 24/24 is canary-1b's shape and 32/4 canary-1b-flash's."""
    heads = max(1, width // 128)
    encoder = FastConformerConfig(
        layers=encoder_layers,
        width=width,
        heads=heads,
        feedforward=4 * width,
        subsampling_channels=max(1, width // 4),
        mels=128,
    )
    decoder = DecoderConfig(
        layers=decoder_layers,
        width=width,
        heads=heads,
        feedforward=4 * width,
        vocabulary=5248,
        positions=1024,
    )
    return ModelConfig(features=FeatureConfig(mels=128), encoder=encoder, decoder=decoder)


def matched_encoder_layers(encoder_layers: int, decoder_layers: int, new_decoder_layers: int, width: int = 1024) -> int:
    """With how many encoder layers a Canary of ``new_decoder_layers`` comes nearest to the parameters of
    ``encoder_layers``/``decoder_layers``."""

    def size(encoder: int, decoder: int) -> int:
        with torch.device("meta"):
            model = SpeechModel(canary_config(encoder, decoder, width))
        return sum(parameter.numel() for parameter in model.parameters())

    layer = size(2, 1) - size(1, 1)
    return 1 + max(0, round((size(encoder_layers, decoder_layers) - size(1, new_decoder_layers)) / layer))


def measure_ways(
    models: dict[str, SpeechModel],
    clips: Sequence[np.ndarray],
    tokens: Sequence[int],
    *,
    repeats: int = 3,
    rows: int | None = None,
    frames: int | None = None,
    batch: int = 32,
    prompt: Sequence[int] = (1, 2, 3, 4),
) -> list[WayRow]:
    """Runs every model of ``models`` (by its shape's name) both WAYS over clips (S,), each stopped after so many
    ``tokens``, the repeats interleaved after one that warms up.

    ``rows`` and ``frames`` are the engine's, ``batch`` the clips of a batch of the released way.
    """
    runs: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for repeat in range(repeats + 1):
        for shape, model in models.items():
            model.eval()
            released = _released_way(model, clips, tokens, batch, prompt)
            engine = _engine_way(model, clips, tokens, EngineConfig(rows, frames, max_repeats=0), prompt)
            if repeat:
                for way, run in zip(WAYS, (released, engine)):
                    runs.setdefault((shape, way), []).append(run)
    rate = next(iter(models.values())).config.features.sample_rate
    audio_seconds = sum(map(len, clips)) / rate
    found: list[WayRow] = []
    for (shape, way), timed in runs.items():
        seconds, encoder, decoder, useful = sorted(timed)[(len(timed) - 1) // 2]
        parameters = sum(parameter.numel() for parameter in models[shape].parameters())
        rtfx = audio_seconds / seconds
        speedup = rtfx / found[0].rtfx if found else 1.0
        found.append(WayRow(shape, way, parameters, seconds, encoder, decoder, useful, rtfx, speedup))
    return found


def _engine_way(
    model: SpeechModel, clips: Sequence[np.ndarray], tokens: Sequence[int], config: EngineConfig, prompt
) -> tuple[float, float, float, float]:
    """Seconds in all, of the encoder and of the decoder, and the share of useful rows."""
    engine = ForcedLengths(model, config)
    rate = model.config.features.sample_rate
    lengths = [model.encoder_frames(len(clip) / rate) for clip in clips]
    batches = encoder_batches(lengths, engine.frames, engine.rows)
    begun = _now()
    requests = ([Request(clips[i], prompt, (i, tokens[i])) for i in batch] for batch in batches)
    done = sum(len(hypothesis.tokens) for hypothesis in engine.run(requests))
    seconds = _now() - begun
    assert done == sum(tokens)
    counters = engine.counters
    encoder = counters.feature_seconds + counters.encoder_seconds
    return seconds, encoder, counters.decoder_seconds, counters.useful_rows


@torch.inference_mode()
def _released_way(
    model: SpeechModel, clips: Sequence[np.ndarray], tokens: Sequence[int], batch: int, prompt
) -> tuple[float, float, float, float]:
    """As `_engine_way`. Sorted by length, the longest first; a batch goes on until its last row has ended."""
    device = next(model.parameters()).device
    order = sorted(range(len(clips)), key=lambda place: -len(clips[place]))
    encoder = decoder = 0.0
    computed = 0
    begun = _now()
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        started = _now()
        lengths = torch.tensor([len(clips[place]) for place in places])
        audio = torch.zeros(len(places), int(lengths.max()))
        for row, place in zip(audio, places):
            row[: len(clips[place])] = torch.from_numpy(clips[place])
        encoded, frames = model.encode(*model.features(audio.to(device), lengths.to(device)))
        encoded = model.projection(encoded)
        encoder += _now() - started
        started = _now()
        prompts = torch.tensor([list(prompt)] * len(places), device=device)
        longest = max(tokens[place] for place in places)
        generate(model.decoder, encoded, frames, prompts, longest, "hidden").tolist()
        decoder += _now() - started
        computed += longest * len(places)
    return _now() - begun, encoder, decoder, sum(tokens) / computed


def _now() -> float:
    """Seconds, once the device is done with what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
