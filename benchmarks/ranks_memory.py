"""Measure the memory that data parallelism adds to a training step, on two processes (gloo).

    python benchmarks/ranks_memory.py [--width 512] [--layers 8] [--json FILE]

Each way to share a Canary of the given shape runs two steps in fresh processes: alone; `replicate` and `shard`, as
`canter train --parallel` does it; PyTorch's DDP, with and without gradients as views of its buckets; FSDP2, layer by
layer. Memory is the peak resident memory of rank 0 above that of a step of a tiny model shared in the same way, which
loads what is no tensor. Batches are small, so that the peak is where gradients are; with `--frames 600` activations
are the peak, and what comes after the backward pass no longer counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from canter.models.batch import Batch
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.model import ModelConfig, SpeechModel
from canter.models.norm import merge_pending
from canter.ranks import Ranks, process_group
from canter.runtime import CLEAR, map_large_blocks, release_memory, resident
from canter.training.config import OptimizerConfig, TrainConfig
from canter.training.defaults import decided
from canter.training.distributed.shards import Shards
from canter.training.measure import synthetic_batch
from canter.training.step.gradient import TrainingStep

WAYS = ("none", "replicate", "shard", "ddp", "ddp, views", "fsdp")
RANKS = 2


class Whole(nn.Module):
    """Module whose forward pass returns the loss, as DDP needs it."""

    def __init__(self, model: SpeechModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        loss = self.model.loss(batch)
        return loss.attention / loss.attention_count + loss.ctc / loss.ctc_count.clamp(min=1)


def make_model(layers: int, width: int) -> SpeechModel:
    torch.manual_seed(0)
    encoder = FastConformerConfig(
        layers=layers, width=width, heads=4, feedforward=4 * width, kernel_size=9, subsampling_channels=32, mels=80
    )
    decoder = DecoderConfig(
        layers=layers, width=width, heads=4, feedforward=4 * width, vocabulary=1024, positions=512, pad=0
    )
    return SpeechModel(ModelConfig(FeatureConfig(mels=80), encoder, decoder, ctc_vocabulary=30))


def stepper(way: str, model: SpeechModel, ranks: Ranks) -> Callable[[Batch], None]:
    """Return a function that runs a complete step on a batch, with the model distributed in this way."""
    config = decided(TrainConfig(optimizer=OptimizerConfig(name="adamw")))
    shards = Shards(model, torch.device("cpu"), ranks) if way == "shard" else None
    whole: Any = Whole(model)
    if way == "fsdp":
        mesh = init_device_mesh("cpu", (ranks.size,))
        for stack in (model.encoder, model.decoder):
            for layer in stack.layers:  # type: ignore[union-attr]
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "loss")
    if way.startswith("ddp"):
        views = way.endswith("views")
        whole = DistributedDataParallel(whole, gradient_as_bucket_view=views)
    ours = TrainingStep(config, model, "float32", 100, ranks=ranks, shards=shards)

    def step(batch: Batch) -> None:
        if shards:
            shards.gather()
        if way in ("none", "replicate", "shard"):
            ours.backward(batch)
            ours.update(0, numbers=[ranks.rank], count=ranks.size)
            return
        whole(batch).backward()
        merge_pending(model)
        ours.optimizers.step(0)

    return step


def peak_of(way: str, sizes: tuple[int, int], shape: tuple[int, int, int], ranks: Ranks) -> int:
    """Return the peak resident bytes of two steps above those of a tiny model distributed in the same way."""
    map_large_blocks()
    tiny = make_model(2, 32)
    tiny_step = stepper(way, tiny, ranks)
    for _ in range(2):
        tiny_step(synthetic_batch(tiny, 1, 20, 5, 1))
    del tiny, tiny_step
    release_memory()
    before = resident()
    CLEAR.write_text("5")
    model = make_model(*sizes)
    step = stepper(way, model, ranks)
    for number in range(2):
        if number:  # the first makes the optimiser's state
            CLEAR.write_text("5")
        step(synthetic_batch(model, *shape, 1))
    return resident("VmHWM") - before


def as_rank(tell: Callable, rank: int, port: int, way: str, sizes: tuple, shape: tuple) -> None:
    torch.set_num_threads(1)
    size = 1 if way == "none" else RANKS
    if size > 1:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with process_group("cpu") as ranks:
        tell(peak_of(way, sizes, shape, ranks))


def measured(way: str, sizes: tuple[int, int], shape: tuple[int, int, int]) -> int:
    """Return the figure of rank 0."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(1 if way == "none" else RANKS):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=as_rank, args=(theirs.send, rank, port, way, sizes, shape))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    found = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sizes, shape = (args.layers, args.width), (1, args.frames, 10)
    model = make_model(*sizes)
    weights = sum(p.nbytes for p in model.parameters())
    alone, rows = 0, []
    for way in WAYS:
        peak = measured(way, sizes, shape)
        alone = alone or peak
        rows.append({"way": way, "peak": peak, "added": peak - alone})
        print(f"{way:12} peak {peak / 2**20:7.0f} MiB, added {(peak - alone) / 2**20:+7.0f}")
    result = {"parameters": weights // 4, "ranks": RANKS, "shape": shape, "torch": torch.__version__, "rows": rows}
    if args.json:
        lines = ",\n  ".join(json.dumps(row) for row in result.pop("rows"))
        args.json.write_text(f'{json.dumps(result)[:-1]},\n "rows": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
