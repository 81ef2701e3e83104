"""Hooks of the documentation site: links that lead out of docs/, and parameters in docstrings."""

import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.plugins import get_plugin_logger

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/canter-asr/canter/blob/main/"
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")
LOG = get_plugin_logger("links")
PARAMETER = re.compile(r"^(\w+(?:, \w+)*): (?=\S)", re.MULTILINE)


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Turn relative links to files outside docs/ into links to the repository; warn where there is no such file."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def absolute(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if target.startswith("docs/"):
            return match[0]
        if not (ROOT / target).exists():
            LOG.warning("%s links to %s, which does not exist", page.file.src_uri, target)
        return f"]({REPOSITORY}{target}"

    return LINK.sub(absolute, markdown)


class Parameters(griffe.Extension):
    """Render the ``name: text`` lines of our docstrings as a list."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Rewrite the docstring of one function or class."""
        if obj.docstring:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(map(self.listed, paragraphs))

    def listed(self, paragraph: str) -> str:
        """Return a paragraph with its parameters as list items."""
        return PARAMETER.sub(r"- **\1**: ", paragraph) if PARAMETER.match(paragraph) else paragraph
