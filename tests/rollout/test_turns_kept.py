"""Conversations: what the engine keeps between turns is what it would compute anew, and nothing is computed twice."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lowvram_grpo.kernels.decode.noise import draw
from lowvram_grpo.kernels.runtime import interpreted
from models import LISTED, build, with_lora
from test_decode import LONG, sampling, scored_and_sampled

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy.embeddings import place_embeddings
from lowvram_grpo.rollout import engine as engine_module
from lowvram_grpo.rollout.decode import DecodeSettings
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.graphs import StepGraphs
from lowvram_grpo.rollout.noise import stream_key
from lowvram_grpo.rollout.sampler import penalize_repetition
from lowvram_grpo.rollout.turns import Turn, converse_anew

LIMIT = 23
# Of 97 ids; so many that turns end after a few tokens.
ENDS = (1, *range(17, 40))


def at(**more):
    return sampling(**{"max_new_tokens": LIMIT, "eos_ids": ENDS, **more})


def answer(turn: Turn, limit: int = LIMIT) -> list[int] | None:
    """Something else for every turn: one token or several, none, an end, more than has room, nothing at all. End ids
    stand among them."""
    lot = (sum(turn.ids) + 3 * len(turn.ids)) % 8
    length = [None, 1, 0, 9, limit, 1, 2, 5][lot]
    return None if length is None else [(turn.ids[-1] + 11 * i + lot) % 97 for i in range(length)]


class Script:
    """Replies by `answer`, and what was asked."""

    def __init__(self):
        self.turns: list[Turn] = []

    def __call__(self, turns: list[Turn]) -> list[list[int] | None]:
        assert turns == sorted(turns, key=lambda turn: turn.row)
        self.turns += turns
        return [answer(turn) for turn in turns]


def from_scratch(model, prompts, group, seed, settings, script):
    """Every token by a pass over all that stands before it: (ids, mask, log-probs, truncated) of each completion."""
    for row in range(len(prompts) * group):
        prompt, ids, mask, logps, turn = prompts[row // group], [], [], [], 0
        while True:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[:, -1].float()
            if settings.temperature:
                logits = logits / settings.temperature
            seen = torch.zeros(1, logits.shape[1], dtype=torch.bool)
            seen[0, prompt + ids] = True
            allowed = penalize_repetition(logits, seen, settings.repetition_penalty)
            key = torch.tensor([stream_key(seed, row // group, row % group)])
            token = draw(allowed, key, torch.tensor([len(ids)])) if settings.temperature else allowed.argmax(1)
            logps.append(float(logits.log_softmax(1)[0, token]))
            ids, mask = [*ids, int(token)], [*mask, 1]
            ended = ids[-1] in settings.eos_ids
            if not ended and len(ids) < settings.max_new_tokens:
                continue
            [more] = script([Turn(row, ids, ids[turn:], ended)])
            if more is None or len(ids) + len(more) >= settings.max_new_tokens:
                yield ids, mask, logps, more is not None or not ended
                break
            ids, mask, logps = ids + more, mask + [0] * len(more), logps + [0.0] * len(more)
            turn = len(ids)


def expected_of(model, prompts, group, seed, settings):
    script = Script()
    return [list(x) for x in zip(*from_scratch(model, prompts, group, seed, settings, script))], script.turns


def check(batch, turns, expected, atol=1e-4):
    (ids, mask, logps, truncated), asked = expected
    assert batch.completion_ids == ids and batch.tool_mask == mask and batch.truncated == truncated
    assert sorted(turns, key=lambda t: (t.row, len(t.ids))) == asked
    for found, right in zip(batch.sampling_per_token_logps, logps):
        torch.testing.assert_close(found, torch.tensor(right), rtol=0, atol=atol)


def once(prompts, batch):
    """How many tokens go through a model that computes none twice: all but a prompt's last, and of each row this one
    and all it has said but for the last."""
    return sum(len(p) - 1 for p in prompts) + sum(map(len, batch.completion_ids))


def scored_gaps(model, batch, temperature=1.0):
    """|sampled - scored| log-probs of each completion's sampled tokens, scored by one pass over it."""
    scored = scored_and_sampled(model, batch, temperature)
    return [(a - b)[torch.tensor(mask) == 1].abs() for (a, b), mask in zip(scored, batch.tool_mask)]


