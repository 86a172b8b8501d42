"""What `lowvram-grpo eval` has to say: every number as JSON with its settings and versions, and what they mean."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lowvram_grpo.run import jsonl

if TYPE_CHECKING:
    from lowvram_grpo.jobs.eval_job import EvalJob, Wanted
    from lowvram_grpo.jobs.evaluation import Scored
    from lowvram_grpo.recipe.config import GRPOConfig

_PACKAGES = ("lowvram-grpo", "torch", "transformers", "peft", "bitsandbytes", "datasets")


def found_of(scored: dict[str, dict[str, Scored]], wanted: Wanted, threshold: float) -> dict[str, Any]:
    """Every number, ready for JSON: policies -> NAME -> PASS -> metrics, and difference -> PASS -> metrics."""
    as_table = lambda summary: {name: interval._asdict() for name, interval in summary.items()}
    ks = {"greedy": (1,), "sampled": wanted.ks}
    policies = {
        name: {
            kind: {
                "completions": one.rewards.numel(),
                "tokens_per_second": float(one.lengths.sum()) / max(one.seconds, 1e-9),
                "metrics": as_table(one.summary(ks[kind], threshold)),
            }
            for kind, one in passes.items()
        }
        for name, passes in scored.items()
    }
    found: dict[str, Any] = {"policies": policies}
    if wanted.compare_base:
        found["difference"] = {
            kind: as_table(one.minus(scored["base"][kind], ks[kind], threshold))
            for kind, one in scored["adapter"].items()
        }
    return found


def explained(wanted: Wanted, job: EvalJob, scored: dict[str, dict[str, Scored]]) -> list[str]:
    """What the numbers mean, in sentences."""
    from lowvram_grpo.jobs.evaluation import all_or_nothing

    by = "--threshold" if wanted.threshold is not None else "full marks from every reward; --threshold sets another"
    said = [
        "± is half of a 95 % interval of the mean over prompts (normal approximation"
        + ("; differences are paired by prompt)." if wanted.compare_base else ")."),
        f"A completion passes with a total reward of {job.threshold:g} or more ({by}).",
    ]
    everything = [one for passes in scored.values() for one in passes.values()]
    if wanted.threshold is None and not all(all_or_nothing(one, job.full) for one in everything):
        marks = ", ".join(f"{name} {best:g}" for name, best in zip(everything[0].names, job.full))
        said.append(f"Some rewards lie elsewhere than at 0 and full marks ({marks}): say with --threshold what passes.")
    return said


def settings_of(job: EvalJob, wanted: Wanted) -> dict[str, Any]:
    """What it would take to evaluate again."""
    kept = ("model", "model_revision", "adapter", "template", "quantization", "dtype", "preset", "chat_template")
    trained = ("head_dtype", "max_prompt_length", "max_completion_length", "generation_kwargs", "seed")
    asked = {key: value for key, value in asdict(wanted).items() if key != "out"}
    return {
        **{key: getattr(job.recipe, key) for key in kept},
        **{key: getattr(job.args, key) for key in trained},
        **asked,
        "threshold": job.threshold,
        "data": job.place,
        "prompts": len(job.data),
        "rewards": job.rewards.specs,
        "reward_weights": list(job.args.reward_weights),
        "interval": "95 %, normal approximation over prompts",
    }


def versions(args: GRPOConfig) -> dict[str, str]:
    """Of what the numbers may depend on."""
    found = {"python": platform.python_version(), "device": str(args.device)}
    if args.device.type == "cuda":
        import torch

        found["device"] = torch.cuda.get_device_name(args.device)
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a bare checkout
            continue
    return found


def as_json(found: dict[str, Any]) -> str:
    """NaN, a mean over nothing, becomes null."""
    return json.dumps(jsonl.plain(found), indent=2, ensure_ascii=False)
