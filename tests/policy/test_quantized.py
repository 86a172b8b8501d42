"""4-bit and 8-bit bases: the right numbers, the right gradients, on a CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import digit_share, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm

CPU = torch.device("cpu")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture
def wide_dir(tmp_path):
    """bitsandbytes quantizes in blocks of 64 weights."""
    folder = tmp_path / "wide"
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def load(folder, quantization):
    config = bitsandbytes_config(quantization, torch.float32)
    return load_causal_lm(folder, device=CPU, dtype=torch.float32, quantization_config=config)


def dequantized(quantized, folder):
    """A plain float64 model with exactly the weights that the 4-bit one stands for."""
    import bitsandbytes as bnb

    plain = load_causal_lm(folder, device=CPU, dtype=torch.float32)
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    return plain.double()


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def test_nf4_gradients_are_right_after_a_rollout_in_eval_mode(wide_dir):
    """bitsandbytes repacks weights in eval mode on some CPUs, for an operator without a backward."""
    quantized = load(wide_dir, "nf4")
    exact = get_peft_model(dequantized(quantized, wide_dir), LoraConfig(**LORA), autocast_adapter_dtype=False).double()
    quantized = get_peft_model(quantized, LoraConfig(**LORA))
    randomize(quantized), randomize(exact)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    quantized.eval()
    with torch.no_grad():
        quantized(ids)
    quantized.train()
    for model in (quantized, exact):
        torch.log_softmax(model(ids).logits, -1)[0, :, 7].sum().backward()
    theirs = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    compared = 0
    for name, p in quantized.named_parameters():
        if p.requires_grad:
            scale = theirs[name].abs().max()
            assert (p.grad.double() - theirs[name]).abs().max() <= 1e-4 * scale, name
            compared += 1
    assert compared == 28


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_trains_on_a_quantized_base(wide_dir, config, dataset, quantization):
    args = config(learning_rate=2e-2, max_steps=12, num_generations=8, beta=0.01)
    trainer = GRPOTrainer(
        load(wide_dir, quantization), digit_share, args, dataset,
        processing_class=make_tokenizer(), peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "loss" in row]
    # LLM.int8 rounds activations, and in train mode not as in eval mode: its KL starts near 0, not at 0.
    assert trainer.state.log_history[0]["kl"] <= {"nf4": 0, "int8": 0.01}[quantization]
    assert sum(rewards[-4:]) > 1.3 * sum(rewards[:4])


def test_nf4_takes_a_quarter_of_the_linear_weights(wide_dir):
    plain, small = load(wide_dir, "none"), load(wide_dir, "nf4")
    linear = sum(p.numel() * 4 for n, p in plain.named_parameters() if "proj" in n)
    kept = plain.get_memory_footprint() - linear
    assert small.get_memory_footprint() - kept < linear / 4
