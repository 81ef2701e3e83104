"""Readers of untrusted files: the value that the plain parser gives, or one of our errors."""

import contextlib
import json
import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from canter import untrusted
from canter.errors import CheckpointError, ManifestError
from canter.untrusted import is_file_name, parse_json, parse_yaml, read_json_value, read_limited, read_yaml_value

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_json_is_read_as_it_was_written(value):
    assert parse_json(json.dumps(value), "x") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"), "x") == value


@given(PLAIN)
def test_yaml_is_read_as_the_safe_loader_does(value):
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_yaml(text, "x") == yaml.safe_load(text)


@given(st.binary(max_size=200) | st.text("[]{}:,-&*!<>|'\"\\ \n0a~#%@", max_size=60).map(str.encode))
def test_any_bytes_give_a_value_or_an_error_of_ours(data):
    for parse in (parse_json, parse_yaml):
        with contextlib.suppress(CheckpointError):
            parse(data, "x")


def laughs(levels: int, merge: bool = False) -> str:
    """A billion laughs: each line names the one before twice."""
    first, rest = ("{x: 1}", "{{<<: [*a{0}, *a{0}]}}") if merge else ("[x, x]", "[*a{0}, *a{0}]")
    lines = [f"a{n}: &a{n} {rest.format(n - 1)}" for n in range(1, levels)]
    return "\n".join([f"a0: &a0 {first}", *lines])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(40), "more than 100,000 values"),
        (laughs(40, merge=True), "more than 100,000 values"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 100_000, "nested deeper than 64"),
        ("{a: " * 100_000, "nested deeper than 64"),
        ("- {}\n" * 200_000, "more than 100,000 values"),
        ("a: 1" + ":1" * 100_000, "more than 10,000 characters"),
        ('a: !!int "1' + ":1" * 100_000 + '"', "more than 10,000 characters"),
        ("a: " + "9" * 9000, "is not YAML"),
        ("x" * 2**21, "more than 1,048,576 bytes"),
        ('!!python/object/apply:os.system ["true"]', "could not determine a constructor"),
        ("a: !!timestamp 2001-99-99", "month must be in"),
        ("[a]: 1\n? {b: c}\n: 1", "unhashable"),
        ("!!bool x", "is not YAML"),
        ("a: 1\n---\nb: 2", "is not YAML"),
        ("a: \x00", "is not YAML"),
    ],
    ids=range(16),
)
def test_yaml_that_is_refused(text, message, within_200_mib):
    with pytest.raises(CheckpointError, match=message):
        parse_yaml(text, "x")


def test_yaml_within_the_limits():
    assert parse_yaml("a: 2001-99-99\nb: &x [1]\nc: *x", "x") == {"a": "2001-99-99", "b": [1], "c": [1]}
    assert len(parse_yaml("- 1\n" * 90_000, "x")) == 90_000
    assert parse_yaml("'" + "x" * 20_000 + "'", "x") == "x" * 20_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1_000_000, "nested deeper than 64"),
        ('{"a":' * 300_000, "nested deeper than 64"),
        ("9" * 10_000, "4300 digits"),
        ('"' + "\\" * 1_000_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("x" * 2**23, "more than 4,194,304 bytes"),
        ("", "is not JSON"),
    ],
    ids=range(7),
)
def test_json_that_is_refused(text, message, within_200_mib):
    with pytest.raises(CheckpointError, match=message):
        parse_json(text, "x")


def test_brackets_inside_strings_do_not_nest():
    assert parse_json(json.dumps(["[{" * 1000, '\\"[' * 100]), "x")[0] == "[{" * 1000


def test_the_largest_json_fits_the_memory(within_200_mib):
    text = b"[" + b"[]," * (untrusted.MOST_JSON_BYTES // 3 - 2) + b"[]]"
    assert len(parse_json(text, "x")) > 10**6


def test_files_that_never_end_or_never_answer(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "big.json").write_bytes(bytes(2**22 + 1))
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(ManifestError, match="not a regular file"):
            read_json_value(tmp_path / name, ManifestError)
    with pytest.raises(CheckpointError, match="4,194,305 bytes, more than the 4,194,304"):
        read_json_value(tmp_path / "big.json")
    with pytest.raises(CheckpointError, match="4,194,305 bytes"):
        read_yaml_value(tmp_path / "big.json")
    with pytest.raises(IsADirectoryError):
        read_limited(tmp_path / "folder.json", 10)
    with pytest.raises(FileNotFoundError):
        read_limited(tmp_path / "none.json", 10)
    with pytest.raises(CheckpointError, match="null byte"):
        read_limited("a\0b", 10)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/a", "a/b", "a\\b", "a\0", 5, None, ["a"]])
def test_names_that_leave_their_folder(name):
    assert not is_file_name(name)
    assert is_file_name("model-00001-of-00002.safetensors")
