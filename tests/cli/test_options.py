"""Options filled from arguments, and the layout of their help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import tyro

from canter.cli.options import parse


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    """Learning rate."""


@dataclass(frozen=True)
class Options:
    sources: tyro.conf.Positional[tuple[str, ...]]
    """Sources to read."""
    output: Path | None = None
    """File to write; a long text that was broken into
    two lines in the source."""
    kind: Literal["a", "b"] | None = None
    """One of two."""
    flops: float = 250e12
    """Operations a second."""
    inner: Inner = field(default_factory=Inner)
    """Nested options."""


def test_help_is_one_paragraph_an_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")
    for _ in range(2):  # the second finds the annotations as the first left them
        with pytest.raises(SystemExit):
            parse(Options, ["--help"], "canter test", "Says\nwhat.")
        shown = capsys.readouterr().out
        assert "that was broken into two lines in the source. (default: none)" in shown
        assert "SOURCE ..." in shown
        assert "--output PATH" in shown
        assert "--kind {a,b}" in shown
        assert "(default: 2.5e+14)" in shown
        assert "Learning rate. (default: 0.1)" in shown
        assert "Says what." in shown


def test_what_the_help_leaves_out_is_still_read():
    given = ["x", "--output", "None", "--kind", "b", "--inner.rate", "0.2"]
    options = parse(Options, given, "canter test", "", Options(("y",), output=Path("z")))
    assert options == Options(("x",), None, "b", inner=Inner(0.2))
