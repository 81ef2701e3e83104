"""Rules of `CONTRIBUTING.md` that a machine can check: how docstrings, help and pages read, names, types, options."""

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "benchmarks" / "README.md"]
PROSE_COLUMNS = 120
SUBJECT_COLUMNS = 72
# The 123rd option is --upload: a run on machines without a lasting disk can keep its checkpoints only elsewhere.
# The next two are --augment.noise and --augment.rir, which name data; the other settings of noise are file-only.
# The next six options are those of LoRA: rank, alpha, targets and dropout, as peft has them, --adapter wherever a model
# is named, and convert --merge.
# The ten after these are the options of voice activity detection, --channel, and those of faster-whisper's names; the
# seven then those of hot words, log probabilities, N-best texts, --allowed-origins, --drain-seconds and
# --max-beam-size. Then come align --method and inspect --suspects, extend --pieces and
# --like, train --license for the model card, and score --eval-results and --dataset.
MOST = {"Any": 150, "docstrings that are fragments": 20, "options (distinct)": 156}
REMEDIES = {
    "Any": "annotate with the real type; a model of any library is a canter.models.protocol.AnyModel",
    "Any in public signatures": "annotate with the real type, a Protocol or a type variable",
    "isinstance(..., SpeechModel)": "ask model.supports instead",
    "docstrings that are fragments": "write a sentence: 'Return ...', 'Yield ...', 'Raise ...', or what a class is",
    "public names that stand twice": "rename one of them",
    "options (distinct)": "give the same idea the same name, or leave the option out",
}
COINAGES = {
    r"go(es)? on\b": "resume, continue",
    r"puts? back\b": "restore",
    r"settled\b": "recorded, decided",
    r"alone\b": "only, single",
    r"so many\b": "the number, by its name",
    r"share of\b": "fraction of",
    r"how many\b": "number of",
    r"told\b": "the field's term: given, reported, configured",
    r"heard\b": "the field's term: recognised, decoded",
    r"what is left\b": "remaining",
    r"the rest\b": "the others, the remaining ...",
    r"one by one\b": "one at a time, individually",
    r"(?<!there )is no\b(?! \w+er\b| more| less)": "is not a",
    r"whole\b(?! numbers?\b| sentences?\b)": "complete, all of",
    r"(processor|processors)\b(?! config)": "CPU",
    r"own (and|or|/) ?cross": "self-attention and cross-attention",
    r"(nobody|somebody|whoever|everybody)\b": "the client, the user, any process, ...",
}
"""Invented or borrowed words, and the terms that stand for them: those that a reader searches for."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def house() -> dict[str, list[str]]:
    """What `benchmarks/house.py` finds in the sources, by rule."""
    spec = importlib.util.spec_from_file_location("house", ROOT / "benchmarks" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.findings(SOURCE)


@pytest.mark.parametrize("rule", REMEDIES)
def test_the_sources_keep_the_rule(rule: str, house: dict[str, list[str]]):
    found, most = house[rule], MOST.get(rule, 0)
    assert len(found) <= most, f"{rule}: {len(found)}, at most {most}; {REMEDIES[rule]}\n" + "\n".join(found)


def prose(page: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of a page's lines of prose: no code, tables, comments, images and bare links."""
    fenced = False
    for number, line in enumerate(page.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not re.match(r"\s*(\||<|!\[|--8<--|\[[^]]*\]: )", line):
            yield number, line


def sentences(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring of a module, those under fields and constants too, without code in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, " ".join(node.value.value.split())


def coinages(text: str) -> list[str]:
    """Return the coinages in a text, without what it quotes as code, each with the term to use."""
    bare = re.sub(r"``.*?``|`[^`]*`", "", text)
    return [
        f"'{found.group()}' (write: {term})"
        for pattern, term in COINAGES.items()
        for found in re.finditer(rf"\b{pattern}", bare, re.IGNORECASE)
    ]


def test_docstrings_and_help_use_the_terms_of_the_field():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {problem}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line, text in sentences(path.read_text())
        for problem in coinages(text)
    ]
    assert not found, f"{len(found)} coinages\n" + "\n".join(found)


def test_the_list_of_commands_uses_the_terms_of_the_field():
    from canter.cli.main import usage

    assert coinages(usage()) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_use_the_terms_of_the_field(page: Path):
    found = [
        f"{name_of(page)}:{number}: {problem}" for number, line in prose(page.read_text()) for problem in coinages(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_of_prose_fit_a_screen(page: Path):
    long = [f"{name_of(page)}:{number}" for number, line in prose(page.read_text()) if len(line) > PROSE_COLUMNS]
    assert not long, f"break these lines at {PROSE_COLUMNS} characters: {', '.join(long)}"


def test_commit_subjects_fit_a_line():
    def git(*words: str) -> list[str]:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("git is not installed")
        if done.returncode:
            pytest.skip("this is not a git checkout")
        return done.stdout.splitlines()

    added = git("log", "--diff-filter=A", "--format=%H", "--", "tests/test_house.py")
    if not added:
        pytest.skip("the commit that added this rule is not in the history")
    subjects = git("log", "--no-merges", "--format=%s", f"{added[-1]}..HEAD")
    long = [subject for subject in subjects if len(subject) > SUBJECT_COLUMNS]
    assert not long, f"shorten to {SUBJECT_COLUMNS} characters:\n" + "\n".join(long)


def test_violations_would_be_found():
    assert coinages("Share of the rows; it goes on alone.") == [
        "'goes on' (write: resume, continue)",
        "'alone' (write: only, single)",
        "'Share of' (write: fraction of)",
    ]
    assert coinages("A whole number is no longer `alone`, and ``so many`` is code.") == []
    page = "text\n\n```\ncode\n```\n| a | b |\n<!-- comment -->\nmore\n"
    assert [line for line in prose(page) if line[1]] == [(1, "text"), (8, "more")]
    assert [text for _, text in sentences('"""One\n two."""\nx = 1\n"""Three."""\n')] == ["One two.", "Three."]
