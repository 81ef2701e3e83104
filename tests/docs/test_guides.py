"""Run the shell commands and the Python of quick start and guides, in order, in a folder laid out as the page says.

Every ```bash block is run line by line, and every ```python block in one namespace for the page. A comment right before
a block says where the test departs from the page:

    <!-- test: skip "REASON" -->                        not run
    <!-- test: append "OPTIONS" -->                     added to the block's last command
    <!-- test: replace "TEXT" with "TEXT" -->           in the block
    <!-- test: background until "URL" answers -->       left running until the page ends
    <!-- test: interrupt once "PATH" exists -->         Ctrl-C at that moment, unless the command has ended
    <!-- test: on two nodes -->                         run by tests/docs/test_several_nodes.py

Port 8000, which may be taken, becomes a free one. Anything else in such a comment is an error.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from canter.cli.main import main

from .conftest import CLIPS, clip, write_common_voice, write_manifest, write_video

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"((?:^<!-- test: [^\n]*-->\n)*)^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"<!-- test: (.*?) -->")
FORMS = {
    "skip": re.compile(r'skip "(.+)"'),
    "append": re.compile(r'append "(.+)"'),
    "replace": re.compile(r'replace "(.+)" with "(.*)"'),
    "background": re.compile(r'background until "(.+)" answers'),
    "interrupt": re.compile(r'interrupt once "(.+)" exists'),
    "on": re.compile(r"on two nodes"),
}


@dataclass
class Block:
    """A block of a page, with the directives applied: lines of shell, or Python."""

    lines: list[str]
    python: str = ""
    skipped: str = ""
    until: str = ""
    interrupt: str = ""
    on_nodes: bool = False


def blocks_of(markdown: str) -> list[Block]:
    """Return the blocks of a page with the directives before them applied."""
    found = []
    for comments, language, text in BLOCK.findall(markdown):
        block, appended = Block([]), ""
        for directive in DIRECTIVE.findall(comments):
            kind = directive.split(maxsplit=1)[0]
            match = FORMS[kind].fullmatch(directive) if kind in FORMS else None
            assert match, f"not a directive: {directive}"
            if kind == "skip":
                block.skipped = match[1]
            elif kind == "append":
                appended = match[1]
            elif kind == "background":
                block.until = match[1]
            elif kind == "interrupt":
                block.interrupt = match[1]
            elif kind == "on":
                block.on_nodes = True
            else:
                assert match[1] in text, f"{match[1]!r} is not in the block that it is to be replaced in:\n{text}"
                text = text.replace(match[1], match[2])
        if language == "python":
            assert not appended, "options cannot be appended to Python"
            block.python = text
            found.append(block)
            continue
        lines = text.replace("\\\n", " ").splitlines()
        block.lines = [line for line in lines if shlex.split(line, comments=True)]
        if appended:
            block.lines[-1] += f" {appended}"
        found.append(block)
    return found


@dataclass
class Shell:
    """Runner of blocks in one folder, with a Hugging Face cache that holds the page's model, and without a network."""

    folder: Path
    hub: Path | None
    capsys: pytest.CaptureFixture[str]
    port: int = 0
    running: list[subprocess.Popen] = field(default_factory=list)
    names: dict = field(default_factory=lambda: {"__name__": "__main__"})

    def run_page(self, page: str) -> str:
        """Run all blocks of a page, and return their output."""
        return "".join(self.run(block) for block in blocks_of((DOCS / page).read_text()))

    def run(self, block: Block) -> str:
        if block.skipped or block.on_nodes:
            return ""
        printed = self.in_python(block.python) if block.python else ""
        for line in block.lines:
            line = self.free_port(line)
            if block.until:
                self.start(line, self.free_port(block.until))
            elif block.interrupt:
                self.interrupted(line, self.folder / block.interrupt)
            else:
                printed += self.in_process(line) if is_plain(line) else self.in_bash(line)
        return printed

    def free_port(self, text: str) -> str:
        """Put a free port in the place of 8000."""
        if "8000" in text and not self.port:
            with socket.socket() as server:
                server.bind(("127.0.0.1", 0))
                self.port = server.getsockname()[1]
        return text.replace("8000", str(self.port))

    def in_process(self, line: str) -> str:
        """Run a `canter` command in this process, because another one would import torch again."""
        self.capsys.readouterr()
        status = main(shlex.split(line, comments=True)[1:])
        printed = self.capsys.readouterr()
        assert status in (0, None), f"{line}\n{printed.out}\n{printed.err}"
        return printed.out

    def in_python(self, text: str) -> str:
        """Run a block in the namespace of the blocks before it, and return its output."""
        self.capsys.readouterr()
        exec(compile(self.free_port(text), "<block>", "exec"), self.names)
        return self.capsys.readouterr().out

    def in_bash(self, line: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def interrupted(self, line: str, path: Path) -> None:
        """Run a command and press Ctrl-C once ``path`` exists."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.running.append(process)
        seen = False
        while process.poll() is None and not (seen := path.exists()):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=300)
        assert seen, f"{line}\n{printed}"  # later steps may have replaced it since
        self.running.remove(process)

    def environment(self) -> dict[str, str]:
        scripts = self.folder.parent / "bin"
        if not scripts.exists():
            scripts.mkdir()
            command = scripts / "canter"
            command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m canter "$@"\n')
            command.chmod(0o755)
        path = f"{scripts}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        hub = {"HF_HUB_CACHE": str(self.hub), "HF_HUB_OFFLINE": "1"} if self.hub else {}
        return os.environ | hub | {"PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(self, line: str, url: str) -> None:
        """Start a background command, and wait until it answers."""
        with (self.folder / "service.log").open("w") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"], cwd=self.folder, env=self.environment(), stdout=log, stderr=log
            )
        self.running.append(process)
        while True:
            assert process.poll() is None, (self.folder / "service.log").read_text()
            with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url):
                return
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop background commands by Ctrl-C, as a reader would, and check their exit status."""
        for process in self.running:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) in (0, 130), (self.folder / "service.log").read_text()
        self.running.clear()


