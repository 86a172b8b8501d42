"""Where a run stands in its data and in its schedule after its settings have changed: arithmetic, no model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

from lowvram_grpo.data.batching import PromptSampler
from lowvram_grpo.errors import UserError
from lowvram_grpo.training.continuation import (
    ROLLOUT_SETTINGS,
    Made,
    kind_of,
    load_moments,
    load_state,
    place_schedule,
    serves_on,
    shift_of,
    steps_an_epoch,
)


def made(rows, prompts, repeats, shift=0, **settings):
    return Made(settings, [rows, "digest", ["f"]], prompts, repeats, shift, "torch AdamW")


def batches(rows, prompts, repeats, epochs=4):
    """The prompt indices of each step, epoch by epoch, as the loader yields them."""
    sampler = PromptSampler(range(rows), prompts=prompts, repeats=repeats, shuffle=False, seed=0)
    return [(epoch, batch) for epoch in range(epochs) for batch in sampler]


def seen(leg):
    """(epoch, prompt) of each rollout that a leg has finished."""
    return {(epoch, i) for epoch, batch in leg for i in batch}


@pytest.mark.parametrize("rows", [12, 13])
@pytest.mark.parametrize("before", [(2, 1), (4, 1), (5, 2), (3, 3)])
@pytest.mark.parametrize("after", [(4, 1), (1, 1), (6, 2), (5, 2), (12, 1)])
def test_no_prompt_is_left_out_and_less_than_a_batch_comes_again(rows, before, after):
    for step in range(1, 2 * steps_an_epoch(rows, *before)):
        old, now = made(rows, *before), made(rows, *after)
        shift = shift_of(old, step, now, serves=False)
        in_progress = step % steps_an_epoch(rows, *before) % before[1]  # of a rollout, which is sampled anew
        first = batches(rows, *before)[: step - in_progress]
        rest = batches(rows, *after)[step - shift :]
        assert (step - shift) % steps_an_epoch(rows, *after) % after[1] == 0
        everything = {(epoch, i) for epoch in range(3) for i in range(rows)}
        assert seen(first) | seen(rest) >= everything
        assert len(seen(first) & seen(rest)) < after[0]


def test_a_second_change_counts_from_the_first():
    shift = shift_of(made(12, 2, 1), 3, made(12, 4, 1), serves=False)
    assert shift == 2  # 6 prompts are one batch of 4, and the half of another that comes again
    # Two steps of 4 later, at step 5: 12 prompts, the epoch is over.
    again = shift_of(made(12, 4, 1, shift), 5, made(12, 3, 1), serves=False)
    assert 5 - again == steps_an_epoch(12, 3, 1)


def test_other_data_begin_at_the_first_prompt_of_the_epoch():
    old, now = made(12, 2, 1), made(20, 2, 1)
    assert 9 - shift_of(old, 9, now, serves=False) == 1 * steps_an_epoch(20, 2, 1)
    assert 6 - shift_of(old, 6, now, serves=False) == 1 * steps_an_epoch(20, 2, 1)


def test_what_is_unchanged_stays_where_it_is():
    old = made(12, 2, 2, shift=3)
    assert serves_on(old, old) and shift_of(old, 7, old, serves=True) == 3
    assert serves_on(None, old) and shift_of(None, 7, old, serves=True) == 0


def test_every_setting_of_a_rollout_is_one_of_grpo_config(config):
    args = json.loads(config().to_json_string())
    assert set(ROLLOUT_SETTINGS) <= args.keys()
    for name in ROLLOUT_SETTINGS:
        assert not serves_on(made(12, 2, 2, **{name: 1}), made(12, 2, 2, **{name: 2})), name


def optimizer(rate=1e-2, cls=torch.optim.AdamW, **settings):
    weight = torch.nn.Parameter(torch.ones(3))
    return cls([{"params": [weight], "weight_decay": settings.pop("weight_decay", 0.0)}], lr=rate, **settings)


def stepped(made, times):
    for _ in range(times):
        weight = made.param_groups[0]["params"][0]
        weight.grad = torch.full_like(weight, 0.5)
        made.step()
    return made


def test_moments_come_from_the_checkpoint_and_settings_from_today(tmp_path):
    old = stepped(optimizer(), 3)
    new = optimizer(1e-4, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1)
    load_moments(new, old.state_dict(), tmp_path, None)
    group = new.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-4, (0.5, 0.6), 1e-3, 0.1)
    (mine,), (theirs,) = new.state.values(), old.state.values()
    assert mine["step"] == 3 and torch.equal(mine["exp_avg"], theirs["exp_avg"])


def test_a_count_that_an_optimizer_keeps_beside_its_settings_is_no_setting(tmp_path):
    """Schedule-free optimizers count in their parameter groups."""
    old, new = stepped(optimizer(), 1), optimizer(1e-4)
    old.param_groups[0] |= {"k": 7, "weight_sum": 0.3}
    new.param_groups[0] |= {"k": 0, "weight_sum": 0.0}
    load_moments(new, old.state_dict(), tmp_path, None)
    assert new.param_groups[0]["k"] == 7 and new.param_groups[0]["weight_sum"] == 0.3
    assert new.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize("says", [True, False], ids=["recorded", "earlier version"])
def test_the_moments_of_another_optimizer_are_refused(tmp_path, says):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    small = bitsandbytes.optim.AdamW8bit([torch.nn.Parameter(torch.ones(3))], lr=1e-2)
    assert kind_of(small) == "bitsandbytes AdamW8bit (8 bits)"
    old = stepped(optimizer(), 1)
    record = Made({}, [1, "", []], 1, 1, 0, kind_of(old)) if says else None
    with pytest.raises(UserError, match=r"moments of torch AdamW.*bitsandbytes AdamW8bit.*--adapter"):
        load_moments(small, old.state_dict(), tmp_path, record)
    state = {"state": {0: {"state1": torch.ones(3), "state2": torch.ones(3)}}, "param_groups": []}
    record = Made({}, [1, "", []], 1, 1, 0, kind_of(small)) if says else None
    with pytest.raises(UserError, match="moments of bitsandbytes"):
        load_moments(optimizer(), state, tmp_path, record)
    adam = stepped(optimizer(cls=torch.optim.Adam), 1)
    if says:
        with pytest.raises(UserError, match="moments of torch Adam, which torch AdamW can't"):
            load_moments(optimizer(), adam.state_dict(), tmp_path, Made({}, [1, "", []], 1, 1, 0, kind_of(adam)))


def test_the_moments_of_another_model_are_refused(tmp_path):
    old = optimizer()
    old.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(UserError, match="another model"):
        load_moments(optimizer(), stepped(old, 1).state_dict(), tmp_path, None)


METRIC_DRIVEN = {"reduce_lr_on_plateau", "greedy"}
KEYWORDS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


def schedule(name, made, horizon, **keywords):
    keywords = {**KEYWORDS.get(name, {}), **keywords}
    return get_scheduler(name, made, num_warmup_steps=2, num_training_steps=horizon, scheduler_specific_kwargs=keywords)


@pytest.mark.parametrize("name", sorted({str(n.value) for n in TYPE_TO_SCHEDULER_FUNCTION} - METRIC_DRIVEN))
def test_a_schedule_goes_on_as_if_it_had_always_been_todays(name):
    """Another rate and another horizon; a run that ended at rate 0 goes on above it."""
    old = optimizer(1e-2)
    before = schedule("linear", old, 4)
    for _ in range(4):
        stepped(old, 1)
        before.step()
    assert old.param_groups[0]["lr"] == 0
    whole, new = optimizer(1e-4), optimizer(1e-4)
    expected, today = schedule(name, whole, 9), schedule(name, new, 9)
    for _ in range(4):
        stepped(whole, 1)
        expected.step()
    load_moments(new, old.state_dict(), None, None)
    assert place_schedule(today, before.state_dict(), 4, same=False)
    for _ in range(5):
        assert new.param_groups[0]["lr"] == whole.param_groups[0]["lr"] == today.get_last_lr()[0] > 0
        stepped(whole, 1), stepped(new, 1)
        expected.step(), today.step()


def test_steps_that_fp16_skipped_are_not_counted():
    today = schedule("linear", optimizer(1.0), 12)
    assert place_schedule(today, {"last_epoch": 5}, 7, same=True)
    assert today.get_last_lr() == [(12 - 5) / 10]


def test_a_schedule_that_follows_metrics_goes_on_or_begins_anew():
    old, new = optimizer(1e-2), optimizer(1e-2)
    before = schedule("reduce_lr_on_plateau", old, 9, patience=0)
    for loss in (1.0, 2.0, 3.0):
        before.step(loss)
    reduced = old.param_groups[0]["lr"]
    assert reduced < 1e-2
    today = schedule("reduce_lr_on_plateau", new, 9, patience=0)
    assert place_schedule(today, before.state_dict(), 3, same=True)
    assert new.param_groups[0]["lr"] == reduced and today.best == 1.0
    new = optimizer(1e-3)
    today = schedule("reduce_lr_on_plateau", new, 9, patience=0)
    assert not place_schedule(today, before.state_dict(), 3, same=False)
    assert new.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("cut", [0, 40, -30])
def test_a_torn_state_is_named(tmp_path, cut):
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    path.parent.mkdir()
    assert load_state(path) is None
    torch.save(stepped(optimizer(), 1).state_dict(), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"checkpoint-2 is damaged: its optimizer\.pt"):
        load_state(path)


def test_what_a_checkpoint_was_made_with_comes_back(tmp_path):
    one = made(12, 2, 2, shift=-3, learning_rate=0.1)
    one.save(tmp_path)
    assert Made.load(tmp_path) == one
    (tmp_path / "made_with.json").write_text("{}", encoding="utf-8")
    assert Made.load(tmp_path) is None and kind_of(SimpleNamespace(optimizer=optimizer())) == "torch AdamW"
