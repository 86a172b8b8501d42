"""Mixtures of experts in 4 bits, which bitsandbytes leaves in 16: transformers 5 keeps the experts of a layer as 3-D
parameters, and those are most of such a model.

Each expert is a record (`expert_records.Layout`); a pass brings one expert after another into a workspace in 16 bits,
multiplies the tokens that chose it, and lets go of it. Router, activation and the weighing of outputs are transformers'
own: `_apply_gate`, `act_fn` and the biases of the module, in the order of its eager forward, so the numbers are those
of the eager forward with dequantized weights. Weights are frozen: the backward pass dequantizes them again, and keeps
of a pass what went into the activation, 2I numbers for each token and expert.

The host must know how many tokens chose which expert: one wait a layer and pass, so a decode step is no CUDA graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lowvram_grpo.policy.expert_records import DOWN, UP, Layout, write
from lowvram_grpo.policy.expert_store import ExpertStore
from lowvram_grpo.policy.own_forward import give_forward, stands_in
from lowvram_grpo.recipe.expert_offload import OFF, waiting_experts

# Tokens of an expert that go through it together: what is held at once does not depend on what routers choose.
TILE = 512


class Home(Protocol):
    """Where the records of a layer are."""

    def visit(self, used: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(expert, its record on the device) of each of these experts (ascending), one after another: a record is there
        until the next is asked for."""
        ...


class Resident(nn.Module):
    """All records of a layer, (E, bytes) uint8, on the device. Out of state dicts: a checkpoint of 4-bit weights is
    nobody's, what is saved is the adapter."""

    def __init__(self, experts: int, layout: Layout, device: torch.device, waits: bool = False):
        super().__init__()
        with _disable_current_modes() if waits else nullcontext():
            place = "cpu" if waits and device.type != "meta" else device
            records = torch.zeros(experts, layout.bytes, dtype=torch.uint8, device=place)
        self.register_buffer("records", records, persistent=False)

    def visit(self, used: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        return ((expert, self.records[expert]) for expert in used)

    def record(self, expert: int) -> Tensor:
        """Where an expert's weights are to be written."""
        return self.records[expert]


def holds_experts(module: nn.Module) -> bool:
    """Whether a module has the parameters of several experts in 3-D tensors, and the conventions that transformers'
    experts implementations go by (`use_experts_implementation`)."""
    if not hasattr(module, "is_transposed") or getattr(module, "has_post_expert_norm", False):
        return False
    return all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in (getattr(module, n, None) for n in names(module)))


def names(module: nn.Module) -> tuple[str, str]:
    """Of the parameters of the product into an expert and of that out of it."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def is_quantized(module: nn.Module) -> bool:
    return hasattr(module, "expert_layout")


def quantized_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the experts that are in 4 bits, in the order of the layers."""
    return ((name, module) for name, module in model.named_modules() if is_quantized(module))