@pytest.mark.parametrize("kind,extra", LISTED, ids=lambda x: x if isinstance(x, str) else "")
def test_turns_are_what_they_would_be_from_scratch(kind, extra):
    """With LoRA on, beyond sliding windows, a prompt of one token among others; all rows at once, and three."""
    model = with_lora(build(kind, **extra))
    for temperature in (0.0, 1.3):
        settings = at(temperature=temperature)
        expected = expected_of(model, LONG, 2, 5, settings)
        for rows in (None, 3):
            script, engine = Script(), RolloutEngine(model, settings, rows)
            batch = engine.converse(LONG, 2, seed=5, reply=script)
            check(batch, script.turns, expected)
            assert engine.computed == once(LONG, batch)
            assert torch.cat(scored_gaps(model, batch, temperature or 1.0)).max() < 1e-4
    assert batch.prompt_ids == [p for p in LONG for _ in range(2)]


def test_the_script_has_all_kinds_of_turns():
    """So that the tests here see them."""
    seen = Counter()
    for kind, extra in LISTED[:5]:
        _, turns = expected_of(with_lora(build(kind, **extra)), LONG, 2, 5, at(temperature=1.3))
        seen.update("long" if not t.ended else len(t.sampled) == 1 and "at once" for t in turns)
        seen.update(len(x) if x is not None and len(x) < LIMIT else str(x and "too long") for x in map(answer, turns))
        seen.update(["three turns"] * sum(n > 2 for n in Counter(t.row for t in turns).values()))
    assert min(seen[x] for x in ("long", "at once", 0, 1, 2, 5, 9, "None", "too long", "three turns")) > 1, seen


@pytest.mark.parametrize("group,prompts,rows", [(1, LONG, 2), (5, LONG[:1], None), (5, LONG[2:3], 2), (3, LONG * 2, 4)])
@pytest.mark.parametrize("look", [1, 5])
def test_groups_refills_and_late_looks(group, prompts, rows, look, monkeypatch):
    """What is drawn behind an end until the host looks is dropped, penalties for it too."""
    model = build("Qwen2")
    settings = at(temperature=0.9, repetition_penalty=1.3)
    run = engine_module.run
    monkeypatch.setattr(engine_module, "run", lambda decoder, **more: run(decoder, look, **more))
    script, engine = Script(), RolloutEngine(model, settings, rows)
    batch = engine.converse(prompts, group, seed=2, reply=script)
    check(batch, script.turns, expected_of(model, prompts, group, 2, settings))
    assert engine.computed == once(prompts, batch) if look == 1 else engine.computed > once(prompts, batch)


@pytest.mark.parametrize("kind,extra", [("Llama", {}), ("Gemma2", {"sliding_window": 8})], ids=["Llama", "Gemma2"])
def test_an_int8_cache_converses_nearly_the_same(kind, extra):
    model = build(kind, **extra, initializer_range=0.2)
    for layer in model.model.layers if kind == "Llama" else ():
        layer.self_attn.k_proj.weight.data[::8] *= 30.0  # channels that the spread of the prompt must tame
    ids, limit = list(range(3, 40)), 60
    reply = lambda turns: [ids[: 1 + t.row] * (1 + len(t.ids) % 3) for t in turns]
    settings = at(max_new_tokens=limit)
    found = RolloutEngine(model, settings, kv_dtype="int8").converse(LONG[:2], 4, seed=0, reply=reply)
    assert sum(not x for mask in found.tool_mask for x in mask) > 60
    gaps = torch.cat(scored_gaps(model, found))
    assert 1e-4 < gaps.mean() < 0.05, gaps.mean()


