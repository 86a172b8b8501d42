"""The gated delta rule in chunks of 32 tokens, by Triton: the systems of a segment, then its states in their order.

Letters are those of `delta_chunks.py`. Chunks are half as long as there: of the 16-row tiles that a tensor core wants a
chunk then has two, so that (I + A)^-1 is two small inverses and one product. A program holds a state's columns in
slices of 64 rows, and reads rows of queries and keys a slice at a time, again where they are needed again: the
operands of wider products alone would take all registers of a thread.
"""

from __future__ import annotations

from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, jit, tl

CHUNK = 32
SLICE = 64  # rows of a state, a product
WIDEST = 2 * SLICE  # key
COLUMNS = 16  # of a state, a program
LEAST_CARD = 80  # compute capability
PRECISION = "tf32"  # of products: of what had 16 bits, its 11 lose less than rounding the results will
SYSTEM_WARPS, SCAN_WARPS = 4, 8
STRIDES = ("batch", "token", "head")
_constant = tl.constexpr if HAS_TRITON else int
_CHUNK = _constant(CHUNK)
_HALF = _constant(CHUNK // 2)
_PART = _constant(32)  # of the width of rows, for products of rows with rows
_SLICE = _constant(SLICE)
_EPS = tl.constexpr(1e-6) if HAS_TRITON else 1e-6


@jit
def load_part(ptr, token, length, stride, first, width, BLOCK: tl.constexpr):
    """Entries first .. first + BLOCK of rows of queries or keys, (tokens, BLOCK) float32; zeros elsewhere."""
    d = first + tl.arange(0, BLOCK)
    mask = (token < length)[:, None] & (d < width)[None, :]
    return tl.load(ptr + token[:, None] * stride + d[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def load_numbers(ptr, token, length, stride):
    """A number a token, float32: zeros behind the end, which change no state."""
    return tl.load(ptr + token * stride, mask=token < length, other=0.0).to(tl.float32)


@jit
def load_slice(ptr, first, width, column, v_width):
    """A slice of a state's columns, (64, columns)."""
    d = first + tl.arange(0, _SLICE)
    mask = (d < width)[:, None] & (column < v_width)[None, :]
    return tl.load(ptr + d[:, None] * v_width + column[None, :], mask=mask, other=0.0)


@jit
def store_slice(ptr, x, first, width, column, v_width):
    """As `load_slice`."""
    d = first + tl.arange(0, _SLICE)
    mask = (d < width)[:, None] & (column < v_width)[None, :]
    tl.store(ptr + d[:, None] * v_width + column[None, :], x, mask=mask)


@jit
def rows_by(ptr, token, length, stride, first, width, state, PRECISION: tl.constexpr):
    """A slice of rows times a slice of a state: (tokens, columns)."""
    rows = load_part(ptr, token, length, stride, first, width, _SLICE)
    return tl.dot(rows, state, input_precision=PRECISION)


@jit
def rows_into(ptr, token, length, stride, first, width, factor, values, PRECISION: tl.constexpr):
    """What values (tokens, columns) add to a slice of a state, at rows times `factor` (tokens,)."""
    rows = load_part(ptr, token, length, stride, first, width, _SLICE)
    return tl.dot(tl.trans(rows), factor[:, None] * values, input_precision=PRECISION)


@jit
def sums_until(x, SIZE: tl.constexpr):
    """x_0 + .. + x_i."""
    i = tl.arange(0, SIZE)
    return tl.sum(tl.where(i[:, None] >= i[None, :], x[None, :], 0.0), 1)


@jit
def decays(later, earlier, causal):
    """exp(G_i - G_j) where causal, else 0."""
    return tl.where(causal, tl.exp(tl.where(causal, later[:, None] - earlier[None, :], 0.0)), 0.0)


@jit
def _inverse(a, SIZE: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangle, a row at a time: each is minus its own entries times all rows above. The
    product of powers of `a` that needs fewer steps cancels where keys repeat: those powers grow as binomials do."""
    i = tl.arange(0, SIZE)
    x = -a
    for row in tl.static_range(2, SIZE):
        r = tl.sum(tl.where(i[:, None] == row, x, 0.0), 0)
        r += tl.sum(tl.trans(tl.broadcast_to(r[None, :], SIZE, SIZE)) * x, 0)
        x = tl.where(i[:, None] == row, r[None, :], x)
    return x + tl.where(i[:, None] == i[None, :], 1.0, 0.0)


@jit
def _norms(squares, NORMALIZE: tl.constexpr):
    factor = squares * 0.0 + 1.0
    if NORMALIZE:
        factor = tl.rsqrt(squares + _EPS)
    return factor


@jit
def _squares(x):
    return tl.sum(x * x, 1)


@jit
def systems_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, inverse_ptr, attention_ptr, norms_ptr, length, chunks, heads, group, width, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, g_batch, g_token, g_head, beta_batch, beta_token, beta_head,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(I + A)^-1 and P of a chunk, (B Hv, chunks, 32, 32), and what makes unit rows of its queries and keys, (B Hv,
    chunks, 2, 32), float32. Products are of rows as they are stored, whose 16 bits TF32 takes as they are. Program: a
    chunk, a value head."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    i = tl.arange(0, _HALF)
    t0 = chunk * _CHUNK + i
    t1 = t0 + _HALF
    k_ptr += b * k_batch + h // group * k_head
    q_ptr += b * q_batch + h // group * q_head
    g_ptr += b * g_batch + h * g_head
    beta_ptr += b * beta_batch + h * beta_head
    a00 = tl.zeros((_HALF, _HALF), tl.float32)
    a11 = tl.zeros((_HALF, _HALF), tl.float32)
    a10 = tl.zeros((_HALF, _HALF), tl.float32)
    p00 = tl.zeros((_HALF, _HALF), tl.float32)
    p11 = tl.zeros((_HALF, _HALF), tl.float32)
    p10 = tl.zeros((_HALF, _HALF), tl.float32)
    k0_squares = tl.zeros((_HALF,), tl.float32)
    k1_squares = tl.zeros((_HALF,), tl.float32)
    q0_squares = tl.zeros((_HALF,), tl.float32)
    q1_squares = tl.zeros((_HALF,), tl.float32)
    first = 0
    while first < width:  # Triton 3.6 interprets no range of a runtime length
        k0 = load_part(k_ptr, t0, length, k_token, first, width, _PART)
        k1 = load_part(k_ptr, t1, length, k_token, first, width, _PART)
        a00 += tl.dot(k0, tl.trans(k0), input_precision=PRECISION)
        a11 += tl.dot(k1, tl.trans(k1), input_precision=PRECISION)
        a10 += tl.dot(k1, tl.trans(k0), input_precision=PRECISION)
        q0 = load_part(q_ptr, t0, length, q_token, first, width, _PART)
        q1 = load_part(q_ptr, t1, length, q_token, first, width, _PART)
        p00 += tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        p11 += tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        p10 += tl.dot(q1, tl.trans(k0), input_precision=PRECISION)
        k0_squares += _squares(k0)
        k1_squares += _squares(k1)
        q0_squares += _squares(q0)
        q1_squares += _squares(q1)
        first += _PART
    k0_norm, k1_norm = _norms(k0_squares, NORMALIZE), _norms(k1_squares, NORMALIZE)
    q0_norm, q1_norm = _norms(q0_squares, NORMALIZE), _norms(q1_squares, NORMALIZE)
    at = row.to(tl.int64) * chunks + chunk
    norms_ptr += at * 2 * _CHUNK
    tl.store(norms_ptr + i, q0_norm)
    tl.store(norms_ptr + _HALF + i, q1_norm)
    tl.store(norms_ptr + _CHUNK + i, k0_norm)
    tl.store(norms_ptr + _CHUNK + _HALF + i, k1_norm)
    g0 = load_numbers(g_ptr, t0, length, g_token)
    G0 = sums_until(g0, _HALF)
    G1 = tl.sum(g0, 0) + sums_until(load_numbers(g_ptr, t1, length, g_token), _HALF)
    b0 = load_numbers(beta_ptr, t0, length, beta_token) * k0_norm
    b1 = load_numbers(beta_ptr, t1, length, beta_token) * k1_norm
    causal = i[:, None] >= i[None, :]
    below = i[:, None] > i[None, :]
    everywhere = (i[:, None] + i[None, :]) >= 0
    # With the norms of rows j; those of rows i go with beta and the scale.
    d00 = decays(G0, G0, causal) * k0_norm[None, :]
    d11 = decays(G1, G1, causal) * k1_norm[None, :]
    d10 = decays(G1, G0, everywhere) * k0_norm[None, :]
    place = at * _CHUNK * _CHUNK + i[:, None] * _CHUNK + i[None, :]
    zeros = tl.zeros((_HALF, _HALF), tl.float32)
    tl.store(attention_ptr + place, p00 * d00 * (scale * q0_norm)[:, None])
    tl.store(attention_ptr + place + _HALF, zeros)
    tl.store(attention_ptr + place + _HALF * _CHUNK, p10 * d10 * (scale * q1_norm)[:, None])
    tl.store(attention_ptr + place + _HALF * _CHUNK + _HALF, p11 * d11 * (scale * q1_norm)[:, None])
    x00 = _inverse(tl.where(below, a00 * d00 * b0[:, None], 0.0), _HALF)
    x11 = _inverse(tl.where(below, a11 * d11 * b1[:, None], 0.0), _HALF)
    x10 = tl.dot(a10 * d10 * b1[:, None], x00, input_precision="ieee")
    x10 = -tl.dot(x11, x10, input_precision="ieee")
    tl.store(inverse_ptr + place, x00)
    tl.store(inverse_ptr + place + _HALF, zeros)
    tl.store(inverse_ptr + place + _HALF * _CHUNK, x10)
    tl.store(inverse_ptr + place + _HALF * _CHUNK + _HALF, x11)


@jit
def scan_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, inverse_ptr, attention_ptr, norms_ptr, state_ptr, end_ptr, out_ptr,
    states_ptr, solved_ptr, length, chunks, heads, group, width, v_width, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    beta_batch, beta_token, beta_head, out_batch, out_token, out_head,
    TWO: tl.constexpr, COLUMNS: tl.constexpr, READ: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From chunk to chunk. READ: what queries find goes to `out` and the last state to `end` (B Hv, Dk, Dv). KEEP: the
    state before each chunk goes to `states` (B Hv, chunks, Dk, Dv), U to `solved` (B Hv, tokens, Dv). TWO: keys are
    wider than a slice. Program: columns of a state, a value head."""
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    row = row.to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, _CHUNK)
    square = i[:, None] * _CHUNK + i[None, :]
    k_ptr += b * k_batch + h // group * k_head
    v_ptr += b * v_batch + h * v_head
    g_ptr += b * g_batch + h * g_head
    beta_ptr += b * beta_batch + h * beta_head
    if READ:
        q_ptr += b * q_batch + h // group * q_head
        out_ptr += b * out_batch + h * out_head
    state0 = load_slice(state_ptr + row * width * v_width, 0, width, column, v_width)
    state1 = state0
    if TWO:
        state1 = load_slice(state_ptr + row * width * v_width, _SLICE, width, column, v_width)
    chunk = 0
    while chunk < chunks:
        at = row * chunks + chunk
        if KEEP:
            store_slice(states_ptr + at * width * v_width, state0, 0, width, column, v_width)
            if TWO:
                store_slice(states_ptr + at * width * v_width, state1, _SLICE, width, column, v_width)
        token = chunk * _CHUNK + i
        inside = (token < length)[:, None] & (column < v_width)[None, :]
        g = load_numbers(g_ptr, token, length, g_token)
        beta = load_numbers(beta_ptr, token, length, beta_token)
        G, whole = sums_until(g, _CHUNK), tl.sum(g, 0)
        k_norm = tl.load(norms_ptr + at * 2 * _CHUNK + _CHUNK + i)
        known = rows_by(k_ptr, token, length, k_token, 0, width, state0, PRECISION)
        if TWO:
            known += rows_by(k_ptr, token, length, k_token, _SLICE, width, state1, PRECISION)
        v = tl.load(v_ptr + token[:, None] * v_token + column[None, :], mask=inside, other=0.0).to(tl.float32)
        right = beta[:, None] * (v - (tl.exp(G) * k_norm)[:, None] * known)
        u = tl.dot(tl.load(inverse_ptr + at * _CHUNK * _CHUNK + square), right, input_precision=PRECISION)
        if KEEP:
            place = solved_ptr + at * _CHUNK * v_width
            tl.store(place + i[:, None] * v_width + column[None, :], u, mask=inside)
        if READ:
            out = rows_by(q_ptr, token, length, q_token, 0, width, state0, PRECISION)
            if TWO:
                out += rows_by(q_ptr, token, length, q_token, _SLICE, width, state1, PRECISION)
            out *= (tl.exp(G) * scale * tl.load(norms_ptr + at * 2 * _CHUNK + i))[:, None]
            out += tl.dot(tl.load(attention_ptr + at * _CHUNK * _CHUNK + square), u, input_precision=PRECISION)
            place = token[:, None] * out_token + column[None, :]
            tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
        end = tl.exp(whole - G) * k_norm
        state0 *= tl.exp(whole)
        state0 += rows_into(k_ptr, token, length, k_token, 0, width, end, u, PRECISION)
        if TWO:
            state1 *= tl.exp(whole)
            state1 += rows_into(k_ptr, token, length, k_token, _SLICE, width, end, u, PRECISION)
        chunk += 1
    if READ:
        store_slice(end_ptr + row * width * v_width, state0, 0, width, column, v_width)
        if TWO:
            store_slice(end_ptr + row * width * v_width, state1, _SLICE, width, column, v_width)


def types_of(x: str, names: tuple[str, ...], floats: tuple[str, ...], numbers: tuple[str, ...]) -> dict[str, str]:
    """Types of a kernel's arguments: `names` are inputs with strides, of which g is float32 and the rest `x`."""
    types = {f"{name}_ptr": f"*{'fp32' if name in ('g', 'dg') else x}:16" for name in names}
    types |= {f"{name}_ptr": "*fp32:16" for name in floats} | dict.fromkeys(numbers, "i32")
    types |= {f"{name}_{stride}": "i32" for name in names for stride in STRIDES}
    return types | {"scale": "fp32"}


def heads_of(cc: int) -> list[tuple[str, bool]]:
    """Dtypes of models, and whether keys take two slices, on compute capability `cc`. On Turing none: Triton has no
    tensor cores for it, and products of these sizes out of registers spill some kilobytes a thread; nor does float32,
    whose accuracy takes three products each, which spill as much."""
    return [(x, two) for x in ("bf16", "fp16") for two in (False, True)] if cc >= LEAST_CARD else []


def compile_cases(cc: int) -> list[CompileCase]:
    """Narrow and wide heads in both dtypes; the scan that reads and the one that keeps."""
    cases = []
    sizes = ("length", "chunks", "heads", "group", "width")
    for x, two in heads_of(cc):
        if two:  # the same for all widths
            constants = {"NORMALIZE": True, "PRECISION": PRECISION}
            types = types_of(x, ("q", "k", "g", "beta"), ("inverse", "attention", "norms"), sizes)
            cases.append(compile_case(f"delta systems {x}", systems_kernel, types, constants, SYSTEM_WARPS))
        types = types_of(
            x, ("q", "k", "v", "g", "beta", "out"),
            ("inverse", "attention", "norms", "state", "end", "states", "solved"), (*sizes, "v_width"),
        )  # fmt: skip
        for read in (True, False):
            name = f"delta {'scan' if read else 'scan again'} {x} {64 * (1 + two)}"
            some = {"TWO": two, "COLUMNS": COLUMNS, "READ": read, "KEEP": not read, "PRECISION": PRECISION}
            absent = ("states", "solved") if read else ("q", "attention", "end", "out")
            kinds = types | {f"{name}_ptr": None for name in absent}
            cases.append(compile_case(name, scan_kernel, kinds, some, SCAN_WARPS))
    return cases
