"""Models with LoRA layers, what they compute while sampling, and the products that it takes."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Gemma2Config, LlamaConfig, Phi3Config, Qwen2Config

from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.adapters import fast_adapters

LORA = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
SIZES = {
    "vocab_size": 41, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "phi3": Phi3Config, "gemma2": Gemma2Config}
IDS = torch.randint(3, 41, (2, 7), generator=torch.Generator().manual_seed(5))


def randomize(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def with_lora(base=None, **settings):
    base = make_model(hidden_size=64, intermediate_size=128) if base is None else base
    return randomize(get_peft_model(base, LoraConfig(**{**LORA, **settings}))).eval()


def of(architecture):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return with_lora(AutoModelForCausalLM.from_config(CONFIGS[architecture](**SIZES)))


def two_steps(model, autocast=nullcontext):
    """Hidden states of a prefill and of a decode step of one token."""
    with torch.no_grad(), autocast():
        decoder = unwrap(model).model
        cache = DynamicCache(config=decoder.config)
        first = decoder(IDS, past_key_values=cache).last_hidden_state
        return first, decoder(IDS[:, :1], past_key_values=cache).last_hidden_state


def inside(model, mode, autocast=nullcontext):
    with torch.no_grad(), autocast(), fast_adapters(model, mode):
        return two_steps(model)


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


def forwards(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


class Products(TorchDispatchMode):
    """Shapes of all products of two matrices, by operator."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.seen.append((name, tuple(a.shape), tuple(b.shape)))
        return func(*args, **(kwargs or {}))

    def shapes(self, name):
        return [(a, b) for found, a, b in self.seen if found == name]
