"""The same steps whoever computes them, and memory that runs out, on real processes and synthesised speech.

    python benchmarks/elastic.py ranks -o FOLDER [--steps 60] [--json FILE]
    python benchmarks/elastic.py cuts  -o FOLDER [--steps 24] [--ranks 1] [--json FILE]

ranks: one run goes through 1, 2, 4 and 1 ranks (torchrun, gloo) with 0, 2, 4 and 0 workers each, ended by SIGTERM in
between; its rows must be those of an undisturbed run, each utterance once an epoch, the losses those but for rounding:
what rounding alone does is told by a third run, whose only difference are two threads. cuts: a budget 25 % over the
truth, under a cap on the process's memory (RLIMIT_DATA); every step must complete, and the losses be those of a run
without a cap that takes the same steps. --json FILE gets the figures under the part's name; those of others stay.
"""

import dataclasses
import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from resilience import command, keep, lines, newest, reached, steps_of
from safetensors.torch import load_file

from canter.demo.synthesis import synthesise
from canter.planning.budget import Budget
from canter.runtime import MMAP_THRESHOLD, resident, tensor_bytes

STAGES = ((1, 0), (2, 2), (4, 4), (1, 0))  # ranks, workers of each
OVER = 1.25  # the budget, as a multiple of the truth
ROOM = 250e6  # bytes of a micro-batch by that budget, weights and optimiser state left out
LARGER = shlex.split("""
    --model.encoder-layers 4 --model.decoder-layers 2 --model.width 128 --model.subsampling-channels 32
    --vocab-size 200 --precision float32 --threads 1 --workers 0 --batch-seconds None --batching-window 60
    --micro-batches-per-step 2 --loss.ctc-warmup 0.1
""")


