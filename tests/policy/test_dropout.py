"""A model's own dropout never comes between log-probs that are compared."""

from __future__ import annotations

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, MixtralConfig, OPTConfig

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.dropout import adapter_dropout, disable_dropout, training_mode

IDS = {"vocab_size": 41, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
MODELS = {
    # modules
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS),
    # functional, in checkpointed layers themselves, and whole layers
    "opt": OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
                     max_position_embeddings=64, dropout=0.2, attention_dropout=0.2, layerdrop=0.5, **IDS),
    # functional, with a probability that is read from the configuration
    "falcon": FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.2,
                           attention_dropout=0.2, **IDS),
    # no dropout, but noise all the same
    "mixtral": MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3, **IDS),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name]).float()


@pytest.mark.filterwarnings("ignore:completions are sampled by transformers")
@pytest.mark.parametrize("name", MODELS)
def test_ratio_and_kl_start_where_they_must(config, dataset, tokenizer, name):
    norms = []
    for peft_config, checkpointing in ((LORA, True), (LORA, False), (None, True)):
        args = config(
            num_iterations=2, per_device_train_batch_size=3, gradient_checkpointing=checkpointing, max_steps=1
        )
        trainer = GRPOTrainer(made(name), digit_share, args, dataset, processing_class=tokenizer,
                              peft_config=peft_config, observer=Quiet())  # fmt: skip
        trainer.train()
        row = trainer.state.log_history[0]
        assert (row["kl"], row["ratio/min"], row["ratio/max"]) == (0, 1, 1)
        norms.append(row["grad_norm"])
    # What is computed again in the backward pass is what was computed before it.
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0


def test_train_mode_alone_would_drop():
    model, ids = made("gpt2").train(), torch.tensor([[5, 6, 7]])
    assert not torch.equal(model(ids).logits, model(ids).logits)
    training_mode(model)
    assert model.training and torch.equal(model(ids).logits, model(ids).logits)


def test_layers_that_checkpoint_still_do():
    model = made("opt")
    checkpoint_activations(model)
    training_mode(model)
    layers = model.model.decoder.layers
    assert all(layer.training for layer in layers) and not any(layer.self_attn.training for layer in layers)
    calls = []
    layers[0].fc1.register_forward_hook(lambda *_: calls.append(1))
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert len(calls) == 2


def test_the_adapters_dropout_stays_where_it_is_asked_for():
    model = get_peft_model(make_model(), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    ids = torch.tensor([[5, 6, 7]])
    assert adapter_dropout(model) == 0.5
    training_mode(model)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert adapter_dropout(model) == 0 and torch.equal(model(ids).logits, model(ids).logits)


def test_an_adapters_dropout_is_said(config, dataset, tokenizer, model):
    for off in (False, True):
        lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
        trainer = GRPOTrainer(model if off else make_model(), digit_share, config(max_steps=1, disable_dropout=off),
                              dataset, processing_class=tokenizer, peft_config=lora, observer=Quiet())  # fmt: skip
        trainer.train()
        assert any("adapter's dropout of 0.1" in text for text in trainer.observer.said) is not off


def test_doras_own_dropout_is_on_in_a_training_pass_too():
    """It looks at the layer's `training`, not at its dropout's."""
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, use_dora=True, init_lora_weights=False)
    model = get_peft_model(make_model(), config)
    ids = torch.arange(3, 15)[None]
    training_mode(model)
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
