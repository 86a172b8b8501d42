"""The way back through the gated delta rule, by Triton: gradients to states against their order, then all chunks of a
segment at once. Letters are those of `delta_chunks.py`."""

from __future__ import annotations

from lowvram_grpo.kernels.recurrent.delta_kernels import (
    CHUNK,
    COLUMNS,
    SCAN_WARPS,
    decays,
    heads_of,
    load_numbers,
    load_rows,
    precision_of,
    sums_until,
    types_of,
)
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, jit, tl

CHUNK_WARPS = 8
_CHUNK = tl.constexpr(CHUNK) if HAS_TRITON else CHUNK


@jit
def back_scan_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, inverse_ptr, attention_ptr, dout_ptr, dstate_ptr, dstates_ptr, dright_ptr,
    length, chunks, heads, group, width, v_width, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, g_batch, g_token, g_head, beta_batch, beta_token, beta_head,
    dout_batch, dout_token, dout_head,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient to the state after the segment, `dstate` (B Hv, Dk, Dv), to the one before it, in its place; on
    the way those to the states after each chunk (`dstates`) and to R (`dright`). Program: as in `scan_kernel`."""
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    row = row.to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, BLOCK)
    i = tl.arange(0, _CHUNK)
    within = (d < width)[:, None] & (column < v_width)[None, :]
    place = d[:, None] * v_width + column[None, :]
    square = i[:, None] * _CHUNK + i[None, :]
    q_ptr += b * q_batch + h // group * q_head
    k_ptr += b * k_batch + h // group * k_head
    g_ptr += b * g_batch + h * g_head
    beta_ptr += b * beta_batch + h * beta_head
    dout_ptr += b * dout_batch + h * dout_head
    dstate = tl.load(dstate_ptr + row * width * v_width + place, mask=within, other=0.0)
    for step in range(0, chunks):
        chunk = chunks - 1 - step
        token = chunk * _CHUNK + i
        inside = (token < length)[:, None] & (column < v_width)[None, :]
        at = row * chunks + chunk
        tl.store(dstates_ptr + at * width * v_width + place, dstate, mask=within)
        k, _ = load_rows(k_ptr, token, length, k_token, width, BLOCK, NORMALIZE)
        dout = tl.load(dout_ptr + token[:, None] * dout_token + column[None, :], mask=inside, other=0.0)
        dout = dout.to(tl.float32)
        g = load_numbers(g_ptr, token, length, g_token)
        beta = load_numbers(beta_ptr, token, length, beta_token)
        G, whole = sums_until(g, _CHUNK), tl.sum(g, 0)
        # Read with rows and columns exchanged: both are wanted transposed.
        inverse = tl.load(inverse_ptr + at * _CHUNK * _CHUNK + i[:, None] + i[None, :] * _CHUNK)
        attention = tl.load(attention_ptr + at * _CHUNK * _CHUNK + i[:, None] + i[None, :] * _CHUNK)
        du = tl.dot(attention, dout, input_precision=PRECISION)
        du += tl.dot(k * tl.exp(whole - G)[:, None], dstate, input_precision=PRECISION)
        dright = tl.dot(inverse, du, input_precision=PRECISION)
        tl.store(dright_ptr + (at * _CHUNK + i[:, None]) * v_width + column[None, :], dright, mask=inside)
        dstate = dstate * tl.exp(whole)
        dstate -= tl.dot(tl.trans(k * (beta * tl.exp(G))[:, None]), dright, input_precision=PRECISION)
        q, _ = load_rows(q_ptr, token, length, q_token, width, BLOCK, NORMALIZE)
        dstate += tl.dot(tl.trans(q * (scale * tl.exp(G))[:, None]), dout, input_precision=PRECISION)
    tl.store(dstate_ptr + row * width * v_width + place, dstate, mask=within)


@jit
def back_chunk_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, attention_ptr, states_ptr, dstates_ptr, solved_ptr, dright_ptr, dout_ptr,
    dq_ptr, dk_ptr, dv_ptr, dg_ptr, dbeta_ptr, length, chunks, heads, group, width, v_width, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    beta_batch, beta_token, beta_head, dout_batch, dout_token, dout_head, dv_batch, dv_token, dv_head,
    dg_batch, dg_token, dg_head, dbeta_batch, dbeta_token, dbeta_head,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients to what a chunk reads; those to q and k a value head each, (B, tokens, Hv, Dk) float32. Program: a
    chunk, a value head."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    d = tl.arange(0, BLOCK)
    i = tl.arange(0, _CHUNK)
    token = chunk * _CHUNK + i
    at = row.to(tl.int64) * chunks + chunk
    states_ptr += at * width * v_width
    dstates_ptr += at * width * v_width
    solved_ptr += at * _CHUNK * v_width
    dright_ptr += at * _CHUNK * v_width
    v_ptr += b * v_batch + h * v_head
    dout_ptr += b * dout_batch + h * dout_head
    dv_ptr += b * dv_batch + h * dv_head
    G = load_numbers(g_ptr + b * g_batch + h * g_head, token, length, g_token)
    whole = tl.sum(G, 0)
    G = sums_until(G, _CHUNK)
    beta = load_numbers(beta_ptr + b * beta_batch + h * beta_head, token, length, beta_token)
    by_out = tl.zeros((_CHUNK, BLOCK), tl.float32)
    by_key = tl.zeros((_CHUNK, BLOCK), tl.float32)
    by_end = tl.zeros((_CHUNK, BLOCK), tl.float32)
    dp = tl.zeros((_CHUNK, _CHUNK), tl.float32)
    da = tl.zeros((_CHUNK, _CHUNK), tl.float32)
    dbeta = tl.zeros((_CHUNK,), tl.float32)
    across = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, v_width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (token < length)[:, None] & (column < v_width)[None, :]
        within = (column < v_width)[:, None] & (d < width)[None, :]
        # (columns, Dk): transposed as they are read.
        state = tl.load(states_ptr + column[:, None] + d[None, :] * v_width, mask=within, other=0.0)
        dstate = tl.load(dstates_ptr + column[:, None] + d[None, :] * v_width, mask=within, other=0.0)
        across += tl.sum(state * dstate, 1)
        part = i[:, None] * v_width + column[None, :]
        dout = tl.load(dout_ptr + token[:, None] * dout_token + column[None, :], mask=inside, other=0.0)
        dout = dout.to(tl.float32)
        by_out += tl.dot(dout, state, input_precision=PRECISION)
        dright = tl.load(dright_ptr + part, mask=inside, other=0.0)
        by_key += tl.dot(dright, state, input_precision=PRECISION)
        u = tl.load(solved_ptr + part, mask=inside, other=0.0)
        by_end += tl.dot(u, dstate, input_precision=PRECISION)
        dp += tl.dot(dout, tl.trans(u), input_precision=PRECISION)
        da -= tl.dot(dright, tl.trans(u), input_precision=PRECISION)
        v = tl.load(v_ptr + token[:, None] * v_token + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dbeta += tl.sum(dright * v, 1)
        tl.store(
            dv_ptr + token[:, None] * dv_token + column[None, :],
            (beta[:, None] * dright).to(dv_ptr.dtype.element_ty), mask=inside,
        )  # fmt: skip
    k, k_norm = load_rows(
        k_ptr + b * k_batch + h // group * k_head, token, length, k_token, width, BLOCK, NORMALIZE
    )  # fmt: skip
    q, q_norm = load_rows(
        q_ptr + b * q_batch + h // group * q_head, token, length, q_token, width, BLOCK, NORMALIZE
    )  # fmt: skip
    by_out *= (tl.exp(G) * scale)[:, None]
    by_key *= tl.exp(G)[:, None]
    by_end *= tl.exp(whole - G)[:, None]
    key_decay, end_decay = tl.sum(by_key * k, 1), tl.sum(by_end * k, 1)
    between = decays(G, G, i[:, None] >= i[None, :])
    p = tl.load(attention_ptr + at * _CHUNK * _CHUNK + i[:, None] * _CHUNK + i[None, :])
    unscaled = tl.where(i[:, None] > i[None, :], da * between, 0.0)
    keys = tl.dot(k, tl.trans(k), input_precision=PRECISION) * unscaled
    dbeta += tl.sum(keys, 1) - key_decay
    pairs = dp * p + keys * beta[:, None]
    dG = tl.sum(by_out * q, 1) - beta * key_decay - end_decay + tl.sum(pairs, 1) - tl.sum(pairs, 0)
    last = tl.exp(whole) * tl.sum(across, 0) + tl.sum(end_decay, 0)
    dg = tl.sum(tl.where(i[:, None] >= i[None, :], dG[:, None], 0.0), 0) + last
    dp *= between * scale
    da = unscaled * beta[:, None]
    dq = by_out + tl.dot(dp, k, input_precision=PRECISION)
    dk = by_end - beta[:, None] * by_key + tl.dot(tl.trans(dp), q, input_precision=PRECISION)
    dk += tl.dot(da + tl.trans(da), k, input_precision=PRECISION)
    if NORMALIZE:
        dq = q_norm[:, None] * (dq - q * tl.sum(dq * q, 1)[:, None])
        dk = k_norm[:, None] * (dk - k * tl.sum(dk * k, 1)[:, None])
    rows = ((b * length + token)[:, None] * heads + h) * width + d[None, :]
    there = (token < length)[:, None] & (d < width)[None, :]
    tl.store(dq_ptr + rows, dq, mask=there)
    tl.store(dk_ptr + rows, dk, mask=there)
    tl.store(
        dg_ptr + b * dg_batch + h * dg_head + token * dg_token, dg.to(dg_ptr.dtype.element_ty), mask=token < length
    )
    tl.store(
        dbeta_ptr + b * dbeta_batch + h * dbeta_head + token * dbeta_token, dbeta.to(dbeta_ptr.dtype.element_ty),
        mask=token < length,
    )  # fmt: skip


def compile_cases(cc: int) -> list[CompileCase]:
    """Narrow and wide heads in all dtypes."""
    cases = []
    sizes = ("length", "chunks", "heads", "group", "width", "v_width")
    for x, block in heads_of(cc):
        constants = {"BLOCK": block, "COLUMNS": COLUMNS, "NORMALIZE": True, "PRECISION": precision_of(x)}
        types = types_of(
            x, ("q", "k", "g", "beta", "dout"), ("inverse", "attention", "dstate", "dstates", "dright"), sizes
        )  # fmt: skip
        cases.append(compile_case(f"delta back scan {x} {block}", back_scan_kernel, types, constants, SCAN_WARPS))
        types = types_of(
            x, ("q", "k", "v", "g", "beta", "dout", "dv", "dg", "dbeta"),
            ("attention", "states", "dstates", "solved", "dright", "dq", "dk", "dg"), sizes,
        )  # fmt: skip
        cases.append(compile_case(f"delta back chunk {x} {block}", back_chunk_kernel, types, constants, CHUNK_WARPS))
    return cases
