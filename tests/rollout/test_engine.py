"""Sampling: the right tokens, the right log-probs, nothing inherited from the model's own defaults."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from lowvram_grpo.kernels.decode import logits
from transformers import GenerationConfig

from lowvram_grpo.policy import trials
from lowvram_grpo.rollout.batch import pad_left
from lowvram_grpo.rollout.engine import RolloutEngine, end_ids
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.training.scoring import score

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


def sampling(**overrides):
    return Sampling(**{"max_new_tokens": 8, "eos_ids": (1,), "pad_id": 0, **overrides})


def test_greedy_equals_generate_on_ragged_prompts(model):
    batch = RolloutEngine(model, sampling(temperature=0)).generate(PROMPTS, 2, seed=0)
    for i, prompt in enumerate(PROMPTS):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        assert batch.completion_ids[2 * i] == batch.completion_ids[2 * i + 1] == expected


def test_sampled_logps_equal_scored_ones(model):
    engine = RolloutEngine(model, sampling(temperature=0.7, repetition_penalty=1.3, top_k=5, known_ids=30))
    batch = engine.generate(PROMPTS, 4, seed=3)
    assert len({tuple(c) for c in batch.completion_ids}) > 6
    for prompt, completion, logps in zip(batch.prompt_ids, batch.completion_ids, batch.sampling_per_token_logps):
        ids, mask = pad_left([prompt], 0, torch.device("cpu"))
        c = torch.tensor([completion])
        scored = score(model, ids, mask, c, torch.ones_like(c), temperature=0.7, workspace_mib=1).logps[0].detach()
        torch.testing.assert_close(scored, logps, rtol=0, atol=1e-4)


def test_same_seed_same_completions_and_global_rng_untouched(model):
    engine = RolloutEngine(model, sampling())
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, second, other = (engine.generate(PROMPTS, 3, seed=s).completion_ids for s in (5, 5, 6))
    assert first == second != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_model_defaults_do_not_leak(model):
    """Qwen2.5 ships top_k 20 and a repetition penalty; top_k 1 would make sampling greedy."""
    plain = RolloutEngine(model, sampling()).generate(PROMPTS, 6, seed=1).completion_ids
    model.generation_config = GenerationConfig(top_k=1, top_p=0.01, repetition_penalty=5.0, min_p=0.9, eos_token_id=1)
    assert RolloutEngine(model, sampling()).generate(PROMPTS, 6, seed=1).completion_ids == plain
    assert model.generation_config.top_k == 1


def test_samples_in_eval_mode_even_while_training_with_checkpointing(model):
    expected = RolloutEngine(model, sampling(temperature=0)).generate(PROMPTS, 1, seed=0).completion_ids
    model.gradient_checkpointing_enable()
    model.train()
    assert RolloutEngine(model, sampling(temperature=0)).generate(PROMPTS, 1, seed=0).completion_ids == expected
    assert model.training


def test_every_end_id_ends_and_pad_may_be_one_of_them(model):
    free = RolloutEngine(model, sampling(eos_ids=(), temperature=0)).generate(PROMPTS, 1, seed=0)
    assert all(free.truncated) and all(len(c) == 8 for c in free.completion_ids)
    stop = free.completion_ids[0][2]
    ended = RolloutEngine(model, sampling(eos_ids=(1, stop), pad_id=stop, temperature=0)).generate(PROMPTS, 1, seed=0)
    first = free.completion_ids[0].index(stop)
    assert ended.completion_ids[0] == free.completion_ids[0][: first + 1] and not ended.truncated[0]
    assert [len(x) for x in ended.sampling_per_token_logps] == [len(c) for c in ended.completion_ids]


def test_ids_without_a_token_are_never_sampled(model):
    batch = RolloutEngine(model, sampling(known_ids=12, temperature=5.0, max_new_tokens=20)).generate(
        PROMPTS, 8, seed=0
    )
    assert max(max(c) for c in batch.completion_ids) < 12


@pytest.mark.parametrize("eos,expected", [(1, (1,)), ([3, 1], (1, 3)), (None, (1,))])
def test_end_ids(tokenizer, eos, expected):
    model = make_model()
    model.generation_config.eos_token_id = eos
    assert end_ids(model, tokenizer) == expected


def test_padding_does_not_change_scores(model):
    ids, mask = pad_left(PROMPTS, 0, torch.device("cpu"))
    completions = torch.tensor([[4, 5, 6], [7, 8, 0], [9, 0, 0]])
    completion_mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    together = score(model, ids, mask, completions, completion_mask, temperature=1.0, workspace_mib=1)
    for i, prompt in enumerate(PROMPTS):
        n = int(completion_mask[i].sum())
        alone_ids, alone_mask = pad_left([prompt], 0, torch.device("cpu"))
        alone = score(
            model,
            alone_ids,
            alone_mask,
            completions[i : i + 1, :n],
            completion_mask[i : i + 1, :n],
            temperature=1.0,
            workspace_mib=1,
        )
        torch.testing.assert_close(together.logps[i, :n], alone.logps[0], rtol=0, atol=1e-5)
    assert together.logps[completion_mask == 0].abs().max() == 0


def test_padding_does_not_change_scores_with_absolute_positions():
    """RoPE forgives a constant shift of the positions; learned positions do not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=41, bos_token_id=1, eos_token_id=1, **small)).eval()
    batch = RolloutEngine(model, sampling(temperature=0.9)).generate(PROMPTS, 2, seed=0)
    ids, mask = pad_left(batch.prompt_ids, 0, torch.device("cpu"))
    width = max(map(len, batch.completion_ids))
    completions = torch.tensor([[*c, *[0] * (width - len(c))] for c in batch.completion_ids])
    completion_mask = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in batch.completion_ids])
    scored = score(model, ids, mask, completions, completion_mask, temperature=0.9, workspace_mib=1).logps.detach()
    for row, logps in zip(scored, batch.sampling_per_token_logps):
        torch.testing.assert_close(row[: len(logps)], logps, rtol=0, atol=1e-4)


