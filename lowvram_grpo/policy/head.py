"""The head of a Hugging Face model. What `kernels.head.Head` cannot represent exactly is refused by name."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.quantized import NF4Weight

_QUANTIZED: WeakKeyDictionary[nn.Module, tuple[Tensor, NF4Weight]] = WeakKeyDictionary()


def _nf4(layer: nn.Module) -> NF4Weight:
    """The same object for as long as the layer keeps its weight, so that what is known of it is kept too."""
    known = _QUANTIZED.get(layer)
    if known is None or known[0] is not layer.weight:
        made = NF4Weight.of(layer.weight.data, layer.weight.quant_state, (layer.out_features, layer.in_features))
        _QUANTIZED[layer] = known = (layer.weight, made)
    return known[1]


def head_of(causal_lm: nn.Module) -> Head:
    """The head of a Hugging Face causal language model (already unwrapped from peft).

    Raises:
        UserError: the output layer is adapted, quantized or of an unknown kind: the sweep would be silently wrong.
    """
    layer = causal_lm.get_output_embeddings()
    kind = type(causal_lm).__name__
    if layer is None:
        raise UserError(
            f"{kind} has no output embedding layer, so it cannot be trained with GRPO; use a causal language model."
        )
    if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save"):
        raise UserError(
            "The adapter covers lm_head, which the vocabulary sweep does not support; take lm_head out of the "
            "adapter's target_modules and modules_to_save."
        )
    weight = layer.weight if isinstance(layer, nn.Linear) else None
    quantized = getattr(layer, "quantized_weight", None)  # embeddings.QuantizedHead
    if quantized is not None:
        weight = quantized
    elif getattr(weight, "quant_state", None) is not None:
        try:
            weight = _nf4(layer)
        except ValueError as error:
            raise UserError(f"lm_head of {kind} cannot be read: {error}; load it unquantized.") from error
    elif weight is None or type(layer).__module__.startswith("bitsandbytes"):
        raise UserError(
            f"lm_head of {kind} is a {type(layer).__name__}, which the vocabulary sweep does not support; "
            "load it unquantized."
        )
    config = causal_lm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scaling = getattr(config, "logits_scaling", None)
    return Head(
        weight=weight,
        bias=layer.bias,
        logit_scale=scale / float(scaling) if scaling else scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
