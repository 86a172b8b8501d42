"""The compile gate: every kernel configuration, compiled for GPUs that need not be there.

    python tests/kernels/gate.py [--cc 75] [--subset] [MODULE ...]

prints one JSON object a case and compute capability: shared memory, registers, spills, or the compiler's error. It must
run in a process of its own, without TRITON_INTERPRET: the interpreter replaces the kernels when they are decorated.
Without modules it takes every module of kernels/ that has `compile_cases`. What compiled is kept (compile_cache.py) and
not compiled again; what failed is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import compile_cache

ROOT = Path(__file__).resolve().parents[2]
# Bytes of shared memory one block may ask for: CUDA C++ Programming Guide, "Technical specifications per compute
# capability".
SHARED_LIMIT = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Compiled:
    """shared_bytes a block; spills in bytes of local memory a thread; registers a thread; cached: found out before."""

    shared_bytes: int
    spills: int
    registers: int
    cached: bool = False


def compile_for(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    cc: int,
    num_warps: int = 4,
    num_stages: int = 1,
    **options: Any,
) -> Compiled:
    """Compile one kernel for compute capability `cc`, or say what came of it before. Signature as in `CompileCase`;
    options are Triton's."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: kind.partition(":")[0] for name, kind in signature.items()}
    attrs = {
        (i,): [["tt.divisibility", int(kind.partition(":")[2])]]
        for i, kind in enumerate(signature.values())
        if ":" in kind
    }
    source, target = ASTSource(kernel, types, constexprs, attrs), GPUTarget("cuda", cc, 32)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **options}
    key = compile_cache.key_of(source, target, options, Path(__file__).read_bytes())
    if kept := compile_cache.read(key):
        return Compiled(**kept, cached=True)
    compiled = triton.compile(source, target=target, options=options)
    registers, spills = _resources(compiled.asm["cubin"])
    found = {"shared_bytes": compiled.metadata.shared, "spills": spills, "registers": registers}
    compile_cache.write(key, found)
    return Compiled(**found)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack and local memory a thread), from the cuobjdump inside the triton package."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = subprocess.run(
            [tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True, timeout=60
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def modules() -> list[str]:
    """Modules of kernels/ that have compile cases; those without import nothing heavy here."""
    folder = ROOT / "kernels"
    with_cases = [path for path in folder.rglob("*.py") if "def compile_cases(" in path.read_text()]
    return sorted(".".join(path.relative_to(folder).with_suffix("").parts) for path in with_cases)


def subset(cases: list[Any], cc: int) -> list[Any]:
    """One case of each kernel, and another one on the next card."""
    by_kernel: dict[Any, list[Any]] = {}
    for case in cases:
        by_kernel.setdefault(case.kernel.fn, []).append(case)
    at = sorted(SHARED_LIMIT).index(cc)
    return [of_one[at * len(of_one) // len(SHARED_LIMIT)] for of_one in by_kernel.values()]


def _compile_module(job: tuple[str, int, bool]) -> list[dict[str, Any]]:
    name, cc, few = job
    results = []
    cases = importlib.import_module(f"lowvram_grpo.kernels.{name}").compile_cases(cc)
    for case in subset(cases, cc) if few else cases:
        found: dict[str, Any] = {"module": name, "case": case.name, "cc": cc}
        try:
            made = compile_for(case.kernel, case.signature, case.constexprs, cc, case.num_warps, case.num_stages)
            found |= asdict(made)
        except Exception as error:  # the report is about all cases, whatever one of them does
            found["error"] = f"{type(error).__name__}: {error}"
        results.append(found)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cc", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--subset", action="store_true", help="one case of each kernel on each architecture")
    parser.add_argument("modules", nargs="*")
    args = parser.parse_args()
    compile_cache.prune()
    jobs = [(name, cc, args.subset) for name in args.modules or modules() for cc in args.cc or SHARED_LIMIT]
    with ProcessPoolExecutor(args.jobs) as pool:
        for results in pool.map(_compile_module, jobs):
            for found in results:
                print(json.dumps(found), flush=True)


def environment() -> dict[str, str]:
    """That of a process in which kernels are compiled rather than interpreted."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


def run(*arguments: str) -> list[dict[str, Any]]:
    """What `main` prints, from such a process."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment(), capture_output=True, text=True, timeout=1800
    )
    if done.returncode:
        raise RuntimeError(f"the compile gate failed:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    main()
