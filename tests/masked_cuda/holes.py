"""Where PyTorch, bitsandbytes or this project look at a tensor's class, or decide in C++ before they dispatch."""

from __future__ import annotations

import builtins
import importlib
import re

import torch
from torch import nn

from tests.masked_cuda.device import BODIES, DEVICE, EMULATED, Masked, Mode, aten
from tests.masked_cuda.record import ROOT, CudaError, where


def fill() -> None:
    """To be called once, after the stub is loaded and torch.cuda is masked."""
    torch._C._set_only_lift_cpu_tensors(True)
    torch.autograd.set_multithreading_enabled(False)  # one thread, whose frames say who asked
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        torch._C._cuda_getCurrentRawStream = lambda index: 0
    nn.Module._apply = _apply
    _factories()
    _attention()
    _products()
    _bitsandbytes()
    Mode().__enter__()


def ours() -> None:
    """The project's own: `type(x) is Tensor` means a plain CUDA tensor too; operators of its own written in Python."""
    plain = lambda x, *more: (
        builtins.type(x, *more) if more else torch.Tensor if builtins.type(x) is Masked else builtins.type(x)
    )
    for path in (*ROOT.glob("lowvram_grpo/**/*.py"), *ROOT.glob("kernels/**/*.py")):
        if re.search(r"\btype\(\w+\) (is|not|in)\b.*Tensor", path.read_text(encoding="utf-8")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = importlib.import_module(name if name.startswith("lowvram_grpo") else f"lowvram_grpo.{name}")
            module.type = plain
    import lowvram_grpo.kernels as kernels

    for path in ROOT.glob("kernels/**/*.py"):
        name = ".".join(path.relative_to(ROOT / "kernels").with_suffix("").parts)
        module = importlib.import_module(f"{kernels.__name__}.{name}")
        for op in vars(module).values():
            if isinstance(op, torch.library.CustomOpDef):
                BODIES[op._qualname] = op._init_fn


def _apply(self: nn.Module, fn, recurse: bool = True, known: dict | None = None) -> nn.Module:
    """Module._apply would set `.data` of a plain tensor, which no wrapper can follow: parameters are replaced, tied
    ones by the same one."""
    known = {} if known is None else known
    for child in self.children() if recurse else ():
        # A module with an _apply of its own hands on what it knows.
        if type(child)._apply is _apply:
            _apply(child, fn, True, known)
        else:
            child._apply(fn)
    for name, p in self._parameters.items():
        if p is None:
            continue
        if id(p) not in known:
            with torch.no_grad():
                new = fn(p)
            if new is not p and not isinstance(new, nn.Parameter):
                new = nn.Parameter(new, p.requires_grad)
            if new is not p:
                extra = {k: v for k, v in vars(p).items() if k not in ("inner", "_is_param")}
                vars(new).update({k: v for k, v in extra.items() if k not in vars(new)})
            known[id(p)] = new, p
        self._parameters[name] = known[id(p)][0]
    for name, b in self._buffers.items():
        if b is not None:
            self._buffers[name] = fn(b)
    return self


def _factories() -> None:
    """torch.tensor makes its result in C++ below the dispatcher; `.to(other tensor)` reads the other's device there."""
    tensor, as_tensor, to = torch.tensor, torch.as_tensor, torch.Tensor.to

    def made(data, *, dtype=None, device=None, requires_grad=False, pin_memory=False):
        out = tensor(data, dtype=dtype, pin_memory=pin_memory)
        out = out if device is None else out.to(device)
        return out.requires_grad_(requires_grad)

    def as_made(data, dtype=None, device=None):
        if isinstance(data, torch.Tensor):
            return data.to(data.device if device is None else device, data.dtype if dtype is None else dtype)
        return as_tensor(data, dtype=dtype) if device is None else made(data, dtype=dtype, device=device)

    def moved(self, *args, **kwargs):
        if args and isinstance(args[0], Masked):
            args = DEVICE, args[0].dtype, *args[1:]
        return to(self, *args, **kwargs)

    torch.tensor, torch.as_tensor, torch.Tensor.to = made, as_made, moved
    torch.Tensor.cuda = lambda self, device=None, non_blocking=False, **_: self.to(DEVICE, non_blocking=non_blocking)


def _attention() -> None:
    """scaled_dot_product_attention chooses its kernel in C++ by the device. CUDA's want one dtype."""
    original = nn.functional.scaled_dot_product_attention

    def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        more = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if not isinstance(query, Masked):
            return original(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa, **more)
        floating = attn_mask is not None and attn_mask.is_floating_point()
        if torch.is_autocast_enabled("cuda"):
            to = lambda x: x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype("cuda"))
            query, key, value = map(to, (query, key, value))
            attn_mask = to(attn_mask) if floating else attn_mask
        if not query.dtype == key.dtype == value.dtype or (floating and attn_mask.dtype != query.dtype):
            mask = None if attn_mask is None else attn_mask.dtype
            raise CudaError(f"sdpa of {query.dtype}, {key.dtype}, {value.dtype}, mask {mask} at {where()}")
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        if attn_mask is not None and not floating:
            none = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
            attn_mask = none.masked_fill(~attn_mask, -torch.inf)
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask, **more)[0]

    nn.functional.scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention = sdpa


