"""The ways to a pretrained model: streamed tensor by tensor, from a GGUF file, or whole, by from_pretrained.

`kwargs` are the arguments of from_pretrained throughout, `dtype` among them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import suppress
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import find_adapter_config_file

from lowvram_grpo.errors import UserError, is_out_of_memory, one_line
from lowvram_grpo.policy.accounting import account, lacking
from lowvram_grpo.policy.checkpoint import can_stream, checkpoint_source, converts, places
from lowvram_grpo.policy.experts import experts_of
from lowvram_grpo.policy.gguf import load_gguf
from lowvram_grpo.policy.merged_experts import merge, unpacked
from lowvram_grpo.policy.quantization import check_stored, quantization_name, streamed_quantization
from lowvram_grpo.policy.quantized_experts import quantize_experts
from lowvram_grpo.policy.refusals import beside_a_model
from lowvram_grpo.policy.stream import materialize, skeleton
from lowvram_grpo.policy.text_model import KEY_MAPPING, text_name
from lowvram_grpo.recipe.expert_offload import OFF

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HostNames = Callable[["PreTrainedModel"], tuple[str, ...]]
# How many decoder layers of a model wait in host memory.
LayersOf = Callable[["PreTrainedModel"], int]
none_of: LayersOf = lambda model: 0

# Others may change how the weights are read, which only from_pretrained knows.
STREAMED_ARGUMENTS = {
    "dtype", "quantization_config", "device_map", "attn_implementation", "trust_remote_code", "revision", "token",
    "cache_dir",
}  # fmt: skip


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of from_pretrained's arguments that say where a model's files are and whether its code may run."""
    return {k: kwargs[k] for k in ("revision", "token", "cache_dir", "trust_remote_code") if k in kwargs}


def _files_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in hub_arguments(kwargs).items() if k != "trust_remote_code"}


def _attention(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"attn_implementation": kwargs["attn_implementation"]} if kwargs.get("attn_implementation") else {}


def _one_device(device_map: Any, default: torch.device) -> torch.device | None:
    """Where a device_map puts the whole model, None if it may spread it."""
    place = device_map.get("") if isinstance(device_map, dict) and len(device_map) == 1 else device_map
    if place is None:
        return default if device_map is None else None
    if isinstance(place, dict) or place in ("auto", "balanced", "balanced_low_0", "sequential", "disk"):
        return None
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def load_streamed(
    model: str,
    config: Any,
    device: torch.device,
    kwargs: dict[str, Any],
    keep_on_host: HostNames,
    host_layers: LayersOf = none_of,
    expert_offload: str | int = OFF,
) -> PreTrainedModel | None:
    """The model, or None where only from_pretrained knows how to load it as these arguments ask for.

    Raises:
        UserError: an adapter lies beside the model.
    """
    hub, dtype = _files_arguments(kwargs), kwargs["dtype"]
    if adapter := find_adapter_config_file(model, **hub):
        # transformers takes a folder's model with the adapter, and of a hub id another model than is stored there.
        raise beside_a_model(model, os.path.dirname(adapter))
    if dtype == "auto":
        dtype = config.dtype
    stored = _streamed_as(config)
    if stored == "nf4":
        check_stored(model, config.quantization_config, kwargs.get("quantization_config"))
    target = _one_device(kwargs.get("device_map"), device)
    quantization = streamed_quantization(kwargs.get("quantization_config"), dtype)
    if set(kwargs) - STREAMED_ARGUMENTS or target is None or quantization is None or not isinstance(dtype, torch.dtype):
        return None
    if getattr(config, "auto_map", None):
        return None
    try:
        source = checkpoint_source(model, **hub)
    except UserError:
        raise
    except (FileNotFoundError, ValueError):
        return None
    skip = None
    if stored is not None:
        config = copy.deepcopy(config)
        skip = _settings(config.quantization_config).get("llm_int8_skip_modules")
        del config.quantization_config
        source, quantization = unpacked(source, stored), "nf4" if stored == "nf4" else quantization
    empty = skeleton(config, dtype, **_attention(kwargs))
    source = merge(empty, source)
    names = can_stream(empty, source, quantization)
    if names is None:
        return None
    loaded = materialize(
        empty,
        source.renamed(names),
        device=target,
        dtype=dtype,
        quantization=quantization,
        keep_on_host=keep_on_host(empty),
        host_layers=host_layers(empty),
        expert_offload=expert_offload,
        skip=skip,
    )
    # Without the file, the one that was made from the configuration stands.
    with suppress(OSError):
        loaded.generation_config = GenerationConfig.from_pretrained(model, **hub)
    return loaded


def _streamed_as(config: Any) -> str | None:
    """The format of a checkpoint in fewer bits whose experts are read one at a time; None of all others."""
    settings = _settings(getattr(config, "quantization_config", None))
    kind = quantization_name(settings) if settings else "none"
    return kind if kind in ("nf4", "mxfp4") and experts_of(config) else None


def _settings(config: Any) -> dict[str, Any]:
    return config if isinstance(config, dict) else {} if config is None else config.to_dict()


