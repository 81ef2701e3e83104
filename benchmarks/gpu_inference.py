"""Measure inference on one GPU: RTFx against `transformers`, decoder steps against memory bandwidth, and the 2 x 2.

Shapes are those of canary-1b-flash, whisper-large-v3-turbo, Cohere Transcribe and OWSM medium, weights random, audio
noise of real lengths: every row is made to stop at the same given length in both engines. Both read the same weights in
bf16; runs are interleaved, after one that warms up. transformers has no OWSM, which is measured without it. Drafts for
several tokens a step are the texts of a first run, in which each token is another one with a given probability.

    CANTER_SHARED=... python benchmarks/gpu_inference.py --json benchmarks/results/gpu-inference-DATE.json
    python benchmarks/gpu_inference.py --models canary --canary 17 4 256 --clips 48 --batch 16 --no-ways   # a processor
    python benchmarks/gpu_inference.py --smoke          # small shapes on a processor, to see that it runs

On one H200 the first two take under nine minutes; `--seconds` bounds it, and what is left out is said in the result.
"""

import copy
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import tyro
from decoder_shift import ForcedLengths, canary_config, measure_ways

from canter.files import write_text
from canter.inference.engine.graphs import FixedSteps
from canter.inference.engine.int8 import quantize
from canter.inference.engine.requests import Counters, EngineConfig, Hypothesis, Request, encoder_batches
from canter.models.decoder import DecoderConfig
from canter.models.ebranchformer import EPSILON, EBranchformerConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import EspnetFeatureConfig, FeatureConfig, WhisperFeatureConfig
from canter.models.formats.huggingface import write_hf
from canter.models.model import ModelConfig, SpeechModel
from canter.models.whisper import WhisperEncoderConfig
from canter.runtime import choose_device

LENGTHS = "data/lengths/librispeech_devtest_en.parquet"
PROMPT = (1, 2, 3, 4)
ACCEPTANCES = (0.5, 0.7, 0.9)  # of a drafted token


@dataclass(frozen=True)
class Options:
    clips: int = 1024
    """Utterances, drawn from real lengths up to 30 s."""
    batch: int = 128
    """Batch size of `transformers`, and slots of Canter's decoder."""
    models: tuple[Literal["canary", "whisper", "cohere", "owsm"], ...] = ("canary", "whisper", "cohere", "owsm")
    """Models to measure beside the two shapes; none where no name follows."""
    canary: tuple[int, int, int] = (32, 4, 1024)
    """Encoder layers, decoder layers and width (default: those of canary-1b-flash)."""
    ways: bool = True
    """Measure the 2 x 2 of shapes and caches too."""
    drafts: bool = True
    """Measure the same two shapes with drafts of simulated acceptance too."""
    threads: int | None = None
    """Number of torch threads on a CPU."""
    repeats: int = 2
    """Number of timed runs of each engine; the median is reported."""
    seconds: float = 500.0
    """Start no new measurement after this many seconds."""
    smoke: bool = False
    """Use small shapes and few clips, on any device."""
    json: Path | None = None
    """Write the result to this file."""


