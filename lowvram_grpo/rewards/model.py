"""A sequence-classification model as a reward function."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from lowvram_grpo.data.encoding import text_ids
from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.policy.accounting import account
from lowvram_grpo.policy.adapter import check_whole
from lowvram_grpo.policy.refusals import beside_a_model

# What the score is made by, above a base model.
_HEAD = re.compile(r"(^|\.)(score|classifier|classification_head|pooler)\.")
# Rows a forward pass: a reward model shares the card with the policy.
_ROWS = 8


def model_name(model: Any) -> str:
    """What a reward model, or the folder or id of one, is called in metrics."""
    place = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    return place.replace("\\", "/").rstrip("/").split("/")[-1] or type(model).__name__


class RewardModel:
    """Scores `prompt + completion` with a model that has one output, in eval mode and without gradients.

    Args:
        model: a folder, a hub id, or a loaded module (moved to `device` unless it is quantized or dispatched).
        processing_class: its tokenizer; loaded from the model's own folder or id when None.
        device: where it runs.
        model_init_kwargs: for `from_pretrained` when `model` is a string.

    Raises:
        UserError: it can't be loaded, lacks weights such as its score head, or has more than one output.
    """

    def __init__(self, model: Any, processing_class: Any, device: torch.device | str, model_init_kwargs: dict | None):
        if isinstance(model, str):
            model = _load(model, model_init_kwargs or {})
        model_id = getattr(model.config, "_name_or_path", None) or ""
        self.__name__ = model_name(model)
        if not getattr(model, "is_quantized", False) and not hasattr(model, "hf_device_map"):
            model = model.to(device)
        self.device = next(model.parameters()).device
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = processing_class if processing_class is not None else _load_tokenizer(model_id)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # A decoder takes its score at the last token that is not this one; unset, it takes the padding's.
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.inference_mode()
    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        """One score per row.

        Raises:
            UserError: no chat template for messages, more than one output, or a row longer than the model.
        """
        texts, templated = self._texts(prompts, completions)
        scores: list[float] = []
        for start in range(0, len(texts), _ROWS):
            batch = self.tokenizer.pad(
                {"input_ids": self._ids(texts[start : start + _ROWS], templated)},
                return_tensors="pt",
                padding_side="right",
                verbose=False,
            )
            self._check_length(batch["input_ids"].shape[1])
            logits = self.model(**batch.to(self.device)).logits  # (rows, 1)
            if logits.shape[-1] != 1:
                raise UserError(
                    f"the reward model {self.__name__!r} has {logits.shape[-1]} outputs; load it with num_labels=1."
                )
            scores += logits[:, 0].float().tolist()
        return scores

    def _ids(self, texts: list[str], templated: bool) -> list[list[int]]:
        # A chat template writes its special tokens itself.
        if templated:
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return text_ids(self.tokenizer, texts)

    def _texts(self, prompts: Sequence, completions: Sequence) -> tuple[list[str], bool]:
        if isinstance(prompts[0], str):
            return [p + c for p, c in zip(prompts, completions)], False
        if not self.tokenizer.chat_template:
            raise UserError(
                f"the prompts are messages, but the tokenizer of reward model {self.__name__!r} has no chat template; "
                "set its chat_template or use plain-text prompts."
            )
        messages = [[*p, *c] for p, c in zip(prompts, completions)]
        return self.tokenizer.apply_chat_template(messages, tokenize=False), True

    def _check_length(self, length: int) -> None:
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise UserError(
                f"prompt and completion make {length} tokens, but the reward model {self.__name__!r} reads {longest}; "
                "lower --max-prompt-length or --max-completion-length."
            )


def _load(model_id: str, init_kwargs: dict) -> Any:
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


def _load_tokenizer(model_id: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_id)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the reward model {model_id!r} has no tokenizer that can be loaded: {reason}") from error
