"""Measure the claims of the paper (arXiv 2503.05931), and write the tables and figures of docs/paper.md.

    CANTER_SHARED=... python benchmarks/paper.py [PART ...] [-o build/paper] [--whisper MODEL --speech MANIFEST ...]
    python benchmarks/paper.py --publish    # results to benchmarks/results, tables and figures to docs/paper.md

Parts: `padding` (a minute), `ranks` (minutes), `time-to-wer` and `real-speech` (hours: the time that each strategy
needs to the same WER), `depth` (hours: deep and shallow decoders from scratch). Each is a script of this folder in a
process pinned to a core: timed parts share one core, one after the other, and `depth`, whose accuracy is no matter of
time, has another one. Every finished run is kept, and the same command continues where it stopped. `real-speech` needs
a Whisper and manifests of speech; without them it is left out, with a message.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from canter.cli.progress import say
from canter.errors import CanterError, ConfigError
from canter.files import write_text
from canter.reporting.figures import COLORS, INK, styled

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
PARTS = ("padding", "ranks", "time-to-wer", "real-speech", "depth")
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLE_NAMES = re.compile(r"<!-- table: ([\w-]+) -->")
REAL = "--minutes 0.5 1 2 4 --batch-seconds 48 --rates 0.1 0.06 --timed 30"
REAL_ARMS = ("random", "bucket_1d, 24 s", "bucket_2d, 24 s", "balanced, 24 s", "balanced, 12 s")
TINY = "--utterances 200 --test-utterances 30 --width 32 --seeds 1"
WAYS = {"released": "hidden states cached, batches wait", "engine": "Canter's engine"}
POLL = 2.0  # seconds between looks at the results of running parts


def below_shared(path: str) -> Path | None:
    """Return a path below the folder that CANTER_SHARED names, if it is there."""
    shared = os.environ.get("CANTER_SHARED")
    return Path(shared, path) if shared and Path(shared, path).exists() else None


WHISPER = below_shared("models/whisper-tiny.en")
SPEECH = tuple(
    path
    for name in ("an4", "librivox_mini", "commonvoice61_sample")
    if (path := below_shared(f"data/speech/{name}/manifest.jsonl"))
)


@dataclass(frozen=True)
class Options:
    parts: tyro.conf.Positional[tuple[str, ...]] = PARTS
    """Parts to run."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("build/paper")
    """Folder for runs and results."""
    lengths: str = "synthetic"
    """Lengths of `padding` and `ranks`: a file, "real" (drawn from the tables below CANTER_SHARED) or "synthetic"."""
    budget: Path | None = None
    """Budget of `padding` and `ranks` (default: the analytic one of canary-1b on 80 GB)."""
    whisper: Path | None = WHISPER
    """Whisper that `real-speech` fine-tunes (default: whisper-tiny.en below CANTER_SHARED)."""
    speech: tuple[Path, ...] = SPEECH
    """Manifests of speech for `real-speech` (default: those below CANTER_SHARED)."""
    quick: bool = False
    """Run every part at toy size, in a few minutes; the results mean nothing."""
    publish: bool = False
    """Run nothing: copy results from --output to benchmarks/results, and write docs/paper.md's tables and figures."""


@dataclass(frozen=True)
class Part:
    """A command and its result.

    runs: number of training runs that it makes at most. timed: its result is a time, so it needs a core of its own.
    """

    name: str
    command: tuple[str, ...]
    result: Path
    runs: int = 1
    timed: bool = True


def parts_of(options: Options) -> Iterator[Part]:
    """Yield the parts to run. Raises ConfigError for an unknown name."""
    if unknown := [name for name in options.parts if name not in PARTS]:
        raise ConfigError(f"no part named {unknown[0]!r}; there are {', '.join(PARTS)}")
    output, quick = options.output, options.quick
    lengths = output / "lengths.parquet"
    budget = ("--budget", str(options.budget)) if options.budget else ()
    real = ("--whisper", str(options.whisper), "--speech", *map(str, options.speech))
    timed = [*TINY.split(), *["--minutes", "0.05", "0.1", "--layers", "1", "1", "--timed", "3"]] if quick else []
    depth = [*TINY.split(), *["--steps", "6", "--shapes", "2/2", "3/1", "--repeats", "1"]] if quick else []
    for name in PARTS:
        folder, result = output / name, output / f"{name}.json"
        if name not in options.parts:
            continue
        if name == "padding":
            command = (sys.executable, "-m", "canter", "compare", str(lengths), "--json", "--min-steps", "1")
            yield Part(name, (*command, *budget), result)
        elif name == "ranks":
            small = ("--smoke",) if quick else ()
            yield Part(name, (*script("ranks"), "-o", str(result), "--lengths", str(lengths), *budget, *small), result)
        elif name == "time-to-wer":
            command = (*script("time_to_wer"), "-o", str(folder), "--json", str(result), *timed)
            yield Part(name, command, result, 2 * 4 if quick else 3 * 3 * 4)
        elif name == "real-speech" and options.whisper and options.speech:
            command = (*script("time_to_wer"), "-o", str(folder), "--json", str(result), *real, *REAL.split(), *timed)
            command += ("--arms", *REAL_ARMS)
            yield Part(name, command, result, 2 * 5 if quick else 3 * 4 * 5)
        elif name == "real-speech":
            say("real-speech is left out: it takes --whisper MODEL and --speech MANIFEST ...")
        else:
            command = (*script("decoder_depth"), "-o", str(folder), "--json", str(result), *depth)
            yield Part(name, command, result, 2 if quick else 18, timed=False)


