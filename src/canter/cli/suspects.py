"""The part of `canter inspect` that lists rows whose text does not fit their audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from canter.errors import CanterError
from canter.redaction import redacted

if TYPE_CHECKING:
    from canter.corpus.index import LengthIndex
    from canter.corpus.utterance import Utterance
    from canter.evaluation.suspects import Suspicion
    from canter.inference.align import Aligner, TextScore

SHOWN = 40  # characters of a text in the table


@dataclass(frozen=True, kw_only=True)
class SuspectOptions:
    """Options of `canter inspect` for rows whose text does not fit their audio."""

    suspects: Path | None = None
    """List rows whose text does not fit their audio instead, by the probability that this model gives the text: a run
    folder, a model folder, a .nemo file, or a Hugging Face hub name. --worst is the number of rows to list."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """With --suspects, write all rows with their scores to this .jsonl file (default: none)."""
    language: str | None = None
    """With --suspects, language of rows that name none, as a code or in English (default: detected by a multilingual
    Whisper or OWSM)."""
    device: str = "auto"
    """With --suspects, `cpu`, `cuda`, `cuda:1`, ...; `auto` uses a GPU if there is one."""


@dataclass(frozen=True)
class InspectedRow:
    """A row of a manifest with the score of its text, or the reason why it has none."""

    number: int
    """Number of the row in the index."""
    utterance: Utterance | None
    fields: dict[str, object] = field(repr=False)
    """Fields of the row in its manifest."""
    score: TextScore | None = None
    suspicion: Suspicion | None = None
    error: str | None = None
    heard: str | None = None
    """Transcript of the model, for rows that are listed."""

    @property
    def rank(self) -> float:
        """Order of the rows, the worst first: those without a score, then by suspicion."""
        return float("-inf") if self.suspicion is None else -self.suspicion.value

    @property
    def is_suspect(self) -> bool:
        """True if the text does not fit, or there is no score."""
        return self.suspicion is None or self.suspicion.is_suspect

    def as_dict(self) -> dict[str, object]:
        """Return the row of the output: the manifest's fields and ours."""
        made: dict[str, object] = {"suspect": self.is_suspect}
        if self.score and self.suspicion:
            made |= {
                "suspicion": round(self.suspicion.value, 3),
                "reason": self.suspicion.reason,
                "score": round(self.score.logprob, 4),
                "end_logprob": round(self.score.end_logprob, 4),
                "characters_per_second": round(self.score.characters / max(self.score.seconds, 1e-3), 2),
            }
        made |= {} if self.error is None else {"error": self.error}
        made |= {} if self.heard is None else {"pred_text": self.heard}
        path = {} if self.utterance is None else {"audio_filepath": redacted(self.utterance.audio_filepath)}
        return {**self.fields, **path, **made}


def list_suspects(options: SuspectOptions, index: LengthIndex, most: int, as_json: bool) -> None:
    """Score all rows of the index, print the worst ones, at most ``most``, and write all of them to --output."""
    from canter.inference.align import Aligner
    from canter.inference.loading import load_engine
    from canter.inference.transcript.formats import json_text, write_output
    from canter.models.hub import checkpoint_of

    assert options.suspects is not None
    checkpoint = checkpoint_of(options.suspects)
    engine = load_engine(checkpoint, device=options.device)
    assert engine.model.tokenizer is not None
    aligner = Aligner(engine, engine.model.tokenizer, "attention", name=str(checkpoint))
    rows = score_rows(aligner, read_rows(index, options.language, aligner))
    suspects = sorted((row for row in rows if row.is_suspect), key=lambda row: row.rank)
    listed = {row.number: row for row in with_heard(aligner, suspects[:most])}
    rows = [listed.get(row.number, row) for row in rows]
    if as_json:
        unscored = sum(row.score is None for row in rows)
        worst = [row.as_dict() for row in listed.values()]
        print(json_text({"rows": len(rows), "suspects": len(suspects), "unscored": unscored, "worst": worst}, indent=2))
    else:
        print_suspects(list(listed.values()), len(suspects), len(rows))
    if options.output:
        write_output(options.output, (json_text(row.as_dict()) + "\n" for row in rows))


