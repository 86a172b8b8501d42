"""Decode attention: kernels and PyTorch path against float64, on shapes that are multiples of nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_problems import DEVICE, RAGGED, Problem, assert_no_worse
from lowvram_grpo.kernels.decode import attention_triton as kernels
from lowvram_grpo.kernels.decode.attention import decode_attention
from lowvram_grpo.kernels.decode.kv import KV, spread_of
from lowvram_grpo.kernels.decode.launch import Tiles, decode_path, ranges, tiles_of
from lowvram_grpo.kernels.runtime import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What nobody wrote is NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() and not x.is_meta else x

    monkeypatch.setattr(torch, "empty", poisoned)


MASKS = [
    {}, {}, {"window": 4}, {"window": 25}, {"window": 1}, {"window": 1000}, {"softcap": 1.5},
    {"window": 25, "softcap": 3.0},
]  # fmt: skip


@needs_triton
@pytest.mark.parametrize("int8,masks", [(i % 2 == 0, masks) for i, masks in enumerate(MASKS)], ids=str)
def test_ragged_rows_against_float64(masks, int8):
    assert_no_worse(Problem(**RAGGED, int8=int8, dead=2).errors(**masks))


@needs_triton
@pytest.mark.parametrize(
    "rep,d,dtype,int8",
    [
        (1, 16, torch.float16, True), (1, 64, torch.bfloat16, False), (7, 96, torch.float16, False),
        (7, 96, torch.bfloat16, True), (16, 40, torch.float32, True), (16, 40, torch.float16, True),
        (16, 40, torch.bfloat16, False), (5, 256, torch.float32, False), (5, 256, torch.bfloat16, True),
        (4, 512, torch.float16, True), (3, 384, torch.bfloat16, False),
    ],
    ids=str,
)  # fmt: skip
def test_heads_and_dtypes_against_float64(rep, d, dtype, int8):
    few = {"counts": [2, 1], "prefixes": [21, 1], "ages": [19, 0, 40]}
    problem = Problem(**few, rep=rep, kv_heads=1 + (rep < 7), d=d, dtype=dtype, int8=int8)
    assert_no_worse(problem.errors(window=30), dtype)


@needs_triton
@pytest.mark.parametrize(
    "masks,dtype", [({}, torch.float16), ({"window": 320}, torch.float32), ({"window": 140}, torch.float32)], ids=str
)
def test_ranges_are_merged(masks, dtype):
    """Prefixes and own tokens in several ranges, of which some are empty; more queries of a prompt than a tile has."""
    long = {"counts": [1, 5], "prefixes": [131, 600], "ages": [300, 3, 127, 128, 256]}
    problem = Problem(**long, rep=11, kv_heads=1, d=16, dtype=dtype, int8=True, dead=1)
    made = []
    original = kernels.Splits
    kernels.Splits = lambda *n: made.append(n) or original(*n)
    try:
        assert_no_worse(problem.errors(**masks), dtype)
    finally:
        kernels.Splits = original
    assert min(made[0]) >= 3 or DEVICE != "cpu"


SINKS = torch.tensor([3.0, -2.0, 0.5, 8.0, -30.0, 1.0])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masks", [{}, {"window": 4}, {"softcap": 1.5, "window": 25}], ids=str)
def test_sinks_against_float64(masks, dtype):
    """The cap is for scores, not for sinks; a row without a prompt has them too."""
    sinks = SINKS.to(DEVICE, dtype)
    problem = Problem(**RAGGED, int8=dtype != torch.float32, dtype=dtype, dead=2)
    assert_no_worse(problem.errors(sinks=sinks, **masks), dtype)
    plain, _ = problem.run("triton", **masks)
    found, _ = problem.run("triton", sinks=sinks, **masks)
    assert (found - plain)[problem.live].abs().max() > 0.1


@needs_triton
def test_a_sink_is_taken_once_however_many_ranges_there_are(monkeypatch):
    monkeypatch.setattr(Tiles, "least", 1)
    monkeypatch.setattr(kernels, "tiles_of", lambda *a: Tiles(16, 16, 4, 1))
    assert_no_worse(Problem([2], [157], [150, 70], kv_heads=1).errors(sinks=SINKS[:3].to(DEVICE)))


@needs_triton
def test_ten_ranges_are_merged(monkeypatch):
    monkeypatch.setattr(Tiles, "least", 1)
    monkeypatch.setattr(kernels, "tiles_of", lambda *a: Tiles(16, 16, 4, 1))
    assert_no_worse(Problem([2], [157], [150, 70], kv_heads=1).errors())
    assert_no_worse(Problem([2], [157], [150, 70], kv_heads=1, int8=True).errors(window=80))


@needs_triton
def test_a_cache_in_another_dtype_than_the_queries():
    problem = Problem(**RAGGED, dtype=torch.float16)
    for name in ("query", "key", "value"):
        setattr(problem, name, getattr(problem, name).float())
    assert_no_worse(problem.errors(window=30))


@needs_triton
@pytest.mark.parametrize("longest", [None, 0])
def test_without_a_prefix(longest):
    problem = Problem([3, 2], [0, 0], [0, 9, 3])
    if longest == 0:
        problem.prompts = KV(*(None if x is None else x[:, :, :0] for x in problem.prompts))
    assert_no_worse(problem.errors())


@needs_triton
def test_views_of_larger_buffers():
    problem = Problem(**RAGGED, int8=True, longest=60, longest_own=50)
    expected, _ = problem.run("triton", window=30)
    problem.prompts = KV(*(x[:, :, :40] for x in problem.prompts))
    wide = torch.cat([problem.query, problem.query], 2)
    problem.query = wide[:, :, : problem.query.shape[2]]
    packed = torch.cat([problem.key, problem.value], 1)
    problem.key, problem.value = packed.split(problem.key.shape[1], 1)
    assert torch.equal(problem.run("triton", window=30)[0], expected)
    problem.own = KV(
        problem.own.keys, problem.own.values.transpose(1, 2).contiguous().transpose(1, 2), *problem.own[2:]
    )
    problem.own = KV(*problem.own)
    run = lambda rows: kernels.decode_attention_triton(
        problem.query, problem.key, problem.value, problem.prompts, problem.own, rows, scale=1.0
    )
    with pytest.raises(ValueError, match="equal strides"):
        run(problem.rows)
    columns = torch.stack([problem.rows.prefix, problem.rows.prefix], 1)
    with pytest.raises(ValueError, match="must be contiguous"):
        run(replace(problem.rows, prefix=columns[:, 0]))


@needs_triton
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_a_row_is_the_same_wherever_it_stands(path):
    """Compaction moves rows and slots; nobody's output changes."""
    problem = Problem(**RAGGED, int8=True)
    before, _ = problem.run(path, window=30)
    g = torch.Generator().manual_seed(9)
    r, slots = len(problem.query), len(problem.rows.prefix)
    row, slot = torch.randperm(r, generator=g), torch.randperm(slots, generator=g)  # new place -> old place
    new_row = torch.empty(r).long().scatter_(0, row, torch.arange(r))
    new_slot = torch.empty(slots).long().scatter_(0, slot, torch.arange(slots))
    old = problem.rows
    problem.rows = replace(
        old, slot=new_slot[old.slot][row], age=old.age[row], prefix=old.prefix[slot], rank=old.rank[row], _masks={},
        members=torch.where(old.members[slot] < 0, -1, new_row[old.members[slot].clamp(min=0)]),
    )  # fmt: skip
    for name in ("query", "key", "value"):
        setattr(problem, name, getattr(problem, name)[row])
    problem.own = KV(*(x[:r][row] for x in problem.own))
    problem.prompts = KV(*(x[:slots][slot] for x in problem.prompts))
    assert torch.equal(problem.run(path, window=30)[0], before[row])


