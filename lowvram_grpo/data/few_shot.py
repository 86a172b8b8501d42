"""Worked examples from a file, to be shown in front of each prompt."""

from __future__ import annotations

import json

from lowvram_grpo.data.textfile import read_text
from lowvram_grpo.errors import UserError, one_line


def few_shot(path: str | None) -> list[dict] | None:
    """A json list, or json lines, of {prompt, completion}.

    Raises:
        UserError: it is not.
    """
    if path is None:
        return None
    text = read_text(path, f"--few-shot {path}").strip()
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        turns = json.loads(text) if text.startswith("[") else [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(
            f"--few-shot {path} is not a readable json list of {{prompt, completion}}: {one_line(error)}."
        ) from error
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("prompt", "completion")):
            raise UserError(f"Each entry of --few-shot {path} needs a `prompt` and a `completion`, both of text.")
    return turns
