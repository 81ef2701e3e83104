"""A training step of our modules against transformers' of the same shape, weights and batch, in turns in one run.

    python benchmarks/models.py [--family canary|whisper|both] [--steps 5] [--json]

A step is forward, cross-entropy on all tokens, backward and AdamW, from features. Memory is what autograd keeps
between forward and backward on a CPU (distinct storages, parameters left out), the allocator's peak on CUDA. For
Whisper, a third row trains ours at the lengths that the utterances have instead of 30 s.
"""

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
import tyro

from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig, WhisperFeatureConfig, length_mask
from canter.models.formats.huggingface import write_hf
from canter.models.model import ModelConfig, SpeechModel
from canter.models.whisper import WhisperEncoderConfig
from canter.runtime import choose_device


@dataclass(frozen=True)
class Options:
    family: Literal["canary", "whisper", "both"] = "both"
    """Which architecture."""
    steps: int = 5
    """Steps of each, after one to warm up; the least and the median are told."""
    batch: int = 4
    """Utterances."""
    seconds: float = 10.0
    """The longest utterance; the others go down to half of it."""
    tokens: int = 40
    """Of every utterance."""
    width: int = 256
    """Of encoder and decoder."""
    threads: int = 2
    """Of torch."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class Row:
    """Seconds of a step, MiB kept for backward."""

    name: str
    least_seconds: float
    median_seconds: float
    mebibytes: float


def canary(options: Options) -> ModelConfig:
    d = options.width
    encoder = FastConformerConfig(8, d, 4, 4 * d, subsampling_channels=d, mels=128)
    return ModelConfig(FeatureConfig(mels=128), encoder, DecoderConfig(4, d, 4, 4 * d, 1024, 512, pad=2))


def whisper(options: Options) -> ModelConfig:
    d = options.width
    decoder = DecoderConfig(4, d, 4, 4 * d, 1024, 448, pad=2, learned_positions=True, embedding_norm=False,
                            activation="gelu", key_bias=False, head_bias=False)  # fmt: skip
    return ModelConfig(WhisperFeatureConfig(), WhisperEncoderConfig(4, d, 4, 4 * d), decoder)


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def contenders(
    config: ModelConfig, options: Options, device: torch.device
) -> tuple[dict[str, Callable[[], torch.Tensor]], set[int]]:
    """Name -> one training step; and the addresses of all weights."""
    torch.manual_seed(0)
    ours = SpeechModel(config).to(device).train()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_hf(ours, Path(folder) / "model")
        kind = "Whisper" if isinstance(config.features, WhisperFeatureConfig) else "Canary"
        cls = getattr(transformers, f"{kind}ForConditionalGeneration")
        theirs = cls.from_pretrained(Path(folder) / "model").to(device).train()
    sizes = torch.linspace(options.seconds / 2, options.seconds, options.batch) * 16000
    lengths = sizes.long().to(device)
    audio = torch.randn(options.batch, int(lengths.max()), device=device) * 0.1
    tokens = torch.randint(3, 1024, (options.batch, options.tokens), device=device)
    features, frames = ours.features(audio, lengths)

    def our_loss(features: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return cross_entropy(ours.logits(*ours.encode(features, frames), tokens[:, :-1]), tokens)

    def their_loss() -> torch.Tensor:
        inputs = {"input_features": features, "decoder_input_ids": tokens[:, :-1], "use_cache": False}
        if kind == "Canary":
            inputs["attention_mask"] = length_mask(frames, features.shape[1])
        else:
            inputs["input_features"] = features.transpose(1, 2).contiguous()
        return cross_entropy(theirs(**inputs).logits, tokens)

    losses = {f"canter {kind}": lambda: our_loss(features, frames), f"transformers {kind}": their_loss}
    if kind == "Whisper":
        short, short_frames = WhisperFeatureConfig(pad_seconds=0.0).build().to(device)(audio, lengths)
        losses["canter Whisper, no padding to 30 s"] = lambda: our_loss(short, short_frames)
    models = {name: theirs if name.startswith("transformers") else ours for name in losses}
    optimizers = {id(m): torch.optim.AdamW(m.parameters(), 1e-5) for m in (ours, theirs)}

    weights = {p.untyped_storage().data_ptr() for m in (ours, theirs) for p in m.parameters()}

    def step(name: str) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            loss = losses[name]()
            loss.backward()
            optimizer = optimizers[id(models[name])]
            optimizer.step()
            optimizer.zero_grad()
            for module in ours.modules():
                getattr(module, "pending", []).clear()
            return loss

        return run

    return {name: step(name) for name in losses}, weights


def kept(run: Callable[[], object], weights: set[int], device: torch.device) -> float:
    """MiB, ``weights`` (addresses of storages) left out."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values()) / 2**20


def race(config: ModelConfig, options: Options, device: torch.device) -> list[Row]:
    steps, weights = contenders(config, options, device)
    memory = {name: kept(step, weights, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.steps):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return [Row(name, min(t), statistics.median(t), memory[name]) for name, t in times.items()]


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    device = choose_device("auto")
    rows = []
    for name, config in (("canary", canary(options)), ("whisper", whisper(options))):
        if options.family in (name, "both"):
            rows += race(config, options, device)
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "device": str(device)}
        print(json.dumps({"options": asdict(options), **versions, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    for row in rows:
        print(f"{row.name:38} {row.least_seconds:8.3f} s {row.median_seconds:8.3f} s {row.mebibytes:9.1f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Options))
