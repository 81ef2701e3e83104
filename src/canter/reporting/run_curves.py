"""Figures of a training run over its steps: what it learnt, and where the time went.

A curve of fewer than two points is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from canter.reporting import figures, html
from canter.reporting.gain import Gain
from canter.reporting.html import Html
from canter.reporting.run_folder import Row, Run, is_number

TIMELINE = 40  # steps of the ranks' timeline
NEGLIGIBLE = 0.01  # fraction of the time below which waiting for data is not drawn
LISTED = 8  # rows of the table of numbers under a curve
Points = tuple[list[float], list[float]]


def curves(train: Sequence[Row], valid: Sequence[Row]) -> list[Html]:
    """Return figures of loss, error rates and learning rate over steps; without those of fewer than two points."""
    drawings = []
    rates = {name.upper(): points for name in ("wer", "cer") if (points := _points(valid, name))}
    losses = {"loss": "loss", "CTC": "loss_ctc", "attention": "loss_attention"}
    series = {name: points for name, key in losses.items() if (points := _points(train, key))}
    if points := _points(valid, "loss"):
        series["validation"] = points
    for part in ("CTC", "attention"):  # a part that has no weight, or that is the whole
        if part in series and (series[part] == series.get("loss") or not any(series[part][1])):
            del series[part]
    if series:
        wide = bool(rates)
        size = figures.WIDE if wide else figures.HALF
        drawing = figures.draw_curves(series, smoothed=True, zero=False, marks=phases(train), size=size)
        caption = "Faint: each step. Line: running mean." if len(train) > 20 else ""
        drawings.append(_curve(drawing, "Loss", caption, series, "{:.3g}", wide=wide))
    if rates:
        drawing = figures.draw_curves(rates, percent=True, markers=True)
        caption = "Held-out utterances, decoded in full."
        drawings.append(_curve(drawing, "Error rates in validation", caption, rates, "{:.1%}"))
    names = sorted({key for row in valid for key in row if key.startswith("bleu_")})
    if scores := {name.removeprefix("bleu_"): points for name in names if (points := _points(valid, name))}:
        drawing = figures.draw_curves(scores, markers=True)
        title = f"BLEU in validation, into {', '.join(scores)}"
        drawings.append(_curve(drawing, title, "0 to 100.", scores, "{:.1f}"))
    if points := _points(train, "learning_rate"):
        marks = settled_anew(train)
        caption = "As each step used it."
        if marks:
            caption += " Dotted: the number of steps was estimated again, to fit --minutes."
        drawing = figures.draw_curves({"learning rate": points}, marks=marks)
        drawings.append(_curve(drawing, "Learning rate", caption, {"learning rate": points}, "{:.2e}"))
    return drawings


def phases(train: Sequence[Row]) -> dict[str, float]:
    """Return the step at which the decoder joins a run that begins with CTC alone."""
    if not train or is_number(train[0].get("loss_attention")) or "loss_attention" not in train[0]:
        return {}
    joined = next((row["step"] for row in train if is_number(row.get("loss_attention"))), None)
    return {"the decoder joins": joined} if joined is not None else {}


def settled_anew(train: Sequence[Row]) -> dict[str, float]:
    """Return the steps at which a run's number of steps changed, by what it changed to."""
    pairs = pairwise(train)
    return {
        f"{after['steps']:,} steps": after["step"]
        for before, after in pairs
        if is_number(after.get("steps")) and before.get("steps") != after["steps"]
    }


