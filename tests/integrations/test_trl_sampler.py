"""TRL's trainer with our engine as its sampler."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is what is switched on: pip install -e '.[test]' on Python 3.11 or later")

import torch
from beside_trl import OFF_POLICY, agree, trained, trainer_of
from conftest import make_model

from lowvram_grpo.integrations.trl import switch_on
from lowvram_grpo.rollout.engine import RolloutEngine

GREEDY = {"generation_kwargs": {"do_sample": False}}
PROMPTS = [[5, 6, 7, 8, 9], [7], [20, 21]]


def repeated(group: int) -> list[list[int]]:
    return [ids for ids in PROMPTS for _ in range(group)]


def sampled(trainer, prompts=None, group: int = 3):
    return trainer._generate_single_turn(repeated(group) if prompts is None else prompts, None, {}, group)


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.3}, {"min_new_tokens": 4}, {"max_new_tokens": 5}])
def test_greedy_completions_are_generates(tmp_path, more):
    trainer = trainer_of(tmp_path, generation_kwargs={"do_sample": False, **more}, max_completion_length=9)
    theirs = sampled(trainer)
    undo = switch_on(trainer, logps=False)
    trainer.model.train()
    ours = sampled(trainer)
    assert ours == theirs and trainer.model.training
    assert len({len(ids) for ids in ours[0]}) > 1 or more
    undo()
    assert "_generate_single_turn" not in vars(trainer) and sampled(trainer) == theirs


@pytest.mark.parametrize("adapter", [False, True])
def test_greedy_training_is_the_same(tmp_path, adapter):
    """Both parts switched on, whole steps. Greedy completions have one reward: KL and entropy alone pull."""
    from peft import LoraConfig

    config = lambda: LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    make = lambda name: trainer_of(
        tmp_path / name, adapter=config(), beta=0.1, entropy_coef=0.2, gradient_checkpointing=True,
        **{**OFF_POLICY, **GREEDY, "learning_rate": 0.05},
    )  # fmt: skip
    theirs, ours = make("theirs"), make("ours")
    start = {n: p.detach().clone() for n, p in theirs.model.named_parameters() if p.requires_grad}
    switch_on(ours)
    agree(trained(theirs), trained(ours, start))
    assert ours.model.is_gradient_checkpointing


def test_groups_are_prefilled_once_and_seeds_repeat(tmp_path):
    trainer = trainer_of(tmp_path)
    switch_on(trainer, logps=False)
    engine = trainer._generate_single_turn.engine
    torch.manual_seed(1)
    ids, logps = sampled(trainer)
    assert logps is None and 0 < engine.computed <= sum(map(len, PROMPTS)) + sum(map(len, ids))
    again = sampled(trainer)[0]
    torch.manual_seed(1)
    assert sampled(trainer)[0] == ids != again
    assert len({tuple(row) for row in ids}) > 3
    # Between turns with tools each row is a conversation of its own, and their number is no multiple of the group.
    assert len(sampled(trainer, [[5, 6], [5, 6, 7], [9, 9], [4]])[0]) == 4


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.4}, {"min_p": 0.5}, {"temperature": 0.3}])
def test_filters_are_trls(tmp_path, filters):
    """First tokens by frequency, beside those of generate."""
    group, count = 400, {}
    trainer = trainer_of(tmp_path, **{"max_completion_length": 1, "temperature": 1.0, **filters})
    shares = lambda: torch.bincount(torch.tensor(sampled(trainer, [[7]] * group, group)[0])[:, 0], minlength=41) / group
    count["theirs"] = shares()
    switch_on(trainer, logps=False)
    count["ours"] = shares()
    assert (count["ours"] - count["theirs"]).abs().max() < 0.12
    assert set(count["ours"].nonzero()[:, 0].tolist()) <= set(count["theirs"].nonzero()[:, 0].tolist()) or not (
        {"top_k", "min_p"} & filters.keys()
    )


def test_what_generate_alone_can_do_stays_with_it(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, generation_kwargs={"do_sample": False, "no_repeat_ngram_size": 2})
    theirs = sampled(trainer)
    monkeypatch.setattr(RolloutEngine, "generate", lambda *args, **kwargs: pytest.fail("the engine samples"))
    with pytest.warns(UserWarning, match="Sampling stays TRL's own, because transformers alone knows no_repeat"):
        switch_on(trainer, logps=False)
    assert sampled(trainer) == theirs


def test_settings_of_the_models_own_generation_config(tmp_path):
    """What TRL leaves open, transformers takes from there."""
    model = make_model()
    model.generation_config.no_repeat_ngram_size = 2
    with pytest.warns(UserWarning, match="no_repeat_ngram_size"):
        switch_on(trainer_of(tmp_path, model), logps=False)
    model = make_model()
    model.generation_config.min_new_tokens = 6
    trainer = trainer_of(tmp_path, model)
    switch_on(trainer, logps=False)
    assert all(len(ids) >= 6 for ids in sampled(trainer)[0])


def test_images_go_trls_way(tmp_path):
    trainer = trainer_of(tmp_path)
    calls = []
    trainer_class = type(trainer)
    switch_on(trainer, logps=False)
    trainer._generate_single_turn.theirs = lambda *args: calls.append(args) or ([[1]], None)
    with pytest.warns(UserWarning, match="Sampling is TRL's own, because these prompts have images"):
        assert trainer._generate_single_turn([[5]], [["image"]], {"pixel_values": [0]}, 1) == ([[1]], None)
    assert calls == [([[5]], [["image"]], {"pixel_values": [0]}, 1, False)]
    assert type(trainer) is trainer_class


def test_rows_bound_what_decodes_at_once(tmp_path):
    trainer = trainer_of(tmp_path, **GREEDY)
    theirs = sampled(trainer)
    switch_on(trainer, logps=False, rows=2)
    assert trainer._generate_single_turn.engine.rows == 2 and sampled(trainer) == theirs
