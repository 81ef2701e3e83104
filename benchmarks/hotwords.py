"""Measure hot words: recall of rare words and word error rate, against a prompt with the same words, and neither.

    python benchmarks/hotwords.py MODEL MANIFEST ... [--weights 2 4 8] [--json FILE]

Rare words are those of the references that the model's tokenizer spells with several tokens; those of all clips make
one list, which every clip is transcribed with; --distractors adds words that nobody says. Recall is the part of the
rare words that is transcribed right. The WER of clips without any of them shows what the list costs where nothing of it
is said.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

import canter
from canter.evaluation.normalize import normalizer
from canter.evaluation.wer import score_texts
from canter.reporting.machine import describe_machine


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[str]
    manifests: tyro.conf.Positional[tuple[Path, ...]]
    language: str = "en"
    """Rows of other languages are left out."""
    weights: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    beam_size: int = 1
    pieces: int = 2
    """Least number of tokens of a rare word."""
    distractors: int = 0
    """Number of words of the rows of other languages that join the list, which nobody says here."""
    json: Path | None = None
    """File for the figures."""


def rows_of(options: Options) -> tuple[list[tuple[str, str]], list[str]]:
    """Return audio file and text of the rows of the language, and the texts of the others."""
    found, others = [], []
    for manifest in options.manifests:
        for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()):
            if row.get("lang", "en").startswith(options.language):
                found.append((str(manifest.parent / row["audio_filepath"]), row["text"]))
            else:
                others.append(row["text"])
    return found, others


def rare_words(texts: Sequence[str], tokenizer: "canter.Tokenizer", pieces: int) -> dict[str, str]:
    """Return the rare words, normalised, each with the form in which it was found."""
    found = {}
    lead = len(tokenizer.encode("a"))
    for text in texts:
        for word in re.findall(r"[^\W\d_]{4,}", text):
            form = word if not word.isupper() else word.lower()
            if len(tokenizer.encode(f"a {form}")) - lead >= pieces:
                found.setdefault(form.lower(), form)
    return found


def recall_and_errors(references: Sequence[str], texts: Sequence[str], rare: set[str]) -> dict[str, float]:
    """Return recall of the rare words, WER, and WER of the texts without any of them."""
    score = score_texts(references, texts, ["en"] * len(texts))
    clean = normalizer("standard", "en")
    rare = {part for word in rare for part in clean(word).split()}
    said = right = 0
    errors, words = 0, 0
    for one in score.utterances:
        mine = [(operation, word) for operation, word, _ in one.alignment if word in rare]
        said += len(mine)
        right += sum(operation == "equal" for operation, _ in mine)
        if not mine:
            errors, words = errors + one.counts.errors, words + one.counts.words
    return {"said": said, "recall": right / said, "wer": score.wer, "wer_without": errors / words}


def main(options: Options) -> None:
    model = canter.load(options.model)
    rows, others = rows_of(options)
    references = [text for _, text in rows]
    rare = rare_words(references, model.tokenizer, options.pieces)
    latin = [word for word in rare_words(others, model.tokenizer, options.pieces).values() if word.isascii()]
    more = [word for word in latin if word.lower() not in rare][: options.distractors]
    listed = sorted([*rare.values(), *more], key=str.lower)
    arms: dict[str, dict[str, object]] = {"nothing": {}, "prompt": {"prompt": ", ".join(listed)}}
    arms |= {f"hot words, {w:g} nats": {"hotwords": listed, "hotword_weight": w} for w in options.weights}
    found = {}
    for name, more in arms.items():
        begun = time.perf_counter()
        texts = [r.text for r in model.transcribe([path for path, _ in rows], beam_size=options.beam_size, **more)]
        found[name] = recall_and_errors(references, texts, {*rare}) | {"seconds": time.perf_counter() - begun}
        print(name, found[name], flush=True)
    table = Table("", "recall of rare words", "WER", "WER of clips without any", "seconds")
    for name, one in found.items():
        table.add_row(name, *(f"{100 * one[key]:.1f} %" for key in ("recall", "wer", "wer_without")),
                      f"{one['seconds']:.0f}")  # fmt: skip
    Console().print(f"{len(rows)} clips, a list of {len(listed)} words, {len(rare)} of them said")
    Console().print(table)
    if options.json:
        value = {"model": Path(options.model).name, "clips": len(rows), "words": len(listed), "said": len(rare),
                 "beam_size": options.beam_size, "machine": describe_machine(), "arms": found}  # fmt: skip
        options.json.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
