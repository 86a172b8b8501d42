"""Prompts become token ids: the chat template, special tokens, and the cut to max_prompt_length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_grpo.data.messages import in_text, is_conversational
from lowvram_grpo.errors import UserError, counted

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_LEFT_OUT = " ... "
# With less of it than this, the text of a user says nothing, and the left end is the smaller loss.
_FEWEST_TOKENS_OF_A_TURN = 16
# The cut is looked for by interpolation: two or three tries land within this many tokens of the limit.
_SLACK, _TRIES = 4, 8
_CHECKED = 1000


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, *, chat_template_kwargs: dict[str, Any] | None
) -> None:
    """Whether the prompts of a dataset can be rendered and encoded: its first rows stand for all.

    Raises:
        UserError: as `encode_prompts`, or the chat template shows nothing of a conversation, or was applied before.
    """
    check_tokenizer(tokenizer)
    prompts = dataset.select(range(min(len(dataset), _CHECKED)))["prompt"]
    chats = [prompt for prompt in prompts if is_conversational(prompt)]
    texts = [_rendered(tokenizer, chat, chat_template_kwargs or {}) for chat in chats]
    _check_roles(tokenizer, chats, texts, chat_template_kwargs or {})
    encode_prompts(tokenizer, prompts[:1], max_prompt_length=None, chat_template_kwargs=chat_template_kwargs)
    for chat, text in zip(chats, texts):
        begun = next((t for t in tokenizer.all_special_tokens if text.startswith(t)), None)
        if begun and chat[-1]["role"] == "user" and str(chat[-1]["content"]).lstrip().startswith(begun):
            raise UserError(
                f"A prompt begins with {begun!r} inside a user's turn, as the chat template does: it went through "
                "a chat template already; take prompts that did not, or leave out template, system prompt and examples."
            )


def _check_roles(tokenizer: PreTrainedTokenizerBase, chats: list, texts: list[str], kwargs: dict[str, Any]) -> None:
    """Whether the chat template shows the messages of every role that there is: many leave out what they don't know.

    Raises:
        UserError: it does not.
    """
    asks = chats and any(message["role"] == "user" for message in chats[0])
    if asks and _rendered(tokenizer, [_more(message) for message in chats[0]], kwargs) == texts[0]:
        raise UserError(
            "The chat template renders every conversation as the same text, without its messages; pass "
            "--chat-template plain, or a .jinja file that prints messages."
        )
    seen: set[str] = set()
    for chat, text in zip(chats, texts):
        for role in {message["role"] for message in chat} - seen:
            seen.add(role)
            other = [_more(message) if message["role"] == role else message for message in chat]
            if _rendered(tokenizer, other, kwargs) == text:
                raise UserError(
                    f"The chat template leaves out messages of role {role!r}, so the model would not see them; rename "
                    "the role (system, user and assistant are the usual ones), drop such messages, or pass another "
                    "--chat-template."
                )


def _more(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": f"{message['content']} and more"}


def raw_text_notice(tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> str | None:
    """A sentence for people whose plain prompts go past the chat template of an instruct model; else None."""
    if not tokenizer.chat_template or any(map(is_conversational, prompts)):
        return None
    return (
        "the prompts are plain text and reach the model as they are, without its chat template; for an instruct model "
        "pass --system-prompt or --template, which make them conversations."
    )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str | list[dict[str, str]]],
    *,
    max_prompt_length: int | None,
    chat_template_kwargs: dict[str, Any] | None,
) -> tuple[list[list[int]], int]:
    """Token ids of each prompt, and how many prompts were cut to `max_prompt_length` (tokens).

    A conversation is followed by the generation prompt, or, where its last turn is the assistant's, left open for that
    turn to go on. Plain text gets the special tokens that the tokenizer puts in front of a text, once (text that went
    through a chat template has them already), and none behind it.

    A conversation that is too long loses the middle of its last user turn: what asks for the answer stands before that
    turn (system prompt, examples), behind it (the generation prompt), or at either end of it. Where that is not enough,
    and in plain text, the left end goes, as in TRL.

    Raises:
        UserError: the tokenizer has no chat template, the template refuses a conversation, or a prompt has no tokens.
    """
    chats = [i for i, prompt in enumerate(prompts) if is_conversational(prompt)]
    plain = sorted({*range(len(prompts))} - {*chats})
    ids: list[list[int]] = [[] for _ in prompts]
    if chats:
        for i, row in zip(chats, _chat_ids(tokenizer, [prompts[i] for i in chats], chat_template_kwargs)):
            ids[i] = row
    if plain:
        behind = len(_special_tokens(tokenizer)[1])
        for i, row in zip(plain, text_ids(tokenizer, [prompts[i] for i in plain])):
            ids[i] = row[: len(row) - behind]
    for prompt, row in zip(prompts, ids):
        if not row:
            check_tokenizer(tokenizer)
            raise UserError(f"The prompt {prompt!r} has no tokens, so there is nothing to continue; drop such rows.")
    if max_prompt_length is None:
        return ids, 0
    cut = [i for i, row in enumerate(ids) if len(row) > max_prompt_length]
    for i in cut:
        turn = _Turn.last_of(tokenizer, prompts[i], chat_template_kwargs) if is_conversational(prompts[i]) else None
        in_turn = turn.cut(len(ids[i]), max_prompt_length) if turn else None
        ids[i] = in_turn or ids[i][-max_prompt_length:]
    return ids, len(cut)


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


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts with the special tokens that the tokenizer puts around them; those in front stand once,
    also where a text begins with them itself."""
    front = _special_tokens(tokenizer)[0]
    rows = tokenizer(texts, verbose=False)["input_ids"]
    n = len(front)
    return [row[n:] if n and row[:n] == front and row[n : 2 * n] == front else row for row in rows]


