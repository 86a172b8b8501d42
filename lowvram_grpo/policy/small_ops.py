"""Norms, gated activations and rotary positions in fewer launches, by `kernels/decode_ops.py`, while sampling.

In the manner of `adapters.py`: for the length of a block modules get another `forward`, and transformers' functions for
rotary positions another value in the module whose attention looks them up. What is replaced is known by what it
computes, not by a list of architectures: the original and the definition must agree bit for bit on a few random
numbers. Anything that does not is left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.kernels import decode_ops
from lowvram_grpo.kernels.decode_ops import rms_norm, rms_norm_ref, rope, rope_ref, swiglu, swiglu_ref
from lowvram_grpo.kernels.runtime import is_out_of_memory
from lowvram_grpo.policy.trials import MODES, random_numbers, runs, wanted

KINDS = ("rms_norm", "swiglu", "rope")
# (offset, early) of decode_ops.rms_norm: Llama's, Gemma's, Olmo 2's.
_NORMS = ((0.0, True), (1.0, False), (0.0, False))
# Layers of a gated MLP, and what it calls its activation: all there is in it.
_MLPS = (({"gate_proj", "up_proj", "down_proj"}, "act_fn"), ({"gate_up_proj", "down_proj"}, "activation_fn"))
_ROPE = "apply_rotary_pos_emb"


@contextmanager
def fast_modules(model: nn.Module, enabled: str = "auto") -> Iterator[dict[str, int]]:
    """Inside the block the model does the same in fewer launches; yields how many modules (functions for `rope`) of
    each of KINDS were replaced. Afterwards everything is as before.

    To be entered with the model in eval mode. Weights are read at each call. Replaced modules take their own way when
    gradients are enabled. The functions for rotary positions belong to an architecture, not to a model: other models
    of it in this process are served by the kernel meanwhile, with the same results.

    Args:
        model: with or without a PeftModel around it; its quantized layers and adapters are called as ever.
        enabled: `on`; `off`; `auto`, which on CUDA takes the kinds in `trials.EXPECTED_FASTER` and elsewhere none.

    Raises:
        UserError: no such mode.
    """
    if enabled not in MODES:
        raise UserError(f"fused_ops is {enabled!r}; it must be one of {', '.join(MODES)}.")
    counts = dict.fromkeys(KINDS, 0)
    with ExitStack() as undo:
        with torch.no_grad():
            for kind in _kinds(model, enabled):
                counts[kind] = _REPLACE[kind](model, undo)
        yield counts


def _kinds(model: nn.Module, enabled: str) -> list[str]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if enabled == "off" or (enabled == "auto" and device.type != "cuda"):
        return []
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.get_autocast_dtype("cuda"))
    asked = [kind for kind in KINDS if wanted(kind, enabled)]
    return [kind for kind in asked if all(runs(kind, device, dtype) for dtype in dtypes)]


def _agree(original: Callable[[], Any], ours: Callable[[], Any]) -> bool:
    """Whether two computations give the same bits in the same dtype. An original that fails agrees with nothing."""
    try:
        pairs = zip(_tensors(original()), _tensors(ours()), strict=True)
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _replace(module: nn.Module, name: str, forward: Callable[..., Tensor], undo: ExitStack) -> None:
    own = vars(module)
    undo.callback(own.update, {name: own[name]}) if name in own else undo.callback(own.pop, name, None)
    own[name] = forward


# RMSNorm


def _replace_norms(model: nn.Module, undo: ExitStack) -> int:
    known: dict[tuple, tuple[float, bool] | None] = {}
    count = 0
    for norm in model.modules():
        if not _is_norm(norm):
            continue
        plain = tuple(item for item in sorted(vars(norm).items()) if isinstance(item[1], (bool, int, float, str)))
        key = type(norm), norm.weight.dtype, plain
        if key not in known:
            known[key] = _variant(norm)
        if known[key] is not None:
            _replace(norm, "forward", _norm_forward(norm, *known[key]), undo)
            count += 1
    return count


def _is_norm(module: nn.Module) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or "forward" in vars(module):  # accelerate's hooks replace it
        return False
    weight = dict(module.named_parameters()).get("weight")
    alone = len(list(module.parameters())) == 1 and not list(module.buffers())
    return alone and weight is not None and weight.ndim == 1 and isinstance(_eps(module), float)


def _eps(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _variant(norm: nn.Module) -> tuple[float, bool] | None:
    """(offset, early), found with random weights: ones or zeros, as new models have, would not tell."""
    weight, eps = random_numbers(24).to(norm.weight.dtype), _eps(norm)
    # Rows so small that eps matters, too.
    sizes = 10.0 ** -random_numbers(8, 1, seed=2).abs()
    xs = [(random_numbers(8, 24, seed=1) * sizes).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    run = partial(torch.func.functional_call, norm, {"weight": weight})
    for offset, early in _NORMS:
        ours = partial(rms_norm_ref, weight=weight, eps=eps, offset=offset, early=early)
        if all(_agree(partial(run, (x,)), partial(ours, x)) for x in xs):
            return offset, early
    return None


def _norm_forward(norm: nn.Module, offset: float, early: bool) -> Callable[..., Tensor]:
    eps, slow = _eps(norm), type(norm).forward

    def forward(*args, **kwargs) -> Tensor:
        if len(args) != 1 or kwargs or torch.is_grad_enabled():
            return slow(norm, *args, **kwargs)
        return rms_norm(args[0], norm.weight, eps, offset=offset, early=early)

    return forward


# MLPs


class _Times(nn.Module):
    """A linear layer small enough to ask questions of."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _replace_mlps(model: nn.Module, undo: ExitStack) -> int:
    count = 0
    for mlp in model.modules():
        # An MLP in tiles keeps them, see policy.checkpointing.tile_mlps: only what it does with a tile is replaced.
        name = "_untiled_forward" if hasattr(mlp, "_tile_tokens") else "forward"
        if vars(mlp).get(name) is None and (forward := _mlp_forward(mlp)):
            _replace(mlp, name, forward, undo)
            count += 1
    return count


