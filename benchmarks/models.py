"""Language models of real sizes with random weights: no download, and the memory and the work of the real ones.

The base is built layer by layer on the device, so that a 7B in 4 bits never exists in 16. The final norm is scaled
until the head's softmax is as peaked as a trained model's (0.5B, random tokens: 1.1 nats, 60 entries above 2^-16):
with plain random weights every row would be diffuse, and nothing that depends on the entropy (the sweep's direction,
the sampler) would run as it does in training.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn


class Size(NamedTuple):
    """Of Qwen2.5's published config.json."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


SIZES = {
    "qwen2.5-0.5b": Size(896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": Size(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": Size(2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": Size(3584, 18944, 28, 28, 4, 152064, False),
    "dry": Size(64, 128, 2, 4, 2, 512, False),
}
WEIGHT_STD = 0.02
# Standard deviation of the logits: twice sqrt(2 ln V), where a random-energy softmax condenses onto a few entries.
LOGIT_STD = 10.0
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def random_model(name: str, *, four_bit: bool, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """A Qwen2ForCausalLM on `device`; with `four_bit` all linear layers but the head are NF4 with double quantization.

    This stands in for from_pretrained with a BitsAndBytesConfig; of what that leaves on a model, peft needs
    `is_loaded_in_4bit`.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    s = SIZES[name]
    config = Qwen2Config(
        hidden_size=s.hidden, intermediate_size=s.inner, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads, vocab_size=s.vocab, tie_word_embeddings=s.tied, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=PAD, attn_implementation="sdpa", dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and key != "lm_head":
                setattr(parent, key, _linear(child, four_bit, dtype, device))
    fresh = lambda p: torch.empty(p.shape, dtype=dtype, device=device).normal_(std=WEIGHT_STD)
    for module in model.modules():
        for key, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                value = torch.ones(p.shape, dtype=dtype, device=device) if "norm" in _kind(module) else fresh(p)
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    model.model.norm.weight.data.fill_(LOGIT_STD / (WEIGHT_STD * math.sqrt(s.hidden)))
    # The rotary frequencies are no parameters: only its constructor knows them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.tie_weights()
    model.is_loaded_in_4bit = four_bit
    model.generation_config.eos_token_id = EOS
    return model.eval()


def _kind(module: nn.Module) -> str:
    return type(module).__name__.lower()


def _linear(like: nn.Linear, four_bit: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    has_bias = like.bias is not None
    weight = torch.empty(like.weight.shape, dtype=dtype, device=device).normal_(std=WEIGHT_STD)
    if four_bit:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(
            like.in_features, like.out_features, bias=has_bias, compute_dtype=dtype, compress_statistics=True,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        # Moving to the device is what quantizes.
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(device)
    else:
        layer = nn.Linear(like.in_features, like.out_features, bias=has_bias, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
    if has_bias:
        layer.bias = nn.Parameter(torch.zeros(like.out_features, dtype=dtype, device=device), requires_grad=False)
    return layer


PAD, EOS, UNKNOWN = 1, 2, 0


def word_tokenizer(vocab: int):
    """A token for every id: `w0` ... `w{vocab - 1}`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token=f"w{UNKNOWN}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=f"w{PAD}", eos_token=f"w{EOS}", unk_token=f"w{UNKNOWN}"
    )


def word_prompts(count: int, tokens: int, vocab: int) -> list[str]:
    return [" ".join(f"w{3 + (i * 7919 + j * 31) % (vocab - 3)}" for j in range(tokens)) for i in range(count)]
