"""Predicted peak of each phase of a training step, for a model that exists only as a configuration.

`counting` rehearses the longest step on meta tensors. Decoder layers are alike, so a model of many is counted at two
smaller depths: bytes are affine in the number of layers (tests/plan/test_prediction.py holds that against the whole
model), and a prediction takes a second, not ten. What the ledger cannot see, `memory.overheads` adds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from lowvram_grpo.memory.host import locked_size
from lowvram_grpo.memory.ladder import PHASES
from lowvram_grpo.memory.ledger import Peak
from lowvram_grpo.memory.overheads import Overheads
from lowvram_grpo.plan.counting import Blueprint, Counted, counted
from lowvram_grpo.plan.depth import cut, period_of
from lowvram_grpo.policy.packed import together
from lowvram_grpo.policy.weight_stream import streamed_indices
from lowvram_grpo.recipe.weight_offload import AUTO, streamed_layers

if TYPE_CHECKING:
    from lowvram_grpo.recipe.config import GRPOConfig

# Phases that are counted in two parts.
_PARTS = {"adapter": "load", "prefill": "rollout"}
WEIGHTS = ("base weights", "head", "adapter", "streamed weights", "reference", "gradients", "optimizer")


class CannotPredict(Exception):
    """The model or its quantization is none that can be built on meta tensors; the message is a phrase for people."""


@dataclass(frozen=True)
class Prediction:
    """Bytes of device memory, overheads included.

    Attributes:
        phases: peak of each phase.
        categories: what the highest of them is made of.
        parts: what each of them is made of.
        host: bytes of host memory, by what they are; no part of the others.
        layers: where all decoder layers are streamed, what each of them would take on the device, and takes at home.
        locked: what lies at home is page-locked, in pieces of PyTorch's.
    """

    phases: dict[str, int]
    categories: dict[str, int] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    layers: tuple[tuple[int, int], ...] = ()
    locked: bool = False

    @property
    def on_host(self) -> int:
        """Bytes of host memory in all."""
        return sum(self.host.values())

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.__getitem__)


def predict(blueprint: Blueprint, args: GRPOConfig, *, exact: bool = False) -> Prediction:
    """Peaks of the longest step that `args` allow. `exact` runs all layers, however many."""
    if blueprint.quantization not in ("none", "nf4"):
        raise CannotPredict(f"weights in {blueprint.quantization} are not counted")
    config = blueprint.config.get_text_config()
    depth, period = config.num_hidden_layers, period_of(config)
    # Where activations go to host memory, up to three layers are in flight at once.
    least = 4 if args.activation_offload else 2
    low = -(-least // period) * period
    high = low + period
    # Of how many are streamed everything but what the others take is independent: they are all streamed, then added.
    streamed = streamed_layers(args.weight_offload, depth)
    if streamed and not exact:
        args = copy.copy(args)
        args.weight_offload = AUTO
    if exact or depth <= high:
        found = counted(blueprint, args)
    else:
        small, large = (counted(replace(blueprint, config=cut(blueprint.config, n)), args) for n in (low, high))
        found = _deep(small, large, (depth - low) / (high - low), depth, period)
    peaks = dict(found.phases)
    # Each of these is two straight lines, and which of them is higher depends on the depth.
    for part, phase in _PARTS.items():
        peaks[phase] = max(peaks.pop(part), peaks[phase], key=lambda peak: peak.bytes)
    whole = _with_overheads(peaks, blueprint.overheads, _widths(blueprint, args), depth)
    whole = replace(whole, host=found.host, layers=found.layers, locked=blueprint.device == "cuda")
    return with_streamed(whole, streamed) if streamed and not exact else whole


def with_streamed(whole: Prediction, count: int) -> Prediction:
    """Of a prediction with all decoder layers streamed, the one with so many (at least one): the others lie on the
    device in every phase, and no longer in host memory."""
    indices = streamed_indices(len(whole.layers), count)
    size = sum(size for i, (size, _) in enumerate(whole.layers) if i not in set(indices))
    homes = [_Home(home) for _, home in whole.layers]
    waiting = [homes[i] for i in indices]
    host = {**whole.host, "weights": _at_home(waiting, whole.locked)}
    if not size:
        return replace(whole, host=host)
    window = _window(waiting) - _window(homes)  # which is less where a single layer is streamed, or smaller ones

    def with_the_others(parts: dict[str, int]) -> dict[str, int]:
        held = "streamed weights" in parts  # not while loading
        more = {"streamed weights": parts["streamed weights"] + window} if held else {}
        return {**parts, "base weights": parts.get("base weights", 0) + size, **more}

    parts = {name: with_the_others(made_of) for name, made_of in whole.parts.items()}
    phases = {
        name: peak + size + window * ("streamed weights" in whole.parts[name]) for name, peak in whole.phases.items()
    }
    peak = max(phases, key=phases.__getitem__)
    return replace(whole, phases=phases, categories=parts[peak], parts=parts, host=host, layers=())


def _window(layers: Sequence[_Home]) -> int:
    """Bytes of the slots on the device."""
    return min(2, len(layers)) * max(layer.bytes for layer in layers)


class _Home(NamedTuple):
    """A streamed layer's bytes in host memory."""

    bytes: int


