"""`canter bench inference MODEL`: speed and latency of decoding, beside other frameworks on the same weights."""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from canter.errors import CanterError, ConfigError

if TYPE_CHECKING:
    from canter.bench.speed import Clip, Speed
    from canter.models.model import SpeechModel

NOISE_CLIPS, NOISE_SECONDS = 32, (2.0, 15.0)  # without --audio


@dataclass(frozen=True)
class Options:
    what: tyro.conf.Positional[Literal["inference"]]
    """What to measure."""
    model: tyro.conf.Positional[Path]
    """A run folder, a model folder, a .nemo file or a hub name."""
    audio: Path | None = None
    """A manifest, or a folder of audio. Without it modulated noise is decoded: good for a look alone, since a model
    says other things to noise than to speech."""
    against: str = ""
    """Others on the same weights and clips, separated by commas: `transformers`, `ctranslate2`, `canter` itself, each
    with a type if it is to be another than --precision, as in `ctranslate2:int8`."""
    batch_size: int | None = None
    """Rows that Canter decodes together at most; by default what suits model and device."""
    beam: int = 1
    """Above 1, Canter also decodes with so many hypotheses for each clip, to be set beside its greedy search."""
    peer_batch_size: int = 16
    """Clips that the others decode together, sorted by length."""
    language: str | None = None
    """Language of clips that name none."""
    clips: int | None = None
    """Take so many of the clips, spread over all."""
    repeats: int = 3
    """Timed runs of each system, interleaved, after one that warms it up; the median counts."""
    latency_clips: int = 20
    """Clips that are also decoded one by one."""
    threads: int | None = None
    """Threads of every system; by default torch's choice."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU if there is one."""
    precision: Literal["float32", "bf16", "int8"] = "float32"
    """Of Canter, and of the others where they name no type (transformers has no int8: float32). int8 is for
    processors."""
    json: Path | None = None
    """Write everything that was measured to this file."""


