"""The scores of reasoning-gym's own tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowvram_grpo.data.gym_tasks import entry_of, library
from lowvram_grpo.errors import UserError


def reasoning_gym(
    completions: Sequence, reasoning_gym_entry: Sequence[str] | None = None, **columns: Any
) -> list[float]:
    """What the task's `score_answer` gives to the text of a reply's last `<answer>` pair, 0 to 1; most tasks give a
    part to an answer with something beside it.

    Args:
        reasoning_gym_entry: a column of the data that `data.gym_tasks.load_gym` makes.

    Raises:
        UserError: reasoning-gym is not installed, or has not made the data.
    """
    if reasoning_gym_entry is None:
        raise UserError("the reward 'reasoning_gym' scores what `--data reasoning-gym:TASK` makes, and no other data.")
    if not completions:
        return []
    extract = library("utils").extract_answer
    scores = []
    for completion, written in zip(completions, reasoning_gym_entry):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        tasks, entry = entry_of(written)
        scores.append(float(tasks.score_answer(extract(text), entry)))
    return scores
