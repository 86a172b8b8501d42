"""Decoder layers whose activations are too large for float16, kept in float32.

float16 ends at 65,504; bfloat16, which most models were trained in, at 3e38. In Gemma 3 the residual stream grows past
that (vllm-project/vllm#17364), in Gemma 4 gate times up in the MLP (unslothai/unsloth-zoo#600): infinities, then NaN
in every logit. Cards before Ampere have no bfloat16, so the layers that need the range are computed in float32, those
alone, in training passes and rollouts alike: keys and values of such a layer are cached as it computes them.

A layer is found by running a few sequences: first as the model stands, which is all for most models; where a value is
not finite or above half of float16's range, once more with every layer in float32, which says of each how large its
values really are. A layer that is not kept is handed float16 as before: a model that needs none of this is not touched.

A kept layer's weights of 16 bits become float32, 4-bit ones stay as they are stored and are multiplied in float32
(bitsandbytes' compute_dtype); LLM.int8 multiplies in float16 whatever it is told. Adapters are float32 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError, counted
from lowvram_grpo.policy.embeddings import host_inputs
from lowvram_grpo.policy.own_forward import bound, stands_in
from lowvram_grpo.policy.packed import decoder_layers
from lowvram_grpo.policy.weight_stream import stream_of
from lowvram_grpo.policy.wrapper import unwrap

# Other tokens than those that were looked at may be larger.
LIMIT = torch.finfo(torch.float16).max / 2
_WIDE, _BEFORE, _HANDS_ON, _LENT = "_kept_in_float32", "_forward_before_float32", "_hands_on", "_lent_float32"

Context = Callable[[], AbstractContextManager]


class _HandsOn:
    """Whether a kept layer hands on float32, as the next one is kept too, or what the layers that are not kept have.

    Attributes:
        outside: the dtype that the first of a row of kept layers was given; they have it in common.
    """

    def __init__(self, row: list[torch.dtype], first: bool, last: bool):
        self.outside, self.first, self.last = row, first, last


def computes_in_float16(model: nn.Module, autocast: bool) -> bool:
    """Whether passes of `model` do; `autocast`: under autocast to float16, which they are entered in."""
    return autocast or any(p.dtype == torch.float16 for p in unwrap(model).parameters())


def is_wide(module: nn.Module) -> bool:
    """Whether a module is, or is in, a layer that is kept in float32."""
    return bool(vars(module).get(_WIDE))


def wide_layers(model: nn.Module) -> list[int]:
    """The numbers of the decoder layers that are kept in float32."""
    return [i for i, layer in enumerate(_layers(model)) if is_wide(layer)]


def keep_where_needed(
    model: nn.Module, sequences: Sequence[list[int]], autocast: Context, tell: Callable[[str], None]
) -> list[int]:
    """Keep the layers in float32 that overflow on any of `sequences` (token ids), and say so; the layers that were not
    kept before. Draws no random numbers, and leaves modes and weights as they were.

    Args:
        autocast: makes the context that passes are computed in.
        tell: hears which layers, and what they cost; or that the overflow is somewhere else.
    """
    layers = _layers(model)
    if not layers or not sequences or max(_largest(model, sequences, autocast)) <= LIMIT:
        return []
    before = wide_layers(model)
    with _all_wide(model):
        *sizes, _ = _largest(model, sequences, autocast)
    found = [i for i, size in enumerate(sizes) if not size <= LIMIT and i not in before]
    if found:
        added = 2 * sum(x.numel() for i in found for _, _, x in _halves(layers[i]))
        keep(model, [*before, *found])
        tell(_sentence(model, found, max(sizes), added))
    if _largest(model, sequences, autocast)[-1] == float("inf"):
        tell(
            "activations of this model leave the range of float16 where float32 can't be had (in LLM.int8's products, "
            "or behind the last layer): expect NaN; take --quantization nf4, or --dtype float32."
        )
    return found


def keep(model: nn.Module, indices: Sequence[int], *, lent: bool = False) -> None:
    """Keep the decoder layers of these numbers in float32 from now on, and the norm behind the last of all with it.

    Args:
        lent: weights are made float32 for the length of each call alone, which must be without a gradient: those of a
            reference in host memory.

    Raises:
        UserError: one of them is streamed from host memory (weight_offload) in 16 bits.
    """
    layers, kept = _layers(model), set(indices)
    stream = stream_of(model)
    streamed = set() if stream is None else {id(layers[i]) for i in stream.layers}
    row: list[torch.dtype] = []
    for i in sorted(kept):
        first, last = i - 1 not in kept, i + 1 not in kept and i + 1 < len(layers)
        row = [] if first else row
        apart = lent or id(layers[i]) in streamed
        if not apart:
            _make_float(layers[i])
        elif not lent:
            _check_streamed(layers[i])
        _widen(layers[i], _HandsOn(row, first, last), lent=apart)
    if len(layers) - 1 in kept and (norm := _final_norm(model)) is not None and not is_wide(norm):
        _make_float(norm)
        vars(norm)[_WIDE] = True
        # A hook, as whoever computes norms by a kernel would put a forward over one of ours.
        norm.register_forward_hook(partial(_narrowed, row))


def _check_streamed(layer: nn.Module) -> None:
    if any(x.dim() > 1 for _, _, x in _halves(layer)):
        raise UserError(
            "Activations of this model leave the range of float16 in a layer whose 16-bit weights are streamed from "
            "host memory; pass --quantization nf4, or --weight-offload off."
        )


def _narrowed(row: list[torch.dtype], norm: nn.Module, args: Any, out: Tensor) -> Tensor:
    return _as(out, row[0], of=torch.float32)


def _make_float(module: nn.Module) -> None:
    for table, name, x in list(_halves(module)):
        if isinstance(x, nn.Parameter):
            x.data = x.data.float()
        else:
            table[name] = x.float()


def _sentence(model: nn.Module, found: list[int], size: float, added: int) -> str:
    room = f", and their weights {added / 2**20:.0f} MiB more" if added >= 2**20 else ""
    count = len(_layers(model))
    return (
        f"activations of {counted(len(found), 'decoder layer')} of {count} ({_ranges(found)}) reach {size:.3g}, and "
        f"float16 ends at 65504: these are computed in float32 in every pass. Their hidden states, keys and values "
        f"take twice the bytes{room}; they are slower."
    )


def _ranges(numbers: list[int]) -> str:
    """`0-3, 7`"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


