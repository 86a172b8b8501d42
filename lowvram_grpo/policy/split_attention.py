"""Long completions attend to their prompt and to themselves in two parts, which are merged by their log-sum-exps.

In one part, a prompt's keys would be copied for each of its completions, and a completion's causality behind a prompt
of P tokens would be a bias of T x (P + T) numbers: 96 MiB for 4,096 tokens behind 8,192. In two parts neither is
needed, as kernels know a plain and a causal attention by themselves: all completions' queries meet the prompt's keys at
once, and each completion attends causally to its own. With S scores, l_i the log-sum-exp of a part and o_i its output,

    l = log(exp l_1 + exp l_2),    o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2

is the attention to both. The way back is exact too (as in Ring Attention, arXiv:2310.01889): with the merged o and l in
the place of its own, a kernel's backward makes the probabilities exp(S - l) and the row sums of o x do of the whole.

Memory of a layer: keys and values of P + G T tokens with the heads of Q, where copies take P + G (P + T).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_grpo.errors import is_out_of_memory
from lowvram_grpo.policy.attend import repeat_kv
from lowvram_grpo.policy.attention import AttentionParams

# Copied tokens of prompts, or numbers of a bias, from which on two launches more are worth it.
_COPIES, _BIAS = 2**15, 2**22
_aten = torch.ops.aten


class Padding(NamedTuple):
    """How G completions lie in (G, longest) rows: `pad` (G * longest,) and `unpad` (tokens,), int64, of `_Group`."""

    count: int
    longest: int
    pad: Tensor
    unpad: Tensor


def worth_while(prompt: int, count: int, longest: int) -> bool:
    """Whether a group of so many tokens is long enough."""
    return longest > 0 and (count * prompt >= _COPIES or longest * (prompt + longest) >= _BIAS)


def takes(query: Tensor, value: Tensor, params: AttentionParams, reach: int) -> bool:
    """Whether queries (1, heads, L, d) over `reach` tokens may attend in parts: no dropout, no window within reach,
    nothing else that kernels do not know, and on a GPU one that a trial has found to agree with PyTorch's own."""
    windowed = params.window is not None and params.window < reach
    if windowed or params.dropout or params.softcap is not None or params.sinks is not None:
        return False
    if value.shape[3] != query.shape[3]:
        return False
    if query.device.type != "cuda":
        return True
    if query.shape[3] % 8 or query.shape[3] > 256:
        return False
    return _agrees(query.device, query.dtype, query.shape[3])


def attend_in_parts(
    query: Tensor, prompt: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], padding: Padding, scale: float
) -> Tensor:
    """(N, heads, d) of the N tokens of a prompt's completions.

    Args:
        query: (1, heads, N, d).
        prompt: its keys and values, (1, KV heads, P, d).
        own: those of the completions, (1, KV heads, N, d).
    """
    return _InParts.apply(query, *prompt, *own, padding, scale)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, pk: Tensor, pv: Tensor, ok: Tensor, ov: Tensor, padding: Padding, scale: float
    ) -> Tensor:
        heads = query.shape[1]
        out, lse, _ = _forward(query, repeat_kv(pk, heads), repeat_kv(pv, heads), False, scale)
        padded = (_padded(x, padding) for x in (query, repeat_kv(ok, heads), repeat_kv(ov, heads)))
        own, own_lse, _ = _forward(*padded, True, scale)
        out, own = out[0].transpose(0, 1), _tokens(own, padding)
        lse, own_lse = lse[0].transpose(0, 1), _tokens(own_lse[..., None], padding)[..., 0]
        whole = torch.logaddexp(lse, own_lse)
        wide = whole.dtype  # float32, or float64 where all is
        merged = torch.lerp(own.to(wide), out.to(wide), (lse - whole).exp()[..., None]).to(out.dtype)
        ctx.save_for_backward(query, pk, pv, ok, ov, merged, whole)
        ctx.padding, ctx.scale = padding, scale
        return merged

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        query, pk, pv, ok, ov, out, lse = ctx.saved_tensors
        padding, scale, heads = ctx.padding, ctx.scale, query.shape[1]
        rows = lambda x: x.transpose(0, 1)[None]
        grad = grad.to(out.dtype)
        dq, dpk, dpv = _backward(
            rows(grad), query, repeat_kv(pk, heads), repeat_kv(pv, heads), rows(out), lse.t()[None], False, scale
        )
        dpk, dpv = (_shared(x, pk.shape[1]) for x in (dpk, dpv))
        # What pads repeats a token that counts, and has no gradient.
        behind = grad.new_zeros(padding.count * padding.longest, *grad.shape[1:]).index_copy_(0, padding.unpad, grad)
        own = _backward(
            behind.unflatten(0, (padding.count, padding.longest)).transpose(1, 2),
            *(_padded(x, padding) for x in (query, repeat_kv(ok, heads), repeat_kv(ov, heads), rows(out))),
            _padded(rows(lse[..., None]), padding)[..., 0], True, scale,
        )  # fmt: skip
        more, dok, dov = (rows(_tokens(x, padding)) for x in own)
        dok, dov = (_shared(x, ok.shape[1]) for x in (dok, dov))
        return dq + more, dpk, dpv, dok, dov, None, None


