from __future__ import annotations

import pytest
from accuracy_forms import FORMS, failures

# Of GSM8K's kinds: one digit to seven, 0, 1, negative, with and without separators, decimals.
REFERENCES = [
    "0",
    "1",
    "7",
    "9",
    "18",
    "99",
    "540",
    "999",
    "1,600",
    "2125",
    "9,999",
    "65,960",
    "114,200",
    "1,450,000",
    "-3",
]
REFERENCES += ["-10", "-1,234", "1.5", "12.25", "1,234.56"]


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_number_equals_itself_in_every_form_and_never_one_more(reference):
    assert len(FORMS) >= 26
    assert failures([f"3 + 4 is <<3+4=7>>7.\n#### {reference}"]) == []