def script(name: str) -> tuple[str, str]:
    """Return the command line of a script of this folder."""
    return sys.executable, str(HERE / f"{name}.py")


def write_lengths(source: str, path: Path, count: int) -> None:
    """Write the table of lengths that `padding` and `ranks` share, unless it is there."""
    from ranks import draw_lengths

    if not path.exists():
        index = draw_lengths(source, count)
        tokens = np.asarray(index.tokens, np.int64)
        pq.write_table(pa.table({"duration": np.asarray(index.seconds), "num_tokens": tokens}), path)


def finished_runs(part: Part) -> int:
    """Return the number of training runs in a part's result so far."""
    try:
        return len(json.loads(part.result.read_text(encoding="utf-8")).get("runs", ()))
    except (OSError, ValueError):
        return 0


def run_part(part: Part, core: int, progress: Progress) -> None:
    """Run a part in a process pinned to a core. Raises CanterError if it fails."""
    task = progress.add_task(part.name, total=part.runs, completed=finished_runs(part))
    log = part.result.with_suffix(".log")
    pin = {"preexec_fn": lambda: os.sched_setaffinity(0, {core})} if hasattr(os, "sched_setaffinity") else {}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with open(log, "ab") as out, open(part.result.with_suffix(".out"), "wb") as told:
        process = subprocess.Popen(part.command, stdout=told, stderr=out, env=os.environ | threads, **pin)
        while process.poll() is None:
            time.sleep(POLL)
            progress.update(task, completed=finished_runs(part))
    if process.returncode:
        raise CanterError(f"{part.name} ended with status {process.returncode}; its messages are in {log}")
    if part.name == "padding":
        write_text(part.result, told_by(part))
    progress.update(task, completed=part.runs)


def told_by(part: Part) -> str:
    """Return what a part printed on stdout."""
    return part.result.with_suffix(".out").read_text(encoding="utf-8")


def run(options: Options) -> None:
    """Run the parts that are wanted, timed ones on one core and the others on the next."""
    parts = list(parts_of(options))
    options.output.mkdir(parents=True, exist_ok=True)
    if {"padding", "ranks"} & {part.name for part in parts}:
        write_lengths(options.lengths, options.output / "lengths.parquet", 3000 if options.quick else 1_000_000)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 1]
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(2) as pool:
        queues = [[part for part in parts if part.timed], [part for part in parts if not part.timed]]
        if len(cores) == 1:
            queues = [parts]
        running = [
            pool.submit(lambda queue=queue, core=core: [run_part(part, core, progress) for part in queue])
            for queue, core in zip(queues, reversed(cores))
        ]
        for one in running:
            one.result()
    say(f"results are in {options.output}; --publish makes docs/paper.md's tables and figures of them")


# -- tables and figures of docs/paper.md --


