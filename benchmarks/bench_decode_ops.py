"""What a decode step's small operations cost, fused and eager, inside a CUDA graph, where rollouts run them.

    python benchmarks/bench_decode_ops.py --out benchmarks/results/decode_ops.jsonl [--minutes 3] [--dry-run]

Operations, in the shapes of Qwen2.5 and for R rows of one token:

    rms_norm   a layer's norm, (R, 1, H)
    head_norm  the norm of the query heads that Qwen3 has, (R, 1, heads, D)
    swiglu     act(gate) * up, (R, 1, I)
    rope       q and k of a layer
    sample     a token a row from (R, V) logits, and its log-prob: temperature 1, ids without a token ruled out
    int8_head  (R, V) logits of (R, H) hidden states by a head in 8 bits
    delta_step a token a row of a gated delta rule, its state updated, in the shapes of a Qwen3.5 of that size
    conv_step  a token a row of the short convolution before it

Providers: `fused`, `eager` (transformers' code; of `int8_head` the product by tiles, through a workspace of 64 MiB),
and for norms `torch`, which is torch.nn.functional.rms_norm. A graph
holds CALLS calls one after another; `us` is the time of one of them, launch and all. Each provider is first held
against eager code in float32; one that is further from it than twice eager in the same dtype gets no time. The last
lines say which kinds were faster for every shape measured: what `policy.trials.EXPECTED_FASTER` may list. Without a
GPU this is a dry run of tiny shapes in the interpreter: a check of the program, never a measurement.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are decorated

from lowvram_grpo.kernels.decode.int8_logits import int8_logits
from lowvram_grpo.kernels.decode.logits import linear_logits
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.layer import ops as layer_ops
from lowvram_grpo.kernels.quantized import BLOCK, Int8Weight
from lowvram_grpo.kernels.recurrent import delta_step, short_conv
from lowvram_grpo.kernels.runtime import HAS_TRITON
from timing import timed
from torch import Tensor
from torch.nn import functional as F

from lowvram_grpo.bench.rows import Rows, reason
from lowvram_grpo.rollout import sampler
from lowvram_grpo.rollout.noise import stream_key

CALLS = 50
OPS = ("rms_norm", "head_norm", "swiglu", "rope", "sample", "int8_head", "delta_step", "conv_step")
PROVIDERS = {"rms_norm": ("eager", "torch", "fused"), "head_norm": ("eager", "torch", "fused")}
KINDS = {
    "rms_norm": ("rms_norm", "head_norm"), "swiglu": ("swiglu",), "rope": ("rope",), "sample": ("sample",),
    "int8_head": ("int8_head",), "delta_step": ("delta_step",), "short_conv": ("conv_step",),
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-6


class Shape(NamedTuple):
    """Widths of a model; `known` of its `vocab` ids have a token."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    known: int
    rule: tuple[int, int, int]  # key heads, value heads and their width, of a gated delta rule


SHAPES = {
    "qwen2.5-0.5b": Shape(896, 4864, 14, 2, 64, 151_936, 151_665, (16, 16, 128)),
    "qwen2.5-1.5b": Shape(1536, 8960, 12, 2, 128, 151_936, 151_665, (16, 16, 128)),
    "qwen2.5-7b": Shape(3584, 18_944, 28, 4, 128, 152_064, 151_665, (16, 32, 128)),
    "dry": Shape(48, 72, 4, 2, 12, 300, 290, (1, 2, 12)),
}


