"""Files of a run that are damaged: the run resumes to the same bits, or one line says which file it is."""

import dataclasses
import json
import os
import random
import re
import shutil

import pytest

from canter.errors import CanterError
from canter.training.config import load_run_config
from canter.training.recipe import run_training
from canter.training.run.folder import RunFolder

from ..conftest import Messages, a_config, stopping_after
from ..run.test_checkpoints import log, losses

HARMS = ("cut", "flipped", "empty", "list", "object", "text", "number", "null", "removed")
JSON = {"list": b"[]", "object": b"{}", "text": b'"x"', "number": b"3", "null": b"null", "empty": b""}
# What a run writes for people and for others; it reads none of it again.
UNREAD = ("tensorboard", "left_out.jsonl", ".lock", "validation", ".cache", "lengths.arrow.parts")


def harm(path, how, draw):
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content)) if content else 0])
    elif how == "flipped" and content:
        at = draw.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
    else:
        path.write_bytes(JSON.get(how, b""))


@pytest.fixture(scope="module")
def stopped(spoken, tmp_path_factory):
    """A run of six steps that was killed after its fifth, and one that was not."""
    folder = tmp_path_factory.mktemp("stopped")
    config = dataclasses.replace(a_config(spoken, folder), steps=6, save_every=2, valid_every=2, track=())
    straight = dataclasses.replace(config, output=folder / "straight")
    run_training(straight)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(config, stopping_after(5))
    return config, losses(straight), log(straight, "utterances.jsonl")


def files_of(folder):
    found = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return [p for p in found if not any(part in UNREAD for part in p.parts)]


def resumed(stopped, tmp_path, name, how, seed=0):
    """Resume a copy of the run with one file harmed: what was said; None where it ended in an error of one line."""
    config, straight, used = stopped
    run = tmp_path / "run"
    shutil.copytree(config.output, run)
    harm(run / name, how, random.Random(f"{name} {how} {seed}"))
    said, told = [], ""
    try:
        run_training(dataclasses.replace(config, output=run), Messages(said))
    except CanterError as error:
        told = str(error)
    if told:
        assert len(told.splitlines()) == 1, told
        assert os.path.basename(name) in told or "checkpoints/step-" in told, told
        return None, told
    config = dataclasses.replace(config, output=run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    kept = [row["loss"] for row in map(_parsed, lines) if row.get("kind") == "train"]
    assert kept[-1:] == straight[-1:]
    assert set(kept) <= set(straight) or how == "flipped"
    rows = [row for row in map(_parsed, (run / "utterances.jsonl").read_bytes().splitlines()) if row]
    assert rows[-1] == used[-1]
    return said, ""


def _parsed(line):
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def test_every_file_of_a_run_may_be_damaged(stopped, tmp_path):
    """Each file in one way; CANTER_FUZZ=N takes N ways of each."""
    config = stopped[0]
    ways = int(os.environ.get("CANTER_FUZZ", "0"))
    failed = {}
    for number, name in enumerate(files_of(config.output)):
        for more in range(max(1, ways)):
            if not ways and number % 6:
                continue  # a sixth of the files: others are below by name
            how = "flipped" if more % 2 else HARMS[(number + more // 2) % len(HARMS)]
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            try:
                resumed(stopped, tmp_path, str(name), how, more)
            except Exception as error:  # what it is, is seen once all have been tried
                failed[f"{name} {how}"] = repr(error)[:300]
    assert not failed, json.dumps(failed, indent=2)


@pytest.mark.parametrize(
    ("name", "how", "match"),
    [
        ("run.json", "flipped", r"run.json is damaged .*; copy .*/step-000004/training/run.json there"),
        ("run.json", "removed", r"run.json is missing; copy .*/step-000004/training/run.json there"),
        ("run.json", "list", r"run.json is damaged \(not a JSON object\); copy"),
        ("budget.json", "flipped", r"budget.json is changed since the run began.*--allow-changes uses it as it is"),
        ("tokenizer/characters.json", "flipped", r"characters.json is changed .*: copy .*/step-000004/characters"),
        ("lengths.arrow", "flipped", r"lengths.arrow (is damaged|is not a length index|is an index of|has a damaged)"),
        ("checkpoints/best.json", "cut", r"best.json is damaged .*; remove it, and the next validation"),
        ("checkpoints/best.json", "text", r"best.json is damaged"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(stopped, tmp_path, name, how, match):
    said, error = resumed(stopped, tmp_path, name, how)
    assert said is None
    assert re.search(match, error), error


@pytest.mark.parametrize(
    ("name", "how", "why"),
    [
        ("checksums.json", "removed", "training/checksums.json is missing"),
        ("checksums.json", "object", "has no checksum"),
        ("state.json", "number", "training/state.json is not as it was written"),
        ("state.json", "removed", "training/state.json is missing"),
        ("optimizers.pt", "flipped", "training/optimizers.pt is not as it was written"),
    ],
)
def test_a_damaged_checkpoint_is_put_aside(stopped, tmp_path, name, how, why):
    said, _ = resumed(stopped, tmp_path, f"checkpoints/step-000004/training/{name}", how)
    assert any(why in line and "resuming from step-000002" in line for line in said), said
    assert "continuing at step 2 of 6" in said


def test_the_only_checkpoint_is_never_given_up_silently(stopped, tmp_path):
    config = dataclasses.replace(stopped[0], output=tmp_path / "run")
    shutil.copytree(stopped[0].output, config.output)
    shutil.rmtree(config.output / "checkpoints" / "step-000002")
    harm(config.output / "checkpoints" / "step-000004" / "model.safetensors", "flipped", random.Random(0))
    with pytest.raises(CanterError, match=r"step-000004 is damaged .*no intact checkpoint before it"):
        run_training(config)
    assert len(log(config)) > 3


def test_a_damaged_setting_is_never_trained_with(stopped, tmp_path):
    """A digit of config.yaml changes; the run's own settings are in run.json too."""
    run = tmp_path / "run"
    shutil.copytree(stopped[0].output, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 0", "seed: 4"))
    config = dataclasses.replace(load_run_config(run / "config.yaml"), output=run)
    with pytest.raises(CanterError, match=r"another configuration \(seed: 0 -> 4\)"):
        run_training(config)


@pytest.mark.parametrize("line", [b"", b"[]\n", b'{"step": "x"}\n', b'{"kind": \xff\n', b'{"step": 99}\n'])
def test_a_damaged_line_costs_none_after_it(tmp_path, line):
    run = RunFolder(tmp_path).log
    good = [json.dumps({"kind": "train", "step": step}).encode() + b"\n" for step in range(1, 7)]
    torn = b'{"kind": "train", "st'
    said = []
    run.metrics.write_bytes(b"".join([good[0], good[1][:-2] + line, *good[2:], torn]))
    run.forget_after(4, said.append)
    assert run.metrics.read_bytes() == b"".join([good[0], good[1][:-2] + line, *good[2:4]])
    assert len(said) == 1
    assert "metrics.jsonl: line" in said[0]


def test_only_what_comes_after_a_step_and_a_torn_line_is_cut(tmp_path):
    run, said = RunFolder(tmp_path).log, []
    good = [json.dumps({"step": step}).encode() + b"\n" for step in (1, 2, 2, 3)]
    run.metrics.write_bytes(b"".join(good) + b'{"step": 2')
    run.forget_after(2, said.append)
    assert run.metrics.read_bytes() == b"".join(good[:3])
    assert not said
