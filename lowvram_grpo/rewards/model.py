"""A sequence-classification model as a reward function, on the card, on the CPU, or on the card while it scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lowvram_grpo.data.encoding import text_ids
from lowvram_grpo.data.messages import in_text
from lowvram_grpo.errors import UserError, is_out_of_memory

Visitor = Callable[[nn.Module, torch.device], AbstractContextManager]

# Rows a forward pass: a reward model shares the card with the policy. Halved where memory runs out.
ROWS = 8


def model_name(model: Any) -> str:
    """What a reward model, or the folder or id of one, is called in metrics."""
    place = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    return place.replace("\\", "/").rstrip("/").split("/")[-1] or type(model).__name__


class RewardModel:
    """Scores `prompt + completion` with a model that has one output, in eval mode and without gradients.

    Args:
        model: a loaded module (moved unless it is quantized or dispatched).
        processing_class: its tokenizer; loaded from the model's own folder or id when None.
        device: of the policy.
        place: `cuda` keeps it there; `auto` too, or `in_turn` where there is no room; `cpu` keeps and runs it on the
            CPU; `in_turn` keeps it in host memory, page-locked where `device` is a GPU, and has its weights on
            `device` while it scores.
        visitor: for in_turn, keeps a model in host memory, and its weights on a device while the context that it
            returns is entered (`policy.visitor.Visitor`).

    Attributes:
        device: where it runs.
        movable: whether `place` can be chosen.

    Raises:
        UserError: its tokenizer can't be loaded.
    """

    def __init__(self, model: Any, processing_class: Any, device: torch.device | str, place: str = "cuda",
                 visitor: Visitor | None = None):  # fmt: skip
        model_id = getattr(model.config, "_name_or_path", None) or ""
        self.__name__ = model_name(model)
        self.movable = not getattr(model, "is_quantized", False) and not hasattr(model, "hf_device_map")
        self.model = model.eval().requires_grad_(False)
        self._policy_device, self._rows = torch.device(device), ROWS
        self._visitor = visitor
        self._there: AbstractContextManager = nullcontext()
        try:
            self.place("cuda" if place == "auto" else place)
        except Exception as error:
            if place != "auto" or not is_out_of_memory(error):
                raise
            self.place("in_turn")
        self.tokenizer = processing_class if processing_class is not None else _load_tokenizer(model_id)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # A decoder takes its score at the last token that is not this one; unset, it takes the padding's.
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.config.use_cache = False  # nothing is read again: keys and values would only be held

    def place(self, place: str) -> None:
        """Keep it elsewhere from now on."""
        self._there = nullcontext()
        if not self.movable:
            self.device = next(self.model.parameters()).device
            return
        self.device = torch.device("cpu") if place == "cpu" else self._policy_device
        if place == "in_turn" and self.device.type != "cpu":
            assert self._visitor is not None, "nothing was given that keeps models in host memory"
            self._there = self._visitor(self.model, self.device)
        else:
            self.model.to(self.device)
        if self._policy_device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        """One score per row.

        Raises:
            UserError: no chat template for messages, more than one output, a row longer than the model, or no memory
                for a single row.
        """
        texts, templated = self._texts(prompts, completions)
        scores: list[float] = []
        while True:
            try:
                with self._there:
                    while len(scores) < len(texts):
                        scores += self._scored(texts[len(scores) : len(scores) + self._rows], templated)
                    return scores
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the except block, where nothing of the failed attempt is held any more.
            if self._rows == 1:
                raise UserError(
                    f"Out of GPU memory while the reward model {self.__name__!r} scores one completion; keep it "
                    "elsewhere (--reward-model-device in_turn, or cpu), or lower --max-completion-length."
                )
            self._rows //= 2
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _scored(self, texts: list[str], templated: bool) -> list[float]:
        batch = self.tokenizer.pad(
            {"input_ids": self._ids(texts, templated)}, return_tensors="pt", padding_side="right", verbose=False
        )
        self._check_length(batch["input_ids"].shape[1])
        logits = self.model(**batch.to(self.device)).logits  # (rows, 1)
        if logits.shape[-1] != 1:
            raise UserError(
                f"the reward model {self.__name__!r} has {logits.shape[-1]} outputs; load it with num_labels=1."
            )
        return logits[:, 0].float().tolist()

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
        messages = [in_text([*p, *c]) for p, c in zip(prompts, completions)]
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
