"""Where memory is left, settings go up: the other half of the ladder.

What may rise is a short list, `RAISES`. Which of it is taken, and how far, is what makes a step shortest by the counts
of `speed` and fits by the prediction with a margin: a prediction that nobody has measured yet must not be what makes a
run run out of memory. What a person set, and what a step trains on, are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ladder import Rung
from lowvram_grpo.plan.guess import Guess
from lowvram_grpo.plan.paper import by_a_person, paper_config, trains_all_weights, with_its_batch, with_setting
from lowvram_grpo.plan.speed import Choice, Shape, Speed, choice_of, shape_of
from lowvram_grpo.policy.trials import wanted
from lowvram_grpo.training.rehearsal import workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowvram_grpo.memory.cards import Card
    from lowvram_grpo.plan.prediction import Prediction
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.recipe.resolve import Recipe

# Of the budget: what a climb leaves free for what the prediction does not know.
MARGIN = 0.85
# What the counts must say that all climbs together take off a step's time, and each of them by itself.
WORTH, EACH = 0.02, 0.01
# Predictions that a climb may take; each is about a second.
_TRIES = 5
_WORKSPACE = 256

# Setting -> what its rise buys.
RAISES: dict[str, str] = {
    "per_device_train_batch_size": "fewer and larger passes, and a prompt runs once for all its completions",
    "rollout_batch_size": "each step of a rollout reads the weights once for all that decode",
    "gradient_checkpointing": "the backward pass runs no layer again",
    "quantization": "no weight is dequantized, nor rounded",
    "head_dtype": "lm_head is read as it is, not dequantized tile by tile",
    "embedding_offload": "no step waits for the host's rows",
    "workspace_mib": "fewer and larger tiles of lm_head",
}
# Fewer rows must be worth so much of a step's time: how a 4-bit product's time grows with them is a guess.
_FEWER = 0.05
# A base that is not rounded is worth so much of it.
_EXACT = 0.02
# And what it buys where one of these is lowered.
_LOWERED = {
    "per_device_train_batch_size": "so many fit without recomputation",
    "rollout_batch_size": "up to so many rows, 4-bit weights are read as they are",
}
# From what takes least memory to what takes most, where it is not a number.
_ORDERS: dict[str, tuple] = {
    "quantization": ("nf4", "int8", "none"),
    "head_dtype": ("nf4", "int8", "dense"),
    "gradient_checkpointing": (True, False),
    "embedding_offload": (True, False),
}
_WORDS = {
    "per_device_train_batch_size": "training on {} at once",
    "rollout_batch_size": "sampling {} at once",
    "gradient_checkpointing": "no recomputation",
    "quantization": "a 16-bit base",
    "head_dtype": "a 16-bit lm_head",
    "embedding_offload": "the input embedding on the card",
    "workspace_mib": "{} MiB of scratch memory",
}


class Climb(NamedTuple):
    """A setting that was raised.

    Attributes:
        rung: the setting and its value.
        before: the value that it had.
        share: of the modelled time of a step as it is now, how much longer it would be without this climb.
    """

    rung: Rung
    before: Any
    share: float

    @property
    def words(self) -> str:
        """For people, as in `training on 16 at once (4)`."""
        said = _WORDS[self.rung.key].format(self.rung.value)
        return f"{said} ({self.before})" if "{}" in _WORDS[self.rung.key] else said

    @property
    def reason(self) -> str:
        lowered = self.rung.key in _LOWERED and self.rung.value < self.before
        return _LOWERED[self.rung.key] if lowered else RAISES[self.rung.key]

    def __str__(self) -> str:
        return str(self.rung)


class Climber:
    """Looks for the fastest settings above those of a recipe that fit.

    Args:
        config: of the model.
        card: that the times are modelled for.
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
        self._shape: Shape | None = None

    def climb(self, recipe: Recipe, found: Prediction, budget: int, taken: tuple[Rung, ...] = ()) -> Raised | None:
        """`recipe` with what is worth raising within `budget` bytes; None where nothing is, or nothing more fits.
        `taken`: rungs that brought it down to the peaks `found`, which stay."""
        room = MARGIN * budget
        if found.peak > room or (args := _climbable(recipe)) is None:
            return None
        kept = [key for key in RAISES if by_a_person(recipe, key) or any(rung.key == key for rung in taken)]
        if args.weight_offload != "off":  # layers that have left the card have nothing to keep activations for
            kept.append("gradient_checkpointing")
        if recipe.adapter:  # it goes on on the base that it had (implied.adopt_adapter), or that nobody knows
            kept += ["quantization", "head_dtype"]
        speed = self._speed(args, recipe)
        start = choice_of(recipe, args, speed.shape.layers)
        guess = Guess(speed, start, found)
        cost = lambda c: speed.step(c) * _weight(c, start)
        possible = sorted(_choices(start, speed, frozenset(kept)), key=cost)
        best = self._fastest(recipe, possible, guess, room)
        if best is None or cost(best) > (1 - WORTH) * cost(start):
            return None
        chosen = _without_needless(start, best, cost)
        raised = _with(recipe, start, chosen)
        after = self.predict(raised)
        if after.peak > room:  # a head takes room while it is quantized, say
            chosen, raised = best, _with(recipe, start, best)
            after = self.predict(raised)
        return Raised(raised, after, _climbs(speed, start, chosen), speed.step(chosen) / speed.step(start))

    def _speed(self, args: GRPOConfig, recipe: Recipe) -> Speed:
        if self._shape is None:
            self._shape = shape_of(self.config)
        work = workload(args, self.config, self.longest_prompt)
        kernel = wanted("int8_head", args.fused_ops)
        return Speed(
            self._shape, work, args, self.card, self.half, int8_kernel=kernel, trained=trains_all_weights(recipe)
        )

    def _fastest(self, recipe: Recipe, possible: list[Choice], guess: Guess, room: float) -> Choice | None:
        """The first of `possible`, the fastest first, that is predicted to fit. What takes more of everything than one
        that did not fit is passed over, and so is what by a guess from earlier predictions does not."""
        refused: list[Choice] = []
        for choice in possible:
            if choice == guess.start or len(refused) == _TRIES:
                return None
            if guess.peak(choice) > room or any(_below(small, choice) for small in refused):
                continue
            try:
                after = self.predict(_with(recipe, guess.start, choice))
            except UserError:  # a model that has no such thing
                refused.append(choice)
                continue
            if after.peak <= room:
                return choice
            refused.append(choice)
            guess.learn(choice, after)
        return None


