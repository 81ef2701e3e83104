"""Compare the speed of two source trees over the public API: planning, decoding, and a training step.

    python benchmarks/paired.py BEFORE [AFTER] [-o RESULT.json]

BEFORE and AFTER are ``src`` folders of two checkouts (AFTER: this one's). Each tree runs in a process of its own, and
the two take turns, so that a slow moment of the machine affects both alike. Figures are the ratios AFTER / BEFORE of
the times of a round: their median, and the range that holds half of them. The default sizes take about three minutes
on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PARTS = {
    "planning": """
    rng = np.random.default_rng(0)
    seconds = rng.gamma(2.5, 4.0, options["utterances"]).clip(0.5, 40).astype(np.float32)
    index = canter.LengthIndex(seconds, (3.5 * seconds + rng.integers(3, 12, len(seconds))).astype(np.int64))
    budget = canter.Budget.from_batch_seconds(360, frame_seconds=0.08)
    def measure(turn):
        began = time.perf_counter()
        plan = canter.Plan(index, budget, micro_batches_per_step=8, seed=turn)
        rows = sum(len(batch) for step in range(len(plan)) for batch in plan.step(step))
        return time.perf_counter() - began, rows
""",
    "engine": """
    clips = write_clips(options["clips"], options["seconds"])
    model = canter.load(options["model"] or train(4, "model")[0], device="cpu")
    def measure(turn):
        began = time.perf_counter()
        texts = [result.text for result in model.transcribe(clips, batch_size=8)]
        return time.perf_counter() - began, "".join(texts)
""",
    "training": """
    def measure(turn):
        folder, _ = train(options["steps"], f"run-{turn}")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row.get("kind") == "train"]
        return statistics.median(row["seconds"] for row in rows[2:]), round(rows[0]["loss"], 3)
""",
}
CHILD = """
import hashlib, json, statistics, sys, time, wave
from pathlib import Path
import numpy as np
import canter
folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])

def write_clips(count, seconds):
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        samples = rng.standard_normal(int(16000 * seconds * rng.uniform(0.3, 1))) * 1000
        paths.append(folder / f"{number}.wav")
        with wave.open(str(paths[-1]), "wb") as file:
            file.setnchannels(1); file.setsampwidth(2); file.setframerate(16000)
            file.writeframes(samples.astype(np.int16).tobytes())
    return paths

kept = {"budget": folder / "budget.json"}  # and the tokenizer of the first run: a measured budget would vary

def train(steps, name):
    manifest = folder / "train.jsonl"
    if not manifest.exists():
        rng = np.random.default_rng(1)
        rows = []
        for path in write_clips(48, 6.0):
            text = " ".join(rng.choice(["one", "two", "three", "four", "five", "six"], 6))
            with wave.open(str(path)) as file:
                seconds = file.getnframes() / 16000
            rows.append({"audio_filepath": path.name, "duration": seconds, "text": text})
        manifest.write_text("".join(json.dumps(row) + "\\n" for row in rows))
        canter.Budget.from_batch_seconds(24, frame_seconds=0.08).save(kept["budget"])
    fields = canter.TrainConfig.__dataclass_fields__
    shape = type(fields["model"].default_factory())(width=options["width"], encoder_layers=2, decoder_layers=2)
    settings = dict(manifest=(manifest,), output=folder / name, model=shape, steps=steps, batch_seconds=24, workers=0,
                    device="cpu", precision="float32", threads=1, **kept)
    settings["vocab_size" if "vocab_size" in fields else "vocabulary"] = 64  # today's name, or that of Canter 0.1
    run = canter.train(canter.TrainConfig(**settings), progress=False)
    kept.update(tokenizer=run / "tokenizer")
    return run, settings

def main():
%s
    measure(0)  # warms up
    print("READY", flush=True)
    for turn, _ in enumerate(sys.stdin, 1):
        seconds, result = measure(turn)
        print(json.dumps([seconds, hashlib.md5(str(result).encode()).hexdigest()]), flush=True)
main()
"""


class Tree:
    """A process that measures one part of a source tree, once for each call."""

    def __init__(self, source: Path, part: str, options: dict[str, object], folder: Path):
        folder.mkdir()
        self.source = source
        self.errors = (folder / "errors.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD % PARTS[part], folder, json.dumps(options)],
            env={**os.environ, "PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": "1", "CANTER_NO_URLS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip

    def _line(self) -> str:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return line
        self.errors.seek(0)
        raise SystemExit(f"{self.source}: the measurement failed\n{self.errors.read()[-3000:]}")

    def wait_until_ready(self) -> None:
        """Wait for the first, untimed measurement."""
        while self._line() != "READY\n":
            pass

    def measure(self) -> tuple[float, str]:
        """Return the seconds of one turn, and a digest of its result."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, digest = json.loads(self._line())
        return seconds, digest

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()


def compare(before: Path, after: Path, part: str, options: dict[str, object], rounds: int) -> dict[str, object]:
    """Measure a part of both trees in turns."""
    with tempfile.TemporaryDirectory() as scratch:
        trees = [Tree(tree, part, options, Path(scratch) / name) for tree, name in ((before, "0"), (after, "1"))]
        seconds: list[list[float]] = [[], []]
        digests: list[set[str]] = [set(), set()]
        try:
            for tree in trees:
                tree.wait_until_ready()
            for number in range(rounds):
                for place in (0, 1) if number % 2 else (1, 0):
                    taken, digest = trees[place].measure()
                    seconds[place].append(taken)
                    digests[place].add(digest)
        finally:
            for tree in trees:
                tree.close()
    ratios = [new / old for old, new in zip(*seconds)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "before_seconds": statistics.median(seconds[0]),
        "after_seconds": statistics.median(seconds[1]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "rounds": rounds,
        "same_results": digests[0] == digests[1],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=Path(__file__).parents[1] / "src")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=11, help="turns of each tree (default: 11)")
    parser.add_argument("--utterances", type=int, default=300_000, help="utterances to plan (default: 300000)")
    parser.add_argument("--model", help="model to decode with (default: a small one, trained for four steps)")
    parser.add_argument("--clips", type=int, default=16, help="recordings to decode (default: 16)")
    parser.add_argument("--seconds", type=float, default=10.0, help="maximum seconds of a recording (default: 10)")
    parser.add_argument("--steps", type=int, default=8, help="training steps of a turn (default: 8)")
    parser.add_argument("--width", type=int, default=96, help="width of the model that is trained (default: 96)")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    names = ("utterances", "model", "clips", "seconds", "steps", "width")
    sizes = {name: getattr(options, name) for name in names}
    found = {}
    print(f"{'':10}{'before':>10}{'after':>10}{'after/before':>14}{'half of the rounds':>22}  same results")
    for part in options.parts:
        row = found[part] = compare(options.before, options.after, part, sizes, options.rounds)
        low, high = row["ratio_quartiles"]
        print(
            f"{part:10}{row['before_seconds']:>8.3f} s{row['after_seconds']:>8.3f} s{row['ratio']:>14.3f}"
            f"{f'{low:.3f} to {high:.3f}':>22}  {'yes' if row['same_results'] else 'no'}",
            flush=True,
        )
    if options.output:
        value = {"before": str(options.before), "after": str(options.after), "sizes": sizes, "parts": found}
        options.output.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
