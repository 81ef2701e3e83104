"""The page of a training run, finished or not: what it reached, what its batches gained, how it went."""

import json
import os
from collections import Counter

import numpy as np

from canter.reporting import figures, html
from canter.reporting.figures import budget_figure, draw_largest_batches
from canter.reporting.gain import Gain, gain
from canter.reporting.html import Card, Html
from canter.reporting.run_curves import curves, duration, efficiency
from canter.reporting.run_folder import Run, is_number, read_run
from canter.reporting.validation import validation_transcripts


def run_report(folder: str | os.PathLike[str]) -> Html:
    """Return the page of a run folder."""
    run = read_run(folder)
    found = gain(run)
    blocks = [html.cards(headline(run, found))] if run.train else []
    blocks += [html.note(sentence) for sentence in run.missing]
    blocks += [
        *batching(run, found),
        *validation_transcripts(run),
        *progress(run),
        *efficiency(run, found),
        *budgeted(run),
        *problems(run),
        *setup(run),
    ]
    name = run.folder.resolve().name
    return html.page(f"Run {name}", opening(run), *blocks, eyebrow="Canter training report")


def opening(run: Run) -> str:
    """Return one sentence on what was trained."""
    if not run.train:
        return "No steps yet."
    steps = int(run.column("step")[-1])
    init = run.settings.get("init")
    start = f"From {os.path.basename(str(init).rstrip('/'))}" if init else "From scratch"
    if not run.settings:
        start = "Trained"
    total = run.train[-1].get("steps")
    of = f" of {total:,}" if isinstance(total, int) and total > steps else ""
    text = f"{start}, {steps:,}{of} steps over {_hours(run)} of audio"
    if last := run.train[-1].get("epoch"):
        text += f" ({last + 1} epochs begun)"
    scored = [row["wer"] for row in run.valid if is_number(row.get("wer"))]
    if len(scored) > 1:
        text += f"; the WER on held-out speech went from {scored[0]:.1%} to {scored[-1]:.1%}"
    return text + "."


def headline(run: Run, found: Gain | None) -> list[Card]:
    """Return the cards on top."""
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
    padding = weighted_padding(run)
    if found:
        own, other = found.own.figures, found.others[0].figures
        note = f"random batches: {other.padded_compute:.1%}"
        cards.append((f"{own.padded_compute:.1%}", "padded compute", note, "predicted"))
        cards.append((f"{found.speedup:.1f}×", "faster epochs", "than with random batches", "predicted"))
    elif padding is not None:
        cards.append((f"{padding:.1%}", "padded audio", "fraction of the audio computed", "measured"))
    cards += _memory_card(run, found)
    if seconds > 0:
        rate = audio / seconds
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
        cards.append((shown, "audio hours per hour", f"trained for {duration(seconds)}", "measured"))
    return cards


def _memory_card(run: Run, found: Gain | None) -> list[Card]:
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


def batching(run: Run, found: Gain | None) -> list[Html]:
    """Compare the run's batches with those of other strategies."""
    if found is None:
        return []
    rows = [*found.others, found.own]
    names = [row.name for row in rows]
    hours = [row.figures.hours for row in rows]
    padded = [row.figures.padded_compute for row in rows]
    picture = figures.draw_padding(
        {f"{len(found.drawn)} drawn at random": found.drawn, "A batch of this run": found.batch}
    )
    ladder = figures.draw_epochs(names, hours, padded, best="this run")
    bars = ", ".join(f"{row.name} {duration(3600 * row.figures.hours)}" for row in rows)
    header = (
        "batches", "", "padded compute", "padded audio", "memory filled", "mean batch", "updates an epoch",
        "epoch", "speed-up",
    )  # fmt: skip
    cells: list[tuple[object, ...]] = [
        (
            row.name,
            html.origin("predicted"),
            f"{row.figures.padded_compute:.1%}",
            f"{row.figures.padded_audio:.1%}",
            f"{row.figures.memory_filled:.1%}",
            f"{row.figures.mean_batch:,.1f}",
            f"{row.updates:,.0f}",
            duration(3600 * row.figures.hours),
            f"{rows[0].figures.hours / row.figures.hours:.2f}×",
        )
        for row in rows
    ]
    cells.append(_measured(run, found))
    return [
        html.section(
            "What the batches gained",
            "Every utterance of a batch is padded to the longest one, and the padding is computed like speech.",
            html.figure(
                picture,
                "Padding in a batch",
                "A row an utterance, its audio coloured and its padding grey.",
                wide=True,
                alt="Two batches, each utterance a bar; the random one is mostly padding.",
            ),
            html.figure(
                ladder,
                "One epoch",
                Html(f"Time by the run's budget; grey is spent on padding. {html.origin('predicted')}"),
                wide=True,
                alt=f"Predicted time of an epoch: {bars}.",
            ),
            html.table(header, cells, text_columns=2, best=len(rows) - 1),
            html.element("p", comparison(run, found), class_="lead"),
        )
    ]


