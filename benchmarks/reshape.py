"""What a trained run becomes with a smaller decoder and a larger encoder: WER after the same further training of both
shapes, of the new one with and without distillation from the run's model, and decoding times, predicted from the
trained shape and measured on the new one.

    python benchmarks/reshape.py RUN -o FOLDER [--decoder-layers 1] [--steps 500] [--json FILE]

All arms take the same steps on the same batches (the run's seconds of audio, precision and seed), at a fraction of its
learning rates. FOLDER keeps the reshaped model and the runs; started again, it resumes them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from convergence import decoded_jointly, token_loss

from canter.cli.progress import TerminalEvents
from canter.corpus.index import LengthIndex
from canter.corpus.manifest import Utterance
from canter.corpus.sources import open_source
from canter.errors import ConfigError
from canter.evaluation.wer import score_texts
from canter.loading import load_model
from canter.models.formats.checkpoint import save_model
from canter.models.hub import checkpoint_of
from canter.models.model import SpeechModel
from canter.models.reshape import Growth, Kept, encoder_layers_that_keep, measure_times, reshape
from canter.planning.budget import Budget
from canter.reporting.machine import describe_machine
from canter.text import Characters
from canter.training.config import LossConfig, ModelShape, TrainConfig, load_run_config
from canter.training.defaults import TEACHER_WEIGHT, decided
from canter.training.feed.data import MicroBatches
from canter.training.recipe import run_training
from canter.training.validation import Validator, spread_over

CTC_WEIGHT = 0.3  # of joint decoding


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """A finished run's folder."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the reshaped model and the further runs."""
    arms: tuple[str, ...] = ("trained", "reshaped", "distilled")
    """Arms to train further: the run's shape, the new shape, the new shape with the run's model as its teacher."""
    teacher_weight: float | None = None
    """Weight of the teacher (default: that of 'canter train')."""
    temperature: float = LossConfig.teacher_temperature
    """Temperature of the teacher."""
    decoder_layers: int = 1
    """Layers that the decoder keeps; the encoder grows to keep the number of parameters."""
    growth: Growth = "identity"
    """How new encoder layers start."""
    kept: Kept = "even"
    """Which decoder layers stay."""
    steps: int = 500
    """Further steps of each arm."""
    rate: float = 0.3
    """Share of the run's learning rates."""
    valid: tuple[Path, ...] = ()
    """Manifests to measure WER on, in place of the run's validation manifests."""
    utterances: int = 200
    """Transcribed for WER, evenly spread over the manifests."""
    seconds: float = 5.0
    """Of an utterance whose decoding is timed."""
    tokens: int = 30
    """Of the same."""
    batch: int = 8
    """Utterances decoded together, for the times."""
    cuts: bool = False
    """Train nothing: tell the loss right after the cut, for every choice of --decoder-layers layers."""
    json: Path | None = None
    """File for the figures."""


def onwards(options: Options, config: TrainConfig, init: Path, name: str, teacher: Path | None = None) -> TrainConfig:
    """The further run of one arm."""
    rates = config.optimizer
    settled = json.loads((options.run / "run.json").read_text(encoding="utf-8"))
    return replace(
        config,
        init=init,
        teacher=teacher,
        valid=options.valid or config.valid,
        tokenizer=None,
        model=ModelShape(),
        output=options.output / name,
        steps=options.steps,
        minutes=None,
        budget=options.output / "budget.json",
        precision=settled["precision"],
        threads=settled["threads"],
        valid_every=options.steps,
        valid_utterances=options.utterances,
        optimizer=replace(
            rates,
            learning_rate=options.rate * (rates.learning_rate or 0.0),
            matrix_learning_rate=options.rate * rates.matrix_learning_rate,
        ),
        loss=replace(
            config.loss,
            ctc_warmup=0.0,
            teacher_weight=options.teacher_weight if teacher else None,
            teacher_temperature=options.temperature if teacher else LossConfig.teacher_temperature,
        ),
    )


def figures(model: SpeechModel, before: float, config: TrainConfig, rows: Sequence[Utterance]) -> dict[str, Any]:
    """Shape and WER of one shape, whose further training starts here; with a CTC head also that of joint decoding."""
    finished = run_training(config, TerminalEvents())
    metrics = finished.prepared.run.log.metrics.read_text(encoding="utf-8")
    logged = [json.loads(line) for line in metrics.splitlines()]
    valid = [line for line in logged if line["kind"] == "valid"][-1]
    joint = {}
    if model.ctc is not None:
        found = decoded_jointly(config.output, rows, CTC_WEIGHT)
        score = score_texts(found["text"], found["pred_text"], normalize="none")
        joint = {"joint_wer": score.total.wer, "token_loss": found["token_loss"]}
    return {
        "encoder_layers": model.config.encoder.layers,
        "decoder_layers": model.config.decoder.layers,
        "parameters": sum(model.parts().values()),
        "wer_before": before,
        "wer_after": valid["wer"],
        "cer_after": valid["cer"],
        "rtfx": valid["rtfx"],
        **joint,
        "training_seconds": sum(line["seconds"] for line in logged if line["kind"] == "train"),
    }


