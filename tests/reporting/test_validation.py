"""Rows of validation files that were damaged."""

import pytest

from canter.reporting.validation import _errors


@pytest.mark.parametrize("value", [{"a": 1}, [1], None, float("nan"), 5])
def test_a_field_of_another_type_ends_no_report(value):
    row = {"audio_filepath": value, "offset": value, "text": "one two", "pred_text": "one"}
    assert list(_errors([row]).values()) == [1]
