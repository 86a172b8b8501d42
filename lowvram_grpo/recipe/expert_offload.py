"""expert_offload: how many experts of each layer wait in host memory without a place on the card."""

from __future__ import annotations

from typing import Any

from lowvram_grpo.errors import UserError

OFF, AUTO = "off", "auto"


def settled(value: Any) -> str | int:
    """`off`, `auto`, or a number of at least 1.

    Raises:
        UserError: none of these.
    """
    word = str(value).strip().lower()
    if word in (OFF, "false", "none", "0"):
        return OFF
    if word in (AUTO, "true", "on"):
        return AUTO
    if word.isdigit():
        return int(word)
    raise UserError(f"expert_offload is {value!r}; it must be off, auto, or a number of experts.")


def waiting_experts(value: Any, experts: int) -> int:
    """Of so many experts of a layer, those without a place on the card; `auto`, where no plan has put a number in its
    place, is all of them."""
    value = settled(value)
    return 0 if value == OFF else experts if value == AUTO else min(int(value), experts)
