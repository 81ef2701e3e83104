"""How full the decoder's slots are on real lengths, and what caches and the shift are worth.

Weights are random: every row stops at the number of tokens of its transcript.

    CANTER_SHARED=... python benchmarks/decoding.py [--manifest MANIFEST] [--rows 64] [--json]
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from canter.corpus.audio import load_audio
from canter.corpus.manifest import Utterance, read_manifest
from canter.inference.requests import EngineConfig, Request
from canter.inference.shift import ForcedLengths, measure_shift
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.model import ModelConfig, SpeechModel
from canter.text import train_tokenizer


@dataclass(frozen=True)
class Options:
    manifest: Path = Path(os.environ.get("CANTER_SHARED", ".")) / "data/speech/an4/manifest.jsonl"
    """Whose audio and transcripts' lengths to use."""
    rows: int = 64
    """Slots of the decoder."""
    copies: int = 1
    """How often the manifest is queued."""
    threads: int = 1
    """Of torch."""
    repeats: int = 5
    """Of the comparison of shapes and caches."""
    json: bool = False
    """Print one JSON object."""


def small_model(encoder_layers: int, decoder_layers: int, vocabulary: int) -> SpeechModel:
    torch.manual_seed(0)
    return SpeechModel(
        ModelConfig(
            encoder=FastConformerConfig(layers=encoder_layers),
            decoder=DecoderConfig(layers=decoder_layers, vocabulary=vocabulary),
        )
    ).eval()


def static_batches(lengths: list[int], rows: int) -> float:
    """Useful share of rows where batches sorted by token count wait for their longest row."""
    lengths = sorted(lengths)
    batches = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    return sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def run(options: Options) -> None:
    torch.set_num_threads(options.threads)
    utterances = [row for row in read_manifest(options.manifest) if isinstance(row, Utterance)]
    tokenizer = train_tokenizer((u.text for u in utterances), languages=["en"], vocab_size=300)
    counts = [len(tokenizer.encode(u.text)) + 1 for u in utterances]  # the end token too
    clips = [load_audio(u.audio_filepath) for u in utterances]
    prompt = tokenizer.prompt_ids({"source_lang": "en", "target_lang": "en"})
    queue = [(count, clip) for count, clip in zip(counts, clips)] * options.copies

    model = small_model(6, 2, tokenizer.vocab_size)
    engine = ForcedLengths(model, EngineConfig(rows=options.rows, max_repeats=0))
    by_length = sorted(queue, key=lambda pair: -len(pair[1]))
    groups = [by_length[start : start + 32] for start in range(0, len(by_length), 32)]
    requests = ([Request(clip, prompt, (0, count)) for count, clip in group] for group in groups)
    assert sum(len(hypothesis.tokens) for hypothesis in engine.run(requests)) == sum(counts) * options.copies
    counters = engine.counters

    batch = [clip for _, clip in by_length[len(by_length) // 2 :][:32]]
    lengths = torch.tensor([len(clip) for clip in batch])
    audio = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(clip) for clip in batch], batch_first=True)
    shapes = {f"{e}/{d}": small_model(e, d, tokenizer.vocab_size) for e, d in ((4, 6), (6, 3), (7, 1))}
    shift = measure_shift(shapes, audio, lengths, tokens_per_row=24, repeats=options.repeats)

    result = {
        "manifest": str(options.manifest),
        "utterances": counters.utterances,
        "tokens": counters.tokens,
        "rows": options.rows,
        "useful_rows": counters.useful_rows,
        "mean_rows": counters.mean_rows,
        "mean_rows_share": counters.mean_rows / options.rows,
        "useful_rows_static_batches_in_order": static_batches_in_order(by_length, options.rows),
        "useful_rows_static_batches_by_true_tokens": static_batches([c for c, _ in queue], options.rows),
        "rtfx": counters.rtfx,
        "counters": asdict(counters),
        "shift": [asdict(row) for row in shift],
        "torch": torch.__version__,
        "threads": options.threads,
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        if name not in ("shift", "counters"):
            print(f"{name:42} {value}")
    print({name: round(value, 2) for name, value in asdict(counters).items()}, file=sys.stderr)
    for row in shift:
        print(
            f"{row.shape} {row.cache:7} {row.parameters / 1e6:.2f} M  encoder {row.encoder_seconds:.3f} s  "
            f"decoder {row.decoder_seconds:.3f} s  RTFx {row.rtfx:5.0f}  {row.speedup:.2f}x"
        )


def static_batches_in_order(queue: list, rows: int) -> float:
    """As ``static_batches``, sorted by audio length, which is what is known before decoding."""
    batches = [[count for count, _ in queue[start : start + rows]] for start in range(0, len(queue), rows)]
    return sum(count for count, _ in queue) / sum(len(batch) * max(batch) for batch in batches)


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
