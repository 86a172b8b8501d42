"""Predicted peak of each phase of a training step, for a model that exists only as a configuration.

`counting` rehearses the longest step on meta tensors. Decoder layers are alike, so a model of many is counted at two
smaller depths: bytes are affine in the number of layers (tests/plan/test_prediction.py holds that against the whole
model), and a prediction takes a second, not ten. What the ledger cannot see, `memory.overheads` adds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lowvram_grpo.memory.ladder import PHASES
from lowvram_grpo.memory.ledger import Peak
from lowvram_grpo.memory.overheads import Overheads
from lowvram_grpo.plan.counting import Blueprint, count
from lowvram_grpo.plan.depth import cut, period_of

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
    """

    phases: dict[str, int]
    categories: dict[str, int] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)

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
    if exact or depth <= high:
        peaks = count(blueprint, args)
    else:
        small, large = (count(replace(blueprint, config=cut(blueprint.config, n)), args) for n in (low, high))
        peaks = {name: _line(small[name], large[name], (depth - low) / (high - low)) for name in small}
    # Each of these is two straight lines, and which of them is higher depends on the depth.
    for part, phase in _PARTS.items():
        peaks[phase] = max(peaks.pop(part), peaks[phase], key=lambda peak: peak.bytes)
    return _with_overheads(peaks, blueprint.overheads, _widths(blueprint, args), depth)


def _line(small: Peak, large: Peak, steps: float) -> Peak:
    at = lambda a, b: round(a + (b - a) * steps)
    names = small.categories.keys() | large.categories.keys()
    categories = {n: at(small.categories.get(n, 0), large.categories.get(n, 0)) for n in names}
    return Peak(at(small.bytes, large.bytes), categories)


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
