"""Measure the paper's claims on one GPU in under nine minutes: `make paper-gpu`.

    python benchmarks/paper_gpu.py [--minutes 8.5] [--lengths TABLE] [--output FOLDER]
    python benchmarks/paper_gpu.py --smoke              # the same parts at toy size on a CPU, in about two minutes

The parts, in this order, each in a process of its own with a limit on its time: the tests that use a GPU; a budget for
a Canary of 1 B parameters; its training with `random` and `balanced`, a minute each (`gpu_training.py`); with `packed`
and the other strategies, a third of that; inference against `transformers` (`gpu_inference.py`); 24/24 against 32/4
(`decoder_shift.py`), and both with drafts of simulated acceptance (`gpu_inference.py`); and `balanced` with compiled
layers, without and with a grid of shapes.

A part that ends, or is stopped at its limit, leaves FOLDER/PART.json at once, with what it had measured, and
FOLDER/PART.log. A second call runs what is missing: parts that had too little time, failed, or were interrupted.
FOLDER/summary.md shows the figures beside their goals, and is printed after every part.

TABLE has `duration` and `tokens`, and is for training; without it lengths are drawn as in `gpu_budget.py`. Inference
takes LibriSpeech's lengths where CANTER_SHARED has them.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from canter.errors import CanterError, ConfigError
from canter.files import write_text

ROOT = Path(__file__).parents[1]
SPEEDUP = 2.5  # goal: audio hours per hour of `balanced` over `random`
MFU = 0.45  # goal: of the measured matrix rate
INFERENCE = 3.0  # goal: RTFx over that of transformers
STRATEGIES = ("random", "balanced", "packed", "bucket_2d", "duration", "bucket_1d")
START = 60.0  # seconds in which a training process builds the model, compiles kernels and warms up
COMPILE = 240.0  # the same with compiled layers
END = 5.0  # seconds in which a stopped process ends before it is killed, and the summary is written
CHILD = """
import pathlib, runpy, sys
from canter.processes import end_with_launcher
end_with_launcher("paper_gpu.py ended")
del sys.argv[0]
sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MACHINE = """
import importlib.util, json, torch
from canter.reporting.machine import describe_machine
device = "cuda" if torch.cuda.is_available() else "cpu"
packages = [name for name in ("transformers", "triton") if importlib.util.find_spec(name)]
print(json.dumps({"kind": device, **describe_machine(device, packages)}))
"""
Record = dict[str, Any]
"""What became of a part: `ended` (complete, stopped or failed), `seconds`, `said` and `result`."""


@dataclass(frozen=True)
class Options:
    output: Path = Path("build/paper-gpu")
    """Folder of the results; a folder that has some is continued."""
    minutes: float = 8.5
    """Minutes of the complete call. A part that does not end in time is stopped."""
    lengths: Path | None = None
    """Index or table with `duration` and `tokens` of the training data (default: drawn)."""
    seconds: float = 60.0
    """Seconds of training with `random` and with `balanced`; a third of them with the other strategies."""
    parts: tuple[str, ...] = ()
    """Run only these parts (default: all)."""
    smoke: bool = False
    """Use toy sizes, on a CPU: to see that it runs."""


@dataclass(frozen=True)
class Part:
    name: str
    script: str
    arguments: tuple[object, ...]
    limit: float
    """Seconds after which it is stopped."""
    least: float
    """Seconds without which it is not started."""

    def done(self, record: Record | None) -> bool:
        """Return True for a record that need not be measured again."""
        if record is None:
            return False
        stopped_by_limit = record["ended"] == "stopped" and record["seconds"] >= self.limit and bool(record["result"])
        return record["ended"] == "complete" or stopped_by_limit


