"""Fold one tile of raw logits x = W h into the running statistics of its rows.

With l = softcap * tanh(scale * (x + b) / softcap) / T (no tanh without soft-capping) and the running maximum m:

    S = sum e^(l-m)      X = sum e^(l-m) (l-m)                               -> lse = m + log S, entropy = log S - X/S
    with reference logits r, d = l - r - d0, d0 any constant of the row:
    D = sum e^(l-m) d    E = sum e^(l-m) d^2                                 -> KL = D/S + d0 - lse + lse_r

each an online sum (Milakov & Gimelshein 2018, arXiv:1805.02867): a new maximum rescales what was summed before. Entries
above the running log-sum-exp + log(epsilon) are appended to the row's list: always a superset of those above the final
one, since a log-sum-exp only grows. The maximum starts near the target's own logit, so the list is nearly minimal from
the first tile on. For the dense direction the tile's probabilities e^(l-m), and e^(l-m) d, are written out instead.

Memory: 10 floats and one list a row. The Triton version reads each logit once (twice with probabilities) and runs one
program a row; the PyTorch version below is its reference and the CPU's path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, jit, tl
from torch import Tensor

# Rows of the statistics buffer. The reference's and the KL's come last: without a reference they do not exist.
M, S, X, TARGET, REF_M, REF_S, REF_TARGET, D0, D, E = range(10)
_constant = tl.constexpr if HAS_TRITON else int
_M, _S, _X, _TARGET, _REF_M, _REF_S, _REF_TARGET, _D0, _D, _E = (
    _constant(i) for i in (M, S, X, TARGET, REF_M, REF_S, REF_TARGET, D0, D, E)
)
# Where an online maximum starts without a hint: finite, so that 0 * (m - m_new) stays 0.
LOWEST = -1e30


class Transform(NamedTuple):
    """From a raw product to a logit."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """In place on float32 `x`."""
        if self.scale != 1.0:
            x *= self.scale
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            x /= self.temperature
        return x

    def slope(self, logit: Tensor) -> Tensor | None:
        """d logit / d(scale * x) * T of the transformed `logit`; None where it is 1 everywhere."""
        if self.softcap is None:
            return None
        return 1 - (logit * (self.temperature / self.softcap)).square()


@dataclass
class RowState:
    """What is known of R rows so far.

    Attributes:
        stats: (4 or 10, R) float32, see the constants above.
        targets: (R,) int64.
        count: (R,) int32, entries that belonged on the list; more than its capacity means that it overflowed.
        ids: (R, capacity) int32 vocabulary entries; capacity 0 keeps no list.
        logits, ref_logits: (R, capacity) float32 of these entries.
    """

    stats: Tensor
    targets: Tensor
    count: Tensor
    ids: Tensor
    logits: Tensor
    ref_logits: Tensor | None

    @property
    def has_ref(self) -> bool:
        return self.stats.shape[0] > 4

    @property
    def capacity(self) -> int:
        return self.ids.shape[1]

    @property
    def overflowed(self) -> Tensor:
        return self.count > self.capacity

    @classmethod
    def start(
        cls, targets: Tensor, hint: Tensor, ref_hint: Tensor | None, capacity: int, slack: float = 0.0
    ) -> RowState:
        """hint, ref_hint (R,): the targets' logits, up to a relative error of `slack`."""
        rows, device = len(targets), targets.device
        # A target that a bias forbids has a logit of -inf; the maximum must start somewhere.
        hint = hint.clamp(min=LOWEST)
        ref_hint = None if ref_hint is None else ref_hint.clamp(min=LOWEST)
        stats = torch.zeros(4 if ref_hint is None else 10, rows, device=device)
        stats[M] = hint - slack * (1 + hint.abs())
        if ref_hint is not None:
            stats[REF_M], stats[D0] = ref_hint - slack * (1 + ref_hint.abs()), hint - ref_hint
        empty = lambda dtype: torch.empty(rows, capacity, dtype=dtype, device=device)
        return cls(
            stats,
            targets,
            torch.zeros(rows, dtype=torch.int32, device=device),
            empty(torch.int32),
            empty(torch.float32),
            None if ref_hint is None else empty(torch.float32),
        )