def run(options: Options) -> None:
    for name in ("batch_size", "beam", "peer_batch_size", "repeats", "latency_clips", "clips", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1")

    import torch

    from canter.bench.peers import load_peer, parse_peer, working_folder
    from canter.bench.speed import CanterSystem, System, measure
    from canter.inference.engine.engine import Engine
    from canter.inference.engine.int8 import quantize
    from canter.inference.engine.requests import EngineConfig
    from canter.loading import load_model
    from canter.models.hub import checkpoint_of
    from canter.runtime import choose_device, keep_freed_memory

    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    default = {"bf16": "bfloat16"}.get(options.precision, options.precision)
    peers = [parse_peer(spec.strip(), default) for spec in options.against.split(",") if spec.strip()]
    if options.threads:
        torch.set_num_threads(options.threads)
    device = str(choose_device(options.device))
    if device == "cpu":  # for all systems: they share the process
        keep_freed_memory()
    checkpoint = checkpoint_of(options.model)
    model = load_model(checkpoint, device=device, dtype=dtype)
    clips, left_out = load_clips(options, model)
    if options.precision == "int8" and device != "cpu":
        raise ConfigError(f"--precision int8 runs on a CPU, and the device is {device}: use bf16 there")
    config = EngineConfig(rows=options.batch_size)

    def canter(model: "SpeechModel", kind: str, config: EngineConfig) -> CanterSystem:
        model = quantize(model) if kind == "int8" else model
        return CanterSystem(Engine(model, model.tokenizer.end, config))

    with working_folder() as work:
        others: dict[str, System] = {}
        for package, kind in peers:
            if package == "canter":
                dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
                system = canter(load_model(checkpoint, device=device, dtype=dtype), kind, config)
            else:
                system = load_peer(model, package, kind, options.peer_batch_size, Path(work))
            others[f"{package} {kind}"] = system
        first = canter(model, default, config)
        systems: dict[str, System] = {f"canter {default}": first, **others}
        if options.beam > 1:
            beams = Engine(first.engine.model, first.engine.end, replace(config, beams=options.beam))
            systems[f"canter {default}, {options.beam} beams"] = CanterSystem(beams)
        speeds = measure(systems, clips, repeats=options.repeats, latency_clips=options.latency_clips)
    show(speeds, clips)
    for reason in left_out[:5]:
        print(f"canter: left out: {reason}", file=sys.stderr)
    if options.json:
        from canter.inference.transcript.formats import write_output

        value = {
            "model": str(options.model),
            "audio": str(options.audio) if options.audio else "noise",
            "clips": len(clips),
            "left_out": len(left_out),
            "audio_seconds": sum(clip.seconds for clip in clips),
            **asdict_of_options(options),
            "batch_size": first.engine.rows,
            "machine": machine(device, [package for package, _ in peers]),
            "systems": {name: asdict(speed) for name, speed in speeds.items()},
        }
        write_output(options.json, [json.dumps(value, indent=2) + "\n"])
        print(f"written: {options.json}", file=sys.stderr)


def load_clips(options: Options, model: "SpeechModel") -> "tuple[list[Clip], list[str]]":
    """The clips, longest first, and why others were left out. ConfigError where none can be used."""
    import numpy as np

    from canter.bench.speed import Clip
    from canter.corpus.audio import load_utterance
    from canter.corpus.manifest import Utterance
    from canter.inference.inputs import read_items
    from canter.inference.languages import Defaults

    tokenizer, rate = model.tokenizer, model.config.features.sample_rate
    if tokenizer is None:
        raise ConfigError(f"{options.model} has no tokenizer, so it cannot be prompted")
    language = options.language or tokenizer.languages[0]
    if options.audio is None:
        random = np.random.default_rng(0)
        prompt = tuple(tokenizer.prompt(Utterance("noise", 1.0, "", lang=language)))
        noise: list[Clip] = []
        for seconds in random.uniform(*NOISE_SECONDS, options.clips or NOISE_CLIPS):
            rise = np.sin(np.arange(round(seconds * rate)) / random.uniform(300, 3000)) + 1.1
            samples = (0.1 * rise * random.normal(size=len(rise))).astype(np.float32)
            noise.append(Clip(samples, len(samples) / rate, prompt))
        return noise, []
    items = read_items([options.audio], defaults=Defaults(language))
    if options.clips and options.clips < len(items):
        items = [items[place] for place in np.linspace(0, len(items) - 1, options.clips).astype(int)]
    clips: list[Clip] = []
    left_out = [item.problem for item in items if item.problem]
    for utterance in (item.utterance for item in items if item.utterance):
        try:
            audio = load_utterance(utterance, rate)
            seconds = len(audio) / rate
            if seconds > (most := model.longest_seconds):
                raise ConfigError(f"{utterance.audio_filepath} is {seconds:.1f} s long; at most {most:g} s fit")
            clips.append(Clip(audio, seconds, tuple(tokenizer.prompt(utterance))))
        except CanterError as error:
            left_out.append(str(error))
    if not clips:
        raise ConfigError(f"{options.audio}: no clip can be used: {left_out[0]}")
    return sorted(clips, key=lambda clip: -clip.seconds), left_out


def asdict_of_options(options: Options) -> dict[str, Any]:
    names = ("beam", "peer_batch_size", "repeats", "latency_clips", "precision")
    return {name: getattr(options, name) for name in names}


def machine(device: str, packages: list[str]) -> dict[str, Any]:
    """What the figures were measured on."""
    import platform
    from datetime import date
    from importlib.metadata import version

    import torch

    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "date": date.today().isoformat(),
        "device": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
    }


def show(speeds: "dict[str, Speed]", clips: "list[Clip]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    seconds = sum(clip.seconds for clip in clips)
    console.print(f"{len(clips):,} clips, {seconds:,.0f} s of audio; latency of single clips")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("RTFx", "against Canter", "p50", "p95", "p99", "same tokens"):
        table.add_column(name, justify="right")
    first = next(iter(speeds.values()))
    for name, speed in speeds.items():
        latency = (f"{1000 * speed.latency_seconds[percentile]:,.0f} ms" for percentile in ("p50", "p95", "p99"))
        table.add_row(
            name,
            f"{speed.rtfx:,.1f}",
            f"{speed.rtfx / first.rtfx:.2f}x",
            *latency,
            f"{speed.same_transcripts:.1%}",
        )
    console.print(table)
    shares = ", ".join(f"{part} {share:.0%}" for part, share in first.details["shares"].items())
    console.print(
        f"Canter's time: {shares}; {first.details['useful_rows']:.1%} of the decoder's rows useful, "
        f"{first.details['mean_rows']:.1f} rows a step"
    )
    for name, speed in speeds.items():
        if name.endswith("beams"):
            decoder, greedy = (one.details["counters"]["decoder_seconds"] for one in (speed, first))
            console.print(f"{name}: {decoder / greedy:.2f} times the decoder's time of greedy search")
