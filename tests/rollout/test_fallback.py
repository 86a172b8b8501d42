"""What the engine leaves to transformers' generate, and that it says so."""

from __future__ import annotations

import pytest
import torch
from models import build
from test_decode import PROMPTS, check_logps, sampling

from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.fallback import waves


@pytest.mark.parametrize("rows", [None, 1, 2, 3, 4, 5, 6, 9, 12, 100])
def test_waves_are_in_order_and_no_larger_than_they_may_be(rows):
    found = waves(3, 4, rows)
    assert [pair for wave in found for pair in wave] == [(p, g) for p in range(3) for g in range(4)]
    assert max(map(len, found)) <= (rows or 12)
    if rows is not None and rows < 4:
        assert all(len({p for p, _ in wave}) == 1 for wave in found)
    else:
        assert all(len(wave) % 4 == 0 for wave in found)


def test_foreign_arguments_go_to_generate(model):
    engine = RolloutEngine(model, sampling(temperature=0.9, extra={"no_repeat_ngram_size": 1}), 4)
    with pytest.warns(UserWarning, match="no_repeat_ngram_size: completions are sampled by transformers"):
        first = engine.generate(PROMPTS, 2, seed=0)
    second = engine.generate(PROMPTS, 2, seed=0)
    assert first.completion_ids == second.completion_ids
    assert all(len(set(completion)) == len(completion) for completion in first.completion_ids)
    check_logps(model, first, 0.9)


def unfit(name):
    from transformers import FalconConfig, FalconForCausalLM

    if name == "alibi":
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        torch.manual_seed(0)
        return FalconForCausalLM(
            FalconConfig(vocab_size=97, alibi=True, bos_token_id=2, eos_token_id=1, **small)
        ).eval()
    dense = {"expert_layer_period": 3, "expert_layer_offset": 2}
    return build("Jamba", attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4, **dense)


@pytest.mark.parametrize("name,says", [("alibi", "because FalconForCausalLM"), ("states", "0 of its 1 layers")])
def test_an_architecture_that_does_not_fit_is_sampled_by_generate(name, says, recwarn):
    model = unfit(name)
    engine = RolloutEngine(model, sampling(temperature=0), 4)
    batch = engine.generate(PROMPTS, 2, seed=0)
    engine.generate(PROMPTS, 2, seed=0)
    told = [str(w.message) for w in recwarn if "sampled by transformers' generate" in str(w.message)]
    assert len(told) == 1 and says in told[0]
    for i, prompt in enumerate(PROMPTS):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        assert batch.completion_ids[2 * i] == batch.completion_ids[2 * i + 1] == expected
    assert list(engine.stream(PROMPTS[0], seed=0)) == batch.completion_ids[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_its_rehearsal_fills_the_cache_that_generate_would(device, monkeypatch):
    model = unfit("states").to(device)
    seen = []
    forward = type(model).forward

    def watch(self, *args, past_key_values=None, **kwargs):
        out = forward(self, *args, past_key_values=past_key_values, **kwargs)
        seen.append(past_key_values.get_seq_length())
        return out

    monkeypatch.setattr(type(model), "forward", watch)
    prefilled = []
    RolloutEngine(model, sampling(), on_prefilled=lambda: prefilled.append(1)).rehearse(12, 9, 6, 4, prompts=2)
    assert seen == [12, 12 + 9] and prefilled == [1]
