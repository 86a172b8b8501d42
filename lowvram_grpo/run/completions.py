"""completions.jsonl: every sampled completion with its rewards, to be read by eye or with `jq`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowvram_grpo.run import jsonl


def as_text(turns: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt or completion as text; messages become `role: content` lines, a lone reply its content. A call of a tool
    is `-> name({arguments})` behind the content."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1 and turns[0]["role"] == "assistant":
        return _said(turns[0])
    return "\n".join(f"{turn['role']}: {_said(turn)}" for turn in turns)


def _said(turn: Mapping[str, Any]) -> Any:
    content = _joined(turn.get("content") or "")
    functions = [call.get("function", call) for call in turn.get("tool_calls") or ()]
    calls = [f"-> {f.get('name')}({json.dumps(f.get('arguments'), default=str)})" for f in functions]
    return " ".join([*([content] if content else []), *calls]) if calls else content


def _joined(content: Any) -> Any:
    """The text of a content that comes in text parts; any other content as it is."""
    if not isinstance(content, (list, tuple)):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


class CompletionsLog:
    """Appends one row a completion: step, prompt, completion, rewards (by function), advantage, extras."""

    def __init__(self, path: str | Path, *, held: bool = False):
        self.path = Path(path)
        self.rows = jsonl.Log(self.path, held=held)

    def write(
        self,
        step: int,
        prompts: Sequence[str | Sequence[Mapping[str, Any]]],
        completions: Sequence[str | Sequence[Mapping[str, Any]]],
        rewards: Mapping[str, Sequence[float | None]],
        advantages: Sequence[float],
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Write n rows. Every sequence, also each in `rewards` and `extras`, has length n.

        `extras` are the columns that reward functions logged with `log_extra`.

        Raises:
            ValueError: the lengths differ.
        """
        extras = extras or {}
        columns = {"completions": completions, "advantages": advantages, **rewards, **extras}
        if wrong := {name: len(values) for name, values in columns.items() if len(values) != len(prompts)}:
            raise ValueError(f"{len(prompts)} prompts, but {wrong}")
        rows = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions)):
            row = {
                "step": step,
                "prompt": as_text(prompt),
                "completion": as_text(completion),
                "rewards": {name: values[i] for name, values in rewards.items()},
                "advantage": advantages[i],
            }
            if extras:
                row["extras"] = {name: values[i] for name, values in extras.items()}
            rows.append(row)
        self.rows.append(rows)
