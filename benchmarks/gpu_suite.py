"""Everything that a machine with a GPU is asked, in one command.

Parts, in order of worth, each in a process of its own with its share of the time, so that a crash or a hang of one
costs no other; rows are written as they come, and what is there already for this GPU and commit is not done again:

    env       card, driver, clocks, versions                                              suite.jsonl
    tests     pytest tests/gpu with real kernels                                          tests.txt
    kernels   bench_kernels.py, then bench_decode_attention.py                            kernels.jsonl
    rivals    .gpu-stage/rivals.py, loss and train, where it has been staged              rivals.jsonl
    train     part_train.py: the bundled model through the command line                   train.jsonl
    memory    part_memory.py: training steps of 0.5B to 14B under the caps of small       memory.jsonl
              cards, predicted and measured, and TRL's beside them
    rollouts  bench_rollout.py: tokens a second and memory beside transformers', and the  rollouts.jsonl
              share of what the memory's bandwidth allows

    python benchmarks/gpu_suite.py [--out DIR] [--minutes 9] [--only kernels,memory] [--dry-run]

On a machine that is lent bare (no network; results only from $OUT: these seven files and suite.log), once, in the
repository root here; the packages after .gpu-stage are those that our command line needs beside the script's own:

    ../shared/gpu/stage-site.sh .gpu-stage math-verify latex2sympy2-extended antlr4-python3-runtime tomli-w
    cp ../shared/gpu/rivals.py .gpu-stage/; git rev-parse HEAD >.gpu-stage/commit

Then `run` there with `carry` [".gpu-stage"], `timeout_s` 600 and this command, which may be given again with --only for
the parts that are left (`tests` and `kernels` fill nine minutes; `rivals,train,memory,rollouts` the next nine):

    mkdir -p ~/site && tar xJf .gpu-stage/site.tar.xz -C ~/site && export PYTHONPATH=~/site:$PWD PYTHONUNBUFFERED=1 \
    && if [ -d .gpu-stage/results ]; then cp .gpu-stage/results/* $OUT/; fi \
    && python3 benchmarks/gpu_suite.py --out $OUT --minutes 9 --only env,tests,kernels

Copy what came back to benchmarks/results/NAME/ and, to go on with it, to .gpu-stage/results/; then
`python benchmarks/report.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch

from lowvram_grpo.bench.rows import ROOT, Rows, provenance
from lowvram_grpo.run import jsonl

HERE = Path(__file__).resolve().parent
RIVALS = ROOT / ".gpu-stage" / "rivals.py"


class Part(NamedTuple):
    """`share` of the time that is left, among the parts that are; unused time goes to those that follow."""

    share: float
    least_s: float = 0.0


PARTS = {
    "env": Part(1, 60),
    "tests": Part(20, 60),
    "kernels": Part(34),
    "rivals": Part(16),
    "train": Part(6, 60),
    "memory": Part(18),
    "rollouts": Part(18, 60),
}


class Suite:
    def __init__(self, args: argparse.Namespace):
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.dry_run = args.dry_run
        self.rows = Rows(self.out / "suite.jsonl", args.dry_run, part="suite")
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
        self.environment["TRITON_INTERPRET"] = "1" if args.dry_run else "0"
        self.until = time.monotonic() + 60 * args.minutes

    def call(self, name: str, command: list[Any], seconds: float, log: str = "suite.log") -> int | None:
        """Exit code of a command whose output goes to `log` and to the screen; None if it ran out of time."""
        group = {"preexec_fn": os.setpgrp} if os.name == "posix" else {}
        process = subprocess.Popen(
            [str(x) for x in command], cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding="utf-8", errors="replace", **group,
        )  # fmt: skip
        with open(self.out / log, "a", encoding="utf-8", buffering=1) as file:
            file.write(f"\n== {name}: {' '.join(map(str, command))}\n")

            def copy() -> None:
                for line in process.stdout:
                    file.write(line)
                    print(f"[{name}] {line}", end="", flush=True)

            reader = threading.Thread(target=copy, daemon=True)
            reader.start()
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                code = None
                self._stop(process)
            reader.join(timeout=5)
        return code

    def _stop(self, process: subprocess.Popen) -> None:
        """With its children: a memory part of its own may be training."""
        for kind in ("SIGTERM", "SIGKILL"):
            if os.name == "posix":
                os.killpg(process.pid, getattr(signal, kind))
            else:
                process.kill()
            try:
                process.wait(timeout=5)
                return
            except subprocess.TimeoutExpired:
                continue

    def run(self, names: list[str]) -> list[dict]:
        done = []
        for i, name in enumerate(names):
            left = self.until - time.monotonic()
            waiting = sum(PARTS[other].share for other in names[i:])
            budget = min(left, max(PARTS[name].least_s, left * PARTS[name].share / waiting))
            started = time.monotonic()
            if budget < 5:
                found = {"status": "no time left"}
            else:
                try:
                    found = getattr(self, name)(budget)
                except Exception as error:  # a part that cannot start must not cost the others their turn
                    found = {"status": f"failed: {type(error).__name__}: {error}"[:300]}
            found = {"op": name, "seconds": round(time.monotonic() - started, 1), "again": True, **found}
            done.append(self.rows.add(**found))
        return done

    def _script(self, name: str, budget: float, *extra: Any, script: str | None = None) -> dict:
        """A part that is a script (part_NAME.py) with --out and --minutes; it stops by itself a little before it is
        stopped."""
        path = self.out / f"{name}.jsonl"
        before = len(jsonl.read(path))
        minutes = max(0.05, (budget - 15) / 60)
        script = HERE / (script or f"part_{name}.py")
        command = [sys.executable, script, "--out", path, "--minutes", f"{minutes:.2f}", *extra]
        code = self.call(name, command + (["--dry-run"] if self.dry_run else []), budget)
        rows = jsonl.read(path)[before:]
        failed = [r for r in rows if r.get("error") and not r.get("out_of_memory")]
        return {"status": _status(code), "new_rows": len(rows), "rows_with_errors": len(failed)}

    def env(self, budget: float) -> dict:
        found: dict[str, Any] = {"cpu_count": os.cpu_count(), "nvidia_smi": None}
        if shutil.which("nvidia-smi"):
            for key, extra in (("nvidia_smi", []), ("nvidia_smi_q", ["-q", "-d", "CLOCK,POWER,TEMPERATURE,ECC"])):
                done = subprocess.run(["nvidia-smi", *extra], capture_output=True, text=True, timeout=budget)
                found[key] = done.stdout[-6000:]
        if torch.cuda.is_available():
            card = torch.cuda.get_device_properties(0)
            found |= {"multiprocessors": card.multi_processor_count, "l2_bytes": getattr(card, "L2_cache_size", None)}
        return {"status": "ok", **found}

    def tests(self, budget: float) -> dict:
        commit = self.rows.shared["commit"]
        known = [r for r in jsonl.read(self.rows.path) if r["op"] == "tests" and r["commit"] == commit]
        if any(r["status"] == "ok" and r["dry_run"] == self.dry_run for r in known):
            return {"status": "ok", "counts": "already passed for this commit"}
        log = self.out / "tests.txt"
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "--durations=10"]
        workers = min(8, (os.cpu_count() or 1) // 2)
        if workers > 1 and not self.dry_run and importlib.util.find_spec("xdist") and _card_gib() > 40:
            command += ["-n", workers]
        # tests/kernels hold the arithmetic in the interpreter, on any machine; this is about the device.
        found: dict[str, Any] = {"status": _status(self.call("tests", [*command, "tests/gpu"], budget, log.name))}
        return found | {"counts": _counts(log)}

    def kernels(self, budget: float) -> dict:
        small = ["--ops", "train,loss", "--profiles", "peaked", "--dtypes", "bfloat16"] if self.dry_run else []
        started = time.monotonic()
        scripts = (
            ("bench_kernels.py", 0.7, small),
            ("bench_decode_attention.py", 0.6, []),
            ("bench_decode_ops.py", 1, []),
        )
        found = []
        for script, share, extra in scripts:
            left = budget - (time.monotonic() - started)
            found.append(self._script("kernels", share * left, *extra, script=script))
        status = {"status": ", ".join(dict.fromkeys(one["status"] for one in found))}
        return {key: sum(one[key] for one in found) for key in ("new_rows", "rows_with_errors")} | status

    def rivals(self, budget: float) -> dict:
        if not RIVALS.is_file():
            return {"status": "not staged: there is no .gpu-stage/rivals.py"}
        path = self.out / "rivals.jsonl"
        # Its rows name no commit: they are those of the row before them.
        jsonl.append(path, [{**provenance(self.dry_run), "part": "rivals", "op": "header"}])
        status, started = {}, time.monotonic()
        for mode, share in (("loss", 0.5),) if self.dry_run else (("loss", 0.5), ("train", 1.0)):
            seconds = (budget - (time.monotonic() - started)) * share
            minutes = max(0.1, (seconds - 10) / 60)
            code = self.call(
                "rivals", [sys.executable, RIVALS, mode, "--out", path, "--minutes", f"{minutes:.2f}"], seconds
            )
            status[mode] = _status(code)
        return {"status": ", ".join(f"{mode} {what}" for mode, what in status.items())}

    def train(self, budget: float) -> dict:
        return self._script("train", budget)

    def memory(self, budget: float) -> dict:
        return self._script("memory", budget)

    def rollouts(self, budget: float) -> dict:
        return self._script("rollouts", budget, script="bench_rollout.py")


def _status(code: int | None) -> str:
    return "out of time" if code is None else "ok" if code == 0 else f"exit code {code}"


def _counts(log: Path) -> str | None:
    """pytest's last line."""
    lines = log.read_text(encoding="utf-8").splitlines()
    return next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|skipped|error)", line)), None)


def _card_gib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", HERE / "results")))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; what there is without a GPU")
    args = parser.parse_args()
    args.dry_run = args.dry_run or not torch.cuda.is_available()
    names = [name for name in PARTS if name in args.only.split(",")]
    if unknown := set(args.only.split(",")) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    if args.dry_run:
        print("dry run: tiny shapes, no measurement.")
    done = Suite(args).run(names)
    print("\n== summary")
    for row in done:
        telling = ("counts", "new_rows", "rows_with_errors")
        numbers = {k: row[k] for k in telling if row.get(k) is not None}
        print(f"{row['op']:9} {row['seconds']:6.1f} s  {row['status']}  {numbers or ''}")
    for line in report.headlines(report.load(args.out)):
        print(line)
    wrong = [row["op"] for row in done if row["status"].startswith(("exit code", "failed"))]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
