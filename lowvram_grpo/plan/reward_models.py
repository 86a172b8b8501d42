"""What reward models add to a prediction, by where they are kept.

On the card they take their weights in every phase. In turn, or on the card, their weights and activations stand beside
the policy's own weights while they score: a phase of its own, after a rollout's cache is gone. On the CPU they take
nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.memory.ladder import REWARD
from lowvram_grpo.memory.ledger import ACTIVATIONS, Ledger
from lowvram_grpo.memory.overheads import Overheads, on
from lowvram_grpo.plan.prediction import WEIGHTS, CannotPredict, Prediction
from lowvram_grpo.plan.stand_in import StandIn
from lowvram_grpo.policy.load import DTYPES
from lowvram_grpo.rewards.model import ROWS
from lowvram_grpo.rewards.registry import is_model, resolve_reward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig

    from lowvram_grpo.memory.cards import Card

# Under this name they stand in tables.
CATEGORY = "reward models"


class Judge(NamedTuple):
    """Bytes of a reward model: its weights, and what a forward pass of `ROWS` completions adds at its peak."""

    weights: int
    activations: int


def models_of(specs: Sequence[str]) -> tuple[str, ...]:
    """Folders and hub ids among the rewards of a recipe.

    Raises:
        UserError: one of them is neither a built-in nor a model.
    """
    found = (resolve_reward(spec)[0] for spec in specs if is_model(spec))
    return tuple(name for name in found if isinstance(name, str))


def judge_of(name: str, length: int, card: Card | None) -> Judge:
    """The bytes of the reward model `name`, for completions that are `length` tokens long with their prompts.

    Raises:
        UserError: there is no such model.
        CannotPredict: it can't be built on meta tensors.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(_base_of(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"The reward model {name!r} has no configuration to plan with ({one_line(error)}).") from error
    try:
        return _counted(config, length, on("cuda", card).block)
    except Exception as error:  # code of a model that does not run on meta tensors
        raise CannotPredict(f"the reward model {name} can't be counted ({type(error).__name__})") from error


def _base_of(name: str) -> str:
    """The model that an adapter is of; another model's own name."""
    from transformers.utils import find_adapter_config_file

    try:
        adapter = find_adapter_config_file(name)
    except Exception:  # no folder, and no hub to ask
        return name
    if adapter is None:
        return name
    from peft import PeftConfig

    return PeftConfig.from_pretrained(name).base_model_name_or_path or name


def _counted(config: PretrainedConfig, length: int, block: int) -> Judge:
    from transformers import AutoModelForSequenceClassification

    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min(length, limit or length)
    config.use_cache = False
    config.num_labels, config.pad_token_id = 1, getattr(config, "pad_token_id", None) or 0
    stored = getattr(config, "dtype", None) or torch.float32
    dtype = DTYPES[stored] if isinstance(stored, str) else stored
    ledger = Ledger(block=block)
    with StandIn("cuda"), ledger, torch.inference_mode(), torch.device("meta"):
        with ledger.making(CATEGORY):
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()
        ledger.tag(CATEGORY, [*model.parameters(), *model.buffers()])
        weights = ledger.categories.get(CATEGORY, 0)
        with ledger.phase(REWARD) as peak:
            # Rows are padded, so each has a mask of its own: given whole, or transformers looks at its values. Models
            # with an attention of their own take it a row each.
            ids = torch.zeros(ROWS, length, dtype=torch.long)
            try:
                model(input_ids=ids, attention_mask=torch.ones(ROWS, 1, length, length, dtype=torch.bool))
            except RuntimeError:
                model(input_ids=ids, attention_mask=torch.ones(ROWS, length, dtype=torch.long))
    return Judge(weights, peak.bytes - weights)


def with_reward_models(
    found: Prediction, judges: Sequence[Judge], place: str, overheads: Overheads, names: Sequence[str] = WEIGHTS
) -> Prediction:
    """`found` with reward models in it, kept at `place` (GRPOConfig's reward_model_device)."""
    if not judges or place == "cpu":
        return found
    everywhere = sum(judge.weights for judge in judges) if place != "in_turn" else 0
    there = everywhere or max(judge.weights for judge in judges)
    parts = {name: _more(made_of, CATEGORY, everywhere) for name, made_of in found.parts.items()}
    rollout = found.parts["rollout"]
    moving = max(judge.activations for judge in judges)
    parts[REWARD] = {name: rollout[name] for name in (*names, "CUDA context") if rollout.get(name)}
    parts[REWARD] |= {CATEGORY: there, ACTIVATIONS: moving, "fragmentation": round(moving * overheads.fragmentation)}
    phases = {name: size + everywhere for name, size in found.phases.items()}
    phases[REWARD] = sum(parts[REWARD].values())
    return replace(found, phases=phases, parts=parts, categories=parts[max(phases, key=phases.__getitem__)])


def _more(parts: dict[str, int], name: str, size: int) -> dict[str, Any]:
    return {**parts, name: size} if size else parts
