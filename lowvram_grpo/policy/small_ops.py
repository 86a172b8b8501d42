"""Norms, gated activations and rotary positions in fewer launches: `kernels/decode/ops.py` while sampling, and
`kernels/gradient_ops.py` in training.

For the length of a block (sampling), or of the model's life (training), modules get another `forward`, and
transformers' functions for rotary positions another value in the module whose attention looks them up. What is replaced
is known by what it computes, not by a list of architectures: the original and the definition must agree bit for bit on
a few random numbers. Anything that does not is left alone.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError, is_out_of_memory
from lowvram_grpo.kernels import gradient_ops
from lowvram_grpo.kernels.decode import ops as decode_ops
from lowvram_grpo.kernels.decode.ops import rms_norm, rms_norm_ref, rope, rope_ref, swiglu, swiglu_ref
from lowvram_grpo.policy.own_forward import give_forward, has_foreign_forward, is_watched, stands_in
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


def differentiable_modules(model: nn.Module, enabled: str, autocast: torch.dtype | None = None) -> dict[str, int]:
    """From now on norms, gated activations and rotary positions of the model are computed by kernels that have a
    gradient, in every pass; how many modules (functions for `rope`) of each of KINDS there are.

    A norm whose weight is trained takes its own way while a graph is made. Copies of the model have the same. The
    functions for rotary positions are put back when the model is gone.

    Args:
        enabled: as in `fast_modules`.
        autocast: the dtype that passes will be computed in, where it is not the weights' own.
    """
    counts = dict.fromkeys(KINDS, 0)
    with torch.no_grad():
        for kind in _kinds(model, enabled, autocast, suffix="_grad"):
            counts[kind] = _GIVE[kind](model)
    return counts


def _kinds(model: nn.Module, enabled: str, autocast: torch.dtype | None = None, suffix: str = "") -> list[str]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if enabled == "off" or (enabled == "auto" and device.type != "cuda"):
        return []
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | ({autocast} - {None})
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.get_autocast_dtype("cuda"))
    asked = [kind for kind in KINDS if wanted(kind + suffix, enabled)]
    return [kind for kind in asked if all(runs(kind + suffix, device, dtype) for dtype in dtypes)]


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


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[float, bool]]]:
    """Those that `rms_norm` knows, with (offset, early)."""
    known: dict[tuple, tuple[float, bool] | None] = {}
    for norm in model.modules():
        if not _is_norm(norm):
            continue
        plain = tuple(item for item in sorted(vars(norm).items()) if isinstance(item[1], (bool, int, float, str)))
        key = type(norm), norm.weight.dtype, plain
        if key not in known:
            known[key] = _variant(norm)
        if known[key] is not None:
            yield norm, known[key]


def _replace_norms(model: nn.Module, undo: ExitStack) -> int:
    found = list(_norms(model))
    for norm, variant in found:
        _replace(norm, "forward", _norm_forward(norm, *variant), undo)
    return len(found)


def _give_norms(model: nn.Module) -> int:
    found = list(_norms(model))
    for norm, variant in found:
        norm._norm_variant = variant
        give_forward(norm, _differentiable_norm)
    return len(found)


@stands_in
def _differentiable_norm(self: nn.Module, *args, **kwargs) -> Tensor:
    if len(args) != 1 or kwargs or (self.weight.requires_grad and torch.is_grad_enabled()):
        return type(self).forward(self, *args, **kwargs)
    offset, early = self._norm_variant
    return gradient_ops.rms_norm(args[0], self.weight, _eps(self), offset=offset, early=early)


def _is_norm(module: nn.Module) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or has_foreign_forward(module):
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


def _mlps(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Those that `swiglu` knows, with their activation, and where what they do with a tile of tokens is to be put."""
    for mlp in model.modules():
        # An MLP in tiles keeps them, see policy.checkpointing.tile_mlps: only what it does with a tile is replaced.
        name = "_untiled_forward" if hasattr(mlp, "_tile_tokens") else "forward"
        if not has_foreign_forward(mlp, name) and (act := _activation(mlp)):
            yield mlp, act, name


def _replace_mlps(model: nn.Module, undo: ExitStack) -> int:
    found = list(_mlps(model))
    for mlp, act, name in found:
        _replace(mlp, name, _mlp_forward(mlp, act), undo)
    return len(found)


def _give_mlps(model: nn.Module) -> int:
    found = list(_mlps(model))
    for mlp, act, name in found:
        mlp._gate_activation = act
        mlp._gate_name = next(name for layers, name in _MLPS if layers <= {*dict(mlp.named_children())})
        give_forward(mlp, _differentiable_mlp, name)
    return len(found)


