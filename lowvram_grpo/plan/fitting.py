"""From a card to settings that fit it: the budget and the plan, and what to say about both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.memory.budget import budget, gib
from lowvram_grpo.memory.ram import check_host, words
from lowvram_grpo.memory.ram import present as host_of
from lowvram_grpo.recipe.preset import card_budget

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowvram_grpo.memory.devices import Device
    from lowvram_grpo.plan.planner import Plan, Planner
    from lowvram_grpo.recipe.resolve import Recipe


_LESS_ON_THE_HOST = (
    "take a smaller model, set weight_offload, embedding_offload or activation_offload to off, or try all the same "
    "with --memory-plan off"
)


def fit(
    recipe: Recipe,
    config: PretrainedConfig,
    device: Device,
    tell: Callable[[str], None],
    *,
    cold_start: bool,
    longest_prompt: int | None,
) -> Recipe:
    """`recipe` with the savers that it takes to fit `device`, or with what its free memory can be used for; unchanged
    on a CPU, whose memory the system and the data live in too, and with memory_plan off.

    Args:
        config: of the model.
        tell: hears what of the card is ours, what was chosen and what it will take.
        cold_start: the reference may get an adapter of its own.
        longest_prompt: of the data, in tokens.

    Raises:
        UserError: no configuration fits; the sentence says what would.
    """
    if device.kind != "cuda":
        return recipe
    ours = budget(device, recipe.training.get("vram_gib"))
    for sentence in ours.notices:
        tell(sentence)
    tell(f"{device.name}: {gib(ours.usable_bytes)} are ours ({ours.reason}); preset {recipe.preset}.")
    if recipe.memory_plan == "off":
        return recipe
    from lowvram_grpo.memory.cards import present
    from lowvram_grpo.memory.overheads import CUDA
    from lowvram_grpo.plan.planner import Planner

    half = "bfloat16" if device.bf16 else "float16"
    # The context is there already, and the prediction counts one.
    room = ours.allocator_bytes + CUDA.context
    card = present(device.index, device.total_bytes / 2**30, device.uuid)
    planner = Planner(config, half=half, cold_start=cold_start, longest_prompt=longest_prompt, card=card)
    plan = _planned(planner, recipe, room, tell)
    if plan is None:
        return recipe
    if not plan.fits:
        raise UserError(
            f"{recipe.model} does not fit: the predicted peak is {gib(plan.prediction.peak)}, and "
            f"there is room for {gib(room)} on {device.name}. What would: {'; '.join(plan.advice)}. "
            "(--memory-plan off tries anyway.)"
        )
    check_host(plan.prediction.host, host_of(device.system), _LESS_ON_THE_HOST)
    for sentence in _chosen(plan):
        tell(sentence)
    return plan.recipe


def _planned(planner: Planner, recipe: Recipe, room: int, tell: Callable[[str], None]) -> Plan | None:
    """The plan for `room` bytes; None where the model can't be predicted, which is no reason not to train it."""
    from lowvram_grpo.plan.prediction import CannotPredict

    try:
        return planner.plan(recipe, room)
    except UserError:
        raise
    except CannotPredict as error:
        tell(f"no memory plan: {error}; the run begins as the preset says, and takes savers when memory runs out.")
    except Exception as error:  # code of a model that does not run on meta tensors
        tell(
            f"no memory plan: {type(error).__name__} while predicting this model ({one_line(error)}); the run begins "
            "as the preset says, and takes savers when memory runs out."
        )
    return None


def _chosen(plan: Plan) -> Iterator[str]:
    """What a plan has chosen, in sentences."""
    taken = f"; taken for it: {', '.join(map(str, plan.rungs))}" if plan.rungs else ""
    yield (
        f"memory plan: a peak of {gib(plan.prediction.peak)} of {gib(plan.budget)} is predicted, in the "
        f"{plan.prediction.peak_phase} phase{taken}."
    )
    if plan.prediction.on_host:
        yield f"host memory: {words(plan.prediction.host)} is predicted."
    if plan.fetching:
        yield plan.fetching.words
    if plan.layers:
        yield plan.layers.words
        if plan.climbs:
            yield f"raised for it: {', '.join(climb.words for climb in plan.climbs)}."
    elif plan.climbs:
        yield f"climbed: {climbed(plan)}. --memory-plan savers keeps the preset's settings."
        if any(climb.rung.key in ("quantization", "head_dtype") for climb in plan.climbs):
            yield (
                "on this base a recipe gives other numbers than on the preset's, which rounds; recipe.toml has it "
                "for --resume, chat, eval and --adapter."
            )


def climbed(plan: Plan) -> str:
    """What was raised and what for, as a phrase."""
    raised = ", ".join(climb.words for climb in plan.climbs)
    room = f"{plan.prediction.peak / 2**30:.1f} of {gib(plan.budget)}"
    time = f"modelled by counts for {plan.card}, a step takes {plan.time:.0%} of the preset's time"
    return f"{raised} (predicted {room}; {time})"


def plan_on_paper(
    recipe: Recipe,
    config: PretrainedConfig,
    card: float,
    *,
    device: str = "cuda",
    half: str = "bfloat16",
    advise: bool = True,
) -> Plan:
    """The plan for a card that need not be there.

    Args:
        card: its size in GB as it is sold; the budget is what a Windows desktop leaves of it.
        device, half: of `Planner`.
        advise: say what else would fit, where nothing does.
    """
    from lowvram_grpo.memory.cards import typical
    from lowvram_grpo.plan.planner import Planner

    planner = Planner(config, device=device, half=half, card=typical(card))
    return planner.plan(recipe, card_budget(card), advise=advise)
