"""Where the time of one decode step and of one micro-batch goes: the longest kernels, and the gaps between them.

    python benchmarks/part_profile.py --out rows.jsonl [--models Qwen2.5-0.5B Qwen2.5-7B] [--minutes 1]

Written as text to profile.txt beside the rows: for a decode step by graph and without one, and for a micro-batch's
forward and backward pass as the 8gb preset has it. A gap is time in which no kernel and no copy runs on the device, and
stands with the operator that the host was at when it ended. Under torch.profiler the host is slower: compare shares,
not times.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rollout_model import DRY_MODEL, load
from torch.profiler import ProfilerActivity, profile, supported_activities

from lowvram_grpo.bench.rows import Rows, reason
from lowvram_grpo.policy.load import compute_dtype

MODELS = ["Qwen2.5-0.5B", "Qwen2.5-7B"]
MOST = 10
# The decode step that is profiled: the graph of its width has been captured by then.
STEP = 6


class Span(NamedTuple):
    """Microseconds on the device (on the CPU: of an operator)."""

    name: str
    start: float
    end: float


def spans(prof: profile, cuda: bool) -> tuple[list[Span], list[Span]]:
    """(what ran on the device, what the host was at), by start."""
    device, host = [], []
    for event in prof.events():
        span = Span(event.name, event.time_range.start, event.time_range.end)
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        (device if on_device else host).append(span)
    # Without a device: operators that no other has called.
    top = [Span(e.name, e.time_range.start, e.time_range.end) for e in prof.events() if e.cpu_parent is None]
    found = device if cuda and device else top
    # A user's annotation spans what ran meanwhile, and is no work of its own.
    found = [span for span in found if not span.name.startswith(("ProfilerStep", "## "))]
    return sorted(found, key=lambda s: s.start), sorted(host, key=lambda s: s.start)


def gaps(work: list[Span]) -> list[tuple[float, str, str, float]]:
    """(length, what ran before it, what ran after it, when it ended), the longest first."""
    found, last = [], None
    for span in work:
        if last is not None and span.start > last.end:
            found.append((span.start - last.end, last.name, span.name, span.start))
        if last is None or span.end > last.end:
            last = span
    return sorted(found, reverse=True)


def busy(work: list[Span]) -> float:
    """Microseconds in which anything ran."""
    total, until = 0.0, float("-inf")
    for span in work:
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def summary(work: list[Span], host: list[Span]) -> dict[str, Any]:
    """Totals in microseconds, the longest kernels (summed by name) and gaps."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for span in work:
        by_name[span.name].append(span.end - span.start)
    kernels = sorted(((sum(t), len(t), name) for name, t in by_name.items()), reverse=True)
    total = max((s.end for s in work), default=0.0) - min((s.start for s in work), default=0.0)
    # The innermost operator that the host was in when the gap ended.
    at = lambda when: next((s.name for s in reversed(host) if s.start <= when <= s.end), "")
    return {
        "total_us": total, "busy_us": busy(work), "launches": len(work),
        "kernels": [{"us": us, "calls": calls, "name": name[:160]} for us, calls, name in kernels[:MOST]],
        "gaps": [{"us": us, "after": a[:80], "before": b[:80], "host": at(end)} for us, a, b, end in gaps(work)[:MOST]],
    }  # fmt: skip


def text(title: str, found: dict[str, Any]) -> str:
    share = found["busy_us"] / found["total_us"] if found["total_us"] else 0.0
    lines = [f"== {title}", f"{found['total_us']:.0f} us, {share:.0%} of them busy, {found['launches']} launches", ""]
    lines += ["longest kernels (us, calls, name)"]
    lines += [f"{k['us']:10.1f} {k['calls']:5}  {k['name']}" for k in found["kernels"]]
    lines += ["", "longest gaps (us, after -> before, the host at)"]
    lines += [f"{g['us']:10.1f}  {g['after']} -> {g['before']}   [{g['host']}]" for g in found["gaps"]]
    return "\n".join([*lines, "", ""])


def profiled(call: Callable[[], object], cuda: bool) -> dict[str, Any]:
    # A PyTorch without CUPTI sees the host alone.
    kinds = [ProfilerActivity.CPU, *({ProfilerActivity.CUDA} & supported_activities() if cuda else ())]
    sync = torch.cuda.synchronize if cuda else lambda: None
    sync()
    with profile(activities=kinds) as prof:
        call()
        sync()
    return summary(*spans(prof, cuda))


