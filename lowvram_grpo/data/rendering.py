"""A conversation through the chat template: its text, its token ids, and its ids without the middle of a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.messages import in_text
from lowvram_grpo.errors import UserError, counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEFT_OUT = " ... "
# With less of it than this, the text of a user says nothing, and the left end is the smaller loss.
_FEWEST_TOKENS_OF_A_TURN = 16
# The cut is looked for by interpolation: two or three tries land within this many tokens of the limit.
_SLACK, _TRIES = 4, 8


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], kwargs: dict[str, Any]) -> str:
    """The text of a conversation, with the generation prompt behind it, or left open where the last turn is the
    assistant's.

    Args:
        kwargs: of the chat template.

    Raises:
        UserError: there is no chat template, or it refuses the conversation.
    """
    from jinja2 import TemplateSyntaxError

    if not tokenizer.chat_template:
        check_tokenizer(tokenizer)
        raise UserError(
            "The prompts are conversations, but this model's tokenizer has no chat template; pass --chat-template "
            "plain, or a .jinja file, or use plain-text prompts without a template, system prompt or few-shot examples."
        )
    goes_on = messages[-1]["role"] == "assistant"
    # Arrow fills the keys that only some messages have with None, and many templates print it.
    messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
    try:
        messages = in_text(messages)  # many templates print a list of parts as Python does, or nothing at all
    except ValueError as error:
        raise UserError(f"A prompt {error}.") from error
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on, **kwargs
        )
    except TemplateSyntaxError as error:
        raise UserError(
            f"The chat template is no Jinja template (line {error.lineno}: {error.message}); mend it, or pass "
            "--chat-template with `plain` or another .jinja file."
        ) from error
    except Exception as error:  # a template is a program of somebody else's: it may do anything but print
        reason = " ".join(str(error).split()).rstrip(".")
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(
            f"The chat template refuses a conversation of {roles} ({reason}); change the system prompt, few-shot "
            "examples or messages to fit it, or pass another --chat-template."
        ) from error


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, chats: list, kwargs: Sequence[dict[str, Any] | None]
) -> list[list[int]]:
    """Token ids of each conversation; `kwargs`, one for each, and errors are those of `rendered`."""
    texts = [rendered(tokenizer, chat, own or {}) for chat, own in zip(chats, kwargs)]
    # The chat template has written the special tokens already.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


class UserTurn:
    """The last user turn of a conversation, of which the middle can be left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list, index: int, kwargs: dict[str, Any] | None):
        self.tokenizer, self.messages, self.index, self.kwargs = tokenizer, messages, index, kwargs
        self.text = messages[index]["content"]
        self.frame = self._with(0)

    @classmethod
    def last_of(cls, tokenizer, messages: list, kwargs: dict[str, Any] | None) -> UserTurn | None:
        messages = in_text(messages)
        users = [i for i, m in enumerate(messages) if m["role"] == "user" and isinstance(m["content"], str)]
        return cls(tokenizer, messages, users[-1], kwargs) if users else None

    def leaves_room(self, limit: int) -> bool:
        """Whether a cut to `limit` tokens keeps enough of the turn for it to mean something."""
        return limit - len(self.frame) >= _FEWEST_TOKENS_OF_A_TURN

    def cut(self, tokens: int, limit: int) -> list[int] | None:
        """Ids of the conversation with as much of the turn as fits; None where it does not leave room.

        Args:
            tokens: length of the whole conversation, more than `limit`.
        """
        if not self.leaves_room(limit):
            return None
        best, low, high = self.frame, 0, len(self.text)
        for _ in range(_TRIES):
            if limit - len(best) <= _SLACK or high - low <= 1:
                break
            guess = low + (high - low) * (limit - len(best)) // (tokens - len(best))
            kept = min(max(guess, low + 1), high - 1)
            ids = self._with(kept)
            if len(ids) <= limit:
                best, low = ids, kept
            else:
                tokens, high = len(ids), kept
        return best

    def _with(self, characters: int) -> list[int]:
        """Ids of the conversation with this many characters of the turn, half of them from each of its ends."""
        head, tail = (characters + 1) // 2, characters // 2
        text = self.text[:head].rstrip() + _LEFT_OUT + self.text[len(self.text) - tail :].lstrip()
        changed = {**self.messages[self.index], "content": text}
        messages = [*self.messages[: self.index], changed, *self.messages[self.index + 1 :]]
        return chat_ids(self.tokenizer, [messages], [self.kwargs])[0]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether there is a tokenizer: for a folder without its files transformers makes one that knows no words.

    Raises:
        UserError: it encodes nothing.
    """
    ids = tokenizer("Any text at all: 1 a", add_special_tokens=False)["input_ids"]
    only_special = {*tokenizer.get_vocab()} <= {*tokenizer.all_special_tokens}
    if not ids or (only_special and {*ids} == {tokenizer.unk_token_id}):
        place = getattr(tokenizer, "name_or_path", "") or "the model"
        raise UserError(
            f"The tokenizer of {place} encodes nothing ({counted(len(tokenizer), 'token')}): its files are missing; "
            "copy tokenizer.json and tokenizer_config.json from where the model comes from into its folder."
        )
