"""Dataclasses from plain values: what fits is read, and anything else is refused with the file and the field named."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from canter.errors import CheckpointError, ConfigError
from canter.fields import Read, from_mapping, to_mapping


def even(value: object, base: Path | None) -> int:
    if not isinstance(value, int) or value % 2:
        raise ConfigError(f"{value!r} is not even")
    return value


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    steps: int
    path: Path | None = None
    mode: Literal["fast", "slow"] = "fast"
    limit: float | Literal["auto"] = "auto"
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    tags: Mapping[str, str] = field(default_factory=dict)
    pairs: Annotated[int, Read(even)] = 0
    made: int = field(default=0, init=False)


settings = st.builds(
    Settings,
    steps=st.integers(),
    path=st.none() | st.sampled_from([Path("/a/b"), Path("/c")]),
    mode=st.sampled_from(["fast", "slow"]),
    limit=st.just("auto") | st.floats(allow_nan=False),
    flag=st.booleans(),
    inner=st.builds(Inner, st.floats(allow_nan=False), st.lists(st.text("ab"), max_size=3).map(tuple)),
    tags=st.dictionaries(st.text("ab"), st.text("ab")),
    pairs=st.integers().map(lambda number: 2 * number),
)


@given(settings)
def test_plain_values_and_yaml_keep_every_field(value):
    plain = to_mapping(value)
    plain.pop("made")
    assert from_mapping(Settings, plain, "x") == value
    assert from_mapping(Settings, yaml.safe_load(yaml.safe_dump(plain)), "x") == value


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = list(Settings.__dataclass_fields__)


@given(plain_values | st.dictionaries(st.sampled_from([*NAMES, "other"]), plain_values))
def test_anything_is_read_or_refused_with_the_file_named(content):
    try:
        found = from_mapping(Settings, content, "run.yaml", error=CheckpointError)
    except (CheckpointError, ConfigError) as error:
        assert str(error).startswith("run.yaml: ") or "is not even" in str(error)  # noqa: PT017
        return
    assert type(found.steps) is int
    assert isinstance(found.flag, bool)
    assert found.mode in ("fast", "slow")
    assert found.limit == "auto" or isinstance(found.limit, float)
    assert all(isinstance(name, str) for name in found.inner.names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, "x: expected a mapping of settings, found 5"),
        ({}, "x: steps is missing"),
        ({"steps": 1, "stepz": 2}, "x: unknown setting 'stepz'; did you mean 'steps'?"),
        ({"steps": 1, "made": 2}, "x: unknown setting 'made'"),
        ({"steps": True}, "x: steps: expected int, found True"),
        ({"steps": 1, "limit": True}, "x: limit: expected float, found True"),
        ({"steps": 1, "flag": 1}, "x: flag: expected bool, found 1"),
        ({"steps": 1, "mode": "medium"}, "x: mode: 'medium' is none of fast, slow"),
        ({"steps": 1, "mode": ["fast"]}, "x: mode: ['fast'] is none of fast, slow"),
        ({"steps": 1, "inner": {"rat": 1}}, "x: inner: unknown setting 'rat'; did you mean 'rate'?"),
        ({"steps": 1, "inner": {"names": [1]}}, "x: inner: names: expected str, found 1"),
        ({"steps": 1, "pairs": 3}, "x: pairs: 3 is not even"),
    ],
)
def test_errors_name_the_file_the_field_and_the_value(content, message):
    with pytest.raises(ConfigError) as refused:
        from_mapping(Settings, content, "x")
    assert str(refused.value).startswith(message)


def test_values_as_yaml_writes_them():
    found = from_mapping(
        Settings, {"steps": 1, "limit": "2e-3", "path": "a", "inner": {"names": "one"}}, "x", base=Path("/base")
    )
    assert found == Settings(1, Path("/base/a"), limit=0.002, inner=Inner(names=("one",)))
    assert from_mapping(Settings, {"steps": 1, "path": None}, "x").path is None


def test_types_that_a_class_leaves_open_are_given_by_the_caller():
    @dataclass(frozen=True)
    class Open:
        part: object = None

    assert from_mapping(Open, {"part": {"rate": 1}}, "x", known={"part": Inner}) == Open(Inner(1.0))
    assert from_mapping(Open, {"part": {"rate": 1}}, "x") == Open({"rate": 1})
