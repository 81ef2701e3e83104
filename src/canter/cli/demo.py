"""The whole way on a synthesised corpus: speech -> index -> budget -> plan -> training -> transcripts -> report.

It takes at most ten minutes on two cores. Everything is written to one folder; `report.html` there is the page to look
at and `summary.json` has the figures. An interrupted demo resumes where it was.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from canter.files import write_text


@dataclass(frozen=True)
class Options:
    output: Path = Path("demo")
    """Folder for corpus, run, transcripts and report."""
    quick: bool = False
    """The same way in about a minute: a small corpus, a few steps, no useful WER."""
    utterances: int | None = None
    """Training utterances to synthesise (default: 6000; quick: 300)."""
    minutes: float | None = None
    """Minutes of training (default: what the rest leaves of ten, 3 to 6.5; quick: 0.3). The number of steps follows
    from the measured step time."""
    seed: int = 0
    """Seed of corpus, weights and order."""


TEST_UTTERANCES = 200
# Minutes that the demo may take, those of them that follow training, and the least and the most of training.
TOTAL_MINUTES, AFTER_TRAINING, TRAINING_MINUTES = 9.75, 1.5, (3.0, 6.5)
# A micro-batch of 24 s of audio suits so small a model on a CPU: larger ones cost updates, smaller ones speed.
BATCH_SECONDS = 24.0
# Weight of CTC in decoding; 0.1 to 0.5 are compared in docs/inference.md.
CTC_WEIGHT = 0.3
# Strategies train in turns for so many seconds, to compare their speed; a batch may hold so many of the longest
# utterances.
SPEED, SPEED_QUICK = (20.0, 4), (2.0, 2)
# The ladder is computed for a memory that holds so many of the longest utterances.
LONGEST_IN_MEMORY, LONGEST_QUICK = 20, 2
# Most words are one token: the decoder learns to follow the audio in fewer steps than with 256.
VOCABULARY = 600
# Encoder and decoder layers of two models of equal size: 6 decoder layers weigh as much as 4 of the encoder.
DEEP, SHALLOW = (6, 8), (10, 2)
SHIFT_WIDTH = 256


def run(options: Options) -> None:
    from canter.cli.progress import console, say
    from canter.demo.report import demo_report
    from canter.reporting import html

    began = time.perf_counter()
    stages = Stages(say)
    summary: dict[str, Any] = {"quick": options.quick}
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    with stages("synthesise"):
        corpus = synthesise_corpus(options, summary)
    with stages("index, budget"):
        prepared = prepare_run(options, corpus, (time.perf_counter() - began) / 60)
    with stages("ladder"):
        climb_ladder(prepared, LONGEST_QUICK if options.quick else LONGEST_IN_MEMORY, summary)
    with stages("train"):
        train_model(prepared.config, summary)
    with stages("transcribe, score"):
        transcribe_test(output, prepared, corpus, summary)
    with stages("speed of strategies"):
        compare_speed(prepared, *(SPEED_QUICK if options.quick else SPEED), summary)
    with stages("decoder shift"):
        shift_decoder(options, prepared, summary)
    summary["times"] = stages.seconds | {"total": time.perf_counter() - began}
    summary["machine"] = machine()
    write_text(output / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    html.write(demo_report(summary), output / "report.html")
    minutes = summary["times"]["total"] / 60
    console.rule()
    say(
        f"WER {summary['wer']:.1%} on {TEST_UTTERANCES if not options.quick else 'a few'} unseen sentences, "
        f"{minutes:.1f} minutes in all. Look at {output / 'report.html'}"
    )


class Stages:
    """Names the stages and measures them."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.seconds = say, {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.say(f"[bold]{name}[/bold]")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def synthesise_corpus(options: Options, summary: dict[str, Any]):
    """Speaks the corpus, or finds it there."""
    from canter.cli.progress import counting
    from canter.corpus.manifest import Utterance, read_manifest
    from canter.demo.synthesis import synthesise

    count = options.utterances or (300 if options.quick else 6000)
    tests = 24 if options.quick else TEST_UTTERANCES
    with counting("speaking", count + tests) as progress:
        corpus = synthesise(
            options.output / "corpus",
            utterances=count,
            test_utterances=tests,
            seed=options.seed,
            progress=progress,
        )
    rows = [row for row in read_manifest(corpus.train_manifest) if isinstance(row, Utterance)]
    summary |= {
        "utterances": corpus.utterances,
        "audio_hours": sum(row.duration for row in rows) / 3600,
        "corpus": {
            "utterances": corpus.utterances,
            "test_utterances": corpus.test_utterances,
            "audio_hours": sum(row.duration for row in rows) / 3600,
            "voices": corpus.voices,
            "unseen_voices": corpus.unseen_voices,
            "words": len({word for row in rows for word in row.text.split()}),
            "languages": sorted({row.lang for row in rows if row.lang}),
        },
    }
    return corpus


