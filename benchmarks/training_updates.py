"""Measure the effect of the number of updates per epoch: WER and validation loss after equal audio, by batch size.

    python benchmarks/training_updates.py -o FOLDER --whisper MODEL --speech FOLDER [--tasks an4 demo] [--json FILE]

Every run of a task sees its data equally often, with the defaults of `canter train`, and differs in --batch-seconds
alone: large batches mean few updates. `an4` and `librivox` fine-tune a Whisper at the clips' own lengths; the held-out
clips are of other speakers. `demo` trains a small model from scratch on the synthesised corpus. The validation loss
is the cross-entropy of a held-out text token, teacher-forced. Started again, it goes on where it was.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from convergence import run, up_to
from rich.console import Console
from rich.table import Table

from canter.cli.progress import TerminalEvents, say
from canter.corpus.manifest import Utterance, read_manifest, write_manifest
from canter.demo.synthesis import synthesise
from canter.loading import load_model
from canter.models.model import SpeechModel
from canter.planning import Budget
from canter.reporting.machine import describe_machine
from canter.training.config import ModelShape, TrainConfig
from canter.training.feed.data import collate
from canter.training.loop import PreparedRun
from canter.training.recipe import prepare_training
from canter.training.validation import spread_over


@dataclass(frozen=True)
class Options:
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for corpus and runs."""
    whisper: Path
    """Folder of a Whisper, for the tasks an4 and librivox."""
    speech: Path
    """Folder that holds an4/ and librivox_mini/, each with a manifest.jsonl."""
    tasks: tuple[str, ...] = ("an4", "librivox", "demo")
    """Tasks to run."""
    batch_seconds: tuple[float, ...] = (16.0, 64.0, 4.0, 32.0, 8.0, 128.0)
    """Maximum sizes of a batch, in seconds of padded audio."""
    epochs: tuple[float, float, float] = (1.0, 2.0, 3.0)
    """Epochs of an4, librivox and demo."""
    rows: int = 120
    """Training utterances of an4 and librivox, evenly spaced."""
    utterances: int = 400
    """Training utterances of the synthesised corpus."""
    valid: int = 60
    """Utterances to validate on."""
    longest: float = 5.0
    """Maximum seconds of an utterance of the synthesised corpus."""
    width: int = 64
    """Width of the model trained from scratch."""
    layers: tuple[int, int] = (2, 1)
    """Encoder and decoder layers of the model trained from scratch."""
    seeds: int = 1
    threads: int = 1
    json: Path | None = None
    """File for the figures."""


def fine_tuned(options: Options, corpus: str) -> TrainConfig:
    """Return a run from the Whisper on clips of some speakers, validated on the others."""
    manifest = options.speech / corpus / "manifest.jsonl"
    folder = options.output / corpus
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["audio_filepath"] = str((manifest.parent / row["audio_filepath"]).resolve())
    speakers = sorted({str(row.get("speaker", n)) for n, row in enumerate(rows)})
    held_out = set(speakers[3::8])
    parts = {"train": [], "valid": []}
    for number, row in enumerate(rows):
        parts["valid" if str(row.get("speaker", number)) in held_out else "train"].append(row)
    for name, most in (("train", options.rows), ("valid", options.valid)):
        write_manifest(folder / f"{name}.jsonl", spread_over(parts[name], most))
    return TrainConfig(
        manifest=(folder / "train.jsonl",),
        valid=(folder / "valid.jsonl",),
        output=folder / "shared",
        init=options.whisper,
        pad_seconds=0.0,
    )


def from_scratch(options: Options) -> TrainConfig:
    """Return a run of a small model on the synthesised corpus."""
    corpus = synthesise(options.output / "corpus", utterances=options.utterances, test_utterances=2 * options.valid)
    return TrainConfig(
        manifest=(up_to(options.longest, corpus.train_manifest),),
        valid=(up_to(options.longest, corpus.test_manifest),),
        output=options.output / "demo" / "shared",
        vocab_size=600,
        model=ModelShape(width=options.width, encoder_layers=options.layers[0], decoder_layers=options.layers[1]),
    )