def cut_losses(model: SpeechModel, rows: list[Utterance], layers: int) -> dict[str, float]:
    """Return the cross-entropy of a token with all layers of the decoder, and with every ``layers`` of them."""
    losses = {"all": token_loss(model, rows)}
    for kept in combinations(range(model.config.decoder.layers), layers):
        cut = reshape(model, decoder_layers=layers)
        for place, source in enumerate(kept):
            cut.decoder.layers[place].load_state_dict(model.decoder.layers[source].state_dict())
        losses[", ".join(map(str, kept))] = token_loss(cut, rows)
        print(f"layers {', '.join(map(str, kept))}: {losses[', '.join(map(str, kept))]:.3f}")
    return losses


def run(options: Options) -> dict[str, Any]:
    config = decided(load_run_config(options.run / "config.yaml"))
    manifests = options.valid or config.valid
    if not manifests:
        raise ConfigError(f"{options.run} has no validation manifest to measure WER on; name one with --valid")
    source = checkpoint_of(options.run)
    model = load_model(source)
    rows = [row for path in manifests for row in open_source(path) if isinstance(row, Utterance)]
    rows = spread_over(rows, options.utterances)
    if options.cuts:
        losses = cut_losses(model, rows, options.decoder_layers)
        return {"torch": torch.__version__, "utterances": len(rows), "loss_a_token": losses}
    layers = encoder_layers_that_keep(
        "parameters", model.config, options.decoder_layers, options.seconds, options.tokens
    )
    reshaped = reshape(
        model, encoder_layers=layers, decoder_layers=options.decoder_layers, growth=options.growth, kept=options.kept
    )
    start = save_model(reshaped, options.output / "start")
    if model.ctc is not None:
        Characters.load(source).save(start)

    lengths = LengthIndex(np.array([row.duration for row in rows], np.float32), np.ones(len(rows), np.int64))
    validate = Validator(rows, MicroBatches(lengths, model.tokenizer, None, model.sample_rate), "float32")
    seconds = 2 * (
        config.batch_seconds if isinstance(config.batch_seconds, float) else 24.0
    )  # the run's own setting is what bounds the batches of both shapes
    Budget.from_batch_seconds(seconds, frame_seconds=model.frame_seconds).save(options.output / "budget.json")
    shapes = {}
    for name in options.arms:
        one, init = (model, source) if name == "trained" else (reshaped, start)
        with torch.inference_mode():
            before = validate(one.eval()).metrics["wer"]
        teacher = source if name == "distilled" else None
        shapes[name] = figures(one, before, onwards(options, config, init, name, teacher), rows)

    size = (options.seconds, options.tokens, options.batch)
    old, new = measure_times(model, *size), measure_times(reshaped, *size)
    times = {
        part: {
            "trained": getattr(old, part).of(getattr(model.config, part).layers),
            "reshaped_predicted": getattr(old, part).of(getattr(reshaped.config, part).layers),
            "reshaped_measured": getattr(new, part).of(getattr(reshaped.config, part).layers),
        }
        for part in ("encoder", "decoder")
    }
    return {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "growth": options.growth,
        "kept": options.kept,
        "teacher_weight": TEACHER_WEIGHT if options.teacher_weight is None else options.teacher_weight,
        "temperature": options.temperature,
        "seconds": options.seconds,
        "tokens": options.tokens,
        "batch": options.batch,
        "shapes": shapes,
        "decoding_seconds": times,
    }


def show(result: dict[str, Any]) -> None:
    for name, row in result["shapes"].items():
        print(
            f"{name:9} {row['encoder_layers']}/{row['decoder_layers']}  {row['parameters'] / 1e6:.2f} M  "
            f"WER {row['wer_before']:.1%} -> {row['wer_after']:.1%} after {result['steps']} steps "
            f"({row['training_seconds']:.0f} s)  RTFx {row['rtfx']:.0f}"
            + (f"  decoded jointly {row['joint_wer']:.1%}, loss {row['token_loss']:.3f}" if "joint_wer" in row else "")
        )
    for part, row in result["decoding_seconds"].items():
        told = ", ".join(f"{name.replace('_', ' ')} {1000 * value:.1f} ms" for name, value in row.items())
        print(f"{part}: {told}")


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    result = run(options)
    if not options.cuts:
        show(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
