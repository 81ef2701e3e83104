import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.errors import CheckpointError
from canter.text import Characters


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_texts_come_back(texts):
    characters = Characters.of(texts)
    for text in texts:
        ids = characters.encode(text)
        assert all(0 < number < characters.size for number in ids)
        assert characters.decode(ids) == text


def test_unknown_and_rare_characters_are_left_out(tmp_path):
    characters = Characters.of(["aab", "bc"], at_least=2)
    assert characters.symbols == (" ", "a", "b")
    assert characters.decode(characters.encode("abc!")) == "ab"
    characters.save(tmp_path)
    assert Characters.load(tmp_path).fingerprint == characters.fingerprint


def test_a_malformed_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"characters\.json"):
        Characters.load(tmp_path)
    (tmp_path / "characters.json").write_text('["ab"]')
    with pytest.raises(CheckpointError, match="not a list of characters"):
        Characters.load(tmp_path)
