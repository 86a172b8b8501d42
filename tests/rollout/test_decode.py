"""The decode loop: architectures, rows that come and go, quantized heads and caches, and what a rehearsal says."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from lowvram_grpo.kernels.runtime import interpreted
from models import LISTED, build, with_lora
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy.embeddings import place_embeddings
from lowvram_grpo.rollout import engine as engine_module
from lowvram_grpo.rollout.attention import DecodeLayout
from lowvram_grpo.rollout.batch import pad_left
from lowvram_grpo.rollout.cache import GroupCache
from lowvram_grpo.rollout.decode import DecodeSettings
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.graphs import StepGraphs, bucket
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.training.scoring import score

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
LONG = [[3 + i % 30 for i in range(21)], [4, 5, 6], [7], [7, 8, 9, 10, 11, 12, 13, 14, 15]]


def sampling(**overrides):
    return Sampling(**{"max_new_tokens": 8, "eos_ids": (1,), "pad_id": 0, **overrides})


def scored_and_sampled(model, batch, temperature=1.0):
    """Log-probs of a forward pass over each whole sequence, and the sampled ones."""
    for prompt, completion, logps in zip(batch.prompt_ids, batch.completion_ids, batch.sampling_per_token_logps):
        ids, mask = pad_left([prompt], 0, torch.device("cpu"))
        c = torch.tensor([completion])
        scored = score(model, ids, mask, c, torch.ones_like(c), temperature=temperature, workspace_mib=1).logps[0]
        yield scored.detach(), logps


def check_logps(model, batch, temperature=1.0, atol=1e-4):
    for scored, sampled in scored_and_sampled(model, batch, temperature):
        torch.testing.assert_close(scored, sampled, rtol=0, atol=atol)


@pytest.mark.parametrize("kind,extra", LISTED, ids=lambda x: x if isinstance(x, str) else "")
def test_greedy_equals_generate(kind, extra):
    """With LoRA on, ragged prompts, one of them a single token, beyond sliding windows, several end ids."""
    model = with_lora(build(kind, **extra))
    expected = []
    for prompt in LONG:
        found = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[1, 17, 40, 41, 42]
        )
        expected.append(found[0, len(prompt) :].tolist())
    at = sampling(temperature=0, max_new_tokens=12, eos_ids=(1, 17, 40, 41, 42))
    batch = RolloutEngine(model, at).generate(LONG, 2, seed=0)
    assert batch.completion_ids == [c for c in expected for _ in range(2)]
    seated = RolloutEngine(model, at, 3).generate(LONG, 2, seed=0)
    assert seated.completion_ids == batch.completion_ids
    check_logps(model, batch, temperature=1.0)


def test_the_listed_architectures_end_early_and_late():
    """So that the test above sees both: some completions end by an end id, some by their length."""
    reasons = Counter()
    for kind, extra in LISTED:
        at = sampling(temperature=0, max_new_tokens=12, eos_ids=(1, 17, 40, 41, 42))
        reasons.update(RolloutEngine(with_lora(build(kind, **extra)), at).generate(LONG, 1, seed=0).stop_reasons)
    assert min(reasons["stop"], reasons["length"]) > 5


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
def test_draws_do_not_depend_on_who_decodes_beside(model, settings, monkeypatch):
    """Rows are moved, refilled and looked at late: what each of them says stays the same."""
    at = sampling(**settings, max_new_tokens=12, eos_ids=(1, 5, 9))
    whole = RolloutEngine(model, at).generate(PROMPTS, 5, seed=3)
    assert len({tuple(c) for c in whole.completion_ids}) > 9 and len({len(c) for c in whole.completion_ids}) > 3
    moves = Counter()
    for name in ("move_row", "move_slot"):
        inner = getattr(GroupCache, name)
        count = lambda self, *a, name=name, inner=inner: moves.update([name]) or inner(self, *a)
        monkeypatch.setattr(GroupCache, name, count)
    run = engine_module.run
    for every in (1, 3):
        monkeypatch.setattr(engine_module, "run", lambda decoder, every=every: run(decoder, every))
        for rows in (1, 3, 7, 14):
            parts = RolloutEngine(model, at, rows).generate(PROMPTS, 5, seed=3)
            assert parts.completion_ids == whole.completion_ids and parts.truncated == whole.truncated
            assert parts.prompt_ids == whole.prompt_ids
            for a, b in zip(parts.sampling_per_token_logps, whole.sampling_per_token_logps):
                torch.testing.assert_close(a, b, rtol=0, atol=5e-5)
    assert moves["move_row"] > 5 and moves["move_slot"] > 0
    fewer = RolloutEngine(model, at).generate(PROMPTS[:2], 5, seed=3)
    assert fewer.completion_ids == whole.completion_ids[:10]


def test_the_host_may_look_late(model, monkeypatch):
    at = sampling(max_new_tokens=20, eos_ids=(1, 5, 6, 7, 8, 9, 10, 11, 12))
    expected = RolloutEngine(model, at).generate(PROMPTS, 2, seed=0)
    steps, run, step = [], engine_module.run, engine_module.Decoder.step
    monkeypatch.setattr(engine_module.Decoder, "step", lambda self: steps.append(1) or step(self))
    monkeypatch.setattr(engine_module, "run", lambda decoder: run(decoder, look_every=8))
    late = RolloutEngine(model, at).generate(PROMPTS, 2, seed=0)
    assert late.completion_ids == expected.completion_ids and not any(expected.truncated)
    assert len(steps) % 8 == 0 and len(steps) > max(map(len, expected.completion_ids))
    assert [len(x) for x in late.sampling_per_token_logps] == [len(c) for c in late.completion_ids]


def test_prompts_are_prefilled_in_packs(monkeypatch):
    model = build("Llama")
    whole = RolloutEngine(model, sampling()).generate(LONG, 2, seed=0)
    sizes, prefill = [], engine_module.Decoder.prefill
    monkeypatch.setattr(
        engine_module.Decoder, "prefill", lambda self, pack, ids: sizes.append(len(pack)) or prefill(self, pack, ids)
    )
    monkeypatch.setattr("lowvram_grpo.rollout.decode.PREFILL_TOKENS", 10)
    assert RolloutEngine(model, sampling()).generate(LONG, 2, seed=0).completion_ids == whole.completion_ids
    assert sizes == [1, 2]  # 20 tokens, then 8 and 2; the prompt of one token has nothing to prefill


def test_the_cache_holds_each_prompt_once():
    model = build("Llama")
    with Ledger() as ledger:
        RolloutEngine(model, sampling(max_new_tokens=5)).generate([[3] * 40, [4] * 40], 4, seed=0)
    layers, heads, width = 2, 2, 8
    per_token = layers * heads * width * 4 * 2
    assert ledger.phases == {}
    held = kv_bytes(model, 5, [[3] * 40, [4] * 40], 4)
    assert held == per_token * (2 * 39 + 8 * 5) and held < per_token * 8 * 44 / 2


def kv_bytes(model, length, prompts, group, **settings):
    """Bytes of category KV cache at the peak of a rollout."""
    with Ledger() as ledger, ledger.phase("rollout") as peak:
        ledger.ignore(*model.parameters(), *model.buffers())
        RolloutEngine(model, sampling(max_new_tokens=length), **settings).generate(prompts, group, seed=0)
    assert "KV cache" not in ledger.categories
    return peak.categories["KV cache"]


def test_an_int8_cache_takes_a_quarter_of_float32_and_a_scale():
    model = build("Llama")
    whole = kv_bytes(model, 5, LONG, 4)
    spread = 2 * 4 * 2 * 8 * 4  # float32, for each of 2 layers, 4 prompts, 2 KV heads of 8 channels
    assert kv_bytes(model, 5, LONG, 4, kv_dtype="int8") == whole * (8 + 4) // (8 * 4) + spread


@pytest.mark.parametrize("kind,extra", [("Llama", {}), ("Gemma2", {"sliding_window": 8})], ids=["Llama", "Gemma2"])
def test_an_int8_cache_samples_nearly_the_same(kind, extra):
    model = build(kind, **extra, initializer_range=0.2)
    exact = RolloutEngine(model, sampling(max_new_tokens=16)).generate(LONG, 4, seed=0)
    check_logps(model, exact)
    rounded = RolloutEngine(model, sampling(max_new_tokens=16), kv_dtype="int8").generate(LONG, 4, seed=0)
    check_logps(model, rounded, atol=0.1)
    with pytest.raises(AssertionError):
        check_logps(model, rounded, atol=1e-5)
    same = [a == b for a, b in zip(exact.completion_ids, rounded.completion_ids)]
    assert sum(same) > len(same) / 2


def test_an_int8_cache_keeps_what_large_channels_leave_over(monkeypatch):
    """Qwen2's keys have biases that dwarf the rest; with the spread divided out, both keep their bits."""
    model = build("Qwen2", initializer_range=0.2)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[::8] = 200.0

    def gap():
        batch = RolloutEngine(model, sampling(max_new_tokens=16), kv_dtype="int8").generate(LONG[:2], 8, seed=0)
        return torch.cat([(a - b).abs() for a, b in scored_and_sampled(model, batch)]).mean()

    kept = gap()
    monkeypatch.setattr("lowvram_grpo.rollout.cache.spread_of", lambda keys: torch.ones(keys.shape[0], keys.shape[2]))
    assert 2 * kept < gap()


