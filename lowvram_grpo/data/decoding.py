"""Token ids become the text that rewards, logs and people read: all that the model said, but not what ends it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def silent_ids(tokenizer: PreTrainedTokenizerBase, sampled: Iterable[int] = ()) -> frozenset[int]:
    """Ids that end a completion or fill it up, of the tokenizer as of the sampler (`sampled`): they say nothing."""
    return frozenset({tokenizer.eos_token_id, tokenizer.pad_token_id, *sampled} - {None})


def spoken(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], silent: Collection[int]) -> str:
    """The text of a completion.

    Special tokens are text like any other unless they are `silent`: tags such as `<think>` are special tokens of many
    models, and the rewards look for them. Spaces stay as they were sampled.
    """
    return tokenizer.decode(
        [i for i in ids if i not in silent], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
