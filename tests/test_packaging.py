"""Extras and the messages that name them, the metadata of the wheel, and the wheel in environments without this
repository."""

import ast
import email
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import canter
from canter import extras
from canter.errors import ConfigError

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "canter"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = sorted(SOURCE.rglob("*.py"))
WRITTEN = [
    path
    for pattern in ("*.md", "docs/**/*.md", "src/**/*.py", "examples/**/*.*", "benchmarks/*.py", "benchmarks/*.md")
    for path in sorted(ROOT.glob(pattern))
]
NAMED = re.compile(r"canter\[([^\]\\]+)\]|\bextra ['`]+(\w+)['`]")
# the planner: rooms and commands that need nothing but what `pip install canter` brings
PLANNER = ("corpus", "planning", "text")
COMMANDS = ("index", "inspect", "compare", "plan", "tokenizer")
OPTIONAL = {"av", "espeakng_loader"}  # in those rooms
BESIDE = {"triton", "ctranslate2", "espnet2"}  # triton comes with torch; the others are only measured beside
HEAVY = {"loading", "ranks", "runtime"}  # of the commands and of the public face: import torch as they are loaded
PLANNER_MEGABYTES = 300  # without bytecode


def names_of(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def declared(extra: str) -> set[str]:
    """Return the packages of an extra, including those of the extras in it."""
    found = set()
    for line in EXTRAS[extra]:
        requirement = Requirement(line)
        if requirement.name == "canter":
            found |= {name for other in requirement.extras for name in declared(other)}
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def imported(path: Path) -> dict[str, bool]:
    """Return the other projects' packages that a module imports, and whether it does so when it is loaded."""
    found: dict[str, bool] = {}

    def look(node: ast.AST, at_once: bool) -> None:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            first = name.partition(".")[0]
            if first != "canter" and first not in sys.stdlib_module_names:
                found[first] = found.get(first, False) or at_once
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            look(child, at_once and not inside)

    look(ast.parse(path.read_text()), True)
    return found


CORE = {name.replace("-", "_").lower() for name in names_of(PROJECT["dependencies"])} | {"yaml"}


def test_every_extra_that_is_named_exists():
    found = [
        (str(path.relative_to(ROOT)), name.strip())
        for path in WRITTEN
        for listed, quoted in NAMED.findall(path.read_text())
        for name in (listed or quoted).split(",")
        if "{" not in name
    ]
    assert len(found) > 5
    assert [(path, name) for path, name in found if name not in EXTRAS] == []


def test_names_of_extras_are_really_found():
    text = "pip install 'canter[hf,nothing]' or the extra `other`, pip install canter\\[x\\]"
    assert [listed or quoted for listed, quoted in NAMED.findall(text)] == ["hf,nothing", "other"]


def test_messages_name_the_extra_that_brings_the_package():
    comes_with = {"starlette": "fastapi"}
    for package, extra in extras.EXTRA_OF.items():
        assert canonicalize_name(comes_with.get(package, package)) in declared(extra), package
    assert declared("models") <= declared("all")
    for extra in ("av", "bleu", "demo", "hf", "serve", "vad"):
        assert declared(extra) <= declared("all")
    assert not declared("all") & names_of(EXTRAS["docs"])
    assert declared("all") <= declared("dev"), "the tests cover what most people install"


def test_modules_import_what_is_declared():
    """The planner imports only what it installs, and so does every command when it is loaded, as for its help."""
    for path in MODULES:
        found, place = imported(path), path.relative_to(SOURCE).parts
        assert set(found) <= CORE | set(extras.EXTRA_OF) | BESIDE, path
        if place[0] in PLANNER or (place[0] == "cli" and path.stem in COMMANDS):
            assert set(found) <= CORE | OPTIONAL, path
        if len(place) <= 2 and place[0] in ("cli", path.name) and path.stem not in HEAVY:
            assert {name for name, at_once in found.items() if at_once} <= CORE, path


def test_lower_bounds_are_those_that_are_tested():
    pins = dict(
        line.split("==") for line in (ROOT / "oldest.txt").read_text().splitlines() if line and not line.startswith("#")
    )
    tested = {canonicalize_name(name): version for name, version in pins.items()}
    requirements = [line for line in [*PROJECT["dependencies"], *EXTRAS["models"]] if names_of([line]) <= set(tested)]
    assert names_of(requirements) == set(tested) >= names_of(PROJECT["dependencies"])
    for line in requirements:
        requirement = Requirement(line)
        version = tested[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version)
        (bound,) = requirement.specifier
        assert version == bound.version or version.startswith(f"{bound.version}.0")


def test_a_missing_package_is_reported_with_its_extra(monkeypatch):
    assert extras.install("transformers") == "pip install 'canter[hf]'"
    extras.require("json", "everybody")  # what is there
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"--figure needs matplotlib, .*: pip install 'canter\[models\]'"):
        extras.require("matplotlib", "--figure")
    says = pytest.raises(ImportError, match=r"it needs matplotlib, .*: pip install 'canter\[models\]'")
    with says, extras.needed_by("it"):
        importlib.import_module("matplotlib")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), extras.needed_by("it"):
        importlib.import_module("no_such_package")


