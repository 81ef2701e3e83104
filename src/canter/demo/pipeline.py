"""Run the demo on a synthesised corpus: speech -> index -> budget -> plan -> training -> transcripts -> report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from canter.corpus.index import LengthIndex
from canter.corpus.manifest import Utterance, read_manifest, write_manifest
from canter.demo.config import (
    AFTER_TRAINING,
    BATCH_SECONDS,
    CTC_WEIGHT,
    DEEP,
    FULL,
    QUICK,
    SHALLOW,
    SHIFT_WIDTH,
    TOTAL_MINUTES,
    TRAINING_MINUTES,
    VOCAB_SIZE,
    DemoConfig,
    Scale,
)
from canter.demo.report import CorpusFigures, DemoSummary, MeasuredSpeed, ShiftFigures, StrategyFigures, demo_report
from canter.demo.shift import measure_shift
from canter.demo.synthesis import Corpus, synthesise
from canter.evaluation.wer import ErrorCounts, score_texts
from canter.events import Events
from canter.files import write_text
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig
from canter.inference.loading import load_engine
from canter.inference.transcribe import transcribe
from canter.models.fastconformer import FastConformerConfig
from canter.models.model import SpeechModel
from canter.planning.budget import Budget
from canter.planning.compare import compare
from canter.planning.plan import Plan
from canter.planning.strategies import Balanced, Bucket1D, Bucket2D, Duration, Random
from canter.reporting.html import write_page
from canter.reporting.machine import describe_machine
from canter.training.config import TrainConfig, load_run_config
from canter.training.feed.data import Steps
from canter.training.loop import PreparedRun
from canter.training.recipe import FinishedRun, prepare_training, run_training
from canter.training.run.reports import StepReport
from canter.training.step.gradient import Gradient, TargetCounts


def run_demo(config: DemoConfig, events: Events[StepReport]) -> DemoSummary:
    """Run all stages, write ``summary.json`` and ``report.html``, and return the summary.

    An interrupted demo resumes at the stage it was in.
    """
    began = time.perf_counter()
    times: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        events.message(f"[bold]{name}[/bold]")
        start = time.perf_counter()
        yield
        times[name] = time.perf_counter() - start

    scale = QUICK if config.quick else FULL
    summary: DemoSummary = {"quick": config.quick}
    with stage("synthesise"):
        corpus = synthesise(
            config.output / "corpus",
            utterances=config.utterances or scale.utterances,
            test_utterances=scale.test_utterances,
            seed=config.seed,
            events=events,
        )
        figures = describe_corpus(corpus)
        summary |= {"utterances": corpus.utterances, "audio_hours": figures["audio_hours"], "corpus": figures}
    with stage("index, budget, plan"):
        folder = config.output / scale.run
        minutes = config.minutes or scale.minutes or training_minutes(folder, (time.perf_counter() - began) / 60)
        settings = replace(recipe(corpus.train_manifest, folder), minutes=minutes, seed=config.seed)
        run = prepare_training(settings, events)
    with stage("ladder"):
        summary |= compare_strategies(run.data.index, run.schedule.budget, scale.longest_in_memory, events)
        figures["lengths"] = sample_lengths(run.data.index)
    with stage("train"):
        finished = run_training(settings, events)
        summary |= describe_training(finished)
        run = finished.prepared
    with stage("transcribe, score"):
        engine = load_engine(folder, EngineConfig(ctc_weight=CTC_WEIGHT), device=settings.device)
        summary |= transcribe_test(engine, corpus, config.output / "test.transcribed.jsonl", events)
    with stage("speed of strategies"):
        summary["measured_speed"] = measure_training_speed(run, scale, events)
    with stage("decoder shift"):
        summary["decoder_shift"] = compare_decoders(engine.model, scale, config.seed, events)
    summary["times"] = times | {"total": time.perf_counter() - began}
    summary["machine"] = describe_machine()
    write_text(config.output / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_page(demo_report(summary), config.output / "report.html")
    return summary


def describe_corpus(corpus: Corpus) -> CorpusFigures:
    """Return the summary's figures of the corpus."""
    rows = [row for row in read_manifest(corpus.train_manifest) if isinstance(row, Utterance)]
    return {
        "utterances": corpus.utterances,
        "test_utterances": corpus.test_utterances,
        "audio_hours": sum(row.duration for row in rows) / 3600,
        "voices": corpus.voices,
        "unseen_voices": corpus.unseen_voices,
        "words": len({word for row in rows for word in row.text.split()}),
        "languages": sorted({row.lang for row in rows if row.lang}),
        "lengths": [],
    }


def recipe(manifest: Path, output: Path) -> TrainConfig:
    """Return the configuration of the demo's run, without its duration."""
    return TrainConfig(
        manifest=(manifest,), output=output, vocab_size=VOCAB_SIZE, batch_seconds=BATCH_SECONDS, valid_every=100_000
    )


