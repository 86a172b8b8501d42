"""Prompts become token ids: the chat template, special tokens, and the cut to max_prompt_length."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_grpo.data.messages import is_conversational, joined
from lowvram_grpo.data.rendering import UserTurn, chat_ids, check_tokenizer, rendered
from lowvram_grpo.errors import UserError, counted

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CHECKED = 1000
# As TRL calls it.
KWARGS_COLUMN = "chat_template_kwargs"


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, *, chat_template_kwargs: dict[str, Any] | None
) -> None:
    """Whether the prompts of a dataset can be rendered and encoded: its first rows stand for all.

    Raises:
        UserError: as `encode_prompts`, or the chat template shows nothing of a conversation, or was applied before.
    """
    check_tokenizer(tokenizer)
    first = dataset.select(range(min(len(dataset), _CHECKED)))
    prompts, own = first["prompt"][:], row_kwargs(first) or [{}] * len(first)
    chats = [prompt for prompt in prompts if is_conversational(prompt)]
    given = [{**(chat_template_kwargs or {}), **k} for prompt, k in zip(prompts, own) if is_conversational(prompt)]
    texts = [rendered(tokenizer, chat, kwargs) for chat, kwargs in zip(chats, given)]
    _check_roles(tokenizer, chats, texts, given)
    encode_prompts(tokenizer, prompts[:1], max_prompt_length=None, chat_template_kwargs=chat_template_kwargs)
    for chat, text in zip(chats, texts):
        begun = next((t for t in tokenizer.all_special_tokens if text.startswith(t)), None)
        if begun and chat[-1]["role"] == "user" and str(chat[-1]["content"]).lstrip().startswith(begun):
            raise UserError(
                f"A prompt begins with {begun!r} inside a user's turn, as the chat template does: it went through "
                "a chat template already; take prompts that did not, or leave out template, system prompt and examples."
            )


def _check_roles(tokenizer: PreTrainedTokenizerBase, chats: list, texts: list[str], given: list[dict]) -> None:
    """Whether the chat template shows the messages of every role that there is: many leave out what they don't know.

    Raises:
        UserError: it does not.
    """
    asks = chats and any(message["role"] == "user" for message in chats[0])
    if asks and rendered(tokenizer, [_more(message) for message in chats[0]], given[0]) == texts[0]:
        raise UserError(
            "The chat template renders every conversation as the same text, without its messages; pass "
            "--chat-template plain, or a .jinja file that prints messages."
        )
    seen: set[str] = set()
    for chat, text, kwargs in zip(chats, texts, given):
        for role in {message["role"] for message in chat} - seen:
            seen.add(role)
            other = [_more(message) if message["role"] == role else message for message in chat]
            if rendered(tokenizer, other, kwargs) == text:
                raise UserError(
                    f"The chat template leaves out messages of role {role!r}, so the model would not see them; rename "
                    "the role (system, user and assistant are the usual ones), drop such messages, or pass another "
                    "--chat-template."
                )


def _more(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": f"{joined(message['content'])} and more"}


def row_kwargs(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The arguments for the chat template that each row brings in a column of its own, over the run's; None where
    there is no such column. Arrow fills what only other rows have with None, which is none of theirs.

    Raises:
        UserError: a row has something else there than a table of them.
    """
    found = [row.get(KWARGS_COLUMN) for row in rows]
    return [_as_kwargs(value) for value in found] if any(value is not None for value in found) else None


def _as_kwargs(value: Any) -> dict[str, Any]:
    try:
        table = json.loads(value) if isinstance(value, str) and value.strip() else value or {}
        return {name: each for name, each in dict(table).items() if each is not None}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"Column {KWARGS_COLUMN!r} holds {value!r}, which is no table of arguments for the chat template; write "
            '{"name": value} there, or rename the column.'
        ) from error


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
    own: Sequence[dict[str, Any]] | None = None,
) -> tuple[list[list[int]], int]:
    """Token ids of each prompt, and how many prompts were cut to `max_prompt_length` (tokens).

    `own` are arguments for the chat template of each prompt (`row_kwargs`), which go before `chat_template_kwargs`.

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
    given = [{**(chat_template_kwargs or {}), **k} for k in own] if own else [chat_template_kwargs] * len(prompts)
    if chats:
        for i, row in zip(chats, chat_ids(tokenizer, [prompts[i] for i in chats], [given[i] for i in chats])):
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
        turn = UserTurn.last_of(tokenizer, prompts[i], given[i]) if is_conversational(prompts[i]) else None
        in_turn = turn.cut(len(ids[i]), max_prompt_length) if turn else None
        ids[i] = in_turn or ids[i][-max_prompt_length:]
    return ids, len(cut)


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts with the special tokens that the tokenizer puts around them; those in front stand once,
    also where a text begins with them itself."""
    front = _special_tokens(tokenizer)[0]
    rows = tokenizer(texts, verbose=False)["input_ids"]
    n = len(front)
    return [row[n:] if n and row[:n] == front and row[n : 2 * n] == front else row for row in rows]


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
        total: prompts in the dataset; None where nobody knows.
        in_turn: those of `cut` that lose the middle of their last user turn; the others lose their left end.
        chats: whether prompts are conversations.
    """

    longest: int
    cut: int
    counted: int
    total: int | None
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
    whole: bool = True,
) -> LengthReport:
    """Encode the first `limit` prompts of a dataset with a `prompt` column, and count; without `whole` the dataset is
    the beginning of a longer one.

    Raises:
        UserError: as `encode_prompts`.
    """
    rows = dataset
    if hasattr(dataset, "select_columns"):
        rows = dataset.select_columns([name for name in ("prompt", KWARGS_COLUMN) if name in dataset.column_names])
    looked_at, batch = min(len(rows), limit), 512
    longest = cut = in_turn = 0
    for first in range(0, looked_at, batch):
        part = [rows[i] for i in range(first, min(first + batch, looked_at))]
        prompts, own = [row["prompt"] for row in part], row_kwargs(part)
        ids, _ = encode_prompts(
            tokenizer, prompts, max_prompt_length=None, chat_template_kwargs=chat_template_kwargs, own=own
        )
        lengths = [len(row) for row in ids]
        longest = max(longest, *lengths)
        for prompt, length, more in zip(prompts, lengths, own or [{}] * len(prompts)):
            if max_prompt_length is not None and length > max_prompt_length:
                cut += 1
                kwargs = {**(chat_template_kwargs or {}), **more}
                turn = UserTurn.last_of(tokenizer, prompt, kwargs) if is_conversational(prompt) else None
                in_turn += turn is not None and turn.leaves_room(max_prompt_length)
    total = len(rows) if whole else None
    return LengthReport(longest, cut, looked_at, total, in_turn, is_conversational(rows[0]["prompt"]))
