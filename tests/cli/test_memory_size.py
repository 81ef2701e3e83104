import pytest

from canter.cli.tune import parse_memory
from canter.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80 GB", 80e9), ("512M", 512 * 2**20), ("1.5g", 1.5 * 2**30), ("80", 80e9), ("8b", 8)],
)
def test_amounts_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "many", "80 bananas", "-1GB", "0", "GiB"])
def test_what_is_no_amount(text):
    with pytest.raises(BudgetError, match="no amount of memory"):
        parse_memory(text)