@dataclass(frozen=True)
class Options:
    what: tyro.conf.Positional[Literal["ranks", "cuts"]]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for corpus and runs."""
    steps: int = 60
    """Steps of the run."""
    ranks: int = 1
    """Processes of the run whose memory is limited."""
    json: Path | None = None
    """File for the figures."""


def compared(folder: Path, other: Path) -> dict[str, Any]:
    """Return steps and weights of two runs side by side."""
    ours, theirs = steps_of(folder), steps_of(other)
    a, b = (load_file(newest(run) / "model.safetensors") for run in (folder, other))
    differences = [abs(x - y) / abs(y) for (_, x), (_, y) in zip(ours, theirs, strict=True)]
    change = sum(float((a[name] - b[name]).square().sum()) for name in b) ** 0.5
    return {
        "steps": len(ours),
        "rows_identical": [rows for rows, _ in ours] == [rows for rows, _ in theirs],
        "largest_loss_difference": float(f"{max(differences):.2g}"),
        "loss_difference_of_the_first_ten_steps": float(f"{max(differences[:10]):.2g}"),
        "weights_difference": float(f"{change / sum(float(t.square().sum()) for t in b.values()) ** 0.5:.2g}"),
        "last_loss": [round(ours[-1][1], 6), round(theirs[-1][1], 6)],
    }


# -- ranks and workers --


def ranks(options: Options) -> dict[str, Any]:
    corpus = synthesise(options.output / "corpus", utterances=200, test_utterances=6, workers=1)
    straight, rounded, elastic = (options.output / name for name in ("straight", "two-threads", "elastic"))
    more = ["--steps", str(options.steps), "--micro-batches-per-step", "4", "--batching-window", "100"]
    more += ["--valid", str(corpus.test_manifest), "--valid-utterances", "2", "--valid-every", "20"]
    for folder, other in ((straight, []), (rounded, ["--threads", "2"]), (elastic, None)):
        shutil.rmtree(folder, ignore_errors=True)
        if other is not None:
            run = command(1, corpus.train_manifest, folder, *more, "--workers", "0", *other)
            subprocess.run(run, check=True, capture_output=True)
    stages = []
    for number, (count, workers) in enumerate(STAGES):
        stop = options.steps * (number + 1) // len(STAGES)
        run = command(count, corpus.train_manifest, elastic, *more, "--workers", str(workers))
        since, began = time.time(), len(steps_of(elastic))
        with subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and (reached(elastic, since) < stop or stop == options.steps):
                time.sleep(0.02)
            at = time.monotonic()
            process.send_signal(signal.SIGTERM)
            said = process.communicate()[1]
        logged = steps_of(elastic)
        stages.append({"ranks": count, "workers": workers, "from": began, "to": len(logged)})
        stages[-1]["saved"] = newest(elastic).name
        stages[-1]["seconds_to_end"] = round(time.monotonic() - at, 1)
        if "Traceback" in said and count == 1:  # torchrun itself ends by one
            raise SystemExit(said)
    epochs: dict[int, Counter] = {}
    for row in lines(elastic / "utterances.jsonl"):
        epochs.setdefault(row["epoch"], Counter()).update(one for some in row["rows"] for one in some)
    whole = [epochs[epoch] for epoch in sorted(epochs)[:-1]]
    return {
        "stages": stages,
        **compared(elastic, straight),
        "utterances": 200,
        "whole_epochs": len(whole),
        "each_exactly_once": all(seen == Counter(range(200)) for seen in whole)
        and max(epochs[max(epochs)].values()) == 1,
        "by_rounding_alone (two threads)": compared(rounded, straight),
    }


# -- memory that runs out --


def child(cap: float, tightenings: list[list[float]], arguments: list[str]) -> int:
    """As 'canter ARGUMENTS', where training may take ``cap`` bytes, weights included, and learns of these
    tightenings at its start."""
    from canter.cli.main import main
    from canter.training.loop import Trainer

    train = Trainer.train

    def capped(self: Trainer) -> Any:
        self.upcoming.tightenings = tightenings
        if cap:
            held = resident("VmData") - tensor_bytes([*self.model.parameters(), *self.model.buffers()])
            resource.setrlimit(resource.RLIMIT_DATA, (int(held + cap), resource.RLIM_INFINITY))
        return train(self)

    Trainer.train = capped
    return main(arguments)


def cuts(options: Options) -> dict[str, Any]:
    corpus = synthesise(options.output / "corpus", utterances=200, test_utterances=6, workers=1)
    budget = over_the_truth(options.output, corpus.train_manifest)
    start = [sys.executable]
    if options.ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)]
    tightenings: list[list[float]] = []
    capped, uncut = (options.output / f"{name}-{options.ranks}" for name in ("capped", "uncut"))
    seconds = {}
    for folder, cap in ((capped, budget.limit_bytes / OVER), (uncut, 0.0)):
        shutil.rmtree(folder, ignore_errors=True)
        more = ["--steps", str(options.steps), "--budget", str(options.output / "budget.json")]
        arguments = ["train", "--manifest", str(corpus.train_manifest), "--output", str(folder), *LARGER, *more]
        at = time.monotonic()
        told = json.dumps([cap, tightenings, arguments])
        done = subprocess.run([*start, __file__, "--child", told], capture_output=True, text=True)
        seconds[folder.name] = round(time.monotonic() - at, 1)
        if done.returncode:
            raise SystemExit(done.stderr)
        state = json.loads((newest(folder) / "training" / "state.json").read_text(encoding="utf-8"))
        tightenings = tightenings or state["tightenings"]
    events = [row for row in lines(capped / "metrics.jsonl") if row["kind"] == "event"]
    return {
        "ranks": options.ranks,
        "budget_bytes": round(budget.limit_bytes),
        "cap_bytes": round(budget.limit_bytes / OVER),
        "micro_batches": sum(len(rows) for rows, _ in steps_of(capped)),
        "cuts": len(events),
        "ways": Counter(f"{e['parts']} x {e['decoder_parts']}, recompute {e['recompute']}" for e in events),
        "steps_with_cuts": sorted({e["step"] for e in events}),
        "limits": sorted({round(limit) for *_, limit in tightenings}, reverse=True),
        "first_window_with_each": [[int(e), int(w)] for e, w, _ in tightenings],
        **compared(capped, uncut),
        "skipped": len(lines(capped / "skipped.jsonl")),
        "seconds": seconds,
    }


def over_the_truth(folder: Path, manifest: Path) -> Budget:
    """Return a budget measured by a short run, limited to ROOM, so that a process with ROOM / 1.25 has too little."""
    path, run = folder / "budget.json", folder / "measuring"
    if not path.exists():
        shutil.rmtree(run, ignore_errors=True)
        arguments = ["train", "--manifest", str(manifest), "--output", str(run), *LARGER, "--steps", "1"]
        subprocess.run([sys.executable, "-m", "canter", *arguments], check=True, capture_output=True)
        measured = Budget.load(run / "budget.json")
        heap = {"mmap_threshold": MMAP_THRESHOLD}  # freed memory goes back at once, as 'canter tune' has it
        limit = measured.fixed_bytes + ROOM
        dataclasses.replace(measured, limit_bytes=limit, measured_on=dict(measured.measured_on) | heap).save(path)
    return Budget.load(path)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(*json.loads(sys.argv[2])))
    options = tyro.cli(Options, description=__doc__)
    options.output.mkdir(parents=True, exist_ok=True)
    result = {"ranks": ranks, "cuts": cuts}[options.what](options)
    keep(result, options.what if options.what == "ranks" else f"cuts, ranks: {options.ranks}", options.json)


if __name__ == "__main__":
    main()
