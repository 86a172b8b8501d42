"""Predicted and measured peaks of training steps, one row a (preset, model) pair.

What is predicted is `Planner.plan` under the budget that the preset's card leaves; what is measured are real steps with
that plan's settings under a hard cap of that budget (`bench.measure`). Where there is no GPU, rows are predictions
alone, or on the CPU counted by the ledger, which says that the two agree, and nothing about a card.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ladder import PHASES
from lowvram_grpo.recipe import preset as presets

if TYPE_CHECKING:
    from pathlib import Path

    from lowvram_grpo.bench.rows import Rows
    from lowvram_grpo.plan.planner import Plan
    from lowvram_grpo.recipe.resolve import Recipe

MIB = 2**20
DEVICES = ("auto", "cuda", "cpu", "none")
MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen3-8B")
# Parts of a prediction that are no tensors, and those that stay where they are.
BESIDE = ("CUDA context", "CUDA graphs", "fragmentation")
LASTING = ("base weights", "streamed weights", "head", "adapter", "gradients", "optimizer")


@dataclass(frozen=True)
class Case:
    """A recipe under the budget of its preset's card, in bytes; `card` is that card's size in GB."""

    recipe: Recipe
    card: float
    budget: int

    @property
    def setup(self) -> str:
        """What a person set, the model and the preset apart."""
        recipe, apart = self.recipe, ("model", "preset")
        own = sorted(k for k, who in recipe.origin.items() if who in ("flag", "file") and k not in apart)
        value = lambda key: recipe.training[key] if key in recipe.training else getattr(recipe, key)
        return " ".join(f"{key}={value(key)}" for key in own)


def cases(models: Iterable[str], names: Iterable[str], flags: dict[str, Any], config: Path | None = None) -> list[Case]:
    """Every model with every preset, the models of one preset together.

    Raises:
        UserError: an unknown preset or setting, or a preset that is for no card.
    """
    from lowvram_grpo.recipe.resolve import resolve

    models, found = list(models), []
    for name in names:
        card = presets.load(name).vram_gib
        if card is None:
            raise UserError(f"Preset {name} is for no card; take one of {', '.join(cards())}.")
        for model in models:
            recipe = resolve({**flags, "model": model, "preset": name}, config)
            found.append(Case(recipe, card, presets.card_budget(card)))
    return found


def cards() -> list[str]:
    """The presets that are for a card, the smallest first."""
    return [name for name in presets.names() if presets.load(name).vram_gib is not None]


def planned(case: Case, *, device: str = "cuda", half: str = "bfloat16") -> Plan:
    """What would run."""
    from lowvram_grpo.plan.architectures import resolve_config
    from lowvram_grpo.plan.fitting import plan_on_paper

    config, _ = resolve_config(str(case.recipe.model))
    return plan_on_paper(case.recipe, config, case.card, device=device, half=half, advise=False)


def predicted(case: Case, plan: Plan) -> dict[str, Any]:
    """The part of a row that needs no device. Sizes are MiB, overheads included."""
    found, mib = plan.prediction, lambda sizes: {name: round(size / MIB, 1) for name, size in sizes.items()}
    phases = [name for name in PHASES if name in found.phases]
    return {
        "vram_gib": case.card,
        "cap_gib": round(case.budget / 2**30, 3),
        "fits_predicted": plan.fits,
        "rungs": [str(rung) for rung in plan.rungs],
        "climbs": [str(climb) for climb in plan.climbs],
        "settings": plan.as_json()["settings"],
        "predicted_mib": mib({phase: found.phases[phase] for phase in phases}),
        "predicted_parts_mib": {phase: mib(found.parts[phase]) for phase in phases},
        "predicted_peak_mib": round(found.peak / MIB, 1),
        "predicted_peak_phase": found.peak_phase,
        "predicted_host_mib": mib(found.host),
    }


def resolve_device(wanted: str) -> str:
    """`cuda`, `cpu` or `none` (predictions alone) for one of `DEVICES`.

    Raises:
        UserError: another word, or a GPU that is not there.
    """
    import torch

    if wanted not in DEVICES:
        raise UserError(f"--device is {wanted!r}; it must be one of {', '.join(DEVICES)}.")
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError("--device is cuda, but torch sees no GPU (`lowvram-grpo doctor` says why); leave --device out.")
    return ("cuda" if there else "none") if wanted == "auto" else wanted


def run(
    wanted: Iterable[Case],
    rows: Rows,
    *,
    device: str,
    steps: int = 2,
    limit: float = 900.0,
    until: float = float("inf"),
    tell: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Plan each case, measure it on `device` (cuda, cpu, or none) and write its row; those there already are kept.

    Args:
        steps: optimizer steps; the last one's time is the one to look at.
        limit: seconds that one case may take.
        until: time.monotonic() after which nothing is begun.
        tell: receives each row.

    Returns:
        the rows of these cases, in order.
    """
    from lowvram_grpo.bench.measure import apart

    found = []
    half = "bfloat16" if int((rows.shared["capability"] or "8").split(".")[0]) >= 8 else "float16"
    for case in wanted:
        key = {
            "op": "train-step", "provider": "ours", "model": case.recipe.model, "preset": case.recipe.preset,
            "setup": " ".join(filter(None, [f"device={device}", f"steps={steps}", case.setup])),
        }  # fmt: skip
        if rows.has(**key):
            row = rows.get(**key)
        else:
            left = min(limit, until - time.monotonic())
            if left <= 0:
                break
            plan = planned(case, device="cpu" if device == "cpu" else "cuda", half=half)
            row = {"fits": None, **predicted(case, plan)}
            if device == "none":
                row["predicted_only"] = True
            elif device == "cuda" and case.budget > (rows.shared["memory_gib"] or 0) * 2**30:
                row |= {"predicted_only": True, "error": f"the card has only {rows.shared['memory_gib']} GiB"}
            else:
                row |= apart(plan.recipe, case.budget, steps, device, left)
                row |= compared(row)
            row = rows.add(**key, **row)
        tell(row)
        found.append(row)
    return found


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """What a measured row says beside its prediction, in MiB; {} where nothing was measured to the end.

    `total_mib` is what the card has to hold: the allocator's reserved peak and the context. `unseen_mib` is by how much
    the tensors at the peak exceed those that the ledger counted (both without what the allocator adds).
    `fragmentation` is the share of what is not weights that was reserved and not allocated.
    """
    if not row.get("fits") or not row.get("phases_mib"):
        return {}
    phases = {name: peak["allocated"] for name, peak in row["phases_mib"].items()}
    counted = {name: ledgered(row, name) for name in row["predicted_mib"]}
    found: dict[str, Any] = {"unseen_mib": round(max(phases.values()) - max(counted.values()), 1)}
    if row.get("peak_reserved_mib") is not None:
        highest = max(phases, key=phases.__getitem__)
        parts = row["predicted_parts_mib"].get(highest) or row["predicted_parts_mib"][row["predicted_peak_phase"]]
        moving = row["peak_allocated_mib"] - sum(parts.get(name, 0) for name in LASTING)
        slack = row["peak_reserved_mib"] - row["peak_allocated_mib"]
        found |= {
            "total_mib": round(row["peak_reserved_mib"] + row["context_mib"], 1),
            "fragmentation": round(slack / moving, 4) if moving > 0 else None,
            # What part_memory's tables and plots of every provider show.
            "peak_reserved_gib": row["peak_reserved_mib"] / 1024,
        }
    return found


def ledgered(row: dict[str, Any], phase: str) -> float:
    """MiB of tensors that the ledger counted at the peak of `phase`."""
    parts = row["predicted_parts_mib"][phase]
    return sum(size for name, size in parts.items() if name not in BESIDE)


def measured_mib(row: dict[str, Any], phase: str) -> float | None:
    """What the tensors of `phase` and the context were seen to take; None where it was not measured.

    Not what the allocator had reserved: in a later phase that is mostly what an earlier one left.
    """
    peak = (row.get("phases_mib") or {}).get(phase)
    return None if peak is None else peak["allocated"] + (row.get("context_mib") or 0.0)
