"""What the comparisons of the fused loss are worth: with one thing wrong they fail."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from loss_problems import check, fused, problem, select
from lowvram_grpo.kernels import grpo_loss as module
from lowvram_grpo.kernels import grpo_loss_kernel as kernel
from lowvram_grpo.kernels.grpo_loss import fused_grpo_loss

from lowvram_grpo.objective import Objective

BREAKS = {
    "sign of the advantage": lambda p, o: ({**p, "advantages": -p["advantages"]}, o),
    "no upper clip": lambda p, o: (p, Objective(beta=o.beta, epsilon=o.epsilon, epsilon_high=1e9)),
    "no KL": lambda p, o: (p, Objective(beta=0.0, epsilon=o.epsilon)),
    "k2 for k3": lambda p, o: (p, Objective(beta=o.beta, kl_estimator="k2")),
    "reference and old swapped": lambda p, o: ({**p, "ref_logps": p["old_logps"], "old_logps": p["ref_logps"]}, o),
    "sequence for token": lambda p, o: (p, Objective(beta=o.beta, importance_sampling_level="sequence")),
    "no factor": lambda p, o: ({**p, "factor": None}, o),
    "a factor of the KL": lambda p, o: ({**p, "weights": p["weights"] * p["factor"], "factor": None}, o),
    "a KL without its ratio": lambda p, o: (p, Objective(beta=o.beta, use_bias_correction_kl=False)),
    "another loss type": lambda p, o: (p, Objective(beta=o.beta, loss_type="sapo")),
    "one token more": lambda p, o: ({**p, "mask": torch.ones_like(p["mask"])}, o),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_comparison_fails_when_the_kernel_is_wrong(name):
    objective = Objective(beta=0.3)
    p = select(problem(), objective)
    check(p, objective)

    def broken(objective, **given):
        given, objective = BREAKS[name](given, objective)
        return fused_grpo_loss(**given, objective=objective)

    with pytest.raises(AssertionError):
        check(p, objective, op=broken)


SOURCE_BREAKS = {
    "the minimum's slope at a tie": ("0.5 * (free_slope + held_slope)", "free_slope + held_slope"),
    "the clamp's slope": ("tl.where((x >= -_LIMIT) & (x <= _LIMIT), ratio, 0.0)", "ratio"),
    "the row's length": ("tl.div_rn(of_ratio * ratio_slope, n)", "of_ratio * ratio_slope"),
    "the ratio's pull by the KL": ("pull += u * corrected * ratio_slope * kl", "pull += 0.0"),
    "the row's pull by the KL": ("corrected * beta * tl.sum(weighed_kl, 0)", "0.0"),
    "the gate's slope": ("-4.0 * a * gate * gate * other", "-4.0 * a * gate"),
    "cispo's bound": ("-tl.where(ratio > high, high, ratio) * a", "-ratio * a"),
    "the temperatures": ("tl.where(a > 0.0, high, low)", "tl.where(a > 0.0, low, high)"),
    "the sign of the detached": ("nothing - a", "nothing + a"),
    "delta before the count": ("counted = tl.where(ratio > delta, delta, ratio)", "counted = ratio"),
    "the KL's slope": ("slope = -(value + d)", "slope = value + d"),
    "the mask of the gradient": ("tl.where(m, pull, 0.0), mask=t < T", "pull, mask=t < T"),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", SOURCE_BREAKS)
def test_a_kernel_with_one_wrong_line_is_caught(name, tmp_path):
    """Copies of the modules with the kernel's line changed must fail the very checks that the modules pass."""
    right, wrong = SOURCE_BREAKS[name]
    source = Path(kernel.__file__).read_text()
    assert source.count(right) == 1
    _copied("broken_kernel", source.replace(right, wrong), tmp_path)
    source = Path(module.__file__).read_text()
    assert source.count(kernel.__name__) == 1
    source = source.replace(kernel.__name__, "broken_kernel")
    source = source.replace("lowvram_grpo::", f"broken_{list(SOURCE_BREAKS).index(name)}::")
    broken = _copied("broken_loss", source, tmp_path)
    with pytest.raises(AssertionError):
        _small_suite(broken.fused_grpo_loss)
    _small_suite(fused_grpo_loss)


def _copied(name, source, folder):
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = found = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def _small_suite(op) -> None:
    for level in ("token", "sequence"):
        objective = Objective(beta=0.3, importance_sampling_level=level, epsilon_high=1e9)
        p = select(problem(), objective)
        check(p, objective, op=op)
        check({**p, "old_logps": None}, objective, op=op)
        check({**p, "old_logps": p["logps"] - 25, "advantages": -p["advantages"].abs()}, objective, op=op)
        for extra in ({"loss_type": "sapo"}, {"loss_type": "vespo"}, {"loss_type": "cispo", "epsilon_high": 1.1},
                      {"delta": 1.1}):  # fmt: skip
            check(p, Objective(beta=0.3, importance_sampling_level=level, **extra), op=op)
        p["advantages"][1] = math.nan
        assert fused(p, objective, op=op)["d_logps"].isfinite().all()