@stands_in
def _differentiable_mlp(self: nn.Module, *args, **kwargs) -> Tensor:
    activation = self._modules.get(self._gate_name)  # which is not called here
    if len(args) != 1 or kwargs or (activation is not None and is_watched(activation)):
        return type(self).forward(self, *args, **kwargs)
    return self.down_proj(_gated(self, args[0], self._gate_activation, gradient_ops.swiglu))


def _activation(mlp: nn.Module) -> str | None:
    """None where this is no MLP of a kind that `swiglu` knows."""
    children = dict(mlp.named_children())
    for layers, act_name in _MLPS:
        if set(children) - {act_name} != layers or list(mlp.parameters(recurse=False)):
            continue
        for act in decode_ops.ACTIVATIONS:
            small, x = _in_small(mlp, layers), random_numbers(2, 3, 8)
            ours = lambda small=small, x=x, act=act: small.down_proj(_gated(small, x, act, swiglu_ref))
            if _agree(partial(type(mlp).forward, small, x), ours):
                return act
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


def _gated(mlp: nn.Module, x: Tensor, act: str, gated: Callable) -> Tensor:
    """What goes into down_proj."""
    if hasattr(mlp, "gate_up_proj"):
        return gated(*mlp.gate_up_proj(x).chunk(2, -1), act)
    return gated(mlp.gate_proj(x), mlp.up_proj(x), act)


def _mlp_forward(mlp: nn.Module, act: str) -> Callable[..., Tensor]:
    slow = type(mlp).forward

    def forward(*args, **kwargs) -> Tensor:
        if len(args) != 1 or kwargs or torch.is_grad_enabled():
            return slow(mlp, *args, **kwargs)
        return mlp.down_proj(_gated(mlp, args[0], act, swiglu))

    return forward


# Rotary positions


class _Rope:
    """What stands in for an architecture's function as long as somebody wants it: blocks in which a model samples, and
    models that are trained.

    An attention's forward looks its function up among the globals of the file it is written in: there it is replaced.
    Subclassing or rewriting forward would repeat transformers' code for each architecture.

    Args:
        place: those globals.
        partial: the original, too, turns only a part of each head where its tables are narrower.
    """

    def __init__(self, place: dict[str, Any], original: Callable, partial: bool):
        self.place, self.original, self.partial, self.users = place, original, partial, Counter()

    def enter(self, user: str) -> None:
        self.users[user] += 1
        self.place[_ROPE] = self

    def leave(self, user: str) -> None:
        self.users[user] -= 1
        if not self.users.total() and self.place.get(_ROPE) is self:
            self.place[_ROPE] = self.original

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
        usual = q.ndim == k.ndim == 4 and cos.ndim == 3 and (self.partial or cos.shape[-1] == q.shape[-1])
        if not args and not kwargs and usual:
            if self.users["training"]:
                return gradient_ops.rope(q, k, cos, sin)
            if not torch.is_grad_enabled():
                return rope(q, k, cos, sin)
        return self.original(q, k, cos, sin, *args, **kwargs)


def _ropes(model: nn.Module) -> Iterator[_Rope]:
    """One for each of the model's functions that `rope` can stand in for."""
    kinds = {type(m) for m in model.modules() if type(m).__name__.endswith("Attention")}
    places = {id(g): g for g in (inspect.unwrap(kind.forward).__globals__ for kind in kinds) if _ROPE in g}
    for place in places.values():
        there = place[_ROPE]
        if isinstance(there, _Rope):
            yield there
        elif _agree_on_rope(there, 8):
            yield _Rope(place, there, partial=_agree_on_rope(there, 6))


def _replace_ropes(model: nn.Module, undo: ExitStack) -> int:
    found = list(_ropes(model))
    for each in found:
        each.enter("sampling")
        undo.callback(each.leave, "sampling")
    return len(found)


def _give_ropes(model: nn.Module) -> int:
    found = list(_ropes(model))
    for each in found:
        each.enter("training")
        weakref.finalize(model, each.leave, "training").atexit = False
    return len(found)


def _agree_on_rope(original: Callable, d: int) -> bool:
    """Whether `original` is `rope` on heads of 8, of which d entries are turned. Random tables, whose halves differ."""
    for q_dtype, dtype in product((torch.float32, torch.bfloat16), repeat=2):
        q, k = random_numbers(2, 4, 3, 8, seed=6).to(q_dtype), random_numbers(2, 2, 3, 8, seed=7).to(q_dtype)
        cos, sin = random_numbers(2, 3, d, seed=8).to(dtype), random_numbers(2, 3, d, seed=9).to(dtype)
        if not _agree(partial(original, q, k, cos, sin), partial(rope_ref, q, k, cos, sin)):
            return False
    return True


_REPLACE = {"rms_norm": _replace_norms, "swiglu": _replace_mlps, "rope": _replace_ropes}
_GIVE = {"rms_norm": _give_norms, "swiglu": _give_mlps, "rope": _give_ropes}
