"""Train deep and shallow decoders of equal parameters from scratch, and compare their accuracy and decoding speed.

    python benchmarks/decoder_depth.py -o FOLDER [--shapes 6/5 8/2 9/1] [--steps 1200 2400] [--seeds 3] [--json FILE]

Every run is a `canter train` on the demo's corpus with the `balanced` strategy; runs of one seed differ in the layers
of encoder and decoder only, and see the same batches. WER is of test sentences, decoded greedily by attention only, and
jointly with the CTC head, which does not let the decoder skip or repeat words; their cross-entropy with teacher forcing
is another measure of the decoder. The difference of a shape from the first has a 95 % interval by paired bootstrap over
utterances, each with the errors of all seeds. Decoding is then timed on the trained models of the first seed, shapes
and ways in turns, with each sentence stopped at its reference's number of tokens: our engine, and the released
toolkit's way (hidden states cached, keys and values projected again at each step). The same command continues where it
stopped.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from convergence import Setting, decoded_jointly, keep, shared, train_rows
from convergence import run as trained
from decoder_shift import measure_ways
from rich.console import Console
from rich.table import Table

from canter.cli.progress import say
from canter.corpus.audio import load_utterance
from canter.corpus.manifest import Utterance
from canter.corpus.sources import open_source
from canter.evaluation.wer import ErrorCounts, Score, paired_difference, score_texts
from canter.loading import load_model
from canter.models.hub import checkpoint_of
from canter.models.model import SpeechModel
from canter.planning.budget import Budget
from canter.training.config import ModelShape, TrainConfig


@dataclass(frozen=True)
class Options(Setting):
    shapes: tuple[str, ...] = ("6/5", "8/2", "9/1")
    """Encoder/decoder layers, with the decoder's width after an x where it is another one, as in 8/1x144; the first is
    the baseline. These have 2.2 million parameters at width 96, within 4 %."""
    steps: tuple[int, ...] = (1200, 2400)
    """Numbers of updates; each is a run of its own with its own learning-rate schedule."""
    first_seed: int = 0
    """First of the seeds, to share them out to several processes, each with a --json of its own."""
    ctc_weight: float = 0.3
    """Weight of CTC in joint decoding."""
    ctc_warmup: float | None = None
    """CTC-only warm-up as a fraction of the steps (default: that of `canter train`)."""
    repeats: int = 3
    """Timed decodings of the test set."""


def layers_of(shape: str) -> tuple[int, int]:
    encoder, decoder = shape.split("x")[0].split("/")
    return int(encoder), int(decoder)


def config_of(base: TrainConfig, options: Options, shape: str, steps: int, seed: int) -> TrainConfig:
    """Return the configuration of a run."""
    encoder, decoder = layers_of(shape)
    wide = int(shape.split("x")[1]) if "x" in shape else None
    folder = options.output / f"{shape.replace('/', '-')}-{steps}-{seed}"
    model = ModelShape(width=options.width, encoder_layers=encoder, decoder_layers=decoder, decoder_width=wide)
    loss = replace(base.loss, ctc_warmup=options.ctc_warmup)
    return replace(base, output=folder, seed=seed, steps=steps, model=model, loss=loss)


def transcripts(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Return the manifest rows of a run's last validation, with `pred_text`."""
    path = folder / "validation" / f"step-{steps:06}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(manifest: Path) -> list[Utterance]:
    return [row for row in open_source(manifest) if isinstance(row, Utterance)]


def pooled(scores: Sequence[Score]) -> Score:
    """Return one score of several results on the same references: each utterance has the errors of all of them."""
    together = zip(*(score.utterances for score in scores), strict=True)
    utterances = [replace(some[0], counts=sum((one.counts for one in some), ErrorCounts())) for some in together]
    return replace(scores[0], utterances=utterances, total=sum((score.total for score in scores), ErrorCounts()))


def accuracy(rows: Sequence[dict[str, Any]], test: Path, options: Options) -> list[dict[str, Any]]:
    """Return WER and step time of each shape and number of updates, over all seeds that every shape has.

    From the second shape on, also the difference of its WER from the first shape's. `joint` has the same of joint
    decoding.
    """
    found = []
    for steps in options.steps:
        done = {shape: [r for r in rows if (r["shape"], r["steps"]) == (shape, steps)] for shape in options.shapes}
        seeds = min(len(some) for some in done.values())
        attention: dict[str, list[Score]] = {}
        joint: dict[str, list[Score]] = {}
        for shape, some in done.items() if seeds else ():
            folders = [options.output / row["folder"] for row in some[:seeds]]
            attention[shape] = [score_rows(transcripts(folder, steps)) for folder in folders]
            both = [decoded_jointly(folder, rows_of(test), options.ctc_weight) for folder in folders]
            joint[shape] = [score_texts(one["text"], one["pred_text"]) for one in both]
            found.append(
                {"shape": shape, "steps": steps, "seeds": seeds}
                | compared(attention, shape)
                | {
                    "joint": compared(joint, shape),
                    "token_loss": [one["token_loss"] for one in both],
                    "seconds_a_step": statistics.median(row["seconds_a_step"] for row in some[:seeds]),
                }
            )
    return found


