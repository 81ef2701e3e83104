"""Make the page of a training run, finished or not: results, gain of its batches, transcripts, curves and settings."""

import json
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from canter.evaluation.wer import Score, ScoredUtterance, score_texts
from canter.reporting import figures, html
from canter.reporting.gain import Gain, gain
from canter.reporting.html import Card, Html
from canter.reporting.run_curves import curves, duration, efficiency
from canter.reporting.run_folder import Row, RunRecord, is_number, read_run

LISTED = 50  # rows of a list of problems
WORST, DRAWN = 4, 6  # utterances of a validation shown: with most errors, and at random
HISTORY = 5  # validations shown of one utterance
OWN_BATCH = "A batch of this run"
PADDED = "Every utterance of a batch is padded to the longest one, and the padding is computed like speech."
PACKED = (
    "The utterances of this run's batches stand one after the other; only attention, features and subsampling pad, "
    "each in groups of utterances of like length. In batches of the others every utterance is padded to the longest."
)


def run_report(folder: str | os.PathLike[str]) -> Html:
    """Return the page of a run folder. Raises ConfigError where the folder is none."""
    run = read_run(folder)
    found = gain(run)
    return html.page(
        f"Run {run.folder.resolve().name}",
        _opening(run),
        html.cards(_headline(run, found)) if run.train else Html(),
        *(html.note(sentence) for sentence in run.missing),
        _batching(run, found),
        _transcripts(run),
        html.section("Progress", "Training and validation, step by step.", html.grid(*curves(run.train, run.valid))),
        efficiency(run, found),
        _budget(run),
        _problems(run),
        _settings(run),
        eyebrow="Canter training report",
    )


def _opening(run: RunRecord) -> str:
    if not run.train:
        return "No steps yet."
    steps = int(run.column("step")[-1])
    init = run.settings.get("init")
    start = f"From {os.path.basename(str(init).rstrip('/'))}" if init else "From scratch"
    if not run.settings:
        start = "Trained"
    total = run.train[-1].get("steps")
    of = f" of {total:,}" if isinstance(total, int) and total > steps else ""
    hours = np.nansum(run.column("audio_seconds")) / 3600
    audio = f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
    text = f"{start}, {steps:,}{of} steps over {audio} of audio"
    if last := run.train[-1].get("epoch"):
        text += f" ({last + 1} epochs begun)"
    scored = [row["wer"] for row in run.valid if is_number(row.get("wer"))]
    if len(scored) > 1:
        text += f"; the WER on held-out speech went from {scored[0]:.1%} to {scored[-1]:.1%}"
    return text + "."


