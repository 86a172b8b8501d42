"""Decode steps as CUDA graphs would replay them: widths, captures, uploads, and what a rehearsal says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lowvram_grpo.kernels.runtime import interpreted
from models import build
from test_decode import LONG, sampling
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.rollout import engine as engine_module
from lowvram_grpo.rollout.attention import DecodeLayout
from lowvram_grpo.rollout.decode import DecodeSettings
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.graphs import StepGraphs, bucket


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind,extra", [("Llama", {}), ("Mistral", {"sliding_window": 8})], ids=["full", "sliding"])
def test_a_rehearsal_ends_with_a_full_cache(kind, extra, device, monkeypatch):
    model = build(kind, **extra).to(device)
    caches, prefilled, step = [], [], engine_module.Decoder._forward

    def work(self, width):
        step(self, width)
        caches.append(
            (width, self._ages[0], {k: tuple(x.keys.shape for x in v[:2]) for k, v in self.cache._layers.items()})
        )

    monkeypatch.setattr(engine_module.Decoder, "_forward", work)
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
        pytest.param("Gemma2", {"sliding_window": 8}, "int8", id="Gemma2-int8", marks=pytest.mark.full),
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
        widths.append(self._graphs.width(len(self.scheduler.running)))
        lives.append(len(self.scheduler.running))
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

    def finished_rows(decoder):
        return [row for row, request in enumerate(decoder.scheduler.running)
                if decoder._ages[row] >= lengths[request.completion]]  # fmt: skip

    work, run = engine_module.Decoder._forward, engine_module.run
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "DecodeSettings", lambda *_: DecodeSettings(graphs=True))
        patch.setattr(DecodeLayout, "fixed", property(lambda _: True, lambda *_: None), raising=False)
        patch.setattr(engine_module.Decoder, "_forward", lambda self, width: widths.append(width) or work(self, width))
        patch.setattr(engine_module.Decoder, "finished_rows", finished_rows)
        patch.setattr(engine_module, "run", lambda decoder: run(decoder, look_every))
        patch.setattr(StepGraphs, "_warm_up", first)
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
def test_an_admission_is_one_upload_beside_the_positions_of_its_prefill(penalty):
    with torch.device("meta"):
        model = build("Llama")
    engine = RolloutEngine(model, sampling(repetition_penalty=penalty))
    assert engine._can_decode(engine.sampling)
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12]]
    with torch.no_grad(), engine._decoding(prompts, 2, engine.sampling, 0, 4) as decoder:
        for finished in ((), (0, 1)):
            with Uploads() as uploads:
                decoder.admit(finished)
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
