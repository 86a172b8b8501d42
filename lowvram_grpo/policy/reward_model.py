"""Loads a sequence-classification model as a reward, all its weights from its checkpoint; `rewards.model` scores."""

from __future__ import annotations

import os
import re
import warnings
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.policy.accounting import account
from lowvram_grpo.policy.adapter import check_whole
from lowvram_grpo.policy.refusals import beside_a_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# What the score is made by, above a base model.
_HEAD = re.compile(r"(^|\.)(score|classifier|classification_head|pooler)\.")


def load_reward_model(model_id: str, init_kwargs: dict[str, Any]) -> PreTrainedModel | PeftModel:
    """A model with one output (a score) from a folder or hub id, or an adapter on its base; on the CPU.

    Args:
        init_kwargs: for `from_pretrained`.

    Raises:
        UserError: it can't be loaded, lacks weights such as its score head, or has more than one output.
    """
    from transformers.utils import find_adapter_config_file

    hub = {key: init_kwargs[key] for key in ("revision", "token", "cache_dir") if key in init_kwargs}
    try:
        adapter = find_adapter_config_file(model_id, **hub)
        if adapter is None:
            model, report = _reported(model_id, init_kwargs)
        elif os.path.isfile(os.path.join(os.path.dirname(adapter), "config.json")):
            raise beside_a_model(model_id, os.path.dirname(adapter))
        else:
            model, report = _in_its_adapter(model_id, init_kwargs)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{model_id!r} can't be loaded as a reward model (sequence classification with one output): "
            f"{one_line(error)}."
        ) from error
    _check_head(model_id, report)
    account(model_id, model, report, warnings.warn)
    return model


def _reported(model_id: str, init_kwargs: dict) -> tuple[Any, dict]:
    from transformers import AutoModelForSequenceClassification

    settings = {"num_labels": 1, "trust_remote_code": False, **init_kwargs}
    settings |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    return AutoModelForSequenceClassification.from_pretrained(model_id, **settings)


def _in_its_adapter(model_id: str, init_kwargs: dict) -> tuple[Any, dict]:
    """An adapter on its base. from_pretrained would do it too, and report of the adapter alone, whatever its base
    lacks; a head that the adapter has saved is none that is missing."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(model_id)
    base, report = _reported(config.base_model_name_or_path, init_kwargs)
    model = PeftModel.from_pretrained(base, model_id)
    check_whole(f"The adapter {model_id}", model.load_adapter(model_id, model.active_adapter))
    saved = {*(config.modules_to_save or [])}
    report["missing_keys"] = {name for name in report["missing_keys"] if not saved & {*name.split(".")}}
    return model, report


def _check_head(model_id: str, report: dict) -> None:
    """Whether the score comes from the checkpoint. What else is missing is `account`'s to say.

    Raises:
        UserError: transformers has made the head up, or it has several outputs.
    """
    several = [theirs for name, theirs, ours in report["mismatched_keys"] if _HEAD.search(name) and ours[0] == 1]
    if several:
        raise UserError(
            f"{model_id!r} was trained with {several[0][0]} outputs, and a reward model has one score; give a model "
            "with one."
        )
    missing = sorted(report["missing_keys"])
    if missing and all(_HEAD.search(name) for name in missing):
        lacking = ", ".join(missing[:3])
        raise UserError(f"{model_id!r} is not a trained reward model: its checkpoint lacks {lacking}.")