@pytest.mark.parametrize("kind,extra", [("Llama", {}), ("Mistral", {"sliding_window": 8})], ids=["full", "sliding"])
def test_a_long_reply_goes_through_in_parts(kind, extra, monkeypatch):
    model = build(kind, **extra)
    reply = lambda turns: [[7, 8, 9, 10, 11] * 2 if len(t.ids) < 20 else None for t in turns]
    settings = at(max_new_tokens=50)
    whole = RolloutEngine(model, settings).converse(LONG, 2, seed=1, reply=reply)
    sizes, layout = [], engine_module.Decoder.insert.__globals__["AppendLayout"]
    monkeypatch.setitem(
        engine_module.Decoder.insert.__globals__, "AppendLayout",
        lambda cache, pieces: sizes.append([p.count for p in pieces]) or layout(cache, pieces),
    )  # fmt: skip
    monkeypatch.setattr("lowvram_grpo.rollout.decode.PREFILL_TOKENS", 7)
    parts = RolloutEngine(model, settings).converse(LONG, 2, seed=1, reply=reply)
    assert parts.completion_ids == whole.completion_ids and max(map(sum, sizes)) == 7 and [7] in sizes
    assert any(len(pack) > 1 for pack in sizes)
    assert torch.cat(scored_gaps(model, parts)).max() < 1e-4


def test_what_an_end_id_means_depends_on_who_said_it():
    """An inserted end id ends nothing, and an inserted token is none of the policy's."""
    model = build("Llama")
    reply = lambda turns: [[1, 1, 5] if len(t.ids) < 10 else None for t in turns]
    batch = RolloutEngine(model, at()).converse(LONG, 3, seed=1, reply=reply)
    replies = 0
    for ids, mask, logps in zip(batch.completion_ids, batch.tool_mask, batch.sampling_per_token_logps):
        inserted = [i for i, said in enumerate(mask) if not said]
        assert [ids[i] for i in inserted] == [1, 1, 5] * (len(inserted) // 3) and not logps[inserted].any()
        replies += len(inserted) // 3
        turns = "".join(map(str, mask)).split("000")
        assert all(turns) and len(ids) == len(mask) == len(logps)
        ended = [i for i, said in enumerate(mask) if said and ids[i] in ENDS]
        assert len(ended) >= len(turns) - 1
    assert replies > 8 and torch.cat(scored_gaps(model, batch)).max() < 1e-4


def test_without_replies_it_is_generate():
    model = build("Llama")
    engine = RolloutEngine(model, at(), 5)
    plain = engine.generate(LONG, 3, seed=4)
    batch = engine.converse(LONG, 3, seed=4, reply=lambda turns: [None] * len(turns))
    assert batch.completion_ids == plain.completion_ids and batch.truncated == plain.truncated
    assert batch.prompt_ids == plain.prompt_ids and batch.tool_mask == [[1] * len(c) for c in plain.completion_ids]
    for a, b in zip(batch.sampling_per_token_logps, plain.sampling_per_token_logps):
        assert torch.equal(a, b)
    assert engine.converse([], 3, seed=4, reply=lambda turns: []).tool_mask == []


def test_an_embedding_in_host_memory_and_a_quantized_head():
    model = build("Qwen2", tie_word_embeddings=False).requires_grad_(False)
    place_embeddings(model, head_dtype="int8", embedding_offload=True, device=torch.device("cpu"))
    batch = RolloutEngine(model, at()).converse(LONG, 2, seed=3, reply=Script())
    assert not all(map(all, batch.tool_mask)) and torch.cat(scored_gaps(model, batch)).max() < 1e-4


def test_a_reply_is_made_in_the_callers_mode_and_its_error_leaves_the_model_as_it_was():
    model = build("Llama").train()
    modes = []

    def reply(turns):
        modes.append(torch.is_grad_enabled())
        raise KeyError("a tool")

    for grad in (True, False):
        with pytest.raises(KeyError, match="a tool"), torch.set_grad_enabled(grad):
            RolloutEngine(model, at()).converse(LONG, 2, seed=0, reply=reply)
    assert modes == [True, False] and model.training and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "reply,said",
    [(lambda turns: [], "0 replies came back"), (lambda turns: [[5, 97]] * len(turns), "has the token 97")],
)
def test_replies_that_cannot_be_are_refused(reply, said):
    with pytest.raises(UserError, match=said):
        RolloutEngine(build("Llama"), at()).converse(LONG, 2, seed=0, reply=reply)


