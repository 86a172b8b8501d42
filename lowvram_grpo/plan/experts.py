"""Experts in host memory: how many of a layer wait there, and what fetching them costs in time, modelled from bytes and
a bus, never measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_grpo.plan.paper import paper_config, setting, with_setting
from lowvram_grpo.policy.expert_store import CATEGORY
from lowvram_grpo.recipe.expert_offload import AUTO, OFF, waiting_experts

if TYPE_CHECKING:
    from lowvram_grpo.memory.cards import Card
    from lowvram_grpo.plan.prediction import Prediction
    from lowvram_grpo.policy.experts import ExpertLayer
    from lowvram_grpo.recipe.resolve import Recipe

KEY = "expert_offload"
# Of the budget: what places for experts may fill. They only buy time, and nothing takes them away in a run.
_FULL = 0.9


def with_places(recipe: Recipe, found: Prediction, layers: list[ExpertLayer], budget: int) -> tuple[Recipe, Prediction]:
    """A recipe whose `expert_offload` is auto with a number in its place, the fewest experts of a layer without a place
    with which the prediction stays within the budget; with `off` where all have one. Others unchanged.

    Args:
        found: of the recipe as it is, with all experts waiting.
        layers: the model's.
    """
    if setting(recipe, KEY) != AUTO or not layers or found.peak > budget:
        return recipe, found
    experts = max(layer.experts for layer in layers)
    # What a place takes in every phase; the second is of a layer that has no experts left without one.
    size = lambda places: sum(min(places, layer.experts) * layer.bytes for layer in layers)
    if found.peak + size(experts) <= budget:
        whole = _with(found, size(experts))
        host = {name: size for name, size in found.host.items() if name != "weights"}
        return with_setting(recipe, KEY, OFF), replace(whole, host=host)
    room = max(found.peak, _FULL * budget)
    places = next(n for n in range(experts, -1, -1) if found.peak + size(n) <= room)
    return with_setting(recipe, KEY, experts - places), _with(found, size(places))


def _with(found: Prediction, size: int) -> Prediction:
    """`found` with so many bytes more in each phase."""
    more = lambda parts: {**parts, CATEGORY: parts.get(CATEGORY, 0) + size}
    return replace(
        found,
        phases={name: peak + size for name, peak in found.phases.items()},
        categories=more(found.categories),
        parts={name: more(made_of) for name, made_of in found.parts.items()},
    )


class Fetching(NamedTuple):
    """What experts in host memory cost.

    Attributes:
        waiting, experts: of a layer, those without a place on the card, and all.
        host: bytes in host memory, of all experts.
        training: bytes that a pass of training brings to the card, where it uses every expert.
        decoding: bytes that a token for each of `rows` completions brings, were experts chosen evenly.
        rows: completions that decode at once.
        card: whose bus it is.
    """

    waiting: int
    experts: int
    host: float
    training: float
    decoding: float
    rows: int
    card: Card

    @property
    def tokens_a_second(self) -> float:
        """That the bus lets through while sampling."""
        return self.rows * self.card.bus / self.decoding if self.decoding else float("inf")

    @property
    def words(self) -> str:
        """A sentence for people."""
        gib = lambda size: f"{size / 2**30:.2f} GiB"
        return (
            f"expert_offload: {self.waiting} of {self.experts} experts a layer wait in host memory "
            f"({gib(self.host)} there); a training pass brings up to {gib(self.training)} over the bus "
            f"({self.training / self.card.bus:.1f} s), a token for each of {self.rows} completions "
            f"{gib(self.decoding)} if experts are chosen evenly: {self.tokens_a_second:.0f} tokens a second at most, "
            f"predicted at {self.card.bus / 1e9:.0f} GB/s ({self.card.bus_name}), not measured; more completions at "
            "once share what is fetched."
        )

    def as_json(self) -> dict[str, Any]:
        gib = lambda size: round(size / 2**30, 3)
        return {
            "waiting": self.waiting, "experts": self.experts, "host_gib": gib(self.host),
            "training_pass_gib": gib(self.training), "decode_step_gib": gib(self.decoding), "rows": self.rows,
            "predicted_tokens_a_second": round(self.tokens_a_second, 1),
        }  # fmt: skip


def fetching_of(recipe: Recipe, layers: list[ExpertLayer], card: Card) -> Fetching | None:
    """For a recipe whose experts wait in host memory; None for all others."""
    if setting(recipe, KEY) == OFF or recipe.quantization != "nf4" or not layers:
        return None
    args = paper_config(recipe)
    completions = args.batch_plan().completions_per_rollout
    rows = min(args.rollout_batch_size or completions, completions)
    host = training = decoding = 0.0
    for experts, chosen, size in layers:
        waiting = waiting_experts(args.expert_offload, experts)
        host += experts * size
        training += waiting * size
        decoding += waiting * size * (1 - (1 - chosen / experts) ** rows)
    experts = max(layer.experts for layer in layers)
    return Fetching(waiting_experts(args.expert_offload, experts), experts, host, training, decoding, rows, card)
