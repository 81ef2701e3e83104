"""LoRA against full fine-tuning: trained parameters, memory, seconds a step and WER, for several seeds.

    python benchmarks/lora.py MODEL --train MANIFEST --valid MANIFEST [--steps 60] [--seeds 0 1 2] [--json FILE]

Every run is one of `canter train` in --work, and arms alternate within a seed. The same command resumes what was
stopped, and finished runs are not repeated. Arms:

full         all weights, learning rate 3e-5
lora         rank 16, attention and feed-forward, learning rate 3e-4 (the defaults)
lora_qv      rank 16 on q_proj and v_proj only, at the same learning rate

Memory is that of the measured budget: fixed_mib are weights, gradients and optimiser state, which every step needs;
utterance_mib and utterances_in_limit follow from its fit, which few probes of small batches make rough.
"""

import json
import platform
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from canter.planning import Budget
from canter.training.config import LoraConfig, TrainConfig
from canter.training.recipe import FinishedRun, run_training

UNTIMED = 3  # first steps of a run, in which memory is first touched
ARMS = {"full": LoraConfig(), "lora": LoraConfig(rank=16), "lora_qv": LoraConfig(rank=16, targets=("q_proj", "v_proj"))}


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """Model to fine-tune; a Whisper keeps utterances at their own length."""
    train: tuple[Path, ...]
    """Manifests to train on."""
    valid: tuple[Path, ...]
    """Manifests to measure WER on."""
    work: Path = Path("runs/lora-benchmark")
    """Folder of the runs."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms to run."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every arm."""
    steps: int = 60
    """Optimiser steps of a run."""
    batch_seconds: float = 24.0
    """Maximum padded audio of a step."""
    valid_utterances: int = 100
    """Utterances to measure WER on, after the last step."""
    threads: int = 1
    """Threads that compute."""
    precision: str = "float32"
    """Precision of every run: float32 or bf16."""
    device: str = "auto"
    """Device of every run."""
    pad_seconds: float | None = 0.0
    """Length to pad to; none for models that pad to no length."""
    limit_gib: float = 2.0
    """Memory for which the audio that fits is stated."""
    json: Path | None = None
    """Where to write the figures."""


def settings(options: Options, arm: str, seed: int) -> TrainConfig:
    return TrainConfig(
        manifest=options.train,
        valid=options.valid,
        init=options.model,
        output=options.work / f"{arm}-{seed}",
        pad_seconds=options.pad_seconds,
        steps=options.steps,
        batch_seconds=options.batch_seconds,
        valid_every=max(options.steps, 1),
        valid_utterances=options.valid_utterances,
        threads=options.threads,
        precision=options.precision,  # type: ignore[arg-type]
        device=options.device,
        seed=seed,
        track=(),
        lora=ARMS[arm],
    )


def figures(options: Options, finished: FinishedRun) -> dict[str, float]:
    """Return the figures of a finished run."""
    prepared = finished.prepared
    folder, model = prepared.run.folder, prepared.subject.model
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    valid = [line for line in lines if line["kind"] == "valid"]
    timed = steps[UNTIMED:] or steps
    budget = Budget.load(folder / "budget.json")
    room = replace(budget, limit_bytes=options.limit_gib * 2**30)
    seconds = statistics.median(float(s) for s in prepared.data.index.seconds)
    frames = max(1, round(seconds / budget.frame_seconds))
    free = room.limit_bytes - room.fixed_bytes
    one = float(budget.bytes(1, frames, 20)) - budget.fixed_bytes
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {
        "trained_parameters": sum(x.numel() for x in model.parameters() if x.requires_grad),
        "parameters": sum(x.numel() for x in model.parameters()),
        "fixed_mib": budget.fixed_bytes / 2**20,
        "utterance_mib": one / 2**20,
        "utterances_in_limit": max(0, int(free / one)),
        "checkpoint_mib": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) / 2**20,
        "step_seconds": statistics.median(line["seconds"] - line["data_wait_seconds"] for line in timed),
        "loss": statistics.mean(line["loss"] for line in steps[-5:]),
        "wer": valid[-1]["wer"],
    }


def main(options: Options) -> dict[str, object]:
    """Run all arms; return and print their figures."""
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        raise SystemExit(f"--arms {' '.join(unknown)}: known are {', '.join(ARMS)}")
    found: dict[str, dict[str, dict[str, float]]] = {arm: {} for arm in options.arms}
    result: dict[str, object] = {
        "model": options.model.name,
        "machine": platform.processor() or platform.machine(),
        "steps": options.steps,
        "batch_seconds": options.batch_seconds,
        "limit_gib": options.limit_gib,
        "arms": found,
    }
    for seed in options.seeds:
        for arm in options.arms:
            finished = run_training(settings(options, arm, seed))
            found[arm][str(seed)] = figures(options, finished)
            if options.json:  # after every run: what is finished is kept
                options.json.write_text(json.dumps(result, indent=2) + "\n")
    names = list(next(iter(found[options.arms[0]].values())))
    print(f"{'mean over seeds':>22}", *(f"{arm:>12}" for arm in options.arms))
    for name in names:
        means = [statistics.mean(one[name] for one in found[arm].values()) for arm in options.arms]
        print(f"{name:>22}", *(f"{mean:12,.3f}" for mean in means))
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
