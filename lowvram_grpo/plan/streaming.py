"""What a reference that waits in host memory costs in time: modelled from bytes and a bus, never measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_grpo.plan.paper import paper_config
from lowvram_grpo.plan.speed import BUS, Speed, shape_of
from lowvram_grpo.training.rehearsal import workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowvram_grpo.memory.cards import Card
    from lowvram_grpo.recipe.resolve import Recipe


class Streaming(NamedTuple):
    """Of an optimizer step.

    Attributes:
        bytes: that a pass brings to the card.
        passes: of the reference, one a micro-batch.
        seconds: that these passes are longer than on the card.
    """

    bytes: float
    passes: float
    seconds: float

    @property
    def words(self) -> str:
        """A sentence for people."""
        return (
            f"reference_offload: {self.bytes / 2**30:.2f} GiB go over the bus in each of {self.passes:g} passes a "
            f"step; predicted to take {self.seconds:.2f} s of it at {BUS / 1e9:g} GB/s, not measured."
        )

    def as_json(self) -> dict[str, Any]:
        return {"gib": round(self.bytes / 2**30, 3), "passes": self.passes, "predicted_seconds": round(self.seconds, 3)}


def streaming_of(recipe: Recipe, config: PretrainedConfig, card: Card, half: str) -> Streaming | None:
    """For a recipe whose reference is streamed; None where it has no reference."""
    args = paper_config(recipe)
    if not args.beta > 0:
        return None
    work, plan = workload(args, config), args.batch_plan()
    speed = Speed(shape_of(config), work, args, card, half, trained=True)
    updates = plan.updates_per_rollout
    # A rollout is scored once, however many steps it serves.
    passes = -(-speed.per_update // work.micro_batch) * updates / plan.steps_per_rollout
    rows = min(work.micro_batch, speed.per_update)
    return Streaming(speed.streamed_bytes, passes, passes * speed.exposed(rows))
