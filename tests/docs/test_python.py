"""Run every Python block of the README and the documentation, page by page, in a folder of small real files.

The pages with shell and Python blocks that `test_guides` runs are left out. A block that is not run says so right
before it: ``<!-- test: skip "REASON" -->``. All blocks, run or not, use only the public names of `canter`.
"""

import ast
import json
import re
from pathlib import Path

import pytest
import soundfile

import canter

from .conftest import CLIPS, RATE, clip, write_manifest
from .test_guides import DOCS, blocks_of

ROOT = DOCS.parent
GUIDES = {DOCS / "quickstart.md", *(DOCS / "guides").glob("*.md")}
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
WITH_PYTHON = [page for page in PAGES if any(block.python for block in blocks_of(page.read_text()))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PLACES = ("canter.integrations",)  # what examples may import beside the public names


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def files(tmp_path_factory, small_whisper) -> Path:
    """Real speech and files made from it, under the names that the pages use."""
    folder = tmp_path_factory.mktemp("files")
    soundfile.write(folder / "a.wav", clip("sense_0880"), RATE)
    soundfile.write(folder / "b.flac", clip("sense_0930"), RATE)
    soundfile.write(folder / "talk.mp4", clip("sense_0880"), RATE, format="FLAC")  # media are known by content
    write_manifest(folder / "train.jsonl", list(CLIPS), [0.9, 1.0, 1.1])
    write_manifest(folder / "valid.jsonl", list(CLIPS), [1.05])
    index = canter.build_index(
        folder / "train.jsonl", folder / "lengths.arrow", tokenizer=small_whisper, progress=False
    )
    canter.Budget.from_batch_seconds(30.0).save(folder / "budget.json")
    assert len(index) == 9
    return folder


@pytest.fixture
def here(files, small_hub, tmp_path, monkeypatch) -> Path:
    """A new folder with the files, no network, and a cache that holds the model of the pages."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small_hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if page not in GUIDES], ids=name_of)
def test_the_python_of_a_page_runs(page: Path, here: Path):
    names: dict = {"__name__": "__main__"}
    for block in blocks_of(page.read_text()):
        if block.python and not block.skipped:
            exec(compile(block.python, name_of(page), "exec"), names)


def private(source: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """Return the names of canter that a program uses and that are not public."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("canter.")]
        elif isinstance(node, ast.ImportFrom) and node.module == "canter":
            found += [f"canter.{alias.name}" for alias in node.names if alias.name not in canter.__all__]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("canter."):
            found += [node.module or ""]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "canter":
            found += [f"canter.{node.attr}"] if node.attr not in canter.__all__ else []
    return [name for name in found if not name.startswith(allowed or "\0")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_a_page_uses_only_public_names(page: Path):
    assert [name for block in blocks_of(page.read_text()) for name in private(block.python)] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_an_example_uses_the_public_names_and_the_integrations(example: Path):
    assert private(example.read_text(), PLACES) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_python_of_a_page_is_overlooked(page: Path):
    """No test would run blocks that are indented, or fenced or marked in another way."""
    text = page.read_text()
    fences = len(re.findall(r"^\s*(?:```|~~~)\s*(?:python|py|pycon)\b", text, re.MULTILINE))
    assert fences == sum(bool(block.python) for block in blocks_of(text))


def test_private_names_are_found():
    program = (
        "import canter, canter.planning\nfrom canter import load, api\nfrom canter.planning import Plan\n"
        "canter.load, canter.models, canter.Plan"
    )
    found = ["canter.planning", "canter.api", "canter.planning", "canter.models"]
    assert sorted(private(program)) == sorted(found)
    assert sorted(private(program, ("canter.planning",))) == ["canter.api", "canter.models"]


def test_the_files_are_what_the_pages_say(files):
    rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    assert len(rows) == len(canter.LengthIndex.open(files / "lengths.arrow")) == 9
