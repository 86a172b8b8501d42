"""The language-model head, as a stream of vocabulary tiles.

A `Head` knows everything between the last hidden state and the logits: `softcap * tanh(scale * (W h + b) / softcap)`.
What it cannot represent exactly is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lowvram_grpo.errors import UserError


@dataclass(frozen=True)
class Head:
    """Output projection of a causal language model.

    Attributes:
        weight: (V, H), any float dtype. Kept as it is; tiles are cast one at a time.
        bias: (V,) or None.
        logit_scale: factor on the logits before soft-capping (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: c in `c * tanh(logit / c)` (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def trainable(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def tiles(self, rows: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield (first row, W_tile (<= rows, H), bias_tile or None) over the vocabulary, as views."""
        for v0 in range(0, self.weight.shape[0], rows):
            yield v0, self.weight[v0 : v0 + rows], None if self.bias is None else self.bias[v0 : v0 + rows]


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
    if not isinstance(layer, nn.Linear) or type(layer).__module__.startswith("bitsandbytes"):
        raise UserError(
            f"lm_head of {kind} is a {type(layer).__name__}, which the vocabulary sweep does not support; "
            "load it unquantized."
        )
    config = causal_lm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scaling = getattr(config, "logits_scaling", None)
    return Head(
        weight=layer.weight,
        bias=layer.bias,
        logit_scale=scale / float(scaling) if scaling else scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