def newest(part: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest committed result of a part and its file; None without one."""
    files = sorted(RESULTS.glob(f"*-paper-{part}.json"))
    return (files[-1], json.loads(files[-1].read_text(encoding="utf-8"))) if files else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose others are numbers."""
    lines = [" | ".join(head), "---|" + "---:|" * (len(head) - 1), *(" | ".join(row) for row in rows)]
    return "\n".join(f"|{line}" if line.startswith("---") else f"| {line} |" for line in lines) + "\n"


def spread(values: Sequence[float | None], digits: int = 1, scale: float = 1.0) -> str:
    """Return the mean of the values and their range, or how many are missing."""
    known = [value * scale for value in values if value is not None]
    if len(known) < len(values) or not known:
        return f"not reached ({len(values) - len(known)} of {len(values)})" if values else "-"
    mean = f"{np.mean(known):,.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):,.{digits}f} to {max(known):,.{digits}f})"


def padding_table(result: dict[str, Any]) -> str:
    rows = [
        [r["name"], f"{r['padded_audio']:.1%}", f"{r['padded_compute']:.1%}", f"{r['mean_batch']:.0f}",
         f"{r['memory_filled']:.0%}", f"{r['waiting']:.3f}", f"{r['speed']:.2f}x"]
        for r in result["rows"]
    ]  # fmt: skip
    return table(
        ["strategy", "padded audio", "padded compute", "mean batch", "memory filled", "waiting", "speed"], rows
    )


def time_table(result: dict[str, Any]) -> str:
    """Return minutes to each WER and speed-ups; then updates and audio to the lowest."""
    rates = [f"{rate:g}" for rate in result["options"]["rates"]]
    head = ["strategy", *(f"minutes to {float(rate):.0%} WER" for rate in rates)]
    head += [f"speed at {float(rate):.0%}" for rate in rates]
    rows = []
    for arm, one in result["summary"].items():
        minutes = [spread(one["seconds_to"][rate], 1, 1 / 60) for rate in rates]
        rows.append([f"`{arm}`", *minutes, *(spread(one["speed_up"][rate], 2) for rate in rates)])
    return table(head, rows)


def effort_table(result: dict[str, Any]) -> str:
    """Return updates and audio to a WER, padding, and predicted and measured audio hours an hour."""
    rate = f"{result['options']['rates'][0]:g}"
    head = ["strategy", f"updates to {float(rate):.0%} WER", f"hours of audio to {float(rate):.0%}", "audio a step, s"]
    head += ["padding", "audio hours an hour, measured", "predicted"]
    rows = []
    for arm, one in result["summary"].items():
        mine = [row for row in result["runs"] if row["arm"] == arm]
        measured = sum(row["audio_hours"] for row in mine) / (sum(row["seconds"] for row in mine) / 3600)
        means = [float(np.mean([row[key] for row in mine])) for key in ("audio_a_step", "padding")]
        rows.append(
            [f"`{arm}`", spread(one["steps_to"][rate], 0), spread(one["audio_hours_to"][rate]), f"{means[0]:.1f}",
             f"{means[1]:.1%}", f"{measured:.0f}", f"{result['predicted'][arm]['speed']:.0f}"]
        )  # fmt: skip
    return table(head, rows)


def wer_table(result: dict[str, Any]) -> str:
    """Return the mean WER of each strategy at each length."""
    minutes = result["options"]["minutes"]
    rows = []
    for arm in result["summary"]:
        cells = []
        for length in minutes:
            wers = [row["wer"] for row in result["runs"] if (row["arm"], row["minutes"]) == (arm, length)]
            cells.append(spread(wers, 1, 100) if wers else "-")
        rows.append([f"`{arm}`", *cells])
    return table(["WER, %, after minutes", *(f"{length:g}" for length in minutes)], rows)


def depth_table(result: dict[str, Any]) -> str:
    """Return the WER of each shape by attention only, parameters and step time."""
    parameters = {row["shape"]: row["parameters"] for row in result["decoding"]}
    rows = [
        [one["shape"], f"{parameters[one['shape']] / 1e6:.2f} M", f"{one['steps']:,}", *accuracy_cells(one),
         f"{one['seconds_a_step']:.3f}"]
        for one in result["accuracy"]
    ]  # fmt: skip
    return table(["encoder/decoder layers", "parameters", "updates", *ACCURACY, "seconds a step"], rows)


def joint_table(result: dict[str, Any]) -> str:
    """Return the WER of each shape by attention and CTC together, and the cross-entropy with teacher forcing."""
    rows = [
        [one["shape"], f"{one['steps']:,}", *accuracy_cells(one["joint"]), spread(one["token_loss"], 3)]
        for one in result["accuracy"]
    ]
    return table(["encoder/decoder layers", "updates", *ACCURACY, "cross-entropy a token"], rows)


ACCURACY = ("WER", "of each seed", "difference, points (95 %)")


def accuracy_cells(one: dict[str, Any]) -> list[str]:
    """Return the cells of `ACCURACY`."""
    gap = one.get("difference")
    low, high = (f"{100 * gap[end]:+.2f}" for end in ("low", "high")) if gap else ("", "")
    each = ", ".join(f"{wer:.1%}" for wer in one["wer_of_seeds"])
    return [f"{one['wer']:.2%}", each, f"{100 * gap['wer']:+.2f} ({low} to {high})" if gap else ""]


def decoding_table(result: dict[str, Any]) -> str:
    rows = [
        [one["shape"], WAYS[one["way"]], f"{one['encoder_seconds']:.2f}", f"{one['decoder_seconds']:.2f}",
         f"{one['rtfx']:,.0f}", f"{one['speedup']:.2f}x"]
        for one in result["decoding"]
    ]  # fmt: skip
    return table(["encoder/decoder layers", "way", "encoder, s", "decoder, s", "RTFx", "speed"], rows)


TABLES = {
    "padding": ("padding", padding_table),
    "time": ("time-to-wer", time_table),
    "effort": ("time-to-wer", effort_table),
    "wer": ("time-to-wer", wer_table),
    "real-time": ("real-speech", time_table),
    "real-effort": ("real-speech", effort_table),
    "real-wer": ("real-speech", wer_table),
    "depth": ("depth", depth_table),
    "depth-joint": ("depth", joint_table),
    "decoding": ("depth", decoding_table),
}


def with_tables(page: str) -> str:
    """Return a page whose tables between `<!-- table: NAME -->` and `<!-- end -->` are those of the newest results."""

    def made(match: re.Match[str]) -> str:
        part, make = TABLES[match[2]]
        found = newest(part)
        if found is None:
            return match[0]
        path, result = found
        return f"{match[1]}\n{make(result)}\n[Result](../benchmarks/results/{path.name})\n\n{match[3]}"

    return TABLE.sub(made, page)


def publish(options: Options) -> None:
    """Copy finished results, and write the page's tables and figures."""
    for name in PARTS:
        result = options.output / f"{name}.json"
        if result.exists():
            write_text(RESULTS / f"{date.today().isoformat()}-paper-{name}.json", result.read_text(encoding="utf-8"))
    page = DOCS / "paper.md"
    write_text(page, with_tables(page.read_text(encoding="utf-8")))
    draw_figures()


def draw_figures() -> None:
    """Draw the figures of docs/paper.md from the newest results."""
    from time_to_wer import draw_wer

    drawn = {"padding": draw_padding, "depth": draw_depth}
    for part in ("time-to-wer", "real-speech"):
        drawn[part] = lambda result: draw_wer(result["runs"], list(result["summary"]), result["options"]["minutes"])
    for part, draw in drawn.items():
        if found := newest(part):
            draw(found[1]).savefig(DOCS / "images" / f"paper-{part}.svg", facecolor="white")


@styled
def draw_padding(result: dict[str, Any]) -> Figure:
    """Return a figure of the fraction of compute that each strategy spends on padding."""
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    axes = figure.subplots()
    rows = result["rows"][::-1]
    bars = axes.barh([row["name"] for row in rows], [row["padded_compute"] for row in rows], color=COLORS[0])
    axes.bar_label(bars, [f"{row['padded_compute']:.1%}" for row in rows], padding=4)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="compute spent on padding")
    axes.grid(axis="y", visible=False)
    axes.tick_params(length=0)
    return figure


