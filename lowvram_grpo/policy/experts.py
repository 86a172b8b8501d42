"""Mixtures of experts: what of their settings fits a model, and the load-balancing loss over all tokens of a pass.

    aux = E sum_e f_e P_e    f_e: how often a token chose expert e, over all layers; P_e: mean probability of the router

(Switch Transformers, Fedus et al. 2021, equations 4 to 6; with k experts a token the f_e add up to k.) The model
family's own function computes it from router logits that its decoder is asked for: no second pass, and no logits of the
vocabulary.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.quantized_experts import UP, holds_experts, layout_of, names
from lowvram_grpo.policy.stream import skeleton
from lowvram_grpo.recipe.expert_offload import OFF, settled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What configurations call the number of experts, and of those that a token chooses.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "experts_per_token")


def check_experts(config: Any, quantization: str, offload: str | int) -> None:
    """Whether the experts of a model of this configuration can be kept as asked for.

    Raises:
        UserError: int8, which leaves them in 16 bits, or experts in host memory that are not in 4 bits.
    """
    asks = settled(offload) != OFF and quantization != "nf4"
    if not (asks or quantization == "int8") or not (count := experts_of(config)):
        return
    if quantization == "int8":
        raise UserError(
            f"quantization is int8, which is for linear layers: the {count} experts a layer of this model are no such "
            "layers, and would stay in 16 bits; take nf4."
        )
    raise UserError(
        f"expert_offload is {offload}, but experts wait in host memory in 4 bits only, and quantization is "
        f"{quantization}; set it to nf4, or expert_offload to off."
    )


class ExpertLayer(NamedTuple):
    """Experts of a layer, how many a token chooses, and the bytes of one in 4 bits."""

    experts: int
    chosen: int
    bytes: int


def expert_layers(config: Any) -> list[ExpertLayer]:
    """Of a model of this configuration, the layers whose experts are 3-D parameters that can be quantized."""
    text = config.get_text_config()
    if not any(getattr(text, name, None) for name in _COUNTS):
        return []
    chosen = next((n for n in (getattr(text, name, None) for name in _CHOSEN) if n), 1)
    modules = [m for m in skeleton(config, torch.bfloat16).modules() if holds_experts(m)]
    return [ExpertLayer(len(getattr(m, names(m)[UP])), chosen, layout_of(m).bytes) for m in modules]


def experts_of(config: Any) -> int:
    """How many such experts a layer has at most; 0 where there are none."""
    return max((layer.experts for layer in expert_layers(config)), default=0)


class RouterLoss:
    """Watches the decoder of a causal language model whose routers are to be balanced.

    Args:
        coefficient: weight of this loss in the whole one.
    """

    def __init__(self, causal_lm: PreTrainedModel, coefficient: float):
        self.coefficient = coefficient
        self._decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        self._loss, *self._sizes = _family(causal_lm)

    @contextmanager
    def watched(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """For each pass of the decoder in the block, the router logits (tokens, experts) of its layers."""
        seen: list[tuple[Tensor, ...]] = []
        ask = lambda module, args, kwargs: (args, {**kwargs, "output_router_logits": True})
        keep = lambda module, args, output: seen.append(getattr(output, "router_logits", None) or ())
        hooks = (
            self._decoder.register_forward_pre_hook(ask, with_kwargs=True),
            self._decoder.register_forward_hook(keep),
        )
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, router_logits: tuple[Tensor, ...], attention_mask: Tensor) -> Tensor:
        """Differentiable scalar of one pass.

        Args:
            attention_mask: (B, L), 0 for padding, whose tokens do not count; L tokens of each row went through.

        Raises:
            UserError: the decoder gave no router logits.
        """
        if not router_logits:
            raise UserError(
                f"{type(self._decoder).__name__} gives no router logits, so its experts can't be balanced; set "
                "router_aux_loss_coef to 0."
            )
        return self._loss(router_logits, *self._sizes, attention_mask)


def router_loss_of(causal_lm: PreTrainedModel, coefficient: float | None) -> RouterLoss | None:
    """The loss with this coefficient, that of the model's own configuration where it is None; None where it is 0.

    Raises:
        UserError: a coefficient for a model that is no mixture of experts, or whose family has no such loss.
    """
    config = causal_lm.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if coefficient:
            raise UserError(
                f"router_aux_loss_coef is {coefficient}, but {type(causal_lm).__name__} is no mixture of experts that "
                "returns its router logits, so there is nothing to weigh; drop it."
            )
        return None
    wanted = getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
    if not wanted:
        return None
    if _family(causal_lm) is None:
        if coefficient is None:
            return None
        raise UserError(
            f"router_aux_loss_coef is {coefficient}, but transformers has no load-balancing loss for "
            f"{type(causal_lm).__name__}; drop it."
        )
    return RouterLoss(causal_lm, wanted)


def _family(causal_lm: nn.Module) -> tuple[Callable[..., Tensor], int, int] | None:
    """(loss, number of experts, experts a token) as the model's own forward has them; None where it has none, or one of
    another kind (Doge's chooses by two keys)."""
    loss = getattr(sys.modules[type(causal_lm).__module__], "load_balancing_loss_func", None)
    experts, chosen = (getattr(causal_lm, name, None) for name in ("num_experts", "num_experts_per_tok"))
    # 0: Granite 4's dense models, which have none of the experts that they could have.
    if loss is None or not experts or chosen is None:
        return None
    takes = list(inspect.signature(loss).parameters)
    return (loss, experts, chosen) if takes == ["gate_logits", "num_experts", "top_k", "attention_mask"] else None
