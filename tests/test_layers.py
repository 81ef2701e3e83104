"""The architecture: imports point up the list of rooms, without a circle; corpus and planning have no torch."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import canter

ROOT = Path(canter.__file__).parent
# Rooms and the modules beside them, from the foundation up: a module imports from its own room and those before it.
ROOMS = (
    *("errors", "extras", "files", "fields", "events", "redaction", "untrusted", "processes", "runtime", "ranks"),
    *("corpus", "text", "planning", "models", "loading", "inference", "evaluation", "tuning", "training"),
    *("reporting", "serving", "integrations", "api", "bench", "demo", "cli"),
)
FOUNDATION = ROOMS[: ROOMS.index("corpus")]  # single modules, which may import each other in any order
LAZY = ("loading", "api")  # inside of functions they may import any room: formats, and bars on the terminal
WITHOUT_TORCH = ("corpus", "planning")
MODULES = sorted(ROOT.rglob("*.py"))


def dotted(path: Path) -> list[str]:
    """``src/canter/planning/plan.py`` -> ``["canter", "planning", "plan"]``."""
    parts = ["canter", *path.relative_to(ROOT).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(source: str, package: list[str], inside: bool = True) -> list[tuple[int, str]]:
    """Return line and absolute name of every import in the source, also of those ``inside`` functions.

    ``from canter import cli`` counts as ``canter.cli``. Relative imports start from ``package``.
    """
    found = []
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    if not inside:
        nodes = [node for node in tree.body if not is_for_type_checkers(node)]
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
    return found


def is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def broken_arrows(source: str, module: list[str], package: list[str]) -> list[str]:
    """Return the imports that the module may not have, as ``line: name``."""
    room = module[1] if len(module) > 1 else None
    broken = []
    for line, name in imports(source, package, inside=room not in LAZY):
        first, *rest = name.split(".")
        if first == "torch" and room in WITHOUT_TORCH:
            broken.append(f"{line}: {name}")
        if not room or first != "canter" or not rest or rest[0] not in ROOMS:
            continue
        if rest[0] in FOUNDATION and room in FOUNDATION:
            continue
        if ROOMS.index(rest[0]) > ROOMS.index(room):
            broken.append(f"{line}: {name}")
    return broken


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_to_its_place(path: Path):
    parts = dotted(path)
    package = parts if path.name == "__init__.py" else parts[:-1]
    if parts not in (["canter"], ["canter", "__main__"]):
        assert parts[1] in ROOMS, f"add {parts[1]} to ROOMS, and to the table in CONTRIBUTING.md"
        assert broken_arrows(path.read_text(), parts, package) == []


def test_modules_do_not_import_in_a_circle():
    """The rule also holds inside a room, and for imports in functions."""
    names = {".".join(dotted(path)): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        package = dotted(path) if path.name == "__init__.py" else dotted(path)[:-1]
        found = {one for _, one in imports(path.read_text(), package)}
        found |= {one.rpartition(".")[0] for one in found - names.keys()}  # a name in a module
        graph[name] = (found & names.keys()) - {name, "canter"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


def test_arrows_are_really_checked():
    def broken(source: str, name: str = "canter.planning.plan") -> list[str]:
        module = name.split(".")
        return broken_arrows(source, module, module[:-1])

    assert broken("def f():\n    from canter.training.loop import train")
    assert broken("from canter import cli")
    assert broken("from ..models import decoder")
    assert broken("import torch.nn")
    assert broken("from canter.loading import load_module")
    assert broken("from canter.corpus.index import LengthIndex", "canter.files")
    assert not broken("from canter.corpus.index import LengthIndex\nfrom . import plan")
    assert not broken("import torch", "canter.models.decoder")
    registry = "def f():\n    from canter.integrations import transformers"
    assert not broken(registry, "canter.loading")
    assert broken(registry.replace("def f():\n    ", ""), "canter.loading")


def test_index_and_planning_load_without_torch():
    """Modules that they import may not import torch either."""
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
