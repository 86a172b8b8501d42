"""Which of the kernels for small operations are taken here: asked for or expected to be faster, and proven on this
device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import is_out_of_memory
from lowvram_grpo.kernels.card import card
from lowvram_grpo.kernels.decode.logits import linear_logits
from lowvram_grpo.kernels.decode.noise import GOLDEN, signed
from lowvram_grpo.kernels.decode.sample import block_masses, block_masses_ref, draw_by_masses, draw_by_masses_ref
from lowvram_grpo.kernels.decode.small_product import FourBit, Sibling, small_product, small_product_ref
from lowvram_grpo.kernels.decode.small_product_kernel import all_tiles
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.layer import gradients as layer_gradients
from lowvram_grpo.kernels.layer import ops as layer_ops
from lowvram_grpo.kernels.layer.nf4_dense import dense_nf4
from lowvram_grpo.kernels.layer.ops import rms_norm, rms_norm_ref, rope, rope_ref, swiglu, swiglu_ref
from lowvram_grpo.kernels.quantized import Int8Weight, NF4Weight
from lowvram_grpo.kernels.recurrent.delta_chunks import Inputs, delta_rule_tokens
from lowvram_grpo.kernels.recurrent.delta_rule import gated_delta_rule
from lowvram_grpo.kernels.recurrent.delta_step import gated_delta_step, gated_delta_step_ref
from lowvram_grpo.kernels.recurrent.short_conv import (
    causal_conv,
    causal_conv_ref,
    causal_conv_step,
    causal_conv_step_ref,
)
from lowvram_grpo.kernels.runtime import trial

MODES = ("auto", "on", "off")
# What `auto` takes on CUDA, where a trial on that very card is passed. Modelled, not measured: these follow from counts
# that no card can overturn. int8_head moves 1 byte a weight where the product by tiles moves 5; rms_norm is one launch
# for 7, swiglu one for 2, rope one for 10, and sample two for some hundred, which read the logits once where operators
# read them some eight times.
# A gated delta rule keeps a few states where transformers' function keeps some thirty tensors of the size of queries,
# in any form of ours, and 2 launches a segment are for 6 a chunk and forty more; its step is one launch for thirty and
# moves a state twice where they move it eight times; a short convolution is one for five.
# Whether a product of ours is faster than bitsandbytes' or cuBLAS' own does not follow from counting, so those wait for
# a card: benchmarks/calibrate.py proposes changes to this list from measured rows.
EXPECTED_FASTER: tuple[str, ...] = (
    "int8_head", "rms_norm", "swiglu", "rope", "sample", "rms_norm_grad", "swiglu_grad", "rope_grad", "nf4_dense",
    "delta_rule", "delta_rule_grad", "delta_step", "short_conv", "short_conv_grad",
)  # fmt: skip


def wanted(kind: str, enabled: str) -> bool:
    """Whether a kind of kernel (one of TRIALS) is asked for, or expected to be faster."""
    return enabled == "on" or (enabled == "auto" and kind in EXPECTED_FASTER)


def usable(kind: str, device: torch.device, enabled: str) -> bool:
    """Whether a kernel that replaces no module (`sample`, `int8_head`) is wanted, and runs on this device. A memory
    plan on meta tensors counts it only where it is asked for: what `auto` falls back to needs more."""
    if device.type == "meta" and enabled == "auto":
        return False
    return wanted(kind, enabled) and passes_trial(kind, device, torch.float32 if kind == "sample" else _half(device))


def model_dtypes(model: nn.Module, device: torch.device, autocast: torch.dtype | None) -> set[torch.dtype]:
    """Those that passes of a model on `device` are computed in, by its weights and autocast (or the one that is on)."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | ({autocast} - {None})
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.get_autocast_dtype("cuda"))
    return dtypes


def _half(device: torch.device) -> torch.dtype:
    """The 16-bit dtype that models are computed in there: a trial in another would try another kernel."""
    return torch.bfloat16 if device.type == "cuda" and card(device)[0] >= 80 else torch.float16


