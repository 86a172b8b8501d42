"""Before the first rollout: does the policy stay within float16's range? What does not is computed in float32 from then
on, in this run and in one that goes on with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_grpo.policy.overflow import computes_in_float16, keep, keep_where_needed, wide_layers

if TYPE_CHECKING:
    from lowvram_grpo.training.learner import Learner

FILE = "float32_layers.json"
# A few prompts show it: activations are largest at the first tokens, whatever these are.
_SEQUENCES, _TOKENS = 4, 1024


def look_for_overflow(learner: Learner, sequences: Sequence[list[int]], tell: Callable[[str], None]) -> bool:
    """Keep the layers in float32 whose activations leave float16's range on the first of these token ids; whether there
    were any that were not kept yet. A run in another precision is not looked at."""
    args, model = learner.args, learner.model
    if not computes_in_float16(model, args.fp16):
        return False
    shown = [list(ids[:_TOKENS]) for ids in sequences if len(ids)][:_SEQUENCES]
    found = keep_where_needed(model, shown, learner.autocast, tell)
    if found:
        _keep_all(learner, wide_layers(model))
    return bool(found)


def save_kept(learner: Learner, folder: str) -> None:
    """Into a checkpoint: which layers these are, or that there are none."""
    if computes_in_float16(learner.model, learner.args.fp16):
        (Path(folder) / FILE).write_text(json.dumps(wide_layers(learner.model)), encoding="utf-8")


def restore_kept(learner: Learner, folder: str | Path) -> bool:
    """Keep the layers that a checkpoint's run kept, where this one computes in float16 too; whether it says which, or
    that there were none, so that a run that goes on computes what it would have."""
    if not computes_in_float16(learner.model, learner.args.fp16):
        return True
    path = Path(folder) / FILE
    if not path.is_file():
        return False
    _keep_all(learner, json.loads(path.read_text(encoding="utf-8")))
    return True


def _keep_all(learner: Learner, layers: Sequence[int]) -> None:
    keep(learner.model, layers)
    copy = learner.reference.model if learner.reference is not None else None
    if copy is not None:
        keep(copy, layers, lent=learner.reference.offloaded)
