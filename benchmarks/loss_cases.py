"""The GRPO loss from log-probs on: one launch beside the eager page that defines it, and beside that page compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lowvram_grpo.kernels.grpo_loss import fused_grpo_loss
from lowvram_grpo.kernels.runtime import interpreted
from timing import peak_mib, timed
from torch import Tensor

from lowvram_grpo.bench.rows import Rows, reason
from lowvram_grpo.objective import Objective, grpo_loss, token_weights

# (B, T): a micro-batch of an 8 GB card, of a 24 GB one, and one that fills any device.
SHAPES = [(8, 300), (64, 1024), (512, 2048)]
DRY_SHAPES = [(3, 37)]
ESTIMATORS = ("k3", "exact")


def _inputs(b: int, t: int, device: torch.device, estimator: str) -> dict[str, Tensor | Objective | None]:
    g = torch.Generator(device).manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g, device=device)
    logps = -draw(b, t).abs()
    lengths = torch.randint(t // 2, t + 1, (b, 1), generator=g, device=device)
    mask = torch.arange(t, device=device) < lengths
    kl = (0.1 * draw(b, t)).square() if estimator == "exact" else None
    return {
        "logps": logps.requires_grad_(),
        "old_logps": logps.detach() + 0.2 * draw(b, t),
        "ref_logps": logps.detach() + 0.1 * draw(b, t),
        "advantages": draw(b),
        "mask": mask,
        "weights": token_weights(mask, "dapo", t),
        "objective": Objective(kl_estimator=estimator),
        "kl": None if kl is None else kl.requires_grad_(),
    }


def _gradient(fn: Callable, inputs: dict) -> Tensor:
    inputs["logps"].grad = None
    fn(**inputs).loss.backward()
    return inputs["logps"].grad


def _exact(inputs: dict) -> Tensor:
    """The gradient in float64."""
    upcast = lambda x: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
    double = {name: upcast(x) for name, x in inputs.items()}
    double["logps"].requires_grad_()
    return _gradient(grpo_loss, double)


def bench_loss(out: Rows, device: torch.device, seconds: float, dry_run: bool, compiled: bool = False) -> None:
    """One row for each provider, shape and KL estimator; `compiled`: of what torch.compile makes too, which takes
    minutes, so it comes when all others have their rows."""
    known: dict[str, Callable] = {"ours-fused": fused_grpo_loss, "eager": grpo_loss}
    if compiled and device.type == "cuda":
        known["compiled"] = torch.compile(grpo_loss, dynamic=False)
    cases = [(b, t, estimator) for b, t in (DRY_SHAPES if dry_run else SHAPES) for estimator in ESTIMATORS]
    for names in (known.keys() - {"compiled"}, known.keys() & {"compiled"}):
        for b, t, estimator in cases:
            inputs = _inputs(b, t, device, estimator) if names else {}
            for name in sorted(names):
                fn = known[name]
                key = {
                    "op": "loss", "provider": name, "path": None, "shape": f"{b}x{t}", "tokens": b * t,
                    "dtype": "float32", "profile": estimator,
                }  # fmt: skip
                if not out.has(**key):
                    row = out.add(**key, **_measure(name, fn, inputs, device, seconds))
                    said = f"{row['ms']:9.4f} ms" if "ms" in row else row.get("missing") or row.get("error") or "failed"
                    print(f"loss   {key['shape']:9} {estimator:6} {name:12} {said}", flush=True)


def _measure(name: str, fn: Callable, inputs: dict, device: torch.device, seconds: float) -> dict:
    if name == "ours-fused" and device.type != "cuda" and not interpreted():
        return {"missing": "needs a GPU, or TRITON_INTERPRET=1"}
    try:
        exact = _exact(inputs)
        error = lambda g: float((g.double() - exact).norm() / exact.norm())
        eager, found = error(_gradient(grpo_loss, inputs)), error(_gradient(fn, inputs))
        row = {"error_grad": found, "eager": {"error_grad": eager}}
        if not found <= 2 * eager + 1e-6:
            return {**row, "gate": "failed", "gate_reason": f"error_grad {found:.2e} is above twice {eager:.2e}"}
        call = lambda: _gradient(fn, inputs)
        return {**row, "gate": "passed", "peak_mib": peak_mib(call, device), **timed(call, device, seconds)}
    except Exception as error:
        return {"error": reason(error)}
