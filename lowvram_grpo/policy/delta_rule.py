"""Gated delta rules and short convolutions by `kernels/recurrent/`, where transformers' own functions stand, while a
model samples or is trained.

A layer's forward looks these functions up among the globals of the file it is written in (before transformers 5.16 some
layers hold them as attributes): there they are replaced, by what has the same arguments and results, for as long as
somebody wants it. What is replaced is known by what it computes: the original and the definition must agree on random
numbers. Where flash-linear-attention, causal-conv1d or a kernel from the hub is at work, it stays.

The rule over sequences is taken on every device: it needs a fraction of the memory, which a plan counts. The rest is
for launches.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import is_out_of_memory
from lowvram_grpo.kernels.recurrent.delta_rule import gated_delta_rule
from lowvram_grpo.kernels.recurrent.delta_step import gated_delta_step
from lowvram_grpo.kernels.recurrent.short_conv import ACTIVATIONS, LONGEST, causal_conv, causal_conv_step
from lowvram_grpo.policy.trials import MODES, model_dtypes, passes_trial, random_numbers, wanted

SEQUENCE, STEP, CONV = "delta_rule", "delta_step", "short_conv"  # kinds of `trials.py`


class _StandsIn:
    """What stands where a function of transformers' stood.

    Attributes:
        place: the globals of its file; `name`: what it is called there.
        users: blocks in which a model samples ("sampling"), and models that are trained ("training").
        path: of the rule over sequences: "torch" where its kernels have failed their trial on this device.
    """

    kind: str

    def __init__(self, place: dict[str, Any], name: str, original: Callable):
        functools.update_wrapper(self, original)
        self.place, self.name, self.original = place, name, original
        self.users: Counter[str] = Counter()
        self.path: str | None = None

    def enter(self, user: str) -> None:
        self.users[user] += 1
        self.place[self.name] = self

    def leave(self, user: str) -> None:
        self.users[user] -= 1
        if not self.users.total() and self.place.get(self.name) is self:
            self.place[self.name] = self.original

    def __deepcopy__(self, memo: dict) -> _StandsIn:
        return self  # layers of a model that hold it are copied; the file is the same

    def __reduce__(self) -> tuple:
        return _at, (self.place["__name__"], self.name)

    @property
    def on_duty(self) -> bool:
        """Whether this pass is somebody's: sampling has no gradients."""
        return bool(self.users["training"] or (self.users["sampling"] and not torch.is_grad_enabled()))


def _at(module: str, name: str) -> Any:
    return getattr(__import__(module, fromlist=[name]), name)