def test_what_transformers_samples_is_computed_anew():
    model = build("Llama")
    settings = at(temperature=0, extra={"no_repeat_ngram_size": 30})
    script = Script()
    with pytest.warns(UserWarning, match="no_repeat_ngram_size"):
        batch = RolloutEngine(model, settings).converse(LONG, 2, seed=0, reply=script)
    check(batch, script.turns, expected_of(model, LONG, 2, 0, at(temperature=0)))


def test_engines_that_keep_nothing_say_the_same_and_compute_more():
    model, settings = build("Qwen2"), at(temperature=0)
    anew, kept, script = RolloutEngine(model, settings), RolloutEngine(model, settings), Script()
    batch = converse_anew(anew, LONG, 2, seed=0, reply=script)
    check(batch, script.turns, expected_of(model, LONG, 2, 0, settings))
    assert kept.converse(LONG, 2, seed=0, reply=Script()).completion_ids == batch.completion_ids
    assert 1.5 * kept.computed < anew.computed


@pytest.mark.skipif(not interpreted(), reason="tests/gpu replays real graphs")
@pytest.mark.parametrize(
    "kind,extra,kv",
    [
        pytest.param("Qwen2", {}, "auto", id="Qwen2-auto"),
        pytest.param("Gemma2", {"sliding_window": 8}, "int8", id="Gemma2-int8", marks=pytest.mark.full),
    ],
)
def test_turns_between_steps_of_fixed_sizes(kind, extra, kv, monkeypatch):
    """What graphs would replay, in Triton's interpreter: kernels that read ages from the tables, late looks."""
    model, settings = build(kind, **extra), at(temperature=3.0, max_new_tokens=13, eos_ids=tuple(range(1, 97, 3)))
    script = lambda turns: [[5, 6, 7, 1][: 2 + turn.row] if len(turn.ids) < 8 else None for turn in turns]
    plain = RolloutEngine(model, settings, 3, kv_dtype=kv).converse(LONG[1:], 1, seed=3, reply=script)
    run = engine_module.run
    fixed = lambda workspace_mib, kv_dtype, *_: DecodeSettings(workspace_mib, kv_dtype, True, "triton")
    monkeypatch.setattr(engine_module, "DecodeSettings", fixed)
    monkeypatch.setattr(engine_module, "run", lambda decoder, **more: run(decoder, 3, **more))
    monkeypatch.setattr(StepGraphs, "__call__", lambda self, rows: self.step(rows))
    found = RolloutEngine(model, settings, 3, kv_dtype=kv).converse(LONG[1:], 1, seed=3, reply=script)
    assert found.completion_ids == plain.completion_ids and found.tool_mask == plain.tool_mask
    assert sum(not all(mask) for mask in found.tool_mask) > 1
    for a, b in zip(found.sampling_per_token_logps, plain.sampling_per_token_logps):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 if kv == "int8" else 5e-5)


@pytest.mark.parametrize("kind,extra", [("Llama", {}), ("Mistral", {"sliding_window": 30})], ids=["full", "sliding"])
def test_a_rehearsal_has_the_peak_of_conversations(kind, extra):
    """Short prompts and long replies: what the prompts' prefill takes is the least of it."""
    model = build(kind, **extra, num_hidden_layers=3, max_position_embeddings=512)
    every = tuple(range(97))  # an end, so that all rows wait for a reply at once
    engine = RolloutEngine(model, at(max_new_tokens=120, eos_ids=every), 6, attention_path="torch")
    peaks = {}

    def peak(name, run):
        with Ledger() as ledger, ledger.phase(name) as peaks[name]:
            ledger.ignore(*model.parameters(), *model.buffers())
            run()
        return peaks[name].bytes

    reply = lambda turns: [[5] * (119 - len(t.ids)) for t in turns]
    real = peak("real", lambda: engine.converse([[3] * 11, [4] * 11], 3, seed=0, reply=reply))
    rehearse = lambda: engine.rehearse(11, 120, 6, 3, prompts=2)
    alone = peak("alone", rehearse)
    engine.converses = True
    with_replies = peak("turns", rehearse)
    assert peaks["turns"].categories["KV cache"] == peaks["alone"].categories["KV cache"]
    assert 1.5 * alone < real and with_replies == pytest.approx(real, rel=0.05)
    model.to("meta")
    assert peak("meta", rehearse) == pytest.approx(real, rel=0.05)