def score_rows(rows: Sequence[dict[str, Any]]) -> Score:
    return score_texts([row["text"] for row in rows], [row["pred_text"] for row in rows])


def compared(scores: dict[str, list[Score]], shape: str) -> dict[str, Any]:
    """Return the WER of a shape over all seeds and of each, and its difference from the first shape."""
    first = next(iter(scores))
    total = pooled(scores[shape])
    found: dict[str, Any] = {"wer": total.wer, "wer_of_seeds": [one.wer for one in scores[shape]]}
    if shape != first:
        found["difference"] = asdict(paired_difference(total, pooled(scores[first])))
    return found


def decoding(models: dict[str, SpeechModel], manifest: Path, options: Options) -> list[dict[str, Any]]:
    """Return times of decoding the test set both ways, each sentence up to its reference's number of tokens."""
    model = next(iter(models.values()))
    rows = rows_of(manifest)
    clips = [load_utterance(row, model.sample_rate) for row in rows]
    tokens = [len(model.tokenizer.encode(row.text)) + 1 for row in rows]
    prompt = model.tokenizer.prompt(rows[0])
    found = measure_ways(models, clips, tokens, repeats=options.repeats, rows=16, batch=16, prompt=prompt)
    return [asdict(row) for row in found]


def show(result: dict[str, Any]) -> None:
    """Print the tables of accuracy and decoding."""
    table = Table("layers", "updates", "decoding", "WER", "of each seed", "difference (95 %)", "loss", "seconds a step")
    for row in result["accuracy"]:
        for way, one in (("attention", row), ("joint", row["joint"])):
            gap = one.get("difference")
            cells = f"{gap['wer']:+.2%} ({gap['low']:+.2%} to {gap['high']:+.2%})" if gap else "-"
            each = ", ".join(f"{wer:.1%}" for wer in one["wer_of_seeds"])
            loss, time = f"{statistics.mean(row['token_loss']):.3f}", f"{row['seconds_a_step']:.3f}"
            table.add_row(row["shape"], f"{row['steps']:,}", way, f"{one['wer']:.2%}", each, cells, loss, time)
    Console().print(table)
    table = Table("layers", "way", "parameters", "encoder, s", "decoder, s", "RTFx", "speed")
    for row in result["decoding"]:
        numbers = [f"{row[name]:.2f}" for name in ("encoder_seconds", "decoder_seconds")]
        table.add_row(row["shape"], row["way"], f"{row['parameters']:,}", *numbers, f"{row['rtfx']:.0f}",
                      f"{row['speedup']:.2f}x")  # fmt: skip
    Console().print(table)


def main(options: Options) -> None:
    base = shared(options, layers_of(options.shapes[0]))
    frame_seconds = Budget.load(base.budget or Path()).frame_seconds
    same_batches = options.output / "budget.json"  # a measured budget would hold for one of the shapes only
    Budget.from_batch_seconds(options.batch_seconds, frame_seconds=frame_seconds).save(same_batches)
    base = replace(base, budget=same_batches)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"runs": rows, "accuracy": [], "decoding": []}
    models: dict[str, SpeechModel] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for steps in sorted(options.steps):
            for shape in options.shapes:
                config = config_of(base, options, shape, steps, seed)
                say(f"{shape} layers, {steps} updates, seed {seed}")
                figures = trained(config)
                seconds = statistics.median(row["seconds"] for row in train_rows(config.output))
                rows.append({"shape": shape, "seed": seed, "folder": config.output.name, "seconds_a_step": seconds}
                            | figures)  # fmt: skip
                models.setdefault(shape, load_model(checkpoint_of(config.output)))
                result["accuracy"] = accuracy(rows, base.valid[0], options)
                keep(options, **result)  # after every run, so that a stop loses nothing
    result["decoding"] = decoding(models, base.valid[0], options)
    show(result)
    keep(options, **result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