def _measured(run: Run, found: Gain) -> tuple[object, ...]:
    """Return the row of the table with what the run measured."""
    seconds, audio = np.nansum(run.column("seconds")), np.nansum(run.column("audio_seconds"))
    utterances = np.nansum(run.column("utterances"))
    padding, peak = weighted_padding(run), np.nansum(run.column("memory_peak"))
    steps = int(np.isfinite(run.column("utterances")).sum())
    return (
        "this run",
        html.origin("measured"),
        "–",
        "–" if padding is None else f"{padding:.1%}",
        f"{np.nanmax(run.column('memory_peak')):.1%}" if peak > 0 else "–",
        f"{found.own.figures.mean_batch:,.1f}",
        f"{found.epoch_utterances * steps / utterances:,.0f}" if utterances > 0 else "–",
        duration(found.epoch_audio * seconds / audio) if audio > 0 else "–",
        "–",
    )


def comparison(run: Run, found: Gain) -> str:
    """Return the sentences on how the other strategies' figures were computed, and what limits the run's batches."""
    assert run.planned
    index, budget = run.planned
    if found.fills_memory:
        limit = "The memory budget limits the batches, of this run and of the others."
    else:
        limit = f"{limited_by(run)} The others have batches of the same mean size, so as many updates an epoch."
    whole = f"all {len(index):,}" if found.utterances == len(index) else f"a sample of {found.utterances:,}"
    text = (
        f"{limit} Predicted figures are the planner's, for {whole} utterances of lengths.arrow, with the memory and "
        f"time of budget.json; those of this run are for the {found.taken:,} utterances of its batches"
        f"{', times what an epoch has of them' if found.taken < len(index) else ''}. Measured ones are from its steps."
    )
    if budget.frame_seconds >= 1:
        text += (
            f" The model pads every utterance to {budget.frame_seconds:g} s, which only the measured padding counts;"
            " with --pad-seconds 0 a Whisper keeps their lengths."
        )
    return text


def limited_by(run: Run) -> str:
    """Return a sentence on what else than memory limits the run's batches, as the run itself resolved it if it did."""
    batches = run.settled.get("batches")
    if isinstance(batches, dict) and batches.get("limited_by"):
        return f"This run's batches are limited by {batches['limited_by']}."
    seconds = run.settings.get("batch_seconds")
    if is_number(seconds):
        return f"--batch-seconds {seconds:g} limits this run's batches, not memory."
    return "The number of updates an epoch limits this run's batches, not memory: the data set is small."


def progress(run: Run) -> list[Html]:
    """Show what the model learnt."""
    drawings = curves(run.train, run.valid)
    if not drawings:
        return []
    return [html.section("Progress", "What the model learnt, step by step.", html.grid(*drawings))]


def budgeted(run: Run) -> list[Html]:
    """Show the largest batch for every length, and how well the measured probes are explained where they are there."""
    if run.planned is None:
        return []
    index, budget = run.planned
    fitting = _probes(run)
    if fitting is None:
        return []
    caption = "The batch that memory holds, by duration and tokens; points are utterances, red ones do not fit alone."
    if fitting:
        drawing = budget_figure(budget, fitting, index.seconds, index.tokens)
        caption = f"Left, {len(fitting)} steps measured before the run, against the budget made from them. {caption}"
    else:
        drawing = draw_largest_batches(budget, index.seconds, index.tokens)
    lead = "What fits on the device, and how long it takes."
    return [html.section("Budget", lead, html.figure(drawing, "Largest batch", caption, wide=bool(fitting)))]


def _probes(run: Run) -> list | None:
    """Return the steps that the budget was made from, where the run measured it itself; None where they are damaged."""
    journal = run.folder / "budget.probes.jsonl"
    if not journal.exists() or run.planned is None:
        return []
    from canter.errors import BudgetError
    from canter.tuning.probe import read_probes  # imports torch

    try:
        found = read_probes(journal)
    except BudgetError:
        return None
    return [probe for on, probe in found if on.items() <= run.planned[1].measured_on.items() and probe.fits]


