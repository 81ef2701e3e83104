"""Make the demo's page: corpus, gain of planning, training, transcripts and cost of decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from canter.reporting import figures, html
from canter.reporting.html import Html
from canter.reporting.run_curves import curves, duration
from canter.reporting.run_folder import Row

CACHES: dict[str, str] = {"none": "nothing cached", "hidden": "hidden states cached", "full": "keys and values cached"}
LANGUAGES = {"en": "English", "de": "German", "es": "Spanish", "fr": "French", "it": "Italian", "nl": "Dutch"}


class CorpusFigures(TypedDict):
    """Sizes of the corpus."""

    utterances: int
    test_utterances: int
    audio_hours: float
    voices: int
    unseen_voices: int
    words: int
    languages: list[str]
    lengths: list[list[float]]
    """[seconds, tokens] of a sample of utterances."""


class StrategyFigures(TypedDict):
    """Predicted figures of a batching strategy."""

    padded_audio: float
    padded_tokens: float
    padded_compute: float
    mean_batch: float
    memory_filled: float
    steps: int
    epoch_hours: float
    mixing_pool: float | None
    speedup: float


class MeasuredSpeed(TypedDict):
    """Measured training speed of `random` and `balanced`."""

    audio_seconds_a_second: dict[str, float]
    speedup: float
    predicted: float
    steps: int
    room_for_longest: int


class ShiftFigures(TypedDict):
    """Decoding speed of one model with one cache."""

    shape: str
    """Encoder and decoder layers, such as 4/6."""
    cache: str
    seconds: float
    rtfx: float
    speedup: float
    """RTFx relative to the first row, which has 1."""
    encoder_seconds: float
    decoder_seconds: float
    parameters: int


class DemoSummary(TypedDict, total=False):
    """Figures of a demo, as ``summary.json`` holds them; a section without figures is left out of the page."""

    quick: bool
    utterances: int
    audio_hours: float
    corpus: CorpusFigures
    strategies: dict[str, StrategyFigures]
    """Figures by strategy; the first is the baseline."""
    room_for_longest: int
    """Memory that ``strategies`` are predicted for, in utterances as long as the longest."""
    measured_speed: MeasuredSpeed
    training: list[Row]
    """Rows of metrics.jsonl."""
    train_seconds: float
    trained_audio_hours: float
    steps: int
    precision: str
    parameters: int
    trained_padding: float
    wer: float
    cer: float
    wer_seen: float
    wer_unseen: float
    wer_by_language: dict[str, float]
    attention_wer: float
    ctc_wer: float
    ctc_weight: float
    rtfx: float
    useful_rows: float
    examples: list[Row]
    """Rows with ``voice, lang, text, pred_text``."""
    decoder_shift: dict[str, ShiftFigures]
    machine: Mapping[str, str | int | None]
    times: dict[str, float]
    """Seconds by stage, and ``total``."""


def demo_report(summary: DemoSummary) -> Html:
    """Return the complete page of a demo."""
    return html.page(
        "From a manifest to transcripts, without the padding",
        _opening(summary),
        html.cards(_headline(summary)),
        _ladder(summary),
        _corpus(summary),
        _training(summary),
        _transcripts(summary),
        _decoder_shift(summary),
        _times(summary),
        _machine(summary),
        eyebrow="Canter demo",
    )


def _opening(summary: DemoSummary) -> Html:
    corpus = summary.get("corpus")
    made = [f"{corpus['utterances']:,} utterances" if corpus else "a corpus"]
    if corpus:
        made.append(f"{corpus['audio_hours']:.1f} hours of speech")
    parts = ["Canter synthesised ", html.element("strong", ", ".join(made))]
    parts.append(", measured time and memory of a training step, planned every batch")
    if "train_seconds" in summary:
        parts += [", trained a model in ", html.element("strong", duration(summary["train_seconds"]))]
    parts.append(" and transcribed sentences the model had never seen.")
    return Html("".join(html.escape(part) for part in parts))


def _headline(summary: DemoSummary) -> list[html.Card]:
    cards: list[html.Card] = []
    strategies = summary.get("strategies", {})
    names = list(strategies)
    if names:
        first, best = strategies[names[0]], strategies[_best(summary)]
        if "padded_compute" in best:
            note = f"of the compute, predicted; {names[0]} batches waste {first['padded_compute']:.0%}"
            cards.append((f"{best['padded_compute']:.1%}", "spent on padding", note))
        if "speedup" in best and "measured_speed" not in summary:
            cards.append((f"{best['speedup']:.1f}×", "faster epochs", f"than {names[0]}, predicted by the budget"))
    if "measured_speed" in summary:
        speed = summary["measured_speed"]
        note = f"audio a second, balanced against random, measured; predicted {speed['predicted']:.1f}×"
        cards.append((f"{speed['speedup']:.1f}×", "faster training", note))
    if "wer" in summary:
        unseen = summary.get("wer_unseen")
        note = "measured" + (f"; unseen voices {unseen:.1%}" if unseen else "")
        cards.append((f"{summary['wer']:.1%}", "word error rate", note))
    if "rtfx" in summary:
        cards.append((f"{summary['rtfx']:,.0f}×", "real time", "RTFx of transcription, measured"))
    shift = _shift_rows(summary)
    if shift:
        base, fast = (min(shift, key=lambda row: abs(row["speedup"] - 1)), max(shift, key=lambda row: row["speedup"]))
        shapes = [f"{row['shape']} layers, {CACHES[row['cache']]}" for row in (fast, base)]
        note = f"measured: {' against '.join(shapes)}"
        cards.append((f"{fast['speedup']:.1f}×", "faster decoding", note))
    elif "times" in summary:
        cards.append((duration(_total(summary["times"])), "in all", "from start to this page"))
    return cards


def _ladder(summary: DemoSummary) -> Html:
    strategies = summary.get("strategies")
    if not strategies:
        return Html()
    names, best = list(strategies), _best(summary)
    blocks = []
    seconds = [pair[0] for pair in summary.get("corpus", {}).get("lengths", [])]
    if len(seconds) >= 60:
        caption = (
            "One row for each utterance of this corpus: twelve drawn at random, and utterances of similar length that "
            "take the same memory. Grey is padding, which is computed and discarded."
        )
        drawing = figures.draw_padding(_two_batches(seconds))
        blocks.append(html.figure(drawing, "What padding is", caption, wide=True))
    if all("epoch_hours" in row and "padded_compute" in row for row in strategies.values()):
        hours = [strategies[name]["epoch_hours"] for name in names]
        padded = [strategies[name]["padded_compute"] for name in names]
        drawing = figures.draw_epochs(names, hours, padded, best=best)
        caption = "Predicted time of an epoch; grey is the part of the compute spent on padding."
        blocks.append(html.figure(drawing, "One epoch", caption, wide=True))
    columns = {
        "padded_compute": ("padded compute", "{:.1%}"),
        "padded_audio": ("padded audio", "{:.1%}"),
        "padded_tokens": ("padded tokens", "{:.1%}"),
        "mean_batch": ("mean batch", "{:,.1f}"),
        "memory_filled": ("memory filled", "{:.1%}"),
        "steps": ("steps", "{:,.0f}"),
        "mixing_pool": ("mixing pool", "{:,.0f}"),
        "speedup": ("speed-up", "{:.2f}×"),
    }
    columns = {key: shown for key, shown in columns.items() if any(key in row for row in strategies.values())}
    rows = [[name, *(_shown(strategies[name].get(key), form) for key, (_, form) in columns.items())] for name in names]
    header = ["strategy", *(title for title, _ in columns.values())]
    blocks.append(html.table(header, rows, best=names.index(best)))
    lead = (
        "Every utterance of a batch is padded to the longest one. The choice of utterances for each batch decides how "
        "much compute padding takes, and how full the memory is. These figures are predicted by the planner, from the "
        "budget that was measured on this machine"
    )
    if "room_for_longest" in summary:
        lead += f", for a memory that holds {summary['room_for_longest']} of the longest utterances"
    return html.section("Batching strategies", lead + ".", *blocks, *_speed(summary))


def _speed(summary: DemoSummary) -> list[Html]:
    """Return the measured training speed, beside the prediction of the budget."""
    speed = summary.get("measured_speed")
    if not speed:
        return []
    rates = speed["audio_seconds_a_second"]
    rows = [[name, f"{rate:,.0f} s", f"{rate / rates['random']:.2f}×"] for name, rate in rates.items()]
    caption = html.element(
        "p",
        f"Measured in this run: forward and backward passes of {speed['steps']} batches of each in turns, with room "
        f"for {speed['room_for_longest']} of the longest utterances; the budget predicts {speed['predicted']:.2f}×.",
    )
    table = html.table(["strategy", "audio trained a second", "speed-up"], rows, best=list(rates).index("balanced"))
    return [caption, table]


def _corpus(summary: DemoSummary) -> Html:
    data = summary.get("corpus")
    if not data:
        return Html()
    languages = data.get("languages", [])
    rows = [
        ("utterances", data.get("utterances"), "{:,}"),
        ("of these for testing", data.get("test_utterances"), "{:,}"),
        ("audio", data.get("audio_hours"), "{:.1f} hours"),
        ("voices", data.get("voices"), "{:,}"),
        ("voices only in the test", data.get("unseen_voices"), "{:,}"),
        ("distinct words", data.get("words"), "{:,}"),
    ]
    shown = [(name, form.format(value)) for name, value, form in rows if isinstance(value, (int, float))]
    if languages:
        shown.append(("languages", ", ".join(_language(code) for code in languages)))
    blocks = [html.table(["", ""], shown)] if shown else []
    lengths = np.asarray(data.get("lengths") or np.empty((0, 2)), dtype=float)
    if len(lengths):
        drawing = figures.draw_lengths(lengths[:, 0], lengths[:, 1])
        blocks.insert(
            0, html.figure(drawing, "Lengths", "Each point is an utterance; above, the histogram of durations.")
        )
    lead = "Composed sentences, spoken by many synthetic voices; no test sentence appears in training."
    return html.section("The corpus", lead, html.grid(*blocks))


def _training(summary: DemoSummary) -> Html:
    rows = summary.get("training") or []
    kinds = {kind: [row for row in rows if row.get("kind") == kind] for kind in ("train", "valid")}
    drawings = [*curves(kinds["train"], kinds["valid"])]
    if not drawings:
        return Html()
    steps = max(row.get("step", 0) for row in rows)
    parts = [f"{steps:,} steps"]
    if "parameters" in summary:
        parts.append(f"{summary['parameters'] / 1e6:.1f} M parameters")
    if "train_seconds" in summary:
        parts.append(f"{duration(summary['train_seconds'])} on this machine")
    if "trained_padding" in summary:
        parts.append(f"{summary['trained_padding']:.1%} of the audio computed was padding (measured)")
    return html.section("Training", ", ".join(parts) + ".", html.grid(*drawings))


def _transcripts(summary: DemoSummary) -> Html:
    rates = [
        ("all test sentences", summary.get("wer")),
        ("voices of training", summary.get("wer_seen")),
        ("other voices", summary.get("wer_unseen")),
        *((_language(code), rate) for code, rate in (summary.get("wer_by_language") or {}).items()),
        ("all, decoded by attention only", summary.get("attention_wer")),
        ("all, decoded by CTC only", summary.get("ctc_wer")),
    ]
    blocks = []
    shown = [(name, f"{rate:.1%}") for name, rate in rates if rate is not None]
    if shown:
        blocks.append(html.table(["test part", "WER"], shown, best=0))
    examples = []
    for row in (summary.get("examples") or [])[:10]:
        label = " · ".join(part for part in (_language(row.get("lang")), row.get("voice")) if part)
        examples.append(html.compared(label, row["text"], row["pred_text"], row.get("lang")))
    if examples:
        blocks.append(html.transcripts(*examples))
    lead = "Sentences that are not in training. Reference in grey, transcript below it, errors marked."
    if "ctc_weight" in summary:
        lead += f" Decoded jointly by attention and CTC (weight {summary['ctc_weight']:g}), greedy search."
    return html.section("Transcripts", lead, *blocks)


def _decoder_shift(summary: DemoSummary) -> Html:
    rows = _shift_rows(summary)
    if not rows:
        return Html()
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    caches = [cache for cache in CACHES if any(row["cache"] == cache for row in rows)]
    fastest = min(rows, key=lambda row: row["seconds"])
    cells = [html.element("div"), *(html.element("div", CACHES[cache], class_="head") for cache in caches)]
    for shape in shapes:
        here = [row for row in rows if row["shape"] == shape]
        encoder, _, decoder = shape.partition("/")
        size = here[0].get("parameters")
        note = f"{decoder} decoder layers" + (f", {size / 1e6:.1f} M parameters" if size else "")
        cells.append(html.element("div", f"{encoder} encoder layers", html.element("span", note), class_="side"))
        for cache in caches:
            cells += [_cell(row, row is fastest) for row in here if row["cache"] == cache][:1] or [html.element("div")]
    square = html.element(
        "div", *cells, class_="square", style=f"grid-template-columns: minmax(150px, 0.7fr) repeat({len(caches)}, 1fr)"
    )
    blocks = [square]
    if all("encoder_seconds" in row and "decoder_seconds" in row for row in rows):
        names = [f"{row['shape']}, {CACHES.get(row['cache'], row['cache'])}" for row in rows]
        parts = {
            "encoder": [row["encoder_seconds"] for row in rows],
            "decoder": [row["decoder_seconds"] for row in rows],
        }
        drawing = figures.draw_stacked_bars(names, parts, xlabel="seconds for one batch")
        blocks.append(html.figure(drawing, "Encoder and decoder", wide=True))
    lead = (
        "Two models of equal size. The encoder runs once for each utterance, the decoder once for each token: moving "
        "layers to the encoder saves time, and so does caching keys and values instead of computing them again. "
        "Measured on this machine, for speed only: these two models are not trained."
    )
    return html.section("Deep and shallow decoders", lead, *blocks)


def _times(summary: DemoSummary) -> Html:
    given = summary.get("times") or {}
    stages = {name.replace("_", " "): float(value) for name, value in given.items() if name != "total"}
    total = _total(given)
    if not stages or total <= 0:
        return Html()
    shades = (*figures.COLORS, "#8a6d3b", "#5b6bb0", "#7a8794")
    colors = [shades[place % len(shades)] for place in range(len(stages))]
    bar = html.element(
        "div",
        *(
            html.element("div", style=f"flex: {seconds / total:.5f}; background: {color}", title=name)
            for color, (name, seconds) in zip(colors, stages.items())
        ),
        class_="share",
    )
    rows = [
        (
            Html(html.element("span", class_="key", style=f"background: {color}") + html.escape(name)),
            duration(seconds),
            f"{seconds / total:.1%}",
        )
        for color, (name, seconds) in zip(colors, stages.items())
    ]
    lead = f"{duration(total)} from start to this page."
    return html.section("Times", lead, bar, html.table(["stage", "time", "fraction"], rows))


def _machine(summary: DemoSummary) -> Html:
    facts = summary.get("machine")
    if not facts:
        return Html()
    rows = [(name.replace("_", " "), value) for name, value in facts.items()]
    listed = html.table(["", ""], rows, text_columns=2)
    return html.section("The machine", "All times on this page were measured on it.", listed)


def _best(summary: DemoSummary) -> str:
    """Return ``balanced`` where it was planned, else the strategy with the least padded compute."""
    strategies = summary.get("strategies", {})
    least = min(strategies, key=lambda name: strategies[name].get("padded_compute", 1.0))
    return "balanced" if "balanced" in strategies else least


def _shown(value: float | None, form: str) -> str:
    if value is None or np.isnan(value):
        return "–"
    return "∞" if np.isinf(value) else form.format(value)


def _language(code: str | None) -> str:
    return LANGUAGES.get(code or "", code or "")


def _two_batches(seconds: Sequence[float], size: int = 12) -> dict[str, list[float]]:
    """Return utterances drawn at random, and neighbours in length that take the same rows x longest."""
    drawn = np.random.default_rng(0).choice(np.asarray(seconds), size, replace=False)
    capacity, alike = size * max(drawn), np.sort(seconds)[len(seconds) // 2 :]
    count = int(np.argmax(np.append(alike * np.arange(1, len(alike) + 1) > capacity, True)))
    return {f"{size} at random": drawn.tolist(), f"{count} of similar length": alike[:count].tolist()}


def _shift_rows(summary: DemoSummary) -> list[ShiftFigures]:
    return list((summary.get("decoder_shift") or {}).values())


def _total(times: Mapping[str, float]) -> float:
    return times["total"] if "total" in times else sum(times.values())


def _cell(row: ShiftFigures, fastest: bool) -> Html:
    """Return a cell: RTFx large, seconds and gain below it."""
    gain = "the baseline" if row["speedup"] == 1 else f"{row['speedup']:.2f}×"
    return html.element(
        "div",
        html.element("b", f"RTFx {row['rtfx']:,.0f}"),
        html.element("span", f"{duration(row['seconds'])} · {gain}"),
        class_="cell best" if fastest else "cell",
    )
