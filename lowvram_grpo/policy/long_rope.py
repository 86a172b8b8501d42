"""Rotary frequencies that depend on how long a sequence is (`longrope` of Phi-3 and Phi-4-mini, `dynamic`), settled.

transformers looks at the largest position of each pass, and beyond the context that the model was first trained with,
all tokens of the pass get other frequencies. Then cached keys no longer fit the queries, a row depends on the longest
one beside it, and a token is not scored as it was sampled. So whoever knows how long sequences may get decides once:
the frequencies are those of the longest, as vLLM has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_KINDS = ("longrope", "dynamic")
_SETTLED = "settled"  # what transformers' own update does not know, so leaves alone


def settle_rotary(causal_lm: nn.Module, longest: int) -> int | None:
    """Fix the frequencies for sequences of up to `longest` tokens. What is settled already stays so.

    Returns:
        the context beyond which they are others, where `longest` is beyond it; None where nothing is out of the
        ordinary.
    """
    beyond = None
    for module, layer_type, kind in list(_unsettled(causal_lm)):
        prefix = "" if layer_type is None else f"{layer_type}_"
        parameters = module.config.rope_parameters
        parameters = parameters if layer_type is None else parameters[layer_type]
        context = parameters.get("original_max_position_embeddings") or module.config.max_position_embeddings
        kept = getattr(module, f"{prefix}inv_freq")
        found = getattr(module, f"{prefix}original_inv_freq")
        if longest > context:
            beyond = context
            given = {} if layer_type is None else {"layer_type": layer_type}
            found, _ = ROPE_INIT_FUNCTIONS[kind](module.config, kept.device, seq_len=longest, **given)
        module.register_buffer(f"{prefix}inv_freq", found.to(kept.device), persistent=False)
        settled = _SETTLED if layer_type is None else {**module.rope_type, layer_type: _SETTLED}
        module.rope_type = settled
    return beyond


@contextmanager
def settled_rotary(causal_lm: nn.Module, longest: int) -> Iterator[None]:
    """`settle_rotary` for a block."""
    touched = [(m, m.rope_type, {n: b for n, b in m._buffers.items()}) for m in {m for m, *_ in _unsettled(causal_lm)}]
    try:
        settle_rotary(causal_lm, longest)
        yield
    finally:
        for module, kind, buffers in touched:
            module.rope_type = kind
            module._buffers.update(buffers)


def _unsettled(causal_lm: nn.Module) -> Iterator[tuple[nn.Module, str | None, str]]:
    """(module, layer type where it has frequencies for several, kind)."""
    for module in causal_lm.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind in _KINDS:
                yield module, layer_type, kind
