"""The fuzzer: cases depend on their number only, and failing inputs are distinguished from refused ones."""

import json
import random
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from canter.errors import ManifestError

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fuzzing(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import fuzzing

    yield fuzzing
    for name in ("fuzzing", "mutations"):
        sys.modules.pop(name, None)


def test_mutations_depend_only_on_the_generator(fuzzing):
    mutations = fuzzing.mutations
    row = {"text": "a", "duration": 1.5, "tags": ["x", {"y": None}]}
    lines = b"\n".join([json.dumps(row).encode()] * 3)
    made = {
        "harm": lambda draw: mutations.harm(draw, bytes(range(256))),
        "json": lambda draw: mutations.spoilt_json(draw, json.dumps(row).encode()),
        "lines": lambda draw: mutations.spoilt_lines(draw, lines),
        "yaml": lambda draw: mutations.spoilt_yaml(draw, b"a: {b: [1, 2]}\nc: x\n"),
        "table": lambda draw: mutations.spoilt_table(draw, b"a\tb\nc\td", "\t"),
        "files": lambda draw: mutations.spoilt_files(draw, {"a.json": b"{}", "b.bin": b"abc" * 20}),
    }
    for make in made.values():
        cases = [make(random.Random(seed)) for seed in range(40)]
        assert cases == [make(random.Random(seed)) for seed in range(40)]
        assert len({repr(case) for case in cases}) > 20


def area_that(fuzzing, raises):
    class One(fuzzing.Area):
        name: ClassVar[str] = "one"
        cases: ClassVar[int] = 3
        folder: ClassVar[Any] = None

        def make(self, draw):
            return "kind", {"a/b.txt": bytes([draw.randrange(256)])}

        def check(self, kind, folder):
            assert (folder / "a" / "b.txt").read_bytes()
            if raises:
                raise raises

    return One()


@pytest.mark.parametrize(
    ("raises", "outcome"),
    [(None, "read"), (ManifestError("no"), "refused"), (KeyError("x"), "failed"), (SystemExit(3), "failed")],
)
def test_what_came_of_a_case(fuzzing, tmp_path, raises, outcome):
    result = fuzzing.run_case(area_that(fuzzing, raises), 0, 7, tmp_path / "case")
    assert (result["case"], result["kind"], result["outcome"]) == (7, "kind", outcome)
    assert ("traceback" in result) == (outcome == "failed")
    assert not (tmp_path / "case").exists()


def test_limits(fuzzing, tmp_path):
    options = fuzzing.Options(output=tmp_path)
    result = {"case": 0, "outcome": "refused", "seconds": 0.1, "waited": 0.1, "mebibytes": 1.0}
    assert fuzzing.judge(result, options) == result
    for change in ({"seconds": 10.5}, {"waited": 31.0}, {"mebibytes": 501.0}):
        assert fuzzing.judge(result | change, options)["outcome"] == "failed"


def test_inputs_that_fail_are_kept(fuzzing, tmp_path, monkeypatch):
    area = area_that(fuzzing, KeyError("x"))
    monkeypatch.setattr(fuzzing, "sound", lambda options, kind: area)
    result = fuzzing.run_case(area, 0, 7, tmp_path / "case")
    fuzzing.keep_failure(fuzzing.Options(output=tmp_path), type(area), result)
    kept = tmp_path / "failures" / "one-0-7"
    assert (kept / "files" / "a" / "b.txt").read_bytes() == fuzzing.made(area, 0, 7)[1]["a/b.txt"]
    assert "KeyError: 'x'" in (kept / "error.txt").read_text()


def test_sound_input_is_read(fuzzing, tmp_path):
    """Without it a refusal would prove nothing."""
    area = fuzzing.Sounds()
    area.prepare(tmp_path / "sound")
    area.start(tmp_path / "sound")
    assert {"wav", "flac", "ogg"} <= area.examples.keys()
    for kind, files in area.examples.items():
        fuzzing.write_files(tmp_path / kind, files)
        area.check(kind, tmp_path / kind)
