"""A recipe on paper: what a setting is, the same recipe with another one, its ladder, and its GRPOConfig without a
GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ladder import RELIEVES, Rung, way_back
from lowvram_grpo.recipe import preset as presets
from lowvram_grpo.recipe.all_weights import OF_ALL_WEIGHTS
from lowvram_grpo.recipe.resolve import job_types, typed

if TYPE_CHECKING:
    from lowvram_grpo.recipe.resolve import Recipe

# Who set a value, as the resolved recipe records it.
PLANNED = "memory plan"
OF_THE_ADAPTER = "the adapter's run"  # what its base was kept in; where that does not fit, a plan may lower it
_BY_A_PERSON = ("flag", "file", "adapter", "checkpoint", OF_ALL_WEIGHTS)
# The first and the last rung of a ladder where all weights are trained: a copy of them is the most there is to have,
# and micro-batches that are halved read it twice as often; moments go over the bus at each step.
_FIRST, _LAST = Rung("reference_offload", True), Rung("optimizer_offload", True)


def by_a_person(recipe: Recipe, key: str) -> bool:
    """Whether it is none of the plan's: somebody set it, or what somebody gave fixes it."""
    return recipe.origin.get(key) in _BY_A_PERSON


def setting(recipe: Recipe, key: str) -> Any:
    """The value that `key` has in a resolved recipe, GRPOConfig's default included."""
    if key in job_types():
        return getattr(recipe, key)
    if key in recipe.training:
        return recipe.training[key]
    from lowvram_grpo.recipe.config import GRPOConfig

    return GRPOConfig.__dataclass_fields__[key].default


def with_setting(recipe: Recipe, key: str, value: Any, origin: str = PLANNED) -> Recipe:
    """A copy of `recipe` with one setting changed."""
    changed = replace(recipe, training=dict(recipe.training), origin={**recipe.origin, key: origin})
    if key in job_types():
        return replace(changed, **{key: value})
    changed.training[key] = value
    return changed


def trains_all_weights(recipe: Recipe) -> bool:
    """Whether it has no adapter, and no frozen base (`recipe.all_weights`)."""
    return not recipe.use_peft


def with_its_batch(recipe: Recipe) -> Recipe:
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


def ladder_of(name: str) -> tuple[Rung, ...]:
    """The rungs of a preset, their values cast to the types of their settings.

    Raises:
        UserError: no such preset.
    """
    return tuple(Rung(key, typed(key, value)) for key, value in presets.load(name).ladder)


def ladder_on_paper(recipe: Recipe) -> tuple[Rung, ...]:
    """The rungs that a plan may take for `recipe`."""
    rungs = ladder_of(recipe.preset)
    if trains_all_weights(recipe):
        rungs = (*((_FIRST,) if paper_config(recipe).beta > 0 else ()), *rungs, _LAST)
    return tuple(rung for rung in rungs if not by_a_person(recipe, rung.key))


def ladder_for(recipe: Recipe) -> tuple[Rung, ...]:
    """The rungs of a run: from where its plan has climbed back to its preset, then those of the preset."""
    begins = presets.load(recipe.preset).settings
    now = {key: setting(recipe, key) for key in RELIEVES}
    return (*way_back(now, begins, setting(recipe, "num_generations")), *ladder_of(recipe.preset))


def paper_config(recipe: Recipe) -> Any:
    """The GRPOConfig of a recipe, made without touching a GPU; precision is the planner's to say.

    Raises:
        UserError: settings that do not fit together.
    """
    from lowvram_grpo.recipe.config import GRPOConfig

    settings = {k: v for k, v in recipe.training.items() if k not in ("bf16", "fp16", "tf32", "reward_weights")}
    settings |= {"output_dir": "plan", "use_cpu": True, "report_to": "none", "model_init_kwargs": None}
    try:
        return GRPOConfig(**settings)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"The training settings do not fit together: {error}") from error
