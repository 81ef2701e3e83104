"""Mixtures: NeMo's input_cfg, nested, weighted, tempered."""

import contextlib

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from canter.corpus.columns import Columns
from canter.corpus.index import Source
from canter.corpus.mixture import Group, fractions, leaves, read_mixture
from canter.errors import CanterError, ConfigError, ManifestError


def test_nested_groups_with_tags(tmp_path):
    (tmp_path / "inner.yaml").write_text(
        "- {manifest_filepath: b.jsonl, weight: 3, tags: {lang: fr}}\n- {cuts_path: c.jsonl.gz, weight: 1}\n"
    )
    (tmp_path / "mix.yaml").write_text(
        """
- type: nemo_tarred
  manifest_filepath: /data/m__OP_0..3_CL_.json
  tarred_audio_filepaths: /data/a__OP_0..3_CL_.tar
  weight: 0.6
- type: group
  weight: 0.4
  tags: {lang: de, pnc: "yes"}
  input_cfg: inner.yaml
"""
    )
    group = read_mixture(tmp_path / "mix.yaml")
    a, b, c = leaves(group)
    assert (a.path, a.audio) == ("/data/m__OP_0..3_CL_.json", "/data/a__OP_0..3_CL_.tar")
    assert (b.path, b.tags) == (f"{tmp_path}/b.jsonl", {"lang": "fr", "pnc": "yes"})
    assert (c.path, c.tags) == (f"{tmp_path}/c.jsonl.gz", {"lang": "de", "pnc": "yes"})
    np.testing.assert_allclose(fractions(group, [1, 1, 1]), [0.6, 0.3, 0.1])


@pytest.mark.parametrize("name", ["language_column", "lang_column"])
def test_the_language_column_has_a_second_name_in_old_files(tmp_path, name):
    (tmp_path / "mix.yaml").write_text(f"- {{path: a.csv, {name}: tongue, text_column: said}}\n")
    (source,) = leaves(read_mixture(tmp_path / "mix.yaml"))
    assert source.columns == Columns("said", "tongue", "")


def test_temperature_goes_down_into_groups_until_another_is_given():
    a, b = Source("a", weight=1.0), Source("b", weight=4.0)
    np.testing.assert_allclose(fractions(Group([a, b], temperature=0.5), [1, 1]), [1 / 3, 2 / 3])
    nested = Group([Group([a, b], weight=9.0), Group([a, b], weight=1.0, temperature=1.0)], temperature=0.5)
    np.testing.assert_allclose(fractions(nested, [1] * 4), [0.75 / 3, 0.75 * 2 / 3, 0.25 / 5, 0.25 * 4 / 5])


members = st.recursive(
    st.builds(Source, st.just("p"), weight=st.floats(0.01, 100)),
    lambda inner: st.builds(Group, st.lists(inner, min_size=1, max_size=3), st.floats(0.01, 100), st.floats(0, 2)),
    max_leaves=8,
)


@given(members)
def test_shares_are_fractions(member):
    group = Group([member])
    found = fractions(group, [3] * sum(1 for _ in leaves(group)))
    assert found.sum() == pytest.approx(1)
    assert (found > 0).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not YAML"),
        ("5", "is not a list of sources"),
        ("[]", "has no members"),
        ("- 5", r"mix\.yaml\[0\] must name its data"),
        ("- {weight: 1}", "must name its data by one of path"),
        ("- {path: a, cuts_path: b}", "must name its data"),
        ("- {path: a, wieght: 1}", "unknown setting 'wieght'"),
        ("- {path: a, weight: x}", "weight: expected float, found 'x'"),
        ("- {path: a, weight: 0}", "weight 0.0 would never be drawn"),
        ("- {path: a, weight: 1}\n- {path: b}", "b has no weight while others in mix.yaml"),
        ("- {path: a, tags: {lang: no}}", "tag lang is False, not a string; quote it"),
        ("tags: {context: a}\ninput_cfg: [{path: a}]", r"tag 'context' is none of those that Canter reads \(lang, "),
        ("- {path: a, tags: [lang]}", "tags must be names and strings"),
        ("- {path: a, tags: {1: x}}", "tag 1 is none of"),
        ("- {path: a, tags: {language: en}}", "tag 'language' is none of"),
        ("- {path: [[a, b]]}", "give one path"),
        ("- {type: group, input_cfg: 3}", "input_cfg must be a list"),
        ("- {type: group, input_cfg: mix.yaml}", "does a file include itself"),
        ("- {type: group, input_cfg: none.yaml}", "does not exist"),
        ("{input_cfg: [{path: a}], temperature: -1}", "temperature -1.0 must be 0 or more"),
    ],
)
def test_what_cannot_be_understood(tmp_path, text, message):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises((ConfigError, ManifestError), match=message):
        read_mixture(tmp_path / "mix.yaml")


KEYS = ["path", "weight", "tags", "input_cfg", "temperature", "x"]
contents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@given(contents)
def test_any_yaml_is_understood_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("mix") / "mix.yaml"
    path.write_text(yaml.safe_dump(content))
    with contextlib.suppress(CanterError):
        assert all(isinstance(leaf, Source) for leaf in leaves(read_mixture(path)))
