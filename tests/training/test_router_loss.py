"""router_aux_loss_coef in a trainer: TRL's meaning, whatever the size of a micro-batch."""

from __future__ import annotations

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lowvram_grpo import GRPOTrainer, UserError
from lowvram_grpo.training.experience import split

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def mixture():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        initializer_range=0.3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def trainer_for(args, dataset, tokenizer, model=None, reward=digit_share, evaluated=None):
    return GRPOTrainer(
        model or mixture(), reward, args, dataset, evaluated, tokenizer, peft_config=LORA, observer=Quiet()
    )


def one_update(trainer, dataset):
    rollout = trainer.collect([dataset[i] for i in range(2)], 0)
    return trainer.cut(rollout, 1)[0]


def gradients(trainer, update):
    """(loss, gradients, aux_loss) of an update as the trainer accumulates them."""
    trainer.model.train()
    loss = trainer._gradients(update)
    found = [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]
    return loss, torch.cat([g.flatten() for g in found]), trainer._sums.take().get("aux_loss")


@pytest.mark.parametrize("beta", [0.0, 0.04])  # with it a pass of the reference comes before the policy's
def test_it_is_added_with_its_coefficient(config, dataset, tokenizer, beta):
    settings = {"gradient_checkpointing": True, "beta": beta}
    with_loss = trainer_for(config(router_aux_loss_coef=0.5, **settings), dataset, tokenizer)
    update = one_update(with_loss, dataset)
    loss, gradient, aux_loss = gradients(with_loss, update)
    without = trainer_for(config(router_aux_loss_coef=0.0, shared_prefix="off", **settings), dataset, tokenizer)
    without.model.load_state_dict(with_loss.model.state_dict())
    plain_loss, plain_gradient, nothing = gradients(without, update)
    assert (with_loss.aux_loss_enabled, without.aux_loss_enabled, nothing) == (True, False, None)
    # TRL's pass: all rows at once, padding masked, its mean weighed by the coefficient.
    (micro,) = update
    policy = without.model.get_base_model()
    ids = torch.cat([micro.prompt_ids, micro.completion_ids], 1)
    mask = torch.cat([micro.prompt_mask, micro.completion_mask], 1)
    theirs = policy(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert aux_loss == pytest.approx(theirs.item(), rel=1e-5)
    trained = [p for p in without.model.parameters() if p.requires_grad]
    # A new adapter's A gets none: its B is 0.
    of_router = torch.cat([g.flatten() for g in torch.autograd.grad(theirs, trained)])
    assert of_router.abs().max() > 1e-4
    torch.testing.assert_close(loss, plain_loss + 0.5 * theirs.detach())
    torch.testing.assert_close(gradient, plain_gradient + 0.5 * of_router, atol=1e-6, rtol=1e-4)


def test_micro_batches_weigh_by_their_tokens(config, dataset, tokenizer):
    trainer = trainer_for(config(router_aux_loss_coef=0.5), dataset, tokenizer)
    (micro,) = one_update(trainer, dataset)
    assert float(micro.router_share.sum()) == pytest.approx(1.0)
    parts = split(micro, 3)
    lengths = [sum(part.prompt_lengths) + sum(part.completion_lengths) for part in parts]
    shares = [float(part.router_share.sum()) for part in parts]
    assert shares == pytest.approx([n / sum(lengths) for n in lengths]) and len(set(lengths)) > 1
    alone = []
    for part in parts:
        part_share, part.router_share = part.router_share, None
        alone.append(trainer.learner.loss(part)[1].aux_loss.item())
        part.router_share = part_share
    *_, aux_loss = gradients(trainer, parts)
    assert aux_loss == pytest.approx(sum(share * value for share, value in zip(shares, alone)), rel=1e-5)


def test_completions_that_teach_nothing_are_balanced_too(config, dataset, tokenizer):
    args = config(router_aux_loss_coef=0.5, beta=0.0, per_device_train_batch_size=4)
    trainer = trainer_for(args, dataset, tokenizer, reward=lambda completions, **kwargs: [1.0] * len(completions))
    update = one_update(trainer, dataset)
    assert len(update) == 2 and all(trainer.learner.need_gradients(update))
    _, gradient, aux_loss = gradients(trainer, update)
    assert gradient.abs().max() > 1e-5 and aux_loss > 0


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "gradient_checkpointing": True}, {"beta": 0.0}])
def test_a_run_logs_it_in_training_and_evaluation(config, dataset, tokenizer, settings):
    args = config(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=48, max_steps=2, **settings)
    trainer = trainer_for(args, dataset, tokenizer, evaluated=dataset)
    assert trainer.aux_loss_enabled and trainer.learner.router.coefficient == 0.001
    assert any("router_aux_loss_coef 0.001 (the model's own)" in said for said in trainer.observer.said)
    trainer.train()
    history = trainer.state.log_history
    assert [row["aux_loss"] > 1 for row in history if "loss" in row] == [True, True]
    assert [row["eval_aux_loss"] > 1 for row in history if "eval_loss" in row] == [True]


def test_refused(config, dataset, tokenizer):
    with pytest.raises(UserError, match="LlamaForCausalLM is no mixture of experts"):
        trainer_for(config(router_aux_loss_coef=0.1), dataset, tokenizer, make_model())
    assert not trainer_for(config(), dataset, tokenizer, make_model()).aux_loss_enabled
    with pytest.raises(UserError, match="shared_prefix is on"):
        trainer_for(config(shared_prefix="on"), dataset, tokenizer)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(UserError, match="use_reentrant"):
        trainer_for(config(**reentrant), dataset, tokenizer)
    trainer_for(config(router_aux_loss_coef=0.0, **reentrant), dataset, tokenizer)
