"""The fold in one Triton launch, a program a row. Each logit is read once, twice with probabilities.

A block of columns is as wide as registers allow: what a program waits for are the reductions over each of its blocks,
not the logits. On an H200, 2,048 rows of 2,688 logits took 39 us in blocks of 512 with a prefix sum in each, where
reading them takes 6."""

from __future__ import annotations

from lowvram_grpo.kernels.runtime import CompileCase, compile_case, jit, tl
from lowvram_grpo.kernels.sweep.state import (
    _D,
    _D0,
    _E,
    _M,
    _REF_M,
    _REF_S,
    _REF_TARGET,
    _S,
    _TARGET,
    _X,
    Probabilities,
    RowState,
)
from lowvram_grpo.kernels.transform import Transform, transform_logit
from torch import Tensor

# Columns of a block and the warps that share it: 8 a thread, 4 where there is a second logit; more would spill.
_TILES = {False: (4096, 16), True: (1024, 8)}


@jit
def _load_logit(ptr, bias_ptr, c, inside, scale, softcap, inv_temperature):
    x = tl.load(ptr + c, mask=inside, other=0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return transform_logit(x, scale, softcap, inv_temperature)


@jit
def _fold_kernel(
    x_ptr, ref_ptr, bias_ptr, stats_ptr, targets_ptr, count_ptr, ids_ptr, logits_ptr, ref_logits_ptr, p_ptr, pd_ptr,
    decay_ptr, pl_ptr, l0_ptr, v0, columns, x_stride, rows, capacity, scale, softcap, inv_temperature, log_epsilon,
    LISTS: tl.constexpr, BLOCK: tl.constexpr,
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
    if ref_ptr is not None:
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
        logit = _load_logit(x_row, bias_ptr, c, inside, scale, softcap, inv_temperature)
        target_logit += tl.sum(tl.where(c == target, logit, 0.0), 0)
        logit = tl.where(inside, logit, float("-inf"))
        m_new = tl.maximum(m, tl.max(logit, 0))
        decay = tl.exp(m - m_new)
        p = tl.exp(logit - m_new)
        x_sum = decay * (x_sum + s * (m - m_new)) + tl.sum(tl.where(p > 0, p * (logit - m_new), 0.0), 0)
        s = decay * s + tl.sum(p, 0)
        m = m_new
        if ref_ptr is not None:
            ref = _load_logit(ref_row, bias_ptr, c, inside, scale, softcap, inv_temperature)
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
            kept = tl.sum(keep.to(tl.int32), 0)
            if kept > 0:  # most blocks of a trained model's rows hold none, and a prefix sum is dear
                place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
                fits = keep & (place < capacity)
                tl.store(ids_ptr + row * capacity + place, (v0 + c).to(tl.int32), mask=fits)
                tl.store(logits_ptr + row * capacity + place, logit, mask=fits)
                if ref_ptr is not None:
                    tl.store(ref_logits_ptr + row * capacity + place, ref, mask=fits)
                count += kept
        c0 += BLOCK
    tl.store(stats + _M * rows, m)
    tl.store(stats + _S * rows, s)
    tl.store(stats + _X * rows, x_sum)
    tl.store(stats + _TARGET * rows, target_logit)
    if ref_ptr is not None:
        tl.store(stats + _REF_M * rows, ref_m)
        tl.store(stats + _REF_S * rows, ref_s)
        tl.store(stats + _REF_TARGET * rows, ref_target)
        tl.store(stats + _D * rows, d_sum)
        tl.store(stats + _E * rows, e_sum)
    if LISTS:
        tl.store(count_ptr + row, count)
    if p_ptr is not None:
        tl.store(decay_ptr + row, tl.exp(m_start - m))
        if pl_ptr is not None:
            l0 = tl.load(l0_ptr + row)
        c0 = 0
        while c0 < columns:
            c = c0 + tl.arange(0, BLOCK)
            inside = c < columns
            logit = _load_logit(x_row, bias_ptr, c, inside, scale, softcap, inv_temperature)
            p = tl.exp(logit - m)
            weight = p
            if softcap is not None:
                u = logit / (inv_temperature * softcap)
                weight = p * (1.0 - u * u)
            tl.store(p_ptr + row * x_stride + c, weight.to(p_ptr.dtype.element_ty), mask=inside)
            if pd_ptr is not None:
                ref = _load_logit(ref_row, bias_ptr, c, inside, scale, softcap, inv_temperature)
                d = tl.where(p > 0, logit - ref - d0, 0.0)
                tl.store(pd_ptr + row * x_stride + c, (weight * d).to(pd_ptr.dtype.element_ty), mask=inside)
            if pl_ptr is not None:
                pl = tl.where(p > 0, weight * (logit - l0), 0.0)
                tl.store(pl_ptr + row * x_stride + c, pl.to(pl_ptr.dtype.element_ty), mask=inside)
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
    block: int | None = None,
) -> None:
    """The fold in one launch; same outcome as `fold_torch`, `x` is left as it is. `block`: columns at a time."""
    rows, columns = x.shape
    if x.is_meta or not rows:
        return
    most, warps = _TILES[ref_x is not None]
    _fold_kernel[(rows,)](
        x, ref_x, bias, state.stats, state.targets, state.count, state.ids, state.logits, state.ref_logits,
        out and out.p, out and out.pd, out and out.decay, out and out.pl, out and out.l0, v0, columns, x.stride(0),
        rows, state.capacity, transform.scale, transform.softcap, 1.0 / transform.temperature, log_epsilon,
        LISTS=state.capacity > 0, BLOCK=block or most, num_warps=warps,
    )  # fmt: skip


def compile_cases(cc: int) -> list[CompileCase]:
    """Every specialization that `fold_triton` can launch on compute capability `cc`."""
    halves = ("fp16",) if cc < 80 else ("bf16", "fp16")
    kinds = [(False, False, halves[0]), (True, True, halves[0])]  # soft cap, bias, dtype of the product
    cases = []
    for ref, (block, warps) in _TILES.items():
        for lists, probs, entropy in (
            (True, False, False), (False, True, False), (False, True, True), (False, False, False),
        ):  # fmt: skip
            others = [(False, False, kind) for kind in (*halves[1:], "fp32")] if ref and probs else []
            for softcap, bias, half in kinds + others:
                types = {
                    "x_ptr": "*fp32:16", "stats_ptr": "*fp32:16", "targets_ptr": "*i64:16", "count_ptr": "*i32:16",
                    "ids_ptr": "*i32:16", "logits_ptr": "*fp32:16", "ref_ptr": "*fp32:16" if ref else None,
                    "bias_ptr": f"*{half}" if bias else None, "ref_logits_ptr": "*fp32:16" if ref else None,
                    "p_ptr": f"*{half}:16" if probs else None, "pd_ptr": f"*{half}:16" if probs and ref else None,
                    "decay_ptr": "*fp32:16" if probs else None, "pl_ptr": f"*{half}:16" if entropy else None,
                    "l0_ptr": "*fp32:16" if entropy else None,
                    **dict.fromkeys(("v0", "columns", "x_stride", "rows", "capacity"), "i32"),
                    **dict.fromkeys(("scale", "inv_temperature", "log_epsilon"), "fp32"),
                    "softcap": "fp32" if softcap else None,
                }  # fmt: skip
                constants = {"LISTS": lists, "BLOCK": block}
                name = f"fold {half} ref={ref} lists={lists} probs={probs} entropy={entropy} softcap={softcap}"
                cases.append(compile_case(name, _fold_kernel, types, constants, num_warps=warps, num_stages=2))
    return cases
