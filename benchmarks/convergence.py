"""What a strategy's mixing costs in accuracy: WER of `random`, `bucket_2d` and `balanced` at two mixing dials on the
demo corpus, after equal updates and after equal time.

    python benchmarks/convergence.py -o FOLDER [--updates 1500] [--minutes 6] [--seeds 3] [--json FILE]

Every run is a `canter train` of the demo's recipe, without its short-first epoch so that strategies alone differ; all
share tokenizer size, measured budget, precision and threads, settled once. Equal updates: the same number of steps, so
that strategies differ in the audio of a step. Equal time: as many steps as fit the minutes by each strategy's own
measured step. WER is of unheard sentences, attention decoding. Started again, it goes on where it was.
"""

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from canter.cli.progress import TrainingProgress, say, track
from canter.corpus.synthesis import synthesise
from canter.training.config import TrainConfig
from canter.training.prepare import prepare
from canter.training.session import train


@dataclass(frozen=True)
class Options:
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for corpus and runs."""
    updates: int = 1500
    """Steps of the runs of equal updates; 0: none of them."""
    minutes: float = 6.0
    """Of the runs of equal time; 0: none of them."""
    seeds: int = 3
    utterances: int = 6000
    """Of the corpus."""
    dials: tuple[float, float] = (1.0, 4.0)
    """Mixing of `balanced`."""
    json: Path | None = None
    """File for the figures."""


def arms(options: Options) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings)."""
    dialled = [(f"balanced {dial:g}", {"strategy": "balanced", "mixing": dial}) for dial in options.dials]
    return [("random", {"strategy": "random"}), ("bucket_2d", {"strategy": "bucket_2d"}), *dialled]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    corpus = synthesise(options.output / "corpus", utterances=options.utterances, test_utterances=200)
    base = TrainConfig(
        manifest=(corpus.train_manifest,),
        valid=(corpus.test_manifest,),
        output=options.output / "shared",
        vocabulary=600,
        short_first=False,
        valid_every=1_000_000,
        valid_utterances=200,
        steps=1,
        track=(),
    )
    shared = prepare(base, say, track)
    settled = shared.run.settled()
    base = replace(
        base,
        budget=shared.run.folder / "budget.json",
        precision=settled["precision"],
        threads=settled["threads"],
    )
    goals = {"updates": {"steps": options.updates}} if options.updates else {}
    goals |= {"time": {"steps": None, "minutes": options.minutes}} if options.minutes else {}
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for goal, settings in goals.items():
            for name, chosen in arms(options):
                folder = options.output / f"{goal}-{name.replace(' ', '-')}-{seed}"
                config = replace(base, output=folder, seed=seed, **chosen, **settings)
                say(f"{name}, equal {goal}, seed {seed}")
                finished = train(config, TrainingProgress, say, track)
                lines = map(
                    json.loads, finished.prepared.run.metrics.read_text(encoding="utf-8").splitlines()
                )
                logged = list(lines)
                valid = [line for line in logged if line["kind"] == "valid"][-1]
                progress = finished.progress
                padded = [x["audio_seconds"] / (1 - x["padding"]) for x in logged if x["kind"] == "train"]
                rows.append(
                    {
                        "arm": name,
                        "equal": goal,
                        "seed": seed,
                        "wer": valid["wer"],
                        "cer": valid["cer"],
                        "steps": progress.step,
                        "seconds": progress.seconds,
                        "audio_hours": progress.audio_seconds / 3600,
                        "padding": 1 - progress.audio_seconds / sum(padded),
                    }
                )
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    table = Table("equal", "strategy", "WER, mean", "spread", "of each seed", "steps", "minutes", "padding")
    for goal in goals:
        for name, _ in arms(options):
            found = [row for row in rows if row["arm"] == name and row["equal"] == goal]
            rates = [row["wer"] for row in found]
            mean = {
                key: statistics.mean(row[key] for row in found) for key in ("steps", "seconds", "padding")
            }
            table.add_row(
                goal,
                name,
                f"{statistics.mean(rates):.1%}",
                f"{max(rates) - min(rates):.1%}",
                " ".join(f"{rate:.1%}" for rate in rates),
                f"{mean['steps']:.0f}",
                f"{mean['seconds'] / 60:.1f}",
                f"{mean['padding']:.1%}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
