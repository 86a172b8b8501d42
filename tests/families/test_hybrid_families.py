"""Families with recurrent or convolutional layers: docs/models.md says what is so."""

from __future__ import annotations

import pytest
from family_rows import QUICK, SLOW, check, of

FAMILIES = of("Qwen3.5", "LFM2", "Granite 4 hybrid")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_is_so(family):
    check(family, QUICK)


@pytest.mark.parametrize("family", of("Qwen3.5"))
def test_two_steps_of_the_trainer_take_what_the_page_says(family):
    check(family, SLOW)


@pytest.mark.full
@pytest.mark.parametrize("family", of("LFM2", "Granite 4 hybrid"))
def test_two_steps_of_the_others_too(family):
    check(family, SLOW)
