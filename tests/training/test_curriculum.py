"""The order of prompts: by a column, or by what the run itself has seen, from its second epoch on."""

from __future__ import annotations

import pytest
import torch
from conftest import Quiet, make_model
from datasets import Dataset
from peft import LoraConfig

from lowvram_grpo import GRPOConfig, GRPOTrainer
from lowvram_grpo.errors import UserError
from lowvram_grpo.objective import Advantages
from lowvram_grpo.training.curriculum import Curriculum
from lowvram_grpo.training.experience import Rollout

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
PROMPTS = ["a", "b", "c", "d", "e", "f"]
WORTH = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.3, "e": 0.7, "f": 0.2}
SPREAD = {"a": 0.0, "b": 0.05, "c": 0.3, "d": 0.2, "e": 0.1, "f": 0.01}


def worth(prompts, completions, **kwargs):
    """Mean WORTH, spread SPREAD, whatever was sampled."""
    return [WORTH[p] + (SPREAD[p] if i % 2 else -SPREAD[p]) for i, p in enumerate(prompts)]


def trained(config, tokenizer, dataset, *, resume=None, steps=6, **settings):
    """(prompts of each step, trainer); an epoch has three steps of two prompts."""
    seen = []

    class Watched(GRPOTrainer):
        def _record(self, rollout):
            seen.append(rollout.prompts[:: self.plan.num_generations])
            super()._record(rollout)

    args = config(max_steps=steps, signal_check=False, self_test=False, **settings)
    trainer = Watched(
        make_model(), worth, args, dataset, processing_class=tokenizer, peft_config=LORA, observer=Quiet()
    )
    trainer.train(resume_from_checkpoint=resume)
    return seen, trainer


def ordered(*steps):
    return [prompt for step in steps for prompt in step]


@pytest.mark.parametrize(
    "kind, expected",
    [("easy_first", "becdfa"), ("hard_first", "afdceb"), ("medium_first", "cdebfa")],
)
def test_the_second_epoch_is_in_the_order_of_what_the_first_has_seen(config, tokenizer, kind, expected):
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    seen, trainer = trained(config, tokenizer, dataset, curriculum=kind)
    plain, _ = trained(config, tokenizer, dataset)
    assert seen[:3] == plain[:3] and sorted(ordered(*seen[:3])) == PROMPTS
    assert "".join(ordered(*seen[3:])) == expected
    assert any("rewards of this run" in text for text in trainer.observer.said)


@pytest.mark.parametrize(
    "column, values, kind, expected",
    [
        ("pass_rate", [0.1, 0.9, 0.5, 0.3, 0.7, 0.2], "easy_first", "becdfa"),
        ("pass_rate", [0.1, 0.9, 0.5, 0.3, 0.75, 0.2], "medium_first", "cdefab"),
        ("difficulty", [6, 1, 3, 4, 2, 5], "easy_first", "becdfa"),
        ("difficulty", [6, 1, 3, 4, 2, 5], "hard_first", "afdceb"),
    ],
)
def test_a_column_of_the_data_orders_every_epoch(config, tokenizer, column, values, kind, expected):
    dataset = Dataset.from_dict({"prompt": PROMPTS, column: values})
    seen, _ = trained(config, tokenizer, dataset, curriculum=kind)
    first, second = "".join(ordered(*seen[:3])), "".join(ordered(*seen[3:]))
    if kind == "medium_first":  # ties keep the epoch's own order
        assert first[0] == second[0] == "c" and set(first[4:]) == set(expected[4:])
    else:
        assert first == second == expected


@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_has_the_same_order(config, tokenizer, tmp_path, at):
    """In the middle of the epoch that is measured, and in the middle of one that is ordered."""
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    settings = {"curriculum": "easy_first", "save_strategy": "steps", "save_steps": 1, "steps": 9}
    whole, trainer = trained(config, tokenizer, dataset, output_dir=str(tmp_path / "a"), **settings)
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    torch.manual_seed(99)
    rest, again = trained(
        config,
        tokenizer,
        dataset,
        output_dir=str(tmp_path / "b"),
        resume=str(tmp_path / "a" / f"checkpoint-{at}"),
        **settings,
    )
    assert rest == whole[at:]
    assert all(torch.equal(value, dict(again.model.named_parameters())[name]) for name, value in weights.items())


def test_dropped_groups_are_seen_and_do_not_come_first_in_every_epoch(config, tokenizer):
    drawn = []

    def dead_a(prompts, completion_ids, **kwargs):
        drawn.append(prompts[::4])
        return [WORTH[p] + (0.0 if p == "a" else sum(ids) / 1e4) for p, ids in zip(prompts, completion_ids)]

    args = config(max_steps=6, signal_check=False, self_test=False, curriculum="easy_first", resample_dead_groups=1)
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    GRPOTrainer(
        make_model(), dead_a, args, dataset, processing_class=tokenizer, peft_config=LORA, observer=Quiet()
    ).train()
    whole = [prompts for prompts in drawn if len(prompts) == 2]  # rounds have one
    assert "".join(ordered(*whole[3:])) == "becdfa" and len(drawn) == 8


def test_prompts_that_nothing_judged_come_last(config, tokenizer, tmp_path):
    curriculum = Curriculum("easy_first", [{"prompt": p} for p in "ab"])
    nan, zeros = torch.tensor([torch.nan] * 2 + [0.0, 1.0]), torch.zeros(4)
    curriculum.seen(
        Rollout(
            None, list("aabb"), [""] * 4, nan, nan[:, None], Advantages(zeros, torch.tensor([True, False]), zeros), {}
        )
    )
    curriculum.save(str(tmp_path))
    again = Curriculum("easy_first", [{"prompt": p} for p in "cab"])
    again.restore(str(tmp_path))
    assert again.arrange([1, 2, 0], 1) == [0, 2, 1]  # c was never seen


def test_unseen_prompts_come_first():
    curriculum = Curriculum("hard_first", [{"prompt": p} for p in "abc"])
    assert curriculum.arrange([2, 0, 1], 0) == [2, 0, 1]
    from lowvram_grpo.training.curriculum import _digest

    curriculum._seen = {_digest("a"): (0.2, 0.0), _digest("c"): (0.1, 0.0)}
    assert curriculum.arrange([0, 2, 1], 1) == [1, 2, 0]
    curriculum._seen[_digest("b")] = (0.0, 0.0)
    assert curriculum.arrange([0, 2, 1], 1) == [1, 2, 0]  # what an epoch began with holds until its end


def test_what_cannot_be_ordered_by_is_refused(config, tokenizer, tmp_path):
    dataset = Dataset.from_dict({"prompt": PROMPTS, "difficulty": ["hard"] * 6})
    with pytest.raises(UserError, match="'difficulty', and it has 'hard'"):
        trained(config, tokenizer, dataset, curriculum="easy_first")
    dataset = Dataset.from_dict({"prompt": PROMPTS, "pass_rate": [0.0, 12.5, 50.0, 75.0, 100.0, 100.0]})
    with pytest.raises(UserError, match=r"from 0 to 1, and it has 12\.5; divide percents"):
        trained(config, tokenizer, dataset, curriculum="medium_first")
    with pytest.raises(UserError, match="easy_first"):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, curriculum="easy")


def test_a_stream_is_refused(config, tokenizer):
    dataset = Dataset.from_dict({"prompt": ["a", "b", "c", "d"]})
    with pytest.raises(UserError, match="is a stream"):
        trained(config, tokenizer, dataset.to_iterable_dataset(), **{"curriculum": "easy_first"})