def _headline(run: RunRecord, found: Gain | None) -> list[Card]:
    seconds, audio = np.nansum(run.column("seconds")), np.nansum(run.column("audio_seconds"))
    cards: list[Card] = []
    scored = [row for row in run.valid if is_number(row.get("wer"))]
    if scored:
        best = min(scored, key=lambda row: row["wer"])
        at = f"best, at step {best['step']:,}; last {scored[-1]['wer']:.1%}"
        if best is scored[-1]:
            at = f"at step {best['step']:,}, the last"
        cards.append((f"{best['wer']:.1%}", "WER in validation", at, "measured"))
    loss = run.column("loss")
    known = loss[np.isfinite(loss)]
    if len(known) and not scored:
        last = known[-max(3, len(known) // 50) :].mean()
        cards.append((f"{last:.3g}", "training loss", "running mean of the last steps", "measured"))
    if found:
        own, other = found.own.figures, found.others[0].figures
        note = f"random batches: {other.padded_compute:.1%}"
        cards.append((f"{own.padded_compute:.1%}", "padded compute", note, "predicted"))
        note = "than with random batches, by the budget"
        cards.append((f"{found.speedup:.1f}×", "faster epochs", note, "predicted"))
    elif run.padded_fraction is not None:
        cards.append((f"{run.padded_fraction:.1%}", "padded audio", "fraction of the audio computed", "measured"))
    cards += _memory_card(run, found)
    if seconds > 0:
        note = f"trained for {duration(seconds)}"
        if found:
            note += f"; the budget predicted {_rounded(found.own.audio_rate)}"
        cards.append((_rounded(audio / seconds), "audio hours per hour", note, "measured"))
    return cards


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _memory_card(run: RunRecord, found: Gain | None) -> list[Card]:
    """Return the card of the memory filled: the peak of the device where it was measured, else the budget's figure."""
    peak, filled = run.column("memory_peak"), run.column("memory_filled")
    if np.nansum(peak) > 0:
        note = "peak of the device"
        if np.isfinite(filled).any():
            note += f"; {np.nanmean(filled):.0%} of the budget, predicted"
        return [(f"{np.nanmax(peak):.0%}", "memory filled", note, "measured")]
    if not np.isfinite(filled).any():
        return []
    note = "of the budget"
    if found:
        note += f"; random batches: {found.others[0].figures.memory_filled:.1%}"
    return [(f"{np.nanmean(filled):.1%}", "memory filled", note, "predicted")]


# -- batches, beside those of other strategies --


def _batching(run: RunRecord, found: Gain | None) -> Html:
    if found is None:
        return Html()
    rows = [*found.others, found.own]
    hours = [row.figures.hours for row in rows]
    padded = [row.figures.padded_compute for row in rows]
    picture = figures.draw_padding(
        {f"{len(found.drawn)} drawn at random": found.drawn, OWN_BATCH: found.batch},
        packed=(OWN_BATCH,) if found.packed else (),
    )
    bars = figures.draw_epochs([row.name for row in rows], hours, padded, best="this run")
    times = ", ".join(f"{row.name} {duration(3600 * row.figures.hours)}" for row in rows)
    return html.section(
        "What the batches gained",
        Html(
            f"{PACKED if found.packed else PADDED} Figures of the planner are {html.origin('predicted')}, those of the "
            f"run's steps {html.origin('measured')}."
        ),
        _comparison(run, found),
        html.element("p", _explanation(run, found), class_="lead"),
        html.figure(
            picture,
            "Padding in a batch",
            "One row for each utterance, its audio coloured and its padding grey.",
            wide=True,
            alt="Two batches, each utterance a bar; the random one has the most padding.",
        ),
        html.figure(
            bars,
            "One epoch",
            Html(f"Time by the run's budget; grey is spent on padding. {html.origin('predicted')}"),
            wide=True,
            alt=f"Predicted time of an epoch: {times}.",
        ),
    )


def _comparison(run: RunRecord, found: Gain) -> Html:
    """Return the table of predicted and measured figures: a column for each strategy, and two for this run."""
    rows = [*found.others, found.own]
    planned = [row.figures for row in rows]
    hours = [3600 * one.hours for one in planned]
    steps, timed = (int(np.isfinite(run.column(name)).sum()) for name in ("utterances", "seconds"))
    seconds, audio, utterances, waited = (
        float(np.nansum(run.column(name))) for name in ("seconds", "audio_seconds", "utterances", "data_wait_seconds")
    )
    waiting, peak = run.column("waiting"), run.column("memory_peak")
    epoch = found.epoch_audio * seconds / audio if audio > 0 and seconds > 0 else None
    rate = audio / seconds if seconds > 0 else None
    step = seconds / timed if seconds > 0 else None
    slowest = float(np.nanmean(waiting)) if np.isfinite(waiting).any() else None
    filled = float(np.nanmax(peak)) if np.nansum(peak) > 0 else None
    updates = found.epoch_utterances * steps / utterances if utterances > 0 else None
    none = [None] * len(rows)
    # name, format, predicted for each of the rows, measured in the run, whether to divide the two
    lines: list[tuple[str, str, Sequence[float | None], float | None, bool]] = [
        ("speed relative to random", "{:.2f}×", [hours[0] / one for one in hours], None, False),
        ("time of an epoch", "time", hours, epoch, True),
        ("audio hours per hour", "{:,.1f}", [row.audio_rate for row in rows], rate, True),
        ("time of a step", "time", [row.step_seconds for row in rows], step, True),
        ("padded audio", "{:.1%}", [one.padded_audio for one in planned], run.padded_fraction, False),
        ("padded compute", "{:.1%}", [one.padded_compute for one in planned], None, False),
        ("time of the slowest rank over the mean", "{:.3f}", [one.waiting for one in planned], slowest, False),
        ("time spent waiting for data", "{:.1%}", none, waited / seconds if seconds > 0 else None, False),
        ("memory budget filled by a micro-batch", "{:.1%}", [one.memory_filled for one in planned], None, False),
        ("peak memory of the device", "{:.1%}", none, filled, False),
        ("utterances in a micro-batch", "{:,.1f}", [one.mean_batch for one in planned], None, False),
        ("updates an epoch", "{:,.0f}", [row.updates for row in rows], updates, False),
    ]
    header: list[object] = [""]
    header += [Html(f"{row.name}<br>{html.origin('predicted')}") for row in rows]
    header += [Html(f"this run<br>{html.origin('measured')}"), Html("measured /<br>predicted")]
    cells = []
    for name, form, predicted, measured, divided in lines:
        own = predicted[-1]
        if own is None and measured is None:
            continue
        ratio = measured / own if divided and measured is not None and own else None
        cells.append((name, *(_shown(value, form) for value in (*predicted, measured)), _shown(ratio, "{:.2f}")))
    return html.table(header, cells)


def _shown(value: float | None, form: str) -> str:
    """Return a figure by its format, "time" for seconds, or a dash where there is none."""
    if value is None:
        return "–"
    return duration(value) if form == "time" else form.format(value)


def _explanation(run: RunRecord, found: Gain) -> str:
    """Explain how the other strategies' figures were computed, and what limits the run's batches."""
    assert run.planned
    index, budget = run.planned
    if found.fills_memory:
        limit = "The memory budget limits the batches, of this run and of the others."
    else:
        limit = f"{_limit(run)} The others have batches of the same mean size, so as many updates an epoch."
    planned = f"all {len(index):,}" if found.utterances == len(index) else f"a sample of {found.utterances:,}"
    scaled = ", scaled to an epoch" if found.taken < len(index) else ""
    text = (
        f"{limit} Predicted figures are the planner's, for {planned} utterances of lengths.arrow, with the memory and "
        f"time of budget.json; those of this run are for the {found.taken:,} utterances of its batches{scaled}. "
        f"Measured ones are of all {len(run.train):,} steps, the first included"
    )
    if np.isfinite(run.column("seconds")).any():
        text += f"; half of the steps took at most {duration(float(np.nanmedian(run.column('seconds'))))}"
    ranks = f" and {run.ranks} ranks" if run.ranks > 1 else ""
    text += (
        f". The gain over random is only predicted, for the same budget{ranks}, as the others were not trained. "
        "Predicted times leave out waiting for data."
    )
    if budget.frame_seconds >= 1:
        text += (
            f" The model pads every utterance to {budget.frame_seconds:g} s, which only the measured padding counts;"
            " with --pad-seconds 0 a Whisper keeps their lengths."
        )
    return text


def _limit(run: RunRecord) -> str:
    """Return a sentence on what limits the run's batches other than memory: as run.json says, else by its settings."""
    batches = run.resolved.get("batches")
    if isinstance(batches, dict) and batches.get("limited_by"):
        return f"This run's batches are limited by {batches['limited_by']}."
    seconds = run.settings.get("batch_seconds")
    if is_number(seconds):
        return f"--batch-seconds {seconds:g} limits this run's batches, not memory."
    return "The number of updates an epoch limits this run's batches, not memory: the data set is small."


# -- transcripts of validation --


def _transcripts(run: RunRecord) -> Html:
    """Return the section on the best validation: errors by kind, and utterances with their errors marked."""
    kept = [(row, found) for row in run.valid if (found := _validation_rows(run, row))]
    if not kept:
        return Html()
    row, rows = min(kept, key=lambda pair: (_rate(pair[0]), -pair[0]["step"]))
    scored = _scored(rows)
    if not scored.utterances:
        return Html()
    worst = scored.worst(WORST)
    others = [item for item in scored.utterances if item not in worst]
    random = np.random.default_rng(0)
    drawn = [others[i] for i in sorted(random.permutation(len(others))[:DRAWN])]
    blocks = [_error_counts(scored, rows), html.error_key()]
    for title, items in (("Most errors", worst), ("Drawn at random", drawn)):
        if items:
            shown = [html.scored(_label(item, rows[item.index]), item) for item in items]
            blocks += [html.element("h3", title), html.transcripts(*shown)]
    best = " of the best checkpoint" if run.best.get("checkpoint") == f"step-{row['step']:06d}" else ""
    lead = (
        f"Validation{best} at step {row['step']:,}, {len(rows):,} held-out utterances: the reference in grey, the "
        "transcript below it. Texts are not normalised; the normalised WER ignores case and punctuation."
    )
    return html.section("Transcripts", lead, *blocks, *_history(kept))


def _validation_rows(run: RunRecord, row: Row) -> list[Row]:
    """Return the transcripts of a validation: those kept of all its utterances, else the few in the metrics."""
    examples = [e for e in row.get("examples") or () if isinstance(e, dict) and "text" in e and "pred_text" in e]
    return run.transcripts(row["step"]) or examples


def _rate(row: Row) -> float:
    return row["wer"] if is_number(row.get("wer")) else np.inf


def _scored(rows: Sequence[Row], *, normalized: bool = False) -> Score:
    """Score rows as the validation does, without normalisation, or ``normalized``."""
    texts, transcripts = ([str(row[name]) for row in rows] for name in ("text", "pred_text"))
    languages = [row.get("lang") for row in rows]
    return score_texts(texts, transcripts, languages, normalize="standard" if normalized else "none")


def _error_counts(scored: Score, rows: Sequence[Row]) -> Html:
    total = scored.total
    right = sum(not item.counts.errors for item in scored.utterances)
    normalized = _scored(rows, normalized=True)
    header = ("utterances", "without an error", "words", "substituted", "inserted", "deleted", "WER", "CER")
    cells = [
        f"{total.utterances:,}", f"{right / total.utterances:.0%}", f"{total.words:,}", f"{total.substitutions:,}",
        f"{total.insertions:,}", f"{total.deletions:,}", f"{total.wer:.1%}", f"{total.cer:.1%}",
    ]  # fmt: skip
    if normalized.utterances and abs(normalized.wer - total.wer) > 0.0005:
        header, cells = (*header, "WER, normalised"), [*cells, f"{normalized.wer:.1%}"]
    return html.table(header, [cells], text_columns=0)


def _label(item: ScoredUtterance, row: Row) -> str:
    name = str(row.get("audio_filepath") or row.get("name") or f"example {item.index + 1}").rsplit("/", 1)[-1]
    parts = [name, row.get("lang"), f"{row['duration']:.1f} s" if is_number(row.get("duration")) else None]
    return " · ".join(str(part) for part in parts if part)


def _history(kept: list[tuple[Row, list[Row]]]) -> list[Html]:
    """Return the successive transcripts of the utterance that improved most, where there are several validations."""
    last = {_identity(row) for row in kept[-1][1]}
    kept = [(row, rows) for row, rows in kept if any(_identity(one) in last for one in rows)]
    before, after = word_errors(kept[0][1]), word_errors(kept[-1][1])
    gains = {key: before[key] - after[key] for key in before if key in after}
    if len(kept) < 2 or not gains or max(gains.values()) <= 0:
        return []
    most = max(gains, key=gains.__getitem__)
    found = [(f"{row['step']:,}", one) for row, rows in kept for one in rows if _identity(one) == most]
    places = np.unique(np.linspace(0, len(found) - 1, HISTORY).astype(int))
    cells = []
    for step, one in (found[place] for place in places):
        shown = html.marked(one["text"], one["pred_text"], one.get("lang"), "none")
        cells.append((step, f"{_scored([one]).wer:.0%}", shown))
    cells.append(("", "", html.element("span", found[0][1]["text"], class_="reference")))
    table = html.table(["step", "WER", "transcript; the reference is below"], cells, text_columns=3)
    return [html.element("h3", "One utterance, validation by validation"), table]


def _identity(row: Row) -> tuple[str, str, str]:
    return str(row.get("audio_filepath")), str(row.get("offset")), row["text"]


def word_errors(rows: Sequence[Row]) -> dict[tuple[str, str, str], int]:
    """Return the word errors of each utterance by audio path, offset and text."""
    return {_identity(rows[item.index]): item.counts.errors for item in _scored(rows).utterances}


# -- budget, problems, settings --


def _budget(run: RunRecord) -> Html:
    """Return the section on the largest batch for every length, and on how well the budget explains its probes."""
    if run.planned is None:
        return Html()
    index, budget = run.planned
    caption = "The batch that memory holds, by duration and tokens; points are utterances, red ones do not fit at all."
    journal, fitting = run.folder / "budget.probes.jsonl", []
    if journal.exists():
        from canter.errors import BudgetError
        from canter.tuning.probe import read_probes  # imports torch

        try:
            probes = read_probes(journal)
        except BudgetError:
            return Html()
        fitting = [probe for on, probe in probes if on.items() <= budget.measured_on.items() and probe.fits]
    if fitting:
        drawing = figures.budget_figure(budget, fitting, index.seconds, index.tokens)
        caption = f"Left, {len(fitting)} steps measured before the run, and the budget made from them. {caption}"
    else:
        drawing = figures.draw_largest_batches(budget, index.seconds, index.tokens)
    lead = "Memory and time of a micro-batch on this device."
    return html.section("Budget", lead, html.figure(drawing, "Largest batch", caption, wide=bool(fitting)))


def _problems(run: RunRecord) -> Html:
    """Return the section on utterances that were not used, and on unusual events."""
    blocks = []
    lists = (
        ("Manifest rows that could not be used", run.unreadable),
        ("Utterances that fit in no batch", run.left_out),
        ("Audio that could not be used", run.skipped),
    )
    for title, rows in lists:
        if not rows:
            continue
        reasons = Counter(str(row.get("reason", "")).split(":")[0] for row in rows)
        counted = [(name, f"{number:,}") for name, number in reasons.most_common(10)]
        listed = [(row.get("file", ""), row.get("line", ""), row.get("reason", "")) for row in rows[:LISTED]]
        heading = f"The first {LISTED} of {len(rows):,}" if len(rows) > LISTED else f"All {len(rows):,}"
        blocks += [
            html.element("h3", title),
            html.table(["reason", "utterances"], counted),
            html.details(heading, html.table(["file", "line", "reason"], listed, text_columns=3)),
        ]
    if run.events:
        hidden = ("kind", "step", "what", "time", "rows")
        rows = [
            (
                row.get("step", ""),
                row.get("what", ""),
                ", ".join(f"{name} {value}" for name, value in row.items() if name not in hidden),
            )
            for row in run.events[:LISTED]
        ]
        more = f", the first {LISTED} of {len(run.events):,}" if len(run.events) > LISTED else ""
        blocks += [html.element("h3", f"Events{more}"), html.table(["step", "what", "details"], rows, text_columns=3)]
    lead = "Utterances that were not used, and unusual events; the run continued."
    if not blocks and run.train:
        lead, none = "", "None: every utterance was used, and no step was unusual."
        blocks = [html.element("p", none, class_="lead")]
    return html.section("Problems", lead, *blocks)


def _settings(run: RunRecord) -> Html:
    """Return the section on the resolved settings, and on configuration, budget and checkpoints."""
    best = run.best.get("checkpoint")
    checkpoints = "\n".join(f"{name} (best)" if name == best else name for name in run.checkpoints)
    budget = json.dumps(run.budget, indent=2) if run.budget else ""
    rows = _resolved(run)
    blocks = [html.table(["setting", "value"], rows, text_columns=2)] if rows else []
    blocks += [
        html.details(title, html.element("pre", text))
        for title, text in (("Configuration", run.config), ("Budget", budget), ("Checkpoints", checkpoints))
        if text
    ]
    return html.section("Settings", "Resolved settings, and the complete files.", *blocks)


def _resolved(run: RunRecord) -> list[tuple[str, str]]:
    """Return the names and values of the most important settings."""
    measured = run.budget.get("measured_on")
    on = measured if isinstance(measured, dict) else {}
    batches = run.resolved.get("batches") or {}
    rows = {
        "model": on.get("model_shape") or on.get("model"),
        "initial weights": run.settings.get("init") or ("random" if run.settings else None),
        "device": on.get("device"),
        "ranks": run.ranks if run.train else None,
    }
    plain = {name: value for name, value in run.resolved.items() if not isinstance(value, dict) and name != "checksum"}
    rows |= {name.replace("_", " "): value for name, value in plain.items()}
    rows |= {f"batches: {name.replace('_', ' ')}": value for name, value in batches.items()}
    rows["batching strategy"] = run.settings.get("strategy")
    if isinstance(optimizer := run.settings.get("optimizer"), dict):
        rows["optimiser"] = on.get("optimizer") or optimizer.get("name")
    rates = run.column("learning_rate")
    if np.isfinite(rates).any():
        rows["highest learning rate used"] = f"{np.nanmax(rates):.3g}"
    return [
        (name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in rows.items()
        if value is not None
    ]
