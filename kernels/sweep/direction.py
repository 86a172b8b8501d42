"""The gradient to the hidden states from short lists of vocabulary entries.

With c = dL/dlogp, e = dL/dKL and f = dL/dentropy of a row, p its probabilities, l its logits and d its log-ratios to
the reference (`fold.py`):

    dL/dh = scale / T * [ c (W_t - sum_v p_v W_v) + e sum_v p_v (d_v - E[d]) W_v - f sum_v p_v (l_v - E[l]) W_v ]

The entropy is log V minus the KL to the uniform distribution, whose log-ratios are the logits up to a constant, hence
the same form; l - E[l] is log p + entropy. All three sums are dominated by the few v on the row's list; the mass of the
rest is known exactly and put on the mean row of W. With `coef` p_k (and -1 for the target itself), `kl_coef`
p_k (d_k - E[d]) and `entropy_coef` -p_k (l_k - E[l]) over the list and tails 1 - sum p_k, -sum kl_coef_k and
-sum entropy_coef_k (the sums over all v are known: 1, 0 and 0), that is

    sum_k (e kl_coef_k + f entropy_coef_k - c coef_k) W[v_k] + (e kl_tail + f entropy_tail - c tail) mean(W)

so a row costs its list's length times H. Dropping a tail is wrong by at most tail * max_v |W_v - mean(W)|; of the
entropy that takes the sum of |p_v (l_v - E[l])| over what is missing, which is |entropy_tail| as long as all of it is
less probable than exp(-entropy), so that its terms have one sign.

Memory: the result (N, H); a head that is quantized or elsewhere adds one buffer of dequantized rows.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.runtime import CompileCase, compile_case, jit, tl
from torch import Tensor

_BLOCK_H, _BLOCK_ENTRIES = 128, 16


class Entries(NamedTuple):
    """Lists of N rows, one after the other.

    Attributes:
        offsets: (N + 1,) int64, where each row's entries begin.
        ids: (K,) int32 vocabulary entries.
        coef, kl_coef, entropy_coef: (K,) float32; empty where no gradient goes through the KL, or the entropy.
        tail, kl_tail, entropy_tail: (N,) float32 mass that is not on the list; empty like the coefficients.
    """

    offsets: Tensor
    ids: Tensor
    coef: Tensor
    kl_coef: Tensor
    entropy_coef: Tensor
    tail: Tensor
    kl_tail: Tensor
    entropy_tail: Tensor


class RowGrads(NamedTuple):
    """(N,) float32 each: dL/dlogp, and dL/dKL and dL/dentropy where the loss has them."""

    logps: Tensor
    kl: Tensor | None = None
    entropy: Tensor | None = None

    def cut(self, rows: slice) -> RowGrads:
        return RowGrads(*(None if grad is None else grad[rows] for grad in self))


@jit
def _direction_kernel(
    w_ptr, offsets_ptr, ids_ptr, coef_ptr, kl_coef_ptr, entropy_coef_ptr, tail_ptr, kl_tail_ptr, entropy_tail_ptr,
    grad_logps_ptr, grad_kl_ptr, grad_entropy_ptr, mean_ptr, out_ptr, width, w_stride, factor,
    DIRECT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < width
    c = tl.load(grad_logps_ptr + row)
    live = c != 0
    tail = -c * tl.load(tail_ptr + row)
    if grad_kl_ptr is not None:
        e = tl.load(grad_kl_ptr + row)
        live = live | (e != 0)
        tail += e * tl.load(kl_tail_ptr + row)
    if grad_entropy_ptr is not None:
        f = tl.load(grad_entropy_ptr + row)
        live = live | (f != 0)
        tail += f * tl.load(entropy_tail_ptr + row)
    total = tl.zeros([BLOCK_H], tl.float32)
    if live:
        first = tl.load(offsets_ptr + row)
        last = tl.load(offsets_ptr + row + 1)
        k0 = first
        while k0 < last:
            k = k0 + tl.arange(0, BLOCK_K)
            present = k < last
            weight = -c * tl.load(coef_ptr + k, mask=present, other=0.0)
            if grad_kl_ptr is not None:
                weight += e * tl.load(kl_coef_ptr + k, mask=present, other=0.0)
            if grad_entropy_ptr is not None:
                weight += f * tl.load(entropy_coef_ptr + k, mask=present, other=0.0)
            source = k.to(tl.int64) if DIRECT else tl.load(ids_ptr + k, mask=present, other=0).to(tl.int64)
            read = present[:, None] & inside[None, :]
            w = tl.load(w_ptr + source[:, None] * w_stride + column[None, :], mask=read, other=0.0)
            total += tl.sum(weight[:, None] * w.to(tl.float32), 0)
            k0 += BLOCK_K
        total += tail * tl.load(mean_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * width + column, (total * factor).to(out_ptr.dtype.element_ty), mask=inside)


def _launch(
    w: Tensor, entries: Entries, grads: RowGrads, mean: Tensor, factor: float, out: Tensor, direct: bool
) -> None:
    """Rows of `out` (n, H); `direct`: row k of `w` belongs to entry k."""
    n, width = out.shape
    if not n:
        return
    grid = (n, -(-width // _BLOCK_H))
    _direction_kernel[grid](
        w, *entries, *grads, mean, out, width, w.stride(0), factor, DIRECT=direct, BLOCK_H=_BLOCK_H,
        BLOCK_K=_BLOCK_ENTRIES, num_warps=4,
    )  # fmt: skip


def _torch(w: Tensor, entries: Entries, grads: RowGrads, mean: Tensor, factor: float, out: Tensor) -> None:
    """As `_launch` with `direct`, for w (k, H) of any dtype."""
    rows = torch.arange(len(out), device=out.device)
    owner = torch.repeat_interleave(rows, entries.offsets.diff(), output_size=len(entries.ids))
    weight = -grads.logps[owner] * entries.coef
    tail = -grads.logps * entries.tail
    if grads.kl is not None:
        weight += grads.kl[owner] * entries.kl_coef
        tail += grads.kl * entries.kl_tail
    if grads.entropy is not None:
        weight += grads.entropy[owner] * entries.entropy_coef
        tail += grads.entropy * entries.entropy_tail
    total = tail[:, None] * mean
    out.copy_(total.index_add_(0, owner, w.float() * weight[:, None]).mul_(factor))


def _cut(entries: Entries, r0: int, r1: int, k0: int, k1: int) -> Entries:
    part = lambda x, a, b: x[a:b] if x.numel() else x
    return Entries(
        entries.offsets[r0 : r1 + 1] - k0,
        entries.ids[k0:k1],
        entries.coef[k0:k1],
        part(entries.kl_coef, k0, k1),
        part(entries.entropy_coef, k0, k1),
        entries.tail[r0:r1],
        part(entries.kl_tail, r0, r1),
        part(entries.entropy_tail, r0, r1),
    )


def sparse_direction(
    head: Head,
    entries: Entries,
    grads: RowGrads,
    mean: Tensor,  # (H,) float32; zeros put no tail anywhere
    factor: float,
    dtype: torch.dtype,
    *,
    use_triton: bool,
    workspace_mib: int = 64,
    ends: list[int] | None = None,
) -> Tensor:
    """dL/dh (N, H) of `dtype` for rows with lists; rows whose list and tail are empty get 0. `ends`: the entries'
    offsets, where the host knows them; otherwise it may have to wait for them."""
    n, width = len(grads.logps), head.shape[1]
    out = torch.empty(n, width, dtype=dtype, device=grads.logps.device)
    if out.is_meta:
        return out
    if use_triton and head.dense and head.weight.device == out.device:
        _launch(head.weight.detach(), entries, grads, mean, factor, out, direct=False)
        return out
    # Entries whose rows fit the workspace, together with float32 copies of them and of their owners' results.
    budget = max(1, workspace_mib * 2**20 // (12 * width))
    ends = entries.offsets.tolist() if ends is None else ends
    r0 = 0
    while r0 < n:
        r1 = r0 + 1
        while r1 < n and ends[r1 + 1] - ends[r0] + (r1 + 1 - r0) <= budget:
            r1 += 1
        cut = _cut(entries, r0, r1, ends[r0], ends[r1])
        given = cut, grads.cut(slice(r0, r1)), mean, factor, out[r0:r1]
        if use_triton:
            _launch(head.rows(cut.ids, dtype), *given, direct=True)
        else:
            _torch(head.rows(cut.ids, torch.float32 if out.device.type == "cpu" else dtype), *given)
        r0 = r1
    return out


def compile_cases(cc: int) -> list[CompileCase]:
    """Every specialization that `sparse_direction` can launch on compute capability `cc`."""
    cases = []
    halves = ("fp16", "fp32") if cc < 80 else ("bf16", "fp16", "fp32")
    for kl, entropy, direct, dtype in product((False, True), (False, True), (False, True), halves):
        types = {
            "w_ptr": f"*{dtype}:16", "offsets_ptr": "*i64:16", "ids_ptr": "*i32:16", "coef_ptr": "*fp32:16",
            **dict.fromkeys(("kl_coef_ptr", "entropy_coef_ptr", "tail_ptr", "kl_tail_ptr"), "*fp32"),
            **dict.fromkeys(("entropy_tail_ptr", "grad_logps_ptr"), "*fp32"), "grad_kl_ptr": "*fp32" if kl else None,
            "grad_entropy_ptr": "*fp32" if entropy else None, "mean_ptr": "*fp32:16", "out_ptr": f"*{dtype}:16",
            "width": "i32", "w_stride": "i32:16", "factor": "fp32",
        }  # fmt: skip
        constants = {"DIRECT": direct, "BLOCK_H": _BLOCK_H, "BLOCK_K": _BLOCK_ENTRIES}
        name = f"direction {dtype} kl={kl} entropy={entropy} direct={direct}"
        cases.append(compile_case(name, _direction_kernel, types, constants))
    return cases
