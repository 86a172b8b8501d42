"""A model's weights brought into place one tensor at a time.

`from_pretrained` may hold several 16-bit tensors on the device while it quantizes, and what a checkpoint needs on the
way depends on its threads. Here a tensor is read, cast, moved, quantized and dropped before the next is touched: the
device never holds more than the finished model and one linear layer in 16 bits. Of layers that are to wait in host
memory (`weight_stream`) it holds that one linear layer, and each weight goes home as soon as it is what it shall be.
The same code runs on meta tensors, which is how the memory of loading can be known before anything is loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lowvram_grpo.errors import UserError, some
from lowvram_grpo.kernels.quantized import quantize_statistics
from lowvram_grpo.policy.packed import host_of, send_home
from lowvram_grpo.policy.quantization import bitsandbytes_config
from lowvram_grpo.policy.quantized_experts import empty_experts, fill, product_shape, quantized_experts
from lowvram_grpo.policy.stored_weights import Stacked, StoredNF4
from lowvram_grpo.policy.weight_stream import streamed_modules
from lowvram_grpo.recipe.expert_offload import OFF

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit
    from transformers import PreTrainedConfig, PreTrainedModel

Source = Iterable[tuple[str, Tensor | Stacked | Callable[[], Tensor | Stacked | StoredNF4]]]


@contextmanager
def _empty_weights(dtype: torch.dtype) -> Iterator[None]:
    """Modules built inside have their parameters on meta, and buffers that are real."""
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            yield
    finally:
        torch.set_default_dtype(before)


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
    """A causal language model of this configuration with its parameters on meta, in `dtype`; buffers are real.

    `kwargs` (attn_implementation) go to `AutoModelForCausalLM.from_config`.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.dtype = dtype
    with _empty_weights(dtype):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)


def materialize(
    model: PreTrainedModel,
    source: Source,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    quantization: str = "none",
    keep_on_host: Iterable[str] = (),
    host_layers: int = 0,
    expert_offload: str | int = OFF,
    skip: Iterable[str] | None = None,
) -> PreTrainedModel:
    """Give a model on meta its weights, tensor by tensor, and leave it as from_pretrained would (in eval mode).

    Args:
        model: causal language model whose parameters are on meta; changed in place.
        source: (parameter name, tensor or function that reads it), in any order; each tensor is read when it is placed.
            Parameters that are tied to others are not expected.
        device: where the weights go; "meta" runs the same operators without computing anything.
        dtype: of all weights that are not quantized, and of what 4-bit layers compute in.
        quantization: `none`, or `nf4`: every linear layer but the output head becomes a bitsandbytes Linear4bit, and
            experts in 3-D parameters go to `policy.quantized_experts`.
        keep_on_host: names of modules whose weights stay in host memory, dense and frozen, in `dtype`. They may be
            views of the source's memory. With `device` "meta" they are the source's meta tensors.
        host_layers: of so many decoder layers, those of `streamed_indices`, the weights go to host memory, quantized
            like the others; for `stream_weights`. On meta no ledger counts them.
        expert_offload: of GRPOConfig: experts in 4 bits that wait in host memory.
        skip: names of linear layers that stay as they are in nf4, where a checkpoint says so.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape, or the quantization cannot be streamed.
    """
    device = torch.device(device)
    quantizer, experts = None, {}
    if quantization == "nf4":
        quantizer = _replace_linear_layers(model, device, dtype, skip)
    elif quantization != "none":
        raise UserError(f"quantization is {quantization!r}; weights are streamed as none or nf4.")
    _place_buffers(model, device)
    at_home = {id(part) for layer in streamed_modules(model, host_layers) for part in layer.modules()}
    if quantizer is not None:
        experts = empty_experts(model, device, dtype, expert_offload, at_home)
    missing = {*expected_names(model), *experts}
    staging = _Staging(model, device, dtype)
    for name, tensor in source:
        if name not in missing:
            raise UserError(
                f"The checkpoint holds {name!r}, which the model has no place for (or twice); is the config.json "
                "beside it its own?"
            )
        missing.remove(name)
        value = tensor() if callable(tensor) else tensor
        if name in experts:
            _quantize_experts(name, *experts[name], value, staging)
        else:
            _place(model, name, value, staging, keep_on_host, at_home)
        # Or the last tensor would stay alive while the next is read.
        del tensor, value
    if missing:
        lacking = some(sorted(missing))
        raise UserError(f"The checkpoint lacks {lacking}; download it again, or check that it is complete.")
    model.tie_weights()
    for module in model.modules():
        module._is_hf_initialized = True
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    return model.eval()


def meta_source(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor) of what a checkpoint of this model on meta would hold, in its own order; no storage is made."""
    state = model.state_dict(keep_vars=True)
    return [(name, state[name].detach()) for name in expected_names(model)]


def expected_names(model: nn.Module) -> list[str]:
    """What a checkpoint has to hold: parameters and saved buffers, tied ones once.

    Linear4bit layers are to be still without weights: theirs would have statistics beside them.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    return [name for name in model.state_dict() if name not in tied]


