"""Audio to transcripts: files, folders and manifests through one queue, in the order they were given."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from canter.errors import ConfigError


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A run folder, which stands for its best checkpoint, or a model folder."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Audio files, folders of audio, or manifests (NeMo JSONL, and whatever `canter index` reads)."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """A file, or a folder (one that exists, or a name without suffix). A stopped transcription goes on where
    it was when started again with the same output. Without it, transcripts go to stdout."""
    format: Literal["nemo", "txt", "json", "all"] | None = None
    """`nemo`: the manifest with `pred_text`, in its order; `txt`: text; `json`: as Whisper's; `all` needs a
    folder. By default the output's suffix decides (.txt, .json, else nemo), on stdout txt."""
    batch_size: int | None = None
    """Utterances decoded together; by default 64, in encoder batches of at most 1,024 frames (16,384 on a
    GPU)."""
    lang: str | None = None
    """Language of utterances that name none."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU if there is one."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 is faster on a GPU; transcripts may then depend on the batch."""
    max_repeats: int = 3
    """No n-gram of up to 8 tokens may follow itself more often than this; 0: no such guard."""
    longest_seconds: float = 300.0
    """Longer audio is refused (it needs memory by the square of its length)."""
    json: bool = False
    """Print a summary as one JSON object on stdout; needs --output."""


def run(options: Options) -> int:
    if not options.inputs:
        raise ConfigError("nothing to transcribe: name audio files, folders or manifests")
    folder, kinds = destination(options)

    import torch

    from canter.inference.engine import Engine, EngineConfig
    from canter.inference.inputs import read_items
    from canter.inference.transcribe import Transcription, checkpoint_of, transcribe_stream
    from canter.inference.writers import Partial, render, write_results
    from canter.models.checkpoint import load_model

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: this machine has no usable GPU; use --device cpu")
    checkpoint = checkpoint_of(options.model)
    model = load_model(
        checkpoint, device=device, dtype=torch.bfloat16 if options.precision == "bf16" else torch.float32
    )
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{checkpoint} has no tokenizer, so its tokens cannot be read as text")
    languages = tokenizer.languages
    items = read_items(options.inputs, options.lang or (languages[0] if len(languages) == 1 else None))
    results = [Transcription("", error=item.problem) for item in items]

    frames = 16384 if device.startswith("cuda") else 1024
    config = EngineConfig(rows=options.batch_size or 64, frames=frames, max_repeats=options.max_repeats)
    engine = Engine(model, tokenizer.end, config)
    partial = None
    if options.output:
        beside = options.output / "transcripts" if folder else options.output
        partial = Partial(beside.with_name(beside.name + ".partial"), identity(checkpoint, items, options))
        for index, transcription in partial.done.items():
            results[index] = transcription
    resumed = len(partial.done) if partial else 0
    wanted = [
        index
        for index, item in enumerate(items)
        if item.utterance and not (partial and index in partial.done)
    ]
    wanted_utterances = [utterance for index in wanted if (utterance := items[index].utterance)]
    begun = time.perf_counter()
    audio_seconds = 0.0
    try:
        with progress_bar() as progress:
            task = progress.add_task(
                "transcribing", total=sum(u.duration for u in wanted_utterances), rtfx=""
            )
            stream = transcribe_stream(engine, tokenizer, wanted_utterances, options.longest_seconds)
            for number, transcription in stream:
                results[wanted[number]] = transcription
                if partial:
                    partial.add(wanted[number], transcription)
                seconds = wanted_utterances[number].duration
                audio_seconds += seconds if transcription.error is None else 0.0
                rtfx = audio_seconds / (time.perf_counter() - begun)
                progress.update(task, advance=seconds, rtfx=f"RTFx {rtfx:,.0f}")
    except BaseException:
        if partial:
            partial.close(remove=False)
        raise
    seconds = time.perf_counter() - begun
    failed = [(item, result) for item, result in zip(items, results) if result.error is not None]

    if options.output:
        written = write_results(items, results, options.output, kinds, folder)
        assert partial is not None
        partial.close(remove=True)
    else:
        written = []
        sys.stdout.write(render(items, results, kinds[0]))
    counters = engine.counters
    summary = {
        "model": str(checkpoint),
        "utterances": len(items),
        "transcribed": len(items) - len(failed),
        "resumed": resumed,
        "failed": [{"audio_filepath": i.row.get("audio_filepath"), "error": r.error} for i, r in failed],
        "audio_seconds": audio_seconds,
        "seconds": seconds,
        "rtfx": audio_seconds / seconds,
        "useful_rows": counters.useful_rows,
        "mean_rows": counters.mean_rows,
        "counters": asdict(counters),
        "output": [str(path) for path in written],
    }
    if options.json:
        print(json.dumps(summary, ensure_ascii=False, indent=2))
    say(summary)
    return 1 if failed else 0


def destination(options: Options) -> tuple[bool, list[str]]:
    """Whether the output is a folder, and the formats. Raises ConfigError for what does not go together."""
    kind, output = options.format, options.output
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: at least 1")
    if output is None:
        if options.json:
            raise ConfigError("--json prints the summary where the transcripts would go: name an --output")
        if kind == "all":
            raise ConfigError("--format all writes several files: name a folder as --output")
        return False, [kind or "txt"]
    folder = output.is_dir() or not output.suffix
    if kind == "all":
        if not folder:
            raise ConfigError(f"--format all writes several files, but {output} is one: name a folder")
        return True, ["nemo", "txt", "json"]
    return folder, [kind or {".txt": "txt", ".json": "json"}.get(output.suffix, "nemo")]


def identity(checkpoint: Path, items: list[Any], options: Options) -> dict[str, Any]:
    """What makes an unfinished result that of the same transcription."""
    from hashlib import blake2b

    rows = blake2b(digest_size=8)
    for item in items:
        rows.update(json.dumps(item.row, sort_keys=True, ensure_ascii=False).encode())
    weights = checkpoint / "model.safetensors"
    return {
        "model": str(checkpoint.resolve()),
        "weights": int(weights.stat().st_mtime) if weights.exists() else None,
        "items": rows.hexdigest(),
        "lang": options.lang,
        "precision": options.precision,
        "max_repeats": options.max_repeats,
    }


def progress_bar():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} s of audio  {task.fields[rtfx]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def say(summary: dict[str, Any]) -> None:
    """The summary in a few lines on stderr."""
    failed = summary["failed"]
    for entry in failed[:20]:
        print(f"canter: {entry['error']}", file=sys.stderr)
    if len(failed) > 20:
        print(f"canter: ... and {len(failed) - 20} more", file=sys.stderr)
    resumed = f", {summary['resumed']} of them from an earlier start" if summary["resumed"] else ""
    unread = f"; {len(failed)} failed" if failed else ""
    counters = summary["counters"]
    print(
        f"{summary['transcribed']} of {summary['utterances']} transcribed{resumed}{unread}; "
        f"{summary['audio_seconds']:,.0f} s of audio in {summary['seconds']:.1f} s, "
        f"RTFx {summary['rtfx']:,.0f} (features {counters['feature_seconds']:.1f} s, "
        f"encoder {counters['encoder_seconds']:.1f} s, "
        f"decoder {counters['decoder_seconds']:.1f} s at {summary['mean_rows']:.0f} rows)",
        file=sys.stderr,
    )
    for path in summary["output"]:
        print(f"written: {path}", file=sys.stderr)