def whisper_config(layers: int, width: int) -> ModelConfig:
    """Return the shape of whisper-large-v3-turbo: 32 layers of width 1280."""
    heads = max(1, width // 64)
    return ModelConfig(
        features=WhisperFeatureConfig(mels=128),
        encoder=WhisperEncoderConfig(layers=layers, width=width, heads=heads, feedforward=4 * width, mels=128),
        decoder=DecoderConfig(
            layers=4, width=width, heads=heads, feedforward=4 * width, vocabulary=51866, positions=448, pad=50257,
            learned_positions=True, embedding_norm=False, activation="gelu", key_bias=False, head_bias=False,
        ),
    )  # fmt: skip


def cohere_config(encoder_layers: int, decoder_layers: int, widths: tuple[int, int]) -> ModelConfig:
    """Return the shape of Cohere Transcribe: 48 layers of width 1280 and 8 of 1024."""
    wide, narrow = widths
    return ModelConfig(
        features=FeatureConfig(mels=128, dither=1e-5, dither_by_length=True),
        encoder=FastConformerConfig(
            layers=encoder_layers, width=wide, heads=8, feedforward=4 * wide, subsampling_channels=wide // 5, mels=128
        ),
        decoder=DecoderConfig(
            layers=decoder_layers, width=narrow, heads=8, feedforward=4 * narrow, vocabulary=16384, positions=1024,
            pad=2, learned_positions=True, tied=False,
        ),
        projected=True,
    )  # fmt: skip


def owsm_config(layers: int, width: int) -> ModelConfig:
    """Return the shape of OWSM v4 medium, 18 layers of width 1024 each, at the utterances' own lengths."""
    heads = max(1, width // 64)
    shape = {"layers": layers, "width": width, "heads": heads, "feedforward": 4 * width}
    return ModelConfig(
        features=EspnetFeatureConfig(pad_seconds=0.0),
        encoder=EBranchformerConfig(**shape, cgmlp_units=4 * width),
        decoder=DecoderConfig(
            **shape, vocabulary=50002, positions=448, embedding_norm=False, scale_embedding=True, tied=False,
            epsilon=EPSILON,
        ),
    )  # fmt: skip


def draw_lengths(count: int) -> list[tuple[float, int]]:
    """Return (seconds, tokens) of utterances of LibriSpeech where available, else of a similar distribution."""
    random = np.random.default_rng(0)
    shared = os.environ.get("CANTER_SHARED")
    if shared and (Path(shared) / LENGTHS).exists():
        import pyarrow.parquet as parquet

        table = parquet.read_table(Path(shared) / LENGTHS, columns=["duration", "tokens"]).to_pydict()
        pairs = [(s, t) for s, t in zip(table["duration"], table["tokens"]) if 0.5 < s <= 30 and 0 < t < 400]
        return [pairs[index] for index in random.integers(len(pairs), size=count)]
    seconds = np.clip(random.gamma(2.0, 3.7, count), 1.0, 29.0)
    return [(float(s), max(1, int(s * random.uniform(2.4, 3.6)))) for s in seconds]


def ours(model: SpeechModel, clips, tokens, options: Options) -> dict[str, float]:
    engine = ForcedLengths(model, EngineConfig(rows=options.batch, max_repeats=0))
    rate = model.config.features.sample_rate
    frames = [model.encoder_frames(len(clip) / rate) for clip in clips]
    batches = encoder_batches(frames, engine.frames, engine.rows)
    begun = time.perf_counter()
    done = sum(
        len(found.tokens)
        for found in engine.run([Request(clips[i], PROMPT, (i, tokens[i])) for i in batch] for batch in batches)
    )
    synchronize()
    seconds = time.perf_counter() - begun
    assert done == sum(tokens)
    counters = engine.counters
    return {
        "seconds": seconds,
        "encoder_seconds": counters.feature_seconds + counters.encoder_seconds,
        "decoder_seconds": counters.decoder_seconds,
        "useful_rows": counters.useful_rows,
        "mean_rows_share": counters.mean_rows / options.batch,
        "steps": counters.steps,
    }


class Recalled:
    """Drafter of known texts by key, in which a token is the right one with probability ``acceptance``."""

    def __init__(self, texts: dict[object, list[int]], acceptance: float, vocabulary: int):
        random = np.random.default_rng(0)
        self.texts = {
            key: [token if random.random() < acceptance else (token + 1) % vocabulary for token in text]
            for key, text in texts.items()
        }

    def decode(self, requests: list[Request]) -> list[Hypothesis]:
        return [Hypothesis(one.key, self.texts[one.key], True) for one in requests]


def with_drafts(models: dict[str, SpeechModel], clips, tokens, options: Options) -> list[dict[str, object]]:
    """Return times of each model without drafts and with some of each acceptance, in turns after one that warms up."""
    config = EngineConfig(rows=options.batch, max_repeats=0, draft="off")
    asked = [Request(clip, PROMPT, (index, count)) for index, (clip, count) in enumerate(zip(clips, tokens))]
    found: list[dict[str, object]] = []
    for shape, model in models.items():
        engines: dict[float, ForcedLengths] = {0.0: ForcedLengths(model, config)}
        keyed = {one.key: one.tokens for one in engines[0.0].run([asked])}
        for acceptance in ACCEPTANCES:
            engines[acceptance] = ForcedLengths(model, config)
            engines[acceptance].drafter = Recalled(keyed, acceptance, model.vocabulary)
        runs: dict[float, list[Counters]] = {acceptance: [] for acceptance in engines}
        for repeat in range(options.repeats + 1):
            for acceptance, engine in engines.items():
                engine.counters = Counters(slots=engine.rows)
                texts = {one.key: one.tokens for one in engine.run([asked])}
                if repeat:
                    runs[acceptance].append(engine.counters)
                same = sum(texts[key] == keyed[key] for key in keyed) / len(keyed)
                if repeat == options.repeats:
                    middle = sorted(runs[acceptance], key=lambda one: one.seconds)[len(runs[acceptance]) // 2]
                    found.append({
                        "shape": shape, "acceptance": acceptance, "seconds": middle.seconds,
                        "decoder_seconds": middle.decoder_seconds,
                        "steps_per_token": middle.steps_per_token, "same_texts": same,
                    })  # fmt: skip
    return found


def theirs(model: SpeechModel, hf, clips, tokens, options: Options) -> dict[str, float]:
    """Measure `generate` of transformers on batches sorted by length, with the same features."""
    from transformers import GenerationConfig, LogitsProcessor
    from transformers.generation.utils import GenerationMixin

    end, device = 0, next(hf.parameters()).device

    class Forced(LogitsProcessor):
        def __init__(self, counts: torch.Tensor):
            self.counts = counts

        def __call__(self, input_ids, scores):
            step = input_ids.shape[1] - len(PROMPT) + 1
            scores[:, end] = torch.where(self.counts == step, torch.inf, -torch.inf).to(scores.dtype)
            return scores

    begun = time.perf_counter()
    order = sorted(range(len(clips)), key=lambda index: -len(clips[index]))
    for start in range(0, len(order), options.batch):
        part = order[start : start + options.batch]
        lengths = torch.tensor([len(clips[i]) for i in part])
        audio = torch.zeros(len(part), int(lengths.max()))
        for row, i in zip(audio, part):
            row[: len(clips[i])] = torch.from_numpy(clips[i])
        with torch.inference_mode():
            features, frames = model.features(audio.to(device), lengths.to(device))
        whisper = isinstance(model.config.features, WhisperFeatureConfig)
        mask = torch.arange(features.shape[1], device=device)[None] < frames[:, None]
        counts = torch.tensor([tokens[i] for i in part], device=device)
        inputs = {"input_features": (features.transpose(1, 2) if whisper else features).to(hf.dtype)}
        GenerationMixin.generate(
            hf,
            **inputs,
            attention_mask=None if whisper else mask,
            decoder_input_ids=torch.tensor([PROMPT] * len(part), device=device),
            generation_config=GenerationConfig(
                max_new_tokens=int(counts.max()), eos_token_id=end, pad_token_id=end, bos_token_id=1,
                decoder_start_token_id=1, do_sample=False, num_beams=1,
            ),
            logits_processor=[Forced(counts)],
        ).tolist()  # fmt: skip
    synchronize()
    return {"seconds": time.perf_counter() - begun}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a copy reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**26
    one = torch.empty(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    times = []
    for _ in range(6):
        synchronize()
        begun = time.perf_counter()
        other.copy_(one)
        synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * size / min(times)


@torch.inference_mode()
def step_time(model: SpeechModel, rows: int, frames: int, past: int, bytes_a_second: float) -> dict[str, float]:
    """Measure one decoder step of ``rows`` rows against the time to read weights, keys and values."""
    decoder, config = model.decoder.eval(), model.config.decoder
    weight = decoder.embedding.weight
    cache = decoder.cache()
    encoded = torch.randn(rows, frames, config.width, device=weight.device, dtype=weight.dtype)
    decoder.admit([[1] * past] * rows, encoded, [frames] * rows, cache)
    steps = FixedSteps(decoder, capture=weight.is_cuda)
    tokens = torch.ones(rows, 1, dtype=torch.long, device=weight.device)
    times = []
    for repeat in range(40):
        synchronize()
        begun = time.perf_counter()
        steps.step(tokens, cache)
        synchronize()
        if repeat >= 20:
            times.append(time.perf_counter() - begun)
    size = weight.element_size()
    weights = sum(p.numel() for p in decoder.parameters()) * size
    cached = 2 * config.layers * rows * (frames + past + 30) * config.width * size
    floor = (weights + cached) / bytes_a_second
    return {"rows": rows, "frames": frames, "seconds": median(times), "floor_seconds": floor,
            "of_floor": median(times) / floor}  # fmt: skip


def run(options: Options) -> None:
    begun = time.perf_counter()
    gpu = torch.cuda.is_available()
    device, dtype = choose_device("auto"), torch.bfloat16 if gpu else torch.float32
    if options.smoke:
        options = replace(options, clips=4, batch=2, repeats=1)
    if options.threads:
        torch.set_num_threads(options.threads)
    deep, shallow, width = (2, 1, 64) if options.smoke else options.canary
    configs = {
        "canary": (f"canary {deep}/{shallow} x {width}", canary_config(deep, shallow, width)),
        "whisper": ("whisper-large-v3-turbo", whisper_config(*((1, 64) if options.smoke else (32, 1280)))),
        "cohere": ("cohere-transcribe", cohere_config(*((2, 1, (80, 64)) if options.smoke else (48, 8, (1280, 1024))))),
        "owsm": ("owsm medium", owsm_config(*((1, 64) if options.smoke else (18, 1024)))),
    }
    random = np.random.default_rng(1)
    lengths = draw_lengths(options.clips)
    clips = [(0.1 * random.normal(size=round(16000 * s))).astype(np.float32) for s, _ in lengths]
    tokens = [min(t, 12) if options.smoke else t for _, t in lengths]
    audio_seconds = sum(map(len, clips)) / 16000
    result: dict = {
        "date": str(date.today()),
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clips": len(clips),
        "audio_seconds": audio_seconds,
        "tokens": sum(tokens),
        "batch": options.batch,
        "bandwidth": bandwidth(device),
        "engines": [],
        "steps": [],
        "left_out": [],
    }

    def late(what: str) -> bool:
        if time.perf_counter() - begun > options.seconds:
            result["left_out"].append(what)
            return True
        return False

    for kind in options.models:
        name, config = configs[kind]
        if late(name):
            continue
        torch.manual_seed(0)
        model = build(config, device, dtype)
        for rows in (1, 16, 128) if gpu else (1, options.batch):
            frames = model.encoder_frames(10.0)
            result["steps"].append({"model": name, **step_time(model, rows, frames, 20, result["bandwidth"])})
        engines: dict[str, tuple] = {"canter": (ours, model)}
        if kind != "owsm":
            hf, result["transformers"] = load_theirs(model, dtype, device)
            engines["transformers"] = (theirs, model, hf)
            del hf
        if not gpu:
            engines["canter int8"] = (ours, quantize(copy.deepcopy(model)))
        runs: dict[str, list[dict]] = {way: [] for way in engines}
        for repeat in range(options.repeats + 1):
            for way, (decode, *given) in engines.items():
                if repeat and late(f"{name} {way} {repeat}"):
                    continue
                found = decode(*given, clips, tokens, options)
                if repeat:
                    runs[way].append(found)
                    others = [row for row in result["engines"] if row["model"] != name]
                    result["engines"] = others + middle_runs(name, runs, audio_seconds)
                    save(result, options)
        del model, engines, given
        if gpu:
            torch.cuda.empty_cache()
    if (options.ways or options.drafts) and not late("2 x 2"):
        shapes = {"2/2": (2, 2), "3/1": (3, 1)} if options.smoke else {"24/24": (24, 24), "32/4": (32, 4)}
        width = 64 if options.smoke else 1024
        models = {shape: build(canary_config(*layers, width), device, dtype) for shape, layers in shapes.items()}
        some = slice(None, 256)
        if options.ways:
            ways = measure_ways(models, clips[some], tokens[some], repeats=1, rows=options.batch, batch=options.batch)
            result["ways"] = [asdict(row) for row in ways]
            save(result, options)
        if options.drafts and not late("drafts"):
            result["drafts"] = with_drafts(models, clips[some], tokens[some], options)
    result["seconds"] = time.perf_counter() - begun
    save(result, options)
    for part in ("steps", "engines", "ways", "drafts"):
        for row in result.get(part, ()):
            print(row)


def middle_runs(name: str, runs: dict[str, list[dict]], audio_seconds: float) -> list[dict]:
    """Return the row of each engine's median run so far."""
    rows = []
    for way, timed in runs.items():
        if timed:
            middle = sorted(timed, key=lambda one: one["seconds"])[len(timed) // 2]
            rows.append({"model": name, "engine": way, "rtfx": audio_seconds / middle["seconds"], **middle})
    return rows


def save(result: dict, options: Options) -> None:
    """Write the result; called after each run of an engine, in case time runs out."""
    if options.json:
        write_text(options.json, json.dumps(result, indent=1) + "\n", durable=False)


def build(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> SpeechModel:
    """Return a model with random weights in ``dtype`` and features in float32."""
    with torch.device(device):
        model = SpeechModel(config).to(device).eval().requires_grad_(False)
    for part in model.children():
        if part is not model.features:
            part.to(dtype)
    return model


def load_theirs(model: SpeechModel, dtype: torch.dtype, device: torch.device):
    """Return a model of transformers with the same weights, and the version of transformers."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        write_hf(model, Path(folder) / "model")
        hf = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(Path(folder) / "model", dtype=dtype)
    return hf.to(device).eval(), transformers.__version__


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
