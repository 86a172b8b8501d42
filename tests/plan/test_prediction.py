"""Predicted bytes against those of real runs, and of few layers against all."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.plan.counting import Blueprint, count
from lowvram_grpo.plan.prediction import predict
from lowvram_grpo.plan.stand_in import StandIn
from lowvram_grpo.policy.stream import skeleton
from tests.conftest import make_model, make_tokenizer
from tests.plan.measured import measured, settings

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SIZES = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 5, "vocab_size": 1024,
    "initializer_range": 0.02,
}  # fmt: skip

RUNS = {
    # Both prompts in one micro-batch, which is padded: what is predicted has a mask.
    "plain": ("none", {"shared_prefix": "off", "head_dtype": "dense", "per_device_train_batch_size": 8}),
    "shared, 4 bits": ("nf4", {"shared_prefix": "on", "head_dtype": "int8", "optim": "adamw_8bit"}),
    "kept activations": ("none", {"gradient_checkpointing": False, "shared_prefix": "on", "head_dtype": "int8"}),
    "tiles, old log-probs": ("nf4", {"mlp_tile": 16, "num_iterations": 2, "head_dtype": "nf4", "max_steps": 3}),
    "entropy bonus": ("none", {"entropy_coef": 0.01, "kl_estimator": "exact", "gradient_checkpointing": False}),
    "all weights": ("none", {"shared_prefix": "on"}),
    "all weights, a streamed reference": ("none", {"shared_prefix": "on", "reference_offload": True}),
    "small waves": ("none", {"rollout_batch_size": 2, "beta": 0.0, "per_device_train_batch_size": 8}),
}


@pytest.mark.parametrize("run", RUNS)
def test_predicted_bytes_are_those_of_a_real_run(tmp_path, run):
    """Every phase within 2 %: the bound of the issue, which SmolLM2-135M and MiniMind2-26M keep too (docs/LOG.md)."""
    quantization, given = RUNS[run]
    make_model(**SIZES).save_pretrained(tmp_path / "model")
    args = settings(
        tmp_path / "run",
        **{
            "num_generations": 4, "prompts_per_step": 2, "per_device_train_batch_size": 4, "max_prompt_length": 40,
            "max_completion_length": 24, "optim": "adamw_torch", "workspace_mib": 1, "gradient_checkpointing": True,
            **given,
        },
    )  # fmt: skip
    prompts = [" ".join("abcdefghij" * 4), " ".join("abcdefghijk" * 3 + ("" if run == "plain" else "lmnopqr"))]
    lora = None if run.startswith("all weights") else LORA
    real = measured(str(tmp_path / "model"), args, make_tokenizer(), prompts, quantization, lora)
    blueprint = Blueprint(make_model(**SIZES).config, quantization, torch.float32, lora, "cpu", longest_prompt=40)
    found = predict(blueprint, args, exact=True)
    for phase, size in found.phases.items():
        assert size == pytest.approx(real[phase].bytes, rel=0.02), phase


def test_replies_are_counted_with_the_prompts():
    """They are prefilled beside a full cache; no other phase knows of them."""
    blueprint = Blueprint(_config("qwen2", 2), "none", torch.bfloat16, LORA, longest_prompt=40)
    args = _paper(max_prompt_length=40, max_completion_length=900, head_dtype="int8")
    plain, turns = (count(replace(blueprint, converses=x), args) for x in (False, True))
    assert turns["rollout"].categories["KV cache"] == plain["rollout"].categories["KV cache"]
    assert {name for name, peak in turns.items() if peak.bytes != plain[name].bytes} == {"prefill", "rollout"}
    assert turns["rollout"].bytes > plain["rollout"].bytes


def test_the_bytes_of_a_reference_on_the_card_and_of_a_streamed_one():
    config = _config("qwen2", 8)
    model = 4 * sum(p.numel() for p in skeleton(config, torch.float32).parameters())
    layer = 4 * sum(p.numel() for p in skeleton(config, torch.float32).model.layers[0].parameters())
    blueprint = Blueprint(config, "none", torch.bfloat16, None)
    plain = {"head_dtype": "dense", "embedding_offload": False}
    resident, streamed, none = (
        predict(blueprint, _paper(**plain, **more)) for more in ({}, {"reference_offload": True}, {"beta": 0.0})
    )
    for phase in resident.phases:
        assert resident.parts[phase]["reference"] == pytest.approx(model, rel=1e-3), phase
        visiting = streamed.parts[phase].get("reference", 0)
        if phase == "score":
            assert 2 * layer <= visiting <= 2 * layer + 2**14
        else:
            assert visiting < 2**14
            assert streamed.phases[phase] == pytest.approx(none.phases[phase], rel=5e-3), phase
    assert predict(blueprint, _paper(**plain, reference_offload=True), exact=True).phases == pytest.approx(
        streamed.phases, rel=2e-3
    )
    # Of an adapter it is none: the second one counts as adapter, as ever.
    lora = predict(Blueprint(config, "none", torch.bfloat16, LORA, follows=True), _paper(reference_offload=True))
    assert not any("reference" in parts for parts in lora.parts.values())


def test_rollouts_elsewhere_take_none_of_this_card():
    blueprint = Blueprint(make_model(**SIZES).config, "none", torch.float32, LORA, "cpu", longest_prompt=40)
    here = predict(blueprint, _paper())
    away = predict(blueprint, _paper(use_vllm=True, vllm_mode="server", vllm_importance_sampling_correction=False))
    assert away.phases["rollout"] < here.phases["rollout"]
    assert "KV cache" in here.parts["rollout"] and "KV cache" not in away.parts["rollout"]
    assert {"base weights", "adapter"} <= away.parts["rollout"].keys()  # which are held all the while
    for phase in here.phases.keys() - {"rollout"}:
        assert away.phases[phase] == here.phases[phase], phase


def _paper(**overrides):
    return settings(
        "plan",
        **{
            "num_generations": 4, "prompts_per_step": 2, "per_device_train_batch_size": 4, "max_prompt_length": 64,
            "max_completion_length": 48, "optim": "adamw_8bit", "head_dtype": "int8", "embedding_offload": True,
            "gradient_checkpointing": True, "workspace_mib": 4, **overrides,
        },
    )  # fmt: skip


def _config(kind: str, layers: int):
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096, "head_dim": 64, "max_position_embeddings": 512,
    }  # fmt: skip
    if kind == "gemma3_text":
        sizes["layer_types"] = [("full" if i % 3 == 2 else "sliding") + "_attention" for i in range(layers)]
        sizes["sliding_window"] = 32
    return AutoConfig.for_model(kind, **sizes)


DEPTHS = {
    "plain": {},
    "offload, tiles": {"activation_offload": True, "mlp_tile": 512},
    "kept": {"gradient_checkpointing": False},
}
OFTEN = {("qwen3", "plain"), ("qwen2", "kept")}


@pytest.mark.parametrize(
    "kind, given",
    [
        pytest.param(kind, given, id=f"{kind}-{name}", marks=() if (kind, name) in OFTEN else pytest.mark.full)
        for kind in ("qwen2", "qwen3", "llama", "gemma3_text")
        for name, given in DEPTHS.items()
    ],
)
def test_few_layers_tell_the_bytes_of_many(kind, given):
    blueprint = Blueprint(_config(kind, 15), "nf4", torch.bfloat16, LORA)
    args = _paper(max_completion_length=256, **given)
    quick, whole = predict(blueprint, args), predict(blueprint, args, exact=True)
    for phase, size in whole.phases.items():
        assert quick.phases[phase] == pytest.approx(size, rel=2e-3), phase
    assert sum(quick.categories.values()) == pytest.approx(quick.peak, rel=1e-3)


@pytest.mark.full  # tests/bench/test_bench_memory.py has each rung of a ladder, tests/plan/test_baseline.py the bytes
def test_each_saver_saves():
    blueprint = Blueprint(_config("qwen2", 12), "nf4", torch.bfloat16, LORA)
    # Long enough for tensors that are worth offloading.
    phases = cache(lambda **given: predict(blueprint, _paper(max_completion_length=256, **given)).phases)
    peak = lambda phase, **given: phases(**given)[phase]
    assert peak("backward", per_device_train_batch_size=2) < peak("backward")
    assert peak("forward", activation_offload=True) < peak("forward")
    assert peak("backward", mlp_tile=512) < peak("backward")
    assert peak("rollout", rollout_batch_size=2) < peak("rollout")
    assert peak("load") < peak("load", head_dtype="dense")
    assert peak("backward", shared_prefix="on") < peak("backward", shared_prefix="off")
    assert peak("optimizer") < peak("optimizer", optim="adamw_torch")
    assert predict(blueprint, _paper(workspace_mib=2)).peak <= predict(blueprint, _paper()).peak


def test_categories_are_what_they_say():
    peaks = count(Blueprint(_config("qwen2", 3), "none", torch.bfloat16, LORA), _paper(head_dtype="dense"))
    config = _config("qwen2", 3)
    h, v, inner = config.hidden_size, config.vocab_size, config.intermediate_size
    assert peaks["rollout"].categories["head"] == 2 * v * h  # the input embedding is in host memory
    modules = [(h, h), (h, h // 2), (h, h // 2), (h, h), (h, inner), (h, inner), (inner, h)]
    lora = 3 * sum(4 * (a + b) * 4 for a, b in modules)
    assert peaks["rollout"].categories["adapter"] == lora + lora // 2  # and what is cast to 16 bits while sampling
    assert peaks["optimizer"].categories["adapter"] == lora
    assert peaks["optimizer"].categories["gradients"] == lora
    # Keys and values of 2 KV heads of 64 in 16 bits: two prompts but for their last tokens once, eight completions.
    assert peaks["rollout"].categories["KV cache"] == 3 * 2 * 2 * 64 * 2 * (2 * 63 + 8 * 48)


def test_attention_holds_no_scores():
    q = torch.empty(1, 4, 512, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    for mask in (None, torch.ones(1, 1, 512, 512, dtype=torch.bool, device="meta")):
        with StandIn("cuda"), Ledger() as ledger:
            torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=mask is None)
        scores = 4 * 512 * 512 * 2
        assert ledger.peak < scores


def test_autocast_is_imitated():
    """Bytes that autograd keeps under torch.autocast on the CPU, and on meta under the imitation."""

    def run(device, context):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.zeros(64, 64, device=device)) for _ in range(3)]
        x = torch.zeros(32, 64, device=device)
        with Ledger(device=device) as ledger, context:
            for w in weights:
                x = torch.nn.functional.linear(x, w).relu() @ w
            return ledger.live, x.dtype

    stand_in = StandIn("cpu", torch.bfloat16)
    with stand_in:
        imitated = run("meta", stand_in.autocast())
    assert imitated == run("cpu", torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("head", ["int8", "nf4"])
def test_planning_leaves_nothing_on_meta_for_the_run_that_follows(head):
    from lowvram_grpo.kernels.quantized import NF4Weight

    predict(Blueprint(_config("qwen2", 5), "nf4", torch.bfloat16, LORA), _paper(head_dtype=head))
    assert not NF4Weight.quantize(torch.randn(64, 64)).packed.is_meta
    import bitsandbytes.functional as functional

    assert not any(table.is_meta for table in functional.name2qmap.values())
