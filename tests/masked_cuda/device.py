"""CPU tensors that answer `cuda:0`: every operator on them goes through `dispatch`.

A wrapper holds a CPU tensor and says that it is CUDA's, so that device checks, autocast and Python's branches take
CUDA's way with real numbers. `dispatch` refuses what mixes devices, notes what waits or copies, and while a graph is
captured keeps each operator with its tensors, so that `replay` computes them again at the same addresses: a Python
value that was baked in, or an address that changed, gives wrong numbers there as on a card.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.masked_cuda.record import RECORD, CudaError, where

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
# Operators whose result's size, or whose result, the host asks for.
_WAIT = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "_local_scalar_dense", "equal",
    "is_nonzero", "bincount", "segment_reduce", "repeat_interleave",
}  # fmt: skip
# Operators that take index tensors from the CPU.
_INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
_ALLOCATE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
_LIVE: dict[int, weakref.ref] = {}
# Operators that need another way on the CPU, and operators written in Python, whose bodies take the masked tensors.
EMULATED: dict[Any, Any] = {}
BODIES: dict[str, Any] = {}


class Masked(torch.Tensor):
    """A CPU tensor, `inner`, that says cuda:0."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip
        self.inner, at = inner, id(self)
        _LIVE[at] = weakref.ref(self, lambda _: _LIVE.pop(at, None))
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"Masked({self.inner!r})"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):  # swaps the tensor in C++; the one inside must follow
        if not isinstance(value, Masked):
            raise CudaError(f"the data of a CUDA tensor set to a {value.device} tensor at {where()}")
        torch._C.TensorBase.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = copy = Masked(self.inner.clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copy._is_param = True
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self.inner.detach().clone().__reduce_ex__(protocol)  # a file that is read on the CPU


class Mode(TorchDispatchMode):
    """For operators that make tensors on the device out of none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def live_bytes() -> int:
    """Bytes of all tensors that are there now, what views share counted once."""
    tensors = [t for t in (ref() for ref in list(_LIVE.values())) if t is not None]
    storages = {t.inner.untyped_storage().data_ptr(): t.inner.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def inner(x: Any) -> Any:
    return x.inner if isinstance(x, Masked) else x


def masked(x: Any) -> Any:
    return Masked(x) if isinstance(x, torch.Tensor) and not isinstance(x, Masked) else x


def each(function: Any, x: Any) -> Any:
    """`x`, an operator's arguments, with every tensor in its tuples, lists and dicts replaced."""
    if isinstance(x, torch.Tensor):
        return function(x)
    if isinstance(x, (tuple, list)):
        return type(x)([each(function, part) for part in x])
    return {name: each(function, part) for name, part in x.items()} if isinstance(x, dict) else x


def tensors_in(*trees: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    each(found.append, trees)
    return found


def dispatch(func, args, kwargs):
    name = func._schema.name.removeprefix("aten::")
    tensors = tensors_in(args, kwargs)
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    to_cuda = device is not None and device.type == "cuda"
    if not to_cuda and not any(isinstance(x, Masked) for x in tensors):
        return func(*args, **kwargs)
    if name in ("record_stream", "is_pinned"):
        return None if name == "record_stream" else False
    if name in BODIES:
        with Mode():
            return BODIES[name](*args, **kwargs)
    if RECORD.fault is not None:
        RECORD.fault(name)
    if name == "_to_copy":
        return _to_copy(func, args[0], device, kwargs)
    if name == "copy_":
        return _copy(func, args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if device is not None and not to_cuda and device.type != "meta":
        raise CudaError(f"{func} asks a CUDA tensor for a {device} result at {where()}")
    _look(func, name, args, kwargs, tensors)
    # empty_like(meta, device=cuda)
    real = lambda x: torch.empty(x.shape, dtype=x.dtype) if to_cuda and x.is_meta else inner(x)
    on_host, host_options = each(real, args), each(real, kwargs)
    for key, value in (("device", torch.device("cpu") if to_cuda else device), ("pin_memory", False)):
        if host_options.get(key) is not None:
            host_options[key] = value
    out = run(func, on_host, host_options)
    if _starts_work(func, name):
        RECORD.launches[name] += 1
    tape(func, on_host, host_options, out)
    if device is not None and device.type == "meta":
        return out
    return _wrapped(func, args, kwargs, out)


def _look(func, name, args, kwargs, tensors) -> None:
    """Refuse what mixes devices; note what waits for the device or copies to it."""
    if name in _INDEXED:
        for index in (i for i in args[1] if isinstance(i, torch.Tensor)):
            # A mask with one number to write becomes masked_fill.
            filled = name != "index" and isinstance(args[2], torch.Tensor) and args[2].dim() == 0
            if index.dtype in (torch.bool, torch.uint8) and not filled:
                RECORD.sync(f"{name} by a mask")
            if not isinstance(index, Masked):
                RECORD.upload(pinned=index.is_pinned(), non_blocking=False)
    elif name in _WAIT and kwargs.get("output_size") is None and not kwargs.get("unsafe"):
        RECORD.sync(name)
    for x in tensors:
        if isinstance(x, Masked) or (x.is_meta and kwargs.get("device") is not None):
            continue
        # A number in a CPU tensor is read by the host.
        if x.dim() and name not in (*_INDEXED, "set_", "detach"):
            raise CudaError(f"{func} mixes cuda:0 and a {x.device} tensor of shape {tuple(x.shape)} at {where()}")


def _to_copy(func, source, device, kwargs):
    options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
    non_blocking = kwargs.get("non_blocking", False)
    if device is not None and device.type == "meta":
        return func(inner(source).to("meta"), **options)
    if isinstance(source, Masked) and device is not None and device.type == "cpu":
        RECORD.download(non_blocking)
        found = func(source.inner, **options)
        return found.pin_memory() if non_blocking else found  # as PyTorch's does
    if not isinstance(source, Masked):
        RECORD.upload(source.is_pinned(), non_blocking)
    out = func(inner(source), **options)
    RECORD.launches["_to_copy"] += isinstance(source, Masked)
    tape(func, (inner(source),), options, out)
    return Masked(out)


def _copy(func, to, source, non_blocking):
    if isinstance(source, torch.Tensor) and source.device.type == "cpu":
        RECORD.upload(source.is_pinned(), non_blocking)
    elif not isinstance(to, Masked):
        RECORD.download(non_blocking and to.is_pinned())
        return to.copy_(source.inner)
    else:
        RECORD.launches["copy_"] += 1
    given = to.inner, inner(source)
    run(func, given, {})
    tape(func, given, {}, None)
    return to


def _writes(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_view(func) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _starts_work(func, name: str) -> bool:
    return not _is_view(func) and name not in (*_ALLOCATE, "_local_scalar_dense", "set_", "resize_", "_unsafe_view")


def run(func, args, kwargs):
    """The operator on the tensors inside; what it writes during a capture is put back when that ends."""
    if RECORD.capturing is not None:
        schema = func._schema.arguments
        written = [value for value, argument in zip(args, schema) if _writes(argument)]
        written += [kwargs[argument.name] for argument in schema if _writes(argument) and argument.name in kwargs]
        RECORD.capturing.keep(*tensors_in(written))
    return EMULATED.get(func, func)(*args, **kwargs)


def tape(func, args, kwargs, out) -> None:
    """Keep an operator of a capture, and how to compute it again into the same tensors."""
    graph = RECORD.capturing
    if graph is None:
        return
    graph.made(*tensors_in(out), given=tensors_in(args, kwargs))
    name = func._schema.name.removeprefix("aten::")
    if _is_view(func) or name in _ALLOCATE:
        return
    results = [] if any(map(_writes, func._schema.arguments)) else tensors_in(out)

    def again():
        for old, new in zip(results, tensors_in(run(func, args, kwargs))):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)

    graph.add(name, again, works=_starts_work(func, name))


def _wrapped(func, args, kwargs, out):
    """Results as masked tensors; what was written in place is the argument itself."""
    schema = func._schema
    written = {}
    for i, argument in enumerate(schema.arguments):
        if _writes(argument):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written.update({id(inner(x)): x for x in tensors_in(value)})
    return each(lambda x: written[id(x)] if id(x) in written else masked(x), out)
