"""Log-probs of sampled tokens, forward and backward: our three paths beside every rival, in one process.

    python benchmarks/bench_kernels.py --out benchmarks/results/kernels.jsonl [--minutes 5] [--shapes qwen2.5-0.5b,...]
        [--rows 4096,8192,2048] [--dtypes bfloat16,float16] [--ops train,score,...] [--providers ours-fused,...]
        [--hidden states.pt]

Operations, with a frozen head and temperature 1 (CCE and torch have no other):

    train        log-probs and their backward pass to the hidden states
    score        log-probs without gradient
    dense        as train, every row by the dense product: what the lists save
    kl           as train, with reference hidden states in the same sweep and the exact KL
    int8, nf4    as train, with a quantized head
    loss         the GRPO loss from (B, T) log-probs on

What torch.compile makes (`liger-compiled`, `compiled`) takes minutes: it is measured where --providers names it.

Each provider is first held against float64 (`correct.py`); one that fails gets no time. Cases come in order of worth,
so that a time box cuts the least of them, and a row that --out holds already for this GPU and commit is skipped.
Without a GPU this is a dry run on tiny shapes: a check of the program, never a measurement. The hidden states are made
to have the entropy of real models (`profiles.py`); --hidden takes real ones, a file of
torch.save({"h": (N, H), "t": (N,), "W": (V, H)}).
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import torch
from correct import Exact, errors, oracle, subset, verdict
from kernel_cases import DTYPES, OPS, Case, steps
from loss_cases import bench_loss
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.runtime import interpreted
from profiles import MAIN_SHAPES, PROFILES, SHAPES, Inputs, head_weight, inputs_of, measured
from providers import COMPILED, OURS, RIVALS, SEQUENCES, Problem, Unavailable, names_for, provider
from timing import copy_ceiling, matmul_ceiling, peak_mib, timed

from lowvram_grpo.bench.rows import Rows, reason


class Bench:
    """The state that cases share: where rows go, when to stop, and the inputs of the case before."""

    def __init__(self, args: argparse.Namespace, out: Rows, device: torch.device):
        self.args, self.out, self.device = args, out, device
        self.until = time.monotonic() + 60 * args.minutes
        self.ceilings: dict[tuple, float] = {}
        self._inputs: tuple[tuple, Inputs] | None = None
        self._described: set[tuple] = set()

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    def forget(self) -> None:
        self._inputs = None

    def inputs(self, case: Case) -> Inputs:
        key = case[1:]
        if self._inputs is None or self._inputs[0] != key:
            self._inputs = None
            dtype = DTYPES[case.dtype]
            if case.profile == "real":
                file = torch.load(self.args.hidden, map_location="cpu", weights_only=True)
                again = -(-case.rows // len(file["h"]))
                rows = lambda x: x.repeat(again, *[1] * (x.ndim - 1))[: case.rows].to(self.device)
                made = Inputs(file["W"].to(self.device, dtype), rows(file["h"]).to(dtype), rows(file["t"]).long())
            else:
                weight = head_weight(SHAPES[case.shape], dtype, self.device)
                made = inputs_of(weight, case.rows, case.profile)
            self._inputs = key, made
        made = self._inputs[1]
        if key not in self._described:
            self._described.add(key)
            self._add(case, op="input", **measured(made))
        return made

    def problem(self, case: Case) -> Problem:
        made = self.inputs(case)
        g = torch.Generator(self.device).manual_seed(2)
        draw = lambda *shape: torch.randn(*shape, generator=g, device=self.device)
        advantages = draw(SEQUENCES)
        ref = (made.hidden.float() * (1 + 0.02 * draw(case.rows, 1))).to(made.hidden.dtype)
        head = Head(made.weight)
        head = head.quantized(case.op) if case.op in ("int8", "nf4") else head
        return Problem(
            made.hidden.clone().requires_grad_(), ref, head, made.weight, made.targets,
            -advantages.repeat_interleave(case.rows // SEQUENCES), draw(case.rows), advantages,
        )  # fmt: skip

    def _add(self, case: Case, **row) -> None:
        row = {**case._asdict(), **row}
        if not self.out.has(**row):
            self.out.add(**row)

    def ceiling(self, case: Case, p: Problem) -> float:
        """TFLOP/s of the BLAS at this shape, measured once a process."""
        key = case.shape, case.rows, case.dtype
        if key not in self.ceilings:
            found = matmul_ceiling(p.hidden.detach(), p.dense, self.args.seconds)
            self.ceilings[key] = found["tflops"]
            self._add(case._replace(profile="any"), op="ceiling", what="matmul", **found)
        return self.ceilings[key]

    def run(self, case: Case) -> None:
        names = [n for n in names_for(case.op) if n in self.args.providers]
        waiting = [n for n in names if not self.out.has(**case._asdict(), provider=n, path=_path(n))]
        if not waiting:
            return
        p = self.problem(case)
        ids = subset(case.rows)
        small = p.rows(ids)
        exact = _oracle(case, small)
        eager = _measured_errors(exact, small, provider("eager", case.op, self.device, small.hidden.dtype, 0), None)
        vocab, width = p.head.shape
        fixed = {"vocab": vocab, "width": width}
        try:
            floor = 2 * case.rows * vocab * width / self.ceiling(case, p) / 1e9
            fixed |= {"ceiling_tflops": self.ceiling(case, p), "floor_ms": floor}
        except torch.OutOfMemoryError:
            gc.collect()
        for name in waiting:
            if self.over:
                return
            row = self._measure(case, name, p, ids, exact, eager)
            made = row.get("tflop")
            if made and "ms" in row and "ceiling_tflops" in fixed:
                row["share_of_ceiling"] = made / row["ms"] * 1e3 / fixed["ceiling_tflops"]
            row = self.out.add(**case._asdict(), provider=name, path=_path(name), **fixed, eager=eager, **row)
            _say(row)
            p.hidden.grad = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure(self, case: Case, name: str, p: Problem, ids: list[int], exact: Exact, eager: dict) -> dict:
        """Errors, and time and memory if they are small enough."""
        vocab, width = p.head.shape
        try:
            call = provider(name, case.op, self.device, p.hidden.dtype, width)
            found = _measured_errors(exact, p, call, ids)
            diffuse = found.pop("diffuse", None)
            row: dict = dict(found)
            if name in OURS and case.op != "score":
                share = (diffuse or 0) / case.rows
                row["diffuse_share"] = share
                # A row is listed by 2 VH; a diffuse one is swept again, or where all are, only once, by 4 VH.
                passes = 4.0 if share == 1 else 2 + 4 * share
                row["tflop"] = passes * case.rows * vocab * width * (2 if case.op == "kl" else 1) / 1e12
            elif name in OURS:
                row["tflop"] = 2 * case.rows * vocab * width / 1e12
            slack = 2.0**-7 if interpreted() and name in OURS else 0.0
            wrong = verdict(found, eager, exact, name in OURS, slack)
            row |= {"gate": "passed" if wrong is None else "failed", "gate_reason": wrong}
            if wrong is None:
                again = lambda: call(p)
                row["peak_mib"] = peak_mib(again, self.device)
                row |= timed(again, self.device, self.args.seconds)
            return row
        except Unavailable as error:
            return {"missing": str(error)}
        except torch.OutOfMemoryError as error:
            return {"error": reason(error), "out_of_memory": True}
        except Exception as error:  # a rival may fail in any way, and must not cost the others their row
            return {"error": reason(error)}


def _path(name: str) -> str | None:
    return name.removeprefix("ours-") if name in OURS else None


def _oracle(case: Case, small: Problem) -> Exact:
    kl = (small.ref_hidden, small.e) if case.op == "kl" else (None, None)
    return oracle(small.hidden.detach(), small.head, small.targets, small.c, *kl)


def _measured_errors(exact: Exact, p: Problem, call, ids: list[int] | None) -> dict:
    """Errors of one call on rows `ids` (all if None), and how many rows were diffuse."""
    p.hidden.grad = None
    out = call(p)
    cut = lambda x: x if x is None or ids is None else x[ids]
    found = errors(exact, cut(out.logps), cut(out.kl), cut(p.hidden.grad))
    return found if out.diffuse is None else {**found, "diffuse": out.diffuse}


def _say(row: dict) -> None:
    what = f"{row['op']:6} {row['shape']:13} {row['rows']:5} {row['dtype']:8} {row['profile']:8} {row['provider']:12}"
    if "ms" in row:
        memory = "" if row["peak_mib"] is None else f"  {row['peak_mib']:8.0f} MiB"
        known = "share_of_ceiling" in row and not row["dry_run"]
        share = f"  {row['share_of_ceiling']:.0%} of the ceiling" if known else ""
        print(f"{what} {row['ms']:9.3f} ms{memory}{share}", flush=True)
    else:
        print(what, row.get("missing") or row.get("error") or row.get("gate_reason"), flush=True)


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=0.4, help="spent on the clock of one provider")
    parser.add_argument("--shapes", default=",".join(MAIN_SHAPES))
    parser.add_argument("--rows", type=_numbers, default=[4096, 8192, 2048], help="multiples of 8")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--profiles", default=",".join(PROFILES))
    known = (*OURS, *RIVALS, *COMPILED)
    parser.add_argument("--providers", default=",".join(n for n in known if n not in COMPILED))
    parser.add_argument("--hidden", type=Path, help="real hidden states; takes the place of --shapes")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; the only thing a machine without GPU does")
    args = parser.parse_args(argv)
    for name in ("shapes", "dtypes", "ops", "profiles", "providers"):
        setattr(args, name, getattr(args, name).split(","))
    choices = {"ops": OPS, "dtypes": DTYPES, "shapes": SHAPES, "profiles": PROFILES, "providers": known}
    for name, known in choices.items():
        if unknown := [x for x in getattr(args, name) if x not in known]:
            parser.error(f"unknown {name} {', '.join(unknown)}; known: {', '.join(known)}")
    if not torch.cuda.is_available() or args.dry_run:
        args.dry_run, args.rows, args.seconds = True, [16], 0.0
        args.shapes = ["dry"]
    if args.hidden:
        args.shapes = [f"real:{args.hidden.stem}"]
    if any(n % SEQUENCES for n in args.rows):
        parser.error(f"--rows must be multiples of {SEQUENCES}")
    return args


def measure_all(bench: Bench, args: argparse.Namespace) -> None:
    for case in steps(args):
        if bench.over:
            print("time is up; the same command goes on where this one stopped.")
            return
        if case is None:
            compiled = "compiled" in args.providers
            bench_loss(bench.out, bench.device, args.seconds, args.dry_run, compiled=compiled)
            continue
        try:
            bench.run(case)
        except torch.OutOfMemoryError as error:
            # The inputs themselves or the oracle: nobody gets a row but the reason.
            print(case, reason(error), flush=True)
            bench.forget()
            gc.collect()
            torch.cuda.empty_cache()


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Rows(args.out, args.dry_run, part="kernels")
    bench = Bench(args, out, device)
    gc.freeze()  # the collections between two providers need not look at the imports
    if not out.has(op="ceiling", what="copy"):
        size = 2**30 if device.type == "cuda" else 2**20
        out.add(op="ceiling", what="copy", **copy_ceiling(device, args.seconds, size))
    measure_all(bench, args)
    # Frozen objects would be reported as leaks at exit.
    gc.unfreeze()


if __name__ == "__main__":
    main()
