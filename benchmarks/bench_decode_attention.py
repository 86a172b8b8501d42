"""The attention of one decode step: our kernels beside PyTorch's on a cache that is not shared, and the memory's limit.

    python benchmarks/bench_decode_attention.py --out benchmarks/results/kernels.jsonl [--minutes 2] [--slots 4]

G rows share each of --slots prompts and have equally many own tokens; one layer of the model, one step, in a CUDA graph
as the engine runs it. Providers:

    ours-triton, ours-torch   `decode_attention`, which also appends the new token; the second outside of a graph
    sdpa                      scaled_dot_product_attention(enable_gqa) on keys and values that hold the prompt once a
                              row and the new token already: what a cache without sharing makes of the same step

`limit_ms` is the bytes of our cache over what a copy on this device reaches; `share_of_limit` the part of it that was
attained. A provider whose error against float32 is above twice our PyTorch path's in the same dtype gets no time.
Without a GPU this is a dry run of tiny shapes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lowvram_grpo.kernels.decode.attention import decode_attention
from lowvram_grpo.kernels.decode.kv import KV, Rows, quantize_kv
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted
from timing import copy_ceiling, peak_mib, timed
from torch import Tensor

from lowvram_grpo.bench.rows import Rows as Results
from lowvram_grpo.bench.rows import reason

# (heads, KV heads, head dimension).
SHAPES = {
    "qwen2.5-0.5b": (14, 2, 64), "qwen2.5-1.5b": (12, 2, 128), "qwen2.5-7b": (28, 4, 128), "llama3.1-8b": (32, 8, 128),
}  # fmt: skip
PROVIDERS = ("ours-triton", "ours-torch", "sdpa")


class Case(NamedTuple):
    shape: str
    group: int
    prompt: int
    own: int
    cache: str

    def key(self, slots: int) -> dict:
        return {
            "op": "decode", "shape": self.shape, "rows": slots * self.group, "dtype": self.cache,
            "profile": f"{self.prompt}+{self.own}",
        }  # fmt: skip


class Step:
    """Inputs of one case; the new token is the last of `own` tokens."""

    def __init__(self, case: Case, sizes: tuple[int, int, int], slots: int, device: torch.device):
        self.heads, kv_heads, d = sizes
        r = slots * case.group
        g = torch.Generator(device).manual_seed(0)
        draw = lambda *n: torch.randn(*n, generator=g, device=device).bfloat16()
        self.query, self.key, self.value = draw(r, self.heads, d), draw(r, kv_heads, d), draw(r, kv_heads, d)
        self.prompts = KV(draw(slots, kv_heads, case.prompt, d), draw(slots, kv_heads, case.prompt, d))
        self.own = KV(draw(r, kv_heads, case.own, d), draw(r, kv_heads, case.own, d))
        if case.cache == "int8":
            self.prompts, self.own = (_quantized(x) for x in (self.prompts, self.own))
        at = torch.arange(r, device=device)
        full = lambda n, x: torch.full((n,), x, device=device)
        self.rows = Rows(
            at // case.group, full(r, case.own - 1), full(slots, case.prompt), at.view(slots, case.group),
            at % case.group, case.prompt, case.own, even=True, regular=True,
        )  # fmt: skip
        self.group, self.scale = case.group, d**-0.5

    def ours(self, path: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        query, key, value = (x.to(dtype) for x in (self.query, self.key, self.value))
        return decode_attention(query, key, value, self.prompts, self.own, self.rows, scale=self.scale, path=path)

    def sdpa(self) -> Callable[[], Tensor]:
        self.ours("torch")  # appends the new token
        prompts, own = _dense(self.prompts), _dense(self.own)
        keys, values = (torch.cat([p.repeat_interleave(self.group, 0), o], 2) for p, o in zip(prompts, own))
        query = self.query[:, :, None]
        return lambda: F.scaled_dot_product_attention(query, keys, values, scale=self.scale, enable_gqa=True)[:, :, 0]

    def bytes(self) -> int:
        """Of both caches, each read once, and of queries and outputs."""
        caches = [x for cache in (self.prompts, self.own) for x in cache if x is not None]
        return sum(x.nbytes for x in caches) + 2 * self.query.nbytes


def _quantized(cache: KV) -> KV:
    (keys, key_scales), (values, value_scales) = quantize_kv(cache.keys), quantize_kv(cache.values)
    return KV(keys, values, key_scales, value_scales)


def _dense(cache: KV) -> tuple[Tensor, Tensor]:
    if not cache.quantized:
        return cache.keys, cache.values
    pairs = ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
    return tuple((x * s[..., None]).bfloat16() for x, s in pairs)


def _graphed(call: Callable[[], Tensor], device: torch.device) -> Callable[[], object]:
    """What replays `call`; itself on a CPU."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(step: Step, name: str, device: torch.device, seconds: float) -> dict:
    if name == "ours-triton":
        if not HAS_TRITON or not (device.type == "cuda" or interpreted()):
            return {"missing": "needs Triton, and a GPU or TRITON_INTERPRET=1"}
        call = lambda: step.ours("triton")
    else:
        call = step.sdpa() if name == "sdpa" else lambda: step.ours("torch")
    exact = step.ours("torch", torch.float32)
    error = lambda out: (out.float() - exact).abs().max().item()
    eager, found = error(step.ours("torch")), error(call())
    # sdpa rounds the dequantized keys of an int8 cache to 16 bits, which ours does not have to.
    slack = 2.0**-7 if interpreted() or name == "sdpa" else 1e-4
    passed = found <= 2 * eager + slack
    row = {"error": None, "error_out": found, "error_eager": eager, "gate": "passed" if passed else "failed"}
    if not passed:
        return row | {"gate_reason": f"error {found:.1e} above twice that of eager, {eager:.1e}"}
    row["peak_mib"] = peak_mib(call, device)
    return row | timed(call if name == "ours-torch" else _graphed(call, device), device, seconds)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The most telling first: int8 beside bfloat16, small models before large ones."""
    if args.dry_run:
        return [Case("dry", 3, 40, 5, cache) for cache in ("bfloat16", "int8")]
    return [
        Case(shape, group, prompt, own, cache)
        for group, prompt, own in (
            (8, 256, 512), (16, 256, 512), (8, 2048, 512), (16, 2048, 64), (8, 256, 64), (8, 2048, 64), (16, 256, 64),
            (16, 2048, 512),
        )
        for shape in SHAPES
        for cache in ("bfloat16", "int8")
    ]  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=0.15, help="spent on the clock of one provider")
    parser.add_argument("--slots", type=int, default=4, help="prompts that decode at once")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; the only thing a machine without GPU does")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or args.dry_run:
        args.dry_run, args.seconds, args.slots = True, 0.0, 2
    return args


def main() -> None:
    args = parse()
    until = time.monotonic() + 60 * args.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Results(args.out, args.dry_run, part="kernels")
    gbs = copy_ceiling(device, args.seconds, 2**30 if device.type == "cuda" else 2**20)["gbs"]
    for case in cases_of(args):
        waiting = [name for name in PROVIDERS if not out.has(**case.key(args.slots), provider=name)]
        if not waiting:
            continue
        sizes = SHAPES.get(case.shape, (6, 2, 32))
        for name in waiting:
            if time.monotonic() > until:
                print("time is up; the same command goes on where this one stopped.")
                return
            try:
                step = Step(case, sizes, args.slots, device)
                limit = step.bytes() / gbs / 1e6
                row = {"limit_ms": limit, **measure(step, name, device, args.seconds)}
                if "ms" in row:
                    row["share_of_limit"] = limit / row["ms"]
            except Exception as error:  # one provider's failure must not cost the others their row
                row = {"error": reason(error), "out_of_memory": isinstance(error, torch.OutOfMemoryError)}
            row = out.add(**case.key(args.slots), provider=name, **row)
            said = f"{row['ms']:8.4f} ms, {row['share_of_limit']:.0%} of the limit" if "ms" in row else str(
                row.get("missing") or row.get("error") or row.get("gate_reason"))  # fmt: skip
            print(*case, name, said, flush=True)


if __name__ == "__main__":
    main()