@trial
def passes_trial(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel compiles here and is right: asked once a process, since Triton needs more than a GPU, and
    bfloat16 more than an old one. Without the kernel there is nothing to gain on CUDA."""
    if device.type != "cuda":
        return True
    x = random_numbers(3, 4, 5, 64).to(device, dtype)
    if not layer_ops.uses_triton(x):
        return False
    try:
        found, expected = TRIALS[kind](x)
        near = 1e-4 if dtype == torch.float32 else 0.02
        return torch.allclose(found.float(), expected.float(), rtol=near, atol=near)
    except Exception as error:  # a compiler that is missing, a driver too old: eager code still runs
        if is_out_of_memory(error):
            raise
        return False


def random_numbers(*shape: int, seed: int = 0) -> Tensor:
    """float32 on the CPU; the global generator stays where it is."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def _compared(kernel: Callable, reference: Callable, arguments: Callable[[Tensor], tuple]) -> Callable:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        given = arguments(x)
        return kernel(*given), reference(*given)

    return run


def _with_gradients(kernel: Callable, reference: Callable, arguments: Callable[[Tensor], tuple], trained: int):
    """Results, and gradients to the first `trained` arguments, in one tensor."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return _and_gradients(kernel, arguments(x), trained), _and_gradients(reference, arguments(x), trained)

    return run


# A trial launches what a run launches: every tile, and enough steps and blocks that loads are fetched ahead and sums go
# over several warps. What does not compile is to be found here, and so is what compiles and is wrong.
def _wide(x: Tensor) -> tuple[Tensor, Tensor]:
    """From (3, 4, 5, 64) numbers: (4, 320) and (8, 320)."""
    return x[0].reshape(4, -1), x[1:].reshape(8, -1)


def _int8_head(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, weight = _wide(x)
    rows, head = rows.repeat(16, 1) / 4, Head(Int8Weight.quantize(weight))
    found = ([linear_logits(rows[:n], head, fused=fused) for n in (16, 32, 64)] for fused in (True, False))
    return tuple(map(torch.cat, found))


def _sample(x: Tensor) -> tuple[Tensor, Tensor]:
    """(masses, blocks, ids in them, log-probs): rows of 32,960 ids, of which the last 200 cannot be drawn."""
    logits, found = _wide(x)[0][:2].float().repeat(1, 103), []
    known = logits.shape[1] - 200
    keys = torch.arange(1, len(logits) + 1, device=x.device) * signed(GOLDEN)
    for masses, drawn in ((block_masses, draw_by_masses), (block_masses_ref, draw_by_masses_ref)):
        mass, whole = masses(logits, 0.7, known)
        ids, logps = drawn(logits, mass, whole, keys, keys % 7, 0.7, known)
        found.append(torch.cat([mass.flatten(), (ids // 128).float(), (ids % 128).float(), logps]))
    return found[0], found[1]


def _small_product(x: Tensor, *, four_bit: bool) -> tuple[Tensor, Tensor]:
    rows, weight = _wide(x)
    # Sums around 1: a tipped rounding of the base product must stay far below the tolerance, a wrong term far above.
    rows = rows.repeat(5, 1) / 32
    up, bias, z = weight[:, :3].T.contiguous(), weight[:, 4] / 8, 8 * rows[:, :3]
    if four_bit:
        packed = NF4Weight.quantize(weight)
        weight = FourBit(
            packed.packed.view(-1), packed.shape, packed.code, packed.absmax.view(-1), *packed.nested,
            torch.full((1,), packed.offset, device=x.device), packed.nested_block,
        )  # fmt: skip
    layer = [Sibling(weight, bias, up)]
    found = [small_product(rows, layer, z, tiles)[0] for tiles in all_tiles(card(x.device)[0])]
    return torch.cat(found), torch.cat(small_product_ref(rows, layer, z) * len(found))


def _ropes(function: Callable, *given: Tensor) -> Tensor:
    return torch.cat(function(*given), 1)


@torch.enable_grad()
def _and_gradients(function: Callable, arguments: tuple, trained: int) -> Tensor:
    inputs = [x.detach().clone().requires_grad_() for x in arguments[:trained]]
    outs = function(*inputs, *arguments[trained:])
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    if not trained:
        return torch.cat([out.flatten().float() for out in outs])
    dys = [out.detach().flip(0) for out in outs]
    return torch.cat([x.detach().flatten().float() for x in (*outs, *torch.autograd.grad(outs, inputs, dys))])


def _nf4_dense(x: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(x[0].flatten(), quant_type="nf4", blocksize=64, compress_statistics=True)
    return dense_nf4(packed, state, x.dtype), dequantize_4bit(packed, state).view(state.shape)


def _delta_rule(x: Tensor, *, trained: bool) -> tuple[Tensor, Tensor]:
    """Both tiles, over more chunks than a segment has, the last one short, and two value heads a key head."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for width, seed in ((48, 1), (128, 2)):
        q, k, v, state = (random_numbers(1, *s, seed=seed + i).to(x) for i, s in enumerate(_delta_shapes(width)))
        gates = random_numbers(1, 75, 2, 2, seed=seed).to(x)
        given = q, k, v, -gates[..., 0].float().abs() / 8, gates[..., 1].sigmoid(), state.float()
        for results, function in zip(found, (gated_delta_rule, _tokens)):
            results.append(_and_gradients(function, given, 6 if trained else 0))
    return torch.cat(found[0]), torch.cat(found[1])


def _delta_shapes(width: int) -> list[tuple[int, ...]]:
    return [(75, 1, width), (75, 1, width), (75, 2, 40), (2, width, 40)]


def _tokens(*given: Tensor) -> tuple[Tensor, Tensor]:
    return delta_rule_tokens(Inputs(*given[:5]), given[5])


def _delta_step(x: Tensor) -> tuple[Tensor, Tensor]:
    """States of two sizes; what was read of each, and what has become of it."""
    found: list[list[Tensor]] = [[], []]
    for width in (64, 128):
        q, k, v = (random_numbers(3, heads, width, seed=heads).to(x) for heads in (1, 1, 2))
        gates, state = random_numbers(3, 2, 2, seed=5).to(x), random_numbers(3, 2, width, width, seed=6).to(x.device)
        for results, step in zip(found, (gated_delta_step, gated_delta_step_ref)):
            own = state.clone()
            out = step(q, k + q, v, -gates[..., 0].float().abs(), gates[..., 1].sigmoid(), own)
            results += [out.flatten().float(), own.flatten()]
    return torch.cat(found[0]), torch.cat(found[1])


def _short_conv(x: Tensor, *, trained: bool) -> tuple[Tensor, Tensor]:
    """Filters of 3 and 4 taps over tokens in both orders of memory; and the step, which has no gradient."""
    found: list[list[Tensor]] = [[], []]
    for taps, act in ((3, None), (4, "silu")):
        weight, state = random_numbers(64, taps, seed=taps).to(x), x[1, :, :taps].mT.contiguous()
        for seen in (x[0].mT, x[0].mT.contiguous()):
            for results, conv in zip(found, (causal_conv, causal_conv_ref)):
                results.append(_and_gradients(conv, (seen, weight, None, act), 1 if trained else 0))
        for results, step in zip(found, (causal_conv_step, causal_conv_step_ref)):
            own = state.clone()
            results += [step(x[0, :, 0], own, weight, weight[:, 0], act).flatten().float(), own.flatten().float()]
    return torch.cat(found[0]), torch.cat(found[1])


# Of each kind, from random numbers (3, 4, 5, 64) of the device and dtype in question: what the kernel finds, and what
# eager code does.
TRIALS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "rms_norm": _compared(rms_norm, rms_norm_ref, lambda x: (x, x[0, 0, 0], 1e-6)),
    "swiglu": _compared(swiglu, swiglu_ref, lambda x: (x, x + 1)),
    "rope": _compared(partial(_ropes, rope), partial(_ropes, rope_ref), lambda x: (x, x[:, :1], x[:, 0], x[:, 1])),
    "sample": _sample,
    "int8_head": _int8_head,
    "nf4_product": partial(_small_product, four_bit=True),
    "dense_product": partial(_small_product, four_bit=False),
    "rms_norm_grad": _with_gradients(layer_gradients.rms_norm, rms_norm_ref, lambda x: (x, x[0, 0, 0], 1e-6), 1),
    "swiglu_grad": _with_gradients(layer_gradients.swiglu, swiglu_ref, lambda x: (x, x + 1), 2),
    "rope_grad": _with_gradients(layer_gradients.rope, rope_ref, lambda x: (x, x[:, :1], x[:, 0], x[:, 1]), 2),
    "nf4_dense": _nf4_dense,
    "delta_rule": partial(_delta_rule, trained=False),
    "delta_rule_grad": partial(_delta_rule, trained=True),
    "delta_step": _delta_step,
    "short_conv": partial(_short_conv, trained=False),
    "short_conv_grad": partial(_short_conv, trained=True),
}
