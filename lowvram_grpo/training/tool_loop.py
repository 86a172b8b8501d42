"""A rollout in which the model calls tools: each of its turns is read, what it calls is run, and the answers go behind
its turn as the chat template renders them.

Metrics, as TRL's: `tools/call_frequency`, calls per completion; `tools/failure_frequency`, the share of calls that
raised or named no tool. What a tool raises is its answer, `{"error": ...}`: the model reads it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.decoding import silent_ids, spoken
from lowvram_grpo.data.tool_calls import Message, answer_ids, is_async, name_of, parsed
from lowvram_grpo.errors import Terminated
from lowvram_grpo.rollout.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Mapping[str, Callable]


def named_tools(tools: Sequence[Callable]) -> dict[str, Callable]:
    return {name_of(tool): tool for tool in tools}


class ToolLoop:
    """The conversations of one rollout; `reply` is what `RolloutEngine.converse` asks.

    Args:
        tools: of each conversation, by name; B of them.
        iterations: how often a conversation's calls are answered at most; None: as often as it has room.
        limit: tokens of a completion, turns and answers together.
        sampled: ids that end a turn or fill it up, of the sampler.
        kwargs: of the chat template.

    Attributes:
        messages: of each conversation, what follows its prompt: turns of the assistant, answers of tools.
        calls, failures: how many there were.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Tools],
        *,
        iterations: int | None,
        limit: int,
        sampled: Sequence[int],
        kwargs: Mapping[str, Any] | None,
    ):
        self.tokenizer, self.tools, self.iterations, self.limit = tokenizer, tools, iterations, limit
        self.kwargs = {name: value for name, value in (kwargs or {}).items() if name != "tools"}
        self._silent = silent_ids(tokenizer, sampled)
        self.messages: list[list[Message]] = [[] for _ in tools]
        self._answered = [0] * len(tools)
        self.calls = self.failures = 0

    def reply(self, turns: list[Turn]) -> list[list[int] | None]:
        """See `rollout.turns.Reply`."""
        asked: list[tuple[Turn, list[dict[str, Any]]]] = []
        for turn in turns:
            text = spoken(self.tokenizer, turn.sampled, self._silent)
            message = parsed(self.tokenizer, turn.sampled, text, list(self.tools[turn.row]))
            self.messages[turn.row].append(message)
            over = not turn.ended or (self.iterations is not None and self._answered[turn.row] >= self.iterations)
            asked.append((turn, [] if over else message.get("tool_calls") or []))
        answers = iter(_run([(self.tools[turn.row], call) for turn, calls in asked for call in calls]))
        return [self._behind(turn, [next(answers) for _ in calls]) if calls else None for turn, calls in asked]

    def _behind(self, turn: Turn, answers: list[tuple[Message, bool]]) -> list[int]:
        """The tokens of the answers. Where they do not fit, the engine ends the conversation without them, and so do
        its messages."""
        self.calls += len(answers)
        self.failures += sum(failed for _, failed in answers)
        self._answered[turn.row] += 1
        messages = [message for message, _ in answers]
        ids = answer_ids(self.tokenizer, messages, self.kwargs)
        if len(turn.ids) + len(ids) < self.limit:
            self.messages[turn.row] += messages
        return ids

    def metrics(self) -> dict[str, float]:
        return {
            "tools/call_frequency": self.calls / max(1, len(self.tools)),
            "tools/failure_frequency": self.failures / self.calls if self.calls else 0.0,
        }


def _run(calls: Sequence[tuple[Tools, dict[str, Any]]]) -> list[tuple[Message, bool]]:
    """(message of role tool, whether it failed) of each call; async tools run at the same time as each other."""
    found: list[tuple[Message, bool] | None] = [None] * len(calls)
    waiting = {}
    for i, (tools, call) in enumerate(calls):
        function = call.get("function") or {}
        name, arguments = str(function.get("name", "unknown")), function.get("arguments") or {}
        tool = tools.get(name)
        if tool is None:
            found[i] = _answer(name, {"error": f"Tool {name} not found."}), True
        elif is_async(tool):
            waiting[i] = name, tool, arguments
        else:
            found[i] = _called(name, tool, arguments)
    if waiting:
        for i, answer in zip(waiting, _in_a_loop(list(waiting.values()))):
            found[i] = answer
    return found


def _called(name: str, tool: Callable, arguments: dict[str, Any]) -> tuple[Message, bool]:
    try:
        return _answer(name, tool(**arguments)), False
    except Terminated:
        raise
    except Exception as error:  # a tool is the user's program, and its arguments are the model's
        return _answer(name, {"error": str(error)}), True


def _in_a_loop(calls: list[tuple[str, Callable, dict[str, Any]]]) -> list[tuple[Message, bool]]:
    """Coroutine functions, together, in a thread of their own: a notebook has a loop running in this one."""
    outcomes: list[Any] = []

    async def gathered() -> list[Any]:
        return await asyncio.gather(*(tool(**arguments) for _, tool, arguments in calls), return_exceptions=True)

    def work() -> None:
        try:
            outcomes.extend(asyncio.run(gathered()))
        except BaseException as error:  # arguments that a tool does not take raise before there is anything to await
            outcomes.extend([error] * len(calls))

    thread = threading.Thread(target=work, name="async-tools", daemon=True)
    thread.start()
    thread.join()
    failed = [isinstance(outcome, BaseException) for outcome in outcomes]
    return [
        (_answer(name, {"error": str(outcome)} if bad else outcome), bad)
        for (name, *_), outcome, bad in zip(calls, outcomes, failed)
    ]


def _answer(name: str, result: Any) -> Message:
    return {"role": "tool", "name": name, "content": str(result)}
