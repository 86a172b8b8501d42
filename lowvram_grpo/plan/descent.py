"""Where a recipe does not fit, settings go down: a preset's ladder, on paper, until the predicted peak is within the
budget.

Only rungs that relieve the phase with the highest peak are taken, in the ladder's order, so that nothing is given up
that would not help. What a person set is never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ladder import IN_TURN, ON_CPU, Rung, relieves, saves
from lowvram_grpo.plan.paper import by_a_person, ladder_on_paper, setting, with_its_batch, with_setting
from lowvram_grpo.rewards.registry import is_model

if TYPE_CHECKING:
    from lowvram_grpo.plan.prediction import Prediction
    from lowvram_grpo.recipe.resolve import Recipe

# A rung that saves less of the peak is passed over.
_WORTH = 0.002
# Rungs that are tried before the bottom of the ladder is looked at.
_PATIENCE = 3
# Of the budget: where a peak is above, the bottom is looked at before any rung.
_FAR = 1.3
# Of the budget: where more is used, no rung is likely to be needless.
_FULL = 0.9


class Lowered(NamedTuple):
    """A recipe with the rungs that were taken, in order, and its prediction."""

    recipe: Recipe
    prediction: Prediction
    rungs: tuple[Rung, ...]


class Descender:
    """Looks for the first settings down the ladder of a recipe that fit.

    Args:
        predict: the planner's.
        experts: whether the model has some that can wait in host memory.
    """

    def __init__(self, predict: Callable[[Recipe], Prediction], experts: Callable[[], bool] = lambda: False):
        self.predict, self.experts = predict, experts
        self._refused: dict[tuple[str, Any], bool] = {}

    def descend(self, recipe: Recipe, budget: int) -> Lowered:
        """`recipe` itself where its peak is within `budget` bytes; with every rung that saves something where none of
        them fits."""
        left = _ladder(recipe)
        found = self.predict(recipe)
        if found.peak > budget:
            recipe = with_its_batch(recipe)
        first, tried = recipe, 0
        rungs: tuple[Rung, ...] = ()
        while found.peak > budget:
            needed = self._hopeless(recipe, found, left, budget)
            rung = needed or _next(recipe, found, left)
            # What is far too large is known at the bottom of the ladder, after a few rungs, not after all of them. And
            # where none relieves this phase by itself, all together may.
            far = tried == _PATIENCE or (not tried and found.peak > _FAR * budget)
            if rung is None or (far and not needed):
                bottom = self._bottom(recipe, left, rungs)
                if rung is None or bottom.prediction.peak > budget:
                    return bottom
            tried += 1
            left.remove(rung)
            if not self._possible(recipe, rung):
                continue
            lower = with_setting(recipe, rung.key, rung.value)
            after = self.predict(lower)
            # Reward models on the CPU have no phase.
            if found.peak - after.phases.get(found.peak_phase, 0) > _WORTH * found.peak:
                recipe, found = lower, after
                rungs = (*rungs, rung)
        return self._without_needless(first, Lowered(recipe, found, rungs), budget)

    def _hopeless(self, recipe: Recipe, found: Prediction, left: list[Rung], budget: int) -> Rung | None:
        """The rung of what alone fills the budget, weights in 16 bits or experts: no other gets anywhere without it."""
        if found.categories.get("base weights", 0) <= _FULL * budget:
            return None
        rungs = [rung for rung in left if rung.key in ("quantization", "expert_offload")]
        possible = (rung for rung in rungs if saves(rung.key, rung.value, setting(recipe, rung.key)))
        return next((rung for rung in possible if self._possible(recipe, rung)), None)

    def bottom(self, recipe: Recipe) -> Lowered:
        """With every rung of its ladder that saves something."""
        recipe = with_its_batch(recipe)
        return self._bottom(recipe, _ladder(recipe), ())

    def _possible(self, recipe: Recipe, rung: Rung) -> bool:
        """Whether the model has what the rung changes: MLPs that can be tiled, a head that NF4 can block, experts."""
        if rung.key == "expert_offload":
            return recipe.quantization == "nf4" and self.experts()
        if rung.key not in ("mlp_tile", "head_dtype"):
            return True
        kind = (rung.key, None if rung.key == "mlp_tile" else rung.value)
        if kind not in self._refused:
            try:
                self.predict(with_setting(recipe, rung.key, rung.value))
                self._refused[kind] = False
            except UserError:
                self._refused[kind] = True
        return not self._refused[kind]

    def _without_needless(self, first: Recipe, lowered: Lowered, budget: int) -> Lowered:
        """Rungs that a later, larger one made needless are given back: all of them, or the costliest first."""

        def with_rungs(rungs: tuple[Rung, ...]) -> Lowered:
            recipe = first
            for rung in rungs:
                recipe = with_setting(recipe, rung.key, rung.value)
            return Lowered(recipe, self.predict(recipe), rungs)

        before = lowered.rungs[:-1]
        if before and lowered.prediction.peak <= _FULL * budget:
            alone = with_rungs(lowered.rungs[-1:])
            if alone.prediction.peak <= budget:
                return alone
        for rung in reversed(before):
            if lowered.prediction.peak > _FULL * budget:
                break
            fewer = with_rungs(tuple(kept for kept in lowered.rungs if kept is not rung))
            lowered = fewer if fewer.prediction.peak <= budget else lowered
        return lowered

    def _bottom(self, recipe: Recipe, left: list[Rung], taken: tuple[Rung, ...]) -> Lowered:
        """With every rung that still saves something."""
        for rung in left:
            if self._possible(recipe, rung) and saves(rung.key, rung.value, setting(recipe, rung.key)):
                recipe, taken = with_setting(recipe, rung.key, rung.value), (*taken, rung)
        return Lowered(recipe, self.predict(recipe), taken)


def _ladder(recipe: Recipe) -> list[Rung]:
    """The preset's rungs; where there are reward models, bringing them to the card in turn comes before, since it costs
    next to nothing, and scoring on the CPU behind. What a person has set is no rung."""
    models = any(map(is_model, recipe.reward)) and not by_a_person(recipe, IN_TURN.key)
    rungs = [rung for rung in ladder_on_paper(recipe) if rung.key != "weight_offload"]  # `on_host` weighs that one
    return [*([IN_TURN] * models), *rungs, *([ON_CPU] * models)]


def _next(recipe: Recipe, found: Prediction, left: list[Rung]) -> Rung | None:
    helpful = (r for r in left if relieves(r, found.peak_phase))
    return next((r for r in helpful if saves(r.key, r.value, setting(recipe, r.key))), None)
