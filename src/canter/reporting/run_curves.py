"""Draw a training run over its steps: loss and error rates, and where the time went.

Curves of fewer than two points are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from canter.reporting import figures, html
from canter.reporting.gain import Gain
from canter.reporting.html import Html
from canter.reporting.run_folder import Row, RunRecord, is_number

TIMELINE = 40  # steps in the timeline of ranks
NEGLIGIBLE = 0.01  # fraction of the time below which waiting for data is not drawn
LISTED = 8  # rows in the table of numbers under a curve
Points = tuple[Sequence[float], Sequence[float]]


def curves(train: Sequence[Row], valid: Sequence[Row]) -> Iterator[Html]:
    """Yield figures of loss, error rates and learning rate over steps."""
    rates = _series(valid, {"WER": "wer", "CER": "cer"})
    losses = _series(
        train, {"loss": "loss", "CTC": "loss_ctc", "attention": "loss_attention", "teacher": "loss_teacher"}
    )
    for part in ("CTC", "attention"):  # a part with weight 0, or equal to the total loss
        if part in losses and (losses[part] == losses.get("loss") or not any(losses[part][1])):
            del losses[part]
    losses |= _series(valid, {"validation": "loss"})
    if losses:
        caption = "Faint: each step. Line: running mean." if len(train) > 20 else ""
        marks = ctc_warmup_end(train)
        yield _curve("Loss", losses, "{:.3g}", caption, wide=bool(rates), smoothed=True, zero=False, marks=marks)
    if rates:
        caption = "Held-out utterances, decoded completely."
        yield _curve("Error rates in validation", rates, "{:.1%}", caption, markers=True)
    languages = sorted({key for row in valid for key in row if key.startswith("bleu_")})
    if scores := _series(valid, {name.removeprefix("bleu_"): name for name in languages}):
        yield _curve(f"BLEU in validation, into {', '.join(scores)}", scores, "{:.1f}", "0 to 100.", markers=True)
    if learning_rates := _series(train, {"learning rate": "learning_rate"}):
        marks = changed_totals(train)
        caption = "Learning rate of each step."
        if marks:
            caption += " Dotted: the number of steps was estimated again, to fit --minutes."
        yield _curve("Learning rate", learning_rates, "{:.2e}", caption, marks=marks)


def ctc_warmup_end(train: Sequence[Row]) -> dict[str, float]:
    """Return the step that ends a CTC-only warm-up, by its caption; empty without one."""
    if not train or is_number(train[0].get("loss_attention")) or "loss_attention" not in train[0]:
        return {}
    ended = next((row["step"] for row in train if is_number(row.get("loss_attention"))), None)
    return {"the decoder joins": ended} if ended is not None else {}


def changed_totals(train: Sequence[Row]) -> dict[str, float]:
    """Return the steps at which the run's total number of steps changed, by the new total."""
    return {
        f"{after['steps']:,} steps": after["step"]
        for before, after in pairwise(train)
        if is_number(after.get("steps")) and before.get("steps") != after["steps"]
    }


def efficiency(run: RunRecord, found: Gain | None) -> Html:
    """Return the section on throughput, padding, waiting, batch shapes, memory and step times."""
    drawings = [*_throughput(run, found), *_batches(run)]
    return html.section("Efficiency", "Time spent on speech, on padding, and waiting.", html.grid(*drawings))


