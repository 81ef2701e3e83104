"""The report of a training run: its folder, read as it is, finished or not, and told as one page.

What a run folder holds: ``config.yaml``; ``metrics.jsonl``, one JSON object a line of kind ``train`` or
``valid``; ``skipped.jsonl``, the utterances that could not be used; ``budget.json``; ``checkpoints/``.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from canter.corpus.index import LengthIndex
from canter.errors import BudgetError, ConfigError, ManifestError
from canter.planning.budget import Budget
from canter.reporting import figures, html
from canter.reporting.budget_figures import budget_figure, largest_batches
from canter.reporting.html import Html

Row = dict[str, Any]
TIMELINE = 40  # steps of the ranks' timeline


@dataclass(frozen=True)
class Run:
    """What could be read of a run folder, and what could not."""

    folder: Path
    train: list[Row]
    """``train`` rows by step; of a step done twice, after a resume, the last."""
    valid: list[Row]
    skipped: list[Row]
    events: list[Row]
    """What was unusual: micro-batches out of memory, steps without a finite loss, settings that changed."""
    config: str
    budget: Row
    checkpoints: list[str]
    missing: list[str] = field(default_factory=list)
    """Sentences on what is not there or cannot be read."""

    def column(self, name: str, kind: str = "train") -> np.ndarray:
        """A metric of every row as float64 (N,), NaN where a row lacks it."""
        rows = self.train if kind == "train" else self.valid
        values = [row.get(name) for row in rows]
        return np.array(
            [value if isinstance(value, (int, float)) else math.nan for value in values], dtype=float
        )


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Reads a run folder; raises `ConfigError` where it is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the run folder that canter train wrote")
    if not (folder / "metrics.jsonl").exists() and not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} is not a run folder: it has neither metrics.jsonl nor config.yaml")
    missing: list[str] = []
    metrics = _json_lines(folder / "metrics.jsonl", missing, "the run has not reached its first step")
    train = {row["step"]: row for row in metrics if row.get("kind") == "train" and _is_step(row)}
    valid = {row["step"]: row for row in metrics if row.get("kind") == "valid" and _is_step(row)}
    if metrics and not valid:
        missing.append("No validation yet, so no WER.")
    done_twice = sum(row.get("kind") == "train" for row in metrics) - len(train)
    if done_twice > 0:
        missing.append(f"{done_twice} steps were done again after a resume; the last time counts.")
    skipped = (
        _json_lines(folder / "skipped.jsonl", missing, "") if (folder / "skipped.jsonl").exists() else []
    )
    checkpoints = sorted(path.name for path in folder.glob("checkpoints/step-*") if path.is_dir())
    if not checkpoints:
        missing.append("No checkpoint yet.")
    return Run(
        folder=folder,
        train=[train[step] for step in sorted(train)],
        valid=[valid[step] for step in sorted(valid)],
        skipped=skipped,
        events=[row for row in metrics if row.get("kind") == "event"],
        config=_text(folder / "config.yaml", missing),
        budget=_json(folder / "budget.json", missing),
        checkpoints=checkpoints,
        missing=missing,
    )


def run_report(folder: str | os.PathLike[str]) -> Html:
    """The page of a run folder, finished or not."""
    run = read_run(folder)
    name = run.folder.resolve().name
    steps = int(run.column("step")[-1]) if run.train else 0
    lead = f"{steps:,} steps, {_hours(run)} of audio" if steps else "No steps yet"
    blocks = [html.cards(headline(run))] if run.train else []
    blocks += [html.note(sentence) for sentence in run.missing]
    blocks += [
        *progress(run),
        *efficiency(run),
        *budgeted(run),
        *happened(run.events),
        *speech(run.valid),
        *skipped(run.skipped),
        *setup(run),
    ]
    return html.page(f"Run {name}", f"{lead}.", *blocks, eyebrow="Canter training report")


def headline(run: Run) -> list[tuple[str, str, str]]:
    """The cards on top."""
    seconds, audio = np.nansum(run.column("seconds")), np.nansum(run.column("audio_seconds"))
    cards = []
    scored = [row for row in run.valid if isinstance(row.get("wer"), (int, float))]
    if scored:
        best = min(scored, key=lambda row: row["wer"])
        cards.append(
            (f"{best['wer']:.1%}", "best WER", f"at step {best['step']:,}; last {scored[-1]['wer']:.1%}")
        )
    loss = run.column("loss")
    if np.isfinite(loss).any():
        last = figures.smooth(loss, max(3, len(loss) // 50))[-1]
        cards.append((f"{last:.3g}", "training loss", f"first step {loss[np.isfinite(loss)][0]:.3g}"))
    if seconds > 0:
        cards.append((f"{audio / seconds:,.0f}", "audio hours per hour", f"{duration(seconds)} of steps"))
        wait = np.nansum(run.column("data_wait_seconds"))
        cards.append((f"{wait / seconds:.1%}", "waiting for data", f"{duration(wait)} in all"))
    padding = weighted_padding(run)
    if padding is not None:
        cards.append((f"{padding:.1%}", "padded audio", "over all steps"))
    cards.append((f"{len(run.skipped):,}", "utterances skipped", "listed below" if run.skipped else ""))
    return cards


def curves(train: Sequence[Row], valid: Sequence[Row]) -> list[Html]:
    """Loss, WER and learning rate over steps, from ``train`` and ``valid`` rows; what there is of them."""
    drawings = []
    losses = {"loss": "loss", "CTC": "loss_ctc", "attention": "loss_attention"}
    series = {name: points for name, key in losses.items() if (points := _points(train, key))}
    if points := _points(valid, "loss"):
        series["validation"] = points
    if series:
        drawing = figures.curves(series, smoothed=True, zero=False, size=figures.WIDE)
        drawings.append(html.figure(drawing, "Loss", "Faint: each step. Line: running mean.", wide=True))
    rates = {name.upper(): points for name in ("wer", "cer") if (points := _points(valid, name))}
    if rates:
        drawing = figures.curves(rates, percent=True, markers=True)
        drawings.append(
            html.figure(drawing, "Error rates in validation", "Held-out utterances, decoded in full.")
        )
    names = sorted({key for row in valid for key in row if key.startswith("bleu_")})
    if scores := {name.removeprefix("bleu_"): points for name in names if (points := _points(valid, name))}:
        drawing = figures.curves(scores, markers=True)
        drawings.append(html.figure(drawing, f"BLEU in validation, into {', '.join(scores)}", "0 to 100."))
    if points := _points(train, "learning_rate"):
        drawings.append(html.figure(figures.curves({"learning rate": points}), "Learning rate"))
    return drawings


def progress(run: Run) -> list[Html]:
    """What the model learnt."""
    drawings = curves(run.train, run.valid)
    if not drawings:
        return []
    return [html.section("Progress", "What the model learnt, step by step.", html.grid(*drawings))]


def efficiency(run: Run) -> list[Html]:
    """Throughput, padding, waiting, batch shapes and step times."""
    drawings = []
    steps, seconds, audio = run.column("step"), run.column("seconds"), run.column("audio_seconds")
    if np.nansum(seconds) > 0 and np.isfinite(audio).any():
        window = max(5, len(steps) // 40)
        rate = figures.smooth(audio, window) / np.maximum(figures.smooth(seconds, window), 1e-9)
        drawing = figures.curves({"rate": (steps, rate)}, size=figures.WIDE)
        caption = f"Running over {window} steps."
        drawings.append(html.figure(drawing, "Audio hours per wall hour", caption, wide=True))
    if points := _points(run.train, "padding"):
        drawing = figures.curves({"padding": points}, percent=True, smoothed=True)
        caption = "The share of encoder input that is padding, step by step."
        drawings.append(html.figure(drawing, "Padded audio", caption))
    wait = run.column("data_wait_seconds")
    if np.isfinite(wait).any() and np.nansum(seconds) > 0:
        share = wait / np.maximum(seconds, 1e-9)
        drawing = figures.curves({"wait": (steps, share)}, percent=True, smoothed=True)
        caption = "The share of a step in which the device had nothing to do."
        drawings.append(html.figure(drawing, "Waiting for data", caption))
    frames, tokens, batch = (run.column(name) for name in ("frames_max", "tokens_max", "batch"))
    known = np.isfinite(frames) & np.isfinite(tokens) & np.isfinite(batch)
    if known.any():
        drawing = figures.batch_shapes(frames[known], tokens[known], batch[known])
        caption = "Short utterances travel in large batches, long ones in small: each fills the same memory."
        drawings.append(html.figure(drawing, "Batch shapes", caption))
    if points := _points(run.train, "memory_filled"):
        series = {"of the budget, predicted": points}
        if (peak := _points(run.train, "memory_peak")) and max(peak[1]) > 0:
            series["of the device, peak"] = peak
        drawing = figures.curves(series, percent=True, smoothed=True)
        drawings.append(html.figure(drawing, "Memory filled", "What micro-batches use of what there is."))
    ranks = [row["rank_seconds"] for row in run.train if isinstance(row.get("rank_seconds"), list)]
    if ranks and len(ranks[-1]) > 1:
        last = [row for row in ranks if len(row) == len(ranks[-1])][-TIMELINE:]
        drawing = figures.rank_timeline(last)
        caption = f"The last {len(last)} steps: computing in colour, waiting for the slowest rank in grey."
        drawings.append(html.figure(drawing, "Ranks", caption, wide=True))
    if np.isfinite(seconds).any():
        drawing = figures.histogram(seconds, xlabel="seconds")
        drawings.append(html.figure(drawing, "Step time", "Even steps mean that no rank waits long."))
    if not drawings:
        return []
    lead = "Where the time went: on speech, on padding, or waiting."
    return [html.section("Efficiency", lead, html.grid(*drawings))]


def budgeted(run: Run) -> list[Html]:
    """The largest batch for every length, and where the probes are there, how well they are explained."""
    try:
        budget = Budget.from_json(run.budget)
        index = LengthIndex.open(run.folder / "lengths.arrow")
        fitting = _probes(run.folder / "budget.probes.jsonl", budget)
    except (BudgetError, ManifestError):  # an unfinished folder; the budget itself is shown as it is
        return []
    caption = "The batch that memory holds, by duration and tokens; points are utterances, red ones do not fit alone."
    if fitting:
        drawing = budget_figure(budget, fitting, index.seconds, index.tokens)
        caption = f"Left, {len(fitting)} steps measured before the run, against the budget made from them. {caption}"
    else:
        drawing = largest_batches(budget, index.seconds, index.tokens)
    lead = "What fits on the device, and how long it takes."
    return [html.section("Budget", lead, html.figure(drawing, "Largest batch", caption, wide=bool(fitting)))]


def _probes(journal: Path, budget: Budget) -> list:
    """The steps that a budget was made from, where the run measured it itself."""
    if not journal.exists():
        return []
    from canter.tuning.probe import read_probes  # imports torch

    found = read_probes(journal)
    return [probe for on, probe in found if on.items() <= budget.measured_on.items() and probe.fits]


def happened(events: Sequence[Row], count: int = 50) -> list[Html]:
    """What was unusual, step by step."""
    if not events:
        return []
    rows = []
    for row in events[:count]:
        rest = {k: v for k, v in row.items() if k not in ("kind", "step", "what", "time", "rows")}
        rows.append(
            (row.get("step", ""), row.get("what", ""), ", ".join(f"{k} {v}" for k, v in rest.items()))
        )
    more = f" The first {count} of {len(events):,}." if len(events) > count else ""
    table = html.table(["step", "what", "details"], rows, text_columns=3)
    return [html.section("Events", f"What was unusual; the run went on.{more}", table)]


def speech(valid: Sequence[Row], count: int = 8) -> list[Html]:
    """The last validation's transcripts beside their references."""
    with_examples = [row for row in valid if row.get("examples")]
    if not with_examples:
        return []
    last = with_examples[-1]
    examples = [
        (
            str(item.get("name") or f"example {place}"),
            str(item["text"]),
            str(item["pred_text"]),
            item.get("lang"),
        )
        for place, item in enumerate(last["examples"][:count], 1)
        if isinstance(item, dict) and "text" in item and "pred_text" in item
    ]
    lead = f"Validation at step {last['step']:,}: reference in grey, hypothesis below, mistakes marked."
    return [html.section("Transcripts", lead, html.transcripts(examples))] if examples else []