def decode_step(args: argparse.Namespace, model: torch.nn.Module, graphs: bool) -> dict[str, Any]:
    """The `STEP`-th step of 8 completions of one prompt of 256 tokens."""
    from rollout_providers import Task, ours

    from lowvram_grpo.rollout.decode import Decoder

    length, found = (16, 6) if args.dry_run else (256, 16), {}
    step, count = Decoder.step, [0]

    def counted(decoder: Decoder) -> None:
        count[0] += 1
        if count[0] == min(STEP, length[1]):
            found.update(profiled(lambda: step(decoder), args.cuda))
        else:
            step(decoder)

    autocast = torch.autocast("cuda", args.dtype) if args.cuda else nullcontext()
    with patch.object(Decoder, "step", counted), autocast:
        ours(model, Task([list(range(3, 3 + length[0]))], 8, length[1], greedy=False), graphs=graphs)
    return found


def micro_batch(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Forward and backward pass of the longest micro-batch, the second time that it runs."""
    from lowvram_grpo.bench.measure import trainer_of
    from lowvram_grpo.plan.planner import setting
    from lowvram_grpo.policy.wrapper import unwrap
    from lowvram_grpo.recipe.resolve import resolve
    from lowvram_grpo.training.rehearsal import Rehearsal, workload

    flags = {"num_generations": 8, "max_prompt_length": 256, "max_completion_length": 300}
    if args.dry_run:
        flags = {"num_generations": 4, "max_prompt_length": 8, "max_completion_length": 6}
    if not args.cuda:
        flags |= {"quantization": "none", "head_dtype": "dense", "embedding_offload": False, "optim": "adamw_torch"}
    recipe = resolve({**flags, "model": name, "preset": "8gb"})
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(recipe, 1, args.device, folder)
        rehearsal = Rehearsal(
            trainer.model, trainer.collector.engine, trainer.learner, phase=lambda phase: nullcontext(),
            backward=trainer.accelerator.backward,
        )  # fmt: skip
        work = workload(trainer.grpo_args, unwrap(trainer.model).config, setting(recipe, "max_prompt_length"))
        run = lambda: rehearsal.gradients(work)
        run()
        trainer.model.zero_grad()
        return profiled(run, args.cuda)


def measure(args: argparse.Namespace, out: Rows, name: str, what: str, call: Callable[[], dict[str, Any]]) -> None:
    key = {"op": what, "provider": "ours", "model": Path(name).name}
    if out.has(**key) or time.monotonic() > args.until:
        return
    try:
        found = call()
        out.add(**key, **found)
        report = text(f"{Path(name).name}: {what}, {out.shared['gpu']}, commit {out.shared['commit']}", found)
    except Exception as error:  # one profile must not cost the others theirs
        report = f"== {Path(name).name}: {what}: {reason(error)}\n\n"
        traceback.print_exc()
        out.add(**key, error=reason(error), again=True)
    with open(args.out.with_name("profile.txt"), "a", encoding="utf-8") as file:
        file.write(report)
    print(report, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    args.until = time.monotonic() + 60 * args.minutes
    args.cuda = torch.cuda.is_available()
    args.device = torch.device("cuda", 0) if args.cuda else torch.device("cpu")
    args.dtype = compute_dtype(args.device)
    args.dry_run = args.dry_run or not args.cuda
    out = Rows(args.out, args.dry_run, part="profile")
    for name in [DRY_MODEL] if args.dry_run else args.models:
        model: list[torch.nn.Module] = []  # loaded when the first step asks for it

        def step(graphs: bool, name: str = name, model: list = model) -> dict[str, Any]:
            if not model:
                model.append(load(name, "nf4" if args.cuda else "none", 16, args.dtype, args.device))
            return decode_step(args, model[0], graphs)

        measure(args, out, name, "decode step by graph", lambda step=step: step(True))
        measure(args, out, name, "decode step", lambda step=step: step(False))
        model.clear()
        measure(args, out, name, "micro-batch", lambda name=name: micro_batch(args, name))


if __name__ == "__main__":
    main()
