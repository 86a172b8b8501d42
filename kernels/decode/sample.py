"""Drawing a token in two launches: one pass over the logits for log-sum-exps of blocks of 128 ids, and the draw.

`noise.draw` picks a block by its mass, then an id in it. Done by PyTorch operators, the scaled and masked logits are
written once or twice and read some eight times: the masses, and once more all of them for the log-prob's denominator.
Here they are read once and never written, (R, V / 128) masses come out, and the second launch works on those and on the
128 logits of the drawn block: random numbers, both draws and the log-prob, where operators make some hundred launches.

With z = logit / T, blocks B_b of `BLOCK` ids and `known` ids that have a token:

    mass[b]   = log sum_{v in B_b, v < known} exp(z_v)      what is drawn from
    whole[b]  = log sum_{v in B_b} exp(z_v)                 its log-sum-exp is the denominator of log-probs

Memory: 8 R V / 128 bytes; half of that where all ids are known. No atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.card import power_of_2
from lowvram_grpo.kernels.decode.noise import BLOCK, GOLDEN, MULTIPLIERS, draw_block, draw_inside
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, device_guard, jit, require_triton, tl
from torch import Tensor
from torch.nn import functional as F

# Blocks a program: 8 x 128 logits over four warps are eight a thread, and 8 rows of Qwen's vocabulary 1,192 programs.
_BLOCKS = 8
_WARPS = 4
MOST_BLOCKS = 8192  # whose noise one program holds: a million ids
_constant = tl.constexpr if HAS_TRITON else int
_GOLDEN, _FIRST, _SECOND = _constant(GOLDEN), _constant(MULTIPLIERS[0]), _constant(MULTIPLIERS[1])


def has_kernel(logits: Tensor) -> bool:
    return HAS_TRITON and logits.is_cuda


def block_masses(logits: Tensor, temperature: float = 1.0, known: int | None = None) -> tuple[Tensor, Tensor]:
    """(mass, whole), float32 (R, ceil(V / 128)) each, the same tensor where all ids are known.

    Args:
        logits: float32 (R, V), before the temperature; not changed.
        known: ids below this have a token; None: all.
    """
    if has_kernel(logits):
        return block_masses_triton(logits, temperature, known)
    return block_masses_ref(logits, temperature, known)


def block_masses_ref(logits: Tensor, temperature: float = 1.0, known: int | None = None) -> tuple[Tensor, Tensor]:
    vocab = logits.shape[1]
    blocks = F.pad(logits / temperature, (0, -vocab % BLOCK), value=-torch.inf).unflatten(1, (-1, BLOCK))
    whole = blocks.logsumexp(2)
    if known is None or known >= vocab:
        return whole, whole
    unknown = torch.arange(blocks.shape[1] * BLOCK, device=logits.device).view(-1, BLOCK) >= known
    return blocks.masked_fill(unknown, -torch.inf).logsumexp(2), whole


def block_masses_triton(logits: Tensor, temperature: float = 1.0, known: int | None = None) -> tuple[Tensor, Tensor]:
    """As `block_masses`, by the kernel."""
    require_triton("block_masses_triton", logits, "block_masses")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    mass = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    some = known is not None and known < vocab
    whole = torch.empty_like(mass) if some else mass
    if rows:
        with device_guard(logits):
            _block_masses_kernel[(rows, -(-blocks // _BLOCKS))](
                logits, mass, whole, vocab, known if some else vocab, blocks, logits.stride(0), temperature, SOME=some,
                BLOCKS=_BLOCKS, BLOCK=BLOCK, num_warps=_WARPS,
            )  # fmt: skip
    return mass, whole


@jit
def _block_logsumexp(x):
    """(n,) of (n, m); rows of -inf, and infinite entries, as torch.logsumexp has them."""
    top = tl.max(x, 1)
    top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    return top + tl.log(tl.sum(tl.exp(x - top[:, None]), 1))


@jit
def _block_masses_kernel(
    logits_ptr, mass_ptr, whole_ptr, vocab, known, blocks, stride, temperature,
    SOME: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCKS blocks of a row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    v = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits_ptr + row * stride + v, mask=v < vocab, other=float("-inf")) / temperature
    whole = _block_logsumexp(x)
    tl.store(whole_ptr + row * blocks + block, whole, mask=block < blocks)
    if SOME:
        mass = _block_logsumexp(tl.where(v < known, x, float("-inf")))
        tl.store(mass_ptr + row * blocks + block, mass, mask=block < blocks)


# The draw


def draw_by_masses(
    logits: Tensor, mass: Tensor, whole: Tensor, keys: Tensor, steps: Tensor, temperature: float, known: int | None
) -> tuple[Tensor, Tensor]:
    """(R,) int64 ids drawn from softmax(logits / T) over the known ids, and their float32 log-probs over all of them.

    Args:
        logits: float32 (R, V), before the temperature.
        mass, whole: of `block_masses`.
        keys, steps: int64 (R,), see `noise.gumbel`.
    """
    if has_kernel(logits) and mass.shape[1] <= MOST_BLOCKS:
        return draw_by_masses_triton(logits, mass, whole, keys, steps, temperature, known)
    return draw_by_masses_ref(logits, mass, whole, keys, steps, temperature, known)


def draw_by_masses_ref(
    logits: Tensor, mass: Tensor, whole: Tensor, keys: Tensor, steps: Tensor, temperature: float, known: int | None
) -> tuple[Tensor, Tensor]:
    vocab = logits.shape[1]
    block = draw_block(mass, keys, steps)
    ids = block[:, None] * BLOCK + torch.arange(BLOCK, device=logits.device)
    inside = logits.gather(1, ids.clamp(max=vocab - 1)) / temperature
    out = ids >= (vocab if known is None else min(known, vocab))
    tokens = draw_inside(inside.masked_fill(out, -torch.inf), block, keys, steps)
    return tokens, inside.gather(1, (tokens - block * BLOCK)[:, None])[:, 0] - whole.logsumexp(1)


def draw_by_masses_triton(
    logits: Tensor, mass: Tensor, whole: Tensor, keys: Tensor, steps: Tensor, temperature: float, known: int | None
) -> tuple[Tensor, Tensor]:
    """As `draw_by_masses`, by the kernel, for up to MOST_BLOCKS blocks."""
    require_triton("draw_by_masses_triton", logits, "draw_by_masses")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    (rows, vocab), blocks = logits.shape, mass.shape[1]
    tokens = torch.empty(rows, dtype=torch.long, device=logits.device)
    logps = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        wide = power_of_2(blocks)
        with device_guard(logits):
            _draw_kernel[(rows,)](
                logits, mass, whole, keys, steps, tokens, logps, vocab, vocab if known is None else min(known, vocab),
                blocks, logits.stride(0), keys.stride(0), steps.stride(0), temperature, WIDE=wide, BLOCK=BLOCK,
                num_warps=_draw_warps(wide),
            )  # fmt: skip
    return tokens, logps


def _draw_warps(wide: int) -> int:
    return min(16, max(1, wide // 256))


@jit
def _mix(x):
    """splitmix64's finalizer on uint64."""
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)


