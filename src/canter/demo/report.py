"""The demo's page: what was made, what the plan saves, what the model learnt, what decoding costs.

`demo_report` takes the demo's ``summary.json`` as a dictionary. A part that is missing, as in the quick demo,
leaves its section out. Its keys, all optional:

- ``corpus``: ``utterances, audio_hours, voices, unseen_voices, words, languages``, ``lengths`` as rows of
  [seconds, tokens], ``test_utterances``
- ``strategies``: by name ``padded_audio, padded_tokens, padded_compute, mean_batch, memory_filled, steps,
  epoch_hours, mixing_pool, speedup``; the first is the baseline
- ``room_for_longest``: how many of the longest utterances the memory of ``strategies`` holds
- ``measured_speed``: ``audio_seconds_a_second`` by strategy, ``speedup, predicted, steps, room_for_longest``
- ``training``: rows of metrics.jsonl; ``train_seconds``, ``parameters``, ``trained_padding``
- ``wer, cer, wer_seen, wer_unseen, rtfx``; ``attention_wer, ctc_wer``, where the rest is decoded with ``ctc_weight``;
  ``wer_by_language``: WER by code
- ``examples``: rows of ``voice, lang, text, pred_text``
- ``decoder_shift``: rows, or a dictionary of rows, of ``shape`` (encoder/decoder layers), ``cache`` (``none``,
  ``hidden`` or ``full``), ``seconds, rtfx, speedup`` (1 is the baseline), and where measured
  ``encoder_seconds, decoder_seconds, parameters``
- ``machine``: anything worth naming; ``times``: seconds by stage, and ``total``
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from canter.reporting import figures, html
from canter.reporting.html import Html
from canter.reporting.run_report import curves, duration

Summary = Mapping[str, Any]

# how much a decoder keeps, from nothing to all, see canter.bench.naive
CACHES = {"none": "nothing cached", "hidden": "hidden states cached", "full": "keys and values cached"}
LANGUAGES = {"en": "English", "de": "German", "es": "Spanish", "fr": "French", "it": "Italian", "nl": "Dutch"}


def demo_report(summary: Summary) -> Html:
    """The whole page of a demo."""
    return html.page(
        "From a manifest to transcripts, without the padding",
        opening(summary),
        html.cards(headline(summary)),
        *ladder(summary),
        *corpus(summary),
        *training(summary),
        *transcripts(summary),
        *decoder_shift(summary),
        *times(summary),
        *machine(summary),
        eyebrow="Canter demo",
    )


def opening(summary: Summary) -> Html:
    """One sentence on what has just happened."""
    corpus = summary.get("corpus", {})
    made = [f"{corpus['utterances']:,} utterances" if "utterances" in corpus else "a corpus"]
    if "audio_hours" in corpus:
        made.append(f"{corpus['audio_hours']:.1f} hours of speech")
    parts = ["Canter synthesised ", html.element("strong", ", ".join(made))]
    parts.append(", measured what a training step costs, planned every batch")
    if "train_seconds" in summary:
        parts += [", trained a model in ", html.element("strong", duration(summary["train_seconds"]))]
    parts.append(" and transcribed sentences the model had never seen.")
    return Html("".join(html.escape(part) for part in parts))


def headline(summary: Summary) -> list[tuple[str, str, str]]:
    """The cards on top."""
    cards = []
    names = list(summary.get("strategies", {}))
    if names:
        first, best = summary["strategies"][names[0]], summary["strategies"][_best(summary)]
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
        base, fast = (
            min(shift, key=lambda row: abs(row["speedup"] - 1)),
            max(shift, key=lambda row: row["speedup"]),
        )
        shapes = [f"{row['shape']} layers, {CACHES[row['cache']]}" for row in (fast, base)]
        note = f"measured: {' against '.join(shapes)}"
        cards.append((f"{fast['speedup']:.1f}×", "faster decoding", note))
    elif "times" in summary:
        cards.append((duration(_total(summary["times"])), "in all", "from nothing to this page"))
    return cards


def ladder(summary: Summary) -> list[Html]:
    """The strategies, as bars and as a table."""
    strategies = summary.get("strategies")
    if not strategies:
        return []
    names, best = list(strategies), _best(summary)
    blocks = []
    seconds = [pair[0] for pair in summary.get("corpus", {}).get("lengths", [])]
    if len(seconds) >= 60:
        caption = (
            "Drawn from this corpus, a row an utterance: twelve as chance brings them, and as many of like "
            "length as take the same memory. Grey is computed like the rest, and thrown away."
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
        "Every utterance of a batch is padded to the longest one. Which utterances travel together "
        "decides how much of the work is for nothing, and how full the memory gets. These figures are "
        "predicted by the planner, from the budget that was measured on this machine"
    )
    if "room_for_longest" in summary:
        lead += f", for a memory that holds {summary['room_for_longest']} of the longest utterances"
    return [html.section("The ladder of batching", lead + ".", *blocks, *_speed(summary))]


def _speed(summary: Summary) -> list[Html]:
    """The table of measured training speed, beside what the budget predicts."""
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


def corpus(summary: Summary) -> list[Html]:
    """What was synthesised: a few figures and the lengths."""
    data = summary.get("corpus")
    if not data:
        return []
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
            0,
            html.figure(drawing, "Lengths", "Each point is an utterance; above, how many of each duration."),
        )
    lead = "Composed sentences, spoken by many synthetic voices; no test sentence appears in training."
    return [html.section("The corpus", lead, html.grid(*blocks))]


def training(summary: Summary) -> list[Html]:
    """The curves."""
    rows = summary.get("training") or []
    kinds = {kind: [row for row in rows if row.get("kind") == kind] for kind in ("train", "valid")}
    drawings = curves(kinds["train"], kinds["valid"])
    if not drawings:
        return []
    steps = max(row.get("step", 0) for row in rows)
    parts = [f"{steps:,} steps"]
    if "parameters" in summary:
        parts.append(f"{summary['parameters'] / 1e6:.1f} M parameters")
    if "train_seconds" in summary:
        parts.append(f"{duration(summary['train_seconds'])} on this machine")
    if "trained_padding" in summary:
        parts.append(f"{summary['trained_padding']:.1%} of the audio computed was padding (measured)")
    return [html.section("Training", ", ".join(parts) + ".", html.grid(*drawings))]


def transcripts(summary: Summary) -> list[Html]:
    """Error rates by part of the test, and examples."""
    rates = [
        ("all test sentences", summary.get("wer")),
        ("voices heard in training", summary.get("wer_seen")),
        ("voices never heard", summary.get("wer_unseen")),
        *((_language(code), rate) for code, rate in (summary.get("wer_by_language") or {}).items()),
        ("all, decoded by attention only", summary.get("attention_wer")),
        ("all, decoded by CTC only", summary.get("ctc_wer")),
    ]
    blocks = []
    shown = [(name, f"{rate:.1%}") for name, rate in rates if rate is not None]
    if shown:
        blocks.append(html.table(["test part", "WER"], shown, best=0))
    examples = [
        (
            " · ".join(str(part) for part in (_language(row.get("lang")), row.get("voice")) if part),
            row["text"],
            row["pred_text"],
            row.get("lang"),
        )
        for row in summary.get("examples") or []
    ]
    if examples:
        blocks.append(html.transcripts(examples[:10]))
    if not blocks:
        return []
    lead = "Sentences the model never saw. Reference in grey, transcript below it, mistakes marked."
    if "ctc_weight" in summary:
        lead += f" Decoded jointly by attention and CTC (weight {summary['ctc_weight']:g}), greedy search."
    return [html.section("What it hears", lead, *blocks)]


def decoder_shift(summary: Summary) -> list[Html]:
    """The table of shapes and caches."""
    rows = _shift_rows(summary)
    if not rows:
        return []
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
        "div",
        *cells,
        class_="square",
        style=f"grid-template-columns: minmax(150px, 0.7fr) repeat({len(caches)}, 1fr)",
    )
    blocks = [square]
    if all("encoder_seconds" in row and "decoder_seconds" in row for row in rows):
        names = [f"{row['shape']}, {CACHES.get(row['cache'], row['cache'])}" for row in rows]
        parts = {part: [row[f"{part}_seconds"] for row in rows] for part in ("encoder", "decoder")}
        drawing = figures.draw_stacked_bars(names, parts, xlabel="seconds for one batch")
        blocks.append(html.figure(drawing, "Encoder and decoder", wide=True))
    lead = (
        "Two models of equal size. The encoder runs once an utterance, the decoder once a token: "
        "moving layers into the encoder saves time, and so does keeping keys and values instead of "
        "computing them again. Measured on this machine; speed only, as these two are not trained."
    )
    return [html.section("Deep and shallow decoders", lead, *blocks)]


def times(summary: Summary) -> list[Html]:
    """How long each stage took, as one bar and a table."""
    given = summary.get("times") or {}
    stages = {name.replace("_", " "): float(value) for name, value in given.items() if name != "total"}
    total = _total(given)
    if not stages or total <= 0:
        return []
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
    lead = f"{duration(total)} from nothing to this page."
    return [html.section("Where the time went", lead, bar, html.table(["stage", "time", "share"], rows))]


def machine(summary: Summary) -> list[Html]:
    """What it ran on."""
    facts = summary.get("machine")
    if not facts:
        return []
    rows = [(name.replace("_", " "), value) for name, value in facts.items()]
    listed = html.table(["", ""], rows, text_columns=2)
    return [html.section("The machine", "Every time on this page was taken on it.", listed)]


def _best(summary: Summary) -> str:
    """``balanced`` where it was planned, else the strategy with the least padded compute."""
    strategies = summary["strategies"]
    least = min(strategies, key=lambda name: strategies[name].get("padded_compute", 1.0))
    return "balanced" if "balanced" in strategies else least


def _shown(value: float | None, form: str) -> str:
    if value is None or np.isnan(value):
        return "–"
    return "∞" if np.isinf(value) else form.format(value)


def _language(code: str | None) -> str:
    return LANGUAGES.get(code or "", code or "")


def _two_batches(seconds: Sequence[float], size: int = 12) -> dict[str, list[float]]:
    """Utterances drawn by chance, and neighbours of the sorted ones that fill the same rows x longest."""
    drawn = np.random.default_rng(0).choice(np.asarray(seconds), size, replace=False)
    capacity, alike = size * max(drawn), np.sort(seconds)[len(seconds) // 2 :]
    count = int(np.argmax(np.append(alike * np.arange(1, len(alike) + 1) > capacity, True)))
    return {f"{size} by chance": drawn.tolist(), f"{count} of like length": alike[:count].tolist()}


def _shift_rows(summary: Summary) -> list[Summary]:
    shift = summary.get("decoder_shift") or []
    rows = list(shift.values()) if isinstance(shift, Mapping) else shift
    return list(rows.values() if isinstance(rows, Mapping) else rows)


def _total(times: Mapping[str, float]) -> float:
    return times["total"] if "total" in times else sum(times.values())


def _cell(row: Summary, fastest: bool) -> Html:
    """One cell of the table: RTFx large, seconds and gain below it."""
    gain = "the baseline" if row["speedup"] == 1 else f"{row['speedup']:.2f}×"
    return html.element(
        "div",
        html.element("b", f"RTFx {row['rtfx']:,.0f}"),
        html.element("span", f"{duration(row['seconds'])} · {gain}"),
        class_="cell best" if fastest else "cell",
    )
