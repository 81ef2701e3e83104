"""Measure decoding speed and latency of a model, beside other frameworks with the same weights."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal, cast

import tyro

from canter.errors import ConfigError

if TYPE_CHECKING:
    from canter.bench.speed import Clip, Speed
    from canter.models.model import SpeechModel

TYPE_OF = {"bf16": "bfloat16"}  # --precision -> the type's name in --against
PRECISION_OF: dict[str, Literal["float32", "bf16", "int8"]] = {"float32": "float32", "bfloat16": "bf16", "int8": "int8"}
PEER_BATCH = 16  # utterances that other systems decode together, sorted by length


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """Run folder, model folder, .nemo file or hub name."""
    audio: Path | None = None
    """Manifest, or folder of audio (default: modulated noise, which gives only a rough figure, since a model decodes
    other texts from noise than from speech)."""
    adapter: Path | None = None
    """LoRA adapter to merge into the model: a folder of Canter or peft, or a run (default: none)."""
    against: str = ""
    """Other systems on the same weights and utterances, separated by commas: `transformers`, `ctranslate2`, `espnet`
    (OWSM), or `canter` itself. Each may have a type other than --precision, as in `ctranslate2:int8`."""
    batch_size: int | None = None
    """Maximum number of rows decoded together (default: Canter chooses by model and device; the others take 16, and
    ESPnet always 1)."""
    beam_size: int = 1
    """Above 1, Canter and ESPnet also decode by beam search of this size, beside their greedy search."""
    draft: str = "auto"
    """Source of drafts for several tokens a decoder step, as in `canter transcribe`; where there is one, Canter also
    decodes without it."""
    language: str | None = None
    """Language of utterances that name none."""
    utterances: int | None = None
    """Number of utterances to decode, evenly spaced over all (default: all; noise: 32)."""
    repeats: int = 3
    """Timed runs of each system, interleaved, after one that warms up; the median counts."""
    latency_utterances: int = 20
    """Number of utterances that are also decoded singly, to measure latency."""
    threads: int | None = None
    """Threads of every system (default: torch's choice)."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU if there is one."""
    precision: Literal["float32", "bf16", "int8"] = "float32"
    """Precision of Canter, and of the other systems where they name no type (transformers has no int8: float32). int8
    needs a CPU."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write all measurements to this file, as JSON."""
    json: bool = False
    """Print one JSON object on stdout instead of a table."""


def run(options: Options) -> None:
    names = ("batch_size", "beam_size", "repeats", "latency_utterances", "utterances", "threads")
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1")

    import torch

    from canter.bench.peers import load_peer, parse_peer
    from canter.bench.speed import EngineSystem, System, load_clips, measure_speed
    from canter.inference.engine.engine import engine_for
    from canter.inference.engine.requests import EngineConfig
    from canter.inference.loading import load_engine
    from canter.inference.transcript.formats import json_text
    from canter.loading import load_module
    from canter.models.hub import checkpoint_of
    from canter.models.protocol import check_support
    from canter.reporting.machine import describe_machine
    from canter.runtime import keep_freed_memory

    peer_batch = options.batch_size or PEER_BATCH
    kind = TYPE_OF.get(options.precision, options.precision)
    peers = [parse_peer(spec.strip(), kind) for spec in options.against.split(",") if spec.strip()]
    if options.threads:
        torch.set_num_threads(options.threads)
    checkpoint, config = checkpoint_of(options.model), EngineConfig(rows=options.batch_size)
    engine = load_engine(
        checkpoint,
        config,
        device=options.device,
        precision=options.precision,
        adapter=options.adapter,
        draft=options.draft,
    )
    model = engine.model
    device = str(next(model.parameters()).device)
    if device == "cpu":  # for all systems, which share the process
        keep_freed_memory()
    clips, left_out = load_clips(engine, options.audio, options.language, options.utterances)
    systems: dict[str, System] = {f"canter {kind}": EngineSystem(engine)}
    if engine.drafting:
        systems[f"canter {kind} without drafts"] = EngineSystem(
            engine_for(model, engine.end, replace(config, draft="off"))
        )
    wide, beams = replace(config, beams=options.beam_size, draft="off"), f", {options.beam_size} beams"
    if options.beam_size > 1:
        systems[f"canter {kind}{beams}"] = EngineSystem(engine_for(model, engine.end, wide))
    with TemporaryDirectory(prefix="canter-bench-") as work:
        for package, type_name in peers:
            if package == "canter":
                other = load_engine(
                    checkpoint, config, device=device, precision=PRECISION_OF[type_name], adapter=options.adapter
                )
                system: System = EngineSystem(other)
            else:
                check_support(model, {"--against": "cached_decoding"}, options.model)
                weights = (
                    load_module(checkpoint, device, adapter=options.adapter) if options.precision == "int8" else model
                )
                system = load_peer(cast("SpeechModel", weights), package, type_name, peer_batch, Path(work))
            systems[f"{package} {type_name}"] = system
            if package == "espnet" and options.beam_size > 1:
                searching = load_peer(cast("SpeechModel", model), package, type_name, 1, Path(work), wide)
                systems[f"espnet {type_name}{beams}"] = searching
        speeds = measure_speed(systems, clips, repeats=options.repeats, latency_clips=options.latency_utterances)
    for reason in left_out[:5]:
        print(f"canter: left out: {reason}", file=sys.stderr)
    if not options.json:
        print_speeds(speeds, clips)
    if options.output or options.json:
        # keys as in the files of Canter 0.1
        value = {
            "model": str(options.model),
            "audio": str(options.audio) if options.audio else "noise",
            "clips": len(clips),
            "left_out": len(left_out),
            "audio_seconds": sum(clip.seconds for clip in clips),
            "beam": options.beam_size,
            "peer_batch_size": peer_batch,
            "repeats": options.repeats,
            "latency_clips": options.latency_utterances,
            "precision": options.precision,
            "batch_size": engine.rows,
            "machine": describe_machine(device, [package for package, _ in peers]),
            "systems": {name: asdict(speed) for name, speed in speeds.items()},
        }
        text = json_text(value, indent=2)
        if options.json:
            print(text)
        if options.output:
            from canter.inference.transcript.formats import write_output

            write_output(options.output, [text + "\n"])
            print(f"written: {options.output}", file=sys.stderr)


def print_speeds(speeds: dict[str, Speed], clips: list[Clip]) -> None:
    """Print a table of all systems, and the parts of Canter's time."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    seconds = sum(clip.seconds for clip in clips)
    console.print(f"{len(clips):,} utterances, {seconds:,.0f} s of audio; latency of single utterances")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("RTFx", "against Canter", "p50", "p95", "p99", "same tokens"):
        table.add_column(name, justify="right")
    first = next(iter(speeds.values()))
    for name, speed in speeds.items():
        latency = (f"{1000 * speed.latency_seconds[percentile]:,.0f} ms" for percentile in ("p50", "p95", "p99"))
        same = f"{speed.same_transcripts:.1%}"
        table.add_row(name, f"{speed.rtfx:,.1f}", f"{speed.rtfx / first.rtfx:.2f}x", *latency, same)
    console.print(table)
    details = first.details
    shares = ", ".join(f"{part} {share:.0%}" for part, share in details.get("shares", {}).items())
    console.print(
        f"Canter's time: {shares}; {details.get('useful_rows', 1):.1%} of the decoder's rows useful, "
        f"{details.get('mean_rows', 0):.1f} rows a step"
    )
    counters = details.get("counters", {})
    for name, speed in speeds.items():
        if name.endswith("without drafts"):
            ratio = counters["decoder_seconds"] / speed.details.get("counters", {})["decoder_seconds"]
            console.print(
                f"Drafts: {details.get('acceptance', 0):.0%} of {counters['drafted']:,} drafted "
                f"tokens accepted, {details.get('steps_per_token', 1):.2f} steps a token, "
                f"{ratio:.2f} times the decoder's time without them"
            )
    for name, speed in speeds.items():
        if name.startswith("canter ") and name.endswith("beams"):
            decoder, greedy = (one.details.get("counters", {})["decoder_seconds"] for one in (speed, first))
            console.print(f"{name}: {decoder / greedy:.2f} times the decoder's time of greedy search")
