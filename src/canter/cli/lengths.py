"""The options and inputs that `plan`, `compare` and `inspect` share: lengths of utterances, and a budget."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from canter.errors import ManifestError, PlanError
from canter.planning.lengths import GivenLimits

if TYPE_CHECKING:
    from canter.corpus.columns import Columns
    from canter.corpus.index import LengthIndex
    from canter.planning import Budget


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Names of the columns of a manifest or table."""

    text_column: str = ""
    """Column, or key of JSON, with the text (default: text, sentence, transcription or another customary name)."""
    language_column: str = ""
    """Column with the language (default: lang, language, locale or lang_id)."""
    audio_column: str = ""
    """Column with the audio or its path (default: audio_filepath, audio, file_name, path or another customary name)."""

    @property
    def columns(self) -> Columns:
        """The columns as the readers take them."""
        from canter.corpus.columns import Columns

        return Columns(self.text_column, self.language_column, self.audio_column)


@dataclass(frozen=True, kw_only=True)
class LengthOptions(ColumnOptions):
    """Options of the commands that read lengths of utterances."""

    index: tyro.conf.Positional[Path]
    """A manifest (or a folder, or a YAML of sources), a length index, or a Parquet or Arrow table with `duration` and
    `num_tokens` (or `tokens`)."""
    tokenizer: str | None = None
    """Tokenizer for a manifest without `num_tokens`: a folder, SentencePiece model or tokenizer.json, or `chars` or
    `bytes` (default: estimate one token for 3 Latin, Greek or Cyrillic characters, one for any other character)."""
    prompt_tokens: int = 0
    """Number of prompt tokens, added together with an end token to those of a manifest's text or of the column
    `tokens` of a table."""
    json: bool = False
    """Print one JSON object on stdout instead of a table."""

    def open_index(self) -> LengthIndex:
        return open_lengths(self.index, self.prompt_tokens, self.tokenizer, self.columns)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(LengthOptions):
    """Options of `compare` and `plan`."""

    budget: Path | None = None
    """Budget file made by `canter tune` (default: an analytic budget of --model and --memory)."""
    model: str | None = None
    """Model of the analytic budget (default: canary-1b). With --budget, the file is checked against it."""
    memory: str | None = None
    """Device memory of the analytic budget, such as 80GiB, 80GB or 80 (GB) (default: 80GB)."""
    ranks: int = 1
    """Number of GPUs that share the micro-batches of a step."""
    micro_batches_per_step: int | None = None
    """Micro-batches of an optimiser step (default: --ranks)."""
    batching_window: int | None = None
    """Number of utterances that are batched together (default: the strategy's; `balanced`: 50,000)."""
    mixing: float = 1.0
    """With `balanced`: number of random parts of a window that are sorted separately. More parts mix and pad more; 0
    mixes and pads least."""
    mix_steps: bool = False
    """With `balanced`: every optimiser step holds short and long utterances. Some micro-batches are smaller, unless
    each rank takes several of a step."""
    min_steps: int | None = None
    """Minimum number of optimiser steps an epoch; batches become smaller evenly to reach it. 1 makes the largest
    batches (default: 50, or fewer where a step would have less than 16 utterances)."""
    max_tokens_per_second: GivenLimits = None
    """Leave out utterances with more tokens a second: one limit such as `25`, limits up to a duration in seconds such
    as `10:30 20:25 40:20`, or `auto`: mean + 4 standard deviations in each of 30 buckets of duration (default: no
    limit)."""
    seed: int = 0
    """Seed of the shuffle."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimiser step."""
        return self.ranks if self.micro_batches_per_step is None else self.micro_batches_per_step

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimiser step that each rank takes."""
        from canter.planning.strategies.balanced import even_accumulation

        return even_accumulation(self.micro_batches, self.ranks)

    def choose_budget(self) -> Budget:
        """Return the budget of --budget, checked against --model if given, or else an analytic budget."""
        from canter.errors import BudgetError
        from canter.planning import Budget, analytic_budget
        from canter.planning.budget import parse_memory
        from canter.planning.shapes import check_shape

        if self.budget is None:
            return analytic_budget(self.model or "canary-1b", parse_memory(self.memory or "80GB", "--memory") / 1e9)
        if self.memory is not None:
            raise BudgetError(f"--memory is for the analytic budget; {self.budget} has a limit (memory.limit_bytes)")
        budget = Budget.load(self.budget)
        if self.model is not None:
            try:
                check_shape(budget, self.model)
            except BudgetError as error:
                raise BudgetError(f"{self.budget}: {error}") from None
        return budget


LARGE_MANIFEST = 64 << 20  # bytes from which on processes share the reading
ESTIMATED = "tokens are estimated from the characters of the text where the manifest has no num_tokens"


def open_lengths(
    path: Path, prompt_tokens: int = 0, tokenizer: str | None = None, columns: Columns | None = None
) -> LengthIndex:
    """Open the length index at `path`, or build one from a table of lengths (in memory) or a manifest.

    tokenizer: counts a manifest's tokens; without one they are estimated. The index of a manifest is kept in the user's
    cache, so that the next command reads only changed files.
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
        raise ManifestError(f"{path}: no row can be used{f'; {problems[0].reason}' if problems else ''}")
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
    """Return the folder for indexes of manifests: in the user's cache, or else a temporary one."""
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
    """Return the folder beside the index for tables of steps; None where it is read-only or the index is in memory."""
    if index.path is None or not os.access(index.path.parent, os.W_OK):
        return None
    return index.path.with_suffix(".steps")


def is_index(path: Path) -> bool:
    """Return whether an Arrow file has the header of a length index, which a table of lengths lacks."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            return b"canter" in (pa.ipc.open_file(file).schema.metadata or {})
    except (pa.ArrowInvalid, OSError):
        return False


def check_ranks(ranks: int, micro_batches: int, what: str = "micro-batches") -> None:
    """Raise PlanError where there are more ranks than micro-batches."""
    if ranks < 1:
        raise PlanError(f"--ranks is {ranks}; it must be at least 1")
    if 0 < micro_batches < ranks:
        raise PlanError(
            f"--ranks is {ranks} and there are only {micro_batches} {what}: the others would only wait; "
            f"use at most {micro_batches}"
        )


def none_fits(index: LengthIndex, budget: Budget) -> PlanError:
    room = budget.room_bytes / 1e9
    return PlanError(
        f"none of the {len(index):,} utterances can be used with this budget ({room:.3g} GB above the fixed part): "
        "raise its limit, or split the utterances"
    )


def print_skipped(index: LengthIndex) -> None:
    """Print on standard error which rows of the sources are not in the index, if any."""
    for kind, count in index.skipped.items():
        print(f"left out of {index.path or 'the table'}, {count:,}: {kind}", file=sys.stderr)
    for problem in index.problems[:3] if index.skipped else ():
        print(f"  {problem.file}:{problem.line}: {problem.reason}", file=sys.stderr)


def plain(values: Mapping[str, object]) -> dict[str, object]:
    """Return a JSON object with null for infinities and NaN, which JSON lacks."""
    return {
        key: plain(value) if isinstance(value, dict) else None if _is_infinite(value) else value
        for key, value in values.items()
    }


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
