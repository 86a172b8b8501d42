"""Models with recurrent or convolutional layers in the engine: what is sampled, and where states lie."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hybrids import FEW, HYBRIDS, build_hybrid, with_adapter
from test_decode import check_logps, sampling
from test_turns_kept import Script, check, expected_of, once, scored_gaps
from test_turns_kept import at as talking

from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout import engine as engine_module
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.graphs import StepGraphs
from lowvram_grpo.rollout.states import CATEGORY, StateCache
from lowvram_grpo.rollout.support import why_not

# Ragged, two of one length, one of a single token.
PROMPTS = [[3 + i % 30 for i in range(21)], [4, 5, 6], [7], [7, 8, 9, 10, 11, 12], [9, 8, 7, 6, 5, 4]]
ENDS = (1, 17, 40, 41, 42)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_greedy_equals_generate(kind):
    """With LoRA on, all rows at once and three that are refilled and moved together."""
    model = with_adapter(build_hybrid(kind))
    assert why_not(unwrap(model)) is None
    expected = []
    for prompt in PROMPTS:
        found = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=list(ENDS)
        )
        expected.append(found[0, len(prompt) :].tolist())
    at = sampling(temperature=0, max_new_tokens=12, eos_ids=ENDS)
    for rows in (None, 3):
        batch = RolloutEngine(model, at, rows).generate(PROMPTS, 2, seed=0)
        assert batch.completion_ids == [c for c in expected for _ in range(2)]
    check_logps(model, batch)


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_draws_do_not_depend_on_who_decodes_beside(kind, kv, monkeypatch):
    """States move with their rows and slots, and a row that is refilled begins with its prompt's. An int8 KV cache
    leaves states as they are."""
    model = build_hybrid(kind)
    at = sampling(max_new_tokens=12, eos_ids=tuple(range(1, 30)))
    engine = lambda rows=None: RolloutEngine(model, at, rows, kv_dtype=kv)
    whole = engine().generate(PROMPTS, 4, seed=3)
    assert len({len(c) for c in whole.completion_ids}) > 3
    moves, run = Counter(), engine_module.run
    for name in ("move_row", "move_slot"):
        inner = getattr(StateCache, name)
        count = lambda self, *a, name=name, inner=inner: moves.update([name]) or inner(self, *a)
        monkeypatch.setattr(StateCache, name, count)
    for every in (1, 3):
        monkeypatch.setattr(engine_module, "run", lambda decoder, every=every: run(decoder, every))
        for rows in (1, 3, 7, 19):
            parts = engine(rows).generate(PROMPTS, 4, seed=3)
            assert parts.completion_ids == whole.completion_ids
            for a, b in zip(parts.sampling_per_token_logps, whole.sampling_per_token_logps):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert moves["move_row"] > 5 and moves["move_slot"] > 0
    check_logps(model, whole, atol=1e-4 if kv == "auto" else 0.2)


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("look", [1, 5])
def test_turns_are_what_they_would_be_from_scratch(kind, look, monkeypatch):
    """Also where the host looks late, and rows have drawn on behind their turns' ends; no token goes through twice."""
    model, run = with_adapter(build_hybrid(kind)), engine_module.run
    monkeypatch.setattr(engine_module, "run", lambda decoder, **more: run(decoder, look, **more))
    settings = talking(temperature=1.3)
    expected = expected_of(model, PROMPTS, 2, 5, settings)
    for rows in (None, 3):
        script, engine = Script(), RolloutEngine(model, settings, rows)
        batch = engine.converse(PROMPTS, 2, seed=5, reply=script)
        check(batch, script.turns, expected, atol=3e-4)
        assert torch.cat(scored_gaps(model, batch, 1.3)).max() < 3e-4
        if look == 1:
            assert engine.computed == once(PROMPTS, batch)
    assert max(Counter(turn.row for turn in script.turns).values()) > 2


def test_replies_in_several_packs(monkeypatch):
    monkeypatch.setattr("lowvram_grpo.rollout.decode.PREFILL_TOKENS", 4)
    model, script = build_hybrid("Qwen3_5"), Script()
    expected = expected_of(model, PROMPTS, 2, 5, talking(temperature=1.3))
    batch = RolloutEngine(model, talking(temperature=1.3)).converse(PROMPTS, 2, seed=5, reply=script)
    check(batch, script.turns, expected)