def problems(run: Run, count: int = 50) -> list[Html]:
    """List utterances that were not used, and unusual events."""
    blocks = []
    lists = (
        ("Manifest rows that could not be used", run.unreadable),
        ("Utterances that fit in no batch", run.left_out),
        ("Audio that turned out unusable", run.skipped),
    )
    for title, rows in lists:
        if not rows:
            continue
        reasons = Counter(str(row.get("reason", "")).split(":")[0] for row in rows)
        counted = [(name, f"{number:,}") for name, number in reasons.most_common(10)]
        listed = [(row.get("file", ""), row.get("line", ""), row.get("reason", "")) for row in rows[:count]]
        heading = f"The first {count} of {len(rows):,}" if len(rows) > count else f"All {len(rows):,}"
        blocks += [
            html.element("h3", title),
            html.table(["reason", "utterances"], counted),
            html.details(heading, html.table(["file", "line", "reason"], listed, text_columns=3)),
        ]
    if run.events:
        rows = []
        for row in run.events[:count]:
            rest = {k: v for k, v in row.items() if k not in ("kind", "step", "what", "time", "rows")}
            rows.append((row.get("step", ""), row.get("what", ""), ", ".join(f"{k} {v}" for k, v in rest.items())))
        more = f", the first {count} of {len(run.events):,}" if len(run.events) > count else ""
        blocks += [
            html.element("h3", f"Events{more}"),
            html.table(["step", "what", "details"], rows, text_columns=3),
        ]
    if not blocks:
        if not run.train:
            return []
        return [html.section("Problems", "None: every utterance was used, and no step was unusual.")]
    return [html.section("Problems", "What was not used or unusual; the run went on.", *blocks)]


def setup(run: Run) -> list[Html]:
    """Show the resolved settings, and configuration, budget and checkpoints in full."""
    blocks = []
    if rows := resolved(run):
        blocks.append(html.table(["setting", "value"], rows, text_columns=2))
    if run.config:
        blocks.append(html.details("Configuration", html.element("pre", run.config)))
    if run.budget:
        blocks.append(html.details("Budget", html.element("pre", json.dumps(run.budget, indent=2))))
    if run.checkpoints:
        best = run.best.get("checkpoint")
        listed = [f"{name} (best)" if name == best else name for name in run.checkpoints]
        blocks.append(html.details("Checkpoints", html.element("pre", "\n".join(listed))))
    return [html.section("Settings", "As they were resolved, and in full.", *blocks)] if blocks else []


def resolved(run: Run) -> list[tuple[str, str]]:
    """Return the settings that a reader asks for first, with their values."""
    measured = run.budget.get("measured_on")
    on = measured if isinstance(measured, dict) else {}
    rows = [
        ("model", on.get("model_shape") or on.get("model")),
        ("initial weights", run.settings.get("init") or ("random" if run.settings else None)),
        ("device", on.get("device")),
        ("ranks", run.ranks if run.train else None),
        *(
            (key.replace("_", " "), value)
            for key, value in run.settled.items()
            if not isinstance(value, dict) and key != "checksum"
        ),
        *((f"batches: {key.replace('_', ' ')}", value) for key, value in (run.settled.get("batches") or {}).items()),
        ("batching strategy", run.settings.get("strategy")),
    ]
    optimizer = run.settings.get("optimizer")
    if isinstance(optimizer, dict):
        rows.append(("optimiser", on.get("optimizer") or optimizer.get("name")))
    rates = run.column("learning_rate")
    if np.isfinite(rates).any():
        rows.append(("highest learning rate used", f"{np.nanmax(rates):.3g}"))
    return [
        (
            name,
            f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value),
        )
        for name, value in rows
        if value is not None
    ]


def weighted_padding(run: Run) -> float | None:
    """Return the padded fraction of all steps' audio, 1 - sum audio / sum (audio / (1 - padding)); None where it was
    not recorded."""
    padding, audio = run.column("padding"), run.column("audio_seconds")
    known = np.isfinite(padding) & np.isfinite(audio) & (padding < 1) & (audio > 0)
    if not known.any():
        return None
    return float(1 - audio[known].sum() / (audio[known] / (1 - padding[known])).sum())


def _hours(run: Run) -> str:
    hours = np.nansum(run.column("audio_seconds")) / 3600
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