@pytest.mark.parametrize("fails", [False, True])
def test_the_cache_is_gone_when_generate_returns(model, fails, monkeypatch):
    seen, layer = [], GroupCache.layer

    def watch(self, *args):
        if fails and len(seen) > 12:
            raise RuntimeError("stop")
        found = layer(self, *args)
        seen.extend(weakref.ref(kv.keys.untyped_storage()) for kv in found[:2])
        return found

    RolloutEngine(model, sampling()).generate(PROMPTS, 2, seed=0)  # the model is known to decode in the engine
    monkeypatch.setattr(GroupCache, "layer", watch)
    decoders, made = [], engine_module.Decoder.__init__
    kept_weakly = lambda self, *a, **kw: decoders.append(weakref.ref(self)) or made(self, *a, **kw)
    monkeypatch.setattr(engine_module.Decoder, "__init__", kept_weakly)
    gc.disable()
    try:
        try:
            batch = RolloutEngine(model, sampling(), 4).generate(PROMPTS, 2, seed=0)
            assert not fails and all(x.device.type == "cpu" for x in batch.sampling_per_token_logps)
        except RuntimeError as error:
            kept = error  # and with it the frames that hold the decoder
            assert fails and kept
        assert len(seen) > 8 and not any(ref() is not None for ref in seen)
        assert fails or not any(ref() is not None for ref in decoders)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_quantized_head_samples_what_it_scores(kind, tied):
    model = make_model(hidden_size=64, intermediate_size=96, tie_word_embeddings=tied).requires_grad_(False)
    place_embeddings(model, head_dtype=kind, embedding_offload=not tied, device=torch.device("cpu"))
    batch = RolloutEngine(model, sampling(temperature=0.8)).generate(PROMPTS, 4, seed=0)
    check_logps(model, batch, 0.8)


