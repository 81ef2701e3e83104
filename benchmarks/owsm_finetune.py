"""A tiny OWSM trained on one corpus, then fine-tuned with and without padding to 30 s: WER after each validation.

    python benchmarks/owsm_finetune.py FOLDER --train MANIFEST -o OUTPUT [--json FILE]

FOLDER is any OWSM in ESPnet's layout, which gives tokenizer, statistics of the features and subsampling. A model of a
small shape with random weights is trained at the utterances' own lengths; from its best checkpoint, two runs continue
for the same number of updates, one of them padded to 30 s as OWSM was. The loss is ESPnet's:
language and task tokens count, CTC on the same tokens weighs 0.3. Runs that exist in OUTPUT are continued or reused.
"""

import json
import platform
import random
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
import tyro

from canter import TrainConfig, train
from canter.loading import load_model, save_module
from canter.models.formats.espnet import read_espnet
from canter.models.model import SpeechModel
from canter.training.config import LossConfig, OptimizerConfig


@dataclass(frozen=True)
class Options:
    folder: tyro.conf.Positional[Path]
    """OWSM in ESPnet's layout."""
    train: Path
    """Manifest; every 8th row is held out."""
    output: Path
    """Folder for the runs."""
    width: int = 96
    layers: tuple[int, int] = (3, 2)
    """Encoder and decoder layers."""
    steps: int = 800
    """Updates of the model from random weights."""
    more: int = 60
    """Updates of each run that continues."""
    batch_seconds: float = 60.0
    """Maximum seconds of speech in an update, padding left aside."""
    seed: int = 0
    json: Path | None = None
    """Where to write the figures."""


def tiny(options: Options) -> SpeechModel:
    """Return a small OWSM with random weights and the tokenizer of the one in the folder."""
    given = read_espnet(options.folder)
    wide, heads = {"width": options.width, "feedforward": 4 * options.width}, options.width // 24
    encoder = replace(given.config.encoder, layers=options.layers[0], heads=heads, **wide)
    encoder = replace(encoder, cgmlp_units=4 * options.width)
    decoder = replace(given.config.decoder, layers=options.layers[1], heads=heads, **wide)
    torch.manual_seed(options.seed)
    model = SpeechModel(replace(given.config, encoder=encoder, decoder=decoder))
    model.features.load_state_dict(given.features.state_dict())
    model.tokenizer, model.generation = given.tokenizer, given.generation
    return model


def split(options: Options) -> tuple[Path, Path]:
    """Write the rows to train on and those held out."""
    rows = [json.loads(line) for line in options.train.read_text(encoding="utf-8").splitlines()]
    random.Random(options.seed).shuffle(rows)
    for row in rows:
        row["audio_filepath"] = str((options.train.parent / row["audio_filepath"]).resolve())
    files = options.output / "train.jsonl", options.output / "valid.jsonl"
    for file, part in zip(files, ([r for n, r in enumerate(rows) if n % 8], rows[::8]), strict=True):
        file.write_text("".join(json.dumps({"lang": "en", **row}) + "\n" for row in part), encoding="utf-8")
    return files


def curve(run: Path) -> list[dict[str, float]]:
    """Return step and WER of each validation of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{"step": row["step"], "wer": row["wer"]} for row in rows if row["kind"] == "valid"]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    options.output.mkdir(parents=True, exist_ok=True)
    train_file, valid_file = split(options)
    start = options.output / "random"
    if not start.exists():
        save_module(tiny(options), start, form="espnet")
    common = TrainConfig(
        manifest=(train_file,),
        valid=(valid_file,),
        output=options.output / "first",
        init=start,
        steps=options.steps,
        valid_every=100,
        pad_seconds=0.0,
        batch_seconds=options.batch_seconds,
        loss=LossConfig(ctc_weight=0.3, ctc_warmup=0.15),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        device="cpu",
        seed=options.seed,
    )
    train(common)
    result = {
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "parameters": sum(load_model(start).parts().values()),
        "first": curve(common.output),
    }
    for name, seconds in (("own lengths", 0.0), ("padded to 30 s", 30.0)):
        config = replace(
            common,
            output=options.output / name.replace(" ", "-"),
            init=common.output,
            steps=options.more,
            valid_every=20,
            pad_seconds=seconds,
            batch_seconds=30.0 * 12 if seconds else options.batch_seconds,
            loss=LossConfig(ctc_weight=0.3),
            optimizer=OptimizerConfig(learning_rate=5e-4),
        )
        train(config)
        result[name] = curve(config.output)
    for name in ("first", "own lengths", "padded to 30 s"):
        print(name, *(f"{one['step']}: {100 * one['wer']:.1f} %" for one in result[name]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