# Looking


def _layers(model: nn.Module) -> list[nn.Module]:
    return decoder_layers(_decoder(model))


def _decoder(model: nn.Module) -> nn.Module:
    causal_lm = unwrap(model)
    decoder = getattr(causal_lm, causal_lm.base_model_prefix)
    return getattr(decoder, "language_model", decoder)  # where a multimodal model could not be taken apart


@torch.no_grad()
def _largest(model: nn.Module, sequences: Sequence[list[int]], autocast: Context) -> list[float]:
    """The largest absolute value that goes into or comes out of a module of each layer, and behind them that of the
    final hidden states; infinite where one is not finite."""
    decoder, layers = _decoder(model), _layers(model)
    device = next((p.device for p in decoder.parameters() if p.device.type != "cpu"), torch.device("cpu"))
    seen = torch.zeros(len(layers) + 1, device=device)
    modes = [(module, module.training) for module in model.modules()]
    inputs = host_inputs(unwrap(model)) or (lambda ids: {"input_ids": ids})

    def note(place: int, *values: Any) -> None:
        for x in _tensors(values):
            if x.is_floating_point() and x.numel():
                # NaN goes before every number in amax and maximum.
                seen[place] = torch.maximum(seen[place], x.detach().abs().amax().float().to(device))

    with ExitStack() as undo:
        undo.callback(lambda: [setattr(module, "training", mode) for module, mode in modes])
        model.eval()
        for place, layer in enumerate(layers):
            for module in _looked_at(layer):
                hook = lambda m, args, out, place=place: note(place, args, out)
                undo.callback(module.register_forward_hook(hook).remove)
        undo.enter_context(autocast())
        for ids in sequences:
            batch = torch.tensor([ids], device=device)
            out = decoder(**inputs(batch), attention_mask=torch.ones_like(batch), use_cache=False)
            note(len(layers), out.last_hidden_state)
    return [size if size == size else float("inf") for size in seen.tolist()]