def _padded(x: Tensor, padding: Padding) -> Tensor:
    """(G, heads, longest, d) of (1, heads, N, d)."""
    rows = x[0].transpose(0, 1).index_select(0, padding.pad)
    return rows.unflatten(0, (padding.count, padding.longest)).transpose(1, 2)


def _tokens(x: Tensor, padding: Padding) -> Tensor:
    """(N, heads, d) of (G, heads, longest, d)."""
    return x.transpose(1, 2).flatten(0, 1).index_select(0, padding.unpad)


def _shared(x: Tensor, heads: int) -> Tensor:
    """Gradients (1, query heads, L, d) of copies, brought together in so many heads."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2, dtype=x.dtype)


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Any]:
    """Output (B, heads, L, d), log-sum-exps (B, heads, L), and what the kernel adds for its way back."""
    kind = _kind(q)
    if kind == "cpu":
        return *_aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale), None
    if kind == "flash":
        out, lse, *more = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out, lse, more
    out, lse, *more = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]], more


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kind = _kind(q)
    if kind == "cpu":
        back = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        return back(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that there is none of
    if kind == "flash":
        lengths = q.shape[2], k.shape[2]
        back = _aten._scaled_dot_product_flash_attention_backward
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return back(
            grad, q, k, v, out.contiguous(), lse.contiguous(), None, None, *lengths, 0.0, causal, state, seed,
            scale=scale,
        )  # fmt: skip
    # The kernel wants rows of whole 32, and reads those that count.
    lse = F.pad(lse, (0, -lse.shape[2] % 32))
    back = _aten._scaled_dot_product_efficient_attention_backward
    wanted = [True, True, True, False]
    return back(grad, q, k, v, None, out, lse, seed, seed, 0.0, wanted, causal, scale=scale)[:3]


def _kind(q: Tensor) -> str:
    """Which kernel: on meta it is counted as the memory-efficient one, which makes the same tensors."""
    if q.device.type == "cpu":
        return "cpu"
    if q.is_meta or q.dtype not in (torch.float16, torch.bfloat16):
        return "efficient"
    return "flash" if torch.cuda.get_device_capability(q.device) >= (8, 0) else "efficient"


@lru_cache(maxsize=64)
def _agrees(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels' parts, merged, are what PyTorch's attention with a mask says, forward and backward."""
    try:
        with torch.enable_grad(), torch.random.fork_rng([device]), torch.autocast("cuda", enabled=False):
            return _trial(device, dtype, width)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False


def _trial(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    prompt, count, longest, heads = 40, 2, 33, 2
    draw = lambda n: torch.randn(1, heads, n, width, device=device).to(dtype).requires_grad_()
    query, pk, pv, ok, ov = inputs = [draw(n) for n in (count * longest, prompt, prompt, *[count * longest] * 2)]
    every = torch.arange(count * longest, device=device)
    found = attend_in_parts(query, (pk, pv), (ok, ov), Padding(count, longest, every, every), width**-0.5)
    weight = torch.randn_like(found)
    found_grads = torch.autograd.grad(found, inputs, weight)
    mask = torch.ones(longest, prompt + longest, dtype=torch.bool, device=device).tril_(prompt)
    rows = lambda x: x[0].unflatten(1, (count, longest)).transpose(0, 1)
    whole = lambda shared, own: torch.cat([shared.expand(count, -1, -1, -1), rows(own)], 2)
    out = F.scaled_dot_product_attention(rows(query), whole(pk, ok), whole(pv, ov), attn_mask=mask)
    expected = out.transpose(1, 2).flatten(0, 1)
    expected_grads = torch.autograd.grad(expected, inputs, weight)
    pairs = zip((found, *found_grads), (expected, *expected_grads))
    bound = 2e-3 if dtype == torch.float32 else 2e-2 if dtype == torch.float16 else 8e-2
    return all(bool((a - b).abs().max() <= bound * b.abs().max()) for a, b in pairs)
