"""Subclasses of GRPOTrainer as they are written for TRL: other rewards, other advantages, other losses."""

from __future__ import annotations

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig

from lowvram_grpo.errors import UserError
from lowvram_grpo.training.trainer import GRPOTrainer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def zero(completions, **kwargs):
    return [0.0] * len(completions)


def run(kind, args, dataset, tokenizer, reward=digit_share, peft_config=None):
    trainer = kind(
        make_model(), reward, args, dataset, processing_class=tokenizer, observer=Quiet(), peft_config=peft_config
    )
    trainer.train()
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(a, b, **close):
    for name, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[name], **(close or {"rtol": 0, "atol": 0}))


def moved(trainer):
    return any(
        not torch.equal(value, dict(make_model().named_parameters())[n]) for n, value in weights(trainer).items()
    )


def test_rewards_go_through_the_subclass(config, dataset, tokenizer):
    class Mine(GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            assert rewards.shape == (8, 1) and [row["prompt"] for row in inputs] == prompts and "answer" in inputs[0]
            assert len(completion_ids_list) == len(completions) == 8
            return rewards + torch.arange(8)[:, None]

    trainer = run(Mine, config(max_steps=1, beta=0.0), dataset, tokenizer, zero)
    row = trainer.state.log_history[0]
    assert row["reward"] == 3.5 and row["rewards/zero/mean"] == 3.5 and row["frac_reward_zero_std"] == 0
    assert list(trainer._logs["rewards"]["zero"]) == [float(i) for i in range(8)] and moved(trainer)


def test_rewards_of_a_subclass_that_asks_nobody_may_be_not_a_number(config, dataset, tokenizer):
    class Mine(GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            return torch.tensor([[1.0], [torch.nan]] * 4)

    trainer = run(Mine, config(max_steps=1), dataset, tokenizer, zero)
    assert trainer.state.log_history[0]["reward"] == 1.0
    assert sum("All reward functions returned None" in said for said in trainer.observer.said) == 1


def test_rewards_of_another_shape_are_named(config, dataset, tokenizer):
    class Mine(GRPOTrainer):
        def _calculate_rewards(self, *args):
            return torch.zeros(8)

    with pytest.raises(UserError, match=r"returned shape \(8,\) for 8 completions and 1 reward functions"):
        run(Mine, config(), dataset, tokenizer)


def test_a_subclass_that_hands_on_changes_no_bit(config, dataset, tokenizer):
    class Mine(GRPOTrainer):
        def _calculate_rewards(self, *args):
            return super()._calculate_rewards(*args)

        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions(inputs)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    same(*(run(kind, config(max_steps=3), dataset, tokenizer, peft_config=LORA) for kind in (GRPOTrainer, Mine)))


def test_advantages_of_the_subclass_are_learned_from(config, dataset, tokenizer):
    seen = {}

    class Mine(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            outputs = super()._generate_and_score_completions(inputs)
            seen.update(rows=[row["prompt"] for row in inputs], shapes={k: tuple(v.shape) for k, v in outputs.items()})
            ids, mask = outputs["completion_ids"], outputs["completion_mask"]
            assert ((ids != 0) <= mask.bool()).all() and int(mask.sum()) == outputs["num_items_in_batch"]
            outputs["advantages"] = torch.arange(8.0) - 3.5
            return outputs

    trainer = run(Mine, config(max_steps=1, beta=0.0), dataset, tokenizer, zero)
    assert list(trainer._logs["prompt"]) == seen["rows"] and len(seen["rows"]) == 8
    assert seen["shapes"]["prompt_ids"][0] == 8 and seen["shapes"]["advantages"] == (8,)
    assert torch.cat([m["advantages"] for m in trainer._buffered_inputs]).tolist() == [i - 3.5 for i in range(8)]
    assert moved(trainer) and not moved(run(GRPOTrainer, config(max_steps=1, beta=0.0), dataset, tokenizer, zero))


def test_what_is_not_taken_up_of_a_rollout_is_said_once(config, dataset, tokenizer, caplog):
    class Mine(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            outputs = super()._generate_and_score_completions(inputs)
            outputs["completion_mask"][:, 0] = 0
            return {**outputs, "mine": 3}

    class Advantages(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            outputs = super()._generate_and_score_completions(inputs)
            outputs["advantages"] *= 2
            return outputs

    run(Mine, config(max_steps=2), dataset, tokenizer)
    assert caplog.text.count("changes or adds completion_mask, mine;") == 1
    run(Advantages, config(max_steps=1), dataset, tokenizer)
    assert caplog.text.count("changes or adds") == 1


@pytest.mark.parametrize("kind, words", [("shape", "advantages of shape"), ("alone", "does not call super")])
def test_rollouts_that_cannot_be_taken_up_are_named(config, dataset, tokenizer, kind, words):
    class Mine(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            outputs = {} if kind == "alone" else super()._generate_and_score_completions(inputs)
            return {**outputs, "advantages": torch.zeros(3)}

    with pytest.raises(UserError, match=words):
        run(Mine, config(), dataset, tokenizer)


def test_a_loss_of_twice_the_size_takes_twice_the_step(config, dataset, tokenizer):
    class Twice(GRPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            assert {"prompt_ids", "completion_mask", "advantages"} <= {*inputs} and "nothing" not in inputs
            assert inputs["advantages"].shape == (len(inputs["prompt_ids"]),) and inputs.get("nothing", 7) == 7
            return 2 * super().compute_loss(model, inputs)

    settings = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    whole = run(GRPOTrainer, config(learning_rate=0.2, **settings), dataset, tokenizer)
    twice = run(Twice, config(learning_rate=0.1, **settings), dataset, tokenizer)
    same(whole, twice, rtol=1e-6, atol=1e-7)
    assert twice.state.log_history[0]["loss"] == pytest.approx(2 * whole.state.log_history[0]["loss"], abs=1e-7)


def test_advantages_that_a_loss_sets_are_used(config, dataset, tokenizer):
    class Flipped(GRPOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            inputs["advantages"] = -inputs["advantages"]
            return super().compute_loss(model, inputs, **kwargs)

    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "beta": 0.0, "max_grad_norm": 0.0}
    settings["per_device_train_batch_size"] = 4
    up, down = (run(kind, config(**settings), dataset, tokenizer) for kind in (GRPOTrainer, Flipped))
    start = dict(make_model().named_parameters())
    for name, value in weights(up).items():
        torch.testing.assert_close(value - start[name], start[name] - weights(down)[name], rtol=1e-3, atol=1e-6)
    kept = [torch.cat([m["advantages"] for m in trainer._buffered_inputs]) for trainer in (up, down)]
    assert torch.equal(*kept)  # what a pass has written is none of the next one's


@pytest.mark.parametrize("rows", [8, 3])
def test_a_loss_of_ones_own_from_log_probs(config, dataset, tokenizer, rows):
    """Its micro-batches are scaled as in TRL, and it has a gradient where every reward is equal, too."""

    with_gradient = []

    class Likelier(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            with_gradient.append(torch.is_grad_enabled())
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            keep = inputs["completion_ids"].size(1)
            logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
                model, ids, mask, keep, compute_entropy=True
            )
            assert logps.shape == entropies.shape == inputs["completion_ids"].shape and aux_loss is None
            alone, none, _ = self._get_per_token_logps_and_entropies(model, ids, mask, keep, batch_size=1)
            torch.testing.assert_close(alone, logps, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                logps * inputs["completion_mask"], inputs["sampling_per_token_logps"], rtol=1e-4, atol=1e-4
            )
            assert none is None and logps.requires_grad is entropies.requires_grad is torch.is_grad_enabled()
            return -logps.sum() / inputs["completion_mask"].sum() / self.current_gradient_accumulation_steps

    args = config(max_steps=1, beta=0.0, per_device_train_batch_size=rows, eval_strategy="steps", eval_steps=1)
    trainer = Likelier(
        make_model(), zero, args, dataset, dataset.select([0]), processing_class=tokenizer, observer=Quiet()
    )
    trainer.train()
    row = trainer.state.log_history[0]
    assert moved(trainer) and 2 < row["loss"] < 5  # nats a token, whatever the number of micro-batches
    assert "reward" in row and "entropy" not in row
    assert all(with_gradient[: -(-8 // rows)]) and not with_gradient[-1]


def test_outputs_are_not_returned(config, dataset, tokenizer):
    trainer = run(GRPOTrainer, config(max_steps=1), dataset, tokenizer)
    with pytest.raises(ValueError, match="no outputs to return"):
        trainer.compute_loss(trainer.model, trainer._buffered_inputs[0], return_outputs=True)


def test_a_loss_of_a_dict_is_that_of_the_micro_batch(config, dataset, tokenizer):
    seen = []

    class Dicts(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            seen.append(super()._generate_and_score_completions(inputs))
            return seen[-1]

        def compute_loss(self, model, inputs, **kwargs):
            whole = super().compute_loss(model, inputs, **kwargs)
            for same_inputs in ({**inputs}, seen[-1]):
                torch.testing.assert_close(super().compute_loss(model, same_inputs, **kwargs), whole)
            scaled = super().compute_loss(model, {**inputs, "advantages": 3 * inputs["advantages"]}, **kwargs)
            torch.testing.assert_close(scaled, 3 * whole)
            return whole

    run(Dicts, config(max_steps=1, beta=0.0), dataset, tokenizer)
    assert len(seen) == 1
