"""Read the inputs of `compare`, `plan` and `inspect`: a manifest, a length index or a table of lengths, and a budget
or a model's name."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from canter.errors import ManifestError, PlanError

if TYPE_CHECKING:
    from canter.corpus.columns import Columns
    from canter.corpus.index import LengthIndex
    from canter.planning import Budget


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Names of the columns of a manifest or table."""

    text_column: str = ""
    """Column, or key of JSON, with the text (default: text, sentence, transcription or another customary name)."""
    lang_column: str = ""
    """Column with the language (default: lang, language, locale or lang_id)."""
    audio_column: str = ""
    """Column with the audio or its path (default: audio_filepath, audio, file_name, path or another customary name)."""

    @property
    def columns(self) -> Columns:
        """Return them as the readers take them."""
        from canter.corpus.columns import Columns

        return Columns(self.text_column, self.lang_column, self.audio_column)


@dataclass(frozen=True)
class PlanOptions(ColumnOptions):
    """What `compare` and `plan` have in common."""

    index: tyro.conf.Positional[Path]
    """A manifest (or a folder, or a YAML of sources), a length index, or a Parquet or Arrow table with `duration` and
    `num_tokens` (or `tokens`)."""
    tokenizer: str | None = None
    """Counts the tokens of a manifest without `num_tokens`: a folder, SentencePiece model or tokenizer.json, or `chars`
    or `bytes`. Unless given, tokens are estimated: one for 3 Latin, Greek or Cyrillic characters, one for any other."""
    budget: Path | None = None
    """A budget file, made by `canter tune`. Without one, an analytic budget of --model and --memory serves."""
    model: str | None = None
    """Shape of the analytic budget, canary-1b unless given. With --budget, the file is checked against it."""
    memory: float | None = None
    """Gigabytes of the analytic budget's device, 80 unless given."""
    ranks: int = 1
    """GPUs that share the micro-batches of a step."""
    micro_batches_per_step: int | None = None
    """Micro-batches of an optimiser step; the ranks unless given."""
    window: int | None = None
    """Utterances that are batched together; the strategy's own unless given (`balanced`: 50,000)."""
    mixing: float = 1.0
    """Dial of `balanced`: more mixes more and pads more; 0 pads least, by a slow search fit for small sets."""
    mix_steps: bool = False
    """With `balanced`: shrink some batches so that every optimiser step holds short and long utterances."""
    min_steps: int | None = None
    """Least number of optimiser steps an epoch; batches are made smaller evenly to reach it. Unless given 50, or fewer
    where a step would have less than 16 utterances; 1 makes the largest batches."""
    max_tokens_per_second: tuple[str, ...] = ()
    """Leave out utterances with more tokens a second: one limit such as `25`, or limits up to a duration in seconds
    such as `10:30 20:25 40:20`."""
    seed: int = 0
    """Another seed, another shuffle."""
    prompt_tokens: int = 0
    """Tokens of the prompt, added with one for the end to those of a manifest's text, or to the column `tokens` of a
    table."""


LARGE_MANIFEST = 64 << 20  # bytes from which on processes share the reading
ESTIMATED = "tokens are estimated from the characters of the text where the manifest has no num_tokens"


def open_lengths(
    path: Path, prompt_tokens: int = 0, tokenizer: str | None = None, columns: Columns | None = None
) -> LengthIndex:
    """Open the length index at `path`, or make one of a table of lengths (in memory) or of a manifest.

    tokenizer: counts a manifest's tokens; without one they are estimated. What was read of a manifest is kept in the
    user's cache, so that the next command reads only what has changed.
    """
    from canter.corpus.index import LengthIndex
    from canter.corpus.readers.lengths import read_lengths

    if prompt_tokens < 0:
        raise PlanError(f"--prompt-tokens is {prompt_tokens}; it must be 0 or more")
    several = any(mark in str(path) for mark in ("{", "_OP_", "::", "*"))  # shards, or a manifest and its tars
    if not path.exists() and not several:
        raise ManifestError(f"{path} does not exist; make it with: canter index MANIFEST -o {path.name}")
    stored = path.suffix != ".parquet" and path.is_file() and is_index(path)
    if not stored and (several or not is_table_of_lengths(path, columns)):
        return index_manifest(path, prompt_tokens, tokenizer, columns)
    if tokenizer is not None:
        raise ManifestError(f"--tokenizer counts the tokens of a manifest; {path} has its tokens counted")
    if stored:
        return LengthIndex.open(path)
    seconds, tokens, _, problems = read_lengths(str(path), prompt_tokens=prompt_tokens)
    if not len(seconds):
        raise ManifestError(f"{path}: not one row can be used{f'; {problems[0].reason}' if problems else ''}")
    return LengthIndex(seconds, tokens, [path.stem], problems=problems)


