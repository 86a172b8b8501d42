"""What a recipe file asks for that this machine lacks: left out, and said once.

A file travels between machines, and most of Open R1's were written on eight cards beside a vLLM server, logged in to
everything. A flag is meant here: what it asks for is refused where it can't be had, as before.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lowvram_grpo.recipe.all_weights import OF_ALL_WEIGHTS
from lowvram_grpo.recipe.not_applied import NotApplied

if TYPE_CHECKING:
    from lowvram_grpo.recipe.resolve import Recipe

# Who set a value, in the written recipe.
THIS_MACHINE = "this machine"
_HUB = ("push_to_hub", "hub_model_id", "hub_strategy", "hub_revision", "hub_private_repo", "hub_always_push")
_WANDB = ("wandb_entity", "wandb_project", "wandb_run_group")


def settle(recipe: Recipe) -> None:
    """Leave out of `recipe` what its file asks for and this machine has not; `recipe.not_applied` gets the reasons."""
    found = (
        _vllm(recipe), _attention(recipe), _half(recipe), _precision(recipe), _trackers(recipe), _hub(recipe),
        _provider(recipe), _evaluation(recipe),
    )  # fmt: skip
    recipe.not_applied += [row for row in found if row is not None]


def export(recipe: Recipe) -> None:
    """Set the environment that the recipe asks for: its `env`, as TRL's parser does, and Weights & Biases' names, as
    Open R1 does."""
    os.environ.update(recipe.env)
    for key in _WANDB:
        if (value := getattr(recipe, key)) is not None:
            os.environ[key.upper()] = value


def _of_the_file(recipe: Recipe, key: str) -> bool:
    return recipe.origin.get(key) == "file"


def _drop(recipe: Recipe, keys: Iterable[str]) -> tuple[str, ...]:
    """Take settings of the file out of the recipe's training.

    Returns:
        those that were there.
    """
    dropped = [key for key in keys if key in recipe.training and _of_the_file(recipe, key)]
    for key in dropped:
        del recipe.training[key], recipe.origin[key]
    return tuple(dropped)


def _vllm(recipe: Recipe) -> NotApplied | None:
    training = recipe.training
    if not training.get("use_vllm") or not _of_the_file(recipe, "use_vllm") or training.get("vllm_mode") == "server":
        return None
    if not recipe.use_peft:
        why = "weights go to vLLM as LoRA adapters, and all weights are trained"
    elif sys.platform == "win32":
        why = "vLLM does not run on Windows"
    elif importlib.util.find_spec("vllm") is None:
        why = "vLLM is not installed"
    else:
        return None
    keys = _drop(recipe, [key for key in list(training) if key.startswith("vllm_")])
    return NotApplied((*_drop(recipe, ["use_vllm"]), *keys), f"{why}; the built-in engine samples")


def _attention(recipe: Recipe) -> NotApplied | None:
    name = str(recipe.attn_implementation)
    if not name.startswith("flash_attention") or not _of_the_file(recipe, "attn_implementation"):
        return None
    import torch
    from transformers import utils

    if not torch.cuda.is_available():
        why = "it needs a GPU"
    elif name == "flash_attention_2" and not utils.is_flash_attn_2_available():
        why = "flash-attn is not installed"
    elif name == "flash_attention_3" and not utils.is_flash_attn_3_available():
        why = "flash-attn 3 is not installed"
    else:
        return None
    recipe.attn_implementation = None
    del recipe.origin["attn_implementation"]
    return NotApplied(("attn_implementation",), f"{name}: {why}; PyTorch's own attention (sdpa) computes the same")


def _half(recipe: Recipe) -> NotApplied | None:
    """16 bits that this machine does not multiply in hardware."""
    import torch

    from lowvram_grpo.policy.precision import cpu_multiplies

    on_cpu = recipe.training.get("use_cpu") or not torch.cuda.is_available()
    if not on_cpu:
        slow, why = torch.cuda.get_device_capability()[0] < 8, "this GPU has no bfloat16 in hardware; float16 is used"
    else:
        slow, why = not cpu_multiplies(torch.bfloat16), "this CPU has no instructions for it; float32 is used"
    keys: tuple[str, ...] = ()
    if recipe.dtype == "bfloat16" and slow and recipe.use_peft and _of_the_file(recipe, "dtype"):
        recipe.dtype, recipe.origin["dtype"] = "auto", THIS_MACHINE
        keys = ("dtype",)
    if on_cpu and recipe.training.get("bf16"):  # which transformers refuses without a GPU, unless use_cpu is set
        keys += _drop(recipe, ("bf16",))
        why = why if slow else "autocast is for a GPU"
    return NotApplied(keys, why) if keys else None


def _precision(recipe: Recipe) -> NotApplied | None:
    if recipe.use_peft or recipe.dtype in ("auto", "float32"):
        return None
    asked, recipe.dtype, recipe.origin["dtype"] = recipe.dtype, "float32", OF_ALL_WEIGHTS
    return NotApplied(
        ("dtype",),
        f"{asked}: weights that are trained stay float32, or small steps would be lost; products are autocast",
    )


def _trackers(recipe: Recipe) -> NotApplied | None:
    asked = recipe.training.get("report_to")
    if not asked or not _of_the_file(recipe, "report_to"):
        return None
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    names = [asked] if isinstance(asked, str) else list(asked)
    missing = {}
    for name in names:
        if name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations():
            missing[name] = f"{name} is not installed (`pip install {name}`)"
        elif name == "wandb" and not _logged_in():
            missing[name] = "wandb is not logged in (`wandb login`, or WANDB_MODE=offline)"
    if not missing:
        return None
    recipe.training["report_to"] = [name for name in names if name not in missing] or "none"
    recipe.origin["report_to"] = THIS_MACHINE
    also = [key for key in _WANDB if "wandb" in missing and getattr(recipe, key) is not None]
    return NotApplied(("report_to", *also), f"{', '.join(missing.values())}; metrics.jsonl has every number")


def _logged_in() -> bool:
    """Whether wandb would start without asking for a key."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].rstrip("/")
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if name and netrc.netrc(os.path.expanduser(name)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _hub(recipe: Recipe) -> NotApplied | None:
    if not recipe.training.get("push_to_hub") or not _of_the_file(recipe, "push_to_hub"):
        return None
    from huggingface_hub import get_token

    from lowvram_grpo.policy.hub import out_of_reach

    if not (recipe.training.get("hub_token") or get_token()):
        why = "no token of the hub is known (`hf auth login`, or HF_TOKEN)"
    elif not (why := out_of_reach()):
        return None
    return NotApplied(_drop(recipe, _HUB), f"{why}; `hf upload` takes a finished run's adapter folder at any time")


def _provider(recipe: Recipe) -> NotApplied | None:
    name = recipe.code_provider
    if name == "local" or not _of_the_file(recipe, "code_provider"):
        return None
    recipe.code_provider, recipe.origin["code_provider"] = "local", THIS_MACHINE
    return NotApplied(("code_provider",), f"{name}: programs run in a sandbox on this machine")


def _evaluation(recipe: Recipe) -> NotApplied | None:
    """`do_eval` alone evaluates nothing, as in Open R1, whose script goes by eval_strategy."""
    named = recipe.eval_data or recipe.eval_split or recipe.training.get("eval_strategy", "no") != "no"
    if named or not recipe.training.get("do_eval") or not _of_the_file(recipe, "do_eval"):
        return None
    return NotApplied(_drop(recipe, ("do_eval", "eval_steps")), "eval_strategy is no, and evaluations go by it")
