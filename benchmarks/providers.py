"""Who computes: our three paths and the rivals, each as a function of one problem.

A rival is imported when it is asked for. One that is not installed, or that cannot run here, is `Unavailable` with the
reason, and becomes a row that says so.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.linear_logps import linear_logps
from lowvram_grpo.kernels.sweep.launch import PATHS, launch_config
from torch import Tensor

OURS = tuple(f"ours-{path}" for path in PATHS)
RIVALS = ("eager", "trl", "unsloth", "cce", "torch-lce", "liger")
# By torch.compile: minutes of a run that has few. `compiled` is loss_cases.py's.
COMPILED = ("liger-compiled", "compiled")
# Sequences that the rows are taken to come from, for providers that want (B, T).
SEQUENCES = 8


class Unavailable(Exception):
    """A provider that cannot be measured here, and why."""


@dataclass
class Problem:
    """hidden, ref_hidden (N, H); head; dense: its weight (V, H) as eager code would have it; targets (N,);
    c, e (N,): dL/dlogp, dL/dkl; advantages (B,): c is -advantage of the row's sequence."""

    hidden: Tensor
    ref_hidden: Tensor
    head: Head
    dense: Tensor
    targets: Tensor
    c: Tensor
    e: Tensor
    advantages: Tensor

    def rows(self, ids: list[int]) -> Problem:
        """Some rows as a problem of their own; `advantages` no longer fit and are left."""
        cut = lambda x: x.detach()[ids].clone()
        return Problem(
            cut(self.hidden).requires_grad_(), cut(self.ref_hidden), self.head, self.dense, cut(self.targets),
            cut(self.c), cut(self.e), self.advantages,
        )  # fmt: skip


class Outcome(NamedTuple):
    """(N,) logps and kl, None where the provider does not say; `diffuse`: rows that took the dense product."""

    logps: Tensor | None
    kl: Tensor | None = None
    diffuse: int | None = None


def _step(p: Problem, out: Outcome) -> Outcome:
    loss = (out.logps * p.c).sum()
    if out.kl is not None:
        loss = loss + (out.kl * p.e).sum()
    loss.backward()
    return Outcome(out.logps.detach(), None if out.kl is None else out.kl.detach(), out.diffuse)


def _ours(p: Problem, op: str, path: str) -> Outcome:
    direction = "dense" if op == "dense" else "auto"
    extra = {"ref_hidden": p.ref_hidden, "kl": True} if op == "kl" else {}
    out = linear_logps(p.hidden, p.head, p.targets, direction=direction, path=path, **extra)
    return Outcome(out.logps, out.kl, None if out.diffuse is None else len(out.diffuse))


def _eager(p: Problem, op: str) -> Outcome:
    """16-bit logits, their log-softmax in float32: what a trainer without a fused head does."""
    weight = p.dense
    if not p.head.dense:
        # Whoever keeps a quantized head without a fused one dequantizes all of it at every call.
        v, h = p.head.shape
        weight = p.head.tile(0, v, p.hidden.new_empty(v, h))[0]
    logp = torch.log_softmax((p.hidden @ weight.T).float(), -1)
    logps = logp.gather(1, p.targets[:, None])[:, 0]
    if op != "kl":
        return Outcome(logps)
    with torch.no_grad():
        ref = torch.log_softmax((p.ref_hidden @ weight.T).float(), -1)
    return Outcome(logps, (logp.exp() * (logp - ref)).sum(1))


def _trl() -> Callable[[Problem], Outcome]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    # The vocabulary tile that its trainer uses; no optional outputs.
    return lambda p: Outcome(
        ChunkedLogProbFunction.apply(p.hidden, p.dense, None, p.targets, 1.0, 32768, None, 1.0, ())[0]
    )


