"""The policy made small: a LoRA adapter on the base weights, embeddings placed, activations recomputed, layers in few
launches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowvram_grpo.errors import UserError, counted, one_line
from lowvram_grpo.policy.attention import keep_caps
from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps
from lowvram_grpo.policy.dropout import disable_dropout
from lowvram_grpo.policy.embeddings import place_embeddings
from lowvram_grpo.policy.expert_targets import names_as_they_are, without_experts
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.policy.load import compute_dtype, keep_differentiable, load_causal_lm
from lowvram_grpo.policy.long_rope import settle_rotary
from lowvram_grpo.policy.lora_targets import with_targets
from lowvram_grpo.policy.text_model import save_under_whole_names
from lowvram_grpo.policy.training_ops import fewer_launches
from lowvram_grpo.policy.variants import (
    ChangedBase,
    changes_base,
    check_adapter,
    check_adapters_of,
    check_tied_tokens,
)
from lowvram_grpo.policy.weight_stream import layers_on_host, stream_weights
from lowvram_grpo.policy.wrapper import is_peft, unwrap
from lowvram_grpo.recipe.weight_offload import OFF

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from lowvram_grpo.recipe.config import GRPOConfig


def build_policy(
    model: str | nn.Module,
    args: GRPOConfig,
    quantization_config: Any,
    peft_config: PeftConfig | None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> nn.Module:
    """The model that GRPOTrainer trains, from whatever it was given; `tell` hears what was made smaller.

    Raises:
        UserError: arguments that contradict each other, or a model that cannot be trained.
    """
    if peft_config is not None:
        check_adapter(peft_config, fresh=True, reference=args.beta > 0)
    if isinstance(model, str):
        # Training all weights needs float32 masters under autocast; frozen weights need no such room.
        dtype = compute_dtype(args.device) if peft_config is not None else torch.float32
        init = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        if quantization_config is not None and "quantization_config" in init:
            raise UserError(
                "quantization_config is given twice, to the trainer and in model_init_kwargs; leave it in one of them."
            )
        model = load_causal_lm(
            model, device=args.device, dtype=dtype, quantization_config=quantization_config, init_kwargs=init,
            weight_offload=args.weight_offload, expert_offload=args.expert_offload, tell=tell,
        )  # fmt: skip
    model = _with_adapter(model, args, peft_config)
    if is_peft(model) or args.head_dtype != "dense" or args.embedding_offload:
        for sentence in place_embeddings(
            unwrap(model),
            head_dtype=args.head_dtype,
            embedding_offload=args.embedding_offload,
            # On meta, where memory is planned, nothing is ever anywhere else.
            device=torch.device("meta") if next(model.parameters()).is_meta else args.device,
            workspace_mib=args.workspace_mib,
        ):
            tell(sentence)
    head_of(unwrap(model))
    keep_differentiable(model)
    _check_trainable(model)
    for p in model.parameters():
        # A GradScaler refuses float16 gradients, and small updates vanish in float16 weights.
        if p.requires_grad and p.dtype == torch.float16:
            p.data = p.data.float()
    keep_caps(unwrap(model))
    stream_layers(model, args, tell)
    _choose_forwards(model, args)
    if args.max_prompt_length is not None:
        longest = args.max_prompt_length + args.max_completion_length
        if beyond := settle_rotary(unwrap(model), longest):
            tell(
                f"sequences of up to {longest} tokens are beyond the {beyond} that the model's rotary frequencies were "
                "first made for, so all take those for long ones, short sequences too (as in vLLM)."
            )
    return model


def stream_layers(model: nn.Module, args: GRPOConfig, tell: Callable[[str], None]) -> None:
    """Stream as many of the policy's layers as `weight_offload` says; `tell` hears how many.

    Raises:
        UserError: they can't be.
    """
    if args.weight_offload == OFF:
        return
    device = torch.device("meta") if next(model.parameters()).is_meta else args.device
    # A model without known layers is refused in there.
    stream = stream_weights(model, layers_on_host(args.weight_offload, model) or 1, device)
    size = stream.bytes / 2**30
    tell(
        f"{counted(len(stream.layers), 'decoder layer')} wait in host memory ({size:.2f} GiB) and are streamed in each "
        f"pass (weight_offload)."
    )
    if not stream.locked:
        tell(
            f"the system grants no page-locked memory for all of the streamed layers ({size:.1f} GiB), so their copies "
            "wait for the GPU: slower, the same numbers."
        )


def _with_adapter(model: nn.Module, args: GRPOConfig, peft_config: PeftConfig | None) -> nn.Module:
    if is_peft(model) and peft_config is not None:
        raise UserError("The model carries an adapter already; drop peft_config, or merge the adapter first.")
    if is_peft(model):
        check_adapters_of(model, reference=args.beta > 0)
    if peft_config is not None:
        if args.use_vllm and changes_base(peft_config):
            raise UserError(
                f"init_lora_weights {peft_config.init_lora_weights!r} changes weights of the base model, which vLLM "
                "does not see; take init_lora_weights True, or leave use_vllm off."
            )
        return attach_lora(model, peft_config)
    if getattr(model, "is_quantized", False) and not is_peft(model):
        raise UserError("A quantized model cannot be trained directly; pass a peft_config to train an adapter on it.")
    return model


def _check_trainable(model: nn.Module) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            "No weight of the model requires grad; load the adapter with is_trainable=True, or pass a peft_config."
        )


def _choose_forwards(model: nn.Module, args: GRPOConfig) -> None:
    """What its modules drop, compute in tiles, compute again, and compute by kernels of ours."""
    if args.disable_dropout:
        disable_dropout(model)
    if args.mlp_tile:
        kwargs = args.gradient_checkpointing_kwargs or {}
        tile_mlps(model, args.mlp_tile, *([kwargs["context_fn"]] if "context_fn" in kwargs else []))
    if args.gradient_checkpointing:
        checkpoint_activations(model, args.gradient_checkpointing_kwargs)
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    fewer_launches(model, args.fused_ops, autocast)


def attach_lora(model: PreTrainedModel, peft_config: PeftConfig) -> nn.Module:
    """Wrap `model` with a fresh adapter; adapter weights are float32 whatever the base is in.

    Raises:
        UserError: the adapter covers lm_head, or no layer has the names in target_modules.
    """
    from peft import get_peft_model

    changed = changes_base(peft_config)
    if changed and getattr(model, "is_quantized", False):
        raise UserError(
            f"init_lora_weights {peft_config.init_lora_weights!r} changes weights of the base model, which are "
            "quantized; load the model unquantized, or take init_lora_weights True."
        )
    # peft writes the names that it found into the configuration, which would then fit no other model.
    peft_config = copy.deepcopy(peft_config)
    plain = without_experts(model, peft_config)
    try:
        with names_as_they_are(plain):
            wrapped = get_peft_model(model, with_targets(model, peft_config))
    except (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError, KeyError) as error:
        raise UserError(f"The LoRA configuration does not fit the model: {one_line(error)}.") from error
    if changed:
        ChangedBase(wrapped)
    check_tied_tokens(wrapped)
    head_of(wrapped.get_base_model())
    save_under_whole_names(wrapped)
    return wrapped
