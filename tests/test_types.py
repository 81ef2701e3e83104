"""A user's program type-checks against the public names, and gets real types from them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import canter

PROGRAM = """
from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import numpy as np

import canter

model = canter.load("openai/whisper-tiny.en", device="cpu", precision="float32", revision="main")
one = model.transcribe("talk.mp4", language="en", task="transcribe", timestamps="word", beam_size=2, batch_size=8)
assert_type(model, canter.Recognizer)
assert_type(one, canter.Transcript)
assert_type(model.transcribe(Path("talk.mp4")), canter.Transcript)
assert_type(model.transcribe(np.zeros(16000, np.float32), sampling_rate=16000), canter.Transcript)
assert_type(model.transcribe(Path("talk.mp4").read_bytes()), canter.Transcript)
assert_type(model.transcribe(["a.wav", "b.flac"]), Iterator[canter.Transcript])
assert_type(model.transcribe(path for path in Path(".").glob("*.wav")), Iterator[canter.Transcript])
assert_type(one.text, str)
assert_type(one.segments, tuple[canter.Segment, ...])
assert_type(one.words, tuple[canter.Word, ...])
assert_type(one.words[0].start, float)
assert_type(one.language, str | None)
assert_type(one.error, str | None)
assert_type(one.save("a.srt"), Path)
index = canter.build_index("train.jsonl", tokenizer=model.tokenizer)
assert_type(index, canter.LengthIndex)
assert_type(canter.measure_budget(model, index), canter.Budget)
assert_type(canter.analytic_budget("canary-1b", 80), canter.Budget)
plan = canter.Plan(index, canter.Budget.load("budget.json"), micro_batches_per_step=8)
sampler = canter.PlanSampler(plan)
assert_type(canter.train(canter.TrainConfig(manifest=(Path("train.jsonl"),), output=Path("runs/x"))), Path)
assert_type(canter.score(["a b"], ["a c"]).wer, float)
"""
MISTAKES = """
import canter

model = canter.load("openai/whisper-tiny.en")
model.transcribe("talk.mp4", timestamps="words")
model.transcribe(3)
model.transcribe(["a.wav"]).text
canter.lod("x")
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> dict[str, list[str]]:
    """Errors of pyright in strict mode in both programs: the rules that are broken, by line."""
    pyright = Path(sys.executable).parent / "pyright"
    if not pyright.exists() and not shutil.which("pyright"):
        pytest.skip("pyright is not installed")
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "mistakes.py").write_text(MISTAKES)
    source = str(Path(canter.__file__).parent.parent)
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [source], "typeCheckingMode": "strict"}))
    command = [str(pyright if pyright.exists() else "pyright"), "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found: dict[str, list[str]] = {"program.py": [], "mistakes.py": []}
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        place = f"{one['range']['start']['line']}: {one.get('rule')}: {one['message']}"
        found[Path(one["file"]).name].append(place)
    return found


def test_a_program_type_checks_in_strict_mode(checked):
    assert checked["program.py"] == []


def test_mistakes_are_seen(checked):
    lines = {int(one.partition(":")[0]) for one in checked["mistakes.py"]}
    assert lines >= {4, 5, 6, 7}
