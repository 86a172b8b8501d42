"""What each memory saver saves: predicted with and without that one setting, all others as the preset has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowvram_grpo.bench.memory import MIB, Case
from lowvram_grpo.memory.ladder import PHASES, Rung, saves
from lowvram_grpo.plan.paper import setting, with_setting
from lowvram_grpo.plan.planner import Planner, ladder_of

# What a saver is switched off to, where the preset has it on already.
_WITHOUT = {"quantization": "none", "head_dtype": "dense", "embedding_offload": False, "gradient_checkpointing": False,
            "optim": "adamw_torch"}  # fmt: skip
# Savers that no preset's ladder has, but that the guard may take in the middle of a run.
_LAST = (Rung("optimizer_offload", True),)


def table(case: Case) -> Iterator[dict[str, Any]]:
    """One entry a saver: MiB that it takes off each phase's peak and off the highest, alone."""
    from lowvram_grpo.plan.architectures import resolve_config

    config, _ = resolve_config(str(case.recipe.model))
    planner, recipe = Planner(config), case.recipe
    # Every layer is run: what offloading holds in flight is a matter of the first few, and no straight line.
    whole = lambda recipe: planner.predict(recipe, exact=True)
    base = whole(recipe)

    def entry(key: str, value: Any, other: Any, without: Any, with_it: Any) -> dict[str, Any]:
        saved = {name: round((without.phases[name] - with_it.phases[name]) / MIB, 1) for name in PHASES}
        return {
            "model": recipe.model, "preset": recipe.preset, "saver": str(Rung(key, getattr(value, "value", value))),
            "instead_of": other, "in_preset": with_it is base, "saved_mib": saved,
            "peak_saved_mib": round((without.peak - with_it.peak) / MIB, 1),
        }  # fmt: skip

    for key, off in _WITHOUT.items():
        value = setting(recipe, key)
        if str(value) != str(off):
            yield entry(key, value, off, whole(with_setting(recipe, key, off)), base)
    for rung in (*ladder_of(recipe.preset), *_LAST):
        value = setting(recipe, rung.key)
        if saves(rung.key, rung.value, value):
            yield entry(*rung, value, base, whole(with_setting(recipe, *rung)))
