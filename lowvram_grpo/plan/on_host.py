"""Where no saver is enough: decoder layers wait in host memory (`weight_offload`), and what is then fastest.

A streamed layer costs its way over the bus in each pass, however many completions the pass is for. So what the ladder
has given up to get here, small batches above all, is looked at anew: each saver and each batch is worth what it does to
the number of layers that have to go, and to the number of passes. All of that is modelled (`speed`); the number of
layers is the prediction's, which is a straight line in it (`prediction.with_streamed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ladder import Rung, saves
from lowvram_grpo.plan.climb import Climb
from lowvram_grpo.plan.guess import Guess
from lowvram_grpo.plan.paper import by_a_person, ladder_on_paper, paper_config, setting, with_its_batch, with_setting
from lowvram_grpo.plan.prediction import WEIGHTS, fewest_streamed, with_streamed
from lowvram_grpo.plan.speed import Choice, Speed, choice_of, shape_of
from lowvram_grpo.recipe.weight_offload import AUTO, OFF
from lowvram_grpo.training.rehearsal import workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowvram_grpo.memory.cards import Card
    from lowvram_grpo.plan.prediction import Prediction
    from lowvram_grpo.recipe.resolve import Recipe

_ALL = Rung("weight_offload", AUTO)
_BATCHES = ("rollout_batch_size", "per_device_train_batch_size")
# Rungs that a base in 4 bits begins with: nothing is streamed that could be smaller.
_BASE = ("quantization", "embedding_offload", "head_dtype")
# Of a ladder, what computes the same numbers in less memory.
_EXACT = ("activation_offload", "mlp_tile")
# A cache of half the size, but for its scales.
_INT8_CACHE = 0.53
# Of a step's time, what a saver must be worth; what rounds must be worth more.
_SAVER, _ROUNDS = 0.02, 0.05
# Predictions that are taken beside those of the variants.
_TRIES = 3


class Balanced(NamedTuple):
    """Settings with streamed layers that fit.

    Attributes:
        recipe: with all that was changed, and the number of layers.
        prediction: its own.
        lowered: what takes less memory now, the streamed layers last.
        raised: what takes more.
    """

    recipe: Recipe
    prediction: Prediction
    lowered: tuple[Rung, ...]
    raised: tuple[Climb, ...]


class _Variant(NamedTuple):
    """A recipe with some savers, all layers streamed, its prediction, and what a step's time is multiplied by for what
    it does not say."""

    recipe: Recipe
    found: Prediction
    weight: float


class Balance:
    """Looks for the fastest settings with streamed layers.

    Args:
        config: of the model.
        card: whose bus and products count.
        half: name of its 16-bit dtype.
        longest_prompt: of the data, in tokens; max_prompt_length where it is not known.
        predict: the planner's.
    """

    def __init__(
        self, config: PretrainedConfig, card: Card, half: str, longest_prompt: int | None,
        predict: Callable[[Recipe], Prediction],
    ):  # fmt: skip
        self.config, self.card, self.half, self.longest_prompt = config, card, half, longest_prompt
        self.predict = predict
        self.shape = shape_of(config)

    def settle(self, recipe: Recipe, budget: int) -> Balanced | None:
        """`recipe`, which does not fit, with as many streamed layers as it takes and what goes with them; None where it
        is above `budget` with all of them streamed and every saver taken."""
        first = with_its_batch(recipe)
        possible: list[tuple[float, _Variant, Choice]] = []
        for variant in self._variants(first):
            possible += self._choices(variant, budget)
        if not possible and (last := self._bottom(first)) is not None:
            possible = list(self._choices(last, budget))
        best: tuple[float, Recipe, Prediction] | None = None
        tried: set[Choice] = set()
        for cost, variant, choice in sorted(possible, key=lambda each: each[0]):
            if len(tried) == _TRIES or (best is not None and cost >= (1 - _SAVER) * best[0]):
                break
            if choice in tried:
                continue
            tried.add(choice)
            fitting = self._confirmed(variant, choice, budget)
            if fitting is not None and (best is None or fitting[0] < best[0]):
                best = fitting
        if best is None:
            return None
        return self._described(first, *best[1:])

    def _variants(self, first: Recipe) -> Iterator[_Variant]:
        """With the base as small as the ladder makes it: all exact savers, none, and both with an int8 cache."""
        rungs = ladder_on_paper(first)
        base = _with(first, [rung for rung in rungs if rung.key in _BASE and rung.value != "nf4"])
        base = _with(base, [rung for rung in rungs if rung.key == "quantization"])
        savers, found = self._with_savers(base, rungs)
        cache = next((rung for rung in rungs if rung.key == "kv_cache_dtype"), None)
        both = [(savers, found, 1 + _SAVER), (base, _all_streamed(self.predict(base), found), 1.0)]
        for recipe, prediction, weight in both if savers is not base else both[:1]:
            yield _Variant(recipe, prediction, weight)
            if cache is not None and saves(*cache, setting(recipe, cache.key)):
                yield _Variant(_with(recipe, [cache]), _smaller_cache(prediction), weight + _ROUNDS)

    def _with_savers(self, base: Recipe, rungs: tuple[Rung, ...]) -> tuple[Recipe, Prediction]:
        """`base` with those that its model has, and the prediction with all layers streamed."""
        first = {rung.key: rung for rung in reversed(rungs)}
        taken = [first[key] for key in _EXACT if key in first and saves(key, first[key].value, setting(base, key))]
        for savers in (taken, taken[:1]):
            try:
                return _with(base, savers), self.predict(_with(base, [*savers, _ALL]))
            except UserError:  # MLPs that cannot be tiled
                continue
        return base, self.predict(_with(base, [_ALL]))

    def _possible(self, recipe: Recipe) -> bool:
        """Whether the model has what a rung changes; the prediction is wanted anyway."""
        try:
            self.predict(recipe)
        except UserError:
            return False
        return True

    def _bottom(self, first: Recipe) -> _Variant | None:
        """With all that the ladder has, but for the batches."""
        taken = first
        for rung in ladder_on_paper(first):
            if rung.key not in (*_BATCHES, "weight_offload") and saves(*rung, setting(taken, rung.key)):
                lower = _with(taken, [rung])
                if rung.key not in ("mlp_tile", "head_dtype") or self._possible(_with(lower, [_ALL])):
                    taken = lower
        return _Variant(taken, self.predict(_with(taken, [_ALL])), 1.0) if taken is not first else None

    def _speed(self, recipe: Recipe) -> Speed:
        args = paper_config(recipe)
        return Speed(self.shape, workload(args, self.config, self.longest_prompt), args, self.card, self.half)

    def _choices(self, variant: _Variant, budget: int) -> Iterator[tuple[float, _Variant, Choice]]:
        """(cost, variant, choice) of each pair of batches that by a guess fits."""
        speed = self._speed(variant.recipe)
        start = choice_of(variant.recipe, paper_config(variant.recipe), self.shape.layers)
        guess = Guess(speed, start, variant.found)
        most = {"rollout_batch_size": speed.work.completions, "per_device_train_batch_size": speed.per_update}
        if variant.recipe.memory_plan == "savers":  # which never raises anything
            most = {key: getattr(start, key) for key in _BATCHES}
        options = [
            [getattr(start, key)] if by_a_person(variant.recipe, key) else _powers(getattr(start, key), most[key])
            for key in _BATCHES
        ]
        for batches in product(*options):
            choice = start._replace(**dict(zip(_BATCHES, batches)))
            room = budget - guess.peak(choice)
            if room < 0:
                continue
            layers = variant.found.layers
            resident = int(room * len(layers) / max(1, sum(size for size, _ in layers)))
            choice = choice._replace(weight_offload=max(1, len(layers) - resident))
            yield variant.weight * speed.step(choice), variant, choice

    def _confirmed(self, variant: _Variant, choice: Choice, budget: int) -> tuple[float, Recipe, Prediction] | None:
        """The cost, recipe and prediction of a choice, with the fewest layers; None where it does not fit."""
        taken = _with(variant.recipe, [Rung(key, getattr(choice, key)) for key in _BATCHES])
        whole = self.predict(_with(taken, [_ALL]))
        count = fewest_streamed(whole, budget)
        if count is None:
            return None
        cost = variant.weight * self._speed(taken).step(choice._replace(weight_offload=count))
        return cost, _with(taken, [Rung("weight_offload", count)]), with_streamed(whole, count)

    def _described(self, first: Recipe, recipe: Recipe, found: Prediction) -> Balanced:
        speed, choice = self._speed(recipe), choice_of(recipe, paper_config(recipe), self.shape.layers)
        before = choice_of(first, paper_config(first), self.shape.layers)
        lowered, raised = [], []
        for key in dict.fromkeys([*_BATCHES, *recipe.training, "quantization"]):
            old, new = (getattr(before, key), getattr(choice, key)) if key in _BATCHES else (
                setting(first, key), setting(recipe, key)
            )  # fmt: skip
            if key == "weight_offload" or old == new:
                continue
            if key in _BATCHES and new > old:
                share = speed.step(choice._replace(**{key: old})) / speed.step(choice) - 1
                raised.append(Climb(Rung(key, new), old, share))
            else:
                lowered.append(Rung(key, new))
        lowered.append(Rung("weight_offload", choice.weight_offload))
        return Balanced(recipe, found, tuple(lowered), tuple(raised))


def _with(recipe: Recipe, rungs: list[Rung]) -> Recipe:
    for key, value in rungs:
        if setting(recipe, key) != value:
            recipe = with_setting(recipe, key, value)
    return recipe


def _powers(now: int, most: int) -> list[int]:
    """`now`, its halves and its doubles, up to `most`."""
    found, smaller = {min(now, most)}, now
    while smaller > 1:
        smaller = (smaller + 1) // 2
        found.add(min(smaller, most))
    while now < most:
        now = min(2 * now, most)
        found.add(now)
    return sorted(found)


def _all_streamed(found: Prediction, like: Prediction) -> Prediction:
    """A guess at `found`, whose layers are on the card, with all of them streamed, as those of `like` are."""
    window = like.parts.get("optimizer", {}).get("streamed weights", 0)
    less = sum(size for size, _ in like.layers) - window

    def moved(parts: dict[str, int]) -> dict[str, int]:
        kept = max(0, parts.get("base weights", 0) - less - window)
        return {**parts, "base weights": kept, "streamed weights": window}

    phases = {name: size - less for name, size in found.phases.items()}
    parts = {name: moved(made_of) for name, made_of in found.parts.items()}
    return replace(found, phases=phases, parts=parts, categories=moved(found.categories), layers=like.layers)


def _smaller_cache(found: Prediction) -> Prediction:
    """A guess at the same with keys and values in int8."""
    parts = found.parts["rollout"]
    cache = round(parts.get("KV cache", 0) * _INT8_CACHE)
    less = parts.get("KV cache", 0) - cache
    parts = {**parts, "KV cache": cache}
    phases = {**found.phases, "rollout": found.phases["rollout"] - less}
    return replace(found, phases=phases, parts={**found.parts, "rollout": parts})


def hopeless(recipe: Recipe, found: Prediction, budget: int) -> bool:
    """Whether no rung can bring `found` into `budget` bytes: what none of them makes smaller is more than that."""
    if any(r.key in (*_BASE, "optimizer_offload") and r.value != "nf4" for r in ladder_on_paper(recipe)):
        return False
    if any(r.key == "quantization" for r in ladder_on_paper(recipe)):
        return False
    parts = found.parts.get("optimizer", {})
    kept = sum(parts.get(name, 0) for name in WEIGHTS if name != "head") + parts.get("CUDA context", 0)
    return kept > budget


def may_stream(recipe: Recipe) -> bool:
    """Whether the plan may stream layers: the ladder says so, or a person does, and does not say how many."""
    if by_a_person(recipe, "weight_offload"):
        return setting(recipe, "weight_offload") == AUTO
    return setting(recipe, "weight_offload") == AUTO or any(r.key == "weight_offload" for r in ladder_on_paper(recipe))


def resident(recipe: Recipe) -> Recipe:
    """The same recipe with all layers on the card, as far as the plan may say so."""
    return _with(recipe, [Rung("weight_offload", OFF)]) if setting(recipe, "weight_offload") == AUTO else recipe