def inputs_of(op: str, at: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    g = torch.Generator(device).manual_seed(0)
    draw = lambda *shape, kind=dtype: torch.randn(*shape, generator=g, device=device).to(kind)
    if op == "rms_norm":
        return draw(rows, 1, at.hidden), draw(at.hidden)
    if op == "head_norm":
        return draw(rows, 1, at.heads, at.head_dim), draw(at.head_dim)
    if op == "swiglu":
        return draw(rows, 1, at.intermediate), draw(rows, 1, at.intermediate)
    if op == "rope":
        q, k = (draw(rows, 1, n, at.head_dim).transpose(1, 2) for n in (at.heads, at.kv_heads))
        return q, k, draw(rows, 1, at.head_dim), draw(rows, 1, at.head_dim)
    if op == "int8_head":
        codes = torch.randint(-127, 128, (at.vocab, at.hidden), generator=g, device=device, dtype=torch.int8)
        scales = torch.rand(at.vocab, -(-at.hidden // BLOCK), generator=g, device=device).add_(0.5).div_(2000).half()
        return draw(rows, at.hidden), codes, scales
    if op in ("delta_step", "conv_step"):
        keys, values, width = at.rule
        if op == "conv_step":
            channels = (2 * keys + values) * width
            return draw(rows, channels), draw(rows, channels, 4), draw(channels, 4)
        q, k, v = (draw(rows, n, width) for n in (keys, keys, values))
        gates = draw(rows, values, kind=torch.float32)
        return q, k, v, -gates.abs(), gates.sigmoid().to(dtype), draw(rows, values, width, width, kind=torch.float32)
    keys = torch.tensor([stream_key(0, 0, i) for i in range(rows)], device=device)
    return 4 * draw(rows, at.vocab, kind=torch.float32), keys, torch.zeros_like(keys)


def call_of(op: str, provider: str, at: Shape, rows: int, device: torch.device) -> Callable:
    """What is timed."""
    fused = provider == "fused"
    if op == "sample":
        made = sampler.Sampler(sampler.Sampling(8, (0,), 0, known_ids=at.known), rows, at.vocab, device)
        # In a dry run the masses of `fused` are PyTorch's.
        return made._by_blocks if fused else made._by_operators
    if op == "int8_head":
        by_tiles = lambda hidden, weight: linear_logits(hidden, Head(weight))
        multiply = int8_logits if fused else by_tiles
        return lambda hidden, codes, scales: multiply(hidden, Int8Weight(codes, scales))
    if op in ("rms_norm", "head_norm"):
        if provider == "torch":
            return lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS)
        norm = layer_ops.rms_norm_triton if fused else layer_ops.rms_norm_ref
        return lambda x, weight: norm(x, weight, EPS)
    if op == "swiglu":
        return layer_ops.swiglu_triton if fused else layer_ops.swiglu_ref
    if op == "delta_step":
        return delta_step.gated_delta_step_triton if fused else delta_step.gated_delta_step_ref
    if op == "conv_step":
        step = short_conv.causal_conv_step_triton if fused else short_conv.causal_conv_step_ref
        return lambda x, state, weight: step(x, state, weight, None, "silu")
    turn = layer_ops.rope_triton if fused else layer_ops.rope_ref
    return turn


def wrong(op: str, call: Callable, eager: Callable, inputs: tuple[Tensor, ...]) -> str | None:
    """What is wrong with the result of `call`; None where it is no further from float32 than twice eager."""
    if op == "sample":
        (tokens, logps), (others, right) = call(*inputs), eager(*inputs)
        alike = tokens == others
        same = int(alike.sum()) >= len(tokens) - 1 and (logps - right)[alike].abs().max() < 1e-4
        return None if same else "draws other tokens, or says other log-probs"
    flat = lambda found: (found if isinstance(found, Tensor) else torch.cat(found, 1)).float()
    fresh = lambda: (x.clone() for x in inputs)  # states are updated in their place
    found, plain = flat(call(*fresh())), flat(eager(*fresh()))
    exact = flat(eager(*(x.float() if x.is_floating_point() else x for x in fresh())))
    error, allowed = ((x - exact).abs().max().item() for x in (found, plain))
    # The interpreter truncates where a GPU rounds.
    slack = 2.0**-6 * exact.abs().max().item() if inputs[0].device.type == "cpu" else 1e-6
    return None if error <= 2 * allowed + slack else f"error {error:.2e}, eager's {allowed:.2e}"


def graphed(call: Callable, inputs: tuple[Tensor, ...], calls: int) -> Callable[[], object]:
    """Replays `calls` calls in one CUDA graph; on a CPU just calls."""
    if not inputs[0].is_cuda:
        return lambda: [call(*inputs) for _ in range(calls)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and lets libraries find their buffers
        for _ in range(3):
            call(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call(*inputs)
    return lambda kept=inputs: graph.replay()  # the graph reads tensors that only `kept` holds


@torch.no_grad()
def measure(op: str, provider: str, at: Shape, rows: int, dtype: torch.dtype, o: argparse.Namespace) -> dict:
    try:
        inputs = inputs_of(op, at, rows, dtype, o.device)
        call, eager = (call_of(op, name, at, rows, o.device) for name in (provider, "eager"))
        failed = wrong(op, call, eager, inputs)
        row = {"gate": "failed" if failed else "passed", "gate_reason": failed}
        if not failed:
            found = timed(graphed(call, inputs, o.calls), o.device, o.seconds)
            row |= found | {"us": found["ms"] * 1e3 / o.calls, "calls_in_graph": o.calls}
        return row
    except torch.OutOfMemoryError as error:
        return {"error": reason(error), "out_of_memory": True}
    except Exception as error:  # one provider must not cost the others their rows
        return {"error": reason(error)}


def faster(rows: list[dict]) -> dict[str, bool]:
    """Kinds that have been measured fused and eager, and whether fused was faster in every case; a fused kernel that
    failed or is wrong somewhere is not."""
    said: dict[str, bool] = {}
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["shape"], row["rows"], row["dtype"]), {})[row["provider"]] = row
    for (op, *_), case in cases.items():
        # Rows of another commit may name what is not here (any more).
        kind = next((kind for kind, ops in KINDS.items() if op in ops), None)
        if kind and {"fused", "eager"} <= set(case) and "us" in case["eager"]:
            won = case["fused"].get("us", float("inf")) < case["eager"]["us"]
            said[kind] = said.get(kind, True) and won
    return said


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on the clock of one provider")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; the only thing a machine without GPU does")
    o = parser.parse_args(argv)
    o.device, o.calls = torch.device("cuda" if torch.cuda.is_available() else "cpu"), CALLS
    o.shapes, o.rows = [name for name in SHAPES if name != "dry"], (8, 16, 32)
    o.dtypes = list(DTYPES) if o.device.type == "cpu" or torch.cuda.get_device_capability()[0] >= 8 else ["float16"]
    if o.device.type == "cpu" or o.dry_run:
        o.dry_run, o.shapes, o.rows, o.calls, o.seconds = True, ["dry"], (2,), 1, 0.0
    return o


def main(argv: list[str] | None = None) -> None:
    o = parse(argv)
    out, until, found = Rows(o.out, o.dry_run, part="decode_ops"), time.monotonic() + 60 * o.minutes, []
    cases = [(d, s, r, op) for d in o.dtypes for s in o.shapes for r in o.rows for op in OPS]
    for dtype, shape, rows, op in cases:
        if op == "sample" and dtype != o.dtypes[0]:
            continue  # logits are float32
        for provider in PROVIDERS.get(op, ("eager", "fused")):
            case = {"op": op, "shape": shape, "rows": rows, "dtype": dtype, "provider": provider}
            row = out.get(**case)
            if row is None and time.monotonic() < until:
                if provider == "fused" and not HAS_TRITON:
                    row = out.add(**case, missing="Triton is not installed")
                else:
                    row = out.add(**case, **measure(op, provider, SHAPES[shape], rows, DTYPES[dtype], o))
                said = (
                    f"{row['us']:9.2f} us"
                    if "us" in row
                    else row.get("missing") or row.get("error") or row["gate_reason"]
                )
                print(f"{op:10} {shape:13} {rows:3} {dtype:9} {provider:6} {said}", flush=True)
            found += [row] if row else []
    for kind, won in faster(found).items():
        print(f"{kind}: fused {'was' if won else 'was NOT'} faster in every case" + " (dry run)" * o.dry_run)


if __name__ == "__main__":
    main()