@styled
def draw_depth(result: dict[str, Any]) -> Figure:
    """Return a figure of the WER of each shape by two ways of decoding, a point for each seed, and of its decoding
    time."""
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    shapes = list(dict.fromkeys(row["shape"] for row in result["decoding"]))
    most = max(row["steps"] for row in result["accuracy"])
    mine = [row for row in result["accuracy"] if row["steps"] == most]
    places = np.arange(len(shapes))
    for offset, color, name in ((-0.2, COLORS[0], "attention"), (0.2, COLORS[3], "attention and CTC")):
        rows = [row if name == "attention" else row["joint"] for row in mine]
        left.bar(places + offset, [row["wer"] for row in rows], 0.38, color=color, label=name)
        for place, row in zip(places + offset, rows):
            left.plot([place] * len(row["wer_of_seeds"]), row["wer_of_seeds"], "o", color=INK, markersize=3)
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    highest = max(max(row["wer_of_seeds"]) for row in mine)
    left.set(title=f"WER after {most:,} updates", ylim=(0, 1.35 * highest))  # room for the legend
    for offset, color, way in ((-0.2, COLORS[1], "released"), (0.2, COLORS[2], "engine")):
        seconds = [row["decoder_seconds"] for row in result["decoding"] if row["way"] == way]
        right.bar(places + offset, seconds, 0.38, color=color, label=WAYS[way])
    right.set(title="decoder, seconds for the test set")
    for axes in (left, right):
        axes.legend(loc="upper left" if axes is left else "upper right")
        axes.set(xticks=places, xticklabels=shapes, xlabel="encoder/decoder layers")
        axes.grid(axis="x", visible=False)
        axes.tick_params(length=0)
    return figure


if __name__ == "__main__":
    try:
        options = tyro.cli(Options, description=__doc__)
        publish(options) if options.publish else run(options)
    except CanterError as error:
        sys.exit(f"paper.py: {error}")
