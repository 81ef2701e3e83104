"""Measure OWSM beside ESPnet: a queue of clips of real lengths (every second one by beam search too), and a single clip
by beam search.

The shape is that of OWSM v4 base (102 M parameters), weights are random, audio is noise of real lengths, and every text
ends at the length of a real one, in both systems. Both read the same folder; runs are interleaved, after one of a short
clip that warms up. ESPnet pads each clip to 30 s and decodes one at a time. Canter does so too, in a queue, which gives
ESPnet's tokens; and it decodes the clips at their own length, as a model that was trained without the padding.

ESPnet needs an environment of its own (docs/evaluation.md). On two cores it takes under ten minutes:

    CANTER_SHARED=... OMP_NUM_THREADS=2 PYTHONPATH=stub:src python benchmarks/owsm.py --json RESULT.json
    PYTHONPATH=stub:src python benchmarks/owsm.py --smoke       # a small shape and few clips
"""

import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from gpu_inference import draw_lengths

from canter.bench.peers import EspnetPeer
from canter.bench.speed import Clip
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request, encoder_batches
from canter.models.decoder import DecoderConfig
from canter.models.ebranchformer import EPSILON, EBranchformerConfig
from canter.models.features import EspnetFeatureConfig
from canter.models.formats.espnet import read_espnet, write_espnet
from canter.models.formats.nemo import special_tokens_model
from canter.models.model import ModelConfig, SpeechModel
from canter.reporting.machine import describe_machine
from canter.runtime import keep_freed_memory
from canter.text.owsm import OwsmTokenizer

NEVER = -1e4  # bias of the end token, so that texts end at their limit


@dataclass(frozen=True)
class Options:
    clips: int = 32
    """Utterances in the queue, drawn from real lengths up to 30 s."""
    batch: int = 16
    """Rows that Canter decodes together."""
    beams: int = 5
    """Beam size of the search on a single clip."""
    repeats: int = 2
    """Number of timed runs of each system; the median is reported."""
    layers: tuple[int, int] = (6, 6)
    """Layers of encoder and decoder."""
    width: int = 384
    """Width of encoder and decoder."""
    vocabulary: int = 50_000
    """Tokens of text, beside special ones and timestamps."""
    threads: int | None = None
    """Number of torch threads."""
    seconds: float = 330.0
    """Start no new run after this many seconds."""
    smoke: bool = False
    """Use a small shape and few clips."""
    json: Path | None = None
    """Write the result to this file."""


class LimitedEngine(Engine):
    """Engine whose rows end after the number of tokens in their key, unless the end token comes before."""

    def _limit(self, request: Request, frames: int) -> int:
        assert isinstance(request.key, tuple)
        return request.key[1]


class CanterQueue:
    """All clips in one queue of Canter's engine."""

    def __init__(self, model: SpeechModel, rows: int, beams: int = 1):
        assert model.tokenizer is not None
        self.engine = LimitedEngine(model, model.tokenizer.end, EngineConfig(rows=rows, beams=beams, max_repeats=0))

    def __call__(self, clips: Sequence[Clip], limits: Sequence[int]) -> list[list[int]]:
        engine = self.engine
        requests = [Request(clip.audio, clip.prompt, place) for clip, place in zip(clips, enumerate(limits))]
        frames = [engine.model.encoder_frames(clip.seconds) for clip in clips]
        batches = encoder_batches(frames, engine.frames, engine.rows)
        found = {one.key: one.tokens for one in engine.run([requests[place] for place in batch] for batch in batches)}
        return [found[request.key] for request in requests]


class EspnetLoop:
    """ESPnet, one clip after the other."""

    def __init__(self, model: SpeechModel, folder: Path, beams: int = 1):
        self.peer = EspnetPeer(model, folder, "float32", EngineConfig(beams=beams))

    def __call__(self, clips: Sequence[Clip], limits: Sequence[int]) -> list[list[int]]:
        found = []
        for clip, limit in zip(clips, limits):
            self.peer.limit = limit
            found += self.peer([clip])
        return found


