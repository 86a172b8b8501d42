"""Hidden states whose softmax over a random head looks like that of a real model on its own samples.

What the sweep costs depends on how many vocabulary entries of a row carry probability, and random hidden states say
nothing about that: they are far more diffuse than any trained model. A row here is made in terms of its logits:

    background   N(0, 1.5^2) over the whole vocabulary, log-sum-exp b = ln V + 1.5^2 / 2
    peaks        K entries; the highest at b + margin, the others an exponential step apart
    target       drawn from the peaks with their probabilities, as a sampler would

and `margin` is what the profiles differ in. Measured on real models (their own samples, T = 1; design of the sweep):

    Qwen2.5-Coder-0.5B   entropy 0.39 nats, entries with p > 2^-16: mean 27, 95th percentile 113     -> peaked
    SmolLM2-135M         entropy 1.68 nats, mean 308, 95th percentile 1035                           -> mixed
    random weights       entropy near ln V                                                           -> diffuse
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BACKGROUND = 1.5
KEPT = 2.0**-16


class Shape(NamedTuple):
    """Vocabulary and width of a model's head."""

    vocab: int
    width: int


SHAPES = {
    "qwen2.5-0.5b": Shape(151936, 896),
    "qwen2.5-1.5b": Shape(151936, 1536),
    "qwen2.5-7b": Shape(152064, 3584),
    "llama3.1-8b": Shape(128256, 4096),
    "gemma3-1b": Shape(262144, 1152),
    # Other widths of one vocabulary, to find the one at which the fused path stops winning.
    "width-2048": Shape(151936, 2048),
    "width-2560": Shape(151936, 2560),
    "width-3072": Shape(151936, 3072),
    "width-4096": Shape(151936, 4096),
    "dry": Shape(331, 64),
}
MAIN_SHAPES = tuple(name for name in SHAPES if name != "dry" and not name.startswith("width-"))


class Profile(NamedTuple):
    """Peaks of a row: `margin` nats above the background for a sure row, `unsure_margin` for the share that is not."""

    peaks: int
    step: float
    margin: tuple[float, float]
    unsure: float
    unsure_margin: tuple[float, float]


PROFILES = {
    "peaked": Profile(5, 5.0, (4.0, 13.0), 0.1, (3.0, 4.0)),
    "mixed": Profile(24, 0.7, (1.5, 6.0), 0.3, (0.8, 1.8)),
    "diffuse": None,
}


class Inputs(NamedTuple):
    """weight (V, H), hidden (N, H) of `weight`'s dtype, targets (N,) int64."""

    weight: Tensor
    hidden: Tensor
    targets: Tensor


def head_weight(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=g, device=device) * 0.02).to(dtype)


def inputs_of(weight: Tensor, rows: int, profile: str, seed: int = 1) -> Inputs:
    """`rows` hidden states of `profile` under `weight`; the same seed gives the same rows on one kind of device."""
    vocab, width = weight.shape
    g = torch.Generator(weight.device).manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=g, device=weight.device)
    noise = torch.randn(rows, width, generator=g, device=weight.device)
    sample = weight[torch.randint(0, vocab, (min(vocab, 4096),), generator=g, device=weight.device)].float()
    square = sample.square().sum(1).mean()
    p = PROFILES[profile]
    if p is None:
        # Logits of standard deviation 1: a fresh head.
        targets = torch.randint(0, vocab, (rows,), generator=g, device=weight.device)
        return Inputs(weight, (noise / square.sqrt()).to(weight.dtype), targets)
    low, high = (torch.where(rand(rows, 1) < p.unsure, b, a) for a, b in zip(p.margin, p.unsure_margin))
    top = math.log(vocab) + BACKGROUND**2 / 2 + low + (high - low) * rand(rows, 1)
    steps = -p.step * rand(rows, p.peaks).clamp(min=1e-6).log()
    steps[:, 0] = 0
    heights = top - steps.cumsum(1)
    ids = torch.randint(0, vocab, (rows, p.peaks), generator=g, device=weight.device)
    hidden = torch.zeros_like(noise)
    for k in range(p.peaks):
        hidden += weight[ids[:, k]].float() * (heights[:, k, None].clamp(min=0) / square)
    # Peaks leak into the background, by 1 / sqrt(H) of their height; the noise makes up the rest of its spread.
    leak = hidden.square().sum(1, keepdim=True) * square / width
    hidden += noise * ((BACKGROUND**2 - leak).clamp(min=0) / square).sqrt()
    # The noise moved the peaks too, so their logits are read back before a target is drawn.
    for k in range(p.peaks):
        heights[:, k] = (hidden * weight[ids[:, k]].float()).sum(1)
    chosen = torch.multinomial(heights.softmax(1), 1, generator=g)
    return Inputs(weight, hidden.to(weight.dtype), ids.gather(1, chosen)[:, 0])


@torch.no_grad()
def measured(inputs: Inputs, rows: int = 256) -> dict[str, float]:
    """What the profile came to, on the first rows: entropy in nats, entries with p > 2^-16, log-prob of the target."""
    entropy, kept, target = [], [], []
    for r0 in range(0, min(rows, len(inputs.hidden)), 32):
        h, t = inputs.hidden[r0 : r0 + 32], inputs.targets[r0 : r0 + 32]
        logp = torch.log_softmax((h @ inputs.weight.T).float(), -1)
        entropy.append(-(logp.exp() * logp).sum(1))
        kept.append((logp > math.log(KEPT)).sum(1).float())
        target.append(logp.gather(1, t[:, None])[:, 0])
    entropy, kept, target = map(torch.cat, (entropy, kept, target))
    return {
        "entropy_mean": float(entropy.mean()),
        "entropy_p95": float(entropy.quantile(0.95)),
        "kept_mean": float(kept.mean()),
        "kept_p95": float(kept.quantile(0.95)),
        "kept_max": float(kept.max()),
        "logp_mean": float(target.mean()),
    }