def prepare_run(options: Options, corpus, spent: float):
    """Make tokenizer, index, budget and plan of the demo's run, ``spent`` minutes after the demo began."""
    from canter.cli.progress import TerminalEvents
    from canter.training.recipe import prepare_run

    output = options.output / ("run-quick" if options.quick else "run")
    minutes = options.minutes or (0.3 if options.quick else training_minutes(output, spent))
    return prepare_run(recipe(corpus.train_manifest, output, minutes=minutes, seed=options.seed), TerminalEvents())


def recipe(manifest: Path, output: Path, **settings: Any):
    """Return the configuration of the demo's run; ``settings`` say how long it is, and of which seed."""
    from canter.training.config import TrainConfig

    return TrainConfig(
        manifest=(manifest,),
        output=output,
        vocab_size=VOCABULARY,
        batch_seconds=BATCH_SECONDS,
        valid_every=100_000,
        **settings,
    )


def training_minutes(run: Path, spent: float) -> float:
    """Return the minutes of training: what is left of the demo's, or those of a run that is resumed."""
    from canter.training.config import load_run_config

    if (run / "config.yaml").exists():
        return load_run_config(run / "config.yaml").minutes or TRAINING_MINUTES[1]
    least, most = TRAINING_MINUTES
    return round(min(max(TOTAL_MINUTES - AFTER_TRAINING - spent, least), most), 2)


def with_room_for(longest: int, prepared):
    """Return the run's budget, limited to a micro-batch of so many of the longest utterances."""
    import numpy as np

    index, budget = prepared.data.index, prepared.schedule.budget
    frames = budget.frames(np.asarray(index.seconds))
    limit = np.max(budget.bytes(longest, frames, np.asarray(index.tokens, np.int64)))
    return replace(budget, limit_bytes=float(limit))


def climb_ladder(prepared, longest: int, summary: dict[str, Any]) -> None:
    """Print the ladder of strategies on the corpus as the budget predicts it, with room for so many of the longest
    utterances."""
    import numpy as np

    from canter.cli import compare as command
    from canter.cli.lengths import plain
    from canter.planning.compare import compare
    from canter.planning.strategies import Balanced, Bucket1D, Bucket2D, Duration, Random

    index = prepared.data.index
    strategies = [("random", Random(), None), ("duration", Duration(), None), ("bucket_1d", Bucket1D(), None)]
    strategies += [("bucket_2d", Bucket2D(), None), ("balanced", Balanced(), None)]
    rungs = list(compare(index, with_room_for(longest, prepared), strategies, ranks=1))
    command.print_comparison(
        rungs, f"{len(index):,} utterances of the demo, room for {longest} of the longest, as predicted"
    )
    summary["room_for_longest"] = longest
    summary["strategies"] = {
        rung.name: plain(rung.as_json())
        | {"padding": rung.figures.padded_audio, "epoch_hours": rung.figures.hours, "speedup": rung.speed}
        for rung in rungs
    }
    sample = np.linspace(0, len(index) - 1, min(len(index), 2000)).astype(int)
    lengths = np.stack([index.seconds[sample], index.tokens[sample]], axis=1)
    summary["corpus"]["lengths"] = lengths.astype(float).round(2).tolist()


