"""Manifests of every kind to a length index: how long each utterance is, how many tokens, and where it
lies."""

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
    """The index to write. Beside it: .skipped.jsonl, the rows that could not be used, and INDEX.parts, what
    was read."""
    tokenizer: str | None = None
    """Folder, SentencePiece model or tokenizer.json that counts tokens; or `chars` or `bytes`. Not needed
    where rows have `num_tokens`."""
    prompt_tokens: int = 0
    """Tokens of the prompt, added to each text's with one for the end."""
    temperature: float | None = None
    """Raise the sources' weights (their rows, unless given) to this power: 1 leaves them, 0 makes all
    equal."""
    measure_durations: bool = False
    """Read durations that a manifest leaves out from the headers of the audio."""
    workers: int = os.cpu_count() or 1
    """Processes that read and tokenise."""
    json: bool = False
    """What was indexed as JSON on standard output."""


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
    if options.temperature is not None:
        group = Group(group.members, temperature=options.temperature)
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
        print(json.dumps(facts(index, options.output), indent=2))
    else:
        show(index, options.output, time.monotonic() - start)


def facts(index: LengthIndex, output: Path) -> dict:
    """What was indexed, for machines."""
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


def show(index: LengthIndex, output: Path, seconds: float) -> None:
    """The same for people; what was skipped is never passed over in silence."""
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
        console.print(f"  all of them, with file and line: {skipped_path(output)}")
