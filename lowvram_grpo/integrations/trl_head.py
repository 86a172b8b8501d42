"""Our sweep in the place of the fused head that TRL gives a model.

TRL's trainer asks its models for log-probs in one way: `model(..., labels=labels, fused_lm_head=True)`, which a forward
that it puts on the instance answers. The replacement stands in that very place, behind whatever PEFT, autocast and TRL
do around it, so that adapters, images and routers take the way they take in TRL.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.linear_logps import linear_logps
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.policy.wrapper import unwrap


class _Settings(NamedTuple):
    """What TRL's fused head of a model was made with."""

    temperature: float
    logit_scale: float
    final_logit_softcapping: float | None
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]
    backbone_attr: str


class Heads:
    """The sweep in the policy and, where TRL keeps one, in the reference model.

    Args:
        entropy_gradient: whether the entropy is differentiable, as TRL's is.
    """

    what = "The log-prob path"

    def __init__(self, trainer: Any, direction: str, workspace_mib: int, *, entropy_gradient: bool):
        wrapped = [model for model in (trainer.model, trainer.ref_model) if model is not None]
        self.models = [unwrap(model) for model in wrapped]
        self.sweep = {"direction": direction, "workspace_mib": workspace_mib}
        self.entropy_gradient, self.on = entropy_gradient, False
        self.settings = [_settings_of(model) for model in self.models]
        self._forwards: list[tuple[nn.Module, Any, Any]] = []

    def why_not(self) -> str | None:
        """Why TRL's head has to stay, in words that follow "because"."""
        for model, settings in zip(self.models, self.settings):
            if extra := set(settings.outputs) - {"log_probs", "entropy"}:
                return f"{type(model).__name__} is asked for {', '.join(sorted(extra))}, which the sweep does not make"
            try:
                head_of(model)
            except UserError as error:
                return str(error).split(";")[0].rstrip(".")
        return None

    def put_in(self) -> None:
        self.on = True
        for model, settings in zip(self.models, self.settings):
            theirs = model.forward
            model.forward = MethodType(self._forward(theirs, settings), model)
            self._forwards.append((model, model.forward, theirs))

    def take_out(self) -> None:
        """Forwards that others have wrapped since, accelerate for one, stay where they are and pass on to TRL's."""
        self.on = False
        for model, ours, theirs in self._forwards:
            if model.__dict__.get("forward") == ours:
                model.forward = theirs
        self._forwards = []

    def _forward(self, theirs: Any, settings: _Settings) -> Any:
        @wraps(theirs.__func__)  # `generate` validates its arguments against the signature
        def forward(model, *args, fused_lm_head=False, labels=None, shift_labels=None, **kwargs):
            if self.on and fused_lm_head and labels is not None and shift_labels is None:
                return self._scored(model, settings, labels, args, kwargs)
            given = {"labels": labels, "shift_labels": shift_labels}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return theirs(*args, fused_lm_head=fused_lm_head, **kwargs)

        return forward

    def _scored(self, model: Any, settings: _Settings, labels: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """TRL's output for `labels` (B, L), -100 where nothing is scored: log-probs and entropies (B, L - 1) float32,
        0 there."""
        from trl.trainer.utils import FusedCausalLMOutput

        count = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        out = getattr(model, settings.backbone_attr)(*args, **kwargs)
        head = _head(model, settings)
        device = model.get_output_embeddings().weight.device
        states, labels = out.last_hidden_state[:, :-1].to(device), labels[:, 1:].to(device)
        mask = labels != -100
        entropy = "entropy" in settings.outputs
        exact = nullcontext()
        if settings.cast_lm_head_to_fp32:
            states, exact = states.float(), torch.autocast(device.type, enabled=False)
        with exact:
            found = linear_logps(
                states[mask], head, labels[mask], temperature=settings.temperature, entropy=entropy,
                entropy_gradient=entropy and self.entropy_gradient, **self.sweep,
            )  # fmt: skip
        # Scattered, a micro-batch without a scored token still has a gradient: 0.
        spread = lambda values: values.new_zeros(mask.shape).masked_scatter(mask, values)
        logps = spread(found.logps)
        loss = -logps.sum() / (mask.sum().clamp(min=1) if count is None else count)
        balance = None
        if kwargs.get("output_router_logits"):
            text = model.config.get_text_config()
            balance = _balance(out.router_logits, text, kwargs.get("attention_mask"))
            loss = loss + getattr(text, "router_aux_loss_coef", 0.0) * balance
        return FusedCausalLMOutput(
            loss=loss, log_probs=logps, entropy=spread(found.entropy) if entropy else None, label_mask=mask,
            aux_loss=balance,
        )  # fmt: skip


def _head(model: Any, settings: _Settings) -> Head:
    """Scale and soft-capping are those that TRL reads off a configuration: more kinds of model than head_of knows."""
    head = head_of(model)
    return Head(head.weight, head.bias, settings.logit_scale, settings.final_logit_softcapping)


def _settings_of(model: Any) -> _Settings:
    """Read off TRL's forward itself, so that both are certain to mean the same.

    Raises:
        UserError: the model's forward is not the one that TRL 1.16 gives it.
    """
    function = getattr(model.__dict__.get("forward"), "__func__", None)
    while function is not None:  # accelerate wraps the forward of a model that it has prepared
        known = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        if set(_Settings._fields) <= known.keys():
            return _Settings(*(known[name] for name in _Settings._fields))
        function = getattr(function, "__wrapped__", None)
    raise UserError(
        f"The forward of this {type(model).__name__} is not the one that TRL 1.16 gives it; call switch_on right "
        "behind GRPOTrainer(...), before anything else changes the model, or pass logps=False."
    )


def _balance(router_logits: Any, text: Any, attention_mask: Tensor | None) -> Tensor:
    """A router's load-balancing loss without its coefficient: transformers' own, which TRL takes too."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(text, "num_experts", None) or text.num_local_experts
    return load_balancing_loss_func(router_logits, experts, text.num_experts_per_tok, attention_mask)