def test_minimum_length(model):
    at = sampling(eos_ids=tuple(range(1, 20)), extra={"min_new_tokens": 5})
    lengths = [len(c) for c in RolloutEngine(model, at, 5).generate(PROMPTS, 8, seed=0).completion_ids]
    assert min(lengths) > 5 and len(set(lengths)) > 1


def test_a_stream_that_is_left_gives_the_attention_back(model):
    stream = RolloutEngine(model, sampling(max_new_tokens=20)).stream(PROMPTS[0], seed=5)
    next(stream)
    assert model.config._attn_implementation != "sdpa"
    stream.close()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind,extra", [("Llama", {}), ("Mistral", {"sliding_window": 8})], ids=["full", "sliding"])
def test_a_rehearsal_ends_with_a_full_cache(kind, extra, device, monkeypatch):
    model = build(kind, **extra).to(device)
    caches, prefilled, step = [], [], engine_module.Decoder._work

    def work(self, width):
        step(self, width)
        caches.append(
            (width, self._ages[0], {k: tuple(x.keys.shape for x in v[:2]) for k, v in self.cache._layers.items()})
        )

    monkeypatch.setattr(engine_module.Decoder, "_work", work)
    at = sampling(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.2, known_ids=90)
    engine = RolloutEngine(model, at, on_prefilled=lambda: prefilled.append(len(caches)))
    engine.rehearse(12, 37, 6, 4, prompts=5)
    assert prefilled == [0]
    assert caches == [(6, 36, {0: ((4, 2, 11, 8), (6, 2, 37, 8)), 1: ((4, 2, 11, 8), (6, 2, 37, 8))})]