def _products() -> None:
    """Products of 16-bit operands with a float32 result, which CPUs do not have."""

    def alike(*given):
        if len({x.dtype for x in given}) > 1:
            raise CudaError(f"a product of {[x.dtype for x in given]} at {where()}")

    def mm(a, b, dtype):
        alike(a, b)
        return (a.float() @ b.float()).to(dtype)

    def addmm(c, a, b, dtype, *, beta=1, alpha=1):
        alike(a, b)
        return torch.addmm(c.float(), a.float(), b.float(), beta=beta, alpha=alpha).to(dtype)

    def into(product):
        def emulated(*args, out, **kwargs):
            found = product(*args, **kwargs)
            if out.shape != found.shape or out.dtype != found.dtype:
                raise CudaError(f"out is {out.dtype} {tuple(out.shape)} at {where()}")
            return out.copy_(found)

        return emulated

    EMULATED.update({aten.mm.dtype: mm, aten.addmm.dtype: addmm})
    EMULATED.update({aten.mm.dtype_out: into(mm), aten.addmm.dtype_out: into(addmm)})


def _bitsandbytes() -> None:
    """Its CPU library computes; its 4-bit parameter is a subclass of its own, made from the data it is given."""
    import bitsandbytes
    from bitsandbytes.nn import Params4bit

    def dequantize(codes, absmax, blocksize, quant_type, shape, dtype, out):
        if tuple(out.shape) != tuple(shape) or out.dtype != dtype or not out.is_contiguous():
            raise CudaError(f"dequantize_4bit into {out.dtype} {tuple(out.shape)} at {where()}")
        out.copy_(bitsandbytes_ops.dequantize_4bit.default(codes, absmax, blocksize, quant_type, shape, dtype))

    bitsandbytes_ops = getattr(torch.ops, bitsandbytes.__name__)
    EMULATED[bitsandbytes_ops.dequantize_4bit.out] = dequantize
    plain = Params4bit.__new__

    class MaskedParams4bit(Masked, Params4bit):
        __torch_function__ = torch._C._disabled_torch_function_impl
        to, __deepcopy__ = Params4bit.to, Params4bit.__deepcopy__

        def __new__(cls, data=None, *args, **kwargs):
            return make(Params4bit, data, *args, **kwargs)

    def make(
        cls, data=None, requires_grad=False, quant_state=None, blocksize=None, compress_statistics=True,
        quant_type="fp4", quant_storage=torch.uint8, module=None, bnb_quantized=False, **more,
    ):  # fmt: skip
        rest = (quant_state, blocksize, compress_statistics, quant_type, quant_storage, module, bnb_quantized)
        if not isinstance(data, Masked):
            return plain(Params4bit if cls is MaskedParams4bit else cls, data, requires_grad, *rest, **more)
        self = Masked.__new__(MaskedParams4bit, data.inner)
        self._is_param = True
        self.requires_grad_(requires_grad)
        names = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage", "module",
                 "bnb_quantized")  # fmt: skip
        for name, value in zip(names, rest):
            setattr(self, name, value)
        self.blocksize = blocksize or 64
        return self

    Params4bit.__new__ = staticmethod(make)