@jit
def _gumbel(key, step, index):
    """float64 noise of numbers `index` of the stream that begins at `step`; all uint64."""
    bits = _mix(_mix(key + step * _GOLDEN) + (index + 1) * _GOLDEN) >> 11
    return -tl.log(-tl.log((bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16))


@jit
def _largest(x):
    return tl.argmax(tl.where(x == x, x, float("-inf")), 0)


@jit
def _draw_kernel(
    logits_ptr, mass_ptr, whole_ptr, keys_ptr, steps_ptr, tokens_ptr, logps_ptr, vocab, known, blocks, stride,
    keys_stride, steps_stride, temperature, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a row."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(keys_ptr + row * keys_stride).to(tl.uint64, bitcast=True)
    step = 2 * tl.load(steps_ptr + row * steps_stride).to(tl.uint64, bitcast=True) + 1
    b = tl.arange(0, WIDE)
    mass = tl.load(mass_ptr + row * blocks + b, mask=b < blocks, other=float("-inf")).to(tl.float64)
    # Where nothing can be drawn, for NaNs or infinities, the id must be one all the same.
    block = tl.minimum(_largest(mass + _gumbel(key, step, b.to(tl.uint64))), blocks - 1)
    whole = tl.load(whole_ptr + row * blocks + b, mask=b < blocks, other=float("-inf"))
    top = tl.max(whole, 0)
    top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    whole = top + tl.log(tl.sum(tl.exp(whole - top), 0))
    i = tl.arange(0, BLOCK)
    v = block * BLOCK + i
    inside = tl.load(logits_ptr + row * stride + v, mask=v < vocab, other=float("-inf")) / temperature
    noisy = tl.where(v < known, inside, float("-inf")).to(tl.float64) + _gumbel(key, step + 1, i.to(tl.uint64))
    at = tl.minimum(_largest(noisy), vocab - 1 - block * BLOCK)
    tl.store(tokens_ptr + row, (block * BLOCK + at).to(tl.int64))
    tl.store(logps_ptr + row, tl.sum(tl.where(i == at, inside, 0.0), 0) - whole)


def compile_cases(cc: int) -> list[CompileCase]:
    """Both specializations, for any compute capability."""
    types = {name: "*fp32:16" for name in ("logits_ptr", "mass_ptr", "whole_ptr")} | {"temperature": "fp32"}
    types |= dict.fromkeys(("vocab", "known", "blocks", "stride"), "i32")
    sizes = {"BLOCKS": _BLOCKS, "BLOCK": BLOCK}
    cases = [
        compile_case(f"block_masses some={some}", _block_masses_kernel, types, {"SOME": some, **sizes}, _WARPS)
        for some in (False, True)
    ]
    types |= {name: "*i64" for name in ("keys_ptr", "steps_ptr")} | {"tokens_ptr": "*i64:16", "logps_ptr": "*fp32:16"}
    types |= dict.fromkeys(("keys_stride", "steps_stride"), "i32")
    for wide in (1, 512, 2048, MOST_BLOCKS):
        constants = {"WIDE": wide, "BLOCK": BLOCK, "keys_stride": 1, "steps_stride": 1}
        cases.append(compile_case(f"draw {wide}", _draw_kernel, types, constants, _draw_warps(wide)))
    # Keys and steps that do not lie side by side.
    cases.append(compile_case("draw apart", _draw_kernel, types, {"WIDE": 1, "BLOCK": BLOCK}, _draw_warps(1)))
    return cases
