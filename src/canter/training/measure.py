"""What is measured before a run: a training step's speed in each precision, and what it may use."""

import copy
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from canter.errors import BudgetError
from canter.models.batch import Batch
from canter.models.model import SpeechModel
from canter.models.norm import merge_pending
from canter.planning.budget import Budget
from canter.training.config import TrainConfig
from canter.training.defaults import decided
from canter.training.step.half import bf16_weights
from canter.training.step.optimizers import Optimizers
from canter.training.step.weights import compile_layers
from canter.tuning.probe import ProbedStep

CHARACTERS_A_SECOND = 15  # of the synthetic batches that are timed
TIMED_STEPS = 5
TIMED_SECONDS = 6.0  # of each of its utterances
WORTH_THREADS = 1.2  # how much faster several threads must be than one
SHARE_OF_MEMORY = 0.5  # of a CPU's memory, where nothing else is said
SHARE_OF_GPU = 0.95  # of what is free on a GPU
# what a budget must have been measured on
DECIDING = ("model_shape", "device", "precision", "optimizer", "compile")


def synthetic_batch(model: SpeechModel, batch: int, frames: int, tokens: int, prompt: int) -> Batch:
    """Noise of B utterances that the encoder turns into T frames each, with U random tokens, made where the model is:
    a step's time should not be that of moving its audio."""
    device = next(model.parameters()).device
    samples = max(1, round(frames * planned_frame_seconds(model) * model.sample_rate))
    outputs = 2 if model.ctc is None else max(2, model.config.ctc_vocabulary)
    characters = max(1, min(int(samples / model.sample_rate * CHARACTERS_A_SECOND), 2 * frames))
    with device:
        return Batch(
            audio=(torch.randn(samples) * 0.1).repeat(batch, 1),
            audio_lengths=torch.full((batch,), samples),
            tokens=torch.randint(0, model.vocabulary, (batch, tokens)),
            token_lengths=torch.full((batch,), tokens),
            prompt_lengths=torch.full((batch,), min(prompt, tokens - 1)),
            characters=torch.randint(1, outputs, (batch, characters)),
            character_lengths=torch.full((batch,), characters),
            rows=torch.zeros(batch, dtype=torch.long),
        )


def training_step(
    config: TrainConfig, model: SpeechModel, precision: str, prompt: int, *, copied: bool = True
) -> ProbedStep:
    """A whole step on a synthetic batch (B, T, U), on a copy of ``model`` unless ``copied`` is false."""
    model, config = (copy.deepcopy(model) if copied else model).train(), decided(config)
    if config.compile:
        compile_layers(model)
    device = next(model.parameters()).device
    optimizers, half = Optimizers(model, config.optimizer, steps=1000), bf16_weights(model, precision)

    def step(batch: int, frames: int, tokens: int) -> None:
        data = synthetic_batch(model, batch, frames, tokens, prompt)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and half is None)
        with half or nullcontext(), autocast:
            loss = model.loss(data, label_smoothing=config.loss.label_smoothing)
            (loss.attention / loss.attention_count + loss.ctc / loss.ctc_count.clamp(min=1)).backward()
            if half:
                half.collect()
        merge_pending(model)
        optimizers.step(0)

    return ProbedStep(model, [part for part, _ in optimizers.parts], step, config.compile)


def choose_speed(config: TrainConfig, model: SpeechModel, say: Callable[[str], None]) -> tuple[str, int]:
    """(precision, threads) of the shortest training step among those the configuration leaves open.

    bf16 has float32 weights and bf16 arithmetic. All cores are not always fastest: on a machine that others use
    too, threads wait for one another.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    precisions = ("float32", "bf16") if config.precision == "auto" else (config.precision,)
    if config.precision == "auto" and config.budget is not None:  # what the budget was measured in
        given = Budget.load(config.budget).measured_on.get("precision")
        precisions = tuple(p for p in precisions if p == given) or precisions
    cores = torch.get_num_threads()
    threads = {config.threads} if config.threads else {1, cores} if on_cpu else {cores}
    if config.budget is not None and not config.threads and on_cpu:
        given = Budget.load(config.budget).measured_on.get("threads")
        threads = {given} if isinstance(given, int) and 1 <= given <= cores else threads
    if len(precisions) == len(threads) == 1:
        return precisions[0], next(iter(threads))
    frames = max(1, round(TIMED_SECONDS / planned_frame_seconds(model)))
    seconds: dict[tuple[str, int], float] = {}
    for precision in precisions:
        for count in sorted(threads):
            torch.set_num_threads(count)
            step = training_step(config, model, precision, prompt=4)
            times = []
            for _ in range(TIMED_STEPS):
                start = time.perf_counter()
                step(4, frames, 25)
                times.append(time.perf_counter() - start)
            seconds[precision, count] = sorted(times[1:])[len(times) // 2 - 1]
    # threads wait for one another whenever something else runs, so several must be worth it
    chosen = min(seconds, key=lambda way: seconds[way] * (1.0 if way[1] == 1 else WORTH_THREADS))
    if len(seconds) > 1:
        told = ", ".join(f"{p} on {n} threads {1000 * s:.0f} ms" for (p, n), s in seconds.items())
        say(f"{chosen[0]} on {chosen[1]} threads: a step takes {told}")
    return chosen


def memory_limit(device: torch.device, say: Callable[[str], None], limit: float | None = None) -> float:
    """Return the bytes that a step may use, weights included: ``limit``, or most of a GPU's free memory, or half of a
    CPU's.

    Raises BudgetError for a limit that the machine does not have.
    """
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        default, what = SHARE_OF_GPU * room, f"{SHARE_OF_GPU:.0%} of what is free on this GPU"
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        default, what = SHARE_OF_MEMORY * room, "half of this machine's"
    if limit is None:
        limit = default
        say(f"memory limit {limit / 2**30:.1f} GiB, {what}")
    if limit > room:
        raise BudgetError(
            f"the limit of {limit / 2**30:.1f} GiB is more than the {room / 2**30:.1f} GiB there are; lower it, or "
            "plan for another device with 'canter plan --model SHAPE --memory SIZE'"
        )
    return limit


def planned_frame_seconds(model: SpeechModel) -> float:
    """Seconds of an encoder frame as plans count them. Where a model pads every utterance to one length, that length:
    all cost the same, and T is 1."""
    return model.padded_seconds or model.frame_seconds


def measured_on(config: TrainConfig, model: SpeechModel, precision: str) -> dict[str, Any]:
    """What a budget of this model belongs to; of these, DECIDING must agree where it is used."""
    device = next(model.parameters()).device
    count = sum(parameter.numel() for parameter in model.parameters())
    recompute = ", recomputed" if model.recomputes else ""
    return {
        "model": model.shape,
        "model_shape": f"{model.shape}, {count:,} parameters{recompute}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "optimizer": config.optimizer.name,
        "compile": config.compile,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