@pytest.mark.parametrize("rows", [8, 6])
@pytest.mark.parametrize("kind,extra", [("Llama", {}), ("Mistral", {"sliding_window": 64})], ids=["full", "sliding"])
def test_a_rehearsal_has_the_peak_of_the_real_thing(kind, extra, rows, monkeypatch):
    model = build(kind, **extra, num_hidden_layers=3)
    at = sampling(max_new_tokens=60, extra={"min_new_tokens": 60}, top_p=0.9)
    engine = RolloutEngine(model, at, rows, attention_path="torch")
    engine.generate([[3, 4]], 2, seed=0)

    def peak(run):
        with Ledger() as ledger:
            ledger.ignore(*model.parameters(), *model.buffers())
            run()
        return ledger.peak

    real = peak(lambda: engine.generate([[3] * 40, [4] * 40, [5] * 40], 4, seed=0))
    rehearse = lambda: engine.rehearse(40, 60, rows, 4, prompts=3)
    assert peak(rehearse) == pytest.approx(real, rel=0.05)
    model.to("meta")
    # On meta, PyTorch takes its attention apart into products with a matrix of scores, which no kernel makes.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    assert peak(rehearse) == pytest.approx(real, rel=0.05)


@pytest.mark.skipif(not interpreted(), reason="tests/gpu replays real graphs")
@pytest.mark.parametrize(
    "kind,extra,kv",
    [
        pytest.param("Qwen2", {}, "auto", id="Qwen2-auto"),
        pytest.param("Gemma2", {"sliding_window": 8}, "int8", id="Gemma2-int8"),
        pytest.param("Qwen2", {}, "int8", id="Qwen2-int8", marks=pytest.mark.full),
        pytest.param("Gemma2", {"sliding_window": 8}, "auto", id="Gemma2-auto", marks=pytest.mark.full),
    ],
)
def test_steps_of_fixed_sizes_as_graphs_need_them(kind, extra, kv, monkeypatch):
    """What a graph would replay, run step by step in Triton's interpreter: rows padded to a bucket, with rows among
    them that nobody waits for, sizes read from the tables, late looks."""
    model = build(kind, **extra)
    at = sampling(max_new_tokens=9, eos_ids=(1, 5, 9, 17, 40), temperature=0)
    plain = RolloutEngine(model, at, 7, kv_dtype=kv).generate(LONG, 3, seed=3)
    widths, lives = [], []

    def settings(workspace_mib, kv_dtype, *_):
        return DecodeSettings(workspace_mib, kv_dtype, True, "triton")

    def step(self):
        widths.append(self._graphs.width(len(self.schedule.seats)))
        lives.append(len(self.schedule.seats))
        inner(self)

    inner, run = engine_module.Decoder.step, engine_module.run
    monkeypatch.setattr(engine_module.Decoder, "step", step)
    monkeypatch.setattr(engine_module, "DecodeSettings", settings)
    monkeypatch.setattr(engine_module, "run", lambda decoder: run(decoder, look_every=3))
    monkeypatch.setattr(StepGraphs, "__call__", lambda self, rows: self.step(rows))
    found = RolloutEngine(model, at, 7, kv_dtype=kv).generate(LONG, 3, seed=3)
    assert found.completion_ids == plain.completion_ids
    for a, b in zip(found.sampling_per_token_logps, plain.sampling_per_token_logps):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 if kv == "int8" else 5e-5)
    assert any(width > live for width, live in zip(widths, lives)) and len(set(widths)) > 1


@pytest.mark.parametrize("rows,width", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (17, 20), (13, 16)])
def test_graphs_come_in_a_few_widths(rows, width):
    assert StepGraphs(lambda rows: None, 20, enabled=True).width(rows) == width
    assert StepGraphs(lambda rows: None, 20, enabled=False).width(rows) == rows


def dying_out(model, monkeypatch, lengths, most, look_every=8):
    """Widths of the steps of a rollout whose rows end at `lengths`, and how many were eager and how many captures."""
    widths, eager, captured = [], [], []

    def first(graphs, rows):
        eager.append(rows)
        graphs.step(rows)

    def capture(graphs, rows):
        captured.append(rows)
        graphs._graphs[rows] = SimpleNamespace(replay=lambda: graphs.step(rows))

    def look(decoder):
        return [row for row, seat in enumerate(decoder.schedule.seats)
                if decoder._ages[row] >= lengths[seat.completion]]  # fmt: skip

    work, run = engine_module.Decoder._work, engine_module.run
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "DecodeSettings", lambda *_: DecodeSettings(graphs=True))
        patch.setattr(DecodeLayout, "fixed", property(lambda _: True, lambda *_: None), raising=False)
        patch.setattr(engine_module.Decoder, "_work", lambda self, width: widths.append(width) or work(self, width))
        patch.setattr(engine_module.Decoder, "look", look)
        patch.setattr(engine_module, "run", lambda decoder: run(decoder, look_every))
        patch.setattr(StepGraphs, "_first", first)
        patch.setattr(StepGraphs, "_capture", capture)
        batch = RolloutEngine(model, sampling(max_new_tokens=most, eos_ids=())).generate([[5, 6]], len(lengths), seed=0)
    return batch, widths, eager, captured


