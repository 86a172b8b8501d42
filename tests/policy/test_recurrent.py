"""Layers with a state in training passes: shared prompts against padded rows, and padded rows against each alone."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import transformers
from passes import COMPLETIONS, GROUPS, PROMPTS, assert_same, micro_batch, training_pass

from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy import recurrent
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.dropout import training_mode
from lowvram_grpo.policy.recurrent import attending_layers, recurrent_layers
from lowvram_grpo.policy.shared_prefix import shared_groups, why_not
from lowvram_grpo.policy.training_ops import fewer_launches
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout import support
from tests.rollout.hybrids import FEW, HYBRIDS, build_hybrid, with_adapter

LENGTHS = {"prompt_lengths": PROMPTS, "completion_lengths": COMPLETIONS}
SHARED = {**LENGTHS, "group_sizes": GROUPS}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_shared_prompts_give_the_gradients_of_padded_rows(kind):
    """Ragged prompts and completions; a group's shortest completion keeps no token that others follow."""
    model = with_adapter(build_hybrid(kind))
    assert why_not(model) is None
    assert shared_groups("on", model, PROMPTS, COMPLETIONS, GROUPS) == GROUPS
    assert_same(training_pass(model, **SHARED), training_pass(model), rtol=3e-4)


@pytest.mark.parametrize("kind", FEW)
def test_padded_rows_are_what_each_is_alone(kind):
    """transformers leaves padding out of states where it is given a mask of two dimensions."""
    model = with_adapter(build_hybrid(kind))
    batch = micro_batch()
    together, _ = training_pass(model, batch)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        ids, mask, more, seen = (x[i : i + 1] for x in batch)
        alone, _ = training_pass(
            model, [ids[:, -prompt:], mask[:, -prompt:], more[:, :completion], seen[:, :completion]]
        )
        torch.testing.assert_close(together.logps[i, :completion], alone.logps[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("shared", [True, False])
def test_recomputed_layers_go_by_the_same_layout(kind, shared):
    model = with_adapter(build_hybrid(kind))
    assert why_not(model) is None
    lengths = SHARED if shared else LENGTHS
    expected = training_pass(model, **lengths)
    checkpointed = copy.deepcopy(model)
    checkpoint_activations(checkpointed)
    runs, inner = [], recurrent._by_layout
    assert_same(training_pass(checkpointed, **lengths), expected)
    layers = len(recurrent_layers(unwrap(checkpointed).model))
    counted = lambda layer, *a, **k: runs.append(layer) or inner(layer, *a, **k)
    for layer in recurrent_layers(unwrap(checkpointed).model):
        layer.forward = partial(counted, layer)
    training_pass(checkpointed, **lengths)
    assert len(runs) == 2 * layers


@pytest.mark.parametrize("completions,groups", [([2, 2, 1, 2, 1], [3, 2]), ([1] * 5, [3, 2]), ([3] * 5, [1] * 5)])
def test_completions_of_a_token_or_two(completions, groups):
    """Of which one is left that goes through the decoder, or none: transformers takes another way for a single one."""
    for kind in FEW:
        model, batch = with_adapter(build_hybrid(kind)), micro_batch(completions=completions, groups=groups)
        prompts = PROMPTS if len(groups) == 2 else batch[1].sum(1).tolist()
        lengths = {"prompt_lengths": prompts, "completion_lengths": completions}
        if len(groups) == 5:
            batch = micro_batch([5, 4, 3, 2, 1], completions, groups)
            lengths["prompt_lengths"] = [5, 4, 3, 2, 1]
        plain = training_pass(model, batch, **lengths)
        assert why_not(model) is None
        assert_same(training_pass(model, batch, **lengths, group_sizes=groups), plain, rtol=3e-4)


@pytest.mark.parametrize("kind", FEW)
def test_fewer_launches_change_nothing(kind):
    model = with_adapter(build_hybrid(kind))
    assert why_not(model) is None
    expected = training_pass(model, **SHARED)
    fewer_launches(model, "on", None)
    assert_same(training_pass(model, **SHARED), expected)


@pytest.mark.parametrize("kind", FEW)
def test_meta_counts_what_a_shared_pass_holds(kind):
    peaks = {}
    for device in ("cpu", "meta"):
        model = with_adapter(build_hybrid(kind))
        assert why_not(model) is None
        model.to(device)
        assert why_not(model) is None
        batch = micro_batch([40] * 4, [60] * 4, [4], device=device)
        lengths = {"prompt_lengths": [40] * 4, "completion_lengths": [60] * 4, "group_sizes": [4]}
        training_mode(model)
        with Ledger() as ledger:
            ledger.ignore(*model.parameters(), *model.buffers(), *batch)
            training_pass(model, batch, **lengths)
        peaks[device] = ledger.peak
    assert peaks["meta"] == pytest.approx(peaks["cpu"], rel=0.01)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_layers_are_known_by_what_they_ask_of_a_cache(kind):
    decoder = build_hybrid(kind).model
    names = lambda layers: {type(m).__name__.removeprefix(kind) for m in layers}
    assert names(recurrent_layers(decoder)) <= {"GatedDeltaNet", "ShortConv", "MambaLayer", "Mixer", "Mamba2Mixer"}
    assert names(attending_layers(decoder)) == {"Attention"}
    count = len(recurrent_layers(decoder)) + len(attending_layers(decoder))
    assert count == (6 if kind == "FalconH1" else 3)


def test_what_cannot_go_on_from_a_state_takes_the_plain_path(monkeypatch):
    monkeypatch.setattr("lowvram_grpo.policy.shared_prefix.CONTINUES", False)
    assert "cannot go on from a prompt's state" in why_not(build_hybrid("Qwen3_5"))


def test_a_state_that_is_dropped_is_noticed(monkeypatch):
    monkeypatch.setattr(recurrent.States, "expanded", lambda self, rows: recurrent.States())
    assert "give others behind a shared prompt" in why_not(build_hybrid("Lfm2"))


@pytest.mark.parametrize(
    "kind,settings,reason",
    [
        (
            "Zamba2",
            {
                "layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "n_mamba_heads": 4,
                "mamba_headdim": 16, "mamba_d_state": 8, "mamba_ngroups": 1, "num_mem_blocks": 1,
            },
            "do not say which they are",
        ),
        ("MiniMax", {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}, "kind linear_attention"),
        (
            "Jamba",
            {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
            "0 of its 1 layers with a state go by a given layout",
        ),
    ],
)  # fmt: skip
def test_layers_that_keep_their_states_elsewhere_are_refused_in_words(kind, settings, reason):
    sizes = {
        "vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pad_token_id": 0,
        "num_key_value_heads": 4, "num_hidden_layers": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for asked in (why_not, support.why_not):
        assert reason in asked(model)
