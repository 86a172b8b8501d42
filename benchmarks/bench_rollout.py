"""Tokens a second and memory of rollouts: ours, transformers' generate, its continuous batching, and what the memory's
bandwidth allows.

    python benchmarks/bench_rollout.py --out rollouts.jsonl [--model Qwen2.5-7B ...] [--weights nf4] [--lora 16]
        [--group 8 16 4] [--prompt 256 2048] [--length 64] [--draws sampled greedy] [--heads dense int8]
        [--providers ours hf-dynamic ...]

On a GPU, without further arguments: 0.5B, 1.5B and 7B in nf4 with LoRA adapters, about four minutes on an H200. A model
is a name that `lowvram-grpo plan` knows (random weights, no download) or a folder (its own weights). Adapters are not
zero, and on a GPU everything runs under autocast, as in training. On a GPU each model is sampled from with a dense head
and then with the int8 one that the presets train with; transformers has only the dense one, and is what both are held
against.

Providers take turns in one process; their order alternates from round to round. A row has medians over the rounds, and
`speedup` is the median of each round's own ratio to `hf-dynamic`. The first group size and prompt go through all
providers, the others through `ours`, `ours-int8` and `hf-dynamic`, unless --providers names them. Where there are
graphs, a row of op `graphs` says whether replay gives the tokens of the same steps without a graph. Rows that are there
are not measured again. `ours` is what a run does (fused_ops auto); `ours-fused` and `ours-unfused` have it on and off.

    seconds, tokens_per_second   of the call, prompts included
    cpu_s, cpu_speedup           the process's own time, without what others take of a shared machine; on a CPU only
    prefill_s                    until the decoder is first given one token a row
    step_ms                      the rest over the number of decode steps
    kv_mib                       of the cache: what our ledger counts, what transformers returns
    peak_mib                     allocated above what was there before; CUDA only
    limit_ms, share_of_limit     of a decode step: see rollout_limit.py, for shared prompts, whoever decodes
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rollout_limit import bandwidth, step_limit
from rollout_model import DRY_MODEL, load
from rollout_providers import BASELINE, PROVIDERS, Task, cache_bytes, has_graphs, missing, replay_is_eager, sync
from torch import nn

from lowvram_grpo.bench.rows import Rows, reason
from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.policy.embeddings import place_embeddings
from lowvram_grpo.policy.load import compute_dtype
from lowvram_grpo.policy.wrapper import unwrap

MODELS = ["Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"]
EVERYWHERE = ["ours", "ours-int8", BASELINE]
MIB = 2**20


class Bench:
    """One model and the cases that it is put through."""

    def __init__(self, args: argparse.Namespace, name: str, out: Rows, until: float):
        self.args, self.name, self.out, self.until = args, name, out, until
        self.device, self.dtype = args.device, args.dtype
        self.head = "dense"
        self._model: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        """Loaded when the first case asks for it; its head is made small when the first case with a small one does, and
        then there is no dense one any more."""
        if self._model is None:
            self._model = load(self.name, self.args.weights, self.args.lora, self.dtype, self.device)
        place_embeddings(
            unwrap(self._model), head_dtype=self.head, embedding_offload=False, device=self.device, dtype=self.dtype
        )
        return self._model

    def autocast(self) -> AbstractContextManager:
        return torch.autocast("cuda", self.dtype) if self.device.type == "cuda" else nullcontext()

    def cases(self) -> Iterator[tuple[Task, list[str]]]:
        """Tasks with their providers, in order of worth."""
        args = self.args
        vocab = resolve_config(self.name)[0].get_text_config().vocab_size
        draw = random.Random(0)
        for group in args.group:
            for length in args.prompt:
                first = (group, length) == (args.group[0], args.prompt[0])
                names = args.providers or (list(PROVIDERS) if first else EVERYWHERE)
                if self.head != "dense":
                    names = [name for name in names if name.startswith("ours")]
                prompts = [[draw.randrange(3, vocab) for _ in range(length)] for _ in range(args.prompts)]
                for how in args.draws:
                    yield Task(prompts, group, args.length, how == "greedy"), names

    def key(self, task: Task) -> dict[str, Any]:
        """What tells this case's rows from others."""
        adapter = f"LoRA {self.args.lora}" if self.args.lora else "no adapter"
        head = "" if self.head == "dense" else f", {self.head} head"
        name = Path(self.name).name if Path(self.name).is_dir() else self.name
        return {
            "model": name, "weights": self.args.weights, "dtype": str(self.dtype)[6:], "rows": task.rows,
            "tokens": len(task.prompts[0]), "profile": "greedy" if task.greedy else "sampled",
            "setup": f"G {task.group}, {task.length} new tokens, {adapter}{head}",
        }  # fmt: skip

    def run(self) -> bool:
        """Whether all cases are done; False if time is up."""
        return all([self._with_head(head) for head in sorted(self.args.heads)])  # dense comes first

    def _with_head(self, head: str) -> bool:
        self.head = head
        for task, names in self.cases():
            key = self.key(task)
            waiting = [n for n in names if not self.out.has(op="rollout", provider=n, **key)]
            if waiting and time.monotonic() > self.until:
                return False
            if waiting:
                with self.autocast():
                    self._case(task, waiting)
            checked = self.out.has(op="graphs", provider="ours", **key)
            if not checked and has_graphs(self.device) and "ours" in names:
                with self.autocast():
                    self._check(task)
        return True

    def _case(self, task: Task, waiting: list[str]) -> None:
        named = {"group": task.group, "prompts": len(task.prompts), "prompt": len(task.prompts[0])}
        named |= {
            "head": self.head,
            "length": task.length,
            "lora": self.args.lora,
            "threads": torch.get_num_threads(),
            **self.key(task),
        }
        absent = {n: why for n in waiting if (why := missing(n, self.model, self.args.weights))}
        for name, why in absent.items():
            self.out.add(op="rollout", provider=name, missing=why, **named)
        timed = [n for n in waiting if n not in absent]
        if not timed:
            return
        # Where it has had its turn already, it takes another; with a small head there is no such provider.
        against = [] if BASELINE in timed or self.head != "dense" else [BASELINE]
        rounds, failed = self._rounds(task, timed + against)
        dense = self._dense_baseline(task)
        for name, error in failed.items():
            if name in timed:
                self.out.add(op="rollout", provider=name, **named, **error)
                print(f"{self._said(task, name)}  {error['error']}", flush=True)
        for name in timed:
            if rounds[name]:
                row = self._summary(task, name, rounds)
                if dense and "tokens_per_second" in dense:
                    row["speedup"] = row["tokens_per_second"] / dense["tokens_per_second"]
                self.out.add(op="rollout", provider=name, **named, **row)
                times = f"{row['speedup']:6.2f} x" if row.get("speedup") else " " * 8
                print(f"{self._said(task, name)} {row['tokens_per_second']:8.0f} tokens/s {times}", flush=True)

    def _dense_baseline(self, task: Task) -> dict[str, Any] | None:
        """What generate made of the same task with a dense head, for heads that it has not."""
        if self.head == "dense":
            return None
        setup = self.key(task)["setup"].removesuffix(f", {self.head} head")
        return self.out.get(op="rollout", provider=BASELINE, **{**self.key(task), "setup": setup})

    def _said(self, task: Task, name: str) -> str:
        key = self.key(task)
        what = f"{key['model']} {key['weights']:5} {self.head:5} {key['profile']:7}"
        return f"{what} {key['tokens']:5} x {task.rows:3} {name:14}"

    def _rounds(self, task: Task, names: list[str]) -> tuple[dict[str, list[dict]], dict[str, dict]]:
        """Per provider what each round measured, and why some failed. One that fails has no further turn."""
        rounds: dict[str, list[dict]] = defaultdict(list)
        failed: dict[str, dict] = {}
        # A GPU's kernels are chosen by shape; a CPU's long prompts would only cost time.
        short = task.prompts if self.device.type == "cuda" else [p[:16] for p in task.prompts]
        warm = replace(task, prompts=short, length=min(4, task.length))
        for at in range(-1, self.args.rounds):
            if at > 0 and time.monotonic() > self.until:
                break
            for name in names if at % 2 else reversed(names):
                if name in failed:
                    continue
                try:
                    measured = self._call(name, warm if at < 0 else replace(task, seed=at))
                except Exception as error:  # what one provider cannot do says nothing about the others
                    full = isinstance(error, torch.OutOfMemoryError)
                    failed[name] = {"error": reason(error), "out_of_memory": full}
                    rounds.pop(name, None)
                    continue
                if at >= 0:
                    rounds[name].append({**measured, "round": at})
        return rounds, failed

    def _call(self, name: str, task: Task) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        sync(self.device)
        started, cpu_started = time.perf_counter(), time.process_time()
        with warnings.catch_warnings(record=True) as heard:  # a step that cannot be captured, for one
            made = PROVIDERS[name](self.model, task)
            sync(self.device)
        seconds, cpu_s = made.seconds or time.perf_counter() - started, time.process_time() - cpu_started
        if [len(ids) for ids in made.completions] != [task.length] * task.rows:
            raise RuntimeError(f"completions of {sorted({len(ids) for ids in made.completions})} tokens")
        step = None if made.prefill_s is None else (seconds - made.prefill_s) / made.decode_steps
        peak = (torch.cuda.max_memory_allocated() - before) / MIB if cuda else None
        times = {"seconds": seconds, "cpu_s": None if cuda else cpu_s, "prefill_s": made.prefill_s, "step_s": step}
        return {**times, "peak": peak, "kv": made.kv_bytes, "heard": [str(one.message)[:200] for one in heard]}

    def _summary(self, task: Task, name: str, rounds: dict[str, list[dict]]) -> dict[str, Any]:
        mine = rounds[name]
        middle = lambda key: None if mine[0][key] is None else statistics.median(one[key] for one in mine)
        baseline = {one["round"]: one for one in rounds.get(BASELINE, ())}
        pairs = [(baseline[one["round"]], one) for one in mine if one["round"] in baseline]
        ratios = lambda key: [theirs[key] / one[key] for theirs, one in pairs if one[key]]
        median = lambda found: statistics.median(found) if found else None
        kv = mine[0]["kv"]
        if name.startswith("ours"):
            kv = cache_bytes(self.model, task, kv_dtype="int8" if name == "ours-int8" else "auto")
        tokens = sum(map(len, task.prompts)) + task.rows * task.length / 2
        item = 1 if name == "ours-int8" else self.dtype.itemsize
        limit, parts = step_limit(unwrap(self.model), tokens, item, self.args.bandwidth)
        step = middle("step_s")
        return {
            "rounds": len(mine), "warnings": sorted({text for one in mine for text in one["heard"]}),
            "seconds": middle("seconds"),
            "tokens_per_second": task.rows * task.length / middle("seconds"),
            "speedup": median(ratios("seconds")), "speedups": ratios("seconds"),
            "cpu_s": middle("cpu_s"), "cpu_speedup": median(ratios("cpu_s")),
            "prefill_s": middle("prefill_s"), "step_ms": None if step is None else step * 1e3,
            "kv_mib": None if kv is None else kv / MIB, "peak_mib": middle("peak"),
            "limit_ms": limit * 1e3, "share_of_limit": None if step is None else limit / step, **parts,
        }  # fmt: skip

    def _check(self, task: Task) -> None:
        try:
            found = replay_is_eager(self.model, task)
        except Exception as error:
            found = {"error": reason(error)}
        self.out.add(op="graphs", provider="ours", group=task.group, **self.key(task), **found)
        print(f"{self._said(task, 'graphs')} {found}", flush=True)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", nargs="+", help="as `lowvram-grpo plan` takes it, or a folder with weights")
    parser.add_argument("--weights", choices=("none", "nf4"), default="nf4")
    parser.add_argument("--lora", type=int, default=16, help="rank of the adapter; 0 for none")
    parser.add_argument("--group", type=int, nargs="+", default=[8, 16, 4], help="completions of a prompt")
    parser.add_argument("--prompts", type=int, default=1, help="prompts at once")
    parser.add_argument("--prompt", type=int, nargs="+", default=[256, 2048], help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--heads", choices=("dense", "int8", "nf4"), nargs="+", help="dense and int8; on a CPU dense")
    parser.add_argument("--draws", choices=("sampled", "greedy"), nargs="+", default=["sampled"])
    parser.add_argument("--providers", choices=list(PROVIDERS), nargs="+")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU; so it is without a GPU, too, "
                        "unless --model names one")  # fmt: skip
    args = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    args.dry_run = args.dry_run or not (cuda or args.model)
    args.heads = args.heads or (["dense", "int8"] if cuda or args.dry_run else ["dense"])
    if args.dry_run:
        args.model, args.weights, args.prompt, args.length, args.group = [DRY_MODEL], "none", [8], 6, [4]
        args.rounds = 1
    args.model = args.model or MODELS
    args.device = torch.device("cuda" if cuda else "cpu")
    args.dtype = compute_dtype(args.device)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    until = time.monotonic() + 60 * args.minutes
    out = Rows(args.out, args.dry_run, part="rollouts")
    args.bandwidth = bandwidth(args.device, 0.1 if args.dry_run else 1.0)
    for i, name in enumerate(args.model):
        now = time.monotonic()
        share = now + (until - now) / (len(args.model) - i)
        if not Bench(args, name, out, share).run():
            print(f"time is up for {name}; the same command goes on where this one stopped.", flush=True)
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
