"""Does it fit, and with which savers: `descent` goes down a preset's ladder until the predicted peak is within the
budget, `climb` goes up where it is far below. Where nothing fits, the plan says what would.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lowvram_grpo.memory.cards import typical
from lowvram_grpo.memory.ladder import RELIEVES, Rung, saves
from lowvram_grpo.plan.descent import Descender, Lowered
from lowvram_grpo.plan.paper import (
    OF_THE_ADAPTER,
    PLANNED,
    by_a_person,
    ladder_of,
    paper_config,
    setting,
    trains_all_weights,
    with_setting,
)
from lowvram_grpo.recipe import preset as presets
from lowvram_grpo.recipe.weight_offload import AUTO, OFF, streamed_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowvram_grpo.memory.cards import Card
    from lowvram_grpo.memory.overheads import Overheads
    from lowvram_grpo.plan.climb import Climb
    from lowvram_grpo.plan.experts import Fetching
    from lowvram_grpo.plan.prediction import Prediction
    from lowvram_grpo.plan.reward_models import Judge
    from lowvram_grpo.plan.streaming import Layers, Streaming
    from lowvram_grpo.policy.experts import ExpertLayer
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.recipe.resolve import Recipe

GIB = 2**30
# Nobody wants less, in tokens.
_SHORTEST = 64


@dataclass(frozen=True)
class Plan:
    """What would run, and how much of the card it takes.

    Attributes:
        recipe: with the settings of the rungs that were taken, and of the climbs.
        budget: bytes that may be used, CUDA context included.
        prediction: of that recipe.
        rungs: taken, in order.
        advice: where it does not fit, what would.
        climbs: settings that were raised, what buys most first.
        time: of a step after the climbs, as a share of what it would be without, by counts and a card's numbers.
        card: whose numbers.
        streaming: what a reference in host memory costs, where there is one.
        fetching: what experts in host memory cost, where there are some.
        layers: what decoder layers in host memory cost, where there are any.
    """

    recipe: Recipe
    budget: int
    prediction: Prediction
    rungs: tuple[Rung, ...] = ()
    advice: tuple[str, ...] = ()
    climbs: tuple[Climb, ...] = ()
    time: float = 1.0
    card: str = ""
    streaming: Streaming | None = None
    fetching: Fetching | None = None
    layers: Layers | None = None

    @property
    def fits(self) -> bool:
        return self.prediction.peak <= self.budget

    def as_json(self) -> dict[str, Any]:
        """GiB as floats with three digits."""
        gib = lambda size: round(size / GIB, 3)
        found = self.prediction
        return {
            "model": self.recipe.model,
            "preset": self.recipe.preset,
            "budget_gib": gib(self.budget),
            "fits": self.fits,
            "peak_gib": gib(found.peak),
            "peak_phase": found.peak_phase,
            "phases": {name: gib(size) for name, size in found.phases.items()},
            "categories": {name: gib(size) for name, size in found.categories.items()},
            "rungs": [str(rung) for rung in self.rungs],
            "climbs": [str(climb) for climb in self.climbs],
            "modelled_time": round(self.time, 3),
            "modelled_card": self.card,
            "settings": {key: setting(self.recipe, key) for key in RELIEVES},
            "host_gib": {"total": gib(found.on_host), **{name: gib(size) for name, size in found.host.items()}},
            "streaming": self.streaming and self.streaming.as_json(),
            "experts": self.fetching and self.fetching.as_json(),
            "streamed_layers": self.layers and self.layers.as_json(),
            "advice": list(self.advice),
        }


class Planner:
    """Plans recipes for one model on one kind of device.

    Args:
        config: of the model.
        device: cuda or cpu.
        half: the 16-bit dtype of the device, `bfloat16` or `float16`.
        cold_start: an automatic cold start may come, after which the reference has weights of its own.
        longest_prompt: of the data, in tokens; max_prompt_length where it is not known.
        card: what it can do. Without, nothing is raised.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        device: str = "cuda",
        half: str = "bfloat16",
        cold_start: bool = False,
        longest_prompt: int | None = None,
        card: Card | None = None,
    ):
        self.config = config
        if getattr(config, "quantization_config", None) is not None:
            # Whoever plans a checkpoint that is quantized already says so by the recipe's quantization.
            self.config = copy.deepcopy(config)
            del self.config.quantization_config
        self.device, self.half, self.cold_start = device, half, cold_start
        self.longest_prompt, self.card = longest_prompt, card
        self._known: dict[str, Prediction] = {}
        self._judges: dict[tuple[str, int], Judge] = {}
        self._descender = Descender(self.predict, lambda: bool(self.experts))

    @cached_property
    def experts(self) -> list[ExpertLayer]:
        """Layers of the model whose experts can wait in host memory."""
        if self.config is None:  # predictions come from elsewhere
            return []
        from lowvram_grpo.policy.experts import expert_layers

        return expert_layers(self.config)

    def predict(self, recipe: Recipe, *, exact: bool = False) -> Prediction:
        """Peaks of the longest step of `recipe`.

        Raises:
            UserError: settings contradict each other, or do not fit the model.
            CannotPredict: the model cannot be built on meta tensors.
        """
        import torch

        from lowvram_grpo.plan.prediction import Blueprint, predict, with_streamed
        from lowvram_grpo.policy.load import DTYPES

        args = paper_config(recipe)
        if isinstance(args.weight_offload, int) and not exact:
            whole = self.predict(with_setting(recipe, "weight_offload", "auto"))
            of = self.config.get_text_config().num_hidden_layers
            return with_streamed(whole, streamed_layers(args.weight_offload, of))
        key = repr((exact, self.card, sorted(vars(args).items(), key=lambda kv: kv[0]), _of_the_job(recipe)))
        if key not in self._known:
            plain = "float32" if self.device == "cpu" else self.half
            dtype = DTYPES[plain if recipe.dtype == "auto" else recipe.dtype]
            adapter = {"r": recipe.lora_r, "target_modules": recipe.lora_target_modules}
            lora = None if trains_all_weights(recipe) else adapter
            blueprint = Blueprint(
                self.config, recipe.quantization, dtype, lora, self.device,
                follows=bool(recipe.adapter) or self.cold_start or str(args.cold_start) not in ("off", "auto", "0"),
                longest_prompt=self.longest_prompt,
                attention=recipe.attn_implementation or "sdpa",
                card=self.card,
                converses=bool(recipe.tools or recipe.environment),
            )  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                found = predict(blueprint, args, exact=exact)
                self._known[key] = self._judged(recipe, args, found, blueprint.overheads)
        return self._known[key]

    def _judged(self, recipe: Recipe, args: GRPOConfig, found: Prediction, overheads: Overheads) -> Prediction:
        """`found` with the recipe's reward models, where they are on a card."""
        if self.device != "cuda" or args.reward_model_device == "cpu":
            return found
        from lowvram_grpo.plan.reward_models import judge_of, models_of, with_reward_models
        from lowvram_grpo.training.rehearsal import workload

        work = workload(args, self.config, self.longest_prompt)
        length = work.prompt + work.completion
        names = models_of(recipe.reward)
        for name in names:
            if (name, length) not in self._judges:
                self._judges[name, length] = judge_of(name, length, self.card)
        judges = [self._judges[name, length] for name in names]
        return with_reward_models(found, judges, args.reward_model_device, overheads)

    def plan(self, recipe: Recipe, budget: int, *, advise: bool = True) -> Plan:
        """The first configuration down the ladder of `recipe.preset` whose predicted peak is within `budget` bytes;
        where none is, the last one, with advice. Where much is left, settings rise (not on a CPU, whose memory the
        whole system lives in, and not with memory_plan savers)."""
        plan = self._planned(recipe, budget, advise)
        if setting(plan.recipe, "expert_offload") != OFF:
            from lowvram_grpo.plan.experts import fetching_of

            plan = replace(plan, fetching=fetching_of(plan.recipe, self.experts, self.card or typical(budget / GIB)))
        if self.card is None:
            return plan
        from lowvram_grpo.plan.streaming import layers_of, streaming_of

        if trains_all_weights(plan.recipe) and setting(plan.recipe, "reference_offload"):
            return replace(plan, streaming=streaming_of(plan.recipe, self.config, self.card, self.half))
        if setting(plan.recipe, "weight_offload") == OFF:
            return plan
        return replace(plan, layers=layers_of(plan.recipe, self.config, self.card, self.half, self.longest_prompt))

    def _planned(self, recipe: Recipe, budget: int, advise: bool) -> Plan:
        plan = self._placed(self._lowered(recipe, budget))
        if not plan.fits:
            return replace(plan, advice=tuple(self._advice(plan))) if advise else plan
        streams = plan.recipe.origin.get("weight_offload") == PLANNED and setting(plan.recipe, "weight_offload") != OFF
        if self.card is None or self.device != "cuda" or recipe.memory_plan == "savers" or streams:
            return plan
        if setting(plan.recipe, "expert_offload") != OFF:  # what is left has become places for experts
            return plan
        from lowvram_grpo.plan.climb import Climber

        climber = Climber(self.config, self.card, self.half, self.longest_prompt, self.predict)
        try:
            raised = climber.climb(plan.recipe, plan.prediction, budget, plan.rungs)
        except Exception:  # a model whose shape is not known, say: what fits fits all the same
            raised = None
        if raised is None:
            return plan
        return replace(plan, recipe=raised.recipe, prediction=raised.prediction, climbs=raised.climbs,
                       time=raised.time, card=self.card.name)  # fmt: skip

    def _placed(self, plan: Plan) -> Plan:
        """With a number in the place of an automatic expert_offload."""
        if setting(plan.recipe, "expert_offload") != AUTO:
            return plan
        from lowvram_grpo.plan.experts import with_places

        recipe, found = with_places(plan.recipe, plan.prediction, self.experts, plan.budget)
        return replace(plan, recipe=recipe, prediction=found)

    def _lowered(self, recipe: Recipe, budget: int) -> Plan:
        """By the ladder; where that ends above the budget, with streamed layers, for which much of what the ladder has
        taken is given back. Where a person asks for as few of these as it takes, they come before the ladder."""
        from lowvram_grpo.plan.on_host import Balance, hopeless, may_stream, resident

        first = resident(recipe)
        found = self.predict(first)
        lowered = Lowered(first, found, ())
        streams = may_stream(recipe)
        at_once = streams and (by_a_person(recipe, "weight_offload") or hopeless(first, found, budget))
        at_once = at_once and not self.experts  # which wait by themselves, one by one
        if found.peak > budget and not at_once:
            lowered = self._descender.descend(first, budget)
        if lowered.prediction.peak <= budget or not streams:
            return Plan(lowered.recipe, budget, lowered.prediction, lowered.rungs)
        card = self.card or typical(budget / GIB)
        balance = Balance(self.config, card, self.half, self.longest_prompt, self.predict)
        best = balance.settle(first, budget)
        if best is not None:
            return Plan(best.recipe, budget, best.prediction, best.lowered, climbs=best.raised)
        lowered = self._descender.bottom(first)
        all_streamed = with_setting(lowered.recipe, "weight_offload", AUTO)
        rungs = (*lowered.rungs, Rung("weight_offload", AUTO))
        return Plan(all_streamed, budget, self.predict(all_streamed), rungs)

    def _advice(self, plan: Plan) -> Iterator[str]:
        """What would fit, at the bottom of the ladder: shorter completions or prompts, a smaller model or card."""
        for key in ("max_completion_length", "max_prompt_length"):
            value = setting(plan.recipe, key)
            for shorter in [value // 2, value // 4] if value else []:
                if shorter >= _SHORTEST and self.predict(with_setting(plan.recipe, key, shorter)).peak <= plan.budget:
                    yield f"--{key.replace('_', '-')} {shorter} fits"
                    break
        yield from self._own_settings(plan)
        smaller = self._smaller_model(plan)
        if smaller:
            yield f"{smaller} fits"
        peak = plan.prediction.peak / GIB
        yield f"a card with {peak + 0.05:.1f} GiB free ({presets.card_for(plan.prediction.peak):.0f} GB) fits"

    def _own_settings(self, plan: Plan) -> Iterator[str]:
        """Rungs of settings that a person has set higher."""
        done = set()
        for rung in (Rung("gradient_checkpointing", True), *ladder_of("24gb")):
            set_by = plan.recipe.origin.get(rung.key)
            if rung.key in done or set_by not in ("flag", "file", OF_THE_ADAPTER):
                continue
            saving = saves(rung.key, rung.value, setting(plan.recipe, rung.key))
            if saving and self.predict(with_setting(plan.recipe, rung.key, rung.value)).peak <= plan.budget:
                yield f"--{rung.key.replace('_', '-')} {str(rung).partition('=')[2]} fits"
                done.add(rung.key)

    def _smaller_model(self, plan: Plan) -> str | None:
        from lowvram_grpo.plan.architectures import resolve_config
        from lowvram_grpo.policy.known_models import family

        for name in reversed(family(str(plan.recipe.model))):
            config, _ = resolve_config(name)
            other = Planner(
                config, device=self.device, half=self.half, cold_start=self.cold_start,
                longest_prompt=self.longest_prompt, card=self.card,
            )  # fmt: skip
            if other._size < self._size and other.predict(plan.recipe).peak <= plan.budget:
                return name
        return None

    @property
    def _size(self) -> int:
        text = self.config.get_text_config()
        return text.num_hidden_layers * text.hidden_size**2


def _of_the_job(recipe: Recipe) -> tuple:
    """The settings outside of GRPOConfig that bytes depend on."""
    modules = recipe.lora_target_modules
    return (
        recipe.quantization, recipe.dtype, recipe.lora_r, str(modules), bool(recipe.adapter),
        recipe.attn_implementation, trains_all_weights(recipe), tuple(recipe.reward),
        bool(recipe.tools or recipe.environment),
    )  # fmt: skip