def efficiency(run: Run, found: Gain | None) -> list[Html]:
    """Show throughput, padding, waiting, batch shapes, memory and step times."""
    drawings = list(_throughput(run, found))
    frames, tokens, batch = (run.column(name) for name in ("frames_max", "tokens_max", "batch"))
    known = np.flatnonzero(np.isfinite(frames) & np.isfinite(tokens) & np.isfinite(batch))
    if len(known) > 1:
        known = known[:: max(1, len(known) // 3000)]
        drawing = figures.draw_batch_shapes(frames[known], tokens[known], batch[known])
        caption = "Short utterances share large batches, long ones small batches."
        alt = f"Batches of {batch[known].min():.0f} to {batch[known].max():.0f} utterances."
        drawings.append(html.figure(drawing, "Batch shapes", caption, alt=alt))
    if points := _points(run.train, "memory_filled"):
        series = {"of the budget, predicted": points}
        if (peak := _points(run.train, "memory_peak")) and max(peak[1]) > 0:
            series["of the device, peak measured"] = peak
        drawing = figures.draw_curves(series, percent=True, smoothed=True)
        caption = "Memory of a micro-batch as a fraction of what there is."
        drawings.append(_curve(drawing, "Memory filled", caption, series, "{:.1%}"))
    ranks = [row["rank_seconds"] for row in run.train if isinstance(row.get("rank_seconds"), list)]
    if ranks and len(ranks[-1]) > 1:
        last = [row for row in ranks if len(row) == len(ranks[-1])][-TIMELINE:]
        caption = f"The last {len(last)} steps: computing in colour, waiting for the slowest rank in grey."
        drawings.append(html.figure(figures.draw_rank_timeline(last), "Ranks", caption, wide=True))
    if not drawings:
        return []
    lead = "Where the time went: on speech, on padding, or waiting."
    return [html.section("Efficiency", lead, html.grid(*drawings))]


def _throughput(run: Run, found: Gain | None) -> Iterator[Html]:
    """Yield figures of the speed, and of what slows it down."""
    steps, seconds, audio = run.column("step"), run.column("seconds"), run.column("audio_seconds")
    timed = int(np.isfinite(seconds).sum())
    if np.nansum(seconds) > 0 and np.isfinite(audio).sum() > 1:
        window = max(5, len(steps) // 40)
        rate = figures.smooth(audio, window) / np.maximum(figures.smooth(seconds, window), 1e-9)
        drawing = figures.draw_curves({"rate": (steps, rate)})
        series = {"hours per hour": (steps.tolist(), rate.tolist())}
        caption = f"Running mean over {window} steps."
        yield _curve(drawing, "Audio hours per wall hour", caption, series, "{:,.0f}")
    if points := _points(run.train, "padding"):
        levels = {}
        if found:
            levels = {f"{row.name}, predicted": row.figures.padded_audio for row in found.others}
        drawing = figures.draw_curves({"this run": points}, percent=True, smoothed=True, levels=levels)
        caption = "Fraction of the encoder's input that is padding, step by step."
        yield _curve(drawing, "Padded audio", caption, {"padding": points}, "{:.1%}")
    if timed > 1:
        median = float(np.nanmedian(seconds))
        series = {"seconds": (steps.tolist(), seconds.tolist())}
        top = 4 * float(np.nanquantile(seconds, 0.9))  # a first step that waits for workers would flatten the rest
        drawing = figures.draw_curves({"seconds": (steps, np.minimum(seconds, top))}, smoothed=True)
        caption = f"Seconds a step: median {median:.3g}, 95% below {np.nanquantile(seconds, 0.95):.3g}."
        yield _curve(drawing, "Step time", caption, series, "{:.3g}")
        yield html.figure(
            figures.draw_histogram(seconds, xlabel="seconds"),
            "Distribution of step times",
            "Number of steps by their time. Even steps mean that no rank waits long.",
            alt=caption,
        )
    wait = run.column("data_wait_seconds")
    if np.isfinite(wait).sum() > 1 and np.nansum(wait) > NEGLIGIBLE * np.nansum(seconds) > 0:
        share = wait / np.maximum(seconds, 1e-9)
        drawing = figures.draw_curves({"wait": (steps, share)}, percent=True, smoothed=True)
        caption = f"Fraction of a step in which the device had nothing to do; {duration(np.nansum(wait))} in all."
        series = {"waiting": (steps.tolist(), share.tolist())}
        yield _curve(drawing, "Waiting for data", caption, series, "{:.1%}")


def _curve(
    drawing: Figure,
    title: str,
    caption: str,
    series: Mapping[str, Points],
    form: str,
    *,
    wide: bool = False,
) -> Html:
    """Return a figure of curves with its description and a table of some of its numbers."""
    told = [f"{name} from {form.format(y[0])} to {form.format(y[-1])}" for name, (_, y) in series.items()]
    columns = [dict(zip(x, y)) for x, y in series.values()]
    steps = sorted({step for column in columns for step in column})
    chosen = [steps[place] for place in np.unique(np.linspace(0, len(steps) - 1, LISTED).astype(int))]
    rows = [
        (
            f"{step:,.0f}",
            *(form.format(column[step]) if is_number(column.get(step)) else "–" for column in columns),
        )
        for step in chosen
    ]
    table = html.table(["step", *series], rows, text_columns=0)
    return html.figure(drawing, title, caption, wide=wide, alt="; ".join(told), numbers=table)


def duration(seconds: float) -> str:
    """Return ``42 s``, ``7 min 5 s`` or ``3 h 12 min``."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _points(rows: Sequence[Row], key: str) -> Points | None:
    """Return steps and values of the rows that have this key as a finite number; None for fewer than two."""
    points = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    return ([step for step, _ in points], [value for _, value in points]) if len(points) > 1 else None