def parts_of(options: Options) -> list[Part]:
    """Return all parts in their order."""
    tiny = ("--device", "cpu", "--tiny", "--probes", 8) if options.smoke else ()
    lengths = (options.lengths.resolve(),) if options.lengths else ()
    budget = ("--budget", (options.output / "raw" / "canary.budget.json").resolve())

    def training(name: str, seconds: float, start: float, *arguments: object, strategies: tuple[str, ...]) -> Part:
        seconds = 0.2 if options.smoke else seconds
        chosen = (*lengths, *tiny, *budget, "--seconds", seconds, *arguments, "--strategies", *strategies)
        return Part(name, "gpu_training.py", chosen, seconds + start, 0.5 * (seconds + start))

    def inference(model: str) -> Part:
        size = ("--smoke",) if options.smoke else ("--seconds", 75)
        return Part(
            f"inference_{model}", "gpu_inference.py", ("--models", model, "--no-ways", "--no-drafts", *size), 90, 45
        )

    drafts = ("--models", "--no-ways", *(("--smoke",) if options.smoke else ("--seconds", 90)))
    shapes: tuple[object, ...] = ("--shapes", "24/24", "32/4", "--repeats", 2)
    if options.smoke:
        shapes = ("--shapes", "2/2", "3/1", "--width", 64, "--clips", 4, "--rows", 2, "--batch", 2, "--repeats", 1)
    rung, backend = options.seconds / 3, ("--backend", "eager") if options.smoke else ()
    return [
        Part("tests", "gpu_tests.py", (), 120, 30),
        training("budget", 0, 2 * START, strategies=()),
        *(training(name, options.seconds, START, strategies=(name,)) for name in STRATEGIES[:2]),
        *(training(name, rung, START, strategies=(name,)) for name in STRATEGIES[2:]),
        *map(inference, ("canary", "cohere", "whisper")),
        Part("decoder_shift", "decoder_shift.py", (*shapes, "--device", "cpu" if options.smoke else "cuda"), 90, 45),
        Part("drafts", "gpu_inference.py", drafts, 90, 45),
        training("compiled", rung, COMPILE, "--compile", *backend, strategies=("balanced",)),
        training("compiled_grid", rung, COMPILE, "--compile", "--grid", *backend, strategies=("balanced",)),
    ]


def main(options: Options) -> int:
    """Return 1 where a part failed. Raises ConfigError without a GPU, and for results of another machine."""
    deadline = time.monotonic() + 60 * options.minutes
    parts, folder = parts_of(options), options.output.resolve()
    if unknown := set(options.parts) - {part.name for part in parts}:
        raise ConfigError(f"no part {min(unknown)!r}; there are {', '.join(part.name for part in parts)}")
    if options.lengths and not options.lengths.exists():
        raise ConfigError(f"{options.lengths}: no such file; --lengths takes an index or a table of lengths")
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "src"), environment.get("PYTHONPATH"))))
    if options.smoke:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    machine = describe(options, environment)
    check_folder(folder, machine)
    for part in parts:
        granted = min(part.limit, deadline - END - time.monotonic())
        chosen = not options.parts or part.name in options.parts
        if not chosen or part.done(record_in(folder, part.name)) or granted < part.least:
            continue
        print(f"== {part.name}: at most {granted:.0f} s", flush=True)
        run(part, granted, folder, environment)
        report(folder, parts, machine)
    found = report(folder, parts, machine)
    return int(any(record["ended"] == "failed" for record in found.values()))


def describe(options: Options, environment: Mapping[str, str]) -> Record:
    """Return the machine and the size of the measurement. In a process of its own, as CUDA keeps memory."""
    told = subprocess.run([sys.executable, "-c", MACHINE], env=environment, capture_output=True, text=True)
    if told.returncode:
        raise ConfigError(f"torch cannot be used: {told.stderr.strip().splitlines()[-1]}")
    machine = json.loads(told.stdout.splitlines()[-1])
    if machine["kind"] != "cuda" and not options.smoke:
        raise ConfigError("torch finds no GPU; --smoke runs the same parts at toy size on a CPU")
    lengths = options.lengths.name if options.lengths else "drawn"
    return machine | {"smoke": options.smoke, "lengths": lengths, "seconds": options.seconds}


def check_folder(folder: Path, machine: Record) -> None:
    """Note the machine in a new folder. Raises ConfigError for a folder of another machine, size or lengths."""
    path = folder / "machine.json"
    if not path.exists():
        write_text(path, json.dumps(machine, indent=1) + "\n")
        return
    known = json.loads(path.read_text(encoding="utf-8"))
    for name in ("device", "torch", "smoke", "lengths", "seconds"):
        if known.get(name) != machine[name]:
            raise ConfigError(
                f"{folder} holds figures for {name} {known.get(name)}, here it is {machine[name]}; name another "
                "--output, or remove the folder"
            )