def _unsloth() -> Callable[[Problem], Outcome]:
    """Its one file alone: importing the package patches transformers."""
    name = "rival_unsloth_fused_linear"
    if name not in sys.modules:
        found = importlib.util.find_spec("unsloth_zoo")
        if found is None:
            raise Unavailable("unsloth_zoo is not installed")
        file = Path(found.submodule_search_locations[0], "fused_losses", "fused_linear.py")
        spec = importlib.util.spec_from_file_location(name, file)
        # The file asks the package for a memory budget when it runs; told that there is none, it takes its default.
        sys.modules.setdefault("unsloth_zoo", None)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    logprobs = sys.modules[name].fused_linear_logprobs

    def run(p: Problem) -> Outcome:
        out = logprobs(p.hidden, p.dense, p.targets, temperature=1.0)
        return Outcome(out[0] if isinstance(out, tuple) else out)

    return run


def _cce() -> Callable[[Problem], Outcome]:
    from cut_cross_entropy import linear_cross_entropy

    if not torch.cuda.is_available():
        raise Unavailable("needs a GPU")
    return lambda p: Outcome(-linear_cross_entropy(p.hidden, p.dense, p.targets, reduction="none").float())


def _torch_lce() -> Callable[[Problem], Outcome]:
    try:
        from torch.nn import LinearCrossEntropyOptions
    except ImportError:
        raise Unavailable(f"torch {torch.__version__} has no LinearCrossEntropyOptions") from None
    lce, options = torch.nn.functional.linear_cross_entropy, LinearCrossEntropyOptions()
    return lambda p: Outcome(-lce(p.hidden, p.dense, p.targets, reduction="none", options=options).float())


def _liger(compiled: bool = False) -> Callable[[Problem], Outcome]:
    """It yields the GRPO loss, not log-probs: without old log-probs and KL the gradient is -advantage / N a token."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", compiled=compiled)

    def run(p: Problem) -> Outcome:
        b, n = len(p.advantages), len(p.targets)
        shape = lambda x: x.view(b, -1, *x.shape[1:])
        advantages = p.advantages * n  # back to the gradient that all others are asked for
        out = loss(shape(p.hidden), p.dense, shape(p.targets), torch.ones_like(shape(p.targets)), advantages)
        out[0].backward()
        return Outcome(None)

    return run


_BUILDERS = {"trl": _trl, "unsloth": _unsloth, "cce": _cce, "torch-lce": _torch_lce, "liger": _liger,
             "liger-compiled": lambda: _liger(compiled=True)}  # fmt: skip


def names_for(op: str) -> tuple[str, ...]:
    """Providers of an operation; those without it have nothing to say about it."""
    if op in ("train", "score"):
        return (*OURS, *RIVALS, "liger-compiled")
    # A rival's gradient direction is always the dense one: its times are those of `train`.
    return OURS if op == "dense" else (*OURS, "eager")


def provider(name: str, op: str, device: torch.device, dtype: torch.dtype, width: int) -> Callable[[Problem], Outcome]:
    """One whole call: log-probs and, but for `score`, the backward pass into `problem.hidden.grad`.

    Raises:
        Unavailable: not here.
    """
    if name in OURS:
        path = name.removeprefix("ours-")
        try:
            launch_config(device, dtype, width, has_ref=op == "kl", path=path)
        except ValueError as error:
            raise Unavailable(str(error)) from None
        forward = lambda p: _ours(p, op, path)
    elif name == "eager":
        forward = lambda p: _eager(p, op)
    else:
        if name.startswith("liger") and op == "score":
            raise Unavailable("has no log-probs without a loss")
        try:
            forward = _BUILDERS[name]()
        except ImportError as error:
            raise Unavailable(f"cannot be imported: {error}"[:200]) from None
    if op == "score":

        def score(p: Problem) -> Outcome:
            with torch.no_grad():
                return forward(p)

        return score

    def train(p: Problem) -> Outcome:
        p.hidden.grad = None
        out = forward(p)
        return out if name.startswith("liger") else _step(p, out)

    return train