def is_table_of_lengths(path: Path, columns: Columns | None) -> bool:
    """Return whether a file is a Parquet or Arrow table without audio. Raises ManifestError where it is damaged."""
    from canter.corpus.columns import ANY
    from canter.corpus.readers.huggingface import holds_audio
    from canter.corpus.readers.lengths import table_schema

    if path.suffix not in (".parquet", ".arrow", ".feather"):
        return False
    return not holds_audio(table_schema(str(path)), columns or ANY)


def index_manifest(
    path: Path, prompt_tokens: int, tokenizer: str | None, columns: Columns | None = None
) -> LengthIndex:
    """Return the length index of a manifest, a folder or a mixture in YAML, under a progress bar."""
    from canter.corpus.build import index_sources
    from canter.corpus.columns import ANY
    from canter.corpus.counting import TokenEstimate
    from canter.corpus.mixture import sources_of

    if tokenizer is None:
        counter = TokenEstimate()
    else:
        from canter.text import load_counter

        counter = load_counter(tokenizer)
    facts = f"{path.absolute()} {prompt_tokens} {counter.fingerprint}{columns or ''}"
    name = f"{path.stem[:40]}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}.arrow"
    large = path.is_file() and path.stat().st_size > LARGE_MANIFEST
    try:
        index = index_sources(
            sources_of([path], columns or ANY),
            cache_folder() / name,
            counter,
            prompt_tokens=prompt_tokens,
            workers=os.cpu_count() or 1 if large else 0,
            measure_durations=True,
            progress=True,
        )
    except ManifestError as error:
        raise ManifestError(
            f"{' '.join(str(error).split())}; what can be read: a manifest, a length index made with 'canter index', "
            "or a table of lengths"
        ) from None
    if is_estimated(index):
        print(f"{path.name}: {ESTIMATED}; --tokenizer counts them", file=sys.stderr)
    return index


def is_estimated(index: LengthIndex) -> bool:
    """Return whether the tokens of the index were estimated from characters."""
    from canter.corpus.counting import ESTIMATE

    return index.made_with.get("tokenizer") == ESTIMATE


def cache_folder() -> Path:
    """Return the folder for indexes that commands make by themselves: in the user's cache, or else a temporary one."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "canter" / "lengths"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    from canter.api import scratch_folder

    return scratch_folder()


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


def choose_budget(path: Path | None, model: str | None, memory: float | None) -> Budget:
    """The budget in a file, checked against `model` where that is named too, or an analytic one for a model's name."""
    from canter.errors import BudgetError
    from canter.planning import Budget, analytic_budget
    from canter.planning.shapes import check_shape

    if path is None:
        return analytic_budget(model or "canary-1b", 80.0 if memory is None else memory)
    if memory is not None:
        raise BudgetError(f"--memory is for the analytic budget; {path} has a limit of its own (memory.limit_bytes)")
    budget = Budget.load(path)
    if model is not None:
        try:
            check_shape(budget, model)
        except BudgetError as error:
            raise BudgetError(f"{path}: {error}") from None
    return budget


def check_ranks(ranks: int, micro_batches: int, what: str = "micro-batches") -> None:
    """Raises PlanError where ranks are too many to have work."""
    if ranks < 1:
        raise PlanError(f"--ranks is {ranks}; it must be at least 1")
    if 0 < micro_batches < ranks:
        raise PlanError(
            f"--ranks is {ranks} and there are only {micro_batches} {what}: the others would only wait; "
            f"use {micro_batches} at most"
        )


def none_fits(index: LengthIndex, budget: Budget) -> PlanError:
    room = (budget.limit_bytes - budget.fixed_bytes) / 1e9
    return PlanError(
        f"not one of the {len(index):,} utterances can be used with this budget ({room:.3g} GB above what is fixed): "
        "raise its limit, or cut the utterances"
    )


def tell_skipped(index: LengthIndex) -> None:
    """Says on standard error which rows of the sources are not in the index, if any."""
    for kind, count in index.skipped.items():
        print(f"left out of {index.path or 'the table'}, {count:,}: {kind}", file=sys.stderr)
    for problem in index.problems[:3] if index.skipped else ():
        print(f"  {problem.file}:{problem.line}: {problem.reason}", file=sys.stderr)


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
