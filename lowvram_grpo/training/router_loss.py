"""router_aux_loss_coef: whether the loss has a router's load-balancing term, and what comes with it.

A micro-batch's term is a mean over its tokens (prompts with each of their completions, padding left out) and is weighed
by its share of the update's, so that one micro-batch gives TRL's number. The term multiplies two means over the same
tokens, so that several micro-batches give a mean of products, in TRL too (there each counts alike).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.experts import RouterLoss, router_loss_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowvram_grpo.recipe.config import GRPOConfig


def router_of(args: GRPOConfig, causal_lm: PreTrainedModel) -> RouterLoss | None:
    """What a training configuration and a model ask for.

    Raises:
        UserError: the model has no such loss, or another setting takes it away.
    """
    router = router_loss_of(causal_lm, args.router_aux_loss_coef)
    if router is None:
        return None
    for at_odds, reason in (
        (
            args.shared_prefix == "on",
            "shared_prefix is on, but the router's load-balancing loss counts a prompt with each completion; set it to "
            "auto",
        ),
        (
            args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"),
            "gradient_checkpointing_kwargs has use_reentrant, which leaves the router's load-balancing loss without a "
            "gradient; drop it",
        ),
    ):
        if at_odds:
            raise UserError(f"{reason}, or set router_aux_loss_coef to 0.")
    return router


def router_notice(args: GRPOConfig, router: RouterLoss | None) -> str | None:
    """What a person who trains a mixture of experts should know."""
    if router is None:
        return None
    whose = " (the model's own)" if args.router_aux_loss_coef is None else ""
    return (
        f"router_aux_loss_coef {router.coefficient:g}{whose} balances the experts: prompts go through the model with "
        "each of their completions; set it to 0 to share them."
    )