@needs_triton
def test_a_second_step_reads_what_the_first_wrote():
    problem = Problem([2, 1], [5, 9], [3, 0], rep=2, int8=True, longest_own=12)
    for _ in range(3):
        expected, own = problem.run("torch")
        found, appended = problem.run("triton")
        assert all(torch.equal(a, b) for a, b in zip(own, appended))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
        problem.own = appended
        problem.rows = replace(
            problem.rows, age=problem.rows.age + 1, longest_own=problem.rows.longest_own + 1, _masks={}
        )
        problem.key, problem.value = problem.value, problem.query[:, 1:3]


@needs_triton
def test_codes_are_rounded_half_to_even():
    problem = Problem([1], [0], [0], rep=1, kv_heads=1, d=16, int8=True)
    problem.key = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, *[3.0] * 8]).view(1, 1, 16)
    problem.value = torch.zeros(1, 1, 16)
    _, own = problem.run("triton")
    assert own.keys[0, 0, 0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, *[3] * 8]
    assert own.key_scales[0, 0, 0] == 1 and own.value_scales[0, 0, 0] == 0 and not own.values[0, 0, 0].any()


@pytest.mark.parametrize("int8", [False, True])
def test_the_fast_paths_of_pytorch_are_the_general_one(int8):
    """Even and regular rows, as before the first of a wave ends."""
    problem = Problem([3, 3], [7, 7], [4], int8=int8)
    rows = problem.rows
    r = torch.arange(6)
    general = replace(
        rows, slot=r // 3, rank=r % 3, members=torch.cat([r.view(2, 3), torch.full((2, 1), -1)], 1), _masks={}
    )
    regular = replace(general, members=r.view(2, 3), even=True, regular=True, _masks={})
    for window in (None, 6):
        expected, own = problem.run("torch", general, window=window)
        found, appended = problem.run("torch", regular, window=window)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert all(a is None or torch.equal(a, b) for a, b in zip(own, appended))


