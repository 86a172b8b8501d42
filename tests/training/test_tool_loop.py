"""Tools are called, their answers stand where TRL's would, and what they do to the process is put back."""

from __future__ import annotations

import os
import random

import pytest
import torch
from chatting import END, calling, chat_tokenizer, ids_of

from lowvram_grpo.data.tool_calls import ToolSpeech, schemas_of
from lowvram_grpo.rewards.guards import World
from lowvram_grpo.rollout.turns import Turn
from lowvram_grpo.training.tool_loop import ToolLoop, named_tools


def multiply(a: int, b: int) -> int:
    """Multiplies.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


async def later(a: int) -> str:
    """Says it later.

    Args:
        a: Anything.
    """
    return f"later {a}"


def fails() -> str:
    """Fails."""
    raise RuntimeError("out of order")


def leaves() -> str:
    """Leaves."""
    raise SystemExit("gone")


def parts() -> list:
    """Says it in parts."""
    return [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]


def draws() -> str:
    """Draws numbers, and changes what it should not."""
    os.chdir("/")
    return f"{random.random():.6f} {float(torch.rand(())):.6f}"


TOOLS = [multiply, later, fails, leaves, parts, draws]


@pytest.fixture
def tokenizer():
    return chat_tokenizer()


@pytest.fixture
def loop(tokenizer):
    def make(rows=2, **overrides):
        settings = {"iterations": None, "limit": 1000, "sampled": (END, 0), "kwargs": [{}] * rows, **overrides}
        speech = ToolSpeech(tokenizer, schemas_of(TOOLS), {})
        return ToolLoop(tokenizer, speech, [named_tools(TOOLS)] * rows, [[5]] * rows, **settings)

    return make


def turn(tokenizer, row, text, before=()):
    ids = ids_of(tokenizer, text)
    return Turn(row, [*before, *ids], ids, ids[-1] == END)


def contents(loop, row=0):
    return [message["content"] for message in loop.messages[row] if message["role"] == "tool"]


def test_answers_and_frequencies(tokenizer, loop):
    talk = loop(3)
    texts = [calling("multiply", a=3, b=4), calling("multiply", a=3, c=4), "No tool.<|im_end|>"]
    first, second, third = talk.reply([turn(tokenizer, i, text) for i, text in enumerate(texts)])
    answer = "\n<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(first) == answer.format("12")
    assert "unexpected keyword argument 'c'" in tokenizer.decode(second) and third is None
    assert talk.messages[0][1] == {"role": "tool", "name": "multiply", "content": "12"}
    assert talk.messages[2] == [{"role": "assistant", "content": "No tool."}]
    assert talk.metrics() == {"tools/call_frequency": pytest.approx(2 / 3), "tools/failure_frequency": 0.5}
    assert talk.reply([turn(tokenizer, 0, "12<|im_end|>", [*ids_of(tokenizer, texts[0]), *first])]) == [None]
    assert [message["role"] for message in talk.messages[0]] == ["assistant", "tool", "assistant"]


def test_what_goes_wrong_is_the_answer(tokenizer, loop):
    talk = loop(1)
    calls = [calling("fails"), calling("leaves"), calling("nobody", x=1), calling("later", b=1), calling("parts")]
    talk.reply([turn(tokenizer, 0, "".join(call.removesuffix("<|im_end|>") for call in calls) + "<|im_end|>")])
    said = contents(talk)
    assert said[:3] == ["{'error': 'out of order'}", "{'error': 'gone'}", "{'error': 'Tool nobody not found.'}"]
    assert "unexpected keyword argument 'b'" in said[3] and said[4] == "one two"
    assert (talk.calls, talk.failures) == (5, 4)


def test_async_tools_fail_one_by_one_and_keep_their_loop(tokenizer, loop):
    talk = loop(2)
    talk.reply([turn(tokenizer, 0, calling("later", a=1)), turn(tokenizer, 1, calling("later", wrong=1))])
    assert contents(talk, 0) == ["later 1"] and talk.failures == 1


def test_as_many_iterations_as_allowed(tokenizer, loop):
    talk, call = loop(1, iterations=1), calling("multiply", a=1, b=2)
    behind = talk.reply([turn(tokenizer, 0, call)])[0]
    assert talk.reply([turn(tokenizer, 0, call, [*ids_of(tokenizer, call), *behind])]) == [None]
    assert talk.calls == 1 and "tool_calls" in talk.messages[0][-1]


def test_an_answer_without_room_is_none(tokenizer, loop):
    """The engine leaves it out, and so do the messages. The call counts, as in TRL."""
    call = calling("multiply", a=1, b=2)
    fits = loop(1)
    more = fits.reply([turn(tokenizer, 0, call)])[0]
    room = len(ids_of(tokenizer, call)) + len(more)
    not_quite = loop(1, limit=room)
    assert not_quite.reply([turn(tokenizer, 0, call)])[0] == more
    assert len(fits.messages[0]) == 2 and len(not_quite.messages[0]) == 1 and not_quite.calls == 1
    just = loop(1, limit=room + 1)
    just.reply([turn(tokenizer, 0, call)])
    assert len(just.messages[0]) == 2


def test_a_turn_that_was_cut_calls_nothing(tokenizer, loop):
    talk, ids = loop(1), ids_of(tokenizer, calling("multiply", a=1, b=2))[:-1]
    assert talk.reply([Turn(0, ids, ids, False)]) == [None] and talk.calls == 0


def test_the_process_is_put_back_and_draws_depend_on_the_conversation_alone(tokenizer, loop):
    world, here, call = World(), os.getcwd(), calling("draws")
    random.seed(3), torch.manual_seed(3)
    expected = random.random(), float(torch.rand(()))
    random.seed(3), torch.manual_seed(3)
    together = loop(2, entered=lambda: world.entered(0), seed=7)
    together.reply([turn(tokenizer, 0, call), turn(tokenizer, 1, call)])
    assert os.getcwd() == here and (random.random(), float(torch.rand(()))) == expected
    alone = loop(2, entered=lambda: world.entered(0), seed=7)
    alone.reply([turn(tokenizer, 1, call)])
    assert contents(alone, 1) == contents(together, 1) != contents(together, 0)
