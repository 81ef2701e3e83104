"""Measure moving layers from decoder to encoder and caching keys and values, separately and together.

{24/24, 32/4, shapes with the parameters of the first} x {the released toolkit's way: hidden states cached, keys and
values projected again at each step, batches that wait for their longest row; our engine}. Weights are random and audio
is noise: every row is stopped at a given length, in both ways. Lengths are those of a table of `duration` and `tokens`,
or else drawn.

    CANTER_SHARED=... python benchmarks/decoder_shift.py [--width 1024] [--json FILE]

A GPU runs width 1024 (canary-1b and canary-1b-flash) in bf16 with 512 utterances; a CPU runs width 256 with 48.
"""

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import tyro

from canter.demo.naive import generate
from canter.demo.shift import synchronised_time
from canter.files import write_text
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request, encoder_batches
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.model import ModelConfig, SpeechModel

LENGTHS = "data/lengths/librispeech_devtest_en.parquet"


@dataclass(frozen=True)
class Options:
    shapes: tuple[str, ...] = ("24/24", "32/4", "=/4", "=/2")
    """Encoder/decoder layers; `=` chooses the number of encoder layers that gives the first shape's parameters."""
    width: int | None = None
    """Width of encoder and decoder."""
    lengths: Path | None = None
    """Parquet with `duration` (seconds) and `tokens` (default: LibriSpeech's below CANTER_SHARED)."""
    clips: int | None = None
    """Number of utterances, drawn from those lengths up to 30 s."""
    rows: int | None = None
    """Rows that the engine's decoder advances together."""
    batch: int | None = None
    """Batch size of the released way."""
    repeats: int = 3
    """Timed runs, interleaved, after one that warms up; the median counts."""
    threads: int | None = None
    """Threads of torch (default: torch's choice)."""
    device: str = "auto"
    """`cpu` or `cuda`."""
    json: Path | None = None
    """Write the result to this file."""


WAYS = ("released", "engine")
"""The released toolkit's way (hidden states cached, keys and values projected again at each step), and our engine."""


@dataclass(frozen=True)
class WayRow:
    """One model run one way over the complete queue; seconds are those of the median repeat."""

    shape: str
    way: str
    parameters: int
    seconds: float
    encoder_seconds: float
    """Features and encoder; on a GPU the engine's overlap with its decoder's."""
    decoder_seconds: float
    useful_rows: float
    """Fraction of the rows decoded that had not ended."""
    rtfx: float
    speedup: float
    """RTFx relative to the first row."""


class ForcedLengths(Engine):
    """Engine whose rows end after the number of tokens in their key, and nowhere else."""

    def __init__(self, model: SpeechModel, config: EngineConfig):
        super().__init__(model, -1, config)

    def _limit(self, request: Request, frames: int) -> int:
        assert isinstance(request.key, tuple)
        return request.key[1]


def canary_config(encoder_layers: int, decoder_layers: int, width: int = 1024) -> ModelConfig:
    """Return the configuration of a Canary; at width 1024, 24/24 is canary-1b's shape and 32/4 canary-1b-flash's."""
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
        layers=decoder_layers, width=width, heads=heads, feedforward=4 * width, vocabulary=5248, positions=1024
    )
    return ModelConfig(features=FeatureConfig(mels=128), encoder=encoder, decoder=decoder)