@pytest.mark.parametrize("kind", FEW)
def test_prompts_of_a_single_token(kind):
    """Nothing is prefilled, so the first step makes the states."""
    model = build_hybrid(kind)
    batch = RolloutEngine(model, sampling(), 3).generate([[7], [9], [11]], 3, seed=0)
    check_logps(model, batch)


def test_bytes_of_states(monkeypatch):
    """A state for each prompt and each row, however long they are; nothing of it is left."""
    model = build_hybrid("Qwen3_5")
    step = engine_module.Decoder.step

    def held(prompt: int, length: int) -> int:
        sizes = set()
        look = lambda self: (step(self), sizes.add((self.cache.states.nbytes, ledger.categories[CATEGORY])))
        monkeypatch.setattr(engine_module.Decoder, "step", look)
        with Ledger() as ledger:
            RolloutEngine(model, sampling(max_new_tokens=length)).generate([[3] * prompt, [4] * prompt], 3, seed=0)
        assert CATEGORY not in ledger.categories
        [(said, counted)] = sizes
        assert said == counted
        return said

    conv, matrices = (2 * 2 * 8 + 4 * 8) * 4, 4 * 8 * 8
    assert held(20, 5) == held(4, 9) == 2 * (2 + 6) * (conv + matrices) * 4


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("converses", [False, True])
def test_a_rehearsal_on_meta_counts_what_a_rollout_holds(kind, converses, monkeypatch):
    model = build_hybrid(kind)
    every = tuple(range(97))
    engine = RolloutEngine(model, sampling(max_new_tokens=60, eos_ids=every if converses else ()), 6)
    engine.attention_path, engine.converses = "torch", converses
    prompts = [[3] * 30, [4] * 30]

    engine.generate([[3, 4]], 2, seed=0)  # asks whether the model fits
    step, caches = engine_module.Decoder.step, set()
    held = lambda: [ledger.categories[name] for name in (CATEGORY, "KV cache")]
    look = lambda self: (step(self), caches.add((*held(), self.continues)))
    monkeypatch.setattr(engine_module.Decoder, "step", look)

    def peak(run):
        nonlocal ledger
        with Ledger() as ledger:
            ledger.ignore(*model.parameters(), *model.buffers())
            run()
        return ledger.peak

    ledger = None

    def real():
        if converses:
            engine.converse(prompts, 3, seed=0, reply=lambda turns: [[5] * (59 - len(t.ids)) for t in turns])
        else:
            engine.generate(prompts, 3, seed=0)

    expected = peak(real)
    model.to("meta")
    found = peak(lambda: engine.rehearse(30, 60, 6, 3, prompts=2))
    assert len(caches) == 1  # at any step of both
    assert found == pytest.approx(expected, rel=0.05)


def test_a_step_that_fails_on_its_way_is_run_again_from_the_same_states(monkeypatch):
    """What waits for the device is found in the first step of a graph, after some layers have gone on."""
    model = build_hybrid("Qwen3_5")
    expected = RolloutEngine(model, sampling(temperature=0)).generate(PROMPTS, 2, seed=0)
    inner, failed = StepGraphs._warm_up, []

    def warm_up(self, rows):
        step = self.step

        def once(rows):
            step(rows)
            self.step = step
            self_decoder[0].tokens.copy_(fed[0])
            self_decoder[0]._table[2].sub_(1)
            failed.append(1)
            raise RuntimeError("called a synchronizing CUDA operation")

        fed[:] = [self_decoder[0].tokens.clone()]
        self.step = once
        inner(self, rows)

    self_decoder, fed, init = [], [], engine_module.Decoder.__init__

    def made(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self_decoder[:] = [self]
        self._graphs.enabled = True

    monkeypatch.setattr(StepGraphs, "_warm_up", warm_up)
    monkeypatch.setattr(engine_module.Decoder, "__init__", made)
    monkeypatch.setattr("lowvram_grpo.rollout.graphs.sync_debug", lambda mode: torch.no_grad())
    with pytest.warns(UserWarning, match="waits for the GPU"):
        found = RolloutEngine(model, sampling(temperature=0)).generate(PROMPTS, 2, seed=0)
    assert failed and found.completion_ids == expected.completion_ids
