"""Families whose layers are attention and a dense MLP: docs/models.md says what is so."""

from __future__ import annotations

import pytest
from family_rows import QUICK, SLOW, check, of

FAMILIES = of(
    "Qwen2.5", "Qwen3", "Gemma 3", "Gemma 4 E", "Gemma 4 dense", "Gemma 4 unified", "SmolLM3", "OLMo 3", "Ministral 3",
    "Phi-4-mini", "Granite 4", "Granite 3", "Llama 3", "Mistral",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_is_so(family):
    check(family, QUICK)


@pytest.mark.parametrize("family", of("Gemma 4 E", "Granite 4"))
def test_two_steps_of_the_trainer_take_what_the_page_says(family):
    check(family, SLOW)


@pytest.mark.full
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.id not in ("gemma-4-e", "granite-4")])
def test_two_steps_of_the_others_too(family):
    check(family, SLOW)