def matched_encoder_layers(encoder_layers: int, decoder_layers: int, new_decoder_layers: int, width: int = 1024) -> int:
    """Return the number of encoder layers with which a Canary of ``new_decoder_layers`` has about the parameters of
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
    """Run every model of ``models``, a mapping from shape to model, both WAYS over clips (S,), stopping each clip after
    its number of ``tokens``; repeats are interleaved after one that warms up.

    ``rows`` and ``frames`` are the engine's; ``batch`` is the batch size of the released way.
    """
    *_, found = repeat_ways(models, clips, tokens, repeats, EngineConfig(rows, frames, max_repeats=0), batch, prompt)
    return found


def repeat_ways(
    models: dict[str, SpeechModel],
    clips: Sequence[np.ndarray],
    tokens: Sequence[int],
    repeats: int,
    config: EngineConfig,
    batch: int,
    prompt: Sequence[int] = (1, 2, 3, 4),
) -> Iterator[list[WayRow]]:
    """Yield the rows of `measure_ways` after each timed repeat."""
    runs: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for repeat in range(repeats + 1):
        for shape, model in models.items():
            model.eval()
            released = _released_way(model, clips, tokens, batch, prompt)
            engine = _engine_way(model, clips, tokens, config, prompt)
            if repeat:
                for way, run in zip(WAYS, (released, engine)):
                    runs.setdefault((shape, way), []).append(run)
        if repeat:
            yield _middle_runs(models, clips, runs)


def _middle_runs(
    models: dict[str, SpeechModel],
    clips: Sequence[np.ndarray],
    runs: dict[tuple[str, str], list[tuple[float, float, float, float]]],
) -> list[WayRow]:
    """Return a row for the median repeat of each shape and way."""
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
    """Return total seconds, seconds of the encoder and of the decoder, and the fraction of useful rows."""
    engine = ForcedLengths(model, config)
    rate = model.config.features.sample_rate
    lengths = [model.encoder_frames(len(clip) / rate) for clip in clips]
    batches = encoder_batches(lengths, engine.frames, engine.rows)
    begun = synchronised_time()
    requests = ([Request(clips[i], prompt, (i, tokens[i])) for i in batch] for batch in batches)
    done = sum(len(hypothesis.tokens) for hypothesis in engine.run(requests))
    seconds = synchronised_time() - begun
    assert done == sum(tokens)
    counters = engine.counters
    encoder = counters.feature_seconds + counters.encoder_seconds
    return seconds, encoder, counters.decoder_seconds, counters.useful_rows


@torch.inference_mode()
def _released_way(
    model: SpeechModel, clips: Sequence[np.ndarray], tokens: Sequence[int], batch: int, prompt
) -> tuple[float, float, float, float]:
    """Return the figures of `_engine_way`. Clips are sorted, longest first; a batch ends with its last row."""
    device = next(model.parameters()).device
    order = sorted(range(len(clips)), key=lambda place: -len(clips[place]))
    encoder = decoder = 0.0
    computed = 0
    begun = synchronised_time()
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        started = synchronised_time()
        lengths = torch.tensor([len(clips[place]) for place in places])
        audio = torch.zeros(len(places), int(lengths.max()))
        for row, place in zip(audio, places):
            row[: len(clips[place])] = torch.from_numpy(clips[place])
        encoded, frames = model.encode(*model.features(audio.to(device), lengths.to(device)))
        encoded = model.projection(encoded)
        encoder += synchronised_time() - started
        started = synchronised_time()
        prompts = torch.tensor([list(prompt)] * len(places), device=device)
        longest = max(tokens[place] for place in places)
        generate(model.decoder, encoded, frames, prompts, longest, "hidden").tolist()
        decoder += synchronised_time() - started
        computed += longest * len(places)
    return synchronised_time() - begun, encoder, decoder, sum(tokens) / computed


def draw_lengths(options: Options, count: int) -> tuple[str, list[tuple[float, int]]]:
    """Return the source of the lengths, and (seconds, tokens) of ``count`` utterances."""
    random = np.random.default_rng(0)
    path = options.lengths
    if path is None and (shared := os.environ.get("CANTER_SHARED")):
        path = Path(shared) / LENGTHS
    if path is None:
        seconds = random.gamma(2.0, 4.0, count).clip(1.0, 30.0)
        return "drawn: gamma(2, 4 s), 1 to 30 s, 3.5 tokens a second", [
            (float(one), max(1, round(3.5 * one))) for one in seconds
        ]
    import pyarrow.parquet as parquet

    table = parquet.read_table(path, columns=["duration", "tokens"])
    pairs = zip(table["duration"].to_pylist(), table["tokens"].to_pylist())
    usable = [(seconds, tokens + 1) for seconds, tokens in pairs if 0 < seconds <= 30 and tokens]
    return path.name, [usable[place] for place in random.choice(len(usable), count)]


def run(options: Options) -> None:
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    gpu = device.startswith("cuda")
    if options.threads:
        torch.set_num_threads(options.threads)
    width = options.width or (1024 if gpu else 256)
    source, lengths = draw_lengths(options, options.clips or (512 if gpu else 48))
    random = np.random.default_rng(0)
    clips = [(0.1 * random.normal(size=round(16000 * seconds))).astype(np.float32) for seconds, _ in lengths]
    deep_encoder, deep_decoder = map(int, options.shapes[0].split("/"))
    models: dict[str, SpeechModel] = {}
    for shape in options.shapes:
        encoder, decoder = shape.split("/")
        layers = (
            matched_encoder_layers(deep_encoder, deep_decoder, int(decoder), width) if encoder == "=" else int(encoder)
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = SpeechModel(canary_config(layers, int(decoder), width)).eval().requires_grad_(False)
        for part in model.children():
            if gpu and part is not model.features:
                part.to(torch.bfloat16)
        models[f"{layers}/{decoder}"] = model
    rows, batch = options.rows or (128 if gpu else 32), options.batch or (128 if gpu else 16)
    result: dict = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "precision": "bf16" if gpu else "float32",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "width": width,
        "lengths": source,
        "utterances": len(clips),
        "audio_seconds": sum(seconds for seconds, _ in lengths),
        "tokens": sum(tokens for _, tokens in lengths),
        "engine_rows": rows,
        "released_batch": batch,
        "repeats": options.repeats,
        "rows": [],
    }
    config = EngineConfig(rows, 16384 if gpu else 1024, max_repeats=0)
    found: list[WayRow] = []
    for found in repeat_ways(models, clips, [tokens for _, tokens in lengths], options.repeats, config, batch):
        result["rows"] = [asdict(row) for row in found]
        if options.json:
            write_text(options.json, json.dumps(result, indent=2) + "\n", durable=False)
    print(f"{result['utterances']} utterances, {result['audio_seconds']:,.0f} s, {result['tokens']:,} tokens, "
          f"width {width}, {result['precision']}, {result['device']}")  # fmt: skip
    print("| encoder/decoder | way | parameters | encoder | decoder | useful rows | RTFx | speed |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row.shape} | {row.way} | {row.parameters / 1e6:,.0f} M | {row.encoder_seconds:.2f} s | "
            f"{row.decoder_seconds:.2f} s | {row.useful_rows:.0%} | {row.rtfx:,.1f} | {row.speedup:.2f}x |"
        )


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