@needs_triton
def test_on_meta_tensors_the_same_bytes_are_allocated(monkeypatch):
    problem = Problem(**RAGGED)
    made = {"cpu": [], "meta": []}
    empty = torch.empty

    def counted(*shape, device, **kwargs):
        made[torch.device(device).type].append((shape, kwargs["dtype"]))
        return empty(*shape, device=device, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kernels.torch, "empty", counted)
        meta = lambda x: None if x is None else x.to("meta")
        problem.run("triton", window=30)
        args = [meta(x) for x in (problem.query, problem.key, problem.value)]
        rows = replace(
            problem.rows, **{n: meta(getattr(problem.rows, n)) for n in ("age", "prefix", "members", "rank")}
        )
        out = decode_attention(
            *args, KV(*map(meta, problem.prompts)), KV(*map(meta, problem.own)), rows, scale=1.0, window=30
        )
    assert made["cpu"] == made["meta"] and len(made["cpu"]) == 3
    assert out.is_meta and out.shape == problem.query.shape


def test_the_path_follows_device_and_heads(monkeypatch):
    cpu, cuda, meta = (torch.device(x) for x in ("cpu", "cuda", "meta"))
    assert decode_path(cpu, 14, 2, 64, 64) == "torch"
    assert decode_path(cuda, 14, 2, 64, 64) == decode_path(meta, 14, 2, 64, 64) == ("triton" if HAS_TRITON else "torch")
    assert decode_path(cuda, 14, 2, 64, 64, "torch") == "torch"
    assert decode_path(cuda, 16, 16, 192, 128) == decode_path(cuda, 71, 1, 64, 64) == "torch"
    wide = [decode_path(cuda, 8, 1, width, width, dtype=x) for width, x in ((512, torch.float16), (512, torch.float32))]
    assert wide == ["triton" if HAS_TRITON else "torch", "torch"] and decode_path(cuda, 8, 1, 640, 640) == "torch"
    for wrong, what in (((14, 2, 64, 64, "cuda"), "unknown path"), ((16, 16, 192, 128, "triton"), "one width")):
        with pytest.raises(ValueError, match=what):
            decode_path(cuda, *wrong)


def test_enough_programs_for_the_card_and_enough_keys_for_a_program():
    tiles = tiles_of(86, torch.bfloat16, 64, 56)
    assert ranges(2, 4096, tiles, 24) == 16  # a prompt of two KV heads: 4,096 keys in ranges of 256
    assert ranges(2, 64, tiles, 24) == 1 and ranges(2, 0, tiles, 24) == 0
    assert ranges(512, 4096, tiles, 24) == 1  # rows enough to fill the card as they are
    assert tiles_of(75, torch.float16, 128, 56).queries == 16


@needs_triton
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_a_spread_moves_from_the_keys_to_the_queries(path):
    problem = Problem(**RAGGED, dead=1)
    expected, cache = problem.run(path)
    z = torch.rand(len(problem.rows.prefix), *problem.prompts.keys.shape[1::2]) * 8 + 0.1
    per_slot = torch.cat([z, z[:1]])[:, :, None]
    per_row = torch.cat([z[problem.rows.slot], z[:1]])[:, :, None]
    problem.prompts = problem.prompts._replace(keys=problem.prompts.keys / per_slot)
    problem.own = problem.own._replace(keys=problem.own.keys / per_row)
    found, appended = problem.run(path, spread=z.to(DEVICE))
    torch.testing.assert_close(found[problem.live], expected[problem.live], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(appended.keys * per_row, cache.keys, rtol=1e-5, atol=1e-6)


def test_the_spread_of_a_prompt():
    keys = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    keys[:, :, 3] *= 100
    keys[:, :, 5] = 0
    z = spread_of(keys)
    torch.testing.assert_close(z[:, :3], keys.abs().amax(1)[:, :3] ** 0.75)
    torch.testing.assert_close(z[:, 5], (1e-3 * keys.abs().amax((1, 2))) ** 0.75)
    assert torch.isfinite(spread_of(torch.zeros(2, 1, 16)).log()).all()
