"""Write a training run as one self-contained HTML page: results, gain of its batches, transcripts and curves.

The run may be unfinished or interrupted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """Run folder that `canter train` wrote."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write (default: report.html in the run folder)."""


def run(options: Options) -> None:
    from canter.reporting.html import write_page
    from canter.reporting.run_report import run_report

    print(write_page(run_report(options.run), options.output or options.run / "report.html"))