def base_of(options: Options, task: str) -> tuple[TrainConfig, PreparedRun]:
    """Return the task's configuration; its tokenizer and budget are made once."""
    config = (
        from_scratch(options) if task == "demo" else fine_tuned(options, {"librivox": "librivox_mini"}.get(task, task))
    )
    config = replace(
        config,
        epochs=options.epochs[("an4", "librivox", "demo").index(task)],
        batch_seconds=max(options.batch_seconds),
        threads=options.threads,
        precision="float32",
        workers=0,
        valid_every=1_000_000,
        valid_utterances=options.valid,
        track=(),
    )
    budget = options.output / f"{task}.json"
    seconds = max(options.batch_seconds)
    Budget.from_batch_seconds(seconds, frame_seconds=0.02 if config.init else 0.08).save(budget)
    prepared = prepare_training(replace(config, budget=budget), TerminalEvents())
    config = prepared.config
    return (config if config.init else replace(config, tokenizer=prepared.run.folder / "tokenizer")), prepared


@torch.inference_mode()
def valid_loss(prepared: PreparedRun, folder: Path, valid: Path) -> float:
    """Return the nats per text token of the held-out utterances, by the last checkpoint."""
    checkpoint = max((folder / "checkpoints").glob("step-*"))
    model = load_model(checkpoint)
    assert isinstance(model, SpeechModel)
    model.eval()
    total = count = 0.0
    rows = [row for row in read_manifest(valid) if isinstance(row, Utterance)]
    for start in range(0, len(rows), 8):
        examples = [prepared.data.micro_batches.example(row) for row in rows[start : start + 8]]
        loss = model.loss(collate(examples, prepared.data.tokenizer.pad), label_smoothing=0.0)
        total, count = total + float(loss.attention), count + float(loss.attention_count)
    return total / count


def results(options: Options) -> Iterator[dict[str, Any]]:
    for task in options.tasks:
        base, prepared = base_of(options, task)
        hours = float(prepared.data.index.seconds.sum()) / 3600
        for cap in options.batch_seconds:
            if cap > 1.5 * 3600 * hours:
                continue
            for seed in range(options.seeds):
                folder = options.output / task / f"{cap:g}-{seed}"
                config = replace(base, output=folder, batch_seconds=cap, seed=seed)
                made = prepare_training(config, TerminalEvents())
                updates = len(made.schedule.plan)
                kept = folder / "result.json"
                if not kept.exists():
                    figures = run(replace(config, steps=made.schedule.steps, allow_changes=True))
                    figures |= {"valid_loss": valid_loss(made, folder, config.valid[0])}
                    kept.write_text(json.dumps(figures), encoding="utf-8")
                figures = json.loads(kept.read_text(encoding="utf-8"))
                about = {"task": task, "hours": hours, "batch_seconds": cap, "seed": seed}
                row = about | {"updates_an_epoch": updates, "updates": made.schedule.steps} | figures
                result = f"WER {row['wer']:.1%}, loss {row['valid_loss']:.3f}"
                say(f"{task}: {cap:g} s, {updates} updates an epoch, {result}")
                yield row


def main(options: Options) -> None:
    rows: list[dict[str, Any]] = []
    for row in results(options):
        rows = sorted([*rows, row], key=lambda r: (r["task"], r["batch_seconds"], r["seed"]))
        if options.json:
            told = {k: v for k, v in vars(options).items() if not isinstance(v, Path | None)}
            figures = {"options": told, "machine": describe_machine(), "runs": rows}
            options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    table = Table("task", "batch, s", "updates an epoch", "updates", "audio, h", "WER", "validation loss")
    for (task, cap), group in groupby(rows, key=lambda r: (r["task"], r["batch_seconds"])):
        some = list(group)
        mean = {k: statistics.mean(row[k] for row in some) for k in ("audio_hours", "wer", "valid_loss")}
        table.add_row(
            task,
            f"{cap:g}",
            str(some[0]["updates_an_epoch"]),
            str(some[0]["updates"]),
            f"{mean['audio_hours']:.2f}",
            f"{mean['wer']:.1%}",
            f"{mean['valid_loss']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