def test_sampling_in_parts_keeps_groups_whole(model):
    whole = RolloutEngine(model, sampling(temperature=0)).generate(PROMPTS, 4, seed=0)
    for rows in (1, 4, 9):
        parts = RolloutEngine(model, sampling(temperature=0), rows).generate(PROMPTS, 4, seed=0)
        assert parts.completion_ids == whole.completion_ids and parts.prompt_ids == whole.prompt_ids
    seen = RolloutEngine(model, sampling(), 4).generate([PROMPTS[0]] * 2, 4, seed=0).completion_ids
    assert seen[:4] != seen[4:]


def test_a_stream_is_the_first_completion_of_its_prompt(model):
    engine = RolloutEngine(model, sampling())
    drawn = [engine.generate([PROMPTS[0]], 1, seed=seed).completion_ids[0] for seed in range(4)]
    assert [list(engine.stream(PROMPTS[0], seed=seed)) for seed in range(4)] == drawn
    greedy = sampling(temperature=0)
    assert (
        list(engine.stream(PROMPTS[2], seed=0, sampling=greedy))
        == (engine.generate([PROMPTS[2]], 1, seed=0, sampling=greedy).completion_ids[0])
    )


def test_a_stream_that_is_left_leaves_the_model_as_it_was(model):
    model.train()
    stream = RolloutEngine(model, sampling()).stream(PROMPTS[0], seed=0)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert model.training


def test_the_kernel_of_an_int8_head_is_a_fused_op_among_others(model, monkeypatch):
    asked = []
    monkeypatch.setattr(logits, "covers", lambda *_: asked.append(True))
    cases = [("on", (), True), ("auto", (), False), ("off", ("int8_head",), False), ("auto", ("int8_head",), True)]
    for mode, faster, expected in cases:
        asked.clear()
        monkeypatch.setattr(trials, "EXPECTED_FASTER", faster)
        RolloutEngine(model, sampling(), fused_ops=mode).generate(PROMPTS, 1, seed=0)
        assert bool(asked) == expected
