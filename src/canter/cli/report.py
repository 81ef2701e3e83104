"""A training run as one self-contained HTML page; works on runs that are still going or broke off."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """Run folder, as `canter train` writes it."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write; by default report.html in the run folder."""


def run(options: Options) -> None:
    from canter.reporting.html import write
    from canter.reporting.run_report import run_report

    print(write(run_report(options.run), options.output or options.run / "report.html"))
