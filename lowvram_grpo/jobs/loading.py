"""From a recipe to what it names: tokenizer, GRPOConfig, model. What training, chat and evaluation load alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram_grpo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.recipe.resolve import Recipe


def check_device(recipe: Recipe) -> None:
    """Whether a CPU-only torch would leave this machine's NVIDIA card idle.

    Raises:
        UserError: it would, and nobody asked for the CPU.
    """
    from lowvram_grpo.memory.devices import cuda_install_line, nvidia_card_without_cuda_torch

    if recipe.training.get("use_cpu"):
        return
    card = nvidia_card_without_cuda_torch()
    if card:
        raise UserError(
            f"This machine has an {card}, but the installed torch is a CPU-only build; install the CUDA build with "
            f"`{cuda_install_line()}`, or pass --use-cpu to work on the CPU."
        )


def read_model_of(recipe: Recipe) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of the recipe's model, with the recipe's chat template where it names one. No weights
    are read.

    Raises:
        UserError: no such model, one of another kind, no tokenizer, tokens that the model has no embedding for, or no
            such template.
    """
    from lowvram_grpo.data.templates import chat_template
    from lowvram_grpo.policy.load import load_tokenizer, model_config
    from lowvram_grpo.policy.refusals import check_rows

    config = model_config(recipe.model, **recipe.hub_arguments)
    tokenizer = load_tokenizer(recipe.model, **recipe.hub_arguments)
    check_rows(recipe.model, tokenizer, config)
    if recipe.chat_template:
        tokenizer.chat_template = chat_template(recipe.chat_template)
    return config, tokenizer


def load_tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer alone. Raises as `read_model_of`."""
    return read_model_of(recipe)[1]


def training_config(recipe: Recipe, *, weights: list[float]) -> GRPOConfig:
    """The GRPOConfig of a recipe with rewards of these weights.

    Raises:
        UserError: settings that contradict each other, or that ask for what is not installed.
    """
    import torch
    from transformers.integrations import get_available_reporting_integrations

    from lowvram_grpo.policy.load import check_attention
    from lowvram_grpo.recipe.config import GRPOConfig

    check_attention(recipe.attn_implementation)
    settings = {"reward_weights": weights or None, **recipe.training}
    if recipe.dtype == "float16" and torch.cuda.is_available() and not {"bf16", "fp16"} & settings.keys():
        settings["fp16"] = True  # a float16 base under bfloat16 autocast would have no GradScaler
    settings |= {"output_dir": recipe.output_dir or "runs", "disable_tqdm": True, "model_init_kwargs": None}
    try:
        args = GRPOConfig(**settings)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"The training settings do not fit together: {error}") from error
    given = len(args.reward_weights or weights)
    if given != len(weights):
        raise UserError(f"reward_weights has {given} entries, but there are {len(weights)} rewards; give one for each.")
    available = get_available_reporting_integrations()
    for name in args.report_to:
        if name != "none" and name not in available:
            raise UserError(f"report_to asks for {name}, which is not installed; `pip install {name}`, or drop it.")
    return args


def adopt_stored_quantization(recipe: Recipe, config: PretrainedConfig, tell: Callable[[str], None]) -> bool:
    """Write the quantization of a checkpoint that has one already into `recipe`, unless a person set it.

    Returns:
        whether the memory of the model can be counted; `tell` hears what was taken, and why where it cannot.
    """
    from lowvram_grpo.policy.quantization import quantization_name

    stored = getattr(config, "quantization_config", None)
    if stored is None or recipe.origin.get("quantization") in ("flag", "file"):
        return True
    kind = quantization_name(stored)
    if kind == "mxfp4":  # experts of gpt-oss, which are brought to nf4 one by one, or to 16 bits
        tell(
            f"the checkpoint is stored in {kind}; its experts are brought to {recipe.quantization} as they are loaded."
        )
        return True
    recipe.quantization = kind if kind in ("nf4", "int8") else "none"
    recipe.origin["quantization"] = "checkpoint"
    counted = recipe.quantization != "none"
    tell(
        f"the checkpoint is stored in {kind}, which is taken as it is{'' if counted else '; no memory plan counts it'}."
    )
    return counted


def fresh_lora(recipe: Recipe) -> LoraConfig:
    """The adapter that the recipe begins with where it names none."""
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.lora_target_modules,
        modules_to_save=recipe.lora_modules_to_save,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        task_type="CAUSAL_LM",
    )


def dtype_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Of the weights that are not quantized. Those that are trained are float32, as the plan counts them."""
    from lowvram_grpo.policy.load import DTYPES, compute_dtype

    if not recipe.use_peft:
        return DTYPES["float32"]
    return compute_dtype(device) if recipe.dtype == "auto" else DTYPES[recipe.dtype]


def load_model_of(recipe: Recipe, args: GRPOConfig, tell: Callable[[str], None]) -> nn.Module:
    """The recipe's model on the device of `args`, quantized as it says, in its adapter where it names one.

    Args:
        tell: hears of weights in the checkpoint that the model has no place for.

    Raises:
        UserError: missing or unfit model or adapter.
    """
    from lowvram_grpo.memory.guard import cap
    from lowvram_grpo.policy.adapter import load_adapter
    from lowvram_grpo.policy.embeddings import stays_on_host
    from lowvram_grpo.policy.load import load_causal_lm
    from lowvram_grpo.policy.quantization import bitsandbytes_config

    cap(args.device, args.vram_gib)  # before a byte is allocated
    dtype = dtype_of(recipe, args.device)
    init = {**recipe.hub_arguments, **(recipe.training.get("model_init_kwargs") or {})}
    if recipe.attn_implementation:
        init["attn_implementation"] = recipe.attn_implementation
    quantization = bitsandbytes_config(recipe.quantization, dtype)
    model = load_causal_lm(
        recipe.model,
        device=args.device,
        dtype=dtype,
        quantization_config=quantization,
        init_kwargs=init,
        keep_on_host=lambda model: stays_on_host(model, args.head_dtype, args.embedding_offload),
        weight_offload=args.weight_offload,
        tell=tell,
        expert_offload=args.expert_offload,
    )
    return load_adapter(model, recipe.adapter) if recipe.adapter else model
