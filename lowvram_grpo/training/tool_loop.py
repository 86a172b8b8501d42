"""A rollout in which the model calls tools: each of its turns is read, what it calls is run, and the answers go behind
its turn as the chat template renders them.

Metrics, as TRL's: `tools/call_frequency`, calls per completion; `tools/failure_frequency`, the share of calls that
raised or named no tool. What a tool raises is its answer, `{"error": ...}`: the model reads it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.decoding import silent_ids, spoken
from lowvram_grpo.data.messages import joined
from lowvram_grpo.data.tool_calls import Message, ToolSpeech, is_async, name_of
from lowvram_grpo.errors import Terminated
from lowvram_grpo.rewards.guards import seed_all
from lowvram_grpo.rollout.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Mapping[str, Callable]


def named_tools(tools: Sequence[Callable]) -> dict[str, Callable]:
    return {name_of(tool): tool for tool in tools}


class ToolLoop:
    """The conversations of one rollout; `reply` is what `RolloutEngine.converse` asks.

    Args:
        speech: how the model calls tools and hears their answers; None where it has none.
        tools: of each conversation, by name; B of them.
        prompts: token ids of each conversation's prompt.
        iterations: how often a conversation's calls are answered at most; None: as often as it has room.
        limit: tokens of a completion, turns and answers together.
        sampled: ids that end a turn or fill it up, of the sampler.
        kwargs: of the chat template, of each conversation.
        entered: around other people's code.
        seed: of the random numbers that it sees; a conversation's turn has its own.

    Attributes:
        messages: of each conversation, what follows its prompt: turns of the assistant, answers of tools.
        calls, failures: how many there were.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        speech: ToolSpeech | None,
        tools: Sequence[Tools],
        prompts: Sequence[Sequence[int]],
        *,
        iterations: int | None,
        limit: int,
        sampled: Sequence[int],
        kwargs: Sequence[Mapping[str, Any]],
        entered: Callable[[], AbstractContextManager] = nullcontext,
        seed: int = 0,
    ):
        self.tokenizer, self.speech, self.tools, self.prompts = tokenizer, speech, tools, prompts
        self.iterations, self.limit, self._entered, self._seed = iterations, limit, entered, seed
        self.kwargs = [{name: value for name, value in of.items() if name != "tools"} for of in kwargs]
        self._silent, self._ends = silent_ids(tokenizer, sampled), tuple(sampled)
        self.messages: list[list[Message]] = [[] for _ in tools]
        self._answered = [0] * len(tools)
        self.calls = self.failures = 0

    def reply(self, turns: list[Turn]) -> list[list[int] | None]:
        """See `rollout.turns.Reply`."""
        asked: list[tuple[Turn, list[dict[str, Any]]]] = []
        for turn in turns:
            message = self._message(turn)
            self.messages[turn.row].append(message)
            over = not turn.ended or (self.iterations is not None and self._answered[turn.row] >= self.iterations)
            asked.append((turn, [] if over else message.get("tool_calls") or []))
        calls = [(turn, call) for turn, of_turn in asked for call in of_turn]
        answers = iter(self._run(calls) if calls else ())
        return [self._behind(turn, [next(answers) for _ in of_turn]) if of_turn else None for turn, of_turn in asked]

    def _message(self, turn: Turn) -> Message:
        text = spoken(self.tokenizer, turn.sampled, self._silent)
        if self.speech is None:
            return {"role": "assistant", "content": text}
        before = turn.ids[: len(turn.ids) - len(turn.sampled)]
        return self.speech.message(turn.sampled, text, [*self.prompts[turn.row], *before])

    def _behind(self, turn: Turn, answers: list[tuple[Message, bool]]) -> list[int]:
        """The tokens of the answers. Where they do not fit, the engine ends the conversation without them, and so do
        its messages."""
        self.calls += len(answers)
        self.failures += sum(failed for _, failed in answers)
        self._answered[turn.row] += 1
        messages = [message for message, _ in answers]
        ids = self.speech.answer_ids(messages, self.kwargs[turn.row], self._ends)
        if len(turn.ids) + len(ids) < self.limit:
            self.messages[turn.row] += messages
        return ids

    def _run(self, calls: Sequence[tuple[Turn, dict[str, Any]]]) -> list[tuple[Message, bool]]:
        """(message of role tool, whether it failed) of each call; async tools run at the same time as each other."""
        found: list[Any] = [None] * len(calls)
        waiting = {}
        with self._entered():
            for i, (turn, call) in enumerate(calls):
                function = call.get("function") or {}
                name, arguments = str(function.get("name", "unknown")), function.get("arguments") or {}
                tool = self.tools[turn.row].get(name)
                if tool is None:
                    found[i] = _answer(name, {"error": f"Tool {name} not found."}), True
                elif is_async(tool):
                    waiting[i] = name, tool, arguments
                else:
                    # What one conversation draws must not depend on which others have ended a turn with it.
                    seed_all(self._seed + 1_000_003 * (turn.row + 1) + len(turn.ids))
                    found[i] = _called(name, tool, arguments)
            if waiting:
                for i, answer in zip(waiting, _ASYNC.run(list(waiting.values()))):
                    found[i] = answer
        return found

    def metrics(self) -> dict[str, float]:
        return {
            "tools/call_frequency": self.calls / max(1, len(self.tools)),
            "tools/failure_frequency": self.failures / self.calls if self.calls else 0.0,
        }


def _called(name: str, tool: Callable, arguments: dict[str, Any]) -> tuple[Message, bool]:
    try:
        return _answer(name, tool(**arguments)), False
    except Terminated:
        raise
    except (Exception, SystemExit) as error:  # a tool is the user's program, and its arguments are the model's
        return _answer(name, {"error": str(error)}), True


class _Loop:
    """An event loop in a thread of its own, since a notebook has one running in this. One for the whole process:
    clients that a tool keeps stay bound to it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, calls: Sequence[tuple[str, Callable, dict[str, Any]]]) -> list[tuple[Message, bool]]:
        """Coroutine functions, at the same time as each other."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="async-tools", daemon=True).start()

        async def called(name: str, tool: Callable, arguments: dict[str, Any]) -> tuple[Message, bool]:
            try:
                return _answer(name, await tool(**arguments)), False
            except (Exception, SystemExit) as error:
                return _answer(name, {"error": str(error)}), True

        async def gathered() -> list[tuple[Message, bool]]:
            return await asyncio.gather(*(called(*each) for each in calls))

        return asyncio.run_coroutine_threadsafe(gathered(), self._loop).result()


_ASYNC = _Loop()


def _answer(name: str, result: Any) -> Message:
    """A list of text parts is the text; what else a tool returns is shown as Python shows it."""
    parts = (
        isinstance(result, list) and bool(result) and all(isinstance(part, dict) and "type" in part for part in result)
    )
    return {"role": "tool", "name": name, "content": joined(result) if parts else str(result)}