@torch.no_grad()
def build(options: Options, folder: Path) -> SpeechModel:
    """Return a random OWSM, read from the folder in ESPnet's layout that it is written to."""
    words = [f"▁w{number}" for number in range(options.vocabulary)]
    pieces = special_tokens_model(("<unk>", *words))
    times = [f"<{step * 0.02:.2f}>" for step in range(1501)]
    tokens = ["<blank>", "<unk>", "<na>", "<nospeech>", "<eng>", "<asr>", "<st_eng>", "<notimestamps>", *times]
    tokens += [*words, "<sos>", "<eos>", "<sop>"]
    tokenizer, (encoder, decoder), width = OwsmTokenizer(tokens, pieces), options.layers, options.width
    shape = {"width": width, "heads": width // 64, "feedforward": 4 * width}
    size = tokenizer.vocab_size
    config = ModelConfig(
        EspnetFeatureConfig(),
        EBranchformerConfig(layers=encoder, cgmlp_units=4 * width, **shape),
        DecoderConfig(
            layers=decoder, vocabulary=size, positions=1024, embedding_norm=False, tied=False, scale_embedding=True,
            epsilon=EPSILON, **shape,
        ),
        ctc_vocabulary=size,
        ctc_upsampling=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SpeechModel(config).eval()
    for name, weight in model.named_parameters():  # so wide that every token depends on the audio
        if weight.dim() > 1:
            wide = 3.0 if "cross_attention" in name or name == "decoder.output" else 1.3
            weight.copy_(torch.randn_like(weight) * wide / weight[0].numel() ** 0.5)
    model.decoder.head_bias[tokenizer.end] = NEVER
    model.tokenizer = tokenizer
    return read_espnet(write_espnet(model, folder)).eval()


def measure(
    systems: Mapping[str, CanterQueue | EspnetLoop],
    clips: Sequence[Clip],
    limits: Sequence[int],
    options: Options,
    until: float,
) -> dict[str, dict]:
    """Return the seconds of every run of each system, and how its tokens compare with those of the first, ESPnet.

    Every system is warmed up on the shortest clip; runs are interleaved. No run begins after ``until``, in the seconds
    of `time.perf_counter`, but the first of each.
    """  # fmt: skip
    for system in systems.values():
        system(clips[-1:], [2])
    runs: dict[str, list[float]] = {name: [] for name in systems}
    tokens: dict[str, list[list[int]]] = {}
    for repeat in range(options.repeats):
        if repeat and time.perf_counter() > until:
            break
        for name, system in systems.items():
            begun = time.perf_counter()
            tokens[name] = system(clips, limits)
            runs[name].append(time.perf_counter() - begun)
            print(f"{name}: {runs[name][-1]:.2f} s", flush=True)
    first = next(iter(systems))
    audio = sum(clip.seconds for clip in clips)
    return {
        name: {
            "seconds": seconds,
            "rtfx": audio / median(seconds),
            "times_espnet": median(runs[first]) / median(seconds),
            "same_tokens": sum(map(list.__eq__, tokens[name], tokens[first])) / len(clips),
            "tokens": sum(map(len, tokens[name])),
        }
        for name, seconds in runs.items()
    }


def run(options: Options) -> None:
    if options.smoke:
        options = replace(options, clips=3, batch=2, repeats=1, layers=(1, 1), width=64, vocabulary=300)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    until = time.perf_counter() + options.seconds
    lengths = sorted(draw_lengths(options.clips), reverse=True)
    limits = [min(tokens, 12) if options.smoke else tokens for _, tokens in lengths]
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "espnet"
        model = build(options, folder)
        assert model.tokenizer is not None
        prompt = tuple(model.tokenizer.prompt_ids({"source_lang": "en"}))
        noise = [(0.1 * random.normal(size=round(16000 * seconds))).astype(np.float32) for seconds, _ in lengths]
        clips = [Clip(samples, len(samples) / 16000, prompt) for samples in noise]
        unpadded = copy.deepcopy(model)
        unpadded.set_features(pad_seconds=0.0)
        queue = measure(
            {
                "ESPnet": EspnetLoop(model, folder),
                "Canter, padded to 30 s": CanterQueue(model, options.batch),
                "Canter, clips of their own length": CanterQueue(unpadded, options.batch),
            },
            clips, limits, options, until,
        )  # fmt: skip
        some = slice(0, None, 1 if options.smoke else 2)
        searching = measure(
            {
                f"ESPnet, queue, {options.beams} beams": EspnetLoop(model, folder, options.beams),
                f"Canter, queue, {options.beams} beams, padded to 30 s": CanterQueue(
                    model, options.batch, options.beams
                ),
            },
            clips[some], limits[some], options, until,
        )  # fmt: skip
        middle = slice(len(clips) // 2, len(clips) // 2 + 1)
        single = measure(
            {
                f"ESPnet, {options.beams} beams": EspnetLoop(model, folder, options.beams),
                f"Canter, {options.beams} beams, padded to 30 s": CanterQueue(model, 1, options.beams),
                f"Canter, {options.beams} beams, clip of its own length": CanterQueue(unpadded, 1, options.beams),
            },
            clips[middle], limits[middle], options, until,
        )  # fmt: skip
    result = {
        "machine": describe_machine("cpu", ["espnet"]),
        "shape": model.shape,
        "parameters": sum(model.parts().values()),
        "batch": options.batch,
        "clips": len(clips),
        "audio_seconds": sum(clip.seconds for clip in clips),
        "queue": queue,
        "queue_with_beams": searching,
        "single_seconds": clips[middle][0].seconds,
        "single": single,
    }
    for name, row in {**queue, **searching, **single}.items():
        print(f"{name}: {row['times_espnet']:.1f} times ESPnet's speed, {row['same_tokens']:.0%} with its tokens")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
