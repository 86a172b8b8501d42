"""Meta tensors in the place of a device's: where PyTorch asks which device it is on, answer for that device.

Two things that decide about bytes depend on the device and are not seen on meta tensors: which attention kernel runs
(on meta the plain one, with L x L scores in memory) and autocast (which knows no meta device). Both happen in
functions that can be overridden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# What autocast computes in 16 bits (torch/amp/autocast_mode.py, lower_precision_fp), as far as language models use it.
_IN_16_BITS = {
    F.linear, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm, torch.baddbmm, torch.addmm,
    torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, F.conv1d, torch.conv1d,
}  # fmt: skip

_GROUPED_MM = getattr(torch, "_grouped_mm", None)  # of experts


class StandIn(TorchFunctionMode):
    """Inside this context meta tensors are treated as tensors of `device` ("cuda" or "cpu").

    Args:
        autocast: the dtype of its autocast, None without.
    """

    def __init__(self, device: str, autocast: torch.dtype | None = None):
        super().__init__()
        self.device, self.dtype = device, autocast
        self._depth = 0
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}
        self._cast_with_grad = True

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """In the place of torch.autocast; like it, keeps the casts of trained weights until the outermost one ends."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._cast.clear()

    @contextmanager
    def for_libraries(self) -> Iterator[None]:
        """In the block, `torch.autocast` of meta tensors is this one: peft asks for it by a tensor's device."""
        real = torch.autocast

        def autocast(
            device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **kwargs: Any
        ) -> AbstractContextManager:
            if device_type != "meta":
                return real(device_type, dtype, enabled, **kwargs)
            return self.autocast() if enabled else self._without()

        torch.autocast = autocast  # type: ignore[assignment, misc]
        try:
            yield
        finally:
            torch.autocast = real  # type: ignore[misc]

    @contextmanager
    def _without(self) -> Iterator[None]:
        depth, self._depth = self._depth, 0
        try:
            yield
        finally:
            self._depth = depth

    def recompute(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of torch.utils.checkpoint: what is recomputed runs outside of all function modes."""
        return nullcontext(), self._again()

    @contextmanager
    def _again(self) -> Iterator[None]:
        with self, self.autocast():
            yield

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype is not None and self._depth and func in _IN_16_BITS:
            args, kwargs = tree_map(self._in_16_bits, (args, kwargs))
        if func is _GROUPED_MM and args[0].is_meta and args[0].dtype != torch.bfloat16:
            # On meta it takes no other dtype; rows by one expert's matrix (in, out) have the same shapes and bytes.
            return args[0] @ args[1][0]
        if func is F.scaled_dot_product_attention:
            q = args[0] if args else kwargs["query"]
            if q.is_meta:
                return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _in_16_bits(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.is_meta:
            return value
        if value.dtype in (self.dtype, torch.float64):
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if torch.is_grad_enabled() != self._cast_with_grad:
            # `Learner.frozen` clears autocast's cache between passes with and without gradient; nothing tells us.
            self._cast.clear()
            self._cast_with_grad = torch.is_grad_enabled()
        known = self._cast.get(id(value))
        if known is None or known[0] is not value:
            self._cast[id(value)] = known = (value, value.to(self.dtype))
        return known[1]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The kernel that PyTorch would take: flash attention, or with a mask (or in float32) the memory-efficient one.

        Neither holds scores; both keep a log-sum-exp a row.
        """
        aten = torch.ops.aten
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
        if self.device == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if attn_mask is None and query.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
        )[0]
