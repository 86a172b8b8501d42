"""The ladder of memory savers: which setting relieves which phase, and what the next step down is.

A preset lists its rungs in the order in which they cost speed. The planner takes them before the run until the
prediction fits; the guard goes on from there when memory runs out all the same, by those rungs only that can change
in the middle of a run without changing the gradient. Where the planner has gone up from the preset (`climb`), the guard
comes back by the same way first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lowvram_grpo.errors import UserError

PHASES = ("load", "rollout", "score", "forward", "backward", "optimizer")
_TRAINING = ("score", "forward", "backward")

# Where reward models score, a phase of its own where there are any.
REWARD = "reward"

# Setting -> phases that it relieves.
RELIEVES: dict[str, tuple[str, ...]] = {
    "reward_model_device": (*PHASES, REWARD),
    "quantization": (*PHASES, REWARD),
    "head_dtype": (*PHASES, REWARD),
    "embedding_offload": (*PHASES, REWARD),
    "kv_cache_dtype": ("rollout",),
    "rollout_batch_size": ("rollout",),
    "per_device_train_batch_size": _TRAINING,
    "gradient_checkpointing": ("forward", "backward"),
    "activation_offload": ("forward", "backward"),
    "mlp_tile": ("forward", "backward"),
    "workspace_mib": ("rollout", *_TRAINING),
    "optimizer_offload": ("rollout", *_TRAINING, "optimizer", REWARD),
    "reference_offload": (*PHASES, REWARD),
    "expert_offload": (*PHASES, REWARD),
    "weight_offload": (*PHASES, REWARD),
}

_WORDS = {
    "reward_model_device": "reward models are kept elsewhere ({})",
    "rollout_batch_size": "sampling {} at once",
    "per_device_train_batch_size": "training on {} at once",
    "gradient_checkpointing": "the backward pass computes activations again",
    "activation_offload": "kept activations wait in host memory",
    "mlp_tile": "MLPs run {} tokens at a time",
    "workspace_mib": "{} MiB of scratch memory for the vocabulary sweep",
    "optimizer_offload": "the optimizer's moments live in host memory",
    "reference_offload": "the reference of all weights is streamed from host memory, layer by layer",
    "expert_offload": "experts wait in host memory, and come when tokens choose them ({} without a place on the card)",
    "embedding_offload": "the input embedding lives in host memory",
    "weight_offload": "{} decoder layers wait in host memory and are streamed in each pass",
    "kv_cache_dtype": "rollouts keep keys and values in {}",
    "head_dtype": "lm_head is kept in {}",
    "quantization": "the base is kept in {}",
}

# Settings that are fixed once the weights are on the card; a rung of one of these means loading again. The KV cache
# stays as it began too: what rounds the policy's samples is decided before a run, not in the middle of it.
AT_LOAD = frozenset(
    {"quantization", "head_dtype", "embedding_offload", "kv_cache_dtype", "expert_offload", "weight_offload"}
)
# From the largest to the smallest: what counts as a saving, where it is not a smaller number or a switch.
_ORDERS = {
    "reward_model_device": ("cuda", "in_turn", "cpu"),
    "quantization": ("none", "int8", "nf4"),
    "head_dtype": ("dense", "int8", "nf4"),
    "kv_cache_dtype": ("auto", "int8"),
}


class Rung(NamedTuple):
    """One setting and the value it is lowered to."""

    key: str
    value: Any

    def __str__(self) -> str:
        return f"{self.key}={str(self.value).lower() if isinstance(self.value, bool) else self.value}"

    @property
    def words(self) -> str:
        """For people, as in `training on 2 completions at once`."""
        count = f"{self.value} completion{'s' if self.value != 1 else ''}"
        return _WORDS.get(self.key, str(self)).format(count if self.key.endswith("batch_size") else self.value)


# What reward models cost least: scoring waits for their weights to come, and nothing else does; and what it costs most.
IN_TURN, ON_CPU = Rung("reward_model_device", "in_turn"), Rung("reward_model_device", "cpu")


def relieves(rung: Rung, phase: str) -> bool:
    """Whether a rung may lower the peak of a phase. A model that is brought to the card to score is there then."""
    return phase in RELIEVES[rung.key] and not (rung == IN_TURN and phase == REWARD)


def saves(key: str, value: Any, current: Any) -> bool:
    """Whether `value` takes less memory than `current` (None: unset) for a setting of a ladder; either may be text.

    A smaller number does, a switch that goes on, or a smaller kind of weights. So a rung never undoes what a person has
    set lower, nor what an earlier rung did.

    Raises:
        UserError: it cannot be told.
    """
    word = str(value).lower()
    if word in ("true", "false"):
        return word == "true" and str(current).lower() != "true"
    try:
        if key in ("expert_offload", "weight_offload"):
            return _elsewhere(word) > _elsewhere(current)
        if key in _ORDERS:
            order = _ORDERS[key]
            now = str(current or order[0])
            return order.index(word) > order.index(order[0] if now == "auto" and now not in order else now)
        return current is None or int(value) < int(current)
    except ValueError as error:
        raise UserError(
            f"{key}={value} is no rung of a ladder after {key}={current}; a rung is a smaller whole number, true, or "
            f"a smaller kind of {' or '.join(_ORDERS)}."
        ) from error


def _elsewhere(value: Any) -> float:
    """Experts or decoder layers in host memory, of which each saves; `auto` may become all."""
    word = str(value).lower()
    known = {"off": 0.0, "none": 0.0, "auto": math.inf}
    return known[word] if word in known else int(word)


def _halvings(now: int) -> Iterator[int]:
    while now > 1:
        now = (now + 1) // 2
        yield now


def way_back(settings: Mapping[str, Any], begins: Mapping[str, Any], group: int) -> Iterator[Rung]:
    """Rungs from `settings` down to those that a preset `begins` with. Micro-batches are halved as long as they are
    whole groups of `group` completions, then activations are recomputed, which frees most at once."""
    halved = lambda key: (Rung(key, n) for n in _halvings(settings[key] or 0) if n >= begins.get(key, n + 1))
    yield from halved("rollout_batch_size")
    smaller = list(halved("per_device_train_batch_size"))
    yield from (rung for rung in smaller if rung.value >= group)
    if begins.get("gradient_checkpointing") and not settings["gradient_checkpointing"]:
        yield Rung("gradient_checkpointing", True)
    yield from (rung for rung in smaller if rung.value < group)
    if begins.get("workspace_mib", settings["workspace_mib"]) < settings["workspace_mib"]:
        yield Rung("workspace_mib", begins["workspace_mib"])


def _reward_models(settings: Mapping[str, Any]) -> Iterator[Rung]:
    """Where there are reward models on the card, they are the first to go."""
    if "reward_model_device" in settings:
        yield IN_TURN


def last_resorts(settings: Mapping[str, Any]) -> Iterator[Rung]:
    """Rungs below the last one of any preset: what is left to give up in the middle of a run.

    A reference that is a copy of all weights (there is no such setting otherwise) goes first: it is the most there is
    to have, its price is one copy a pass, and smaller micro-batches are more passes.
    """
    if "reference_offload" in settings:
        yield Rung("reference_offload", True)
    yield from (Rung("rollout_batch_size", n) for n in _halvings(settings["rollout_batch_size"]))
    yield from (Rung("per_device_train_batch_size", n) for n in _halvings(settings["per_device_train_batch_size"]))
    yield Rung("gradient_checkpointing", True)  # without it, nothing is kept that could be offloaded
    yield Rung("activation_offload", True)
    yield from (Rung("mlp_tile", n) for n in (512, 256, 128))
    yield from (Rung("workspace_mib", n) for n in (32, 16, 8))
    yield Rung("optimizer_offload", True)


def next_rung(phase: str, settings: Mapping[str, Any], ladder: Sequence[Rung] = ()) -> Rung | None:
    """The first rung that relieves `phase` and is below `settings`; None where there is none left."""
    for rung in (*_reward_models(settings), *ladder, *last_resorts(settings)):
        if rung.key in AT_LOAD or not relieves(rung, phase):
            continue
        if saves(rung.key, rung.value, settings.get(rung.key)):
            return rung
    return None
