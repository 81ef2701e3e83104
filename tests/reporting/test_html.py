"""The page: well formed, escaped, self-contained."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.reporting import figures, html

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Checker(HTMLParser):
    """Collects tags and text, and fails on a tag that is closed out of turn."""

    def __init__(self, document: str):
        super().__init__()
        self.open, self.tags, self.references, self.text = [], [], [], []
        self.feed(document)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_text_is_escaped_everywhere(title, text, other):
    page = html.page(
        "t",
        "l",
        html.cards([(title, text, other)]),
        html.table([title, text], [[other, title]]),
        html.section(title, text, html.note(other), html.details(text, html.element("pre", other))),
        html.transcripts(html.compared(title, text, other, "en")),
    )
    page_tags, plain_tags = (set(Checker(document).tags) for document in (page, html.page("t", "l")))
    assert page_tags - plain_tags <= {
        *("section", "h2", "div", "span", "pre", "mark", "ins", "del", "details", "summary"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }


def test_page_fetches_nothing():
    drawing = figures.draw_curves({"a": ([1, 2], [3, 4]), "b": ([1, 2], [4, 3])}, smoothed=True)
    page = html.page("t", "l", html.figure(drawing, "Loss", "caption"))
    checked = Checker(page)
    assert all(reference.startswith(("#", "data:")) for reference in checked.references)
    assert "@import" not in page
    assert "url(http" not in page
    assert "svg" in checked.tags
    assert page.count("<?xml") == 0
    assert 'aria-label="Loss"' in page
    told = html.figure(drawing, "Loss", alt="It falls <fast>.", numbers=html.table(["step"], [[1]]))
    assert 'aria-label="Loss. It falls &lt;fast&gt;."' in told
    assert "<summary>Numbers</summary>" in told


def test_a_section_of_empty_blocks_is_left_out():
    assert html.section("Budget", "Memory.", html.Html(), html.grid()) == ""
    assert "<h2>Budget</h2>" in html.section("Budget", "Memory.", html.Html(), html.note("x"))


def test_figures_follow_the_theme():
    drawing = html.figure(figures.draw_curves({"a": ([1, 2], [3, 4])}, xlabel="step"), "t")
    assert "var(--muted)" in drawing
    assert not any(color in drawing for color in (figures.INK, figures.MUTED, figures.GRID))


def test_the_same_figure_is_the_same_text():
    def draw():
        return html.figure(figures.draw_histogram([1.0, 2.0, 2.0], xlabel="x"), "t")

    assert draw() == draw()


def test_mistakes_are_marked():
    shown = html.marked("the cat sat on it there", "the bat sat it there now", "en")
    assert shown == (
        'the <mark title="for: cat">bat</mark> sat <del>on</del> it there <ins title="not in the reference">now</ins>'
    )
    assert html.marked("a b", "a b", "en") == "a b"
    assert html.marked("a", "", "en") == "<del>a</del>"


def test_a_card_says_where_its_figure_comes_from():
    cards = html.cards([("4%", "padding", "of all", "predicted"), ("5%", "WER", "")])
    assert cards.count('class="card"') == 2
    assert cards.count('<span class="origin predicted">predicted</span>') == 1
    assert "measured" not in cards


def test_table_marks_the_best_row():
    table = html.table(["name", "value"], [["a", 1], ["b", 2]], best=1)
    assert '<tr class="best"><td class="text">b</td><td class="number">2</td></tr>' in table
    assert "<thead>" not in html.table(["", ""], [["a", "b"]])


def test_write_is_atomic(tmp_path: Path):
    target = tmp_path / "new" / "report.html"
    assert html.write_page(html.Html("first"), target) == target
    with pytest.raises(UnicodeEncodeError):
        html.write_page(html.Html("\ud800"), target)
    assert target.read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]
