"""The one pass over the logits that drawing a token needs: log-sum-exps of blocks of 128 ids.

`rollout.noise.draw` picks a block by its mass, then an id in it. Done by PyTorch operators, the scaled and masked
logits are written once or twice and read some eight times: the masses, and once more all of them for the log-prob's
denominator. Here they are read once and never written, (R, V / 128) masses come out, and everything after that works
on those and on the 128 logits of the drawn block.

With z = logit / T, blocks B_b of `BLOCK` ids and `known` ids that have a token:

    mass[b]   = log sum_{v in B_b, v < known} exp(z_v)      what is drawn from
    whole[b]  = log sum_{v in B_b} exp(z_v)                 its log-sum-exp is the denominator of log-probs

Memory: 8 R V / 128 bytes; half of that where all ids are known. No atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, device_guard, jit, require_triton, tl
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128
# Blocks a program: 8 x 128 logits over four warps are eight a thread, and 8 rows of Qwen's vocabulary 1,192 programs.
_BLOCKS = 8
_WARPS = 4


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


def compile_cases(cc: int) -> list[CompileCase]:
    """Both specializations, for any compute capability."""
    types = {name: "*fp32:16" for name in ("logits_ptr", "mass_ptr", "whole_ptr")} | {"temperature": "fp32"}
    types |= dict.fromkeys(("vocab", "known", "blocks", "stride"), "i32")
    sizes = {"BLOCKS": _BLOCKS, "BLOCK": BLOCK}
    return [
        compile_case(f"block_masses some={some}", _block_masses_kernel, types, {"SOME": some, **sizes}, _WARPS)
        for some in (False, True)
    ]