def _chat_ids(tokenizer: PreTrainedTokenizerBase, chats: list, kwargs: dict[str, Any] | None) -> list[list[int]]:
    texts = [_rendered(tokenizer, chat, kwargs or {}) for chat in chats]
    # The chat template has written the special tokens already.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


class _Turn:
    """The last user turn of a conversation, of which the middle can be left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list, index: int, kwargs: dict[str, Any] | None):
        self.tokenizer, self.messages, self.index, self.kwargs = tokenizer, messages, index, kwargs
        self.text = messages[index]["content"]
        self.frame = self._with(0)

    @classmethod
    def last_of(cls, tokenizer, messages: list, kwargs: dict[str, Any] | None) -> _Turn | None:
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
        return _chat_ids(self.tokenizer, [messages], self.kwargs)[0]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], kwargs: dict[str, Any]) -> str:
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


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts in front of a text (a BOS) and behind it (an EOS, a SEP)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    size = len(bare)
    first = next((i for i in range(len(full) - size, -1, -1) if full[i : i + size] == bare), None) if bare else None
    return ([], []) if first is None else (full[:first], full[first + size :])


class LengthReport(NamedTuple):
    """Prompt lengths in tokens, before any cut.

    Attributes:
        longest: the longest prompt.
        cut: prompts longer than max_prompt_length.
        counted: prompts looked at, the first ones of the dataset.
        total: prompts in the dataset.
        in_turn: those of `cut` that lose the middle of their last user turn; the others lose their left end.
        chats: whether prompts are conversations.
    """

    longest: int
    cut: int
    counted: int
    total: int
    in_turn: int
    chats: bool

    def sentence(self, max_prompt_length: int | None) -> str:
        """How many prompts are cut, and where; empty if none is."""
        if not self.cut:
            return ""
        of = counted(self.counted, "prompt")
        of = of if self.counted == self.total else f"the first {of}"
        one, left = self.cut == 1, self.cut - self.in_turn
        longer = f"{self.cut} of {of} {'is' if one else 'are'} longer than max_prompt_length {max_prompt_length}"
        middle = "the middle of the last user turn"
        end = f"the left end ({'system prompt and examples first' if self.chats else 'as in TRL'})"
        if self.in_turn and left:
            return f"{longer}; {self.in_turn} {'loses' if self.in_turn == 1 else 'lose'} {middle}, {left} {end}."
        return f"{longer} and {'loses' if one else 'lose'} {middle if self.in_turn else end}."


def prompt_length_report(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    max_prompt_length: int | None,
    chat_template_kwargs: dict[str, Any] | None,
    limit: int = 20_000,
) -> LengthReport:
    """Encode the first `limit` prompts of a dataset with a `prompt` column, and count.

    Raises:
        UserError: as `encode_prompts`.
    """
    rows = dataset.select_columns("prompt") if hasattr(dataset, "select_columns") else dataset
    looked_at, batch = min(len(rows), limit), 512
    longest = cut = in_turn = 0
    for first in range(0, looked_at, batch):
        prompts = [rows[i]["prompt"] for i in range(first, min(first + batch, looked_at))]
        ids, _ = encode_prompts(tokenizer, prompts, max_prompt_length=None, chat_template_kwargs=chat_template_kwargs)
        lengths = [len(row) for row in ids]
        longest = max(longest, *lengths)
        for prompt, length in zip(prompts, lengths):
            if max_prompt_length is not None and length > max_prompt_length:
                cut += 1
                turn = _Turn.last_of(tokenizer, prompt, chat_template_kwargs) if is_conversational(prompt) else None
                in_turn += turn is not None and turn.leaves_room(max_prompt_length)
    return LengthReport(longest, cut, looked_at, len(rows), in_turn, is_conversational(rows[0]["prompt"]))