def _looked_at(layer: nn.Module) -> Iterator[nn.Module]:
    """The layer and what is in it, adapters as one with what they are on: whoever computes them together goes past
    what is watched inside."""
    stack = [layer]
    while stack:
        module = stack.pop()
        yield module
        if not hasattr(module, "base_layer"):
            stack.extend(module.children())


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


# Keeping


def _widen(module: nn.Module, hands_on: _HandsOn, *, lent: bool) -> None:
    """`lent`: its weights are made float32 for the length of each call alone."""
    own = vars(module)
    own[_HANDS_ON], own[_LENT] = hands_on, lent
    if own.get(_WIDE):
        return
    own[_BEFORE] = own.get("forward")
    own["forward"] = bound(_forward, module)
    for inner in module.modules():
        vars(inner)[_WIDE] = True
        if hasattr(inner, "compute_dtype"):  # bitsandbytes'
            inner.compute_dtype, inner.compute_type_is_set = torch.float32, True


@stands_in
def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    own, given = vars(self), next(_tensors([*args, *kwargs.values()]))
    hands_on: _HandsOn = own[_HANDS_ON]
    if hands_on.first:
        hands_on.outside[:] = [given.dtype]
    forward, kind = own[_BEFORE] or type(self).forward.__get__(self), given.device.type
    off = nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
    with off, _float_weights(self) if own[_LENT] else nullcontext():
        out = forward(*_as(args, torch.float32), **_as(kwargs, torch.float32))
    return _as(out, hands_on.outside[0], of=torch.float32) if hands_on.last else out


def _as(value: Any, dtype: torch.dtype, of: torch.dtype = torch.float16) -> Any:
    """`value` with the tensors of dtype `of` that stand in it in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype == of else value
    if type(value) in (tuple, list):
        return type(value)(_as(x, dtype, of) for x in value)
    return {key: _as(x, dtype, of) for key, x in value.items()} if type(value) is dict else value


def _halves(module: nn.Module) -> Iterator[tuple[dict, str, Tensor]]:
    """(table, name, tensor) of all parameters and buffers in float16."""
    for inner in module.modules():
        for table in (inner._parameters, inner._buffers):
            for name, x in table.items():
                if x is not None and x.dtype == torch.float16:
                    yield table, name, x


@contextmanager
def _float_weights(module: nn.Module) -> Iterator[None]:
    """Weights of 16 bits are tensors in float32 inside the block."""
    found = list(_halves(module))
    try:
        for table, name, x in found:
            table[name] = x.float()
        yield
    finally:
        for table, name, x in found:
            table[name] = x


@contextmanager
def _all_wide(model: nn.Module) -> Iterator[None]:
    """Every layer in float32 inside the block, for passes without a gradient, and as before at its end."""
    norm = _final_norm(model)
    modules = [*_layers(model), *([] if norm is None or is_wide(norm) else [norm])]
    before = [(module, vars(module).get(_HANDS_ON), vars(module).get(_LENT)) for module in modules]
    linears = [m for module in modules if not is_wide(module) for m in module.modules() if hasattr(m, "compute_dtype")]
    dtypes = [(m, m.compute_dtype, m.compute_type_is_set) for m in linears]
    try:
        for module in modules:
            _widen(module, _HandsOn([], first=False, last=False), lent=True)
        yield
    finally:
        for module, hands_on, lent in before:
            if hands_on is None:
                _narrow(module)
            else:
                vars(module).update({_HANDS_ON: hands_on, _LENT: lent})
        for m, dtype, known in dtypes:
            m.compute_dtype, m.compute_type_is_set = dtype, known


def _narrow(module: nn.Module) -> None:
    own = vars(module)
    forward = own.pop(_BEFORE)
    if forward is None:
        del own["forward"]
    else:
        own["forward"] = forward
    for inner in module.modules():
        vars(inner).pop(_WIDE, None)
    del own[_HANDS_ON], own[_LENT]


def _final_norm(model: nn.Module) -> nn.Module | None:
    """The norm behind the last layer, which is handed float32 where that is kept."""
    names = ("norm", "embedding_norm", "final_layernorm", "ln_f")
    return next((norm for name in names if (norm := getattr(_decoder(model), name, None)) is not None), None)
