"""The weight of the entropy bonus: the number that was set, or one that keeps the policy's entropy at a target.

    L     = L_policy - c H,      H the mean entropy of the update's tokens
    c     = c_k  if H_(k-1) <= H_target,  else 0
    c_k+1 = min(c_k + delta, c_max)  if H_k <= H_target,  else max(c_k - delta, c_min)

The coefficient and the gate are those of the step before, so that all micro-batches of an update share them; before the
first step nothing is known, and the gate is shut.

Source: adaptive entropy control, Skywork-OR1, He et al. 2025 (arXiv:2505.22312), as TRL has it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowvram_grpo.recipe.config import GRPOConfig

# TRL's file and names in it.
_FILE = "entropy_ctrl_state.json"


@dataclass
class EntropyControl:
    """State of the bonus; `coef` and `last_entropy` (nats) move with each optimizer step where it is `adaptive`."""

    coef: float
    adaptive: bool = False
    low: float = 0.0
    high: float = 1.0
    delta: float = 0.005
    target: float = 0.2
    last_entropy: float = math.inf

    @property
    def applied(self) -> float:
        """What the loss of the step to come multiplies its entropy by."""
        return self.coef if not self.adaptive or self.last_entropy <= self.target else 0.0

    def step(self, entropy: float) -> dict[str, float]:
        """Take up the mean entropy of the update that was just learned from; the metric of the coefficient. NaN, of an
        update without a token, moves nothing."""
        if self.adaptive and not math.isnan(entropy):
            up = entropy <= self.target
            self.coef = min(self.coef + self.delta, self.high) if up else max(self.coef - self.delta, self.low)
            self.last_entropy = entropy
        return {"entropy_coef": self.coef}

    def save(self, folder: str) -> None:
        if self.adaptive:
            state = {"entropy_coef": self.coef, "last_world_entropy": self.last_entropy}
            (Path(folder) / _FILE).write_text(json.dumps(state), encoding="utf-8")

    def restore(self, folder: str) -> None:
        """From a checkpoint of a run that adapted it; others leave it as the settings have it."""
        path = Path(folder) / _FILE
        if self.adaptive and path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            self.coef, self.last_entropy = float(state["entropy_coef"]), float(state["last_world_entropy"])


def entropy_control_of(args: GRPOConfig) -> EntropyControl | None:
    """What a training configuration asks for; None where the loss has no entropy term."""
    if not args.entropy_bonus:
        return None
    return EntropyControl(
        args.entropy_coef, args.use_adaptive_entropy, args.entropy_coef_min, args.entropy_coef_max,
        args.entropy_coef_delta, args.entropy_target,
    )  # fmt: skip