def layout_of(module: nn.Module) -> Layout:
    up, down = (getattr(module, name) for name in names(module))
    (_, *up_shape), (_, *down_shape) = up.shape, down.shape
    if getattr(module, "has_gate", True) and module.is_concatenated and not module.is_transposed:
        matrices = [(up_shape[0] // 2, up_shape[1])] * 2
    else:
        matrices = [tuple(up_shape)]
    return Layout.of(matrices, tuple(down_shape), module.is_transposed)


def empty_experts(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    offload: str | int = OFF,
    at_home: Collection[int] = (),
) -> dict[str, tuple[nn.Module, int]]:
    """Put experts in 4 bits, without weights yet, in the place of those of `model` (its parameters may be on meta).

    Args:
        device: of the records, or of those that have a place there.
        dtype: that they compute in.
        offload: `expert_offload`.
        at_home: ids of modules whose weights are to lie in host memory with their whole layer (`weight_offload`).

    Returns:
        name of each parameter that is gone -> (module, UP or DOWN): `fill` gives it its weights.
    """
    places: dict[str, tuple[nn.Module, int]] = {}
    store: ExpertStore | None = None
    for name, module in list(model.named_modules()):
        if not holds_experts(module):
            continue
        module.expert_layout, module.compute_dtype = layout_of(module), dtype
        experts = len(getattr(module, names(module)[UP]))
        for product, leaf in enumerate(names(module)):
            places[f"{name}.{leaf}"] = (module, product)
            delattr(module, leaf)
        if waiting := waiting_experts(offload, experts):
            store = store or ExpertStore(device)
            module.home = store.add(experts, waiting, module.expert_layout)
        else:
            module.home = Resident(experts, module.expert_layout, device, waits=id(module) in at_home)
        give_forward(module, _forward)
    return places


def quantize_experts(model: nn.Module, device: torch.device, dtype: torch.dtype, offload: str | int = OFF) -> None:
    """Bring the experts of a loaded model to 4 bits, for a model that only from_pretrained could load: all of them were
    in memory in 16 bits."""
    for module in list(model.modules()):
        if holds_experts(module):
            weights = [getattr(module, leaf).detach() for leaf in names(module)]
            empty_experts(module, device, dtype, offload)
            for product in (UP, DOWN):
                for expert, weight in enumerate(weights[product]):
                    fill(module, product, expert, weight, lambda matrix: matrix.to(device, dtype))


def fill(module: nn.Module, product: int, expert: int, weight: Tensor, stage: Any) -> None:
    """Quantize one expert's weight of a product (as the model has it, or its matrices as they are stored); see
    `expert_records.write`."""
    write(module.expert_layout, module.home.record(expert), product, weight, stage)


def product_shape(module: nn.Module, product: int) -> tuple[int, int, int]:
    """(E, ...) that the parameter had."""
    return (module.num_experts, *module.expert_layout.shape(product))


@stands_in
def _forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' share of a layer.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, k) experts of each token.
        top_k_weights: (T, k).

    Returns:
        (T, H), in the dtype of `hidden_states`.
    """
    return _Experts.apply(hidden_states, top_k_weights, top_k_index, self)


class _Chosen:
    """Who goes through which expert.

    Attributes:
        token: (T k,) tokens sorted by their expert.
        place: (T k,) where in the flat (T, k) of choices each is.
        used: experts that somebody chose, ascending.
        rows: of each of them, where in `token` its tokens are.
    """

    def __init__(self, top_k_index: Tensor, experts: int):
        flat = top_k_index.reshape(-1)
        self._alike = flat.is_meta
        self.place = torch.argsort(flat, stable=True)
        self.token = self.place // top_k_index.shape[-1]
        if flat.is_meta:  # nobody knows: that of one expert which is chosen by all
            self.used, self.rows = ([0], {0: (0, len(flat))}) if len(flat) else ([], {})
            return
        counts = torch.zeros(experts, dtype=torch.long, device=flat.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat))
        edges = dict(enumerate(pairwise(accumulate(counts.tolist(), initial=0))))
        self.rows = {expert: (a, b) for expert, (a, b) in edges.items() if a < b}
        self.used = list(self.rows)

    def tiles(self, expert: int) -> Iterator[slice]:
        begin, end = self.rows[expert]
        if self._alike:  # one tile takes what the next does
            end = min(end, begin + TILE)
        return (slice(a, min(a + TILE, end)) for a in range(begin, end, TILE))


class _Experts(torch.autograd.Function):
    """All experts of a layer: gradients for hidden states and routing weights, none for their own."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weights: Tensor, index: Tensor, module: nn.Module) -> Tensor:
        layout, dtype = module.expert_layout, module.compute_dtype
        chosen = _Chosen(index, module.num_experts)
        keeps = any(ctx.needs_input_grad[:2])
        width = layout.shape(UP)[1 if layout.transposed else 0]
        # What goes into the activation, kept for the backward pass; without one, that of a tile is enough.
        length = len(chosen.token) if keeps else min(TILE, len(chosen.token))
        projected = hidden.new_empty(length, width, dtype=dtype)
        workspace = hidden.new_empty(layout.weights, dtype=dtype)
        flat, out = weights.reshape(-1), torch.zeros_like(hidden)
        for expert, record in module.home.visit(chosen.used):
            up, down = layout.dense(record, workspace)
            for rows in chosen.tiles(expert):
                here = projected[rows] if keeps else projected[: rows.stop - rows.start]
                _product(hidden[chosen.token[rows]].to(dtype), up, layout.transposed, here)
                _biased(here, module, UP, expert)
                said = _biased(_product(_activated(here, module), down, layout.transposed), module, DOWN, expert)
                # A token chooses an expert once, so no two rows go to the same place: the order of sums is fixed.
                weighed = said * flat[chosen.place[rows], None]
                out.index_add_(0, chosen.token[rows], weighed.to(out.dtype))
        if keeps:
            ctx.save_for_backward(projected, weights)
            ctx.module, ctx.chosen, ctx.kind = module, chosen, (hidden.shape, hidden.dtype)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        projected, weights = ctx.saved_tensors
        module, chosen, (shape, dtype) = ctx.module, ctx.chosen, ctx.kind
        layout, flat = module.expert_layout, weights.reshape(-1)
        workspace = projected.new_empty(layout.weights)
        of_hidden = projected.new_zeros(shape, dtype=dtype) if ctx.needs_input_grad[0] else None
        of_weights = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        for expert, record in module.home.visit(chosen.used):
            up, down = layout.dense(record, workspace)
            for rows in chosen.tiles(expert):
                token, place = chosen.token[rows], chosen.place[rows]
                of_projected, along = _through_second(projected[rows], down, module, expert, grad[token], flat[place])
                if of_weights is not None:
                    of_weights[place] = along.to(of_weights.dtype)
                if of_hidden is not None:
                    back = of_projected @ (up.t() if layout.transposed else up)
                    of_hidden.index_add_(0, token, back.to(dtype))
        return of_hidden, None if of_weights is None else of_weights.view(weights.shape), None, None


def _product(x: Tensor, weight: Tensor, transposed: bool, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, weight if transposed else weight.t(), out=out)


def _biased(x: Tensor, module: nn.Module, product: int, expert: int) -> Tensor:
    """`x`, changed in place."""
    if getattr(module, "has_bias", False):
        x += getattr(module, f"{names(module)[product]}_bias")[expert].to(x.dtype)
    return x


def _activated(projected: Tensor, module: nn.Module) -> Tensor:
    return module._apply_gate(projected) if getattr(module, "has_gate", True) else module.act_fn(projected)


def _through_second(
    projected: Tensor, down: Tensor, module: nn.Module, expert: int, grad: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what went into the activation, (rows, 2I), and of the routing weights (rows,), from that of the
    layer's output, `grad` (rows, H)."""
    grad = grad.to(projected.dtype)
    into = grad @ (down.t() if module.expert_layout.transposed else down)
    with torch.enable_grad():
        leaf = projected.detach().requires_grad_()
        activated = _activated(leaf, module)
    # <out, grad> without out: the product out of the expert is linear.
    along = (activated.detach().float() * into.float()).sum(-1)
    if getattr(module, "has_bias", False):
        along = along + grad.float() @ getattr(module, f"{names(module)[DOWN]}_bias")[expert].float()
    return torch.autograd.grad(activated, leaf, into * weights[:, None].to(into.dtype))[0], along