def _replace_linear_layers(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, skip: Iterable[str] | None = None
) -> Any:
    """transformers' quantizer, having put empty Linear4bit layers into the model."""
    from transformers.quantizers import AutoHfQuantizer

    config = bitsandbytes_config("nf4", dtype)
    config.llm_int8_skip_modules = list(skip) if skip else None
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    device_map = {"": device.index or 0 if device.type == "cuda" else device.type}
    quantizer.validate_environment(device_map=device_map)
    model.config.quantization_config = config
    # The new layers' weights are on meta until they are placed: no ledger should count them.
    with _disable_current_modes():
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=device_map)
    return quantizer


def _place_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers are computed by constructors and not in checkpoints: those on meta are taken from a second skeleton."""
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lost and device.type != "meta":
        with _empty_weights(model.dtype):
            computed = dict(type(model)(copy.deepcopy(model.config)).named_buffers())
    for name, buffer in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        value = computed[name] if buffer.is_meta and device.type != "meta" else buffer
        model.get_submodule(parent)._buffers[leaf] = value.to(device)


class _Staging:
    """Where weights stand in `dtype` on `device` just before they are quantized: one buffer for all of them.

    A fresh buffer for each would leave holes in the allocator between packed weights that stay.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        layers = (m.weight.numel() for m in model.modules() if _is_4bit(m))
        experts = (m.expert_layout.largest for _, m in quantized_experts(model))
        largest = max((*layers, *experts), default=0)
        self._buffer = torch.empty(largest, dtype=dtype, device=device)
        self._float32 = _float32_names(model, dtype)

    def kind(self, name: str) -> torch.dtype:
        """Of a parameter that is not quantized: the model's class may want float32 for some."""
        return torch.float32 if self._float32 is not None and self._float32.search(name) else self.dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        return self._buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)


def _float32_names(model: nn.Module, dtype: torch.dtype) -> re.Pattern | None:
    """As from_pretrained takes `_keep_in_fp32_modules` (where float16 is wanted) and `_keep_in_fp32_modules_strict`."""
    wanted = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else []
    if dtype == torch.float16:
        wanted += getattr(model, "_keep_in_fp32_modules", None) or ()
    return re.compile("|".join(name.replace("*", ".*") for name in wanted)) if wanted else None


def _is_4bit(module: nn.Module) -> bool:
    return hasattr(module, "weight") and hasattr(module.weight, "quant_state")


def _quantize_experts(name: str, module: nn.Module, product: int, value: Any, staging: _Staging) -> None:
    """`value`: (E, ...), read expert by expert."""
    _check_shape(name, value.shape, product_shape(module, product))
    for expert, weight in enumerate(value):
        fill(module, product, expert, weight, staging)
        if staging.device.type == "meta":  # one is like the other, and there may be thousands
            break


def _check_shape(name: str, found: Iterable[int], wanted: Iterable[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"{name!r} is {tuple(found)} in the checkpoint and {tuple(wanted)} in the model; is the config.json beside "
            "it its own?"
        )


def _place(
    model: nn.Module, name: str, tensor: Any, staging: _Staging, keep_on_host: Iterable[str], at_home: set[int]
) -> None:
    """`at_home`: ids of the modules whose weights go to host memory."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    waits = id(module) in at_home
    old = getattr(module, leaf)
    _check_shape(name, tensor.shape, old.shape)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor.to(staging.device, old.dtype)
    elif leaf == "weight" and _is_4bit(module):
        stored = isinstance(tensor, StoredNF4)
        module.weight = _stored(module, tensor, staging) if stored else quantize(module, staging(tensor))
        if waits:
            send_home(module)
        module.quant_state = module.weight.quant_state
    elif any(parent == kept or parent.startswith(kept + ".") for kept in keep_on_host):
        host = "meta" if tensor.is_meta else "cpu"
        module._parameters[leaf] = nn.Parameter(tensor.to(host, staging.dtype), requires_grad=False)
    else:
        # Never a view of the file: it may be trained, and the file may be replaced.
        with _disable_current_modes() if waits else nullcontext():
            place = host_of(staging.device) if waits else staging.device
            value = torch.empty(tensor.shape, dtype=staging.kind(name), device=place)
            if isinstance(tensor, Stacked):
                for i, expert in enumerate(tensor):
                    value[i].copy_(expert)
            else:
                value.copy_(tensor)
        module._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
    getattr(module, leaf)._is_hf_initialized = True


def _stored(layer: Linear4bit, weight: StoredNF4, staging: _Staging) -> nn.Parameter:
    from bitsandbytes.nn import Params4bit

    return Params4bit.from_prequantized(weight.packed(), weight.statistics(), device=staging.device, module=layer)


def quantize(layer: Linear4bit, weight: Tensor) -> nn.Parameter:
    """The Params4bit that `layer.weight.to(device)` would make of `weight` (out, in), on its device, meta included."""
    from bitsandbytes.functional import QuantState, quantize_4bit
    from bitsandbytes.nn import Params4bit

    old = layer.weight
    packed, state = quantize_4bit(
        weight, blocksize=old.blocksize, quant_type=old.quant_type, quant_storage=old.quant_storage
    )
    if old.compress_statistics:
        absmax, offset, state2 = quantize_statistics(state.absmax)
        state = QuantState(
            absmax, state.shape, state.code, state.blocksize, state.quant_type, state.dtype, offset, state2
        )
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
        bnb_quantized=True,
    )
