"""The way back through the gated delta rule, by Triton: gradients to states against their order, then all chunks of a
segment at once, then from unit rows to rows. Letters are those of `delta_chunks.py`, slices those of
`delta_kernels.py`."""

from __future__ import annotations

from lowvram_grpo.kernels.recurrent.delta_kernels import (
    CHUNK,
    COLUMNS,
    PRECISION,
    SCAN_WARPS,
    SLICE,
    WIDEST,
    decays,
    heads_of,
    load_numbers,
    load_part,
    load_slice,
    rows_by,
    rows_into,
    store_slice,
    sums_until,
    types_of,
)
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, jit, tl

CHUNK_WARPS = 8
ROW_TOKENS, ROW_WARPS = 16, 4  # of a program that goes from unit rows to rows
_constant = tl.constexpr if HAS_TRITON else int
_CHUNK = _constant(CHUNK)
_SLICE = _constant(SLICE)
_PART = _constant(16)  # of the width of rows, at a time
_WIDEST = _constant(WIDEST)
_ROW_TOKENS = _constant(ROW_TOKENS)
_EPS = tl.constexpr(1e-6) if HAS_TRITON else 1e-6


@jit
def back_scan_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, inverse_ptr, attention_ptr, norms_ptr, dout_ptr, dstate_ptr, dstates_ptr,
    dright_ptr, length, chunks, heads, group, width, v_width, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, g_batch, g_token, g_head, beta_batch, beta_token, beta_head,
    dout_batch, dout_token, dout_head, TWO: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient to the state after the segment, `dstate` (B Hv, Dk, Dv), to the one before it, in its place; on
    the way those to the states after each chunk (`dstates`) and to R (`dright`). Program: as in `scan_kernel`."""
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    row = row.to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, _CHUNK)
    # Read with rows and columns exchanged: both systems are wanted transposed.
    square = i[:, None] + i[None, :] * _CHUNK
    q_ptr += b * q_batch + h // group * q_head
    k_ptr += b * k_batch + h // group * k_head
    g_ptr += b * g_batch + h * g_head
    beta_ptr += b * beta_batch + h * beta_head
    dout_ptr += b * dout_batch + h * dout_head
    dstate_ptr += row * width * v_width
    dstate0 = load_slice(dstate_ptr, 0, width, column, v_width)
    dstate1 = dstate0
    if TWO:
        dstate1 = load_slice(dstate_ptr, _SLICE, width, column, v_width)
    chunk = chunks - 1
    while chunk >= 0:  # Triton 3.6 interprets no range of a runtime length
        at = row * chunks + chunk
        store_slice(dstates_ptr + at * width * v_width, dstate0, 0, width, column, v_width)
        if TWO:
            store_slice(dstates_ptr + at * width * v_width, dstate1, _SLICE, width, column, v_width)
        token = chunk * _CHUNK + i
        inside = (token < length)[:, None] & (column < v_width)[None, :]
        g = load_numbers(g_ptr, token, length, g_token)
        beta = load_numbers(beta_ptr, token, length, beta_token)
        G, whole = sums_until(g, _CHUNK), tl.sum(g, 0)
        k_norm = tl.load(norms_ptr + at * 2 * _CHUNK + _CHUNK + i)
        du = rows_by(k_ptr, token, length, k_token, 0, width, dstate0, PRECISION)
        if TWO:
            du += rows_by(k_ptr, token, length, k_token, _SLICE, width, dstate1, PRECISION)
        du *= (tl.exp(whole - G) * k_norm)[:, None]
        dout = tl.load(dout_ptr + token[:, None] * dout_token + column[None, :], mask=inside, other=0.0)
        dout = dout.to(tl.float32)
        du += tl.dot(tl.load(attention_ptr + at * _CHUNK * _CHUNK + square), dout, input_precision=PRECISION)
        dright = tl.dot(tl.load(inverse_ptr + at * _CHUNK * _CHUNK + square), du, input_precision=PRECISION)
        place = dright_ptr + at * _CHUNK * v_width
        tl.store(place + i[:, None] * v_width + column[None, :], dright, mask=inside)
        factor = -beta * tl.exp(G) * k_norm
        dstate0 *= tl.exp(whole)
        dstate0 += rows_into(k_ptr, token, length, k_token, 0, width, factor, dright, PRECISION)
        if TWO:
            dstate1 *= tl.exp(whole)
            dstate1 += rows_into(k_ptr, token, length, k_token, _SLICE, width, factor, dright, PRECISION)
        # Read again: kept from above, it would take registers that are not there.
        dout = tl.load(dout_ptr + token[:, None] * dout_token + column[None, :], mask=inside, other=0.0)
        dout = dout.to(tl.float32)
        factor = scale * tl.exp(G) * tl.load(norms_ptr + at * 2 * _CHUNK + i)
        dstate0 += rows_into(q_ptr, token, length, q_token, 0, width, factor, dout, PRECISION)
        if TWO:
            dstate1 += rows_into(q_ptr, token, length, q_token, _SLICE, width, factor, dout, PRECISION)
        chunk -= 1
    store_slice(dstate_ptr, dstate0, 0, width, column, v_width)
    if TWO:
        store_slice(dstate_ptr, dstate1, _SLICE, width, column, v_width)


@jit
def back_pairs_kernel(
    k_ptr, v_ptr, g_ptr, beta_ptr, inverse_ptr, attention_ptr, norms_ptr, solved_ptr, dright_ptr, dout_ptr, dv_ptr,
    sums_ptr, length, chunks, heads, group, width, v_width, scale,
    k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head, beta_batch, beta_token, beta_head,
    dout_batch, dout_token, dout_head, dv_batch, dv_token, dv_head, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What goes back through P and A: gradients to q_i.k_j in the place of P, to k_i.k_j in that of (I + A)^-1, those
    to v, and what G and beta get of it, (B Hv, chunks, 2, 32). Program: a chunk, a value head."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    i = tl.arange(0, _CHUNK)
    token = chunk * _CHUNK + i
    at = row.to(tl.int64) * chunks + chunk
    solved_ptr += at * _CHUNK * v_width
    dright_ptr += at * _CHUNK * v_width
    k_ptr += b * k_batch + h // group * k_head
    v_ptr += b * v_batch + h * v_head
    dout_ptr += b * dout_batch + h * dout_head
    dv_ptr += b * dv_batch + h * dv_head
    beta = load_numbers(beta_ptr + b * beta_batch + h * beta_head, token, length, beta_token)
    dp = tl.zeros((_CHUNK, _CHUNK), tl.float32)
    da = tl.zeros((_CHUNK, _CHUNK), tl.float32)
    dbeta = tl.zeros((_CHUNK,), tl.float32)
    first = 0
    while first < v_width:
        column = first + tl.arange(0, COLUMNS)
        inside = (token < length)[:, None] & (column < v_width)[None, :]
        part = i[:, None] * v_width + column[None, :]
        dright = tl.load(dright_ptr + part, mask=inside, other=0.0)
        v = tl.load(v_ptr + token[:, None] * v_token + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dbeta += tl.sum(dright * v, 1)
        dv = (beta[:, None] * dright).to(dv_ptr.dtype.element_ty)
        tl.store(dv_ptr + token[:, None] * dv_token + column[None, :], dv, mask=inside)
        u = tl.trans(tl.load(solved_ptr + part, mask=inside, other=0.0))
        da -= tl.dot(dright, u, input_precision=PRECISION)
        dout = tl.load(dout_ptr + token[:, None] * dout_token + column[None, :], mask=inside, other=0.0)
        dp += tl.dot(dout.to(tl.float32), u, input_precision=PRECISION)
        first += COLUMNS
    keys = tl.zeros((_CHUNK, _CHUNK), tl.float32)
    first = 0
    while first < width:
        k = load_part(k_ptr, token, length, k_token, first, width, _PART)
        keys += tl.dot(k, tl.trans(k), input_precision=PRECISION)
        first += _PART
    k_norm = tl.load(norms_ptr + at * 2 * _CHUNK + _CHUNK + i)
    G = sums_until(load_numbers(g_ptr + b * g_batch + h * g_head, token, length, g_token), _CHUNK)
    between = decays(G, G, i[:, None] >= i[None, :])
    square = at * _CHUNK * _CHUNK + i[:, None] * _CHUNK + i[None, :]
    pairs = dp * tl.load(attention_ptr + square)
    tl.store(attention_ptr + square, dp * between * scale)
    da = tl.where(i[:, None] > i[None, :], da * between, 0.0)
    tl.store(inverse_ptr + square, da * beta[:, None])
    keys *= da * k_norm[:, None] * k_norm[None, :]
    pairs += keys * beta[:, None]
    tl.store(sums_ptr + at * 2 * _CHUNK + i, tl.sum(pairs, 1) - tl.sum(pairs, 0))
    tl.store(sums_ptr + at * 2 * _CHUNK + _CHUNK + i, dbeta + tl.sum(keys, 1))


@jit
def back_chunk_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, inverse_ptr, attention_ptr, norms_ptr, states_ptr, dstates_ptr, solved_ptr,
    dright_ptr, dout_ptr, sums_ptr, dq_ptr, dk_ptr, dg_ptr, dbeta_ptr, length, chunks, heads, group, width, v_width,
    scale, q_batch, q_token, q_head, k_batch, k_token, k_head, g_batch, g_token, g_head,
    beta_batch, beta_token, beta_head, dout_batch, dout_token, dout_head, dg_batch, dg_token, dg_head,
    dbeta_batch, dbeta_token, dbeta_head, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What goes back through states, and all of it together: gradients to unit rows of q and k, a value head each, (B,
    tokens, Hv, Dk) float32, and those to g and beta. Program: a chunk, a value head."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    i = tl.arange(0, _CHUNK)
    token = chunk * _CHUNK + i
    at = row.to(tl.int64) * chunks + chunk
    states_ptr += at * width * v_width
    dstates_ptr += at * width * v_width
    solved_ptr += at * _CHUNK * v_width
    dright_ptr += at * _CHUNK * v_width
    inverse_ptr += at * _CHUNK * _CHUNK
    attention_ptr += at * _CHUNK * _CHUNK
    q_ptr += b * q_batch + h // group * q_head
    k_ptr += b * k_batch + h // group * k_head
    dout_ptr += b * dout_batch + h * dout_head
    dq_ptr += (b * length * heads + h) * width
    dk_ptr += (b * length * heads + h) * width
    G = load_numbers(g_ptr + b * g_batch + h * g_head, token, length, g_token)
    whole = tl.sum(G, 0)
    G = sums_until(G, _CHUNK)
    beta = load_numbers(beta_ptr + b * beta_batch + h * beta_head, token, length, beta_token)
    q_norm = tl.load(norms_ptr + at * 2 * _CHUNK + i)
    k_norm = tl.load(norms_ptr + at * 2 * _CHUNK + _CHUNK + i)
    out_decay = tl.zeros((_CHUNK,), tl.float32)
    key_decay = tl.zeros((_CHUNK,), tl.float32)
    end_decay = tl.zeros((_CHUNK,), tl.float32)
    across = tl.zeros((COLUMNS,), tl.float32)
    square = i[:, None] * _CHUNK + i[None, :]
    flipped = i[:, None] + i[None, :] * _CHUNK
    begin = 0
    while begin < width:
        d = begin + tl.arange(0, _PART)
        by_out = tl.zeros((_CHUNK, _PART), tl.float32)
        by_key = tl.zeros((_CHUNK, _PART), tl.float32)
        by_end = tl.zeros((_CHUNK, _PART), tl.float32)
        first = 0
        while first < v_width:
            column = first + tl.arange(0, COLUMNS)
            inside = (token < length)[:, None] & (column < v_width)[None, :]
            part = i[:, None] * v_width + column[None, :]
            within = (column < v_width)[:, None] & (d < width)[None, :]
            place = column[:, None] + d[None, :] * v_width  # transposed
            state = tl.load(states_ptr + place, mask=within, other=0.0)
            dout = tl.load(dout_ptr + token[:, None] * dout_token + column[None, :], mask=inside, other=0.0)
            by_out += tl.dot(dout.to(tl.float32), state, input_precision=PRECISION)
            dright = tl.load(dright_ptr + part, mask=inside, other=0.0)
            by_key += tl.dot(dright, state, input_precision=PRECISION)
            dstate = tl.load(dstates_ptr + place, mask=within, other=0.0)
            across += tl.sum(state * dstate, 1)
            u = tl.load(solved_ptr + part, mask=inside, other=0.0)
            by_end += tl.dot(u, dstate, input_precision=PRECISION)
            first += COLUMNS
        by_out *= (tl.exp(G) * scale)[:, None]
        by_key *= tl.exp(G)[:, None]
        by_end *= tl.exp(whole - G)[:, None]
        k = load_part(k_ptr, token, length, k_token, begin, width, _PART) * k_norm[:, None]
        key_decay += tl.sum(by_key * k, 1)
        end_decay += tl.sum(by_end * k, 1)
        q = load_part(q_ptr, token, length, q_token, begin, width, _PART) * q_norm[:, None]
        out_decay += tl.sum(by_out * q, 1)
        by_end -= beta[:, None] * by_key
        by_out += tl.dot(tl.load(attention_ptr + square), k, input_precision=PRECISION)
        by_end += tl.dot(tl.load(attention_ptr + flipped), q, input_precision=PRECISION)
        both = tl.load(inverse_ptr + square) + tl.load(inverse_ptr + flipped)
        by_end += tl.dot(both, k, input_precision=PRECISION)
        rows = token[:, None] * (heads * width) + d[None, :]
        there = (token < length)[:, None] & (d < width)[None, :]
        tl.store(dq_ptr + rows, by_out, mask=there)
        tl.store(dk_ptr + rows, by_end, mask=there)
        begin += _PART
    dG = tl.load(sums_ptr + at * 2 * _CHUNK + i) + out_decay - beta * key_decay - end_decay
    last = tl.exp(whole) * tl.sum(across, 0) + tl.sum(end_decay, 0)
    # G is a sum of all g before: a sum of all that come after, on the way back.
    dg = tl.sum(tl.where(i[:, None] >= i[None, :], dG[:, None], 0.0), 0) + last
    dg_ptr += b * dg_batch + h * dg_head
    tl.store(dg_ptr + token * dg_token, dg.to(dg_ptr.dtype.element_ty), mask=token < length)
    dbeta = tl.load(sums_ptr + at * 2 * _CHUNK + _CHUNK + i) - key_decay
    dbeta_ptr += b * dbeta_batch + h * dbeta_head
    tl.store(dbeta_ptr + token * dbeta_token, dbeta.to(dbeta_ptr.dtype.element_ty), mask=token < length)


@jit
def back_rows_kernel(
    x_ptr, dunit_ptr, dx_ptr, length, heads, group, width, x_batch, x_token, x_head, dx_batch, dx_token, dx_head,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The gradient to queries or keys from those to their unit rows (B, tokens, Hv, Dk): a sum over the value heads of
    each, less what would lengthen the row. Program: 16 tokens, a key head, a sequence."""
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * _ROW_TOKENS + tl.arange(0, _ROW_TOKENS)
    d = tl.arange(0, _WIDEST)
    there = (token < length)[:, None] & (d < width)[None, :]
    total = tl.zeros((_ROW_TOKENS, _WIDEST), tl.float32)
    place = ((b * length + token)[:, None] * heads + h * group) * width + d[None, :]
    j = 0
    while j < group:
        total += tl.load(dunit_ptr + place + j * width, mask=there, other=0.0)
        j += 1
    if NORMALIZE:
        x = load_part(x_ptr + b * x_batch + h * x_head, token, length, x_token, 0, width, _WIDEST)
        r = tl.rsqrt(tl.sum(x * x, 1) + _EPS)[:, None]
        x *= r
        total = r * (total - x * tl.sum(total * x, 1)[:, None])
    dx_ptr += b * dx_batch + h * dx_head
    tl.store(dx_ptr + token[:, None] * dx_token + d[None, :], total.to(dx_ptr.dtype.element_ty), mask=there)


