"""python -m tests.masked_cuda.compiled LAUNCHES CC: are the launches of a masked run among the compile gate's cases?

A launch is one of them where a module's `compile_cases` names its kernel and, parameter by parameter, has a case with
the same type (or absence), the same switch and as many warps. Sizes of a model (head widths, hidden sizes) differ from
launch to launch, so what the project's own commands and trainer launched (not what tests/gpu did, in every dtype) is
compiled here too, for CC, and must fit that card's shared memory. Prints {"compiled": how many, "bad": sentences}.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]
import gate  # noqa: E402


def cases_of(cc: int) -> dict[tuple[str, str], list[Any]]:
    """All cases of the gate by (module, kernel)."""
    found: dict[tuple[str, str], list[Any]] = {}
    for name in gate.modules():
        for case in importlib.import_module(f"lowvram_grpo.kernels.{name}").compile_cases(cc):
            found.setdefault((case.kernel.fn.__module__, case.kernel.fn.__name__), []).append(case)
    return found


def bare(kind: str) -> str:
    """A type without what is known of its divisibility."""
    return kind.partition(":")[0]


def switches(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is None or isinstance(value, (bool, str))}


def strangers(launch: dict[str, Any], cases: list[Any]) -> list[str]:
    """What of a launch is in none of the kernel's cases."""
    types, constants = dict(launch["types"]), dict(launch["constants"])
    found = []
    for name, kind in types.items():
        known = {bare(case.signature[name]) for case in cases} - {"constexpr"}
        if bare(kind) not in known:
            found.append(f"{name} is {kind}, not {' or '.join(sorted(known)) or 'absent'}")
    for name, value in switches(constants).items():
        known = [case.constexprs.get(name, "there") for case in cases]
        if value not in known:
            found.append(f"{name} is {value}, not {' or '.join(sorted(set(map(str, known))))}")
    warps = {(case.num_warps, case.num_stages) for case in cases}
    if launch["num_warps"] not in {w for w, _ in warps}:
        found.append(f"{launch['num_warps']} warps, not {' or '.join(str(w) for w, _ in sorted(warps))}")
    return found


def main(path: str, cc: int) -> None:
    known, bad, compiled = cases_of(cc), [], set()
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        launch = json.loads(line)
        name = f"{launch['module'].rpartition('.')[2]}.{launch['kernel']} at {launch['where']}"
        cases = known.get((launch["module"], launch["kernel"]))
        if cases is None:
            bad.append(f"{name}: no module has compile cases for this kernel")
            continue
        bad += [f"{name}: {what}" for what in strangers(launch, cases)]
        if launch["test"].startswith("tests/gpu/"):
            continue
        kernel = cases[0].kernel
        types, constants = dict(launch["types"]), dict(launch["constants"])
        signature = {p: bare(types[p]) if p in types else "constexpr" for p in inspect.signature(kernel.fn).parameters}
        stages = launch["num_stages"] or 3  # Triton's own
        key = json.dumps([launch["kernel"], signature, constants, launch["num_warps"], stages], sort_keys=True)
        if key in compiled:
            continue
        compiled.add(key)
        try:
            made = gate.compile_for(kernel, signature, constants, cc, launch["num_warps"], stages)
            if made.shared_bytes > gate.SHARED_LIMIT[cc]:
                bad.append(f"{name}: {made.shared_bytes} bytes of shared memory")
        except Exception as error:
            bad.append(f"{name}: {type(error).__name__}: {str(error)[-400:]}")
    print(json.dumps({"compiled": len(compiled), "bad": list(dict.fromkeys(bad))}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