class Raised(NamedTuple):
    """A recipe with its climbs, its prediction, and the modelled time of a step as a share of what it was."""

    recipe: Recipe
    prediction: Prediction
    climbs: tuple[Climb, ...]
    time: float


def _climbable(recipe: Recipe) -> GRPOConfig | None:
    """Its GRPOConfig; None where memory is not ours to fill."""
    args = paper_config(recipe)
    # A vLLM in this process takes memory that the prediction does not know.
    return None if args.use_vllm and args.vllm_mode == "colocate" else args


def _choices(start: Choice, speed: Speed, kept: frozenset[str]) -> Iterator[Choice]:
    """`start`, and what may stand in its place."""

    def options(key: str) -> list:
        now = getattr(start, key)
        if key in kept or key == "weight_offload":  # of which there are as few as may be
            return [now]
        if key == "per_device_train_batch_size":
            # Smaller ones where that is what it takes to recompute nothing.
            recomputes = start.gradient_checkpointing and "gradient_checkpointing" not in kept
            fewer = [n for n in (now // 2, now // 4) if n] if recomputes else []
            return [*fewer, *_doublings(now, speed.per_update)]
        if key == "rollout_batch_size":
            fewer = [now // 2, now // 4] if start.quantization == "nf4" and now >= 32 else []
            return [*fewer, *_doublings(now, speed.work.completions)]
        if key == "workspace_mib":
            return sorted({now, max(now, _WORKSPACE)})
        if key == "embedding_offload" and speed.shape.tied:
            return [now]
        # LLM.int8 and an NF4 head were somebody's choice, or the end of the ladder.
        low, high = ("nf4" if key == "quantization" else "int8"), _ORDERS[key][-1]
        return [now, high] if now in (low, True) else [now]

    yield from (Choice(*values) for values in product(*map(options, Choice._fields)))


def _doublings(now: int, most: int) -> Iterator[int]:
    yield now
    while now < most:
        now = min(2 * now, most)
        yield now


def _changed(choice: Choice, key: str, value: Any) -> Choice:
    return choice._replace(**{key: value})


def _rank(key: str, value: Any) -> int:
    return _ORDERS[key].index(value) if key in _ORDERS else -value if key == "weight_offload" else value


def _below(small: Choice, large: Choice) -> bool:
    """Whether `small` takes no more of anything."""
    return all(_rank(key, a) <= _rank(key, b) for key, a, b in zip(Choice._fields, small, large))


def _with(recipe: Recipe, start: Choice, choice: Choice) -> Recipe:
    """`recipe` with what differs; a step stays the same step."""
    if start.per_device_train_batch_size != choice.per_device_train_batch_size:
        recipe = with_its_batch(recipe)
    for key, old, new in zip(Choice._fields, start, choice):
        recipe = recipe if old == new else with_setting(recipe, key, new)
    return recipe


def _without_needless(start: Choice, best: Choice, cost: Callable[[Choice], float]) -> Choice:
    """`best` without the climbs that buy next to nothing, and no higher than they must be."""
    chosen = best
    for key in Choice._fields:
        now, options = getattr(chosen, key), [getattr(start, key)]
        if key.endswith("batch_size"):
            options = list(_doublings(options[0], now))
        for less in options:
            lower = _changed(chosen, key, less)
            if _rank(key, less) < _rank(key, now) and cost(lower) <= (1 + EACH) * cost(chosen):
                chosen = lower
                break
    return chosen


def _weight(choice: Choice, start: Choice) -> float:
    """What a choice's time is multiplied by, for what time does not say."""
    fewer = choice.rollout_batch_size < start.rollout_batch_size
    return 1 + _EXACT * (choice.quantization == "nf4") + _FEWER * fewer


def _climbs(speed: Speed, start: Choice, chosen: Choice) -> tuple[Climb, ...]:
    """What differs, what buys most first."""
    found, now = [], speed.step(chosen)
    for key, old, new in zip(Choice._fields, start, chosen):
        if old != new:
            found.append(Climb(Rung(key, new), old, speed.step(_changed(chosen, key, old)) / now - 1))
    return tuple(sorted(found, key=lambda climb: -climb.share))
