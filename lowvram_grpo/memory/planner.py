"""Does it fit, and with which savers: climbs a preset's ladder on paper until the predicted peak is within the budget.

Only rungs that relieve the phase with the highest peak are taken, in the ladder's order, so that nothing is given up
that would not help. What a person set is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowvram_grpo import preset as presets
from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ladder import RELIEVES, Rung
from lowvram_grpo.recipe import job_types, typed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowvram_grpo.memory.prediction import Prediction
    from lowvram_grpo.recipe import Recipe

GIB = 2**30
# Who set a value, as the resolved recipe records it.
_BY_A_PERSON = ("flag", "file", "adapter", "checkpoint")
PLANNED = "memory plan"
# A rung that saves less of the peak is passed over.
_WORTH = 0.002
# Rungs that are tried before the bottom of the ladder is looked at.
_PATIENCE = 3
# Of the budget: where more is used, no rung is likely to be needless.
_FULL = 0.9
# Nobody wants less, in tokens.
_SHORTEST = 64


@dataclass(frozen=True)
class Plan:
    """What would run, and how much of the card it takes.

    Attributes:
        recipe: with the settings of the rungs that were taken.
        budget: bytes that may be used, CUDA context included.
        prediction: of that recipe.
        rungs: taken, in order.
        advice: where it does not fit, what would.
    """

    recipe: Recipe
    budget: int
    prediction: Prediction
    rungs: tuple[Rung, ...] = ()
    advice: tuple[str, ...] = ()

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
            "settings": {key: setting(self.recipe, key) for key in RELIEVES},
            "advice": list(self.advice),
        }


def ladder_of(name: str) -> tuple[Rung, ...]:
    """The rungs of a preset, their values cast to the types of their settings.

    Raises:
        UserError: no such preset.
    """
    return tuple(Rung(key, typed(key, value)) for key, value in presets.load(name).ladder)


def setting(recipe: Recipe, key: str) -> Any:
    """The value that `key` has in a resolved recipe, GRPOConfig's default included."""
    if key in job_types():
        return getattr(recipe, key)
    if key in recipe.training:
        return recipe.training[key]
    from lowvram_grpo.config import GRPOConfig

    return GRPOConfig.__dataclass_fields__[key].default


def with_setting(recipe: Recipe, key: str, value: Any, origin: str = PLANNED) -> Recipe:
    """A copy of `recipe` with one setting changed."""
    changed = replace(recipe, training=dict(recipe.training), origin={**recipe.origin, key: origin})
    if key in job_types():
        return replace(changed, **{key: value})
    changed.training[key] = value
    return changed