def run(part: Part, limit: float, folder: Path, environment: Mapping[str, str]) -> None:
    """Run a part for at most ``limit`` seconds and write its record, also where this process is told to stop."""
    raw, log = folder / "raw" / f"{part.name}.json", folder / f"{part.name}.log"
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.unlink(missing_ok=True)
    command = [sys.executable, "-c", CHILD, ROOT / "benchmarks" / part.script, *part.arguments, "--json", raw]
    with log.open("wb") as file:
        began, ended = time.monotonic(), "stopped"
        child = subprocess.Popen(
            [*map(str, command)], stdout=file, stderr=file, cwd=ROOT, env=dict(environment), start_new_session=True
        )
        try:
            ended = "failed" if child.wait(limit) else "complete"
        except subprocess.TimeoutExpired:
            pass
        finally:
            seconds = time.monotonic() - began
            stop(child)
            keep(part, folder, record_of(ended, seconds, child.returncode, raw, log))


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(END / 2)


def record_of(ended: str, seconds: float, status: int, raw: Path, log: Path) -> Record:
    result = json.loads(raw.read_text(encoding="utf-8")) if raw.exists() else None
    said = "complete"
    if ended == "stopped":
        said = f"stopped after {seconds:.0f} s"
    elif ended == "failed":
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = f"failed with status {status}: {next(filter(None, reversed(lines)), 'no output')[:200]}"
    return {"ended": ended, "seconds": seconds, "said": said, "result": result}


def keep(part: Part, folder: Path, record: Record) -> None:
    """Write a record, unless it has no result and an earlier one has."""
    earlier = record_in(folder, part.name)
    if record["result"] or not (earlier and earlier["result"]):
        write_text(folder / f"{part.name}.json", json.dumps(record, indent=1) + "\n")


def record_in(folder: Path, name: str) -> Record | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# -- the summary --


def report(folder: Path, parts: list[Part], machine: Record) -> dict[str, Record]:
    """Write and print the summary; return the records of the parts that have one."""
    found = {part.name: record for part in parts if (record := record_in(folder, part.name))}
    text = "\n".join(summary(found, [part.name for part in parts], machine)) + "\n"
    write_text(folder / "summary.md", text)
    print(text, flush=True)
    return found


def summary(found: dict[str, Record], names: list[str], machine: Record) -> Iterator[str]:
    """Yield the lines of the summary: figures beside their goals, training, inference, and the parts."""
    rungs = {name: row for name in names for row in (result_of(found, name).get("strategies") or {}).values()}
    yield "# The paper's claims on one GPU"
    yield ""
    if machine["smoke"]:
        yield "Toy sizes on a CPU: these figures only show that it runs, and compare with no goal."
    else:
        versions = f"torch {machine['torch']}, transformers {machine.get('transformers', 'missing')}"
        yield f"{machine['device']}, {versions}, {machine['date']}; training lengths: {machine['lengths']}."
    rates = [result["matrix_rate"] for name in names if "matrix_rate" in (result := result_of(found, name))]
    if rates:
        yield f"Rate of products of square matrices: {median(rates) / 1e12:,.3g} TFLOPs per second."
    goals = [] if machine["smoke"] else goal_rows(found, rungs)
    yield from table("", ("figure", "goal", "measured", "reached"), goals)
    yield from table(
        "Training of a Canary of 1 B parameters",
        ("part", "audio h/h", "against random", "MFU", "MFU without padding", "memory filled", "out of memory",
         "mean batch", "padded audio", "distinct shapes an epoch", "trained for"),
        [training_row(name, row, rungs.get("random")) for name, row in rungs.items()],
    )  # fmt: skip
    yield from table(
        "Inference",
        ("shape", "engine", "RTFx", "against transformers"),
        [row for name in names if name.startswith("inference_") for row in inference_rows(result_of(found, name))],
    )
    yield from table(
        "24/24 against 32/4",
        ("encoder/decoder layers", "way", "RTFx", "against the first"),
        [
            (row["shape"], row["way"], f"{row['rtfx']:,.0f}", f"{row['speedup']:.2f}x")
            for row in result_of(found, "decoder_shift").get("rows", ())
        ],
    )
    yield from table(
        "Several tokens a decoder step, with drafts of simulated acceptance (0: without drafts)",
        ("encoder/decoder layers", "accepted", "steps a token", "decoder seconds", "seconds"),
        [
            (
                row["shape"],
                f"{row['acceptance']:.1f}",
                f"{row['steps_per_token']:.2f}",
                f"{row['decoder_seconds']:.2f}",
                f"{row['seconds']:.2f}",
            )
            for row in result_of(found, "drafts").get("drafts", ())
        ],
    )
    states = [(name, found[name]["said"] if name in found else "not run yet") for name in names]
    spent = [f"{found[name]['seconds']:.0f} s" if name in found else "" for name in names]
    yield from table("Parts", ("part", "state", "took"), [(*row, took) for row, took in zip(states, spent)])


