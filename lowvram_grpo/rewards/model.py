"""A sequence-classification model as a reward function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lowvram_grpo.data.encoding import text_ids
from lowvram_grpo.errors import UserError

# Rows a forward pass: a reward model shares the card with the policy.
_ROWS = 8


def model_name(model: Any) -> str:
    """What a reward model, or the folder or id of one, is called in metrics."""
    place = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    return place.replace("\\", "/").rstrip("/").split("/")[-1] or type(model).__name__


class RewardModel:
    """Scores `prompt + completion` with a model that has one output, in eval mode and without gradients.

    Args:
        model: a loaded module (moved to `device` unless it is quantized or dispatched).
        processing_class: its tokenizer; loaded from the model's own folder or id when None.
        device: where it runs.

    Raises:
        UserError: its tokenizer can't be loaded.
    """

    def __init__(self, model: Any, processing_class: Any, device: torch.device | str):
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


def _load_tokenizer(model_id: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_id)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the reward model {model_id!r} has no tokenizer that can be loaded: {reason}") from error