def is_plain(line: str) -> bool:
    return line.startswith("canter ") and not re.search(r"[|<>*?$&;`]", line)


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys) -> Iterator:
    """``shell(hub)``: a `Shell` in an empty folder."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    made = []

    def make(hub: Path | None) -> Shell:
        if hub is not None:
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        made.append(Shell(folder, hub, capsys))
        return made[-1]

    yield make
    for one in made:
        for process in one.running:
            process.kill()
            process.wait()


def need_av():
    pytest.importorskip("av", reason="the extra 'av' is not installed")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_quick_start(shell, small_hub):
    need_av()
    here = shell(small_hub)
    write_video(here.folder / "talk.mp4", clip("sense_0880"), "aac")
    write_manifest(here.folder / "train.jsonl", list(CLIPS), [0.9, 1.0, 1.1])
    write_manifest(here.folder / "valid.jsonl", list(CLIPS), [1.05])
    printed = here.run_page("quickstart.md")
    assert "balanced" in printed  # the table of strategies
    assert all("pred_text" in row for row in rows(here.folder / "valid-out.jsonl"))
    assert (here.folder / "runs/first/report.html").exists()


def test_subtitles(shell, real_hub):
    need_av()
    here = shell(real_hub)
    (here.folder / "videos").mkdir()
    write_video(here.folder / "videos/talk.mp4", clip("sense_0880"), "aac")
    write_video(here.folder / "videos/lecture.mkv", clip("lj_011_0202"), "libopus")
    here.run_page("guides/subtitles.md")
    for folder in ("subtitles", "short-lines"):
        assert sorted(path.name for path in Path(folder).glob("*.srt")) == ["lecture.srt", "talk.srt"]
        assert "young man" in Path(folder, "talk.srt").read_text()
        assert " --> " in Path(folder, "lecture.srt").read_text()
    cues = [line for line in Path("short-lines/talk.srt").read_text().splitlines() if "-->" not in line]
    assert max(map(len, cues)) <= 24


def test_fine_tune_whisper(shell, small_hub):
    here = shell(small_hub)
    write_common_voice(here.folder / "cv-corpus/en")
    here.run_page("guides/finetune-whisper.md")
    before, after = rows(Path("before.jsonl")), rows(Path("after.jsonl"))
    assert [row["text"] for row in before] == [row["text"] for row in after] == list(CLIPS.values())
    steps = [row["step"] for row in rows(Path("runs/cv/metrics.jsonl")) if row["kind"] == "train"]
    assert steps == [1, 2, 3]
    assert json.loads(Path("whisper-cv/config.json").read_text())["model_type"] == "whisper"


def test_fine_tune_canary(shell, small_canary):
    here = shell(None)
    shutil.copy(small_canary, here.folder / "canary.nemo")
    write_manifest(here.folder / "train.jsonl", list(CLIPS), [0.9, 1.0, 1.1])
    write_manifest(here.folder / "valid.jsonl", list(CLIPS), [1.05])
    here.run_page("guides/finetune-canary.md")
    steps = [row["step"] for row in rows(Path("runs/canary/metrics.jsonl")) if row["kind"] == "train"]
    assert steps == list(range(1, 41))  # each once: the second start resumed where Ctrl-C stopped the first
    assert all("pred_text" in row for row in rows(Path("valid-out.jsonl")))
    assert Path("canary-tuned.nemo").exists()


def test_plan_batches(shell, small_hub, small_whisper):
    here = shell(small_hub)
    (here.folder / "tokenizer").mkdir()
    shutil.copy(small_whisper / "tokenizer.json", here.folder / "tokenizer/tokenizer.json")
    write_manifest(here.folder / "train.jsonl", list(CLIPS), [0.9, 1.0, 1.1])
    printed = here.run_page("guides/plan-batches.md")
    assert "bucket_duration_bins" in printed
    import pyarrow.parquet as parquet

    assert sorted(parquet.read_table("plan.parquet").column("row").to_pylist()) == list(range(9))


def test_serve(shell, real_hub):
    need_av()
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    pytest.importorskip("openai", reason="the client is not installed")
    here = shell(real_hub)
    write_video(here.folder / "talk.mp4", clip("sense_0880"), "aac")
    printed = here.run_page("guides/serve.md")
    assert printed.count("young man") == 2  # curl's answer and the client's
    assert "-->" in printed
    here.stop()


def test_every_guide_has_a_test():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tested = set(re.findall(r'run_page\("(.+?)"\)', tests))
    pages = {path.relative_to(DOCS).as_posix() for path in (DOCS / "guides").glob("*.md")} | {"quickstart.md"}
    assert tested == pages


def test_directives():
    page = (
        '<!-- test: replace "8" with "2" -->\n<!-- test: append "--steps 4" -->\n'
        "```bash\n# both\ncanter a --n 8 \\\n  --x\ncanter b\n```\n"
        '<!-- test: skip "no network" -->\n```bash\npip install x\n```\n```python\nprint(1)\n```\n'
    )
    first, second, third = blocks_of(page)
    assert first.lines == ["canter a --n 2    --x", "canter b --steps 4"]
    assert second.skipped == "no network"
    assert third.python == "print(1)\n"
    with pytest.raises(AssertionError, match="not a directive"):
        blocks_of("<!-- test: sometimes -->\n```bash\ntrue\n```\n")
    with pytest.raises(AssertionError, match="is not in the block"):
        blocks_of('<!-- test: replace "9" with "2" -->\n```bash\ntrue\n```\n')