def train_model(config, summary: dict[str, Any]) -> None:
    """Train to the last step."""
    from canter.cli.progress import TerminalEvents
    from canter.training.recipe import run_training

    finished = run_training(config, TerminalEvents())
    metrics = finished.prepared.run.log.metrics.read_text(encoding="utf-8").splitlines()
    progress = finished.progress
    rows = [json.loads(line) for line in metrics]
    steps = [row for row in rows if row["kind"] == "train"]
    computed = sum(row["audio_seconds"] / (1 - row["padding"]) for row in steps)
    summary |= {
        "train_seconds": progress.seconds,
        "steps": progress.step,
        "precision": finished.prepared.subject.precision,
        "trained_audio_hours": progress.audio_seconds / 3600,
        "parameters": sum(p.numel() for p in finished.prepared.subject.model.parameters()),
        "trained_padding": 1 - sum(row["audio_seconds"] for row in steps) / computed,
        "training": rows,
    }


def compare_speed(prepared, seconds: float, longest: int, summary: dict[str, Any]) -> None:
    """Train on batches of `random` and of `balanced` in turns, and compare how much audio they get through."""
    from canter.cli.progress import say
    from canter.planning.compare import compare
    from canter.planning.plan import Plan
    from canter.planning.strategies import Balanced, Random
    from canter.training.feed.steps import Steps
    from canter.training.step.gradient import Gradient, TargetCounts

    budget, strategies = with_room_for(longest, prepared), {"random": Random(), "balanced": Balanced()}
    gradient = Gradient(prepared.config, prepared.subject.model.train(), prepared.subject.precision)
    plans = {name: Plan(prepared.data.index, budget, strategy) for name, strategy in strategies.items()}
    addresses = {name: Steps(plan).addresses(None, 0, 0) for name, plan in plans.items()}
    audio, taken = dict.fromkeys(plans, 0.0), dict.fromkeys(plans, 0.0)
    until = time.perf_counter() + seconds
    turn = 0
    while turn < 2 or time.perf_counter() < until:
        for name in plans:
            loaded = prepared.data.micro_batches[next(addresses[name])]
            if loaded.batch is None:
                continue
            began = time.perf_counter()
            gradient.compute([loaded], TargetCounts.of([loaded.batch]), turn, ctc_only=False)
            if turn:  # the first waits for memory
                taken[name] += time.perf_counter() - began
                audio[name] += float(loaded.batch.audio_lengths.sum()) / prepared.data.micro_batches.sample_rate
            gradient.discard()
        turn += 1
    ladder = list(compare(prepared.data.index, budget, [(name, s, None) for name, s in strategies.items()], ranks=1))
    measured = {name: audio[name] / max(taken[name], 1e-9) for name in plans}
    summary["measured_speed"] = {
        "audio_seconds_a_second": measured,
        "speedup": measured["balanced"] / max(measured["random"], 1e-9),
        "predicted": ladder[1].speed,
        "steps": turn - 1,
        "room_for_longest": longest,
    }
    say(
        f"forward and backward passes: random {measured['random']:.0f}, balanced {measured['balanced']:.0f} s of audio "
        f"a second, {summary['measured_speed']['speedup']:.1f}x (predicted {ladder[1].speed:.1f}x)"
    )