def skipped(rows: Sequence[Row], count: int = 50) -> list[Html]:
    """What could not be used, by reason and one by one."""
    if not rows:
        return []
    reasons = Counter(str(row.get("reason", "")).split(":")[0] for row in rows)
    listed = [(row.get("file", ""), row.get("line", ""), row.get("reason", "")) for row in rows[:count]]
    heading = f"The first {count} of {len(rows):,}" if len(rows) > count else f"All {len(rows):,}"
    return [
        html.section(
            "Skipped",
            "Utterances that could not be used; the run went on without them.",
            html.table(
                ["reason", "utterances"], [(name, f"{number:,}") for name, number in reasons.most_common()]
            ),
            html.details(heading, html.table(["file", "line", "reason"], listed, text_columns=3)),
        )
    ]


def setup(run: Run) -> list[Html]:
    """Configuration, budget and checkpoints."""
    blocks = []
    if run.config:
        blocks.append(html.details("Configuration", html.element("pre", run.config)))
    if run.budget:
        blocks.append(html.details("Budget", html.element("pre", json.dumps(run.budget, indent=2))))
    if run.checkpoints:
        blocks.append(html.details("Checkpoints", html.element("pre", "\n".join(run.checkpoints))))
    return [html.section("Set-up", "What was run, exactly.", *blocks)] if blocks else []


