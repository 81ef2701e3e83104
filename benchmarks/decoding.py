"""Measure the useful rows of the decoder on queues of real lengths, and the speedup by caches and shallow decoders.

Weights are random and audio is noise: every row stops at the number of tokens of a real utterance, as tables of
`duration` and `tokens` give them.

    CANTER_SHARED=... python benchmarks/decoding.py [--lengths TABLE.parquet ...] [--rows 128] [--json FILE]
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
import tyro
from decoder_shift import ForcedLengths

from canter.demo.shift import measure_shift
from canter.inference.engine.requests import EngineConfig, Request, encoder_batches
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.model import ModelConfig, SpeechModel

TABLES = Path(os.environ.get("CANTER_SHARED", ".")) / "data/lengths"
PROMPT = (1, 2, 3, 4)


@dataclass(frozen=True)
class Options:
    lengths: tuple[Path, ...] = (TABLES / "an4_en.parquet", TABLES / "librispeech_devtest_en.parquet")
    """Parquets with `duration` (seconds) and `tokens`."""
    utterances: int = 1024
    """Number of utterances in a queue, drawn from a table's rows up to 40 s without replacement."""
    rows: tuple[int, ...] = (64, 128)
    """Numbers of slots of the decoder."""
    threads: int = 1
    """Number of torch threads."""
    repeats: int = 5
    """Number of repeats of the comparison of shapes and caches; 0 omits it."""
    json: Path | None = None
    """Write the figures to this file."""


def small_model(encoder_layers: int, decoder_layers: int, vocabulary: int = 304) -> SpeechModel:
    torch.manual_seed(0)
    return SpeechModel(
        ModelConfig(
            encoder=FastConformerConfig(layers=encoder_layers),
            decoder=DecoderConfig(layers=decoder_layers, vocabulary=vocabulary),
        )
    ).eval()


def draw(table: Path, count: int) -> list[tuple[float, int]]:
    """Return (seconds, tokens with the end token) of ``count`` utterances, longest first."""
    columns = parquet.read_table(table, columns=["duration", "tokens"]).to_pydict()
    rows = [(s, t + 1) for s, t in zip(columns["duration"], columns["tokens"]) if 0.1 <= s <= 40 and t]
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    return sorted((rows[place] for place in chosen), reverse=True)


def noise(seconds: float) -> np.ndarray:
    samples = round(16000 * seconds)
    return (0.1 * np.random.default_rng(samples).standard_normal(samples)).astype(np.float32)


def batches_useful(counts: Sequence[int], rows: int) -> float:
    """Return the useful fraction of rows in fixed batches that wait for their longest row."""
    batches = [counts[start : start + rows] for start in range(0, len(counts), rows)]
    return sum(counts) / sum(len(batch) * max(batch) for batch in batches)


def queue(model: SpeechModel, utterances: list[tuple[float, int]], rows: int) -> dict[str, Any]:
    """Measure the engine on the utterances against fixed batches of ``rows``."""
    engine = ForcedLengths(model, EngineConfig(rows=rows, max_repeats=0))
    frames = [model.encoder_frames(seconds) for seconds, _ in utterances]
    batches = encoder_batches(frames, engine.frames, rows)
    requests = ([Request(noise(utterances[i][0]), PROMPT, (i, utterances[i][1])) for i in batch] for batch in batches)
    counts = [tokens for _, tokens in utterances]
    assert sum(len(found.tokens) for found in engine.run(requests)) == sum(counts)
    counters = engine.counters
    return {
        "rows": rows,
        "utterances": len(counts),
        "audio_seconds": counters.audio_seconds,
        "tokens": counters.tokens,
        "useful_rows": counters.useful_rows,
        "mean_live_share": counters.mean_rows / rows,
        "steps": counters.steps,
        "batches_by_audio_useful_rows": batches_useful(counts, rows),
        "batches_by_true_tokens_useful_rows": batches_useful(sorted(counts), rows),
    }


def run(options: Options) -> None:
    torch.set_num_threads(options.threads)
    tiny = FastConformerConfig(layers=1, width=32, heads=2, feedforward=64, subsampling_channels=8)
    decoder = DecoderConfig(layers=1, width=32, heads=2, feedforward=64, vocabulary=304)
    model = SpeechModel(ModelConfig(encoder=tiny, decoder=decoder)).eval()  # slots are as full in any
    queues = []
    for table in options.lengths:
        utterances = draw(table, options.utterances)
        for rows in options.rows:
            queues.append({"lengths": table.stem, **queue(model, utterances, rows)})
            print({name: round(v, 3) if isinstance(v, float) else v for name, v in queues[-1].items()}, flush=True)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": options.threads,
        "queues": queues,
    }
    if options.repeats:
        clips = [torch.from_numpy(noise(seconds)) for seconds, _ in draw(options.lengths[0], 64)[32:]]
        audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        shapes = {f"{e}/{d}": small_model(e, d) for e, d in ((4, 6), (6, 3), (7, 1))}
        shift = measure_shift(
            shapes, audio, torch.tensor([len(clip) for clip in clips]), tokens_per_row=24, repeats=options.repeats
        )
        result["shift"] = [asdict(row) for row in shift]
        for row in shift:
            print(
                f"{row.shape} {row.cache:7} {row.parameters / 1e6:.2f} M  encoder {row.encoder_seconds:.3f} s  "
                f"decoder {row.decoder_seconds:.3f} s  RTFx {row.rtfx:5.0f}  {row.speedup:.2f}x"
            )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
