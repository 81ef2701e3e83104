"""Everything that README and docs tell a reader to type exists: commands, options, targets, scripts, imports, links."""

import ast
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from canter.cli import main as cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?:bash|sh|console|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:canter|make) [^`\n]+)`")
FLAG = re.compile(r"`(--[a-z][\w.-]*[\w])")
# torchrun's
FOREIGN_FLAGS = {"--max-restarts", "--nnodes", "--nproc-per-node", "--rdzv-endpoint", "--shutdown-timeout"}
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def typed(text: str) -> list[list[str]]:
    """Return a page's command lines as words: those of its shell blocks, and inline `canter` and `make` commands."""
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.removeprefix("$ ") for line in lines] + INLINE.findall(text)
    commands = []
    for line in lines:
        for part in re.split(r"&&|\|\||[|;]", line):
            words = shlex.split(part, comments=True)
            if words:
                commands.append([Path(words[0]).name, *words[1:]])
    return commands


def wrong(words: list[str], options: dict[str, str], targets: set[str]) -> str | None:
    """Return the first name in a command line that does not exist, or None. ``options`` caches the help of commands."""
    program, *rest = words
    if program == "torchrun" and "canter" in rest:
        program, *rest = rest[rest.index("canter") :]
    if program == "make":
        unknown = [word for word in rest if "=" not in word and word not in targets]
        return f"make has no target {unknown[0]}" if unknown else None
    if program.startswith("python") and rest and rest[0].endswith(".py"):
        return None if (ROOT / rest[0]).exists() else f"no file {rest[0]}"
    if program != "canter" or not rest or rest[0].startswith("-") or not rest[0].islower():
        return None
    if rest[0] not in cli.COMMANDS:
        return f"canter has no command {rest[0]}"
    for word in rest[1:]:
        flag = re.match(r"--[a-z][\w.-]*", word)
        if flag and not re.search(rf"(?<![\w-]){re.escape(flag[0])}(?![\w-])", options[rest[0]]):
            return f"canter {rest[0]} has no option {flag[0]}"
    return None


@pytest.fixture
def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def options():
    """A dictionary of each command's help, filled when asked for."""

    class Help(dict):
        def __missing__(self, name: str) -> str:
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
                patch.setenv("COLUMNS", "200")
                with pytest.raises(SystemExit):
                    cli.main([name, "--help"])
            self[name] = printed.getvalue()
            return self[name]

    return Help()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_tells_to_type_exists(page: Path, options, targets):
    found = [(words, wrong(words, options, targets)) for words in typed(page.read_text())]
    assert [(shlex.join(words), problem) for words, problem in found if problem] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_flags_in_the_text_exist(page: Path, options):
    """Also in the text and in tables, a flag belongs to some command."""
    if page.name == "coming-from.md":
        pytest.skip("its tables name flags of other programs")
    helps = " ".join(options[name] for name in cli.COMMANDS) + cli.usage()
    named = sorted({*FLAG.findall(page.read_text())} - FOREIGN_FLAGS)
    assert [flag for flag in named if not re.search(rf"{re.escape(flag)}(?![\w-])", helps)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_linked_files_exist(page: Path):
    assert [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_imports_exists(page: Path):
    nodes = [node for block in PYTHON.findall(page.read_text()) for node in ast.walk(ast.parse(block))]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "canter":
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_readme_lists_every_command():
    text = (ROOT / "README.md").read_text()
    listed = re.findall(r"`canter (\w+)`", text[text.index("## Commands") : text.index("Every option")])
    assert sorted(listed) == sorted(cli.COMMANDS)


def test_mistakes_would_be_found(options, targets):
    text = (
        "```bash\nmake dmeo   # a comment\n$ canter score r.jsonl --normalise none\n"
        ".venv/bin/canter scroe x && python examples/none.py\n"
        "torchrun --nproc-per-node 2 -m canter score r --ranks 2\n```\n"
        "and `make nothing QUICK=1`, `canter score --json`"
    )
    problems = [wrong(words, options, targets) for words in typed(text)]
    assert problems == [
        "make has no target dmeo",
        "canter score has no option --normalise",
        "canter has no command scroe",
        "no file examples/none.py",
        "canter score has no option --ranks",
        "make has no target nothing",
        None,
    ]
