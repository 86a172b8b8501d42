"""A conversation as token ids that fit the model, and an answer's tokens as text while they come."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_grpo.data.decoding import silent_ids, spoken
from lowvram_grpo.data.encoding import encode_prompts
from lowvram_grpo.errors import UserError, counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
# A character has at most four bytes, hence four tokens: what is still no character after more never becomes one.
_LONGEST_CHARACTER = 4
# The least room in which an answer says something.
_FEWEST_NEW_TOKENS = 16


class TextStream:
    """Turns ids into text one at a time. A character whose bytes are spread over several tokens comes out whole.

    Each piece is the difference between two decodings of the last few tokens, since many tokenizers decode a token
    differently behind others than alone (the space in front of a word, bytes that make a character together).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, silent: Collection[int] | None = None):
        """`silent` are the ids that say nothing, by default the tokenizer's own."""
        self.tokenizer = tokenizer
        self.silent = silent_ids(tokenizer) if silent is None else silent
        self._ids: list[int] = []
        self._context = self._shown = 0  # both count ids

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._decoded(len(self._ids))
        waiting = len(self._ids) - self._shown
        if text.endswith(_UNFINISHED) and waiting <= _LONGEST_CHARACTER:
            return ""
        return self._take(text)

    def finish(self) -> str:
        """What is left when no more tokens come: a character that stays unfinished is shown as U+FFFD."""
        return self._take(self._decoded(len(self._ids)))

    def _take(self, text: str) -> str:
        piece = text[len(self._decoded(self._shown)) :]
        self._context, self._shown = self._shown, len(self._ids)
        return piece

    def _decoded(self, end: int) -> str:
        return spoken(self.tokenizer, self._ids[self._context : end], self.silent)


class Prompt(NamedTuple):
    """Ids of a whole conversation.

    Attributes:
        dropped: messages that had to go for it to fit.
        room: tokens that an answer may have.
    """

    ids: list[int]
    dropped: int
    room: int


class Conversation:
    """The turns so far.

    Args:
        system: messages that always stand first (a system turn, or none).
        shots: worked examples behind it, user and assistant in turn.
        positions: the model's; None: unlimited.

    Attributes:
        templated: whether the tokenizer has a chat template. Without one each text is continued by itself.
        turns: messages of the person and the model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: list[dict[str, str]],
        shots: list[dict[str, str]],
        positions: int | None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.tokenizer, self.system, self.shots, self.positions = tokenizer, system, shots, positions
        self.chat_template_kwargs = chat_template_kwargs
        self.templated = bool(tokenizer.chat_template)
        self.turns: list[dict[str, str]] = []

    def set_system(self, text: str) -> None:
        """Replace the system turn; an empty text removes it."""
        self.system = [{"role": "system", "content": text}] if text else []

    def reset(self) -> None:
        self.turns = []

    def ask(self, text: str, new_tokens: int) -> Prompt:
        """Add a person's turn. Where the prompt and an answer of `new_tokens` exceed the model's positions, the oldest
        turns go; where this turn is all that is left, the answer gets the room that there is.

        Raises:
            UserError: not even a short answer fits, or the chat template refuses the turn; it is not added.
        """
        before = list(self.turns)
        self.turns = [*before, {"role": "user", "content": text}]
        try:
            return self._fitted(text, new_tokens)
        except UserError:
            self.turns = before
            raise

    def answer(self, text: str) -> None:
        """Add the model's turn."""
        self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget the last turn of the person, which was not answered."""
        self.turns.pop()

    def _fitted(self, text: str, new_tokens: int) -> Prompt:
        dropped, ids = 0, self._ids(text)
        if not self.positions:
            return Prompt(ids, dropped, new_tokens)
        while len(ids) + new_tokens > self.positions and self.templated and len(self.turns) > 2:
            del self.turns[:2]
            dropped += 2
            ids = self._ids(text)
        room = min(new_tokens, self.positions - len(ids))
        if room < min(new_tokens, _FEWEST_NEW_TOKENS):
            raise UserError(
                f"This takes {counted(len(ids), 'token')} with what stands before it, which leaves no room for an "
                f"answer: the model has {self.positions} positions; shorten it."
            )
        return Prompt(ids, dropped, room)

    def _ids(self, text: str) -> list[int]:
        prompt = [*self.system, *self.shots, *self.turns] if self.templated else text
        ids, _ = encode_prompts(
            self.tokenizer, [prompt], max_prompt_length=None, chat_template_kwargs=self.chat_template_kwargs
        )
        return ids[0]
