"""Tiled MLPs compute what whole ones do, with less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from passes import GROUPS, adapted, assert_same, micro_batch, tiny, training_pass

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps, untile_mlps
from lowvram_grpo.policy.shared_prefix import why_not
from lowvram_grpo.training.scoring import score


def mlp_calls(model) -> list[int]:
    """Tokens of each pass through the first layer's MLP from here on."""
    calls = []
    mlp = next(m for name, m in model.named_modules() if name.endswith("layers.0.mlp"))
    mlp.act_fn.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[:-1].numel()))
    return calls


@pytest.mark.parametrize("checkpointed", [False, True], ids=["layers kept", "layers recomputed"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text", "Phi3"])
def test_tiles_change_neither_log_probs_nor_gradients(family, checkpointed):
    model = adapted(tiny(family))
    plain = training_pass(model)
    if checkpointed:
        checkpoint_activations(model)
    tile_mlps(model, 7)
    tiled = training_pass(model)
    assert_same(plain, tiled)
    untile_mlps(model)
    assert not any("_tile_tokens" in vars(m) or "forward" in vars(m) for m in model.modules())
    assert torch.equal(training_pass(model)[0].logps, plain[0].logps)


def test_each_tile_is_recomputed_in_the_backward_pass():
    model = adapted(tiny("Llama"))
    calls = mlp_calls(model)
    tile_mlps(model, 25)
    training_pass(model)  # 5 rows of 12 tokens
    assert calls == [25, 25, 10, 10, 25, 25]


def test_the_tile_may_be_changed_and_goes_with_the_shared_prefix():
    model = adapted(tiny("Llama"))
    checkpoint_activations(model)
    plain = training_pass(model)
    assert why_not(model) is None
    for tokens in (16, 5, 1, 1000):
        tile_mlps(model, tokens)
        assert_same(plain, training_pass(model, group_sizes=GROUPS))


def test_without_gradient_it_tiles_too():
    model = tiny("Llama")
    settings = {"temperature": 1.0, "workspace_mib": 1}
    with torch.no_grad():
        plain = score(model, *micro_batch(), **settings).logps
        calls = mlp_calls(model)
        tile_mlps(model, 25)
        torch.testing.assert_close(score(model, *micro_batch(), **settings).logps, plain, rtol=1e-4, atol=1e-5)
    assert calls == [25, 25, 10]


def test_a_copy_of_the_model_runs_on_its_own_weights():
    model = tiny("Llama")
    tile_mlps(model, 3)
    twin = copy.deepcopy(model)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    before = twin(ids).logits
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.zero_()
    assert torch.equal(twin(ids).logits, before)
    assert not torch.equal(model(ids).logits, before)


def test_on_quantized_weights():
    from bitsandbytes.nn import Linear4bit

    from lowvram_grpo.policy.load import keep_differentiable

    model = tiny("Llama", hidden_size=64, intermediate_size=128, head_dim=16)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            dense = getattr(layer.mlp, name)
            quantized = Linear4bit(
                dense.in_features, dense.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
            quantized.load_state_dict(dense.state_dict())
            setattr(layer.mlp, name, quantized.to("cpu"))
    keep_differentiable(model)
    model = adapted(model)
    checkpoint_activations(model)
    plain = training_pass(model)
    assert any("mlp.up_proj.lora_A" in name for name in plain[1])
    tile_mlps(model, 9)
    assert_same(plain, training_pass(model))


def test_the_peak_falls_for_long_sequences():
    """600 tokens in tiles of 60; the wide MLP holds most of what a layer does. CPU and meta agree."""
    peaks = {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = adapted(tiny("Llama", intermediate_size=512, max_position_embeddings=512))
        checkpoint_activations(model)
        assert why_not(model) is None
        batch = micro_batch([100, 100], [200, 200], [2], device=device)
        lengths = {"prompt_lengths": [100] * 2, "completion_lengths": [200] * 2, "group_sizes": [2]}
        for tile in (None, 60):
            if tile:
                tile_mlps(model, tile)
            with Ledger() as ledger:
                training_pass(model, batch, **lengths)
            peaks[device, tile] = ledger.peak
    assert peaks["meta", 60] < 0.5 * peaks["meta", None]
    assert peaks["cpu", 60] < 0.5 * peaks["cpu", None]


def test_models_without_a_plain_mlp_are_refused_by_name():
    with pytest.raises(UserError, match="Qwen3MoeForCausalLM has a mixture of experts in place of an MLP; leave"):
        tile_mlps(tiny("Qwen3Moe", num_experts=4, moe_intermediate_size=16), 8)
    model = tiny("Llama")
    model.model.layers[1].network = model.model.layers[1].mlp
    del model.model.layers[1].mlp
    with pytest.raises(UserError, match="without an MLP named mlp or feed_forward"):
        tile_mlps(model, 8)
    assert "forward" not in vars(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="at least one token"):
        tile_mlps(model, 0)
