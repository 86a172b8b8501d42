"""Which part of mixed data a row came from: in its completions, and in a metric of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.mixture import SOURCE_COLUMN

if TYPE_CHECKING:
    from lowvram_grpo.training.experience import Rollout

# A column of that name with more different texts in one rollout names no parts of a mixture.
_MOST = 20


def note_sources(rollout: Rollout, rows: list[dict[str, Any]], group: int) -> dict[str, float]:
    """Log the source of each completion with it, where rows have one.

    Args:
        rows: of the data, each with `group` completions.

    Returns:
        `data/SOURCE/reward`, the mean reward of each source's completions, where one applied.
    """
    found = [row.get(SOURCE_COLUMN) for row in rows]
    names = list(dict.fromkeys(found))
    if not all(isinstance(name, str) for name in names) or len(names) > _MOST:
        return {}
    rollout.extras.setdefault(SOURCE_COLUMN, [name for name in found for _ in range(group)])
    of_rows = rollout.rewards.view(len(rows), group)
    rewards = {name: of_rows[[i for i, each in enumerate(found) if each == name]].nanmean() for name in names}
    return {f"data/{name}/reward": float(mean) for name, mean in rewards.items() if not mean.isnan()}
