"""What `compare`, `plan` and `inspect` read: a length index or a table of lengths, and a budget or a model's name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from canter.errors import ManifestError

if TYPE_CHECKING:
    from canter.corpus.index import LengthIndex
    from canter.planning import Budget


def open_lengths(path: Path, prompt_tokens: int = 0) -> LengthIndex:
    """The index at `path`, or one made in memory from a Parquet or Arrow table of lengths."""
    from canter.corpus.index import LengthIndex
    from canter.corpus.readers.lengths import read_lengths

    if not path.exists():
        raise ManifestError(f"{path} does not exist; make it with: canter index MANIFEST -o {path.name}")
    if path.suffix != ".parquet" and is_index(path):
        return LengthIndex.open(path)
    if path.suffix not in (".parquet", ".arrow", ".feather"):
        raise ManifestError(
            f"{path} is neither an index nor a table of lengths; make one with: canter index {path} -o lengths.arrow"
        )
    seconds, tokens, _, problems = read_lengths(str(path), prompt_tokens=prompt_tokens)
    if not len(seconds):
        raise ManifestError(f"{path}: not one row can be used{f'; {problems[0].reason}' if problems else ''}")
    return LengthIndex(seconds, tokens, [path.stem], problems=problems)


def steps_folder(index: LengthIndex) -> Path | None:
    """Beside the index, where its plans keep their tables of steps; None where it cannot be written or is in memory."""
    if index.path is None or not os.access(index.path.parent, os.W_OK):
        return None
    return index.path.with_suffix(".steps")


def is_index(path: Path) -> bool:
    """Whether an Arrow file has the header of a length index (a bare table of lengths has not)."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            return b"canter" in (pa.ipc.open_file(file).schema.metadata or {})
    except (pa.ArrowInvalid, OSError):
        return False


def choose_budget(budget: Path | None, model: str, memory: float) -> Budget:
    """The budget in a file, or an analytic one for a model's name."""
    from canter.planning import Budget, analytic_budget

    return Budget.load(budget) if budget is not None else analytic_budget(model, memory)


def progress_console():
    """Progress goes to standard error, so that standard output stays machine-readable."""
    from rich.console import Console

    return Console(stderr=True)


def plain(value):
    """A JSON value without infinities, which JSON has not."""
    import math

    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
