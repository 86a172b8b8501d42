"""Inputs for kernel tests: hidden states with the entropy profile of real models, and of fresh ones."""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.head import Head


def problem(n, v, h, dtype=torch.float32, *, bias=False, scale=1.0, softcap=None, spread=1.0, seed=0):
    """(hidden, head, targets) of random weights: rows are diffuse. One target at 0, one at V - 1."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g).to(dtype)
    weight = (torch.randn(v, h, generator=g) * spread / h**0.5).to(dtype)
    b = torch.randn(v, generator=g).to(dtype) if bias else None
    targets = torch.randint(0, v, (n,), generator=g)
    if n > 1:
        targets[0], targets[-1] = 0, v - 1
    return hidden, Head(weight, b, scale, softcap), targets


def peaked(n, v, h, dtype=torch.float32, *, confidence=1.0, seed=0, **extra):
    """As `problem`, but hidden states point at their target and some rivals, as a trained model's do on its samples.

    `confidence` 1: mean entropy about 0.6 nats at V = 151,936 (Qwen2.5-0.5B: 0.4 to 0.8); lower is more diffuse.
    """
    hidden, head, targets = problem(n, v, h, torch.float32, seed=seed, **extra)
    g = torch.Generator().manual_seed(seed + 1)
    w = head.weight
    unit = w.norm(dim=1).mean() ** 2
    gain = (17 + 10 * torch.rand(n, 1, generator=g)) * confidence
    hidden = w[targets] * gain / unit + 0.25 * hidden
    for _ in range(6):
        rival = w[torch.randint(0, v, (n,), generator=g)]
        hidden += rival * (gain + 8 * torch.rand(n, 1, generator=g).log()).clamp(min=0) / unit
    bias = None if head.bias is None else head.bias.to(dtype)
    return hidden.to(dtype), Head(w.to(dtype), bias, head.logit_scale, head.softcap), targets


def in_dtype(head: Head, dtype) -> Head:
    """A dense head in another dtype, detached."""
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return Head(head.weight.detach().to(dtype), bias, head.logit_scale, head.softcap)


def eager_and_compiled(step, hidden) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[(step(hidden), its gradient to hidden)] as it is, and under torch.compile."""
    results = []
    for run in (step, torch.compile(step, backend="aot_eager")):
        h = hidden.clone().requires_grad_()
        loss = run(h)
        loss.backward()
        results.append((loss.detach(), h.grad))
    return results