def compile_cases(cc: int) -> list[CompileCase]:
    """Narrow and wide heads in both dtypes."""
    cases = []
    sizes = ("length", "chunks", "heads", "group", "width", "v_width")
    for x, two in heads_of(cc):
        constants = {"TWO": two, "COLUMNS": COLUMNS, "PRECISION": PRECISION}
        types = types_of(
            x, ("q", "k", "g", "beta", "dout"),
            ("inverse", "attention", "norms", "dstate", "dstates", "dright"), sizes,
        )  # fmt: skip
        name = f"delta back scan {x} {64 * (1 + two)}"
        cases.append(compile_case(name, back_scan_kernel, types, constants, SCAN_WARPS))
        if not two:  # the same for all widths
            continue
        constants = {"COLUMNS": COLUMNS, "PRECISION": PRECISION}
        types = types_of(
            x, ("k", "v", "g", "beta", "dout", "dv"),
            ("inverse", "attention", "norms", "solved", "dright", "sums"), sizes,
        )  # fmt: skip
        cases.append(compile_case(f"delta back pairs {x}", back_pairs_kernel, types, constants, CHUNK_WARPS))
        types = types_of(
            x, ("q", "k", "g", "beta", "dout", "dg", "dbeta"),
            ("inverse", "attention", "norms", "states", "dstates", "solved", "dright", "sums", "dq", "dk"), sizes,
        )  # fmt: skip
        cases.append(compile_case(f"delta back chunk {x}", back_chunk_kernel, types, constants, CHUNK_WARPS))
        types = types_of(x, ("x", "dx"), ("dunit",), ("length", "heads", "group", "width"))
        cases.append(compile_case(f"delta back rows {x}", back_rows_kernel, types, {"NORMALIZE": True}, ROW_WARPS))
    return cases
