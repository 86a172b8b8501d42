"""The gated delta rule in chunks of 32 tokens, by Triton: the systems of a segment, then its states in their order.

Letters are those of `delta_chunks.py`. Chunks are half as long as there: of the 16-row tiles that a tensor core wants a
chunk then has two, so that (I + A)^-1 is two small inverses and one product, and what a program holds fits the shared
memory of a consumer card.
"""

from __future__ import annotations

from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, jit, tl

CHUNK = 32
WIDEST = 128  # key: the state's tile of a program is that many rows high
NARROWEST = 64  # tile; narrower keys are padded in it
COLUMNS = 32  # of a state, a program
LEAST_CARD = 80  # compute capability
SYSTEM_WARPS, SCAN_WARPS = 2, 4
_constant = tl.constexpr if HAS_TRITON else int
_CHUNK = _constant(CHUNK)
_HALF = _constant(CHUNK // 2)
_EPS = _constant(1e-6)


@jit
def load_rows(ptr, token, length, stride, width, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr):
    """Rows of queries or keys, (tokens, BLOCK) float32, and the factor that made them unit rows."""
    d = tl.arange(0, BLOCK)
    x = tl.load(
        ptr + token[:, None] * stride + d[None, :], mask=(token < length)[:, None] & (d < width)[None, :], other=0.0
    ).to(tl.float32)
    r = tl.sum(x * 0.0, 1) + 1.0
    if NORMALIZE:
        r = tl.rsqrt(tl.sum(x * x, 1) + _EPS)
    return x * r[:, None], r


@jit
def load_numbers(ptr, token, length, stride):
    """A number a token, float32: zeros behind the end, which change no state."""
    return tl.load(ptr + token * stride, mask=token < length, other=0.0).to(tl.float32)


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
def systems_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, inverse_ptr, attention_ptr, length, chunks, heads, group, width, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, g_batch, g_token, g_head, beta_batch, beta_token, beta_head,
    BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(I + A)^-1 and P of a chunk: (B Hv, chunks, 32, 32) float32. Program: a chunk, a value head."""
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
    k0, _ = load_rows(k_ptr, t0, length, k_token, width, BLOCK, NORMALIZE)
    k1, _ = load_rows(k_ptr, t1, length, k_token, width, BLOCK, NORMALIZE)
    g0 = load_numbers(g_ptr, t0, length, g_token)
    G0 = sums_until(g0, _HALF)
    G1 = tl.sum(g0, 0) + sums_until(load_numbers(g_ptr, t1, length, g_token), _HALF)
    b0 = load_numbers(beta_ptr, t0, length, beta_token)
    b1 = load_numbers(beta_ptr, t1, length, beta_token)
    causal = i[:, None] >= i[None, :]
    below = i[:, None] > i[None, :]
    everywhere = (i[:, None] + i[None, :]) >= 0
    d00, d11, d10 = decays(G0, G0, causal), decays(G1, G1, causal), decays(G1, G0, everywhere)
    k0t, k1t = tl.trans(k0), tl.trans(k1)
    a00 = tl.where(below, tl.dot(k0, k0t, input_precision=PRECISION) * d00 * b0[:, None], 0.0)
    a11 = tl.where(below, tl.dot(k1, k1t, input_precision=PRECISION) * d11 * b1[:, None], 0.0)
    a10 = tl.dot(k1, k0t, input_precision=PRECISION) * d10 * b1[:, None]
    x00, x11 = _inverse(a00, _HALF), _inverse(a11, _HALF)
    x10 = -tl.dot(x11, tl.dot(a10, x00, input_precision="ieee"), input_precision="ieee")
    at = (row.to(tl.int64) * chunks + chunk) * _CHUNK * _CHUNK
    place = i[:, None] * _CHUNK + i[None, :]
    zeros = a00 * 0.0
    tl.store(inverse_ptr + at + place, x00)
    tl.store(inverse_ptr + at + place + _HALF, zeros)
    tl.store(inverse_ptr + at + place + _HALF * _CHUNK, x10)
    tl.store(inverse_ptr + at + place + _HALF * _CHUNK + _HALF, x11)
    q0, _ = load_rows(q_ptr, t0, length, q_token, width, BLOCK, NORMALIZE)
    q1, _ = load_rows(q_ptr, t1, length, q_token, width, BLOCK, NORMALIZE)
    p00 = tl.dot(q0, k0t, input_precision=PRECISION) * d00 * scale
    p11 = tl.dot(q1, k1t, input_precision=PRECISION) * d11 * scale
    p10 = tl.dot(q1, k0t, input_precision=PRECISION) * d10 * scale
    tl.store(attention_ptr + at + place, p00)
    tl.store(attention_ptr + at + place + _HALF, zeros)
    tl.store(attention_ptr + at + place + _HALF * _CHUNK, p10)
    tl.store(attention_ptr + at + place + _HALF * _CHUNK + _HALF, p11)


@jit
def scan_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, inverse_ptr, attention_ptr, state_ptr, end_ptr, out_ptr, states_ptr,
    solved_ptr, length, chunks, heads, group, width, v_width, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    beta_batch, beta_token, beta_head, out_batch, out_token, out_head,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, READ: tl.constexpr, KEEP: tl.constexpr, NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From chunk to chunk. READ: what queries find goes to `out` and the last state to `end` (B Hv, Dk, Dv). KEEP: the
    state before each chunk goes to `states` (B Hv, chunks, Dk, Dv), U to `solved` (B Hv, tokens, Dv). Program: columns
    of a state, a value head."""
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
    k_ptr += b * k_batch + h // group * k_head
    v_ptr += b * v_batch + h * v_head
    g_ptr += b * g_batch + h * g_head
    beta_ptr += b * beta_batch + h * beta_head
    if READ:
        q_ptr += b * q_batch + h // group * q_head
        out_ptr += b * out_batch + h * out_head
    state = tl.load(state_ptr + row * width * v_width + place, mask=within, other=0.0)
    for chunk in range(0, chunks):
        token = chunk * _CHUNK + i
        inside = (token < length)[:, None] & (column < v_width)[None, :]
        k, _ = load_rows(k_ptr, token, length, k_token, width, BLOCK, NORMALIZE)
        v = tl.load(v_ptr + token[:, None] * v_token + column[None, :], mask=inside, other=0.0).to(tl.float32)
        g = load_numbers(g_ptr, token, length, g_token)
        beta = load_numbers(beta_ptr, token, length, beta_token)
        G, whole = sums_until(g, _CHUNK), tl.sum(g, 0)
        at = row * chunks + chunk
        inverse = tl.load(inverse_ptr + at * _CHUNK * _CHUNK + square)
        if KEEP:
            tl.store(states_ptr + at * width * v_width + place, state, mask=within)
        r = beta[:, None] * (v - tl.exp(G)[:, None] * tl.dot(k, state, input_precision=PRECISION))
        u = tl.dot(inverse, r, input_precision=PRECISION)
        if KEEP:
            tl.store(solved_ptr + (at * _CHUNK + i[:, None]) * v_width + column[None, :], u, mask=inside)
        if READ:
            q, _ = load_rows(q_ptr, token, length, q_token, width, BLOCK, NORMALIZE)
            attention = tl.load(attention_ptr + at * _CHUNK * _CHUNK + square)
            out = (tl.exp(G) * scale)[:, None] * tl.dot(q, state, input_precision=PRECISION)
            out += tl.dot(attention, u, input_precision=PRECISION)
            place_out = token[:, None] * out_token + column[None, :]
            tl.store(out_ptr + place_out, out.to(out_ptr.dtype.element_ty), mask=inside)
        state = state * tl.exp(whole)
        state += tl.dot(tl.trans(k * tl.exp(whole - G)[:, None]), u, input_precision=PRECISION)
    if READ:
        tl.store(end_ptr + row * width * v_width + place, state, mask=within)


STRIDES = ("batch", "token", "head")


def types_of(x: str, names: tuple[str, ...], floats: tuple[str, ...], numbers: tuple[str, ...]) -> dict[str, str]:
    """Types of a kernel's arguments: `names` are inputs with strides, of which g is float32 and the rest `x`."""
    types = {f"{name}_ptr": f"*{'fp32' if name == 'g' else x}:16" for name in names}
    types |= {f"{name}_ptr": "*fp32:16" for name in floats} | dict.fromkeys(numbers, "i32")
    types |= {f"{name}_{stride}": "i32" for name in names for stride in STRIDES}
    return types | {"scale": "fp32"}


def heads_of(cc: int) -> list[tuple[str, int]]:
    """Dtypes of models and heights of tiles on compute capability `cc`. On Turing none: Triton has no tensor cores for
    it, and products of these sizes out of registers spill some kilobytes a thread."""
    halves = [("bf16", 64), ("bf16", 128), ("fp16", 128)]
    return [] if cc < LEAST_CARD else [*halves, ("fp32", 64), ("fp32", 128)]


def precision_of(x: str) -> str:
    """Of products, whose operands are float32: where all inputs had 16 bits, the 11 of TF32 lose less than rounding the
    results will; of float32, three such products have its accuracy."""
    return "tf32x3" if x == "fp32" else "tf32"


def compile_cases(cc: int) -> list[CompileCase]:
    """Narrow and wide heads in all dtypes; the scan that reads and the one that keeps."""
    cases = []
    sizes = ("length", "chunks", "heads", "group", "width")
    for x, block in heads_of(cc):
        constants = {"BLOCK": block, "NORMALIZE": True, "PRECISION": precision_of(x)}
        types = types_of(x, ("q", "k", "g", "beta"), ("inverse", "attention"), sizes)
        cases.append(compile_case(f"delta systems {x} {block}", systems_kernel, types, constants, SYSTEM_WARPS))
        types = types_of(
            x, ("q", "k", "v", "g", "beta", "out"),
            ("inverse", "attention", "state", "end", "states", "solved"), (*sizes, "v_width"),
        )  # fmt: skip
        constants |= {"COLUMNS": COLUMNS}
        for read in (True, False):
            name = f"delta {'scan' if read else 'scan again'} {x} {block}"
            some = constants | {"READ": read, "KEEP": not read}
            absent = ("states", "solved") if read else ("q", "attention", "end", "out")
            kinds = types | {f"{name}_ptr": None for name in absent}
            cases.append(compile_case(name, scan_kernel, kinds, some, SCAN_WARPS))
    return cases
