"""What weights that wait in host memory cost in time: modelled from bytes and a bus, never measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_grpo.plan.paper import paper_config, trains_all_weights
from lowvram_grpo.plan.speed import Choice, Speed, choice_of, shape_of
from lowvram_grpo.recipe.weight_offload import streamed_layers
from lowvram_grpo.training.rehearsal import workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowvram_grpo.memory.cards import Card
    from lowvram_grpo.recipe.resolve import Recipe

_GIB = 2**30
# Of a prefix of powers of two: nobody samples more at once.
_MOST = 4096


class Streaming(NamedTuple):
    """Of an optimizer step.

    Attributes:
        bytes: that a pass brings to the card.
        passes: of the reference, one a micro-batch.
        seconds: that these passes are longer than on the card.
        card: behind whose bus.
    """

    bytes: float
    passes: float
    seconds: float
    card: Card

    @property
    def words(self) -> str:
        """A sentence for people."""
        return (
            f"reference_offload: {self.bytes / _GIB:.2f} GiB go over the bus in each of {self.passes:g} passes a "
            f"step; predicted to take {self.seconds:.2f} s of it at {_speed(self.card)}, not measured."
        )

    def as_json(self) -> dict[str, Any]:
        return {"gib": round(self.bytes / _GIB, 3), "passes": self.passes, "predicted_seconds": round(self.seconds, 3)}


class Layers(NamedTuple):
    """Of decoder layers that are streamed.

    Attributes:
        streamed, of: so many of how many layers.
        bytes: that each pass brings to the card.
        seconds: that they are on their way.
        rows: completions that decode at once.
        tokens: a second that all of them are sampled with.
        free: at so many rows products take as long as the bus: up to there more of them cost no time.
        step, resident: seconds of an optimizer step with its rollout, and what it would take with all layers on a card
            that had the room.
        card: behind whose bus.
    """

    streamed: int
    of: int
    bytes: float
    seconds: float
    rows: int
    tokens: float
    free: int
    step: float
    resident: float
    card: Card

    @property
    def words(self) -> str:
        """Sentences for people."""
        many = f"up to {self.free} at once" if self.free < _MOST else f"{_MOST} at once, and more"
        if self.free > self.rows:
            worth = f"the bus is what they wait for, so {many} would cost no more time"
        else:
            worth = "products take longer than the bus, so streaming costs nothing"
        return (
            f"weight_offload: {self.streamed} of {self.of} layers wait in host memory, {self.bytes / _GIB:.2f} GiB "
            f"over the bus in each pass ({self.seconds:.2f} s at {_speed(self.card)}). Modelled, not measured: "
            f"{self.rows} completions at once are sampled at {self.tokens:.0f} tokens a second; {worth}. A step takes "
            f"about {self.step:.0f} s, {self.resident:.0f} s on a card that held all layers."
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "layers": self.streamed,
            "of": self.of,
            "gib_a_pass": round(self.bytes / _GIB, 3),
            "bus": self.card.bus_name,
            "bus_gb_a_second": round(self.card.bus / 1e9, 2),
            "seconds_a_pass": round(self.seconds, 4),
            "completions_at_once": self.rows,
            "tokens_a_second": round(self.tokens, 1),
            "completions_worth_while": self.free,
            "modelled_step_seconds": round(self.step, 1),
            "modelled_step_seconds_resident": round(self.resident, 1),
        }


def _speed(card: Card) -> str:
    return f"{card.bus / 1e9:.1f} GB/s ({card.bus_name})"


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
    return Streaming(speed.streamed_bytes, passes, passes * speed.exposed(rows), card)


def layers_of(
    recipe: Recipe, config: PretrainedConfig, card: Card, half: str, longest_prompt: int | None = None
) -> Layers | None:
    """For a recipe whose layers are streamed; None where none are."""
    args = paper_config(recipe)
    of = config.get_text_config().num_hidden_layers
    count = streamed_layers(args.weight_offload, of)
    if not count or trains_all_weights(recipe):
        return None
    speed = Speed(shape_of(config), workload(args, config, longest_prompt), args, card, half)
    choice = choice_of(recipe, args, of)
    rows = min(choice.rollout_batch_size, speed.work.completions)
    seconds = speed.over_the_bus(choice)
    return Layers(
        count, of, count * speed.layer_bytes(choice), seconds, rows, rows / speed.decode(rows, choice),
        _worth(speed, choice, seconds), speed.step(choice), speed.step(choice._replace(weight_offload=0)), card,
    )  # fmt: skip


def _worth(speed: Speed, choice: Choice, seconds: float) -> int:
    """The most rows whose decode step takes no longer than the bus."""
    resident = choice._replace(weight_offload=0)
    fits = lambda rows: speed.decode(rows, resident) <= seconds
    low, high = 0, _MOST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
