"""A model's configuration, tokenizer and base weights, in 16 or 4 bits, from a folder, the hub or a GGUF file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowvram_grpo.errors import UserError, did_you_mean
from lowvram_grpo.policy.experts import check_experts
from lowvram_grpo.policy.gguf import gguf_config, gguf_parts, gguf_tokenizer
from lowvram_grpo.policy.precision import auto_dtype
from lowvram_grpo.policy.pretrained import hub_arguments, load_gguf_file, load_streamed, load_whole
from lowvram_grpo.policy.quantization import bitsandbytes_config, quantization_name
from lowvram_grpo.policy.refusals import (
    check_kind,
    check_rows,
    check_vocabulary,
    explained,
    lacks_vocabulary,
    no_tokenizer,
)
from lowvram_grpo.policy.text_model import mark_inside, text_or_whole
from lowvram_grpo.policy.weight_stream import layers_on_host
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.recipe.weight_offload import OFF

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lowvram_grpo.recipe.config import GRPOConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

__all__ = ["DTYPES", "bitsandbytes_config", "compute_dtype", "load_causal_lm", "load_tokenizer"]


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 from Ampere on, float16 on older GPUs, float32 on a CPU."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def model_config(model: str, gguf_file: str | None = None, **hub: Any) -> PretrainedConfig:
    """The configuration of a model: folder, hub id or GGUF file; `hub` has its revision or trust_remote_code. Of a
    multimodal model it is that of the language model inside of it.

    Raises:
        UserError: no such model, or one that is no causal language model.
    """
    return text_or_whole(_stored_config(model, gguf_file, **hub))


def _stored_config(model: str, gguf_file: str | None = None, **hub: Any) -> PretrainedConfig:
    try:
        if gguf := gguf_parts(model, gguf_file):
            config = gguf_config(*gguf, **{k: v for k, v in hub.items() if k != "trust_remote_code"})[0]
        else:
            # Else transformers asks at the terminal.
            config = AutoConfig.from_pretrained(model, **{"trust_remote_code": False, **hub})
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise explained(model, error) from error
    check_kind(model, config)
    return config


def check_attention(name: str | None) -> None:
    """Whether transformers knows this attn_implementation.

    Raises:
        UserError: it does not.
    """
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    # Kernels of the hub (owner/name) and paged variants are looked up when the model is built, and so is the package
    # behind flash_attention_2: transformers has several to choose from.
    if name is None or "/" in name or name.startswith("paged|"):
        return
    if name not in known:
        usual = ", ".join(n for n in known if n in ("eager", "sdpa", "flash_attention_2", "flex_attention"))
        raise UserError(
            f"attn_implementation is {name!r}{did_you_mean(name, known)}, which transformers does not know; "
            f"choose one of {usual}."
        )


def load_tokenizer(model: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Tokenizer of a model folder, hub id or GGUF file, padding on the left, with a pad token.

    Raises:
        UserError: no such model, or it has no tokenizer.
    """
    gguf = gguf_parts(model, kwargs.pop("gguf_file", None))
    try:
        tokenizer = gguf_tokenizer(*gguf, **kwargs) if gguf else AutoTokenizer.from_pretrained(model, **kwargs)
    except Exception as error:  # what is thrown for files that are damaged depends on the kind of tokenizer
        if not gguf and "trust_remote_code" not in str(error) and lacks_vocabulary(model):
            raise no_tokenizer(model) from error
        raise explained(model, error, "tokenizer") from error
    check_vocabulary(model, tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"The tokenizer of {model!r} has neither a pad nor an end-of-sequence token; set tokenizer.pad_token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizer_for(model: str | nn.Module, args: GRPOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that GRPOTrainer was given. Raises as `load_tokenizer`."""
    if isinstance(model, str):
        return load_tokenizer(model, **_place_of(args))
    return load_tokenizer(unwrap(model).config._name_or_path, trust_remote_code=args.trust_remote_code)


def _place_of(args: GRPOConfig) -> dict[str, Any]:
    """Where the files of a model given by name are, and whether its code may run."""
    init = args.model_init_kwargs or {}
    gguf = {"gguf_file": init["gguf_file"]} if init.get("gguf_file") else {}
    return {"trust_remote_code": args.trust_remote_code, **hub_arguments(init), **gguf}


def check_tokens(model: str | nn.Module, tokenizer: PreTrainedTokenizerBase, args: GRPOConfig) -> None:
    """Whether the model that GRPOTrainer was given has an embedding for each token; it is not loaded for that.

    Raises:
        UserError: it has not, or there is no such model.
    """
    if isinstance(model, str):
        config, name = model_config(model, **_place_of(args)), model
    else:
        config = unwrap(model).config
        name = config._name_or_path or type(unwrap(model)).__name__
    check_rows(name, tokenizer, config)


def load_causal_lm(
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization_config: Any = None,
    init_kwargs: dict[str, Any] | None = None,
    keep_on_host: Callable[[PreTrainedModel], tuple[str, ...]] = lambda model: (),
    weight_offload: str | int = OFF,
    tell: Callable[[str], None] = warnings.warn,
    expert_offload: str | int = OFF,
) -> PreTrainedModel:
    """Load a causal language model from a folder, a hub id or a GGUF file.

    Safetensors and GGUF files are streamed to `device` tensor by tensor; what that does not cover goes through
    from_pretrained.

    Args:
        model: folder, hub id, or path of a .gguf file.
        device: where a streamed or quantized model goes, unless `init_kwargs` has a device_map.
        dtype: of what is not quantized, unless `init_kwargs` has one.
        quantization_config: from `bitsandbytes_config`. A checkpoint that is quantized already is taken as it is.
        init_kwargs: arguments of from_pretrained.
        keep_on_host: names the modules (input embeddings, lm_head) of a model whose weights stay in host memory.
        weight_offload: GRPOConfig's. Decoder layers that shall wait in host memory are left there, for
            `stream_weights`; what has to go through from_pretrained is left there as a whole.
        tell: hears of weights in the checkpoint that the model has no place for.
        expert_offload: of GRPOConfig; for experts in 4 bits, and without effect where the model has none.

    Raises:
        UserError: missing model, one that is no causal language model, one that is quantized in another way, or a
            checkpoint that is damaged, lacks weights or has them in other shapes.
    """
    kwargs = {"dtype": dtype, **(init_kwargs or {})}
    if "torch_dtype" in kwargs:
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] in DTYPES:
        kwargs["dtype"] = DTYPES[kwargs["dtype"]]
    if quantization_config is not None:
        kwargs.setdefault("quantization_config", quantization_config)
    layers = partial(layers_on_host, weight_offload)
    try:
        if gguf := gguf_parts(model, kwargs.pop("gguf_file", None)):
            loaded = load_gguf_file(*gguf, device, kwargs, keep_on_host, tell, layers)
        else:
            stored = _stored_config(model, **hub_arguments(kwargs))
            config = text_or_whole(stored)
            asked = kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
            check_experts(config, quantization_name(asked), expert_offload)
            kwargs["dtype"] = auto_dtype(kwargs["dtype"], config.dtype, device)
            loaded = load_streamed(model, config, device, kwargs, keep_on_host, layers, expert_offload)
            if loaded is None:
                how = {"inside": config is not stored, "on_host": weight_offload != OFF}
                loaded = load_whole(
                    model, config, device, kwargs, keep_on_host, tell, **how, expert_offload=expert_offload
                )
            if config is not stored:
                mark_inside(loaded, stored)
                tell(f"of {model} the language model alone is loaded, without what sees or hears.")
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise explained(model, error) from error
    keep_differentiable(loaded)
    return loaded


def keep_differentiable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for CPU inference.

    On CPUs with AVX512-BF16, the first forward pass in eval mode (a rollout) repacks each Linear4bit for an operator
    that has no backward. Later training passes use it too, and gradients to the layers below vanish with a mere warning
    (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
