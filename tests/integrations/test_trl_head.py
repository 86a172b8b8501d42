"""TRL's trainer with our sweep: the losses, norms and metrics of TRL's own path."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is what is switched on: pip install -e '.[test]' on Python 3.11 or later")

import torch
from beside_trl import OFF_POLICY, agree, chunked_calls, pair, trained, trainer_of
from conftest import make_model

from lowvram_grpo.integrations.trl import switch_on
from lowvram_grpo.policy.wrapper import unwrap


def lora(**more):
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0, **more)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.04, **OFF_POLICY},
        {"importance_sampling_level": "sequence", **OFF_POLICY},
        {"top_entropy_quantile": 0.4, "beta": 0.02},
        {"entropy_coef": 0.05},
        {"mask_truncated_completions": True, "steps_per_generation": 4, "pad_to_multiple_of": 4},
        {"gradient_checkpointing": True, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
@pytest.mark.parametrize("adapter", [None, lora], ids=["all weights", "lora"])
def test_the_same_steps(tmp_path, settings, adapter):
    agree(*pair(tmp_path, adapter=adapter, **settings))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"])
def test_loss_types(tmp_path, loss_type):
    agree(*pair(tmp_path, adapter=lora, loss_type=loss_type, beta=0.03, **OFF_POLICY))


def test_a_head_cast_to_float32(tmp_path):
    agree(*pair(tmp_path, cast_lm_head_to_fp32=True, beta=0.04))


def test_trl_under_autocast(tmp_path):
    """TRL's default, bf16: on a CPU TRL rounds logits to bfloat16 and we do not. The reference's forward is behind
    accelerate's by now, which hides TRL's."""
    agree(*pair(tmp_path, bf16=True, beta=0.04, learning_rate=0.01), rel=0.03)


def scores(trainer, *, grad: bool = False):
    """Log-probs and entropies of three rows, padded on both sides, one of them without a scored token."""
    ids = torch.randint(3, 41, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, -3:], mask[2, -5:] = 0, 0, 0
    with torch.set_grad_enabled(grad):
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, 5, compute_entropy=True, batch_size=2
        )  # fmt: skip
    return logps, entropies


@pytest.mark.parametrize("kind", ["softcap", "scale", "bias", "mixture"])
def test_heads_that_are_more_than_a_product(tmp_path, kind):
    """Values and gradients, of the entropy too."""
    model = other_model(kind)
    weight = {"mixture": {"router_aux_loss_coef": 0.1}}.get(kind, {})
    trainer = trainer_of(tmp_path, model, entropy_coef=0.1, **weight)
    inputs = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))

    def found():
        logps, entropies = scores(trainer, grad=True)
        trainer.model.zero_grad()
        (logps * inputs[0] + entropies * inputs[1]).sum().backward()
        return [logps, entropies, *(p.grad for p in trainer.model.parameters() if p.grad is not None)]

    before = found()
    undo = switch_on(trainer, engine=False)
    counting, calls = chunked_calls()
    with counting:
        now = found()
        assert not calls
        undo()
        found()
    assert calls and len(before) == len(now) > 8
    for theirs, ours in zip(before, now):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert before[0][2].eq(0).all() and not before[0][0].eq(0).any()


def other_model(kind: str):
    import transformers

    settings = {
        "vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1,
        "pad_token_id": 0, "initializer_range": 0.5,
    }  # fmt: skip
    torch.manual_seed(2)
    if kind == "softcap":
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings, final_logit_softcapping=2.0))
    if kind == "scale":
        return transformers.CohereForCausalLM(transformers.CohereConfig(**settings, logit_scale=0.3))
    if kind == "mixture":
        settings |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings))
    model = make_model(tie_word_embeddings=False)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(41))
    return model


def test_a_model_that_sees(tmp_path):
    """Its backbone, scaled images and all, is called as TRL calls it."""
    import transformers
    from trl.trainer.utils import add_fused_lm_head

    settings = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "final_logit_softcapping": 3.0}
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={**settings, **heads}, vision_config=eyes, mm_tokens_per_image=4, image_token_index=40,
        boi_token_index=38, eoi_token_index=39,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    for p in model.parameters():  # the projection of an image is 0 at first
        torch.nn.init.normal_(p, std=0.3)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    trainer = trainer_of(tmp_path)
    trainer.model = model
    ids = torch.tensor([[5, 38, 40, 40, 40, 40, 39, 6, 7, 8, 9]])
    given = {"pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (ids == 40).long(), "num_images": [1]}
    found = lambda: trainer._get_per_token_logps_and_entropies(
        model, ids, torch.ones_like(ids), 4, compute_entropy=True, **given
    )[:2]  # fmt: skip
    theirs = found()
    switch_on(trainer, engine=False)
    counting, calls = chunked_calls()
    with counting:
        ours = found()
    assert not calls
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    given["pixel_values"] = given["pixel_values"] + 1
    assert not torch.allclose(found()[0], theirs[0])


def test_a_router_is_balanced_as_in_trl(tmp_path):
    trainer = lambda name: trainer_of(tmp_path / name, other_model("mixture"), router_aux_loss_coef=0.5)
    theirs, ours = trainer("theirs"), trainer("ours")
    switch_on(ours, engine=False)
    agree(trained(theirs), trained(ours))
    assert "aux_loss" in ours.state.log_history[0]


def test_the_entropy_has_a_gradient_where_a_loss_may_want_it(tmp_path):
    import trl

    class Mine(trl.GRPOTrainer):
        pass

    for kind, settings, wanted in ((None, {}, False), (None, {"entropy_coef": 0.1}, True), (Mine, {}, True)):
        trainer = trainer_of(tmp_path, kind=kind, **settings)
        switch_on(trainer, engine=False)
        assert scores(trainer, grad=True)[1].requires_grad is wanted


def test_an_adapted_head_stays_with_trl(tmp_path):
    """modules_to_save trains a copy of lm_head, which the sweep does not read."""
    trainer = trainer_of(tmp_path, adapter=lora(modules_to_save=["lm_head"]))
    with pytest.warns(UserWarning, match="log-prob path stays TRL's own, because The adapter covers lm_head"):
        switch_on(trainer, engine=False)
    counting, calls = chunked_calls()
    with counting:
        scores(trainer)
    assert calls


def test_undo_behind_accelerate(tmp_path):
    """train() has wrapped the forward by then."""
    trainer = trainer_of(tmp_path, bf16=True, max_steps=1)
    undo = switch_on(trainer, engine=False)
    trainer.train()
    counting, calls = chunked_calls()
    with counting:
        scores(trainer)
        assert not calls
        undo()
        undo()
        scores(trainer)
        assert calls
        calls.clear()
        switch_on(trainer, engine=False)
        scores(trainer)
        assert not calls


def test_no_logits_of_all_tokens_are_made(tmp_path):
    """The largest tensor of a pass and its gradient; TRL's scores prompts, too, on a CPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    vocab, tokens = 5003, 300
    model = make_model(vocab_size=vocab, max_position_embeddings=512).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    trainer = trainer_of(tmp_path, model)
    ids = torch.randint(3, vocab, (3, tokens), generator=torch.Generator().manual_seed(0))
    logits = 3 * (tokens - 1) * vocab

    def largest() -> int:
        with Largest() as mode:
            logps, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), tokens - 1)
            logps.sum().backward()
        return mode.elements

    assert largest() >= logits
    switch_on(trainer, engine=False, workspace_mib=1)
    assert largest() <= logits // 8
    assert unwrap(trainer.model) is model
