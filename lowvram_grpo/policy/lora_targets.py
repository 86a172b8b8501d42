"""Which layers `all-linear` means: those that an adapter is trained on where nobody names any.

peft takes every linear layer but lm_head, and of some mixtures of experts the router and every expert too. Left out
here are those whose output is no representation but a decision about one, a few numbers wide, and those that kernels
take the weights of without calling them:

* routers and gates of experts: a shift in who is chosen moves all that was learned, and balancing is a loss of its own
  (`router_aux_loss_coef`). Expert weights are parameters, not layers: peft's `target_parameters` names them;
* decay and write strength of a recurrence (`in_proj_a`, `in_proj_b`, Qwen3-Next's `in_proj_ba`): a number a head;
* what mixes a token's per-layer embedding into the stream (Gemma 3n and 4), trained with a table that stays frozen;
* Mamba's `out_proj`: its fused kernel multiplies by the weight itself, so an adapter would be trained that never ran
  (peft refuses it for pure Mamba models);
* layers of a mixture of experts that are called as its experts were before transformers 5 fused them (shared experts'
  `gate_proj`, of Qwen3-Next for one): peft takes the name for the experts', whenever such an adapter is made or loaded;
* towers for images and sound, and what leads from them into the language model.

Convolutions, norms, `A_log` and `dt_bias` are no linear layers. Whoever names modules gets the modules named.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from lowvram_grpo.policy.text_model import TOWERS

if TYPE_CHECKING:
    from peft import PeftConfig

ALL_LINEAR = "all-linear"
#: Why a layer is left out -> the names that say so, between dots.
LEFT_OUT = {
    "a router": r"(router|gate|shared_expert_gate)(\.(proj|layer|linear))?$",
    "decay and write strength of a recurrence": r"in_proj_(a|b|ba)$",
    "per-layer embeddings": r"per_layer_\w+$",
    "read by a fused kernel": r"mamba\.out_proj$",
    "of another modality": TOWERS,
}
_PATTERNS = {why: re.compile(rf"(^|\.)({names})") for why, names in LEFT_OUT.items()}


def linear_layers(model: nn.Module) -> dict[str, str | None]:
    """Name -> why `all-linear` leaves it out, None where it is taken, of every linear layer but the output head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {
        name: next((why for why, pattern in _PATTERNS.items() if pattern.search(name)), None)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    taken = _taken_for_experts(model, {_leaf(name) for name, why in found.items() if why is None})
    return {name: "taken for experts" if _leaf(name) in taken and why is None else why for name, why in found.items()}


def with_targets(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """`config`, changed in place, with names in the place of `all-linear`: one for all layers that are called so, where
    none of them is left out."""
    wanted = getattr(config, "target_modules", None)
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        layers = linear_layers(model)
        names = {name for name, why in layers.items() if why is None}
        others = {_leaf(name) for name, _ in model.named_modules() if name not in names}
        config.target_modules = {name if _leaf(name) in others else _leaf(name) for name in names}
    return config


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _taken_for_experts(model: nn.Module, leaves: set[str]) -> set[str]:
    """Those of the names under which peft adapts this model's fused experts instead of the layers called so."""
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:  # peft before 0.19
        return set()
    taken = set()
    for leaf in leaves:
        probe = LoraConfig(target_modules={leaf})
        try:
            convert(probe, model=model, conversions=None)
        except ValueError:  # gate_proj without up_proj, which lies in the same parameter
            probe.target_modules = set()
        if leaf not in probe.target_modules:
            taken.add(leaf)
    return taken