def _throughput(run: RunRecord, found: Gain | None) -> Iterator[Html]:
    steps, seconds, audio = run.column("step"), run.column("seconds"), run.column("audio_seconds")
    timed = int(np.isfinite(seconds).sum())
    if np.nansum(seconds) > 0 and np.isfinite(audio).sum() > 1:
        window = max(5, len(steps) // 40)
        rate = figures.smooth(audio, window) / np.maximum(figures.smooth(seconds, window), 1e-9)
        series = {"hours per hour": (steps.tolist(), rate.tolist())}
        yield _curve("Audio hours per wall hour", series, "{:,.0f}", f"Running mean over {window} steps.")
    if padding := _series(run.train, {"padding": "padding"}):
        levels = {f"{row.name}, predicted": row.figures.padded_audio for row in found.others} if found else {}
        caption = "Fraction of the encoder's input that is padding, step by step."
        drawn = {"this run": padding["padding"]}
        yield _curve("Padded audio", padding, "{:.1%}", caption, drawn=drawn, smoothed=True, levels=levels)
    if timed > 1:
        median = float(np.nanmedian(seconds))
        caption = f"Seconds a step: median {median:.3g}, 95% below {np.nanquantile(seconds, 0.95):.3g}."
        top = 4 * float(np.nanquantile(seconds, 0.9))  # a first step that waits for workers would flatten the others
        series = {"seconds": (steps.tolist(), seconds.tolist())}
        drawn = {"seconds": (steps.tolist(), np.minimum(seconds, top).tolist())}
        yield _curve("Step time", series, "{:.3g}", caption, drawn=drawn, smoothed=True)
        yield html.figure(
            figures.draw_histogram(seconds, xlabel="seconds"),
            "Distribution of step times",
            "Number of steps by their time. Even steps mean that no rank waits long.",
            alt=caption,
        )
    wait = run.column("data_wait_seconds")
    if np.isfinite(wait).sum() > 1 and np.nansum(wait) > NEGLIGIBLE * np.nansum(seconds) > 0:
        caption = f"Fraction of a step in which the device was idle; {duration(np.nansum(wait))} in all."
        series = {"waiting": (steps.tolist(), (wait / np.maximum(seconds, 1e-9)).tolist())}
        yield _curve("Waiting for data", series, "{:.1%}", caption, smoothed=True)


def _batches(run: RunRecord) -> Iterator[Html]:
    frames, tokens, batch = (run.column(name) for name in ("frames_max", "tokens_max", "batch"))
    known = np.flatnonzero(np.isfinite(frames) & np.isfinite(tokens) & np.isfinite(batch))
    if len(known) > 1:
        known = known[:: max(1, len(known) // 3000)]
        drawing = figures.draw_batch_shapes(frames[known], tokens[known], batch[known])
        caption = "Short utterances share large batches, long ones small batches."
        alt = f"Batches of {batch[known].min():.0f} to {batch[known].max():.0f} utterances."
        yield html.figure(drawing, "Batch shapes", caption, alt=alt)
    if memory := _series(run.train, {"of the budget, predicted": "memory_filled"}):
        peak = _series(run.train, {"of the device, peak measured": "memory_peak"})
        memory |= {name: points for name, points in peak.items() if max(points[1]) > 0}
        caption = "Memory of a micro-batch as a fraction of the memory available."
        yield _curve("Memory filled", memory, "{:.1%}", caption, smoothed=True)
    ranks = [row["rank_seconds"] for row in run.train if isinstance(row.get("rank_seconds"), list)]
    if ranks and len(ranks[-1]) > 1:
        last = [row for row in ranks if len(row) == len(ranks[-1])][-TIMELINE:]
        caption = f"The last {len(last)} steps: computing in colour, waiting for the slowest rank in grey."
        yield html.figure(figures.draw_rank_timeline(last), "Ranks", caption, wide=True)


def _curve(
    title: str,
    series: Mapping[str, Points],
    form: str,
    caption: str,
    *,
    drawn: Mapping[str, Points] | None = None,
    wide: bool = False,
    smoothed: bool = False,
    markers: bool = False,
    zero: bool = True,
    levels: Mapping[str, float] | None = None,
    marks: Mapping[str, float] | None = None,
) -> Html:
    """Return a figure of curves, described in words and by a table of some of its numbers (format ``form``).

    ``drawn`` takes the place of ``series`` in the figure; other options are those of `figures.draw_curves`.
    """
    drawing = figures.draw_curves(
        drawn or series,
        percent=form.endswith("%}"),
        smoothed=smoothed,
        markers=markers,
        zero=zero,
        levels=levels,
        marks=marks,
        size=figures.WIDE if wide else figures.HALF,
    )
    alt = "; ".join(f"{name} from {form.format(y[0])} to {form.format(y[-1])}" for name, (_, y) in series.items())
    columns = [dict(zip(x, y)) for x, y in series.values()]
    steps = sorted({step for column in columns for step in column})
    chosen = [steps[place] for place in np.unique(np.linspace(0, len(steps) - 1, LISTED).astype(int))]
    rows = [
        (f"{step:,.0f}", *(form.format(column[step]) if is_number(column.get(step)) else "–" for column in columns))
        for step in chosen
    ]
    return html.figure(
        drawing, title, caption, wide=wide, alt=alt, numbers=html.table(["step", *series], rows, text_columns=0)
    )


def duration(seconds: float) -> str:
    """Return ``42 s``, ``7 min 5 s`` or ``3 h 12 min``."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _series(rows: Sequence[Row], keys: Mapping[str, str]) -> dict[str, Points]:
    """Return steps and values of each key of ``keys`` by name, leaving out those with fewer than two finite numbers."""
    found: dict[str, Points] = {}
    for name, key in keys.items():
        points = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
        if len(points) > 1:
            found[name] = [step for step, _ in points], [value for _, value in points]
    return found
