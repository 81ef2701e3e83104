"""Extend a trained model by a language or by pieces; old tokens keep their ids and their rows of embedding and head."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from canter.cli.lengths import ColumnOptions


@dataclass(frozen=True, kw_only=True)
class Options(ColumnOptions):
    model: tyro.conf.Positional[Path]
    """A Canter or Hugging Face folder, a .nemo file, a run's folder (its best checkpoint), or a hub name."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write the extended model to."""
    language: str | None = None
    """Code of the new language, such as kab (default: none; the pieces are for every language)."""
    like: str | None = None
    """Similar language of the model, from whose token the new one starts (default: the mean of all languages)."""
    manifest: tuple[Path, ...] = ()
    """Manifests with text of the new language, from which pieces are learned; rows of other languages are not used."""
    pieces: int = 0
    """Number of pieces to learn, in a vocabulary of the new language, or, for a Whisper, beside its own (default: 0,
    the language is written with the pieces that there are)."""
    json: bool = False
    """Print one JSON object on stdout instead of text."""


def run(options: Options) -> int | None:
    from canter.errors import ConfigError
    from canter.loading import load_model, save_module
    from canter.models.hub import checkpoint_of
    from canter.models.vocabulary import extend_vocabulary
    from canter.text.extension import extend_tokenizer, tokens_per_word

    if options.output.exists():
        raise ConfigError(f"{options.output} exists; choose another name")
    if options.like is not None and options.language is None:
        raise ConfigError("--like gives the start of a new language; name it with --language")
    if options.manifest and not options.pieces:
        raise ConfigError("--manifest gives the text of new pieces; add --pieces, such as 500, or leave it out")
    model = load_model(checkpoint_of(options.model))
    if model.tokenizer is None:
        raise ConfigError(f"{options.model} has no tokenizer to extend")
    texts = read_texts(options) if options.pieces else []
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        tokenizer = extend_tokenizer(model.tokenizer, options.language, texts, options.pieces)
    change = extend_vocabulary(model, tokenizer, options.like)
    save_module(change.model, options.output)
    for notice in notices:
        print(f"canter: {notice.message}", file=sys.stderr)
    rates = [tokens_per_word(one, texts, options.language) for one in (model.tokenizer, tokenizer)]
    if options.json:
        summary = {
            "output": str(options.output),
            "languages": tokenizer.languages,
            "vocab_size": tokenizer.vocab_size,
            "kept": change.kept,
            "new": change.copied + change.averaged,
            "tokens_per_word": [rate if rate < float("inf") else None for rate in rates] if texts else None,
        }
        print(json.dumps(summary, indent=2))
        return
    print(f"{options.output}: {change}")
    if texts:
        before = f"{rates[0]:.2f} before" if rates[0] < float("inf") else "before it could not be written"
        print(f"{rates[1]:.2f} tokens a word over {len(texts):,} texts, {before}")
    unchanged = "text of the other languages is encoded as before"
    print(unchanged if options.language else "text is encoded differently wherever a new piece occurs")
    print(f"next: canter train --init {options.output} --manifest FILE, with 'lang' in its rows")


def read_texts(options: Options) -> list[str]:
    """Return the texts of the manifests, without rows that name another language than --language."""
    from canter.corpus.manifest import Utterance
    from canter.corpus.sources import read_unit, units_of
    from canter.text.languages import same

    texts: list[str] = []
    for manifest in options.manifest:
        for unit in units_of(str(manifest), columns=options.columns):
            for _, row in read_unit(unit, columns=options.columns):
                if not isinstance(row, Utterance):
                    continue
                lang = row.text_lang
                if options.language is None or lang is None or same(lang, options.language):
                    texts.append(row.text)
    return texts
