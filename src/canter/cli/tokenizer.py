"""Train a tokenizer on the transcripts of manifests: one vocabulary for all languages, with prompt tokens."""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from canter.cli.lengths import ColumnOptions
from canter.corpus.manifest import Problem, Utterance
from canter.corpus.sources import read_unit, units_of
from canter.errors import ConfigError


@dataclass(frozen=True)
class Options(ColumnOptions):
    manifests: tyro.conf.Positional[tuple[Path, ...]]
    """Manifests (NeMo JSONL, or any other source that 'canter index' reads)."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the tokenizer, which must not hold one yet."""
    vocab_size: int = 256
    """Number of tokens, special tokens included; lowered if the text is too small for it."""
    json: bool = False
    """Print one JSON object on stdout instead of a table."""


def run(options: Options) -> None:
    from canter.text import sentencepiece, train_tokenizer

    if not options.manifests:
        raise ConfigError("name at least one manifest: canter tokenizer train.jsonl -o tokenizer")
    if (options.output / sentencepiece.FILE).exists():
        raise ConfigError(f"{options.output} holds a tokenizer; remove it, or choose another --output")
    texts: list[str] = []
    languages: set[str] = set()
    problems: list[Problem] = []
    for manifest in options.manifests:
        for unit in units_of(str(manifest), columns=options.columns):
            for _, row in read_unit(unit, columns=options.columns):
                if isinstance(row, Utterance):
                    texts.append(row.text)
                    languages |= {lang for lang in (row.lang, row.source_lang, row.target_lang) if lang}
                else:
                    problems.append(row)
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        tokenizer = train_tokenizer(texts, languages, options.vocab_size, options.output)
    for line in [*(str(notice.message) for notice in notices), *map(str, problems[:5])]:
        print(line, file=sys.stderr)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    words = sum(len(text.split()) for text in texts)
    if options.json:
        summary = {
            "tokenizer": str(options.output),
            "vocab_size": tokenizer.vocab_size,
            "languages": tokenizer.languages,
            "fingerprint": tokenizer.fingerprint,
            "texts": len(texts),
            "tokens": tokens,
            "words": words,
            "skipped": [str(problem) for problem in problems],
        }
        print(json.dumps(summary, ensure_ascii=False))
        return
    skipped = f"; {len(problems)} rows could not be used" if problems else ""
    languages_found = ", ".join(tokenizer.languages) or "not given"
    print(
        f"{options.output}: {tokenizer.vocab_size} tokens, languages {languages_found}, "
        f"{tokens / max(words, 1):.2f} tokens a word over {len(texts)} texts{skipped}"
    )