def read_rows(index: LengthIndex, language: str | None, aligner: Aligner) -> list[InspectedRow]:
    """Return the rows of the index, with the language of those that name none."""
    from canter.inference.languages import Defaults

    defaults = Defaults.of(aligner.tokenizer, language)
    found: list[InspectedRow] = []
    for number in range(len(index)):
        utterance, fields = index.utterance_and_fields(number)
        try:
            found.append(InspectedRow(number, defaults.complete(utterance), fields))
        except CanterError as error:
            found.append(InspectedRow(number, None, fields, error=str(error)))
    return found


def score_rows(aligner: Aligner, rows: Sequence[InspectedRow]) -> list[InspectedRow]:
    """Return the rows with their scores, under a progress bar."""
    from dataclasses import replace

    from canter.cli.progress import counting
    from canter.evaluation.suspects import suspicions

    found = list(rows)
    wanted = [(place, row.utterance) for place, row in enumerate(rows) if row.utterance is not None]
    with counting("scoring", len(wanted)) as advance:
        for done, (number, score) in enumerate(aligner.scores([utterance for _, utterance in wanted]), 1):
            place = wanted[number][0]
            failed = isinstance(score, str)
            found[place] = replace(rows[place], error=score) if failed else replace(rows[place], score=score)
            advance(done, len(wanted))
    scored = [(place, row.score, row.utterance) for place, row in enumerate(found) if row.score and row.utterance]
    judged = suspicions([score for _, score, _ in scored], [utterance.text_lang for *_, utterance in scored])
    for (place, *_), suspicion in zip(scored, judged):
        found[place] = replace(found[place], suspicion=suspicion)
    return found


def with_heard(aligner: Aligner, rows: Sequence[InspectedRow]) -> list[InspectedRow]:
    """Return the rows with what the model transcribes, where their audio can be read."""
    from dataclasses import replace

    from canter.inference.transcribe import transcribe

    wanted = [row.utterance for row in rows if row.utterance is not None and row.error is None]
    results = iter(transcribe(aligner.engine, aligner.tokenizer, wanted))
    return [
        replace(row, heard=next(results).text) if row.utterance is not None and row.error is None else row
        for row in rows
    ]


def print_suspects(rows: Sequence[InspectedRow], suspects: int, total: int) -> None:
    """Print the worst rows as a table, and what is listed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from canter.evaluation.suspects import IMPROBABLE, RATE

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=200)
    console.print(
        f"{suspects:,} of {total:,} rows are suspects ({suspects / max(1, total):.1%}): audio that cannot be read; "
        f"'improbable', log probability {IMPROBABLE:g} robust standard deviations below the median of the language; "
        f"'unfinished', the model expects more text (probability of the end below 1 %); 'rate', characters a "
        f"second {RATE:g} deviations from the median"
    )
    if not rows:
        return
    table = Table(
        "row", "suspicion", "reason", "score", "seconds", "file", "text", "recognised", box=None, pad_edge=False
    )
    for column in (table.columns[0], table.columns[1], table.columns[3], table.columns[4]):
        column.justify = "right"
    for row in rows:
        name = Path(redacted(str(row.fields.get("audio_filepath") or ""))).name
        text = str(row.utterance.text if row.utterance else row.fields.get("text") or "")
        seconds = f"{row.utterance.duration:.2f}" if row.utterance else ""
        figures = ("", "unreadable", "")
        if row.suspicion and row.score:
            figures = (f"{row.suspicion.value:.2f}", row.suspicion.reason, f"{row.score.logprob:.2f}")
        heard = row.error if row.heard is None else row.heard
        table.add_row(
            str(row.number), *figures, seconds, escape(name), *(escape(start_of(one or "")) for one in (text, heard))
        )
    console.print(table)


def start_of(text: str) -> str:
    """Return the start of a text on one line."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
