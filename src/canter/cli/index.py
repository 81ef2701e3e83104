"""Build a length index from manifests of any kind: each utterance's duration, number of tokens and place."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from canter.cli.lengths import ColumnOptions

if TYPE_CHECKING:
    from canter.corpus.index import LengthIndex


@dataclass(frozen=True)
class Options(ColumnOptions):
    sources: tyro.conf.Positional[tuple[str, ...]]
    """NeMo manifests (with _OP_0..N_CL_ or {0..N}; MANIFEST::TARS if tarred), Lhotse cuts or Shar, Hugging Face data
    sets (Parquet or saved), AudioFolder, CSV and TSV, Common Voice, WebDataset tars, Kaldi folders, LJ Speech, folders
    of audio, tables of lengths; or one YAML of weighted groups."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("lengths.arrow")
    """Index to write. Rows that cannot be used are listed beside it in .skipped.jsonl; .parts holds what was read, so
    that the next run reads only changed files."""
    tokenizer: str | None = None
    """Tokenizer for rows without `num_tokens`: a folder, SentencePiece model or tokenizer.json, or `chars` or
    `bytes`."""
    prompt_tokens: int = 0
    """Number of prompt tokens, added together with an end token to those of each text."""
    measure_durations: bool = False
    """Read durations that a manifest lacks from the headers of the audio."""
    workers: int = os.cpu_count() or 1
    """Number of processes that read and tokenise."""
    json: bool = False
    """Print one JSON object on stdout instead of a table."""


def run(options: Options) -> int | None:
    from canter.corpus.build import index_sources
    from canter.corpus.mixture import Group, sources_of
    from canter.errors import ConfigError

    if not options.sources:
        raise ConfigError("nothing to index: name a manifest, for example: canter index train.jsonl -o lengths.arrow")
    if options.prompt_tokens < 0:
        raise ConfigError(f"--prompt-tokens is {options.prompt_tokens}; it must be 0 or more")
    if options.workers < 1:
        raise ConfigError(f"--workers is {options.workers}; it must be 1 or more")
    sources = sources_of(options.sources, options.columns)
    group = sources if isinstance(sources, Group) else Group(sources)
    tokenizer = None
    if options.tokenizer:
        from canter.text import load_counter

        tokenizer = load_counter(options.tokenizer)
    start = time.monotonic()
    index = index_sources(
        group,
        options.output,
        tokenizer,
        prompt_tokens=options.prompt_tokens,
        workers=options.workers,
        measure_durations=options.measure_durations,
        progress=True,
    )
    if options.json:
        print(json.dumps(index_facts(index, options.output), indent=2))
    else:
        print_index(index, options.output, time.monotonic() - start)


def index_facts(index: LengthIndex, output: Path) -> dict[str, object]:
    weights = index.weights
    return {
        "index": str(output),
        "rows": len(index),
        "hours": float(index.seconds.sum(dtype=float) / 3600),
        "tokens": int(index.tokens.sum(dtype=int)),
        "fingerprint": index.fingerprint,
        "sources": [
            {"name": source.name, "path": source.path, "rows": int(rows), "weight": float(weight)}
            for source, rows, weight in zip(index.sources, index.rows_of, weights, strict=True)
        ],
        "skipped": index.skipped,
    }


def print_index(index: LengthIndex, output: Path, seconds: float) -> None:
    from rich.console import Console

    from canter.corpus.index import skipped_path

    console = Console(highlight=False, soft_wrap=True)
    hours = index.seconds.sum(dtype=float) / 3600
    names = [source.name for source in index.sources]
    named = names[0] if len(names) == 1 else f"{len(names):,} sources"
    console.print(f"{len(index):,} utterances, {hours:,.2f} hours of {named} in {output} ({seconds:.1f} s)")
    for kind, count in index.skipped.items():
        console.print(f"  left out {count:,}: {kind}", markup=False)
    for problem in index.problems[:3] if index.skipped else ():
        console.print(f"    {problem}", markup=False)
    if index.skipped:
        console.print(f"  all of them with file and line: {skipped_path(output)}")