def load_whole(
    model: str,
    config: Any,
    device: torch.device,
    kwargs: dict[str, Any],
    keep_on_host: HostNames,
    tell: Callable[[str], None],
    *,
    inside: bool = False,
    on_host: bool = False,
    expert_offload: str | int = OFF,
) -> PreTrainedModel:
    """The model by from_pretrained; `tell` hears of weights without a place. `inside`: `config` is that of the language
    model in a multimodal checkpoint, whose other parts have none. With `on_host` all of it is loaded, and quantized, in
    host memory, whatever of it is to be on `device` later.

    Raises:
        UserError: the checkpoint is quantized already, and in another way than asked for; it is damaged, lacks weights
            or has them in other shapes.
    """
    stored = getattr(config, "quantization_config", None)
    if on_host:
        device = torch.device("cpu")
        kwargs["device_map"] = {"": "cpu"}
    if stored is not None:
        check_stored(model, stored, kwargs.pop("quantization_config", None))
        _check_stored_names(model, config, kwargs)
    if stored is not None or "quantization_config" in kwargs:
        kwargs.setdefault("device_map", {"": device.index or 0 if device.type == "cuda" else device.type})
    if inside:
        kwargs |= {"config": config, "key_mapping": KEY_MAPPING}
    loaded, report = _reported(model, kwargs)
    if inside:
        report["unexpected_keys"] = {name for name in report["unexpected_keys"] if text_name(name) is not None}
    account(model, loaded, report, tell)
    if stored is not None and isinstance(kwargs["dtype"], torch.dtype):
        _recast(loaded, kwargs["dtype"])
    if quantization_name(kwargs.get("quantization_config")) == "nf4":
        quantize_experts(loaded, device, loaded.dtype, expert_offload)
    for name in keep_on_host(loaded):
        loaded.get_submodule(name).to("cpu")
    return loaded


def _check_stored_names(model: str, config: Any, kwargs: dict[str, Any]) -> None:
    """Whether a checkpoint in bitsandbytes' formats has a tensor for each weight: from_pretrained fails with anything
    but that when it makes one up in a quantized layer.

    Raises:
        UserError: it has not.
    """
    if quantization_name(config.quantization_config) not in ("nf4", "fp4", "int8"):
        return
    try:
        source = checkpoint_source(model, **_files_arguments(kwargs))
    except UserError:
        raise
    except (FileNotFoundError, ValueError):
        return
    empty = skeleton(config, torch.float32)
    if converts(empty, source):
        return
    head = empty.get_output_embeddings()
    packed = {f"{n}.weight" for n, m in empty.named_modules() if isinstance(m, nn.Linear) and m is not head}
    found = set(places(empty, source).values())
    if missing := sorted(packed - found):
        raise lacking(model, missing, sorted(source.tensors.keys() - {*empty.state_dict()}), empty)


def _reported(model: str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """from_pretrained's model, and what it says of its weights: shapes too, where it would only throw."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            model, **{**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
        )
    except (SafetensorError, UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error) or "CUDA" in str(error):
            raise
        raise UserError(
            f"The weights of {model!r} can't be read ({_short(error)}); the file is damaged or incomplete: download or "
            "save it again."
        ) from error


def _short(error: Exception) -> str:
    # Of a file that is no pickle, torch says at length how to open it unsafely.
    return one_line(error).partition(". ")[0]


def _recast(model: nn.Module, dtype: torch.dtype) -> None:
    """Compute a stored 4-bit model in `dtype`: what it was made on says nothing about what this GPU is good at, and
    from_pretrained keeps the dtypes that are stored."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    for parameter in model.parameters():
        # quant_storage may be a float dtype, and stands for no numbers.
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(dtype)


def load_gguf_file(
    folder: str,
    file: str,
    device: torch.device,
    kwargs: dict[str, Any],
    keep_on_host: HostNames,
    tell: Callable[[str], None],
    host_layers: LayersOf = none_of,
) -> PreTrainedModel:
    """The model in a GGUF file.

    Raises:
        UserError: an argument that a GGUF file cannot be loaded with, or an architecture without tables.
    """
    quantization = streamed_quantization(kwargs.get("quantization_config"), kwargs["dtype"])
    target = _one_device(kwargs.get("device_map"), device)
    unknown = sorted(set(kwargs) - STREAMED_ARGUMENTS)
    if quantization is None:
        raise UserError(f"The GGUF file {file!r} is loaded with quantization none or nf4; set one of them.")
    if target is None or unknown or not isinstance(kwargs["dtype"], torch.dtype):
        name = unknown[0] if unknown else "device_map" if target is None else "dtype"
        raise UserError(
            f"model_init_kwargs has {name}={kwargs[name]!r}, which a GGUF file is not loaded with; drop it."
        )
    return load_gguf(
        folder,
        file,
        device=target,
        dtype=kwargs["dtype"],
        quantization=quantization,
        keep_on_host=keep_on_host,
        attention=kwargs.get("attn_implementation"),
        tell=tell,
        host_layers=host_layers,
        **_files_arguments(kwargs),
    )
