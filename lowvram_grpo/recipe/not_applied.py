"""Settings of other people's recipes that have nothing to act on here, and why: listed once, then left out.

What a setting can't do on any machine is known by its name alone and stands in this table; what this machine lacks
(vLLM, a tracker, a token of the hub) is looked at by `jobs.here`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from textwrap import wrap
from typing import Any

from lowvram_grpo.rewards.settings import FOREIGN

_ONE_BRANCH = "the hub gets one branch, hub_model_revision, by push_to_hub and hub_strategy"
_ONE_CARD = "one process trains, on one card"
_ELSEWHERE = "completions are sampled in this process, by the weights that train"
_DRAWN = "weights in 4 bits are always NF4"

# Of Open R1 (its GRPOConfig, GRPOScriptArguments and recipes) and of TRL's own command line.
NEVER: dict[str, str] = {
    "dataset_configs": "Open R1 reads dataset_config alone, and so does this",
    "callbacks": f"Open R1's one callback pushes each checkpoint to a branch of its own; {_ONE_BRANCH}",
    "benchmarks": "Open R1 hands them to a Slurm cluster; `lowvram-grpo eval --adapter RUN` scores a run",
    "push_to_hub_revision": _ONE_BRANCH,
    "overwrite_hub_revision": _ONE_BRANCH,
    "num_processes": _ONE_CARD,
    "ignore_bias_buffers": _ONE_CARD,
    "accelerate_config": _ONE_CARD,
    "remote_gen_model_url": _ELSEWHERE,
    "remote_gen_model_port": _ELSEWHERE,
    "use_liger_loss": "the loss is fused already (fused_loss)",
    "bnb_4bit_quant_storage": _DRAWN,
    **FOREIGN,
}


@dataclass(frozen=True)
class NotApplied:
    """Settings that are left out for one reason."""

    keys: tuple[str, ...]
    reason: str


def left_out(table: Mapping[str, Any]) -> list[NotApplied]:
    """What of a table of settings is in `NEVER`, by reason. Of what is not set (null, false, nothing in a list) nothing
    needs to be said."""
    return grouped((key, NEVER[key]) for key, value in table.items() if key in NEVER and value not in _UNSET)


_WIDEST_KEY = 32
_UNSET: tuple[Any, ...] = (None, False, "", "false", "False", [], {})


def grouped(reasons: Iterable[tuple[str, str]]) -> list[NotApplied]:
    """(key, reason) pairs as one entry a reason, in the order of the first key of each."""
    keys: dict[str, list[str]] = {}
    for key, reason in reasons:
        keys.setdefault(reason, []).append(key)
    return [NotApplied(tuple(names), reason) for reason, names in keys.items()]


def as_text(found: Iterable[NotApplied], width: int = 100) -> str:
    """A table for a screen, a line a setting; a reason stands beside the first of its settings."""
    rows = list(found)
    keys = min(max(len(key) for row in rows for key in row.keys), _WIDEST_KEY) + 2
    lines = []
    for row in rows:
        reason = wrap(row.reason, max(width - keys - 2, 30))
        lines += [f"  {key:<{keys}}{text}".rstrip() for key, text in zip_longest(row.keys, reason, fillvalue="")]
    return "\n".join(lines)


def as_markdown(found: Iterable[NotApplied], notices: Iterable[str] = ()) -> str:
    """The page of a run's directory: a table by key, then sentences about settings that act differently."""
    lines = ["# Settings of the recipe that were not applied", "", "| setting | why |", "|---|---|"]
    cell = lambda text: text.replace("|", "\\|")
    lines += [f"| {', '.join(f'`{key}`' for key in row.keys)} | {cell(row.reason)} |" for row in found]
    said = [f"* {notice}" for notice in notices]
    return "\n".join([*lines, *(["", *said] if said else [])]) + "\n"