class Probabilities(NamedTuple):
    """Where the dense direction wants e^(l-m) [and e^(l-m) d], times the soft-cap's slope: (R, C) of the matmul's
    dtype; and the factor (R,) float32 that rescales what was accumulated under the old maximum."""

    p: Tensor
    pd: Tensor | None
    decay: Tensor


def fold_torch(
    state: RowState,
    x: Tensor,  # (R, C) float32, overwritten
    ref_x: Tensor | None,  # (R, C) float32, overwritten
    bias: Tensor | None,  # (C,)
    v0: int,
    transform: Transform,
    log_epsilon: float,
    out: Probabilities | None = None,
) -> None:
    """The fold in PyTorch."""
    stats, columns = state.stats, x.shape[1]
    if bias is not None:
        x += bias.float()
        if ref_x is not None:
            ref_x += bias.float()
    logits = transform(x)
    slope = transform.slope(logits) if out is not None else None
    here = (state.targets >= v0) & (state.targets < v0 + columns)
    at = (state.targets - v0).clamp(0, columns - 1)[:, None]
    stats[TARGET] = torch.where(here, logits.gather(1, at)[:, 0], stats[TARGET])
    before = stats[M].clone()
    highest = logits.amax(1)
    m = torch.maximum(before, highest)
    decay = (before - m).exp()
    d = None
    if ref_x is not None:
        ref = transform(ref_x)
        stats[REF_TARGET] = torch.where(here, ref.gather(1, at)[:, 0], stats[REF_TARGET])
        ref_m = torch.maximum(stats[REF_M], ref.amax(1))
        stats[REF_S] = stats[REF_S] * (stats[REF_M] - ref_m).exp() + (ref - ref_m[:, None]).exp().sum(1)
        stats[REF_M] = ref_m
        d = (logits - ref).sub_(stats[D0][:, None])
    shifted = logits.sub_(m[:, None])
    p = shifted.exp()
    if bias is not None:
        # An entry of logit -inf has p = 0 and must not add 0 * inf.
        shifted.clamp_(min=LOWEST)
    stats[X] = decay * (stats[X] + stats[S] * (before - m)) + torch.linalg.vecdot(p, shifted)
    stats[S] = decay * stats[S] + p.sum(1)
    stats[M] = m
    if d is not None:
        d = torch.where(p > 0, d, 0.0)
        stats[D] = decay * stats[D] + torch.linalg.vecdot(p, d)
        stats[E] = decay * stats[E] + torch.linalg.vecdot(p, d.square())
    if state.capacity:
        _append(state, shifted, highest - m, d, v0, log_epsilon)
    if out is not None:
        out.decay.copy_(decay)
        out.p.copy_(p if slope is None else p.mul_(slope))
        if out.pd is not None:
            out.pd.copy_(d.mul_(p))


def _append(state: RowState, shifted: Tensor, highest: Tensor, d: Tensor | None, v0: int, log_epsilon: float) -> None:
    """Put the entries above the threshold on the lists, in the order of the vocabulary. highest (R,): of `shifted`."""
    stats = state.stats
    threshold = stats[S].log().clamp(min=0) + log_epsilon
    hit = ((highest > threshold) & ~state.overflowed).nonzero()[:, 0]
    if 2 * len(hit) > len(shifted):  # copying so many rows would cost more than looking at the others
        hit = torch.arange(len(shifted), device=shifted.device)
        keep = shifted > threshold[:, None]
    else:
        keep = shifted[hit] > threshold[hit, None]
    kept = keep.sum(1, dtype=torch.int32)
    start = state.count[hit]
    state.count[hit] += kept
    full = state.overflowed[hit]
    if full.any():
        keep &= ~full[:, None]
        kept = torch.where(full, 0, kept)
    at, columns = keep.nonzero().unbind(1)
    rank = torch.arange(len(at), device=at.device) - (kept.cumsum(0) - kept)[at]
    rows = hit[at]
    place = (rows, start[at] + rank)
    state.ids[place] = (columns + v0).int()
    logits = shifted[rows, columns] + stats[M][rows]
    state.logits[place] = logits
    if d is not None:
        state.ref_logits[place] = logits - d[rows, columns] - stats[D0][rows]


@jit
def transform_logit(x, scale, softcap, inv_temperature, SOFTCAP: tl.constexpr):
    x = x * scale
    if SOFTCAP:
        u = tl.exp(-2.0 * tl.abs(x) / softcap)
        t = (1.0 - u) / (1.0 + u)
        x = tl.where(x < 0, -t, t) * softcap
    return x * inv_temperature


