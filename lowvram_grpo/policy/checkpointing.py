"""Activations that the backward pass computes again instead of keeping: those of whole layers, and MLPs in tiles.

Checkpointing a layer (Chen et al., arXiv:1604.06174) keeps its input and recomputes the rest. What the recomputation
then holds is mostly the MLP: several tensors of tokens x intermediate size. Tiled, an MLP holds them for so many
tokens at a time; the price is one more forward pass of each MLP, and 4-bit weights are dequantized once a tile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.dropout import steady_layers
from lowvram_grpo.policy.own_forward import bound
from lowvram_grpo.policy.wrapper import unwrap

_MLP_NAMES = ("mlp", "feed_forward")
# Tiles at each end that are run on meta tensors.
_COUNTED = 2


def checkpoint_activations(model: nn.Module, kwargs: dict[str, Any] | None = None) -> None:
    """Switch on activation checkpointing; with frozen embeddings the inputs must be made to require grad, or the first
    checkpointed block would cut the graph off from the adapter."""
    causal_lm = unwrap(model)
    options = {"use_reentrant": False, **(kwargs or {})}
    if hasattr(causal_lm, "activation_checkpointing_enable"):  # transformers >= 5.18 renames it
        causal_lm.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    steady_layers(causal_lm)
    if causal_lm is not model:
        causal_lm.enable_input_require_grads()


def tile_mlps(model: nn.Module, tokens: int, context_fn: Callable = noop_context_fn) -> None:
    """Run the MLP of each decoder layer over at most `tokens` tokens of the batch at a time, from the next pass on.

    Results are the same up to the rounding of matmuls of another height. May be called again with another number,
    though not between a forward pass and its backward pass. `context_fn` as in torch.utils.checkpoint.

    Raises:
        UserError: some layer has no MLP that works on single tokens; the model is left as it was.
    """
    if tokens < 1:
        raise ValueError(f"a tile has at least one token, not {tokens}")
    for mlp in list(_mlps(unwrap(model))):
        if not hasattr(mlp, "_tile_tokens"):
            mlp._untiled_forward, mlp.forward = mlp.__dict__.get("forward"), bound(_tiled_forward, mlp)
        mlp._tile_tokens, mlp._tile_contexts = tokens, context_fn


def untile_mlps(model: nn.Module) -> None:
    """Undo `tile_mlps`; nothing to undo is fine."""
    for mlp in unwrap(model).modules():
        if hasattr(mlp, "_tile_tokens"):
            del mlp.forward
            if mlp._untiled_forward is not None:
                mlp.forward = mlp._untiled_forward
            del mlp._tile_tokens, mlp._tile_contexts, mlp._untiled_forward


def _mlps(causal_lm: nn.Module) -> Iterator[nn.Module]:
    refused = f"mlp_tile is set, but {type(causal_lm).__name__} has {{}}; leave mlp_tile unset."
    layers = [m for m in causal_lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(refused.format("no decoder layers that are known as such"))
    for layer in layers:
        found = [child for name, child in layer.named_children() if name in _MLP_NAMES]
        if len(found) != 1:
            raise UserError(refused.format("a layer without an MLP named mlp or feed_forward"))
        mlp = found[0]
        if any(hasattr(mlp, name) for name in ("experts", "router")):
            raise UserError(refused.format("a mixture of experts in place of an MLP"))
        takes = inspect.signature(type(mlp).forward).parameters.values()
        if len([p for p in takes if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]) != 2:
            raise UserError(refused.format("an MLP that takes more than hidden states"))
        yield mlp


def _tiled_forward(self: nn.Module, hidden: Tensor) -> Tensor:
    """What stands in for an MLP's forward: hidden (..., H). Without a gradient it tiles too, or the reference's pass
    would be the one that needs most."""
    run = self._untiled_forward or partial(type(self).forward, self)
    rows = hidden.flatten(0, -2)
    if len(rows) <= self._tile_tokens:
        return run(hidden)
    if torch.is_grad_enabled():
        run = partial(checkpoint, run, use_reentrant=False, context_fn=self._tile_contexts)
    sizes = [min(self._tile_tokens, len(rows) - i) for i in range(0, len(rows), self._tile_tokens)]
    if hidden.is_meta and len(sizes) > 2 * _COUNTED + 1:
        # Where bytes are counted: tiles hold most at both ends, where all outputs or all gradients are there.
        sizes[_COUNTED:-_COUNTED] = [sum(sizes[_COUNTED:-_COUNTED])]
        tiles = rows[None].split(sizes, 1)
        first, middle, last = tiles[:_COUNTED], tiles[_COUNTED], tiles[_COUNTED + 1 :]
        begun = [run(tile) for tile in first]
        outs = [*begun, middle.to(begun[0].dtype, copy=True), *(run(tile) for tile in last)]
    else:
        outs = [run(tile) for tile in rows[None].split(sizes, 1)]
    return torch.cat(outs, 1).view(*hidden.shape[:-1], -1)
