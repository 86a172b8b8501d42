"""The entries of `lists.py` in three launches: which rows are listed and how many entries each keeps, the entries in
the order of the vocabulary, and their coefficients.

By PyTorch's operators it is ninety launches a block, in which the device waits for the host: on an H200 3.5 ms of it
(docs/LOG.md, 2026-11-28). The decisions are the same whole numbers; sums over a row are made in the order of the
vocabulary, so equal inputs give equal bits however the fused kernel has filled the lists.

Memory: what is returned, and the logits of its entries while they are made.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lowvram_grpo.kernels.runtime import CompileCase, compile_case, jit, tl
from lowvram_grpo.kernels.sweep.state import _D, _D0, _E, _M, _S, _TARGET, _X, RowState
from lowvram_grpo.kernels.transform import Transform
from torch import Tensor

# Of a probability. A row's sum stays below 2^31 and is off by 2^-21 at most.
UNIT = 2.0**30
_BLOCK, _WARPS = 128, 4
# Entries that a block's are compared with at a time, for their ranks.
_OTHERS = 32


@jit
def _judge_kernel(
    stats_ptr, count_ptr, logits_ptr, wanted_ptr, code_ptr, rows, capacity, log_epsilon, need, unit,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lse = tl.load(stats_ptr + _M * rows + row) + tl.log(tl.load(stats_ptr + _S * rows + row))
    count = tl.load(count_ptr + row)
    wanted = True
    if wanted_ptr is not None:
        wanted = tl.load(wanted_ptr + row) != 0
    over = count > capacity
    last = tl.where(wanted & (count <= capacity), count, 0)
    kept = 0
    mass = tl.zeros([BLOCK], tl.int64)
    k0 = 0
    while k0 < last:
        k = k0 + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + row * capacity + k, mask=k < last, other=float("-inf"))
        keep = logit > lse + log_epsilon
        share = tl.where(keep, tl.exp(logit - lse) * unit + 0.5, 0.0)
        mass += share.to(tl.int64)
        kept += tl.sum(keep.to(tl.int32), 0)
        k0 += BLOCK
    code = tl.where(tl.sum(mass, 0) < need, -2, kept)
    code = tl.where(over, -3, code)
    tl.store(code_ptr + row, tl.where(wanted, code, -1))


@jit
def _order_kernel(
    stats_ptr, count_ptr, list_ids_ptr, list_logits_ptr, list_refs_ptr, targets_ptr, code_ptr, offsets_ptr, ids_ptr,
    logits_ptr, refs_ptr, rows, capacity, log_epsilon, SHUFFLED: tl.constexpr, BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(code_ptr + row) >= 0:
        bound = tl.load(stats_ptr + _M * rows + row) + tl.log(tl.load(stats_ptr + _S * rows + row)) + log_epsilon
        first = tl.load(offsets_ptr + row)
        tl.store(ids_ptr + first, tl.load(targets_ptr + row).to(tl.int32))
        count = tl.load(count_ptr + row)
        begin = row * capacity
        done = 0
        k0 = 0
        while k0 < count:
            k = k0 + tl.arange(0, BLOCK)
            inside = k < count
            logit = tl.load(list_logits_ptr + begin + k, mask=inside, other=float("-inf"))
            entry = tl.load(list_ids_ptr + begin + k, mask=inside, other=0)
            keep = inside & (logit > bound)
            if SHUFFLED:
                rank = tl.zeros([BLOCK], tl.int32)
                j0 = 0
                while j0 < count:
                    j = j0 + tl.arange(0, OTHERS)
                    other = tl.load(list_logits_ptr + begin + j, mask=j < count, other=float("-inf"))
                    other_id = tl.load(list_ids_ptr + begin + j, mask=j < count, other=0)
                    before = ((j < count) & (other > bound))[None, :] & (other_id[None, :] < entry[:, None])
                    rank += tl.sum(before.to(tl.int32), 1)
                    j0 += OTHERS
            else:
                rank = done + tl.cumsum(keep.to(tl.int32), 0) - 1
                done += tl.sum(keep.to(tl.int32), 0)
            place = first + 1 + rank
            tl.store(ids_ptr + place, entry, mask=keep)
            tl.store(logits_ptr + place, logit, mask=keep)
            if refs_ptr is not None:
                ref = tl.load(list_refs_ptr + begin + k, mask=keep, other=0.0)
                tl.store(refs_ptr + place, ref, mask=keep)
            k0 += BLOCK


@jit
def _slope_of(logit, softcap, inv_temperature):
    u = logit / (inv_temperature * softcap)
    return 1.0 - u * u


@jit
def _coefficients_kernel(
    stats_ptr, code_ptr, offsets_ptr, logits_ptr, refs_ptr, coef_ptr, kl_ptr, entropy_ptr, tail_ptr, kl_tail_ptr,
    entropy_tail_ptr, spread_ptr, rows, softcap, inv_temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stats = stats_ptr + row
    n = tl.load(code_ptr + row)
    m = tl.load(stats + _M * rows)
    s = tl.load(stats + _S * rows)
    lse = m + tl.log(s)
    total = tl.zeros([BLOCK], tl.float32)
    if kl_ptr is not None:
        mean = tl.load(stats + _D * rows) / s
        centre = tl.load(stats + _D0 * rows) + mean
        kl_total = tl.zeros([BLOCK], tl.float32)
        square_total = tl.zeros([BLOCK], tl.float32)
    if entropy_ptr is not None:
        expected = m + tl.load(stats + _X * rows) / s
        entropy_total = tl.zeros([BLOCK], tl.float32)
    if n >= 0:
        first = tl.load(offsets_ptr + row)
        target_slope = 1.0
        if softcap is not None:
            target_slope = _slope_of(tl.load(stats + _TARGET * rows), softcap, inv_temperature)
        # The target is one more entry, of coefficient -1, first in its row.
        tl.store(coef_ptr + first, -target_slope)
        if kl_ptr is not None:
            tl.store(kl_ptr + first, 0.0)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + first, 0.0)
        k0 = 0
        while k0 < n:
            k = k0 + tl.arange(0, BLOCK)
            inside = k < n
            place = first + 1 + k
            logit = tl.load(logits_ptr + place, mask=inside, other=float("-inf"))
            coef = tl.exp(logit - lse)
            total += coef
            slope = tl.full([BLOCK], 1.0, tl.float32)
            if softcap is not None:
                slope = tl.where(inside, _slope_of(logit, softcap, inv_temperature), 0.0)
            tl.store(coef_ptr + place, coef * slope, mask=inside)
            if kl_ptr is not None:
                gap = tl.where(inside, logit - tl.load(refs_ptr + place, mask=inside, other=0.0) - centre, 0.0)
                kl = coef * gap
                kl_total += kl
                square_total += kl * gap
                tl.store(kl_ptr + place, kl * slope, mask=inside)
            if entropy_ptr is not None:
                share = tl.where(inside, coef * (expected - logit), 0.0)
                entropy_total += share
                tl.store(entropy_ptr + place, share * slope, mask=inside)
            k0 += BLOCK
    tail = tl.where(n >= 0, tl.maximum(1.0 - tl.sum(total, 0), 0.0), 0.0)
    tl.store(tail_ptr + row, tail)
    if kl_ptr is not None:
        variance = tl.load(stats + _E * rows) / s - mean * mean
        missing = tl.maximum(variance - tl.sum(square_total, 0), 0.0)
        tl.store(kl_tail_ptr + row, -tl.sum(kl_total, 0))
        tl.store(spread_ptr + row, tl.sqrt(tail * missing))
    if entropy_ptr is not None:
        tl.store(entropy_tail_ptr + row, -tl.sum(entropy_total, 0))


def judged(state: RowState, epsilon: float, max_tail: float, wanted: Tensor | None) -> Tensor:
    """(R,) int32: how many entries a row keeps; -1 where it is not wanted, -2 where it is diffuse, -3 where its list
    overflowed."""
    rows = len(state.targets)
    code = torch.empty(rows, dtype=torch.int32, device=state.stats.device)
    _judge_kernel[(rows,)](
        state.stats, state.count, state.logits, None if wanted is None else wanted.view(torch.uint8), code, rows,
        state.capacity, math.log(epsilon), math.ceil((1 - max_tail) * UNIT), UNIT, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return code


def filled(
    state: RowState,
    transform: Transform,
    code: Tensor,  # (R,) of `judged`
    entries: int,
    epsilon: float,
    *,
    keep_kl: bool,
    keep_entropy: bool,
    shuffled: bool,
) -> tuple[Tensor, ...]:
    """offsets (R + 1,), ids, coef, kl_coef, entropy_coef (K,), tail, kl_tail, entropy_tail and spread (R,), as
    `direction.Entries` has them; empty where not kept. `entries`: K."""
    rows, device = len(code), code.device
    empty = lambda n, kept=True, dtype=torch.float32: torch.empty(n if kept else 0, dtype=dtype, device=device)
    offsets = torch.nn.functional.pad((code.clamp(min=-1) + 1).cumsum(0), (1, 0))
    ids, logits, refs = empty(entries, dtype=torch.int32), empty(entries), empty(entries) if keep_kl else None
    _order_kernel[(rows,)](
        state.stats, state.count, state.ids, state.logits, state.ref_logits if keep_kl else None, state.targets, code,
        offsets, ids, logits, refs, rows, state.capacity, math.log(epsilon), SHUFFLED=shuffled, BLOCK=_BLOCK,
        OTHERS=_OTHERS, num_warps=_WARPS,
    )  # fmt: skip
    coef, kl, entropy = empty(entries), empty(entries, keep_kl), empty(entries, keep_entropy)
    tail, kl_tail, entropy_tail = empty(rows), empty(rows, keep_kl), empty(rows, keep_entropy)
    spread = empty(rows, keep_kl)
    there = lambda x, kept: x if kept else None
    _coefficients_kernel[(rows,)](
        state.stats, code, offsets, logits, refs, coef, there(kl, keep_kl), there(entropy, keep_entropy), tail,
        there(kl_tail, keep_kl), there(entropy_tail, keep_entropy), there(spread, keep_kl), rows, transform.softcap,
        1.0 / transform.temperature, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return offsets, ids, coef, kl, entropy, tail, kl_tail, entropy_tail, spread


def compile_cases(cc: int) -> list[CompileCase]:
    """Every specialization that these launches have on compute capability `cc`; none depends on a dtype."""
    floats = lambda *names: dict.fromkeys(names, "*fp32:16")
    lists = {**floats("stats_ptr", "logits_ptr"), "count_ptr": "*i32:16", "rows": "i32", "capacity": "i32:16"}
    cases: list[CompileCase] = []

    def add(name: str, kernel: Any, types: dict[str, str | None], **constants: Any) -> None:
        cases.append(compile_case(name, kernel, types, {"BLOCK": _BLOCK, **constants}, _WARPS))

    for wanted in (False, True):
        types = {**lists, "wanted_ptr": "*u8" if wanted else None, "code_ptr": "*i32:16", "log_epsilon": "fp32"}
        add(f"judge wanted={wanted}", _judge_kernel, {**types, "need": "i32", "unit": "fp32"})
    for ref in (False, True):
        for shuffled in (False, True):
            types = {
                **lists, **floats("list_logits_ptr"), "list_ids_ptr": "*i32:16", "ids_ptr": "*i32:16",
                "list_refs_ptr": "*fp32:16" if ref else None, "refs_ptr": "*fp32:16" if ref else None,
                "targets_ptr": "*i64:16", "code_ptr": "*i32:16", "offsets_ptr": "*i64:16", "log_epsilon": "fp32",
            }  # fmt: skip
            add(f"order ref={ref} shuffled={shuffled}", _order_kernel, types, SHUFFLED=shuffled, OTHERS=_OTHERS)
    for ref in (False, True):
        for entropy in (False, True):
            for softcap in (False, True):
                some = lambda kept: "*fp32:16" if kept else None
                types = {
                    **floats("stats_ptr", "logits_ptr", "coef_ptr", "tail_ptr"), "code_ptr": "*i32:16",
                    "offsets_ptr": "*i64:16", "refs_ptr": some(ref), "kl_ptr": some(ref), "kl_tail_ptr": some(ref),
                    "spread_ptr": some(ref), "entropy_ptr": some(entropy), "entropy_tail_ptr": some(entropy),
                    "rows": "i32", "softcap": "fp32" if softcap else None, "inv_temperature": "fp32",
                }  # fmt: skip
                add(f"coefficients ref={ref} entropy={entropy} softcap={softcap}", _coefficients_kernel, types)
    return cases
