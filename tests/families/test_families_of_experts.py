"""Families whose layers choose among experts: docs/models.md says what is so."""

from __future__ import annotations

import pytest
from family_rows import QUICK, SLOW, check, of

FAMILIES = of(
    "Qwen3 MoE", "Qwen3.5 MoE", "Qwen3-Next", "Gemma 4 MoE", "LFM2 MoE", "gpt-oss", "Granite 4 hybrid MoE"
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_is_so(family):
    check(family, QUICK)


@pytest.mark.parametrize("family", of("Qwen3 MoE"))
def test_two_steps_of_the_trainer_take_what_the_page_says(family):
    check(family, SLOW)


@pytest.mark.full
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.id != "qwen3-moe"])
def test_two_steps_of_the_others_too(family):
    check(family, SLOW)
