"""The matmul and the fold in one kernel: logits live in registers only.

A program owns BLOCK_M rows and one of `splits` ranges of the vocabulary; it walks through its range BLOCK_N columns
at a time, multiplies, and folds the tile as `fold.py` says. A second launch merges the partial statistics of the splits
(each an online sum under its own maximum) into the rows' state, in a fixed order. List entries take their places with
an atomic counter, so their order is not fixed; whoever reads the lists sorts them.

Memory: nothing but the partial statistics, splits * 4 (9 with a reference) floats a row. FLOP: 2NVH, 4NVH with the
reference rows. No probabilities are written: the dense direction needs the tile in memory (see `fold.py`).
"""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.runtime import CompileCase, compile_case, interpreted, jit, tl
from lowvram_grpo.kernels.sweep.launch import FusedConfig, fused_config, whole_waves
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
    RowState,
)
from lowvram_grpo.kernels.transform import Transform, transform_logit
from torch import Tensor


@jit
def _fused_fold_kernel(
    h_ptr, ref_h_ptr, w_ptr, bias_ptr, stats_ptr, targets_ptr, count_ptr, ids_ptr, logits_ptr, ref_logits_ptr,
    partial_ptr, v0, columns, rows, w_stride, split_columns, capacity, scale, softcap, inv_temperature,
    log_epsilon,
    LISTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # Row blocks vary fastest, so that programs that run together read the same weights out of L2.
    row_blocks = tl.cdiv(rows, BLOCK_M)
    split = tl.program_id(0) // row_blocks
    row = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    alive = row < rows
    k0 = tl.arange(0, BLOCK_K)
    h_rows = h_ptr + row.to(tl.int64)[:, None] * WIDTH
    target = tl.load(targets_ptr + row, mask=alive, other=-1) - v0
    m_known = tl.load(stats_ptr + _M * rows + row, mask=alive, other=0.0)
    s_known = tl.load(stats_ptr + _S * rows + row, mask=alive, other=1.0)
    # The threshold may use all that is known of the row; the partial sums start from nothing.
    lse_known = m_known + tl.maximum(tl.log(s_known), 0.0)
    m = m_known
    s = tl.zeros([BLOCK_M], tl.float32)
    x_sum = tl.zeros([BLOCK_M], tl.float32)
    target_logit = tl.zeros([BLOCK_M], tl.float32)
    if ref_h_ptr is not None:
        ref_rows = ref_h_ptr + row.to(tl.int64)[:, None] * WIDTH
        ref_m = tl.load(stats_ptr + _REF_M * rows + row, mask=alive, other=0.0)
        d0 = tl.load(stats_ptr + _D0 * rows + row, mask=alive, other=0.0)
        ref_s = tl.zeros([BLOCK_M], tl.float32)
        ref_target = tl.zeros([BLOCK_M], tl.float32)
        d_sum = tl.zeros([BLOCK_M], tl.float32)
        e_sum = tl.zeros([BLOCK_M], tl.float32)
    first = split * split_columns
    last = tl.minimum(first + split_columns, columns)
    c0 = first
    while c0 < last:  # Triton 3.6 interprets no range of a runtime length
        c = c0 + tl.arange(0, BLOCK_N)
        inside = c < last
        w_columns = w_ptr + c.to(tl.int64)[None, :] * w_stride
        x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if ref_h_ptr is not None:
            r = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            present = k + k0 < WIDTH
            w = tl.load(w_columns + (k + k0)[:, None], mask=present[:, None] & inside[None, :], other=0.0)
            h = tl.load(h_rows + (k + k0)[None, :], mask=alive[:, None] & present[None, :], other=0.0)
            if UPCAST:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            x = tl.dot(h, w, x, input_precision="ieee")
            if ref_h_ptr is not None:
                rh = tl.load(ref_rows + (k + k0)[None, :], mask=alive[:, None] & present[None, :], other=0.0)
                if UPCAST:
                    rh = rh.to(tl.float32)
                r = tl.dot(rh, w, r, input_precision="ieee")
        if bias_ptr is not None:
            b = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
            x += b[None, :]
        is_target = c[None, :] == target[:, None]
        logit = transform_logit(x, scale, softcap, inv_temperature)
        target_logit += tl.sum(tl.where(is_target & inside[None, :], logit, 0.0), 1)
        logit = tl.where(inside[None, :], logit, float("-inf"))
        m_new = tl.maximum(m, tl.max(logit, 1))
        decay = tl.exp(m - m_new)
        shifted = logit - m_new[:, None]
        p = tl.exp(shifted)
        x_sum = decay * (x_sum + s * (m - m_new)) + tl.sum(tl.where(p > 0, p * shifted, 0.0), 1)
        s = decay * s + tl.sum(p, 1)
        m = m_new
        if ref_h_ptr is not None:
            if bias_ptr is not None:
                r += b[None, :]
            ref = transform_logit(r, scale, softcap, inv_temperature)
            ref_target += tl.sum(tl.where(is_target & inside[None, :], ref, 0.0), 1)
            ref = tl.where(inside[None, :], ref, float("-inf"))
            ref_new = tl.maximum(ref_m, tl.max(ref, 1))
            ref_s = tl.exp(ref_m - ref_new) * ref_s + tl.sum(tl.exp(ref - ref_new[:, None]), 1)
            ref_m = ref_new
            d = tl.where(p > 0, logit - ref - d0[:, None], 0.0)
            d_sum = decay * d_sum + tl.sum(p * d, 1)
            e_sum = decay * e_sum + tl.sum(p * d * d, 1)
        if LISTS:
            lse = tl.maximum(lse_known, m + tl.maximum(tl.log(s), 0.0))
            # A tile has an entry or two a row, if any: taking the largest until none is left needs no prefix sum, whose
            # registers would spill. Rows that are full do not hold up the others.
            full = tl.load(count_ptr + row, mask=alive, other=capacity + 1) > capacity
            left = tl.where((logit > (lse + log_epsilon)[:, None]) & ~full[:, None], logit, float("-inf"))
            while tl.max(left) > float("-inf"):
                best, at = tl.max(left, 1, return_indices=True)
                hit = best > float("-inf")
                place = tl.atomic_add(count_ptr + row, 1, mask=hit, sem="relaxed")
                fits = hit & (place < capacity)
                tl.store(ids_ptr + row * capacity + place, v0 + c0 + at, mask=fits)
                tl.store(logits_ptr + row * capacity + place, best, mask=fits)
                taken = (c0 + at)[:, None] == c[None, :]
                if ref_h_ptr is not None:
                    ref_best = tl.sum(tl.where(taken, ref, 0.0), 1)
                    tl.store(ref_logits_ptr + row * capacity + place, ref_best, mask=fits)
                left = tl.where(taken, float("-inf"), left)
        c0 += BLOCK_N
    partial = partial_ptr + split * (4 if ref_h_ptr is None else 9) * rows + row
    tl.store(partial, m, mask=alive)
    tl.store(partial + rows, s, mask=alive)
    tl.store(partial + 2 * rows, x_sum, mask=alive)
    tl.store(partial + 3 * rows, target_logit, mask=alive)
    if ref_h_ptr is not None:
        tl.store(partial + 4 * rows, ref_m, mask=alive)
        tl.store(partial + 5 * rows, ref_s, mask=alive)
        tl.store(partial + 6 * rows, ref_target, mask=alive)
        tl.store(partial + 7 * rows, d_sum, mask=alive)
        tl.store(partial + 8 * rows, e_sum, mask=alive)


@jit
def _merge_kernel(partial_ptr, stats_ptr, rows, splits, HAS_REF: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = row < rows
    stats = stats_ptr + row
    m = tl.load(stats + _M * rows, mask=alive, other=0.0)
    s = tl.load(stats + _S * rows, mask=alive, other=1.0)
    x_sum = tl.load(stats + _X * rows, mask=alive, other=0.0)
    target_logit = tl.load(stats + _TARGET * rows, mask=alive, other=0.0)
    if HAS_REF:
        ref_m = tl.load(stats + _REF_M * rows, mask=alive, other=0.0)
        ref_s = tl.load(stats + _REF_S * rows, mask=alive, other=1.0)
        ref_target = tl.load(stats + _REF_TARGET * rows, mask=alive, other=0.0)
        d_sum = tl.load(stats + _D * rows, mask=alive, other=0.0)
        e_sum = tl.load(stats + _E * rows, mask=alive, other=0.0)
    split = 0
    while split < splits:
        part = partial_ptr + split * (9 if HAS_REF else 4) * rows + row
        m_part = tl.load(part, mask=alive, other=0.0)
        s_part = tl.load(part + rows, mask=alive, other=1.0)
        m_new = tl.maximum(m, m_part)
        old = tl.exp(m - m_new)
        new = tl.exp(m_part - m_new)
        x_part = tl.load(part + 2 * rows, mask=alive, other=0.0)
        x_sum = old * (x_sum + s * (m - m_new)) + new * (x_part + s_part * (m_part - m_new))
        s = old * s + new * s_part
        m = m_new
        target_logit += tl.load(part + 3 * rows, mask=alive, other=0.0)
        if HAS_REF:
            ref_part = tl.load(part + 4 * rows, mask=alive, other=0.0)
            ref_new = tl.maximum(ref_m, ref_part)
            ref_s = tl.exp(ref_m - ref_new) * ref_s
            ref_s += tl.exp(ref_part - ref_new) * tl.load(part + 5 * rows, mask=alive, other=1.0)
            ref_m = ref_new
            ref_target += tl.load(part + 6 * rows, mask=alive, other=0.0)
            d_sum = old * d_sum + new * tl.load(part + 7 * rows, mask=alive, other=0.0)
            e_sum = old * e_sum + new * tl.load(part + 8 * rows, mask=alive, other=0.0)
        split += 1
    tl.store(stats + _M * rows, m, mask=alive)
    tl.store(stats + _S * rows, s, mask=alive)
    tl.store(stats + _X * rows, x_sum, mask=alive)
    tl.store(stats + _TARGET * rows, target_logit, mask=alive)
    if HAS_REF:
        tl.store(stats + _REF_M * rows, ref_m, mask=alive)
        tl.store(stats + _REF_S * rows, ref_s, mask=alive)
        tl.store(stats + _REF_TARGET * rows, ref_target, mask=alive)
        tl.store(stats + _D * rows, d_sum, mask=alive)
        tl.store(stats + _E * rows, e_sum, mask=alive)


def fused_fold(
    state: RowState,
    h: Tensor,  # (R, H) contiguous
    ref_h: Tensor | None,  # (R, H) contiguous
    w: Tensor,  # (C, H), rows contiguous, dtype of h
    bias: Tensor | None,  # (C,)
    v0: int,
    transform: Transform,
    log_epsilon: float,
    config: FusedConfig,
) -> None:
    """Multiply and fold columns v0 to v0 + C of the vocabulary into `state`."""
    rows, columns = h.shape[0], w.shape[0]
    if not rows or not columns:
        return
    row_blocks = -(-rows // config.block_m)
    tiles = -(-columns // config.block_n)
    splits = whole_waves(row_blocks, tiles, config.programs)
    split_columns = -(-tiles // splits) * config.block_n
    splits = -(-columns // split_columns)
    partial = torch.empty(splits, 4 if ref_h is None else 9, rows, device=h.device)
    if h.is_meta:
        return
    _fused_fold_kernel[(row_blocks * splits,)](
        h, ref_h, w, bias, state.stats, state.targets, state.count, state.ids, state.logits, state.ref_logits, partial,
        v0, columns, rows, w.stride(0), split_columns, state.capacity, transform.scale,
        transform.softcap, 1.0 / transform.temperature, log_epsilon, LISTS=state.capacity > 0, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, WIDTH=h.shape[1],
        # The interpreter's dot product would take the bits of bfloat16 for integers.
        UPCAST=interpreted(), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    _merge_kernel[(-(-rows // 128),)](
        partial, state.stats, rows, splits, HAS_REF=ref_h is not None, BLOCK=128, num_warps=4
    )


def compile_cases(cc: int) -> list[CompileCase]:
    """Every specialization that `fused_fold` can launch on compute capability `cc`."""
    cases = []
    for ref in (False, True):
        merge = {"partial_ptr": "*fp32", "stats_ptr": "*fp32", "rows": "i32", "splits": "i32"}
        cases.append(compile_case(f"merge ref={ref}", _merge_kernel, merge, {"HAS_REF": ref, "BLOCK": 128}))
        for half in ("fp16",) if cc < 80 else ("bf16", "fp16"):
            for lists, softcap in ((True, False), (False, False), (True, True), (False, True)):
                bias = softcap
                # Turing never comes here; that the kernel compiles for it all the same is checked with small tiles.
                config = fused_config(cc, ref) or FusedConfig(16, 16, 32, 8, 1)
                types = {
                    "h_ptr": f"*{half}:16", "ref_h_ptr": f"*{half}:16" if ref else None, "w_ptr": f"*{half}:16",
                    "bias_ptr": f"*{half}" if bias else None, "stats_ptr": "*fp32:16", "targets_ptr": "*i64:16",
                    "count_ptr": "*i32:16", "ids_ptr": "*i32:16", "logits_ptr": "*fp32:16",
                    "ref_logits_ptr": "*fp32:16" if ref else None, "partial_ptr": "*fp32:16",
                    **dict.fromkeys(("v0", "columns", "rows", "capacity"), "i32"),
                    **dict.fromkeys(("w_stride", "split_columns"), "i32:16"),
                    **dict.fromkeys(("scale", "inv_temperature", "log_epsilon"), "fp32"),
                    "softcap": "fp32" if softcap else None,
                }  # fmt: skip
                constants = {
                    "LISTS": lists, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
                    "WIDTH": 896 if lists else 900, "UPCAST": False,
                }  # fmt: skip
                name = f"fused_fold {tuple(config[:5])} {half} ref={ref} lists={lists} softcap={softcap}"
                cases.append(compile_case(name, _fused_fold_kernel, types, constants, config.warps, config.stages))
    return cases
