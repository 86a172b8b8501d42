"""`weight_offload`: how many decoder layers wait in host memory, and what that does not go together with."""

from __future__ import annotations

from typing import Any

from lowvram_grpo.errors import UserError

OFF, AUTO = "off", "auto"
_ALLOWED = "off, auto, or a number of decoder layers, at least 1"


def settled(value: Any) -> str | int:
    """`off`, `auto` or a number of layers, of what a flag, a file or a script may say.

    Raises:
        UserError: something else.
    """
    word = str(value).lower()
    if value is None or value is False or word in (OFF, "false"):
        return OFF
    if word == AUTO:
        return AUTO
    if not isinstance(value, bool):
        try:
            count = int(word)
        except ValueError:
            count = 0
        if count >= 1:
            return count
    raise UserError(f"weight_offload is {value!r}; it must be {_ALLOWED}.")


def streamed_layers(value: Any, layers: int) -> int:
    """How many of `layers` decoder layers wait in host memory. `auto`, which a memory plan replaces by a number, is all
    of them without one, and so is any larger number."""
    setting = settled(value)
    return 0 if setting == OFF else layers if setting == AUTO else min(int(setting), layers)


# Not typed as a GRPOConfig: that module asks this one.
def check_weight_offload(args: Any) -> None:
    """Raises:
    UserError: another setting of a GRPOConfig contradicts its weight_offload."""
    if args.weight_offload == OFF:
        return
    if not (args.gradient_checkpointing or getattr(args, "activation_checkpointing", None)):
        raise UserError(
            "weight_offload needs gradient_checkpointing: without it the backward pass reads the weights of layers "
            "that have left the card; set gradient_checkpointing, or weight_offload off."
        )
    if args.rollout_adapters == "merged":
        raise UserError(
            "weight_offload brings a layer's weights to the card anew in each pass, so an adapter that is merged into "
            "them would be lost; set rollout_adapters to auto, or weight_offload off."
        )
    if args.use_vllm and args.vllm_mode == "colocate":
        raise UserError(
            "weight_offload makes room on a card on which vLLM, with vllm_mode colocate, keeps all weights of its own; "
            "leave use_vllm off, set vllm_mode to server, or weight_offload off."
        )