def weighted_padding(run: Run) -> float | None:
    """Padded share of all steps' audio: 1 − Σ audio / Σ (audio / (1 − padding)); None where not recorded."""
    padding, audio = run.column("padding"), run.column("audio_seconds")
    known = np.isfinite(padding) & np.isfinite(audio) & (padding < 1) & (audio > 0)
    if not known.any():
        return None
    return float(1 - audio[known].sum() / (audio[known] / (1 - padding[known])).sum())


def duration(seconds: float) -> str:
    """``42 s``, ``7 min 5 s``, ``3 h 12 min``."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _hours(run: Run) -> str:
    hours = np.nansum(run.column("audio_seconds")) / 3600
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"


def _points(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]] | None:
    """Steps and values of the rows that have this key as a finite number; None without any."""
    points = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
    return ([step for step, _ in points], [value for _, value in points]) if points else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_step(row: Row) -> bool:
    return isinstance(row.get("step"), int)


def _json_lines(path: Path, missing: list[str], without: str) -> list[Row]:
    """The objects of a JSONL file. A torn last line, of a run that was killed, is named and left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        missing.append(f"No {path.name}: {without}.")
        return []
    rows, broken = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            broken.append(number)
    if broken:
        missing.append(f"{path.name}: {len(broken)} unreadable lines, the first is line {broken[0]}.")
    return rows


def _text(path: Path, missing: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        missing.append(f"No {path.name}.")
        return ""


def _json(path: Path, missing: list[str]) -> Row:
    text = _text(path, missing)
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        missing.append(f"{path.name} is not JSON: {error}.")
        return {}
    return value if isinstance(value, dict) else {}
