"""The architecture as a test: imports point up the list of rooms, no torch in planning, modules are small."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import canter

ROOT = Path(canter.__file__).parent
# A module may import from its own room and those before it; canter.errors and canter itself belong to all.
ROOMS = (
    "corpus",
    "text",
    "planning",
    "models",
    "inference",
    "evaluation",
    "tuning",
    "training",
    "reporting",
    "serving",
    "integrations",
    "bench",
    "demo",
    "cli",
)
WITHOUT_TORCH = ("corpus", "planning")
MODULES = sorted(ROOT.rglob("*.py"))


def dotted(path: Path) -> list[str]:
    """``src/canter/planning/plan.py`` -> ``["canter", "planning", "plan"]``."""
    parts = ["canter", *path.relative_to(ROOT).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(source: str, package: list[str]) -> list[tuple[int, str]]:
    """Line and absolute name of every import in the source, those inside functions too.

    ``from canter import cli`` counts as ``canter.cli``. ``package`` is what relative imports start from.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
    return found


def broken_arrows(source: str, package: list[str]) -> list[str]:
    """Imports that a module of this package may not have, as ``line: name``."""
    room = package[1] if len(package) > 1 else None
    broken = []
    for line, name in imports(source, package):
        first, *rest = name.split(".")
        if first == "torch" and room in WITHOUT_TORCH:
            broken.append(f"{line}: {name}")
        if room and first == "canter" and rest and rest[0] in ROOMS and ROOMS.index(rest[0]) > ROOMS.index(room):
            broken.append(f"{line}: {name}")
    return broken


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_to_its_place(path: Path):
    parts = dotted(path)
    package = parts if path.name == "__init__.py" else parts[:-1]
    source = path.read_text()
    assert len(package) == 1 or package[1] in ROOMS, f"{package[1]} is not a room of the design"
    assert not broken_arrows(source, package)


def test_modules_do_not_import_in_a_circle():
    """Inside a room too, and through imports in functions."""
    names = {".".join(dotted(path)): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        package = dotted(path) if path.name == "__init__.py" else dotted(path)[:-1]
        found = {one for _, one in imports(path.read_text(), package)}
        found |= {one.rpartition(".")[0] for one in found - names.keys()}  # a name in a module
        graph[name] = (found & names.keys()) - {name, "canter"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


def test_arrows_are_really_checked():
    package = ["canter", "planning"]
    assert broken_arrows("def f():\n    from canter.training.loop import train", package)
    assert broken_arrows("from canter import cli", package)
    assert broken_arrows("from ..models import decoder", package)
    assert broken_arrows("import torch.nn", package)
    assert not broken_arrows("from canter.corpus.index import LengthIndex\nfrom . import plan", package)
    assert not broken_arrows("import torch", ["canter", "models"])


def test_index_and_planning_load_without_torch():
    """Also through others: what they import may not import torch either."""
    names = [".".join(dotted(path)) for path in MODULES if dotted(path)[1:2] and dotted(path)[1] in WITHOUT_TORCH]
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch was imported"


@pytest.mark.parametrize("room", ["bench", "demo"])
def test_only_a_commands_own_module_imports_its_room(room):
    """The demo and the comparison with other frameworks are in nobody's way."""
    for path in MODULES:
        parts = dotted(path)
        if parts[1:2] == [room] or parts[1:] == ["cli", room]:
            continue
        package = parts if path.name == "__init__.py" else parts[:-1]
        found = [name for _, name in imports(path.read_text(), package) if name.split(".")[:2] == ["canter", room]]
        assert not found, f"{'.'.join(parts)} imports {found[0]}"
