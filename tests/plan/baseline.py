"""Predicted bytes of each phase and category for five presets and models users have, held by baseline.json.

    python -m tests.plan.baseline            # what differs from the file
    python -m tests.plan.baseline --write    # the file anew, after a change that was meant

Nothing of a machine goes in: models come from the table of architectures, cards are the typical ones of their size, and
everything runs on meta tensors. Libraries do; the file's head says how far.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from lowvram_grpo.memory import cards
from lowvram_grpo.memory.ladder import PHASES
from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.plan.planner import Planner
from lowvram_grpo.recipe import preset as presets
from lowvram_grpo.recipe.resolve import resolve

FILE = Path(__file__).with_name("baseline.json")
# Of a category's bytes: what a change may be before somebody has to say that it was meant.
TOLERANCE = 0.01
# The peak of a phase, beside what it is made of.
TOTAL = "total"
# Whose code decides what is kept from a forward pass, what a state is made of, and what an operator makes for itself.
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
ABOUT = [
    "Predicted bytes by preset and model, phase and category: python -m tests.plan.baseline --write makes it anew.",
    f"A category that is off by more than {TOLERANCE:.0%} fails tests/plan/test_baseline.py.",
    "Of a machine nothing goes in. The libraries decide what is kept for a backward pass and what a moment is made of:",
    "torch 2.11.0, 2.13.0 and 2.14.1, transformers 5.10.4 and 5.24.0, peft 0.18.0 and 0.21.2 predict the same bytes.",
]


class Row(NamedTuple):
    """What is predicted: a preset's settings, and others on top of them, for a model of the table."""

    preset: str
    model: str
    settings: dict[str, Any] = {}

    def __str__(self) -> str:
        more = " ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.preset}, {self.model}" + (f", {more}" if more else "")


# Small and tied, large and untied, layers of two kinds, an 8B that a 16 GB card is bought for, a base in 16 bits; and
# what the ladder's other end does; a model larger than its card, and 16K tokens of context.
SAVERS = {"kv_cache_dtype": "int8", "activation_offload": True, "mlp_tile": 512, "head_dtype": "nf4"}
LONG = {"max_prompt_length": 12_288, "max_completion_length": 4_096, "rollout_batch_size": 8, "kv_cache_dtype": "int8"}
ROWS = (
    Row("6gb", "Qwen2.5-0.5B"),
    Row("8gb", "Qwen2.5-7B"),
    Row("12gb", "Gemma-3-4B"),
    Row("16gb", "Qwen3-8B"),
    Row("24gb", "Llama-3.1-8B"),
    Row("6gb", "Llama-3.2-3B", SAVERS),
    Row("8gb", "Qwen3-14B", {"weight_offload": 24}),
    Row("8gb", "Qwen3-0.6B", LONG),
)
Phases = dict[str, dict[str, int]]  # phase -> category -> bytes


def predicted(row: Row) -> Phases:
    """Predicted now, overheads included."""
    config, _ = resolve_config(row.model)
    planner = Planner(config, card=cards.typical(presets.load(row.preset).vram_gib))
    found = planner.predict(resolve({"model": row.model, "preset": row.preset, **row.settings}))
    return {name: {TOTAL: found.phases[name], **dict(sorted(found.parts[name].items()))} for name in PHASES}


def read() -> dict[str, Phases]:
    return json.loads(FILE.read_text(encoding="utf-8"))["rows"]


def write(rows: dict[str, Phases]) -> None:
    """A line for each phase, so that a diff shows which of them have changed."""
    head = {"about": ABOUT, "versions": {name: version(name).partition("+")[0] for name in _LIBRARIES}}
    text = json.dumps({**head, "rows": {}}, indent=2).removesuffix("{}\n}")
    of = lambda phases: ",\n".join(f"      {json.dumps(name)}: {json.dumps(parts)}" for name, parts in phases.items())
    text += "{\n" + ",\n".join(f"    {json.dumps(row)}: {{\n{of(phases)}\n    }}" for row, phases in rows.items())
    FILE.write_text(text + "\n  }\n}\n", encoding="utf-8")


def difference(row: object, now: Phases, before: Phases | None) -> list[str]:
    """A sentence for each category of `row` that is off by more than TOLERANCE, with both numbers of bytes."""
    if before is None:
        return [f"{row}: not in {FILE.name}"]
    said = []
    for phase in dict.fromkeys([*before, *now]):
        new, old = now.get(phase, {}), before.get(phase, {})
        for category in dict.fromkeys([*old, *new]):
            a, b = old.get(category, 0), new.get(category, 0)
            if abs(b - a) > TOLERANCE * a:
                off = f"{b / a - 1:+.1%}" if a else "new"
                said.append(f"{row}: {phase}, {category}: {b:,} bytes, baseline {a:,} ({off})")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    known = read() if FILE.exists() else {}
    found = {str(row): predicted(row) for row in ROWS}
    said = [line for row, phases in found.items() for line in difference(row, phases, known.get(row))]
    print("\n".join(said) or "as in the baseline")
    if args.write:
        write(found)
    sys.exit(bool(said) and not args.write)


if __name__ == "__main__":
    main()
