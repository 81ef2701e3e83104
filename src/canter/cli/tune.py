"""Measure a training step of the model that a configuration describes, here, and write the budget.

`canter tune CONFIG.yaml --output budget.json`; without a file, the default model is measured on the lengths of
--manifest. The budget is what `canter compare`, `canter plan` and `canter train --budget` read.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    config: Annotated[Path | None, tyro.conf.Positional] = None
    """A training configuration, as 'canter train' reads it."""
    manifest: tuple[Path, ...] = ()
    """Training manifests, in place of the configuration's."""
    output: Path = Path("budget.json")
    """The budget file to write."""


def run(options: Options) -> None:
    from canter.cli.progress import say, track
    from canter.training.config import TrainConfig, load_config
    from canter.training.prepare import prepare

    config = load_config(options.config) if options.config else TrainConfig()
    if options.manifest:
        config = dataclasses.replace(config, manifest=options.manifest)
    with tempfile.TemporaryDirectory() as folder:
        budget = prepare(
            dataclasses.replace(config, output=Path(folder) / "run", budget=None), say, track
        ).budget
    options.output.parent.mkdir(parents=True, exist_ok=True)
    budget.save(options.output)
    errors = budget.measured_on
    say(
        f"{options.output}: memory explained within {errors['memory_error']:.1%}, time within "
        f"{errors['time_error']:.1%} (medians over the probes)"
    )