def transcribe_test(output: Path, prepared, corpus, summary: dict[str, Any]) -> None:
    """Transcribe the test part by joint decoding, by attention only and by CTC only, and score all three."""
    from canter.cli.progress import say
    from canter.corpus.manifest import Utterance, read_manifest, write_manifest
    from canter.evaluation.wer import score
    from canter.inference.engine.engine import Engine
    from canter.inference.engine.requests import EngineConfig
    from canter.inference.transcribe import checkpoint_of, transcribe
    from canter.models.formats.checkpoint import load_model

    model = load_model(checkpoint_of(prepared.run.folder))
    tokenizer = prepared.data.tokenizer
    utterances = [row for row in read_manifest(corpus.test_manifest) if isinstance(row, Utterance)]
    rows = [json.loads(line) for line in corpus.test_manifest.read_text(encoding="utf-8").splitlines()]
    engine = Engine(model, tokenizer.end, EngineConfig(ctc_weight=CTC_WEIGHT))
    texts = [result.text for result in transcribe(engine, tokenizer, utterances)]
    alone = transcribe(Engine(model, tokenizer.end, ctc=True), tokenizer, utterances)
    attention = [result.text for result in alone]
    ctc = [prepared.data.characters.decode(result.ctc or ()) for result in alone]
    for row, text, one, other in zip(rows, texts, attention, ctc, strict=True):
        row |= {"pred_text": text, "pred_text_attention": one, "pred_text_ctc": other}
    write_manifest(output / "test.transcribed.jsonl", rows)

    def scored(hypotheses: Sequence[str], kept: Callable[[dict], bool] = lambda _: True):
        chosen = [i for i, row in enumerate(rows) if kept(row)]
        return score([rows[i]["text"] for i in chosen], [hypotheses[i] for i in chosen], normalize="none").total

    joint = scored(texts)
    languages = sorted({row["lang"] for row in rows})
    summary |= {
        "wer": joint.wer,
        "cer": joint.cer,
        "ctc_weight": CTC_WEIGHT,
        "wer_seen": scored(texts, lambda row: row["speaker_seen"]).wer,
        "wer_unseen": scored(texts, lambda row: not row["speaker_seen"]).wer,
        "wer_by_language": {lang: scored(texts, lambda row, lang=lang: row["lang"] == lang).wer for lang in languages},
        "attention_wer": scored(attention).wer,
        "ctc_wer": scored(ctc).wer,
        "rtfx": engine.counters.rtfx,
        "useful_rows": engine.counters.useful_rows,
        "examples": [
            {"voice": r["speaker"], "lang": r["lang"], "text": r["text"], "pred_text": r["pred_text"]}
            for r in rows[:: max(1, len(rows) // 8)][:8]
        ],
    }
    say(
        f"WER {summary['wer']:.1%} (voices heard in training {summary['wer_seen']:.1%}, unheard "
        f"{summary['wer_unseen']:.1%}; attention only {summary['attention_wer']:.1%}, CTC only "
        f"{summary['ctc_wer']:.1%}), RTFx {summary['rtfx']:.0f}"
    )


def shift_decoder(options: Options, prepared, summary: dict[str, Any]) -> None:
    """Two models of equal size, one with a deep decoder and one with a shallow one, under every cache."""
    import torch

    from canter.bench.shift import measure_shift
    from canter.cli.progress import say
    from canter.models.model import SpeechModel
    from canter.training.subject import model_config

    models = {}
    for encoder_layers, decoder_layers in (DEEP, SHALLOW):
        shape = replace(
            prepared.config.model,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            width=SHIFT_WIDTH,
        )
        config = replace(prepared.config, model=shape)
        torch.manual_seed(options.seed)
        models[f"{encoder_layers}/{decoder_layers}"] = SpeechModel(
            model_config(config, prepared.data.tokenizer, prepared.data.characters)
        )
    rate = prepared.data.micro_batches.sample_rate
    batch, seconds, tokens = (4, 4, 12) if options.quick else (16, 8, 28)
    audio = torch.randn(batch, seconds * rate, generator=torch.Generator().manual_seed(options.seed)) * 0.1
    lengths = torch.full((batch,), seconds * rate)
    rows = measure_shift(models, audio, lengths, tokens, repeats=1 if options.quick else 2)
    summary["decoder_shift"] = {
        f"{row.shape} {row.cache}": asdict(row) | {"seconds": row.encoder_seconds + row.decoder_seconds} for row in rows
    }
    for row in rows:
        say(
            f"{row.shape:>5} layers, cache {row.cache:<6}  encoder {row.encoder_seconds:.2f} s  "
            f"decoder {row.decoder_seconds:.2f} s  RTFx {row.rtfx:.0f}  {row.speedup:.1f}x"
        )


def machine() -> dict[str, Any]:
    import torch

    from canter import __version__

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "canter": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
