"""Frequencies that depend on the length of a sequence are decided once, for sampling and scoring alike."""

from __future__ import annotations

import pytest
import torch
from passes import training_pass

from lowvram_grpo.policy.build import build_policy
from lowvram_grpo.policy.long_rope import settle_rotary, settled_rotary
from lowvram_grpo.policy.shared_prefix import why_not
from lowvram_grpo.recipe.config import GRPOConfig
from lowvram_grpo.rollout.batch import pad_left
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.training.scoring import score
from tests.attention_families import LONG_ROPE, tiny_family

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15, 16]]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
KINDS = {
    "longrope": (
        "phi4-mini: partial rotary",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 12},
    ),
    "dynamic": ("qwen3-moe", {"rope_parameters": DYNAMIC, "max_position_embeddings": 12}),
}


def phi(kind="longrope"):
    """Other frequencies beyond 12 tokens."""
    family, settings = KINDS[kind]
    return tiny_family(family, **settings)


def gap(model, batch):
    """The largest |sampled - scored| log-prob; each sequence is scored alone, short ones too."""
    found = []
    for prompt, completion, logps in zip(batch.prompt_ids, batch.completion_ids, batch.sampling_per_token_logps):
        ids, mask = pad_left([prompt], 0, torch.device("cpu"))
        c = torch.tensor([completion])
        scored = score(model, ids, mask, c, torch.ones_like(c), temperature=1.0, workspace_mib=1).logps[0]
        found.append(float((scored - logps).detach().abs().max()))
    return max(found)


def engine(model, tokens):
    return RolloutEngine(model, Sampling(temperature=1.0, max_new_tokens=tokens, eos_ids=(1,), pad_id=0))


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_is_scored_beyond_the_first_context(kind, tmp_path):
    """As transformers has it, it is not: of these, one goes beyond, and one ends at the last token before."""
    model = phi(kind)
    assert gap(model, engine(model, 9).generate(PROMPTS, 2, seed=0)) > 1e-2
    said = []
    args = GRPOConfig(output_dir=str(tmp_path), max_prompt_length=9, max_completion_length=9, use_cpu=True, bf16=False)
    model = build_policy(phi(kind), args, None, None, said.append).eval()
    assert any("beyond the 12" in sentence for sentence in said)
    assert gap(model, engine(model, 9).generate(PROMPTS, 2, seed=0)) < 1e-4
    assert why_not(model) is None


def test_short_runs_are_transformers_own(tmp_path):
    """Up to the first context nothing changes, and nothing is said."""
    said = []
    args = GRPOConfig(output_dir=str(tmp_path), max_prompt_length=6, max_completion_length=6, use_cpu=True, bf16=False)
    model = build_policy(phi(), args, None, None, said.append).eval()
    assert not any("frequencies" in sentence for sentence in said)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    assert torch.equal(model(ids).logits, phi()(ids).logits)


def test_long_frequencies_are_those_of_a_long_pass():
    """Of the first tokens, too."""
    ids = torch.arange(3, 23)[None]
    model = phi()
    right = model(ids).logits
    assert settle_rotary(model, 20) == 12 and settle_rotary(model, 5) is None  # settled already
    assert torch.equal(model(ids).logits, right)
    torch.testing.assert_close(model(ids[:, :8]).logits, right[:, :8], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(phi()(ids[:, :8]).logits, right[:, :8], atol=1e-2)


def test_a_block_leaves_the_model_as_it_was():
    """The engine settles for a rollout where nobody has: in chat and evaluation."""
    model, ids = phi(), torch.arange(3, 11)[None]
    before = model(ids).logits
    with settled_rotary(model, 30):
        assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    assert torch.equal(model(ids).logits, before)
    batch = engine(model, 9).generate(PROMPTS, 2, seed=0)
    with settled_rotary(model, 18):
        assert gap(model, batch) < 1e-4
    training_pass(model)


def test_models_of_other_kinds_are_left_alone():
    assert settle_rotary(tiny_family("olmo3"), 10**6) is None
