"""Hooks of the documentation site: links that lead out of docs/ become links to the repository."""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/canter-asr/canter/blob/main/"
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Rewrite relative links to files outside docs/, and raise where such a file does not exist."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def absolute(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if target.startswith("docs/"):
            return match[0]
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which does not exist")
        return f"]({REPOSITORY}{target}"

    return LINK.sub(absolute, markdown)