def test_rows_that_die_out_keep_the_graph_they_have(model, monkeypatch):
    """32 rows: by the rule of before, ten widths, each a step launched one by one and a capture."""
    lengths = [8 * (g + 1) for g in range(32)]
    batch, widths, eager, captured = dying_out(model, monkeypatch, lengths, 8 * 32)
    before = {bucket(sum(length > t for length in lengths), 32) for t in range(0, 8 * 32, 8)}
    assert len(before) == 10 and eager == captured == [32, 16]
    # Half of the rows are gone after 128 steps, and as many may follow; of the next half 64 steps may.
    assert widths.count(32) == widths.count(16) == 128
    # Rows that nobody waits for disturb nobody: the same tokens as with steps of live rows alone.
    monkeypatch.setattr(StepGraphs, "width", lambda self, rows, left=0: rows)
    alone, _, _, _ = dying_out(model, monkeypatch, lengths, 8 * 32)
    for found, expected, length in zip(batch.completion_ids, alone.completion_ids, lengths):
        assert found[:length] == expected[:length]


def test_a_graph_is_left_only_for_one_that_pays():
    graphs = StepGraphs(lambda rows: None, 32, enabled=True)
    graphs._graphs = {32: None}
    assert graphs.width(17, 500) == graphs.width(16, 127) == graphs.width(1, 127) == 32
    assert graphs.width(16, 128) == 16 and graphs.width(5, 128) == 6
    graphs._graphs[8] = None  # another that is there costs nothing
    assert graphs.width(7, 0) == graphs.width(8, 0) == graphs.width(5, 500) == 8 and graphs.width(9, 0) == 32
    assert graphs.width(4, 127) == 8 and graphs.width(4, 128) == 4
    assert StepGraphs(lambda rows: None, 40, enabled=True).width(33, 0) == 40


class Uploads(TorchDispatchMode):
    """Meta tensors made from the host's numbers: on a GPU each would be a copy, and its host would wait."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if copies and found.is_meta and any(x.device.type == "cpu" for x in given):
            self.sizes.append(found.numel())
        return found


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_a_turn_is_one_upload_beside_the_positions_of_its_prefill(penalty):
    with torch.device("meta"):
        model = build("Llama")
    engine = RolloutEngine(model, sampling(repetition_penalty=penalty))
    assert engine._decodes(engine.sampling)
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12]]
    with torch.no_grad(), engine._decoding(prompts, 2, engine.sampling, 0, 4) as decoder:
        for ended in ((), (0, 1)):
            with Uploads() as uploads:
                decoder.turn(ended)
            assert len([size for size in uploads.sizes if size]) <= 2, uploads.sizes


def test_a_step_that_waits_is_run_again_and_never_captured(monkeypatch):
    """The bookkeeping without a GPU: the first run of a width raises, as PyTorch does in sync debug mode."""
    modes, runs = ["default"], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step(rows):
        runs.append((rows, modes[-1]))
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    graphs = StepGraphs(step, 20, enabled=True)
    with pytest.warns(UserWarning, match="waits for the GPU"):
        graphs(8)
    graphs(8)
    assert runs == [(8, "error"), (8, "default"), (8, "default")] and not graphs.enabled and graphs.width(5) == 5

    def broken(rows):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        StepGraphs(broken, 20, enabled=True)(8)
    assert modes[-1] == "default"


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(UserError, match="A prompt has no tokens"):
        RolloutEngine(model, sampling()).generate([[5], []], 2, seed=0)


def test_end_ids_that_the_model_does_not_have(model):
    at = sampling(eos_ids=(1, 5000), extra={"min_new_tokens": 3})
    assert min(map(len, RolloutEngine(model, at).generate(PROMPTS, 4, seed=0).completion_ids)) > 3


def test_running_out_of_memory_is_no_answer_to_whether_a_model_fits(model, monkeypatch):
    from lowvram_grpo.rollout import support

    def full(*args):
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        patch.setattr(support, "_decoded", full)
        RolloutEngine(model, sampling()).generate(PROMPTS, 2, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RolloutEngine(model, sampling()).generate(PROMPTS, 2, seed=0)