def _at_home(layers: Sequence[_Home], locked: bool) -> int:
    """Bytes of the pieces of host memory that layers share."""
    pieces = [sum(layer.bytes for layer in group) for group in together(layers)]
    return sum(map(locked_size, pieces)) if locked else sum(pieces)


def fewest_streamed(whole: Prediction, budget: int) -> int | None:
    """With how many streamed layers at the least, of a prediction with all of them streamed, the peak is within
    `budget` bytes; None where it is above with all."""
    if whole.peak > budget:
        return None
    low, high = 1, len(whole.layers)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if with_streamed(whole, middle).peak <= budget else (middle + 1, high)
    return low


def _line(small: Peak, large: Peak, steps: float) -> Peak:
    at = lambda a, b: round(a + (b - a) * steps)
    names = small.categories.keys() | large.categories.keys()
    categories = {n: at(small.categories.get(n, 0), large.categories.get(n, 0)) for n in names}
    return Peak(at(small.bytes, large.bytes), categories)


def _deep(small: Counted, large: Counted, steps: float, depth: int, period: int) -> Counted:
    """On the line through both, so many times the way from one to the other."""
    peaks = {name: _line(small.phases[name], large.phases[name], steps) for name in small.phases}
    names = small.host.keys() | large.host.keys()
    at = lambda name: (small.host.get(name, 0), large.host.get(name, 0))
    host = {name: round(a + (b - a) * steps) for name in names for a, b in [at(name)]}
    layers = tuple(small.layers[i % period] for i in range(depth)) if small.layers else ()
    return Counted(peaks, host, layers)


def _widths(blueprint: Blueprint, args: GRPOConfig) -> int:
    """Numbers of rows that decode steps are captured for: each time that half of the rows have ended."""
    if blueprint.device != "cuda" or args.use_vllm:
        return 0
    completions = args.batch_plan().completions_per_rollout
    return min(args.rollout_batch_size or completions, completions).bit_length()


def _with_overheads(peaks: dict[str, Peak], extra: Overheads, widths: int, layers: int) -> Prediction:
    """`widths` decode steps of `layers` layers are captured in a rollout."""
    beside = dict.fromkeys(PHASES, extra.context + extra.cublas)
    for name in PHASES[1:] if widths else ():
        beside[name] += extra.graph_workspaces * extra.cublas
    graphs = {"rollout": widths * layers * extra.graph_layer}

    def slack(peak: Peak) -> int:
        moving = peak.bytes - sum(peak.categories.get(name, 0) for name in WEIGHTS)
        return round(moving * extra.fragmentation)

    def parts(name: str, peak: Peak) -> dict[str, int]:
        more = {"CUDA context": beside[name], "CUDA graphs": graphs.get(name, 0), "fragmentation": slack(peak)}
        return {name: size for name, size in {**peak.categories, **more}.items() if size}

    peaks = {name: peaks[name] for name in PHASES}
    made_of = {name: parts(name, peak) for name, peak in peaks.items()}
    phases = {name: peak.bytes + slack(peak) + beside[name] + graphs.get(name, 0) for name, peak in peaks.items()}
    return Prediction(phases, made_of[max(phases, key=phases.__getitem__)], made_of)