def result_of(found: dict[str, Record], name: str) -> Record:
    return found.get(name, {}).get("result") or {}


def goal_rows(found: dict[str, Record], rungs: dict[str, Record]) -> list[tuple[str, ...]]:
    """Return (figure, goal, measured, reached); figures that are missing are named as such."""
    tests = result_of(found, "tests")
    rows = [("tests on the GPU", "none fails", "not measured", "")]
    if tests:
        counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped"))
        rows = [
            (
                "tests on the GPU",
                "none fails",
                counts,
                verdict(tests["passed"] > tests["skipped"] and not tests["failed"]),
            )
        ]

    def row(figure: str, goal: float, value: float | None, form: str) -> tuple[str, ...]:
        measured = "not measured" if value is None else form.format(value)
        return figure, "at least " + form.format(goal), measured, "" if value is None else verdict(value >= goal)

    balanced, random = rungs.get("balanced"), rungs.get("random")
    speedup = balanced["audio_hours_per_hour"] / random["audio_hours_per_hour"] if balanced and random else None
    rows.append(row("audio hours per hour, `balanced` over `random`", SPEEDUP, speedup, "{:.2f}x"))
    mfu = balanced["mfu"] if balanced else None
    rows.append(row("MFU of `balanced`, of the measured matrix rate", MFU, mfu, "{:.1%}"))
    if compiled := [rungs[name]["mfu"] for name in ("compiled", "compiled_grid") if name in rungs]:
        rows.append(row("the same with compiled layers, the better", MFU, max(compiled), "{:.1%}"))
    for name, shape in (("canary", "Canary flash"), ("cohere", "Cohere"), ("whisper", "Whisper turbo")):
        times = times_transformers(result_of(found, f"inference_{name}"))
        rows.append(row(f"RTFx of {shape}'s shape over transformers", INFERENCE, times.get("canter"), "{:.2f}x"))
    return rows


def verdict(reached: bool) -> str:
    return "yes" if reached else "no"


def training_row(name: str, row: Record, random: Record | None) -> tuple[str, ...]:
    times = f"{row['audio_hours_per_hour'] / random['audio_hours_per_hour']:.2f}x" if random else "–"
    shapes = f"{row['distinct_shapes']:,} of {row['micro_batches_an_epoch']:,}"
    if row["grid"] != [1, 1]:
        shapes += f", grid {row['grid'][0]} x {row['grid'][1]}"
    return (
        name, f"{row['audio_hours_per_hour']:,.0f}", times, f"{row['mfu']:.1%}", f"{row['mfu_without_padding']:.1%}",
        f"{row['memory_filled']:.1%}", str(row["out_of_memory"]), f"{row['mean_batch']:,.1f}",
        f"{row['padded_audio']:.1%}", shapes, f"{row['seconds']:.0f} s",
    )  # fmt: skip


def times_transformers(result: Record) -> dict[str, float]:
    """Return each engine's RTFx over that of transformers, where both were measured."""
    rtfx = {row["engine"]: row["rtfx"] for row in result.get("engines", ())}
    theirs = rtfx.get("transformers")
    return {engine: value / theirs for engine, value in rtfx.items()} if theirs else {}


def inference_rows(result: Record) -> list[tuple[str, ...]]:
    times = times_transformers(result)
    return [
        (row["model"], row["engine"], f"{row['rtfx']:,.0f}",
         f"{times[row['engine']]:.2f}x" if row["engine"] in times else "–")
        for row in result.get("engines", ())
    ]  # fmt: skip


def table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a Markdown table under a heading, or nothing for no rows."""
    if not rows:
        return
    yield ""
    if title:
        yield from (f"## {title}", "")
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(tyro.cli(Options, description=__doc__)))
    except CanterError as error:
        sys.exit(f"paper_gpu: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
