"""Counts what would make the host wait for a GPU, on tensors that lie on the CPU."""

from __future__ import annotations

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ALWAYS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "equal", "is_nonzero",
}  # fmt: skip
_UNLESS = {"segment_reduce": "unsafe", "repeat_interleave": "output_size"}


class Waits(TorchDispatchMode):
    """Inside the block, `where` gets a line of the project for each wait: numbers and lists made of tensors, operators
    whose result has a length that only the device knows. Copies between devices are not seen: there is one device."""

    def __init__(self):
        super().__init__()
        self.where: list[str] = []

    def __enter__(self):
        self._tolist = torch.Tensor.tolist

        def tolist(tensor):
            self._waited("tolist")
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _ALWAYS or (name in _UNLESS and kwargs.get(_UNLESS[name]) in (None, False)):
            self._waited(name)
        if name in ("index", "index_put_", "index_put"):
            masks = any(x is not None and x.dtype == torch.bool for x in args[1])
            if masks and (name == "index" or args[2].dim()):  # a number put where a mask says so is a masked_fill
                self._waited(f"{name} by a mask")
        return func(*args, **kwargs)

    def _waited(self, what: str) -> None:
        ours = [f for f in traceback.extract_stack() if "/lowvram_grpo/" in f.filename or "/kernels/" in f.filename]
        ours = [f for f in ours if "/triton/" not in f.filename]
        at = f"{ours[-1].filename.rsplit('/', 1)[-1]}:{ours[-1].lineno} {ours[-1].line}" if ours else "elsewhere"
        self.where.append(f"{what} at {at}")
