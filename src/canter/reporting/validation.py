"""Transcripts of a run's validation, with their errors marked."""

import numpy as np

from canter.evaluation.wer import Score, ScoredUtterance, score_texts
from canter.reporting import html
from canter.reporting.html import Html
from canter.reporting.run_folder import Row, Run, is_number

WORST, DRAWN = 4, 6  # utterances shown
HISTORY = 5  # validations of one utterance shown


def validation_transcripts(run: Run) -> list[Html]:
    """Return the section on the best validation's transcripts: how many errors of which kind, the worst utterances,
    some at random, and how the transcript of one came about."""
    kept = [(row, found) for row in run.valid if (found := _kept(run, row))]
    if not kept:
        return []
    row, rows = min(kept, key=lambda pair: (_rate(pair[0]), -pair[0]["step"]))
    # as the validation scores: the texts as they are
    scored = score_texts(*_texts(rows), [one.get("lang") for one in rows], normalize="none")
    if not scored.utterances:
        return []
    worst = scored.worst(WORST)
    others = [item for item in scored.utterances if item not in worst]
    random = np.random.default_rng(0)
    drawn = [others[i] for i in sorted(random.permutation(len(others))[:DRAWN])]
    blocks = [_summary(scored, rows), html.error_key()]
    for title, items in (("Most errors", worst), ("Drawn at random", drawn)):
        if items:
            shown = [_shown(item, rows[item.index]) for item in items]
            blocks += [html.element("h3", title), html.element("div", *shown, class_="transcripts")]
    blocks += _history(kept)
    best = " of the best checkpoint" if run.best.get("checkpoint") == f"step-{row['step']:06d}" else ""
    lead = (
        f"Validation{best} at step {row['step']:,}, {len(rows):,} held-out utterances: the reference in grey, the "
        "transcript below it. Texts are compared as they are; the normalised WER leaves out case and punctuation."
    )
    return [html.section("What it hears", lead, *blocks)]


def _kept(run: Run, row: Row) -> list[Row]:
    """Return a validation's transcripts: those kept of all its utterances, else the few in the metrics."""
    examples = [e for e in row.get("examples") or () if isinstance(e, dict) and "text" in e and "pred_text" in e]
    return run.transcripts(row["step"]) or examples


def _rate(row: Row) -> float:
    return row["wer"] if is_number(row.get("wer")) else float("inf")


def _texts(rows: list[Row]) -> tuple[list[str], list[str]]:
    return [str(row["text"]) for row in rows], [str(row["pred_text"]) for row in rows]


def _summary(scored: Score, rows: list[Row]) -> Html:
    """Return a table of the errors by kind."""
    total = scored.total
    right = sum(not item.counts.errors for item in scored.utterances)
    plain = score_texts(*_texts(rows), [row.get("lang") for row in rows], normalize="standard")
    header = ("utterances", "without an error", "words", "substituted", "inserted", "deleted", "WER", "CER")
    cells = [
        f"{total.utterances:,}", f"{right / total.utterances:.0%}", f"{total.words:,}", f"{total.substitutions:,}",
        f"{total.insertions:,}", f"{total.deletions:,}", f"{total.wer:.1%}", f"{total.cer:.1%}",
    ]  # fmt: skip
    if plain.utterances and abs(plain.wer - total.wer) > 0.0005:
        header, cells = (*header, "WER, normalised"), [*cells, f"{plain.wer:.1%}"]
    return html.table(header, [cells], text_columns=0)


def _shown(item: ScoredUtterance, row: Row) -> Html:
    name = str(row.get("audio_filepath") or row.get("name") or f"example {item.index + 1}").rsplit("/", 1)[-1]
    parts = [name, row.get("lang"), f"{row['duration']:.1f} s" if is_number(row.get("duration")) else None]
    reference = " ".join(word for _, word, _ in item.alignment if word)
    label = " · ".join(str(part) for part in parts if part)
    return html.transcript(label, f"WER {item.counts.wer:.0%}", reference, html.aligned(item.alignment))


def _history(kept: list[tuple[Row, list[Row]]]) -> list[Html]:
    """Return the transcripts of the utterance that gained most, validation by validation, where there are several."""
    last = {_key(row) for row in kept[-1][1]}
    kept = [(row, rows) for row, rows in kept if any(_key(one) in last for one in rows)]
    before, after = _errors(kept[0][1]), _errors(kept[-1][1])
    gains = {key: before[key] - after[key] for key in before if key in after}
    if len(kept) < 2 or not gains or max(gains.values()) <= 0:
        return []
    most = max(gains, key=gains.__getitem__)
    found = [(f"{row['step']:,}", one) for row, rows in kept for one in rows if _key(one) == most]
    places = np.unique(np.linspace(0, len(found) - 1, HISTORY).astype(int))
    cells = []
    for step, one in (found[place] for place in places):
        scored = score_texts([one["text"]], [one["pred_text"]], [one.get("lang")], normalize="none")
        heard = html.marked(one["text"], one["pred_text"], one.get("lang"), "none")
        cells.append((step, f"{scored.wer:.0%}", heard))
    cells.append(("", "", html.element("span", found[0][1]["text"], class_="reference")))
    table = html.table(["step", "WER", "transcript; the reference is below"], cells, text_columns=3)
    return [html.element("h3", "One utterance, validation by validation"), table]


def _key(row: Row) -> tuple[object, ...]:
    return str(row.get("audio_filepath")), str(row.get("offset")), row["text"]


def _errors(rows: list[Row]) -> dict[tuple[object, ...], int]:
    """Return the word errors of each utterance."""
    scored = score_texts(*_texts(rows), [row.get("lang") for row in rows], normalize="none")
    return {_key(rows[item.index]): item.counts.errors for item in scored.utterances}