class _Chunked(_StandsIn):
    kind = SEQUENCE

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
        initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not self.on_duty or _packed(kwargs):
            kwargs |= {"output_final_state": output_final_state, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
            return self.original(query, key, value, g, beta, chunk_size, initial_state, **kwargs)
        return self.run(query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, final: bool, unit: bool
    ) -> tuple[Tensor, Tensor | None]:
        """By our function."""
        out, after = gated_delta_rule(q, k, v, g, beta, state, normalize=unit, path=self.path)
        return out, after if final else None


class _Stepwise(_StandsIn):
    kind = STEP

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None,
        output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        one = query.shape[1] == 1 and initial_state is not None and not torch.is_grad_enabled()
        if not (one and self.on_duty) or _packed(kwargs):
            kwargs |= {"output_final_state": output_final_state, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
            return self.original(query, key, value, g, beta, initial_state, **kwargs)
        state = initial_state
        # Rollouts keep what comes back where they took this from; of anyone else it may be needed again.
        if not (self.users["sampling"] and output_final_state and _may_be_written(state)):
            state = state.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        given = (x[:, 0] for x in (query, key, value, g, beta))
        out = gated_delta_step(*given, state, normalize=use_qk_l2norm_in_kernel)
        return out[:, None], state if output_final_state else None


class _Conv(_StandsIn):
    kind = CONV

    def __call__(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if not self.on_duty or _packed(kwargs) or not _known_filter(weight, bias, activation):
            return self.original(hidden_states, weight, bias, activation=activation, **kwargs)
        return causal_conv(hidden_states, weight, bias, activation)


class _ConvStep(_StandsIn):
    kind = CONV

    def __call__(
        self, hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:  # fmt: skip
        one = hidden_states.shape[-1] == 1 and conv_state.shape[-1] >= weight.shape[-1] - 1
        known = one and not torch.is_grad_enabled() and _known_filter(weight, bias, activation)
        if not (known and self.on_duty and conv_state.dtype == hidden_states.dtype):
            return self.original(hidden_states, conv_state, weight, bias, activation)
        return causal_conv_step(hidden_states[..., 0], conv_state, weight, bias, activation)[..., None]


def _packed(kwargs: dict[str, Any]) -> bool:
    """Sequences side by side, which transformers' own functions refuse."""
    return kwargs.get("cu_seqlens") is not None or kwargs.get("seq_idx") is not None


def _may_be_written(state: Tensor) -> bool:
    """In its place: rows without gaps, none of which is another's."""
    apart = len(state) == 1 or state.stride(0) >= state[0].numel()
    return state.dtype == torch.float32 and state[0].is_contiguous() and apart


def _known_filter(weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (weight, bias))
    return not trained and activation in ACTIVATIONS and weight.ndim == 2 and weight.shape[1] <= LONGEST


# Class -> what the function is called in a file, and as an attribute of a layer before transformers 5.16.
_NAMES: dict[type[_StandsIn], tuple[tuple[str, ...], str | None]] = {
    _Chunked: (("torch_chunk_gated_delta_rule",), "chunk_gated_delta_rule"),
    _Stepwise: (("torch_recurrent_gated_delta_rule",), "recurrent_gated_delta_rule"),
    _Conv: (("causal_conv1d_fn",), None),
    _ConvStep: (("causal_conv1d_update", "torch_causal_conv1d_update"), "causal_conv1d_update"),
}


def _own(found: Any) -> Callable | None:
    """transformers' function in PyTorch behind what stands in a file; None where somebody else's is at work."""
    if isinstance(found, nn.Module):  # the hub's `kernels` makes one of a function, and exchanges its forward
        if "forward" in vars(found):
            return None
        found = inspect.getclosurevars(type(found).forward).nonlocals.get("func")
    while inspect.isfunction(found):
        if inspect.getclosurevars(found).nonlocals.get("is_new_implementation"):
            return None
        if not hasattr(found, "__wrapped__"):
            return found
        found = found.__wrapped__
    return None


@functools.cache
def _agrees(stand_in: type[_StandsIn], own: Callable) -> bool:
    """Whether a function computes, in float32, what ours does: outputs and what has become of states."""
    place: dict[str, Any] = {"__name__": __name__}
    ours = stand_in(place, "", own)
    ours.enter("training")
    try:
        with torch.no_grad():
            pairs = [zip(_asked(stand_in, own, seed), _asked(stand_in, ours, seed)) for seed in (0, 1)]
            return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for pair in pairs for a, b in pair)
    except Exception as error:  # other arguments, another number of results
        if is_out_of_memory(error):
            raise
        return False


def _asked(stand_in: type[_StandsIn], function: Callable, seed: int) -> list[Tensor]:
    """Results for random numbers."""
    x = random_numbers(3, 70, 2, 4, seed=seed)
    if stand_in in (_Conv, _ConvStep):
        bias, act = ((x[0, 0].flatten(), "silu"), (None, None))[seed]
        hidden, weight, state = x[:, :5].flatten(2).mT, x[0, :4].reshape(8, 4), x[:, 5:9].flatten(2).mT.clone()
        if stand_in is _Conv:
            return [function(hidden, weight, bias, activation=act)]
        return [function(hidden[..., :1], state, weight, bias, act), state]
    length = 70 if stand_in is _Chunked else 1
    q, k, v = (y[:, :length] for y in (x, x + 1, x - 1))
    g, beta = -x[:, :length, :, 0].abs(), x[:, :length, :, 1].sigmoid()
    state = x[:, :2, :, :].transpose(2, 3)[:, :2].repeat(1, 1, 1, 2)
    settings = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": not seed}
    return [*function(q, k, v, g=g, beta=beta, **settings), state]


def _stand_ins(model: nn.Module) -> Iterator[tuple[_StandsIn, list[tuple[nn.Module, str]]]]:
    """One for each function of the model's files that ours can stand in for, with the layers that hold it."""
    layers = [m for m in model.modules() if type(m).__module__ in sys.modules]
    places: dict[int, tuple[dict[str, Any], list[nn.Module]]] = {}
    for layer in layers:
        place = getattr(inspect.unwrap(type(layer).forward), "__globals__", {})
        places.setdefault(id(place), (place, []))[1].append(layer)
    for place, there in places.values():
        for kind, (names, attribute) in _NAMES.items():
            for name in names:
                found = place.get(name)
                if found is None:
                    continue
                if not isinstance(found, _StandsIn):
                    own = _own(found)
                    if own is None or not _agrees(kind, own):
                        continue
                    found = kind(place, name, found)
                holders = [m for m in there if attribute and vars(m).get(attribute) in (found, found.original)]
                yield found, [(m, attribute) for m in holders]


def replace_recurrences(model: nn.Module, enabled: str, undo: ExitStack) -> int:
    """Have the model's recurrences sample by our functions until `undo` is unwound; how many functions there are.

    Args:
        enabled: `fused_ops`, see `small_ops.fast_modules`.
    """
    found = list(_taken(model, enabled))
    for each, holders in found:
        each.enter("sampling")
        undo.callback(each.leave, "sampling")
        for layer, name in holders:
            undo.callback(setattr, layer, name, getattr(layer, name))
            setattr(layer, name, each)
    return len(found)


def give_recurrences(model: nn.Module, enabled: str, autocast: torch.dtype | None = None) -> int:
    """Have the model's recurrences train by our functions from now on; how many functions there are. They are put back
    when the model is gone.

    Args:
        enabled: as in `replace_recurrences`.
        autocast: the dtype that passes will be computed in, where it is not the weights' own.
    """
    found = list(_taken(model, enabled, autocast, "_grad"))
    for each, holders in found:
        each.enter("training")
        weakref.finalize(model, each.leave, "training").atexit = False
        for layer, name in holders:
            setattr(layer, name, each)
    return len(found)


def _taken(
    model: nn.Module, enabled: str, autocast: torch.dtype | None = None, suffix: str = ""
) -> Iterator[tuple[_StandsIn, list[tuple[nn.Module, str]]]]:
    if enabled not in MODES or enabled == "off":
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtypes = model_dtypes(model, device, autocast)
    for each, holders in _stand_ins(model):
        trial = each.kind if each.kind == STEP else each.kind + suffix
        if not wanted(trial, enabled):
            continue
        passed = all(passes_trial(trial, device, dtype) for dtype in dtypes)
        if each.kind == SEQUENCE:
            each.path = None if passed else "torch"
        elif not passed or (enabled == "auto" and device.type != "cuda"):
            continue
        yield each, holders