def test_a_command_without_its_extra_is_one_line(tmp_path: Path):
    code = "import sys; sys.modules['torch'] = None; from canter.cli.main import main; sys.exit(main(['info', 'x']))"
    done = python(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(SOURCE.parent))
    assert (done.returncode, done.stderr) == (
        1,
        "canter: canter info needs torch, which is not installed: pip install 'canter[models]'\n",
    )


def python(executable: Path | str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run Python as a user would, without this repository in its environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CANTER"))}
    command = [str(executable), *arguments]
    return subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the wheel and the source archive."""
    for package in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra 'dev')")
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(files.read(name))


def test_the_wheel_is_typed_licensed_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
    assert "canter/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.partition("/")[0] for name in names} == {"canter", f"canter-{canter.__version__}.dist-info"}
    sources = {str(path.relative_to(SOURCE.parent)) for path in MODULES}
    assert sources <= set(names)
    assert {"canter/serving/page.html", "canter/reporting/page.css"} <= set(names)


def test_metadata(metadata: Message):
    assert metadata["Version"] == canter.__version__ == "0.2.0"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "Canter developers"
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= set(urls)
    assert set(metadata.get_all("Provides-Extra", [])) == set(EXTRAS)


def test_links_of_the_readme_work_on_a_package_index(metadata: Message):
    text = metadata.get_payload()
    assert isinstance(text, str)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 10
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    for target in targets:
        for base in (
            "https://github.com/canter-asr/canter/blob/main/",
            "https://raw.githubusercontent.com/canter-asr/canter/main/",
        ):
            if target.startswith(base):
                assert (ROOT / target.removeprefix(base).partition("#")[0]).exists(), target
    assert all(target.startswith("https://raw.") for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text))


def test_the_source_archive_holds_what_a_build_needs(built: Path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    first = {name.partition("/")[0] for name in names}
    assert first == {"src", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert {str(path.relative_to(ROOT)) for path in MODULES} <= names


def environment_in(folder: Path) -> Path:
    """The interpreter of a new virtual environment without its own pip."""
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def packages_of(interpreter: Path) -> Path:
    (found,) = interpreter.parent.parent.glob("lib/python*/site-packages")
    return found


def pip(interpreter: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(interpreter), *arguments], capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def planner(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with only `pip install canter`."""
    interpreter = environment_in(tmp_path_factory.mktemp("planner") / "environment")
    done = pip(interpreter, "install", "--no-compile", "--constraint", str(ROOT / "constraints.txt"), str(wheel))
    if done.returncode and re.search(r"from versions: none|connection|Temporary failure|timed out", done.stderr):
        pytest.skip(f"pip reaches no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return interpreter


@pytest.mark.slow
def test_the_planner_installs_without_torch_and_runs(planner: Path, tmp_path: Path):
    installed = packages_of(planner)
    assert not (installed / "torch").exists()
    size = sum(path.stat().st_size for path in installed.rglob("*") if path.is_file() and not path.is_symlink())
    assert size < PLANNER_MEGABYTES * 1e6

    seconds = [1.0 + number % 17 for number in range(400)]
    table = pyarrow.table({"duration": seconds, "num_tokens": [round(5 + 3 * length) for length in seconds]})
    pyarrow.parquet.write_table(table, tmp_path / "lengths.parquet")
    done = python(planner, "-m", "canter", "index", "lengths.parquet", "-o", "lengths.arrow", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arguments = ["lengths.arrow", "--model", "canary-1b", "--memory", "80", "--ranks", "2"]
    done = python(planner, "-m", "canter", "compare", *arguments, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["name"].split()[0] for row in rows[-2:]] == ["balanced", "packed"]
    for command in (["--help"], ["train", "--help"], ["inspect", "lengths.arrow"], ["plan", *arguments]):
        done = python(planner, "-m", "canter", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""

    needs = r"canter: (canter )?{} needs \w+, which is not installed: pip install 'canter\[models\]'\n"
    for name, command in {
        "train": ["train", "--manifest", "a.jsonl", "--output", "run"],
        "transcribe": ["transcribe", "model", "a.wav"],
        "--figure": ["compare", *arguments, "--figure", "x.png"],
    }.items():
        done = python(planner, "-m", "canter", *command, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, ""), name
        assert re.fullmatch(needs.format(name), done.stderr), done.stderr


@pytest.mark.slow
def test_the_face_of_the_planner_needs_no_torch(planner: Path, tmp_path: Path):
    """Every public name exists, or its error names the extra that brings it."""
    code = (
        "import canter, json, sys\n"
        "from canter.planning import Plan\n"
        "found = {}\n"
        "for name in [*getattr(canter, '__all__', []), 'load_model']:\n"
        "    try: getattr(canter, name); found[name] = None\n"
        "    except ImportError as error: found[name] = str(error)\n"
        "print(json.dumps(found))"
    )
    done = python(planner, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("load_model").endswith("pip install 'canter[models]'")
    needy = {name: message for name, message in found.items() if message}
    assert all(message.endswith("pip install 'canter[models]'") for message in needy.values()), needy
    assert not set(needy) & {"Budget", "CanterError", "LengthIndex", "Plan", "PlanSampler", "analytic_budget"}


def closure(extra: str) -> Iterator[importlib.metadata.Distribution]:
    """Return the distributions of `pip install canter[extra]` in this environment, direct and indirect ones."""
    waiting = [Requirement(line) for line in PROJECT["dependencies"]]
    waiting += [requirement for name in declared(extra) for requirement in [Requirement(name)]]
    waiting += [Requirement(line) for line in EXTRAS[extra] if Requirement(line).name != "canter"]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        for wanted in ("", *requirement.extras):
            name = canonicalize_name(requirement.name)
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                found = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                pytest.skip(f"{name} of canter[{extra}] is not installed; run make setup")
            if not wanted:
                yield found
            for line in found.requires or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": wanted}):
                    waiting.append(needed)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CANTER_WHEEL_TEST"), reason="make wheel-test runs it")
def test_the_wheel_with_all_extras_transcribes(wheel: Path, shared: Path, tmp_path: Path):
    """The packages of `pip install canter[all]` suffice.

    Only those of this environment's packages are linked into another one, in which pip then finds nothing missing. That
    saves installing torch a second time.
    """
    interpreter = environment_in(tmp_path / "environment")
    folder = packages_of(interpreter)
    for distribution in closure("all"):
        files = distribution.files
        assert files, distribution
        for first in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(distribution.locate_file(first)))
            if source.exists() and not (folder / first).exists():
                (folder / first).symlink_to(source)
    done = pip(interpreter, "install", "--no-compile", "--no-index", "--no-deps", str(wheel))
    assert done.returncode == 0, done.stderr
    done = pip(interpreter, "check")
    assert done.returncode == 0, done.stdout
    listed = python(interpreter, "-c", "import canter; print(canter.__file__)", cwd=tmp_path).stdout.strip()
    assert Path(listed).is_relative_to(folder)
    assert not (folder / "pytest").exists()

    clip = next(iter(sorted((shared / "data/speech/librivox_mini").rglob("*.flac"))))
    command = ["transcribe", str(shared / "models/whisper-tiny.en"), str(clip), "--format", "txt"]
    done = python(interpreter, "-m", "canter", *command, cwd=tmp_path, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    text = "".join(path.read_text() for path in tmp_path.glob("*.txt")) or done.stdout
    assert len(text.split()) > 3
    for name in ("score", "report", "serve", "demo", "bench", "tune"):
        done = python(interpreter, "-c", f"import canter.cli.{name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