@jit
def _load_logit(
    ptr, bias_ptr, c, inside, scale, softcap, inv_temperature, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    x = tl.load(ptr + c, mask=inside, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return transform_logit(x, scale, softcap, inv_temperature, SOFTCAP)


@jit
def _fold_kernel(
    x_ptr, ref_ptr, bias_ptr, stats_ptr, targets_ptr, count_ptr, ids_ptr, logits_ptr, ref_logits_ptr, p_ptr, pd_ptr,
    decay_ptr, v0, columns, x_stride, rows, capacity, scale, softcap, inv_temperature, log_epsilon,
    HAS_REF: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, LISTS: tl.constexpr, PROBS: tl.constexpr,
    REF_PROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stats = stats_ptr + row
    x_row = x_ptr + row * x_stride
    m = tl.load(stats + _M * rows)
    s = tl.load(stats + _S * rows)
    x_sum = tl.load(stats + _X * rows)
    target_logit = tl.load(stats + _TARGET * rows)
    target = tl.load(targets_ptr + row) - v0
    m_start = m
    if HAS_REF:
        ref_row = ref_ptr + row * x_stride
        ref_m = tl.load(stats + _REF_M * rows)
        ref_s = tl.load(stats + _REF_S * rows)
        ref_target = tl.load(stats + _REF_TARGET * rows)
        d0 = tl.load(stats + _D0 * rows)
        d_sum = tl.load(stats + _D * rows)
        e_sum = tl.load(stats + _E * rows)
    if LISTS:
        count = tl.load(count_ptr + row)
    c0 = 0
    while c0 < columns:  # Triton 3.6 interprets no range of a runtime length
        c = c0 + tl.arange(0, BLOCK)
        inside = c < columns
        logit = _load_logit(x_row, bias_ptr, c, inside, scale, softcap, inv_temperature, HAS_BIAS, SOFTCAP)
        target_logit += tl.sum(tl.where(c == target, logit, 0.0), 0)
        logit = tl.where(inside, logit, float("-inf"))
        m_new = tl.maximum(m, tl.max(logit, 0))
        decay = tl.exp(m - m_new)
        p = tl.exp(logit - m_new)
        x_sum = decay * (x_sum + s * (m - m_new)) + tl.sum(tl.where(p > 0, p * (logit - m_new), 0.0), 0)
        s = decay * s + tl.sum(p, 0)
        m = m_new
        if HAS_REF:
            ref = _load_logit(ref_row, bias_ptr, c, inside, scale, softcap, inv_temperature, HAS_BIAS, SOFTCAP)
            ref_target += tl.sum(tl.where(c == target, ref, 0.0), 0)
            ref = tl.where(inside, ref, float("-inf"))
            ref_new = tl.maximum(ref_m, tl.max(ref, 0))
            ref_s = tl.exp(ref_m - ref_new) * ref_s + tl.sum(tl.exp(ref - ref_new), 0)
            ref_m = ref_new
            d = tl.where(p > 0, logit - ref - d0, 0.0)
            d_sum = decay * d_sum + tl.sum(p * d, 0)
            e_sum = decay * e_sum + tl.sum(p * d * d, 0)
        if LISTS:
            keep = (logit - m) > (tl.maximum(tl.log(s), 0.0) + log_epsilon)
            place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
            fits = keep & (place < capacity)
            tl.store(ids_ptr + row * capacity + place, (v0 + c).to(tl.int32), mask=fits)
            tl.store(logits_ptr + row * capacity + place, logit, mask=fits)
            if HAS_REF:
                tl.store(ref_logits_ptr + row * capacity + place, ref, mask=fits)
            count += tl.sum(keep.to(tl.int32), 0)
        c0 += BLOCK
    tl.store(stats + _M * rows, m)
    tl.store(stats + _S * rows, s)
    tl.store(stats + _X * rows, x_sum)
    tl.store(stats + _TARGET * rows, target_logit)
    if HAS_REF:
        tl.store(stats + _REF_M * rows, ref_m)
        tl.store(stats + _REF_S * rows, ref_s)
        tl.store(stats + _REF_TARGET * rows, ref_target)
        tl.store(stats + _D * rows, d_sum)
        tl.store(stats + _E * rows, e_sum)
    if LISTS:
        tl.store(count_ptr + row, count)
    if PROBS:
        tl.store(decay_ptr + row, tl.exp(m_start - m))
        c0 = 0
        while c0 < columns:
            c = c0 + tl.arange(0, BLOCK)
            inside = c < columns
            logit = _load_logit(x_row, bias_ptr, c, inside, scale, softcap, inv_temperature, HAS_BIAS, SOFTCAP)
            p = tl.exp(logit - m)
            weight = p
            if SOFTCAP:
                u = logit / (inv_temperature * softcap)
                weight = p * (1.0 - u * u)
            tl.store(p_ptr + row * x_stride + c, weight.to(p_ptr.dtype.element_ty), mask=inside)
            if REF_PROBS:
                ref = _load_logit(ref_row, bias_ptr, c, inside, scale, softcap, inv_temperature, HAS_BIAS, SOFTCAP)
                d = tl.where(p > 0, logit - ref - d0, 0.0)
                tl.store(pd_ptr + row * x_stride + c, (weight * d).to(pd_ptr.dtype.element_ty), mask=inside)
            c0 += BLOCK


def fold_triton(
    state: RowState,
    x: Tensor,  # (R, C) float32, rows contiguous
    ref_x: Tensor | None,
    bias: Tensor | None,
    v0: int,
    transform: Transform,
    log_epsilon: float,
    out: Probabilities | None = None,
    *,
    block: int = 512,
    warps: int = 4,
) -> None:
    """The fold in one launch; same outcome as `fold_torch`, `x` is left as it is."""
    rows, columns = x.shape
    if x.is_meta or not rows:
        return
    _fold_kernel[(rows,)](
        x, ref_x, bias, state.stats, state.targets, state.count, state.ids, state.logits, state.ref_logits,
        out and out.p, out and out.pd, out and out.decay, v0, columns, x.stride(0), rows, state.capacity,
        transform.scale, transform.softcap or 0.0, 1.0 / transform.temperature, log_epsilon,
        HAS_REF=ref_x is not None, HAS_BIAS=bias is not None, SOFTCAP=transform.softcap is not None,
        LISTS=state.capacity > 0, PROBS=out is not None, REF_PROBS=out is not None and out.pd is not None,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip


def compile_cases(cc: int) -> list[CompileCase]:
    """Every specialization that `fold_triton` can launch on compute capability `cc`."""
    halves = ("fp16",) if cc < 80 else ("bf16", "fp16")
    kinds = [(False, False, halves[0]), (True, True, halves[0])]  # soft cap, bias, dtype of the product
    cases = []
    for ref in (False, True):
        for lists, probs in ((True, False), (False, True), (False, False)):
            others = [(False, False, kind) for kind in (*halves[1:], "fp32")] if ref and probs else []
            for softcap, bias, half in kinds + others:
                types = {
                    "x_ptr": "*fp32:16", "stats_ptr": "*fp32:16", "targets_ptr": "*i64:16", "count_ptr": "*i32:16",
                    "ids_ptr": "*i32:16", "logits_ptr": "*fp32:16", "ref_ptr": "*fp32:16" if ref else None,
                    "bias_ptr": f"*{half}" if bias else None, "ref_logits_ptr": "*fp32:16" if ref else None,
                    "p_ptr": f"*{half}:16" if probs else None, "pd_ptr": f"*{half}:16" if probs and ref else None,
                    "decay_ptr": "*fp32:16" if probs else None,
                    **dict.fromkeys(("v0", "columns", "x_stride", "rows", "capacity"), "i32"),
                    **dict.fromkeys(("scale", "softcap", "inv_temperature", "log_epsilon"), "fp32"),
                }  # fmt: skip
                constants = {
                    "HAS_REF": ref, "HAS_BIAS": bias, "SOFTCAP": softcap, "LISTS": lists, "PROBS": probs,
                    "REF_PROBS": probs and ref, "BLOCK": 512,
                }  # fmt: skip
                name = f"fold {half} ref={ref} lists={lists} probs={probs} softcap={softcap}"
                cases.append(compile_case(name, _fold_kernel, types, constants, num_warps=4, num_stages=2))
    return cases
