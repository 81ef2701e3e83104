"""One self-contained HTML page: figures inlined as SVG, the style sheet inside, nothing fetched.

Every function returns `Html`. Text given as ``str`` is escaped; `Html` is taken as it is.
"""

import html
import io
import os
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Literal

import matplotlib
from matplotlib.figure import Figure

from canter import __version__
from canter.errors import ConfigError
from canter.evaluation.normalize import Normalization
from canter.evaluation.wer import Operation, percent, score_texts
from canter.files import write_text
from canter.reporting.figures import BLUE, GRID, INK, MUTED, STYLE

# these colours of the figures follow the page's light or dark theme
_THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", BLUE: "var(--blue)"}
Origin = Literal["measured", "predicted"]


class Html(str):
    """Text that is HTML already."""


def escape(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(tag: str, *content: object, **attributes: str) -> Html:
    """``element("p", "a < b", class_="lead")`` is ``<p class="lead">a &lt; b</p>``."""
    given = "".join(f' {name.rstrip("_")}="{html.escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{given}>{''.join(map(escape, content))}</{tag}>")


def section(title: str, lead: str | Html, *content: Html, anchor: str = "") -> Html:
    """A titled part of the page: heading, a sentence on what is to be seen, and the blocks below it."""
    name = anchor or re.sub(r"\W+", "-", title.lower()).strip("-")
    heading = element("header", element("h2", title), element("p", lead, class_="lead") if lead else Html())
    return element("section", heading, *content, id=name)


def origin(kind: Origin) -> Html:
    """Return the badge that says whether a figure was measured or predicted."""
    return element("span", kind, class_=f"origin {kind}")


def figure(
    drawing: Figure,
    title: str,
    caption: str | Html = "",
    *,
    wide: bool = False,
    alt: str = "",
    numbers: Html | None = None,
) -> Html:
    """Return the figure as inline SVG under its title; ``wide`` ones take a whole row of a grid.

    ``alt`` says in words what is to be seen, and ``numbers`` is a table of what is drawn, which opens on a click: for
    readers who do not see the figure.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        drawing.savefig(buffer, format="svg", dpi=160, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    label = html.escape(f"{title}. {alt}" if alt else title)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    for color, variable in _THEME.items():
        svg = svg.replace(color, variable)
    return element(
        "figure",
        element("h3", title),
        Html(svg),
        element("figcaption", caption) if caption else Html(),
        details("Numbers", numbers) if numbers is not None else Html(),
        **({"class_": "wide"} if wide else {}),
    )


def grid(*blocks: Html) -> Html:
    """Blocks in two columns where there is room."""
    return element("div", *blocks, class_="grid")


Card = tuple[str, str, str] | tuple[str, str, str, Origin]


def cards(figures: Iterable[Card]) -> Html:
    """Return headline figures: (value, what it is, a note), and where it is not plain, whether the value was measured
    or predicted."""
    return element("div", *map(_card, figures), class_="cards")


def _card(given: Card) -> Html:
    value, name, note = given[:3]
    kind = given[3] if len(given) == 4 else None
    return element(
        "div",
        element("div", value, class_="value"),
        element("div", name, class_="name"),
        element("div", note, class_="note") if note else Html(),
        origin(kind) if kind else Html(),
        class_="card",
    )


def table(
    header: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    text_columns: int = 1,
    best: int | None = None,
) -> Html:
    """A table: the first ``text_columns`` are set left, the others right; row ``best`` stands out."""

    def line(tag: str, cells: Sequence[object]) -> list[Html]:
        return [
            element(tag, cell, class_="text" if place < text_columns else "number") for place, cell in enumerate(cells)
        ]

    body = [
        element("tr", *line("td", row), **({"class_": "best"} if place == best else {}))
        for place, row in enumerate(rows)
    ]
    head = element("thead", element("tr", *line("th", header))) if any(header) else Html()
    return element("div", element("table", head, element("tbody", *body)), class_="table")


def transcripts(examples: Iterable[tuple[str, str, str, str | None]], normalize: Normalization = "standard") -> Html:
    """Return references above hypotheses, errors marked: rows of (label, reference, hypothesis, language)."""
    blocks = []
    for label, reference, hypothesis, lang in examples:
        scored = score_texts([reference], [hypothesis], [lang], normalize=normalize)
        wer = f"WER {percent(scored.wer, 0)}" if scored.utterances else ""
        blocks.append(transcript(label, wer, reference, marked(reference, hypothesis, lang, normalize)))
    return element("div", *blocks, class_="transcripts")


def transcript(label: object, rate: str, reference: str, hypothesis: Html) -> Html:
    """Return one utterance: its label and error rate, its reference and its hypothesis."""
    return element(
        "div",
        element("div", element("span", label), element("span", rate, class_="wer"), class_="label"),
        element("p", reference, class_="reference"),
        element("p", hypothesis, class_="hypothesis"),
        class_="transcript",
    )


def marked(reference: str, hypothesis: str, lang: str | None, normalize: Normalization = "standard") -> Html:
    """Return the normalised hypothesis with its errors marked (see `aligned`)."""
    scored = score_texts([reference], [hypothesis], [lang], normalize=normalize)
    if not scored.utterances:
        return escape(hypothesis or "(nothing)")
    return aligned(scored.utterances[0].alignment)


def aligned(alignment: Iterable[tuple[Operation, str, str]]) -> Html:
    """Return the words of a hypothesis with substitutions, insertions and deletions marked; ``alignment`` holds
    (operation, reference word, hypothesis word)."""
    words = []
    for operation, word, guess in alignment:
        if operation == "equal":
            words.append(escape(guess))
        elif operation == "delete":
            words.append(element("del", word))
        elif operation == "insert":
            words.append(element("ins", guess, title="not in the reference"))
        else:
            words.append(element("mark", guess, title=f"for: {word}"))
    return Html(" ".join(words))


def error_key() -> Html:
    """Return the key to the marks of `aligned`."""
    marks = (element("mark", "substituted"), element("ins", "inserted"), element("del", "deleted"))
    return element("p", Html(" ".join(marks)), class_="error-key")


def details(summary: str, *content: Html) -> Html:
    """Content that opens on a click."""
    return element("details", element("summary", summary), *content)


def note(text: str | Html) -> Html:
    return element("p", text, class_="missing")


def page(title: str, lead: str | Html, *content: Html, eyebrow: str = "") -> Html:
    """The whole document."""
    css = (files("canter.reporting") / "page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        Html(f"<style>{css}</style>"),
    )
    top = element(
        "header",
        element("p", eyebrow, class_="eyebrow") if eyebrow else Html(),
        element("h1", title),
        element("p", lead, class_="lead"),
        class_="top",
    )
    foot = element("footer", f"Canter {__version__} · {datetime.now():%d %B %Y, %H:%M}")
    body = element("body", element("main", top, *content, foot))
    return Html(f'<!doctype html>\n<html lang="en">{head}{body}</html>\n')


def write(document: Html, path: str | os.PathLike[str]) -> Path:
    """Writes the page, whole or not at all; makes its folder where it is missing. Raises ConfigError where it cannot
    be written."""
    path = Path(path)
    try:
        write_text(path, document)
    except OSError as error:
        raise ConfigError(f"the page cannot be written to {path} ({error.strerror}); name another file") from None
    return path
