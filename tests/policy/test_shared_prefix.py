"""One pass over a group's prompt gives what a pass for each completion gives."""

from __future__ import annotations

import pytest
import torch
from passes import COMPLETIONS, GROUPS, PROMPTS, adapted, assert_same, micro_batch, tiny, training_pass
from torch.utils.flop_counter import FlopCounterMode
from transformers import FalconConfig, FalconForCausalLM

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy.attention import NAME
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.shared_prefix import PrefixLayout, packed_tokens, shared_groups, why_not
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.training.experience import MicroBatch, load_updates, save_updates
from lowvram_grpo.training.scoring import score, scored_states

SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama without grouped heads": ("Llama", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {}),
    "mistral, window below the length": ("Mistral", {"sliding_window": 4}),
    "gemma3, window below the prompt": ("Gemma3Text", {"sliding_window": 3, **SLIDING_AND_FULL}),
    "gemma3, window above the length": ("Gemma3Text", {"sliding_window": 64, **SLIDING_AND_FULL}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_changes_neither_log_probs_nor_gradients(family):
    name, settings = FAMILIES[family]
    model = adapted(tiny(name, **settings))
    assert model.config._attn_implementation == "sdpa"
    plain = training_pass(model)
    assert why_not(model) is None and model.get_base_model().config._attn_implementation == NAME
    # The plain path under the registered name is transformers' own.
    assert torch.equal(training_pass(model)[0].logps, plain[0].logps)
    assert_same(plain, training_pass(model, group_sizes=GROUPS))
    checkpoint_activations(model)
    assert_same(plain, training_pass(model, group_sizes=GROUPS))


def test_the_window_matters_in_these_tests():
    """Else a window that is ignored would pass."""
    logps = [
        score(tiny("Mistral", sliding_window=w), *micro_batch(), temperature=1.0, workspace_mib=1).logps
        for w in (4, None)
    ]
    assert (logps[0] - logps[1]).abs().max() > 0.01


def test_the_reference_pass_without_adapter_shares_too():
    model = adapted(tiny("Qwen2"))
    assert why_not(model) is None
    with torch.no_grad(), model.disable_adapter():
        plain = scored_states(model, *micro_batch())
        shared = scored_states(model, *micro_batch(), group_sizes=GROUPS)
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-5)
    _, gradients = training_pass(model, group_sizes=GROUPS)
    joint = [training_pass(model, ref_states=plain, kl=True, group_sizes=groups) for groups in (None, GROUPS)]
    torch.testing.assert_close(joint[0][0].kl, joint[1][0].kl, rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_a_group_may_be_split_over_two_micro_batches():
    model = adapted(tiny("Llama"))
    assert why_not(model) is None
    together, gradients = training_pass(model, group_sizes=GROUPS)
    batch = micro_batch()
    weights = torch.randn(together.logps.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    for rows, groups in ((slice(0, 2), [2]), (slice(2, 5), [1, 2])):
        part = score(
            model, *(x[rows] for x in batch), temperature=0.9, workspace_mib=1, group_sizes=groups,
            prompt_lengths=PROMPTS[rows], completion_lengths=COMPLETIONS[rows],
        )  # fmt: skip
        torch.testing.assert_close(part.logps, together.logps[rows], rtol=1e-4, atol=1e-5)
        (part.logps * weights[rows]).sum().backward()
    assert_same((together, gradients), (together, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))


@pytest.mark.parametrize(
    "completions", [[1, 1, 1, 1, 1], [3, 0, 2, 0, 0], [4, 4, 4, 4, 4]], ids=["one token", "none", "even"]
)
def test_extreme_lengths(completions):
    model = adapted(tiny("Qwen3"))
    assert why_not(model) is None
    batch = micro_batch(completions=completions)
    assert_same(training_pass(model, batch), training_pass(model, batch, group_sizes=GROUPS))


def test_under_bfloat16_autocast_it_differs_by_rounding():
    model = adapted(tiny("Llama", initializer_range=0.1))
    assert why_not(model) is None
    exact = training_pass(model)[0].logps.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, shared = (training_pass(model, group_sizes=g)[0].logps.detach() for g in (None, GROUPS))
    worst = lambda logps: float((logps - exact).abs().max())
    assert 0 < worst(shared) <= 2 * worst(plain) + 1e-3


def test_rollouts_stay_the_same():
    model = tiny("Gemma3Text", sliding_window=4, **SLIDING_AND_FULL)
    engine = RolloutEngine(model, Sampling(temperature=0.8, max_new_tokens=6, eos_ids=(1,), pad_id=0))
    before = engine.generate([[5, 6, 7], [8, 9]], 2, seed=3)
    assert why_not(model) is None and model.config._attn_implementation == NAME
    after = engine.generate([[5, 6, 7], [8, 9]], 2, seed=3)
    assert before.completion_ids == after.completion_ids
    for a, b in zip(before.sampling_per_token_logps, after.sampling_per_token_logps):
        assert torch.equal(a, b)


def test_models_that_cannot_share_say_why():
    eager = tiny("Llama", attn_implementation="eager")
    assert "eager, not sdpa" in why_not(eager)
    mixed = tiny("Qwen3", layer_types=["chunked_attention", "full_attention"])
    assert "chunked_attention" in why_not(mixed)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    alibi = FalconForCausalLM(FalconConfig(vocab_size=41, alibi=True, **small))
    assert why_not(alibi) and alibi.config._attn_implementation == "sdpa"
    asked = [5, 5], [9, 9], [2]
    with pytest.warns(UserWarning, match=r"once for each of its completions, because .* eager, not sdpa") as said:
        assert shared_groups("auto", eager, *asked) is shared_groups("auto", eager, *asked) is None
    assert len(said) == 1
    with pytest.raises(UserError, match=r"shared_prefix is on, but .* eager, not sdpa; set it to auto or off"):
        shared_groups("on", eager, *asked)


def test_a_model_that_keeps_the_layout_from_its_layers_falls_back():
    model = tiny("Llama")
    attention = type(model.model.layers[0].self_attn).forward
    layer = model.model.layers[1].self_attn
    layer.forward = lambda *a, attention_layout=None, **kw: attention(layer, *a, **kw)
    assert why_not(model) is not None
    assert model.config._attn_implementation == "sdpa"


def test_auto_shares_where_it_saves_a_tenth():
    model = tiny("Llama")
    assert shared_groups("auto", model, [5, 5], [9, 9], [2]) == [2]
    assert shared_groups("auto", model, [1, 1], [90, 90], [2]) is None
    assert shared_groups("on", model, [1, 1], [90, 90], [2]) == [2]
    # A single completion leaves out next to nothing, but a padded row's mask is the square of its length.
    assert shared_groups("auto", model, [90], [90], [1]) is None
    assert shared_groups("auto", model, [4000], [200], [1]) == [1]
    assert shared_groups("off", model, [5, 5], [9, 9], [2]) is None
    assert shared_groups("on", model, None, None, None) is None
    layout = PrefixLayout(PROMPTS, COMPLETIONS, GROUPS, width=12, prompt_width=5, device=torch.device("cpu"))
    assert layout.length == packed_tokens(PROMPTS, COMPLETIONS, GROUPS) == 5 + 3 + 6 + 0 + 3 + 5 + 1


def test_flops_and_bytes_fall_on_meta_tensors():
    """256 prompt and 300 completion tokens, a group of 8: 0.60 of the tokens."""
    with torch.device("meta"):
        settings = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "head_dim": 16}
        model = adapted(tiny("Llama", **settings))
    checkpoint_activations(model)
    batch = micro_batch([256] * 8, [300] * 8, [8], device="meta")
    lengths = {"prompt_lengths": [256] * 8, "completion_lengths": [300] * 8, "wanted": batch[3].bool()}
    flops, peak = [], []
    assert why_not(model) is None
    for groups in (None, [8]):
        with Ledger() as ledger:
            training_pass(model, batch, group_sizes=groups, **lengths)
        with FlopCounterMode(display=False) as counter:  # on its own: it keeps tensors alive
            training_pass(model, batch, group_sizes=groups, **lengths)
        flops.append(counter.get_total_flops())
        peak.append(ledger.peak)
    assert flops[1] < 0.62 * flops[0]
    assert peak[1] < 0.65 * peak[0]


def test_the_ledger_on_meta_tensors_counts_what_is_held_on_a_cpu():
    live = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = adapted(tiny("Llama"))
        checkpoint_activations(model)
        model.train()
        batch = micro_batch(device=device)
        assert why_not(model) is None
        with Ledger() as ledger:
            scores = score(
                model, *batch, temperature=1.0, workspace_mib=1, prompt_lengths=PROMPTS, completion_lengths=COMPLETIONS,
                group_sizes=GROUPS,
            )  # fmt: skip
            live.append(ledger.live)
        del scores
    assert live[1] == pytest.approx(live[0], rel=0.05)


def test_lengths_and_groups_survive_saving_and_moving(tmp_path):
    zeros = torch.zeros(2, 1)
    micro = MicroBatch(*[zeros] * 8, prompt_lengths=[1, 1], completion_lengths=[1, 1], group_sizes=[2])
    save_updates([[micro]], str(tmp_path))
    ((again,),) = load_updates(str(tmp_path), torch.device("cpu"), pytest.fail)
    assert again.lengths() == {"prompt_lengths": [1, 1], "completion_lengths": [1, 1]} and again.group_sizes == [2]
