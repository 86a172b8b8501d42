"""The decode loop: waves, architectures, quantized heads, and what a rehearsal says of its memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import make_model

from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy.embeddings import place_embeddings
from lowvram_grpo.rollout import decode as decode_module
from lowvram_grpo.rollout.engine import RolloutEngine, pad_left, waves
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.scoring import score

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
LONG = [[3 + i % 30 for i in range(21)], [4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14, 15]]


def sampling(**overrides):
    return Sampling(**{"max_new_tokens": 8, "eos_ids": (1,), "pad_id": 0, **overrides})


def build(kind, **extra):
    import transformers as t

    torch.manual_seed(0)
    small = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 2, "initializer_range": 0.4,
    }  # fmt: skip
    config = t.Gemma3TextConfig if kind == "Gemma3" else getattr(t, f"{kind}Config")
    return getattr(t, f"{kind}ForCausalLM")(config(**{**small, **extra})).eval()


@pytest.mark.parametrize(
    "kind,extra",
    [
        ("Qwen3", {}),
        ("Mistral", {"sliding_window": 8}),
        ("Gemma2", {"sliding_window": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
        ("Gemma3", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
        ("Granite", {"logits_scaling": 4.0}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_greedy_equals_generate_beyond_a_sliding_window(kind, extra):
    model = build(kind, **extra)
    batch = RolloutEngine(model, sampling(temperature=0, max_new_tokens=12)).generate(LONG, 2, seed=0)
    for i, prompt in enumerate(LONG):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert batch.completion_ids[2 * i] == batch.completion_ids[2 * i + 1] == expected.tolist()


def test_greedy_with_a_repetition_penalty_equals_generate(model):
    expected = []
    for prompt in PROMPTS:
        found = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, repetition_penalty=1.8)
        expected.append(found[0, len(prompt) :].tolist())
    # Padding is no repetition, even with an id that the padded rows would choose.
    at = sampling(temperature=0, repetition_penalty=1.8, pad_id=expected[1][0])
    batch = RolloutEngine(model, at).generate(PROMPTS, 1, seed=0)
    assert batch.completion_ids == expected
    plain = RolloutEngine(model, sampling(temperature=0)).generate(PROMPTS, 1, seed=0)
    assert plain.completion_ids != batch.completion_ids


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.01}])
def test_draws_do_not_depend_on_the_wave(model, settings):
    at = sampling(**settings, max_new_tokens=12)
    whole = RolloutEngine(model, at).generate(PROMPTS, 5, seed=3)
    assert len({tuple(c) for c in whole.completion_ids}) > 10
    for rows in (1, 2, 3, 5, 7, 10, 14):
        parts = RolloutEngine(model, at, rows).generate(PROMPTS, 5, seed=3)
        assert parts.completion_ids == whole.completion_ids and parts.truncated == whole.truncated
        assert parts.prompt_ids == whole.prompt_ids
    fewer = RolloutEngine(model, at).generate(PROMPTS[:2], 5, seed=3)
    assert fewer.completion_ids == whole.completion_ids[:10]


@pytest.mark.parametrize("rows", [None, 1, 2, 3, 4, 5, 6, 9, 12, 100])
def test_waves_are_in_order_and_no_larger_than_they_may_be(rows):
    found = waves(3, 4, rows)
    assert [pair for wave in found for pair in wave] == [(p, g) for p in range(3) for g in range(4)]
    assert max(map(len, found)) <= (rows or 12)
    if rows is not None and rows < 4:
        assert all(len({p for p, _ in wave}) == 1 for wave in found)
    else:
        assert all(len(wave) % 4 == 0 for wave in found)


def test_the_host_may_look_late(model, monkeypatch):
    at = sampling(max_new_tokens=20, eos_ids=(1, 5, 6, 7, 8, 9, 10, 11, 12))
    expected = RolloutEngine(model, at).generate(PROMPTS, 2, seed=0)
    steps = []
    step, decode = decode_module.Wave.step, decode_module.decode
    monkeypatch.setattr(decode_module.Wave, "step", lambda self: steps.append(1) or step(self))
    monkeypatch.setattr("lowvram_grpo.rollout.engine.decode", lambda wave, at: decode(wave, at, look_every=8))
    late = RolloutEngine(model, at).generate(PROMPTS, 2, seed=0)
    assert late.completion_ids == expected.completion_ids and not any(expected.truncated)
    assert len(steps) % 8 == 0 and len(steps) > max(map(len, expected.completion_ids))
    assert [len(x) for x in late.sampling_per_token_logps] == [len(c) for c in late.completion_ids]


@pytest.mark.parametrize("fails", [False, True])
def test_the_cache_is_gone_when_generate_returns(model, fails):
    seen = []

    def watch(cache):
        seen.extend(weakref.ref(x.keys.untyped_storage()) for x in cache.layers if x.keys is not None)
        if fails and len(seen) > 8:
            raise RuntimeError("stop")

    gc.disable()
    try:
        try:
            batch = RolloutEngine(model, sampling(), 4, on_cache=watch).generate(PROMPTS, 2, seed=0)
            assert all(x.device.type == "cpu" for x in batch.sampling_per_token_logps)
        except RuntimeError as error:
            kept = error  # and with it the frames that hold the wave
            assert fails and kept
        assert len(seen) > 8 and not any(ref() is not None for ref in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_quantized_head_samples_what_it_scores(kind, tied):
    model = make_model(hidden_size=64, intermediate_size=96, tie_word_embeddings=tied).requires_grad_(False)
    place_embeddings(model, head_dtype=kind, embedding_offload=not tied, device=torch.device("cpu"))
    batch = RolloutEngine(model, sampling(temperature=0.8)).generate(PROMPTS, 4, seed=0)
    for prompt, completion, logps in zip(batch.prompt_ids, batch.completion_ids, batch.sampling_per_token_logps):
        ids, mask = pad_left([prompt], 0, torch.device("cpu"))
        c = torch.tensor([completion])
        scored = score(model, ids, mask, c, torch.ones_like(c), temperature=0.8, workspace_mib=1).logps[0]
        torch.testing.assert_close(scored, logps, rtol=0, atol=1e-4)


def test_minimum_length_and_foreign_arguments(model):
    at = sampling(eos_ids=tuple(range(1, 20)), extra={"min_new_tokens": 5})
    engine = RolloutEngine(model, at)
    lengths = [len(c) for c in engine.generate(PROMPTS, 8, seed=0).completion_ids]
    assert min(lengths) > 5 and len(set(lengths)) > 1
    with pytest.warns(UserWarning, match="no_repeat_ngram_size: completions are sampled by transformers"):
        engine = RolloutEngine(model, sampling(temperature=0.9, extra={"no_repeat_ngram_size": 1}), 4)
    first, second = (engine.generate(PROMPTS, 2, seed=0) for _ in range(2))
    assert first.completion_ids == second.completion_ids
    for prompt, completion, logps in zip(first.prompt_ids, first.completion_ids, first.sampling_per_token_logps):
        assert len(set(completion)) == len(completion) == len(logps)
        ids, mask = pad_left([prompt], 0, torch.device("cpu"))
        c = torch.tensor([completion])
        scored = score(model, ids, mask, c, torch.ones_like(c), temperature=0.9, workspace_mib=1).logps[0].detach()
        torch.testing.assert_close(scored, logps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind,extra", [("Llama", {}), ("Mistral", {"sliding_window": 8})], ids=["full", "sliding"])
def test_a_rehearsal_ends_with_a_full_cache(kind, extra, device):
    model = build(kind, **extra).to(device)
    shapes, lengths = [], []

    def watch(cache):
        shapes.append([tuple(layer.keys.shape) for layer in cache.layers])
        lengths.append(cache.get_seq_length())

    at = sampling(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.2, known_ids=90)
    RolloutEngine(model, at, on_cache=watch).rehearse(12, 37, rows=6, num_generations=4)
    width = 7 if extra else 12 + 37 - 1
    assert shapes[0][0][0] == 2 and shapes[-1] == [(6, 2, width, 8)] * 2
    assert lengths[0] == 12 - 1 and lengths[-1] == 12 + 37 - 1


@pytest.mark.parametrize("kind,extra", [("Llama", {}), ("Mistral", {"sliding_window": 64})], ids=["full", "sliding"])
def test_a_rehearsal_has_the_peak_of_the_real_thing(kind, extra, monkeypatch):
    model = build(kind, **extra, num_hidden_layers=3)
    engine = RolloutEngine(model, sampling(max_new_tokens=100, extra={"min_new_tokens": 100}, top_p=0.9))

    def peak(run):
        with Ledger() as ledger:
            ledger.ignore(*model.parameters(), *model.buffers())
            run()
        return ledger.peak

    real = peak(lambda: engine.generate([[3] * 40, [4] * 40], 4, seed=0))
    rehearse = lambda: engine.rehearse(40, 100, rows=8, num_generations=4)
    assert peak(rehearse) == pytest.approx(real, rel=0.05)
    model.to("meta")
    # On meta, PyTorch takes its attention apart into products with a matrix of scores, which no kernel makes.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    assert peak(rehearse) == pytest.approx(real, rel=0.05)