def _mlp_forward(mlp: nn.Module) -> Callable[..., Tensor] | None:
    """None where this is no MLP of a kind that `swiglu` knows."""
    children = dict(mlp.named_children())
    for layers, act_name in _MLPS:
        if set(children) - {act_name} != layers or list(mlp.parameters(recurse=False)):
            continue
        made = _gated if "gate_proj" in layers else _gated_at_once
        for act in decode_ops.ACTIVATIONS:
            small, x = _in_small(mlp, layers), random_numbers(2, 3, 8)
            if _agree(partial(type(mlp).forward, small, x), partial(made(small, act, swiglu_ref), x)):
                return made(mlp, act)
    return None


def _in_small(mlp: nn.Module, layers: set[str]) -> nn.Module:
    """An MLP of the same class and settings with tiny layers on the CPU, wherever and whatever the real ones are."""
    small = type(mlp).__new__(type(mlp))
    nn.Module.__init__(small)
    own = set(vars(small))
    small.__dict__.update({k: v for k, v in vars(mlp).items() if k not in own})
    for name, child in mlp.named_children():
        if name not in layers:
            setattr(small, name, child)  # the activation
    shapes = {"gate_proj": (8, 12), "up_proj": (8, 12), "gate_up_proj": (8, 24), "down_proj": (12, 8)}
    for i, name in enumerate(sorted(layers)):
        setattr(small, name, _Times(random_numbers(*shapes[name], seed=3 + i)))
    return small.eval()


def _gated(mlp: nn.Module, act: str, gated: Callable = swiglu) -> Callable[..., Tensor]:
    return _mlp(mlp, lambda x: gated(mlp.gate_proj(x), mlp.up_proj(x), act))


def _gated_at_once(mlp: nn.Module, act: str, gated: Callable = swiglu) -> Callable[..., Tensor]:
    return _mlp(mlp, lambda x: gated(*mlp.gate_up_proj(x).chunk(2, -1), act))


def _mlp(mlp: nn.Module, inside: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    slow = type(mlp).forward

    def forward(*args, **kwargs) -> Tensor:
        if len(args) != 1 or kwargs or torch.is_grad_enabled():
            return slow(mlp, *args, **kwargs)
        return mlp.down_proj(inside(args[0]))

    return forward


# Rotary positions


def _replace_ropes(model: nn.Module, undo: ExitStack) -> int:
    """An attention's forward looks its function up among the globals of the file it is written in: there it is
    replaced. Subclassing or rewriting forward would repeat transformers' code for each architecture."""
    kinds = {type(m) for m in model.modules() if type(m).__name__.endswith("Attention")}
    places = {id(g): g for g in (inspect.unwrap(kind.forward).__globals__ for kind in kinds) if _ROPE in g}
    count = 0
    for place in places.values():
        original = getattr(place[_ROPE], "original", place[_ROPE])  # of another block that is open
        if _agree_on_rope(original, 8):
            ours = _rope_function(original, partial=_agree_on_rope(original, 6))
            place[_ROPE] = ours
            undo.callback(_put_back, place, ours)
            count += 1
    return count


def _put_back(place: dict[str, Any], ours: Callable) -> None:
    # Two open blocks may end in any order: the one that came last puts the original back.
    if place.get(_ROPE) is ours:
        place[_ROPE] = ours.original


def _agree_on_rope(original: Callable, d: int) -> bool:
    """Whether `original` is `rope` on heads of 8, of which d entries are turned. Random tables, whose halves differ."""
    for q_dtype, dtype in product((torch.float32, torch.bfloat16), repeat=2):
        q, k = random_numbers(2, 4, 3, 8, seed=6).to(q_dtype), random_numbers(2, 2, 3, 8, seed=7).to(q_dtype)
        cos, sin = random_numbers(2, 3, d, seed=8).to(dtype), random_numbers(2, 3, d, seed=9).to(dtype)
        if not _agree(partial(original, q, k, cos, sin), partial(rope_ref, q, k, cos, sin)):
            return False
    return True


def _rope_function(original: Callable, partial: bool) -> Callable:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
        usual = q.ndim == k.ndim == 4 and cos.ndim == 3 and (partial or cos.shape[-1] == q.shape[-1])
        if args or kwargs or not usual or torch.is_grad_enabled():
            return original(q, k, cos, sin, *args, **kwargs)
        return rope(q, k, cos, sin)

    apply_rotary_pos_emb.original = original
    return apply_rotary_pos_emb


_REPLACE = {"rms_norm": _replace_norms, "swiglu": _replace_mlps, "rope": _replace_ropes}