def training_minutes(run: Path, spent: float) -> float:
    """Return the minutes of training: those remaining after ``spent``, or those of a run that is resumed."""
    if (run / "config.yaml").exists():
        return load_run_config(run / "config.yaml").minutes or TRAINING_MINUTES[1]
    least, most = TRAINING_MINUTES
    return round(min(max(TOTAL_MINUTES - AFTER_TRAINING - spent, least), most), 2)


def describe_training(finished: FinishedRun) -> DemoSummary:
    """Return the summary's figures of the training run."""
    run = finished.prepared
    rows = [json.loads(line) for line in run.run.log.metrics.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    computed = sum(row["audio_seconds"] / (1 - row["padding"]) for row in steps)
    return {
        "train_seconds": finished.progress.seconds,
        "steps": finished.progress.step,
        "precision": run.subject.precision,
        "trained_audio_hours": finished.progress.audio_seconds / 3600,
        "parameters": sum(parameter.numel() for parameter in run.subject.model.parameters()),
        "trained_padding": 1 - sum(row["audio_seconds"] for row in steps) / computed,
        "training": rows,
    }


def with_room_for(longest: int, index: LengthIndex, budget: Budget) -> Budget:
    """Return the budget with memory for a micro-batch of ``longest`` utterances as long as the longest."""
    frames = budget.frames(np.asarray(index.seconds))
    limit = np.max(budget.bytes(longest, frames, np.asarray(index.tokens, np.int64)))
    return replace(budget, limit_bytes=float(limit))


def compare_strategies(index: LengthIndex, budget: Budget, longest: int, events: Events[StepReport]) -> DemoSummary:
    """Compare the strategies on the corpus as the budget predicts, in a memory for ``longest`` of the longest."""
    strategies = [("random", Random(), None), ("duration", Duration(), None), ("bucket_1d", Bucket1D(), None)]
    strategies += [("bucket_2d", Bucket2D(), None), ("balanced", Balanced(), None)]
    rungs = list(compare(index, with_room_for(longest, index, budget), strategies, ranks=1))
    events.message(f"{len(index):,} utterances, memory for {longest} of the longest, predicted:")
    found: dict[str, StrategyFigures] = {}
    for rung in rungs:
        figures = rung.figures
        events.message(
            f"{rung.name:<10} padded compute {figures.padded_compute:6.1%}  memory filled "
            f"{figures.memory_filled:6.1%}  mean batch {figures.mean_batch:5.1f}  speed {rung.speed:.2f}x"
        )
        values = {key: _finite(value) for key, value in rung.as_json().items()}
        found[rung.name] = cast(
            "StrategyFigures",
            values | {"padding": figures.padded_audio, "epoch_hours": figures.hours, "speedup": rung.speed},
        )
    return {"room_for_longest": longest, "strategies": found}


def _finite(value: object) -> object:
    """Return None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sample_lengths(index: LengthIndex, most: int = 2000) -> list[list[float]]:
    """Return [seconds, tokens] of utterances that are evenly spaced over the index."""
    sample = np.linspace(0, len(index) - 1, min(len(index), most)).astype(int)
    return np.stack([index.seconds[sample], index.tokens[sample]], axis=1).astype(float).round(2).tolist()


def transcribe_test(engine: Engine, corpus: Corpus, output: Path, events: Events[StepReport]) -> DemoSummary:
    """Transcribe the test part by joint decoding, by attention only and by CTC only, and score all three."""
    model, tokenizer = engine.model, engine.model.tokenizer
    characters = model.characters
    assert characters is not None
    utterances = [row for row in read_manifest(corpus.test_manifest) if isinstance(row, Utterance)]
    rows = [json.loads(line) for line in corpus.test_manifest.read_text(encoding="utf-8").splitlines()]
    texts = [result.text for result in transcribe(engine, tokenizer, utterances)]
    separate = transcribe(Engine(model, engine.end, ctc=True), tokenizer, utterances)
    attention = [result.text for result in separate]
    ctc = [characters.decode(result.ctc or ()) for result in separate]
    for row, text, one, other in zip(rows, texts, attention, ctc, strict=True):
        row |= {"pred_text": text, "pred_text_attention": one, "pred_text_ctc": other}
    write_manifest(output, rows)

    def scored(hypotheses: Sequence[str], **fields: object) -> ErrorCounts:
        chosen = [i for i, row in enumerate(rows) if fields.items() <= row.items()]
        references = [rows[i]["text"] for i in chosen]
        return score_texts(references, [hypotheses[i] for i in chosen], normalize="none").total

    joint, seen, unseen = scored(texts), scored(texts, speaker_seen=True).wer, scored(texts, speaker_seen=False).wer
    attention_wer, ctc_wer = scored(attention).wer, scored(ctc).wer
    events.message(
        f"WER {joint.wer:.1%} (voices of training {seen:.1%}, other voices {unseen:.1%}; attention only "
        f"{attention_wer:.1%}, CTC only {ctc_wer:.1%}), RTFx {engine.counters.rtfx:.0f}"
    )
    return {
        "wer": joint.wer,
        "cer": joint.cer,
        "ctc_weight": CTC_WEIGHT,
        "wer_seen": seen,
        "wer_unseen": unseen,
        "wer_by_language": {lang: scored(texts, lang=lang).wer for lang in sorted({row["lang"] for row in rows})},
        "attention_wer": attention_wer,
        "ctc_wer": ctc_wer,
        "rtfx": engine.counters.rtfx,
        "useful_rows": engine.counters.useful_rows,
        "examples": [
            {"voice": row["speaker"], "lang": row["lang"], "text": row["text"], "pred_text": row["pred_text"]}
            for row in rows[:: max(1, len(rows) // 8)][:8]
        ],
    }


def measure_training_speed(run: PreparedRun, scale: Scale, events: Events[StepReport]) -> MeasuredSpeed:
    """Measure forward and backward passes on batches of `random` and of `balanced` in turns."""
    index, data = run.data.index, run.data.micro_batches
    budget = with_room_for(scale.speed_longest, index, run.schedule.budget)
    strategies = {"random": Random(), "balanced": Balanced()}
    gradient = Gradient(run.config, run.subject.model.train(), run.subject.precision)
    plans = {name: Plan(index, budget, strategy) for name, strategy in strategies.items()}
    addresses = {name: Steps(plan).addresses(None, 0, 0) for name, plan in plans.items()}
    audio, taken = dict.fromkeys(plans, 0.0), dict.fromkeys(plans, 0.0)
    until = time.perf_counter() + scale.speed_seconds
    turn = 0
    while turn < 2 or time.perf_counter() < until:
        for name in plans:
            loaded = data[next(addresses[name])]
            if loaded.batch is None:
                continue
            began = time.perf_counter()
            gradient.compute([loaded], TargetCounts.of([loaded.batch]), turn, ctc_only=False)
            if turn:  # the first pass allocates memory
                taken[name] += time.perf_counter() - began
                audio[name] += float(loaded.batch.audio_lengths.sum()) / data.sample_rate
            gradient.discard()
        turn += 1
    _, predicted = compare(index, budget, [(name, s, None) for name, s in strategies.items()], ranks=1)
    measured = {name: audio[name] / max(taken[name], 1e-9) for name in plans}
    speedup = measured["balanced"] / max(measured["random"], 1e-9)
    events.message(
        f"forward and backward passes: random {measured['random']:.0f}, balanced {measured['balanced']:.0f} s of audio "
        f"a second, {speedup:.1f}x (predicted {predicted.speed:.1f}x)"
    )
    return {
        "audio_seconds_a_second": measured,
        "speedup": speedup,
        "predicted": predicted.speed,
        "steps": turn - 1,
        "room_for_longest": scale.speed_longest,
    }


def compare_decoders(
    model: SpeechModel, scale: Scale, seed: int, events: Events[StepReport]
) -> dict[str, ShiftFigures]:
    """Measure two models of equal size, one with a deep decoder and one with a shallow one, with every cache."""
    config, models = model.config, {}
    assert isinstance(config.encoder, FastConformerConfig)
    for encoder_layers, decoder_layers in (DEEP, SHALLOW):
        encoder = replace(config.encoder, layers=encoder_layers, width=SHIFT_WIDTH, feedforward=4 * SHIFT_WIDTH)
        decoder = replace(config.decoder, layers=decoder_layers, width=SHIFT_WIDTH, feedforward=4 * SHIFT_WIDTH)
        torch.manual_seed(seed)
        models[f"{encoder_layers}/{decoder_layers}"] = SpeechModel(replace(config, encoder=encoder, decoder=decoder))
    batch, seconds, tokens = scale.shift_batch
    samples = seconds * model.sample_rate
    audio = torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed)) * 0.1
    rows = measure_shift(models, audio, torch.full((batch,), samples), tokens, repeats=scale.shift_repeats)
    found: dict[str, ShiftFigures] = {}
    for row in rows:
        events.message(
            f"{row.shape:>5} layers, cache {row.cache:<6}  encoder {row.encoder_seconds:.2f} s  "
            f"decoder {row.decoder_seconds:.2f} s  RTFx {row.rtfx:.0f}  {row.speedup:.1f}x"
        )
        figures = asdict(row) | {"seconds": row.encoder_seconds + row.decoder_seconds}
        found[f"{row.shape} {row.cache}"] = cast("ShiftFigures", figures)
    return found
