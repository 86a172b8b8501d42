"""Today's families in the engine: sinks, soft-capping, shared keys, two sizes of heads, per-layer inputs."""

from __future__ import annotations

import pytest
import torch
from lowvram_grpo.kernels.decode import attention as decode_attention
from test_decode import LONG, check_logps, sampling
from test_turns_kept import Script, check, expected_of, once
from test_turns_kept import at as at_turns

from lowvram_grpo.policy.attention import keep_caps
from lowvram_grpo.policy.embeddings import HostEmbedding, place_embeddings
from lowvram_grpo.rollout import attention as layouts
from lowvram_grpo.rollout import decode, support
from lowvram_grpo.rollout.engine import RolloutEngine
from tests.attention_families import FAMILIES, as_transformers_has_it, tiny_family, with_adapter

ENDS = (1, 17, 40, 41, 42)
SINKS, SHARED, PER_LAYER = "gpt-oss: sinks", "gemma4: shared keys", "gemma4: per-layer inputs, two head sizes"


def generated(model, prompts=LONG, tokens=12):
    at = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": list(ENDS)}
    with as_transformers_has_it(model):
        found = [model.generate(input_ids=torch.tensor([p]), **at) for p in prompts]
    return [ids[0, len(p) :].tolist() for p, ids in zip(prompts, found)]


def greedy(**more):
    return sampling(temperature=0, max_new_tokens=12, eos_ids=ENDS, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family):
    """With LoRA on, ragged prompts, one of a single token, beyond windows; all rows at once, and three that are
    refilled. What is drawn has the log-probs of a plain pass."""
    model = with_adapter(tiny_family(family))
    assert support.why_not(model.get_base_model()) is None
    keep_caps(model.get_base_model())  # as a run does
    expected = [c for c in generated(model) for _ in range(2)]
    for rows in (None, 3):
        batch = RolloutEngine(model, greedy(), rows).generate(LONG, 2, seed=0)
        assert batch.completion_ids == expected
        check_logps(model, batch)
    drawn = RolloutEngine(model, sampling(temperature=0.8, max_new_tokens=12), 3).generate(LONG, 2, seed=4)
    assert drawn.completion_ids != expected
    check_logps(model, drawn, temperature=0.8)


@pytest.mark.parametrize("family", [SINKS, SHARED, "gemma2: soft-capping"])
def test_turns_are_what_they_would_be_from_scratch(family):
    model, settings = with_adapter(tiny_family(family)), at_turns(temperature=1.3)
    keep_caps(model.get_base_model())
    script, engine = Script(), RolloutEngine(model, settings, 3)
    batch = engine.converse(LONG, 2, seed=5, reply=script)
    check(batch, script.turns, expected_of(model, LONG, 2, 5, settings))
    assert engine.computed == once(LONG, batch)


@pytest.mark.parametrize("place", ["prefill", "decode"])
def test_a_forgotten_sink_would_show(place, monkeypatch):
    """In prefills, and in steps."""
    model = tiny_family(SINKS)
    if place == "prefill":
        attend = layouts.attend_causally
        monkeypatch.setattr(layouts, "attend_causally", lambda *a, sinks, **kw: attend(*a, **kw))
    else:
        attend = decode_attention.decode_attention_ref
        monkeypatch.setattr(decode_attention, "decode_attention_ref", lambda *a, sinks, **kw: attend(*a, **kw))
    assert "decodes differently" in support.why_not(model)


def caches(monkeypatch):
    made = []
    kind = decode.GroupCache
    monkeypatch.setattr(decode, "GroupCache", lambda *a: made.append(kind(*a)) or made[-1])
    sizes = []
    close = kind.close
    monkeypatch.setattr(kind, "close", lambda self: sizes.append((self.nbytes, len(self._layers))) or close(self))
    return sizes


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_shared_keys_are_kept_once(kv_dtype, monkeypatch):
    """Of six layers two attend to others' keys, and the cache holds four."""
    sizes = caches(monkeypatch)
    found = []
    for family in (PER_LAYER, SHARED):
        model = tiny_family(family)
        found.append(RolloutEngine(model, greedy(), 3, kv_dtype=kv_dtype).generate(LONG, 2, seed=0).completion_ids)
    (all_bytes, all_layers), (bytes_, layers) = sizes
    assert (all_layers, layers) == (6, 4) and bytes_ / all_bytes == pytest.approx(4 / 6)
    if kv_dtype == "auto":
        assert found[1] == [c for c in generated(model) for _ in range(2)]


def test_keys_that_only_look_alike_are_kept_apart():
    """One owner is one tensor: not one of the same numbers, nor one that happens to lie where another lay."""
    layout = layouts.PrefillLayout(None, [2], [0])
    keys = torch.zeros(1, 1, 2, 4)
    assert [layout.owner(i, x) for i, x in enumerate((keys, keys.clone(), keys))] == [0, 1, 0]
    owners = set()
    for i in range(3, 20):
        owners.add(layout.owner(i, torch.zeros(1, 1, 2, 4)))  # dies at once, and the next may get its place
    assert owners == set(range(3, 20))


@pytest.mark.parametrize("family", [PER_LAYER, SHARED])
@pytest.mark.parametrize("head", ["dense", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_per_layer_inputs_may_wait_in_host_memory(family, head, tied):
    """The step gives the decoder rows of both tables, and the pass needs no ids."""
    settings = {"tie_word_embeddings": tied}
    device = torch.device("cpu")
    there = tiny_family(family, **settings).requires_grad_(False)
    place_embeddings(there, head_dtype=head, embedding_offload=False, device=device)
    model = tiny_family(family, **settings).requires_grad_(False)
    said = place_embeddings(model, head_dtype=head, embedding_offload=True, device=device)
    assert isinstance(model.model.embed_tokens_per_layer, HostEmbedding) and "per-layer inputs" in said[0]
    assert isinstance(model.get_input_embeddings(), HostEmbedding) != tied
    at = sampling(temperature=0.8, max_new_tokens=12)
    batches = [RolloutEngine(with_adapter(m), at, 3).generate(LONG, 2, seed=4) for m in (there, model)]
    assert batches[0].completion_ids == batches[1].completion_ids
    check_logps(model, batches[1], temperature=0.8)
