"""Functions whose kernels take the interpreter too long: their launches are noted, their results are the reference's.

That these kernels compute what their references do is what tests/kernels holds. A function that is not here is
interpreted, so a new kernel needs nothing; what is here keeps the whole check under three minutes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from lowvram_grpo.kernels.decode import attention as decode_attention
from lowvram_grpo.kernels.decode import sample
from lowvram_grpo.kernels.decode.attention_ref import decode_attention_ref
from lowvram_grpo.kernels.decode.kv import append
from lowvram_grpo.kernels.layer import gradients as layer_gradients
from lowvram_grpo.kernels.layer import ops as layer_ops
from lowvram_grpo.kernels.sweep import direction, fold, vocabulary_pass
from torch.utils._mode_utils import no_dispatch

from tests.masked_cuda import launches
from tests.masked_cuda.device import Masked, inner
from tests.masked_cuda.record import RECORD


def put() -> None:
    _instead(decode_attention, "decode_attention_triton", _attention)
    _instead(vocabulary_pass, "fold_triton", _fold)
    _instead(vocabulary_pass, "fused_fold", _fused_fold)
    _instead(direction, "_launch", _direction)
    for module, names in (
        (layer_ops, ("rms_norm", "swiglu", "rope")),
        (layer_gradients, ("rms_norm_back", "swiglu_back")),
        (sample, ("block_masses", "draw_by_masses")),
    ):
        for name in names:
            _instead(module, f"{name}_triton", functools.partial(_written, getattr(module, f"{name}_ref")))
    _instead(layer_gradients, "rope_back_triton", _rope_back)


def _instead(module: Any, name: str, reference: Any) -> None:
    """Let module.name launch in name only, and `reference(out, *args, **kwargs)`, on CPU tensors, write what it would
    have written."""
    original = getattr(module, name)

    @functools.wraps(original)
    def launched(*args, **kwargs):
        if not any(isinstance(x, Masked) for x in _tensors([*args, kwargs])):
            return original(*args, **kwargs)
        with launches.in_name_only():
            out = original(*args, **kwargs)
        on_host = [_inner(x) for x in (out, *args)], {k: _inner(v) for k, v in kwargs.items()}

        def again():
            reference(*on_host[0], **on_host[1])

        with no_dispatch():
            if RECORD.capturing is not None:
                RECORD.capturing.keep(*_tensors(on_host))
                RECORD.capturing.add(name, again, works=False)
            again()
        return out

    setattr(module, name, launched)


def _fields(x: Any) -> bool:
    return dataclasses.is_dataclass(x) and not isinstance(x, type)


def _inner(x: Any) -> Any:
    """`x` with the CPU's tensors; dataclasses and tuples of tensors too."""
    if isinstance(x, torch.Tensor):
        return inner(x)
    if _fields(x):
        made = object.__new__(type(x))
        vars(made).update({name: _inner(value) for name, value in vars(x).items()})
        return made
    if isinstance(x, tuple):
        parts = map(_inner, x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    parts = vars(x).values() if _fields(x) else x.values() if isinstance(x, dict) else x
    return [t for part in parts for t in _tensors(part)] if _fields(x) or isinstance(x, (dict, list, tuple)) else []


def _attention(out, query, key, value, prompts, own, rows, **how):
    # Sizes that hold for every step, as the kernel's grid has them; what it reads on the device are tensors.
    rows = dataclasses.replace(
        rows, _masks={}, even=False, regular=False, longest_prefix=prompts.keys.shape[2],
        longest_own=own.keys.shape[2],
    )  # fmt: skip
    append(own, rows, key, value)
    # The reference reads what it masks, and a test puts NaN there.
    number = lambda cache: type(cache)(*(None if x is None else x.nan_to_num() for x in cache))
    prompts, own = number(prompts), number(own.first(len(query)))
    out.copy_(decode_attention_ref(query, prompts, own, rows, **how))


def _fold(_, state, x, ref_x, bias, v0, transform, log_epsilon, out=None, **tiles):
    clone = lambda t: None if t is None else t.clone()  # the kernel leaves what it reads
    fold.fold_torch(state, clone(x), clone(ref_x), bias, v0, transform, log_epsilon, out)


def _fused_fold(_, state, h, ref_h, w, bias, v0, transform, log_epsilon, config):
    product = lambda t: None if t is None else t.float() @ w.float().T
    fold.fold_torch(state, product(h), product(ref_h), bias, v0, transform, log_epsilon)


def _direction(_, w, entries, grads, mean, factor, out, direct):
    if len(out):
        rows = w if direct else w[entries.ids.long()]
        direction._torch(rows, entries, grads, mean, factor, out)


def _written(reference, out, *args, **kwargs):
    """What the reference returns, where the kernel has its results."""
    found = reference(*args, **kwargs)
    for into, value in zip(_tensors([out]), _tensors([found]), strict=True):
        into.copy_(value)


def _rope_back(out, dq, dk, cos, sin, *_):
    _written(layer_gradients.rope_back_ref, out, dq, dk, cos, sin)
