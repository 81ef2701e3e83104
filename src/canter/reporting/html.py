"""Make a self-contained HTML page: figures are inline SVG, the style sheet is inside, nothing is fetched.

Every function returns `Html`. Text given as ``str`` is escaped, `Html` is not. An empty `Html` leaves its place out.
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
from canter.evaluation.wer import Operation, ScoredUtterance, percent, score_texts
from canter.files import write_text
from canter.reporting.figures import BLUE, GRID, INK, MUTED, STYLE

# these colours of the figures follow the page's light or dark theme
_THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", BLUE: "var(--blue)"}
Origin = Literal["measured", "predicted"]


class Html(str):
    """Text that is HTML and needs no escaping."""


def escape(value: object) -> Html:
    """Return a value as HTML."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(tag: str, *content: object, **attributes: str) -> Html:
    """Return an element: ``element("p", "a < b", class_="lead")`` is ``<p class="lead">a &lt; b</p>``."""
    given = "".join(f' {name.rstrip("_")}="{html.escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{given}>{''.join(map(escape, content))}</{tag}>")


def section(title: str, lead: str | Html, *content: Html) -> Html:
    """Return a titled part of the page: heading, lead sentence and blocks; empty where no block has content."""
    if not any(content):
        return Html()
    heading = element("header", element("h2", title), element("p", lead, class_="lead") if lead else Html())
    return element("section", heading, *content, id=re.sub(r"\W+", "-", title.lower()).strip("-"))


def origin(kind: Origin) -> Html:
    """Return a badge that marks a figure as measured or predicted."""
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
    """Return the figure as inline SVG under its title; a ``wide`` one takes a complete row of a grid.

    For readers who cannot see the figure, ``alt`` describes it in words and ``numbers`` is a table of its values.
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
    """Return blocks in two columns where there is room; empty without blocks."""
    return element("div", *blocks, class_="grid") if any(blocks) else Html()


Card = tuple[str, str, str] | tuple[str, str, str, Origin]


def cards(figures: Iterable[Card]) -> Html:
    """Return headline figures: (value, name, note), and optionally whether the value was measured or predicted."""
    return element("div", *map(_card, figures), class_="cards")


def _card(card: Card) -> Html:
    value, name, note, *kind = card
    return element(
        "div",
        element("div", value, class_="value"),
        element("div", name, class_="name"),
        element("div", note, class_="note") if note else Html(),
        *map(origin, kind),
        class_="card",
    )


def table(
    header: Sequence[object], rows: Iterable[Sequence[object]], *, text_columns: int = 1, best: int | None = None
) -> Html:
    """Return a table; the first ``text_columns`` are left-aligned, the others right-aligned, row ``best`` is marked."""

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


def transcripts(*blocks: Html) -> Html:
    """Return a list of what `compared` and `scored` return."""
    return element("div", *blocks, class_="transcripts")


def compared(label: str, reference: str, hypothesis: str, lang: str | None) -> Html:
    """Return a reference above its hypothesis with errors marked, after the standard normalisation."""
    result = score_texts([reference], [hypothesis], [lang])
    rate = f"WER {percent(result.wer, 0)}" if result.utterances else ""
    return _transcript(label, rate, reference, marked(reference, hypothesis, lang))


def scored(label: str, item: ScoredUtterance) -> Html:
    """Return the reference of a scored utterance above its hypothesis with errors marked."""
    reference = " ".join(word for _, word, _ in item.alignment if word)
    return _transcript(label, f"WER {percent(item.counts.wer, 0)}", reference, aligned(item.alignment))


def _transcript(label: str, rate: str, reference: str, hypothesis: Html) -> Html:
    return element(
        "div",
        element("div", element("span", label), element("span", rate, class_="wer"), class_="label"),
        element("p", reference, class_="reference"),
        element("p", hypothesis, class_="hypothesis"),
        class_="transcript",
    )


def marked(reference: str, hypothesis: str, lang: str | None, normalize: Normalization = "standard") -> Html:
    """Return the normalised hypothesis with its errors marked; see `aligned`."""
    result = score_texts([reference], [hypothesis], [lang], normalize=normalize)
    if not result.utterances:
        return escape(hypothesis or "(nothing)")
    return aligned(result.utterances[0].alignment)


def aligned(alignment: Iterable[tuple[Operation, str, str]]) -> Html:
    """Return the words of a hypothesis with substitutions, insertions and deletions marked.

    ``alignment`` holds (operation, reference word, hypothesis word).
    """
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
    """Return the legend of the marks of `aligned`."""
    marks = (element("mark", "substituted"), element("ins", "inserted"), element("del", "deleted"))
    return element("p", Html(" ".join(marks)), class_="error-key")


def details(summary: str, *content: Html) -> Html:
    """Return content that opens on a click."""
    return element("details", element("summary", summary), *content)


def note(text: str | Html) -> Html:
    """Return a remark, such as that a file is missing."""
    return element("p", text, class_="missing")


def page(title: str, lead: str | Html, *content: Html, eyebrow: str = "") -> Html:
    """Return the complete document."""
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


def write_page(document: Html, path: str | os.PathLike[str]) -> Path:
    """Write the page atomically, create its folder where needed, and return its path.

    Raises ConfigError where it cannot be written.
    """
    path = Path(path)
    try:
        write_text(path, document)
    except OSError as error:
        raise ConfigError(f"the page cannot be written to {path} ({error.strerror}); name another file") from None
    return path