class Planner:
    """Plans recipes for one model on one kind of device.

    Args:
        config: of the model.
        device: cuda or cpu.
        half: the 16-bit dtype of the device, `bfloat16` or `float16`.
        cold_start: an automatic cold start may come, after which the reference has weights of its own.
        longest_prompt: of the data, in tokens; max_prompt_length where it is not known.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        device: str = "cuda",
        half: str = "bfloat16",
        cold_start: bool = False,
        longest_prompt: int | None = None,
    ):
        self.config = config
        if getattr(config, "quantization_config", None) is not None:
            # Whoever plans a checkpoint that is quantized already says so by the recipe's quantization.
            self.config = copy.deepcopy(config)
            del self.config.quantization_config
        self.device, self.half, self.cold_start = device, half, cold_start
        self.longest_prompt = longest_prompt
        self._known: dict[str, Prediction] = {}
        self._refused: dict[tuple[str, Any], bool] = {}

    def predict(self, recipe: Recipe, *, exact: bool = False) -> Prediction:
        """Peaks of the longest step of `recipe`.

        Raises:
            UserError: settings contradict each other, or do not fit the model.
            CannotPredict: the model cannot be built on meta tensors.
        """
        import torch

        from lowvram_grpo.memory.prediction import Blueprint, predict
        from lowvram_grpo.policy.load import DTYPES

        args = paper_config(recipe)
        key = repr((exact, sorted(vars(args).items(), key=lambda kv: kv[0]), _of_the_job(recipe)))
        if key not in self._known:
            plain = "float32" if self.device == "cpu" else self.half
            dtype = DTYPES[plain if recipe.dtype == "auto" else recipe.dtype]
            lora = {"r": recipe.lora_r, "target_modules": recipe.lora_target_modules}
            blueprint = Blueprint(
                self.config, recipe.quantization, dtype, lora, self.device,
                follows=bool(recipe.adapter) or self.cold_start or str(args.cold_start) not in ("off", "auto", "0"),
                longest_prompt=self.longest_prompt,
                attention=recipe.attn_implementation or "sdpa",
            )  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                self._known[key] = predict(blueprint, args, exact=exact)
        return self._known[key]

    def plan(self, recipe: Recipe, budget: int, *, advise: bool = True) -> Plan:
        """The first configuration down the ladder of `recipe.preset` whose predicted peak is within `budget` bytes;
        where none is, the last one, with advice."""
        left = [rung for rung in ladder_of(recipe.preset) if recipe.origin.get(rung.key) not in _BY_A_PERSON]
        found = self.predict(recipe)
        if found.peak > budget:
            recipe = _with_its_batch(recipe)
        first, rungs, tried = recipe, [], 0
        while found.peak > budget:
            rung = self._next(recipe, found, left)
            # What is far too large is known at the bottom of the ladder, after a few rungs, not after all of them. And
            # where none relieves this phase by itself, all together may.
            if rung is None or tried == _PATIENCE:
                bottom = self._bottom(recipe, left, budget, tuple(rungs))
                if rung is None or not bottom.fits:
                    return replace(bottom, advice=tuple(self._advice(bottom))) if advise and not bottom.fits else bottom
            tried += 1
            left.remove(rung)
            if not self._possible(recipe, rung):
                continue
            lower = with_setting(recipe, rung.key, rung.value)
            after = self.predict(lower)
            if found.phases[found.peak_phase] - after.phases[found.peak_phase] > _WORTH * found.peak:
                recipe, found = lower, after
                rungs.append(rung)
        return self._without_needless(first, Plan(recipe, budget, found, tuple(rungs)))

    def _possible(self, recipe: Recipe, rung: Rung) -> bool:
        """Whether the model has what the rung changes: MLPs that can be tiled, a head that NF4 can block."""
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

    def _without_needless(self, first: Recipe, plan: Plan) -> Plan:
        """Rungs that a later, larger one made needless are given back: all of them, or the costliest first."""

        def with_rungs(rungs: tuple[Rung, ...]) -> Plan:
            recipe = first
            for rung in rungs:
                recipe = with_setting(recipe, rung.key, rung.value)
            return Plan(recipe, plan.budget, self.predict(recipe), rungs)

        if plan.rungs[:-1] and plan.prediction.peak <= _FULL * plan.budget:
            alone = with_rungs(plan.rungs[-1:])
            if alone.fits:
                return alone
        for rung in reversed(plan.rungs[:-1]):
            if plan.prediction.peak > _FULL * plan.budget:
                break
            fewer = with_rungs(tuple(kept for kept in plan.rungs if kept is not rung))
            plan = fewer if fewer.fits else plan
        return plan

    def _bottom(self, recipe: Recipe, left: list[Rung], budget: int, taken: tuple[Rung, ...] = ()) -> Plan:
        """With every rung that still saves something."""
        for rung in left:
            if self._possible(recipe, rung) and presets.saves(rung.key, rung.value, setting(recipe, rung.key)):
                recipe, taken = with_setting(recipe, rung.key, rung.value), (*taken, rung)
        return Plan(recipe, budget, self.predict(recipe), taken)

    def _next(self, recipe: Recipe, found: Prediction, left: list[Rung]) -> Rung | None:
        helpful = (r for r in left if found.peak_phase in RELIEVES[r.key])
        return next((r for r in helpful if presets.saves(r.key, r.value, setting(recipe, r.key))), None)

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
        for rung in ladder_of("24gb"):
            set_by = plan.recipe.origin.get(rung.key)
            if rung.key in done or set_by not in ("flag", "file"):
                continue
            saving = presets.saves(rung.key, rung.value, setting(plan.recipe, rung.key))
            if saving and self.predict(with_setting(plan.recipe, rung.key, rung.value)).peak <= plan.budget:
                yield f"--{rung.key.replace('_', '-')} {str(rung).partition('=')[2]} fits"
                done.add(rung.key)

    def _smaller_model(self, plan: Plan) -> str | None:
        from lowvram_grpo.memory.architectures import family, resolve_config

        for name in reversed(family(str(plan.recipe.model))):
            config, _ = resolve_config(name)
            other = Planner(
                config, device=self.device, half=self.half, cold_start=self.cold_start,
                longest_prompt=self.longest_prompt,
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
        recipe.quantization, recipe.dtype, recipe.lora_r, str(modules), bool(recipe.adapter), recipe.attn_implementation
    )  # fmt: skip


def _with_its_batch(recipe: Recipe) -> Recipe:
    """The same step, counted in prompts: where it follows from per_device_train_batch_size, as TRL counts, a rung that
    lowers that would change what is trained."""
    args = paper_config(recipe)
    plan = args.batch_plan()
    if args.prompts_per_step is None:
        prompts = max(1, plan.prompts_per_rollout // plan.updates_per_rollout)
        recipe = with_setting(recipe, "prompts_per_step", prompts)
    if args.steps_per_generation:
        recipe = with_setting(recipe, "steps_per_generation", None)
        recipe = with_setting(recipe, "generation_batch_size", plan.completions_per_rollout)
    return recipe


def paper_config(recipe: Recipe) -> Any:
    """The GRPOConfig of a recipe, made without touching a GPU; precision is the planner's to say.

    Raises:
        UserError: settings that do not fit together.
    """
    from lowvram_grpo.config import GRPOConfig

    settings = {k: v for k, v in recipe.training.items() if k not in ("bf16", "fp16", "tf32", "reward_weights")}
    settings |= {"output_dir": "plan", "use_cpu": True, "report_to": "none", "model_init_kwargs": None}
    try:
        return GRPOConfig(**settings)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"The training settings do not fit together: {error}") from error
