"""Which adapters can be trained and saved right, and what PiSSA and OLoRA take for that.

What is refused by name: whatever does not go through the layers that the trainer scores (prompt learning), kinds whose
forward pass needs more than hidden states, and initializations that need data or a base of their own.

PiSSA (Meng et al., arXiv:2404.02948) and OLoRA (Büyükakyüz, arXiv:2406.01775) take a part out of the base weights, W ->
W - s B0 A0, and begin the adapter with it. An adapter that is saved as it stands fits no model that anybody has, so it
is saved as the difference s (B A - B0 A0), a LoRA adapter of twice the rank for the W that was loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.text_model import adapter_mapping
from lowvram_grpo.policy.wrapper import unwrap

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_CONVERTIBLE = ("pissa", "olora")
_CHANGE_BASE = (*_CONVERTIBLE, "corda", "loftq", "lora_ga")
_PLAIN_INITS = "True, 'gaussian', 'orthogonal', 'pissa' or 'olora'"
# Fields of LoraConfig that make another adapter of it, and why that one is not trained here.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA looks for its tokens in a forward pass that the scorer does not use",
    "arrow_config": "a router over several adapters has none to train",
    "monteclora_config": "its random weights differ between the sampler and the scorer",
    "megatron_config": "layers of Megatron are not known here",
    "velora_config": "its compressed activations give another gradient",
    "use_qalora": "QALoRA pools its inputs by a group size that only GPTQ layers know",
    "use_bdlora": "block-diagonal LoRA is made for several devices",
    "layer_replication": "the reference is a second adapter, which would copy the layers once more",
    "kasa_config": "KaSA cuts singular values out of the base, which is not saved with the adapter",
}


def check_adapter(config: PeftConfig, *, fresh: bool, reference: bool = True) -> None:
    """Whether GRPO can train, and save, an adapter of this configuration.

    Args:
        fresh: it is about to be made; else it exists, and what its making did to the base is done.
        reference: there is a KL term, whose reference shares the base.

    Raises:
        UserError: it cannot, and what to take instead.
    """
    from peft import PeftType

    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.peft_type != PeftType.LORA:
        raise UserError(
            f"The adapter is of type {kind}, but only LoRA adapters can be trained here; pass a LoraConfig."
        )
    for name, why in _REFUSED.items():
        if getattr(config, name, None):
            raise UserError(f"The adapter sets {name}, which is not supported: {why}; leave {name} unset.")
    if config.bias != "none" and reference:
        raise UserError(
            f"The adapter sets bias to {config.bias!r}, which trains biases of the base model, and the reference "
            "of the KL term shares them; set bias to 'none', or beta to 0."
        )
    init = str(config.init_lora_weights).lower()
    if fresh and init == "eva":
        raise UserError(
            "init_lora_weights 'eva' needs data; call peft's initialize_lora_eva_weights, and pass the PeftModel in "
            "place of peft_config."
        )
    if not init.startswith(_CHANGE_BASE):
        return
    if not fresh or not init.startswith(_CONVERTIBLE):
        raise UserError(
            f"init_lora_weights {config.init_lora_weights!r} changes weights of the base model, so that "
            + ("the adapter alone fits no model" if fresh else "what the adapter began with is not known any more")
            + (
                f"; take {_PLAIN_INITS}."
                if fresh
                else "; convert it to plain LoRA when it is saved, or pass peft_config."
            )
        )
    for name in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters"):
        if getattr(config, name, None):
            raise UserError(
                f"init_lora_weights {config.init_lora_weights!r} is saved as a difference, which leaves out {name}; "
                "drop one of the two."
            )
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise UserError(
            f"init_lora_weights {config.init_lora_weights!r} can't be saved with use_rslora and a rank_pattern or "
            "alpha_pattern; drop use_rslora or the pattern."
        )


def check_adapters_of(model: PeftModel, *, reference: bool = True) -> None:
    """`check_adapter` for a model that came with an adapter.

    Raises:
        UserError: it has another kind, or several are active.
    """
    active = list(model.active_adapters)
    if len(active) != 1:
        raise UserError(
            f"The model has {len(active)} active adapters ({', '.join(active) or 'none'}); activate the one to train "
            "with set_adapter."
        )
    check_adapter(model.peft_config[active[0]], fresh=False, reference=reference)


def changes_base(config: PeftConfig) -> bool:
    return str(config.init_lora_weights).lower().startswith(_CHANGE_BASE)


class ChangedBase:
    """What a base model lost to the adapter that `get_peft_model` has just put onto it.

    From here on `model.save_pretrained` writes the difference, and another adapter of the same configuration leaves the
    base alone.
    """

    def __init__(self, model: PeftModel, adapter: str = "default"):
        self.adapter = adapter
        self.initial = {name: p.detach().cpu().clone() for name, p in self._factors(model)}
        model.peft_config[adapter].init_lora_weights = True
        model.changed_base = self
        model.save_pretrained = partial(self.save, model)

    def _factors(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        ends = (f".lora_A.{self.adapter}.weight", f".lora_B.{self.adapter}.weight")
        yield from ((name, p) for name, p in model.named_parameters() if name.endswith(ends))

    def save(self, model: PeftModel, save_directory: str, **kwargs: Any) -> None:
        """As PeftModel.save_pretrained, of the adapter alone and as LoRA for the base as it was loaded."""
        state, ours = model.state_dict(), model.peft_config[self.adapter]
        for name, p in self._factors(model):
            start = self.initial[name].to(p)
            state[name] = (
                torch.cat([p.detach(), start], 0) if ".lora_A." in name else torch.cat([p.detach(), -start], 1)
            )
        config = copy.deepcopy(ours)
        config.r *= 2
        config.lora_alpha *= 2**0.5 if config.use_rslora else 2
        for pattern in ("rank_pattern", "alpha_pattern"):
            setattr(config, pattern, {key: 2 * value for key, value in (getattr(config, pattern) or {}).items()})
        model.peft_config[self.adapter] = config
        try:
            kwargs = {**kwargs, "selected_adapters": [self.adapter]}
            type(model).save_pretrained(model, save_directory, state_dict=state, **kwargs)
        finally:
            model.peft_config[self.adapter] = ours

    @torch.no_grad()
    def restore(self, model: PeftModel, folder: str) -> None:
        """Take up the adapter that `save` left, and the start that it is the difference from."""
        from peft.utils import load_peft_weights

        saved = load_peft_weights(folder, device="cpu", key_mapping=adapter_mapping(model))
        starts: dict[str, Tensor] = {}
        for name, p in self._factors(model):
            both = saved[name.replace(f".{self.adapter}.", ".")]
            axis = 0 if ".lora_A." in name else 1
            here, start = both.split(p.shape[axis], axis)
            p.copy_(here)
            starts[name] = start if axis == 0 else -start
        for a in (name for name in starts if ".lora_A." in name):
            b = a.replace(".lora_A.", ".lora_B.")
            # Another machine's decomposition may differ: the base gets its own part back and loses the saved one.
            if not (torch.equal(starts[a], self.initial[a]) and torch.equal(starts[b], self.initial[b])):
                layer = model.get_submodule(a[: a.index(".lora_A.")])
                weight = layer.get_base_layer().weight
                change = self.initial[b].float() @ self.initial[a].float() - starts[b].float() @ starts[a].float()
                change = layer.scaling[self.adapter] * (change.T if layer.fan_in_fan_out else change)
                weight.copy_(weight.float() + change.to(weight.device))
        self.initial = starts


def check_tied_tokens(model: PeftModel) -> None:
    """Raises:
    UserError: the adapter trains rows of an embedding that is tied to lm_head."""
    if type(unwrap(model).get_output_embeddings()).__name__ == "TrainableTokensWrapper":
        raise UserError(
            "The adapter sets trainable_token_indices, and the model's lm_head is tied to the input embedding, so that "
            "it would be trained too, which is not supported; leave trainable_token_indices unset."
        )
