"""The dispatcher of commands, and the help of each."""

import ast
import dataclasses
import importlib
import inspect
import os
import subprocess
import sys
from types import ModuleType

import pytest

from canter import __version__
from canter.cli import main as cli
from canter.errors import ManifestError


def load(name: str) -> ModuleType:
    """Return the module of a command."""
    return importlib.import_module(cli.COMMANDS[name][0])


def documented_fields(options: type) -> set[str]:
    """Return the fields with a docstring below them, which tyro shows as their help."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(options))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id
        for field, below in zip(body.body, body.body[1:])
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
        and below.value.value.strip()
    }


def nested_dataclasses(options: type) -> list[type]:
    """Return a dataclass and those of its fields."""
    found = [options]
    for hint in inspect.get_annotations(options, eval_str=True).values():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found += nested_dataclasses(hint)
    return found


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_documents_every_option(name: str, capsys: pytest.CaptureFixture[str]):
    module = load(name)
    assert module.__doc__
    for options in nested_dataclasses(module.Options):
        assert options.__dataclass_params__.frozen  # type: ignore[attr-defined]
        documented = {name for kind in options.__mro__[:-1] for name in documented_fields(kind)}
        own = {field.name for field in dataclasses.fields(options)}
        assert own <= documented, f"{options.__qualname__}: undocumented fields"
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    assert f"canter {name}" in capsys.readouterr().out


def test_help_needs_no_heavy_import():
    modules = [module for module, _ in cli.COMMANDS.values()]
    code = (
        "import importlib, sys\n"
        "heavy = ('torch', 'matplotlib', 'transformers')\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    loaded = [name for name in heavy if name in sys.modules]\n"
        "    assert not loaded, f'{module} imports {loaded}'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_usage_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "hint"), [("trian", "did you mean 'train'?"), ("xyzzy", "canter --help")])
def test_unknown_command_is_named_with_the_nearest(typed: str, hint: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"canter: '{typed}'")
    assert hint in error


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """``command(error)``: install a command that raises ``error``, and return its arguments."""

    def install(error: BaseException) -> list[str]:
        @dataclasses.dataclass(frozen=True)
        class Options:
            pass

        def run(options: Options) -> None:
            raise error

        module = ModuleType("canter_test_command", "A command that fails.")
        module.Options, module.run = Options, run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "failing", (module.__name__, "fails"))
        return ["failing"]

    return install


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ManifestError("train.jsonl:3: no duration; add one"), 1),
        (FileNotFoundError(2, "No such file or directory", "x.wav"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_user_errors_are_one_line(command, error, code, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.delenv("CANTER_DEBUG", raising=False)
    assert cli.main(command(error)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("canter: ")
    assert captured.err.count("\n") == 1


def test_a_system_error_names_the_file(command, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.delenv("CANTER_DEBUG", raising=False)
    assert cli.main(command(PermissionError(13, "Permission denied", "out/x.json"))) == 1
    assert capsys.readouterr().err == "canter: out/x.json: permission denied\n"
    cli.main(command(ValueError()))
    assert capsys.readouterr().err == "canter: ValueError\n"


def test_debug_shows_the_traceback(command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CANTER_DEBUG", "1")
    with pytest.raises(ManifestError):
        cli.main(command(ManifestError("broken")))


def test_a_bug_is_not_hidden(command):
    with pytest.raises(ZeroDivisionError):
        cli.main(command(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["--help"], ""), (["--help"], "1"), (["compare", "--help"], ""), (["train", "--print-config"], "1")],
)
def test_a_reader_that_closes_early_is_not_an_error(arguments, unbuffered):
    """The reader of ``canter --help | head -1`` closes the pipe early; here it is closed before the first word."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "canter", *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pipe_that_breaks_elsewhere_is_an_error(command, capsys):
    assert cli.main(command(BrokenPipeError(32, "Broken pipe"))) == 1
    assert capsys.readouterr().err == "canter: [Errno 32] Broken pipe\n"


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "canter", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
