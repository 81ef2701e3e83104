"""The 2 x 2: layers moved from decoder to encoder, and keys and values cached, apart and together.

{24/24, 32/4, shapes of the same parameters as the first} x {the released toolkit's way: hidden states cached, keys and
values projected anew at each step, batches that wait for their longest row; our engine}. Weights are random and audio
is noise: every row is made to stop at a given length, in both ways. Lengths are real ones, of a table of `duration`
and `tokens`, or else drawn.

    CANTER_SHARED=... python benchmarks/decoder_shift.py [--width 1024] [--json FILE]

On a GPU: width 1024, that is canary-1b and canary-1b-flash, in bf16, 512 utterances; on a processor width 256 and 48.
"""

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import tyro

from canter.bench.shift import canary_config, matched_encoder_layers, measure_ways
from canter.models.model import SpeechModel

LENGTHS = "data/lengths/librispeech_devtest_en.parquet"


@dataclass(frozen=True)
class Options:
    shapes: tuple[str, ...] = ("24/24", "32/4", "=/4", "=/2")
    """Encoder/decoder layers; `=` takes as many encoder layers as give the first shape's parameters."""
    width: int | None = None
    """Of encoder and decoder."""
    lengths: Path | None = None
    """Parquet with `duration` (seconds) and `tokens`; by default LibriSpeech's below CANTER_SHARED."""
    clips: int | None = None
    """Utterances, drawn from those lengths up to 30 s."""
    rows: int | None = None
    """Rows that the engine's decoder advances together."""
    batch: int | None = None
    """Utterances of a batch of the released way."""
    repeats: int = 3
    """Timed runs, interleaved, after one that warms up; the median counts."""
    threads: int | None = None
    """Of torch."""
    device: str = "auto"
    """`cpu` or `cuda`."""
    json: Path | None = None
    """Write the result to this file."""


def draw_lengths(options: Options, count: int) -> tuple[str, list[tuple[float, int]]]:
    """Where they are from, and (seconds, tokens) of so many utterances."""
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
    found = measure_ways(
        models,
        clips,
        [tokens for _, tokens in lengths],
        repeats=options.repeats,
        rows=rows,
        frames=16384 if gpu else 1024,
        batch=batch,
    )
    result = {
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
        "rows": [asdict(row) for row in found],
    }
    print(f"{result['utterances']} utterances, {result['audio_seconds']:,.0f} s, {result['tokens']:,} tokens, "
          f"width {width}, {result['precision']}, {result['device']}")  # fmt: skip
    print("| encoder/decoder | way | parameters | encoder | decoder | useful rows | RTFx | speed |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row.shape} | {row.way} | {row.parameters / 1e6:,.0f} M | {row.encoder_seconds:.2f} s | "
            f"{row.decoder_seconds:.2f} s | {row.useful_rows:.0%} | {row.rtfx:,.1f} | {row.speedup:.2f}x |"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
