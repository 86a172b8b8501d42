"""`lowvram-grpo chat`: answers on stdout alone, a conversation at the terminal, and mistakes in one sentence."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, make_model, make_tokenizer

from lowvram_grpo.cli import app
from lowvram_grpo.cli.chat_screen import Chat
from lowvram_grpo.data.conversation import Conversation, Prompt
from lowvram_grpo.jobs.inference import find_adapter, load_policy, recipe_to_sample, stream_answer
from lowvram_grpo.jobs.loading import load_tokenizer_of, training_config
from lowvram_grpo.rollout.engine import RolloutEngine

DEMO = str(Path(app.__file__).parents[1] / "demo" / "model")


def call(monkeypatch, capsys, *arguments, stdin=None):
    """(exit code, stdout, stderr) of `lowvram-grpo`; stdin is what is piped in."""
    monkeypatch.setattr(sys, "argv", ["lowvram-grpo", *map(str, arguments)])
    piped = io.TextIOWrapper(io.BytesIO(stdin if stdin is not None else b""), encoding="cp1252")
    monkeypatch.setattr(sys, "stdin", piped)
    with pytest.raises(SystemExit) as stop:
        app.main()
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


def sentence(result):
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err
    return lines[0]


GREEDY = ("--temperature", "0", "--max-new-tokens", "6", "--use-cpu")


@pytest.fixture
def run(monkeypatch, capsys, job, tmp_path):
    """A run of two steps with a learning rate that changes every answer."""
    options = {**job, "--max-steps": "2", "--learning-rate": "0.05", "--save-steps": "1"}
    assert call(monkeypatch, capsys, "train", *(part for pair in options.items() for part in pair))[0] == 0
    return tmp_path / "run"


def greedy(monkeypatch, capsys, *arguments):
    code, out, err = call(monkeypatch, capsys, "chat", *arguments, *GREEDY, "--prompt", "a b c d")
    assert code == 0, err
    return out


def test_a_prompt_gets_the_answer_alone_on_stdout(monkeypatch, capsys, model_dir):
    code, out, err = call(monkeypatch, capsys, "chat", "-m", model_dir, *GREEDY, "--prompt", "a b c")
    tokenizer, ids = make_tokenizer(), make_tokenizer()("a b c")["input_ids"]
    import torch

    expected = make_model().generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    assert (code, out) == (0, tokenizer.decode(expected, skip_special_tokens=True) + "\n"), err


def test_a_pipe_is_the_same_as_a_prompt(monkeypatch, capsys, model_dir):
    prompt = greedy(monkeypatch, capsys, "-m", model_dir)
    code, out, _ = call(monkeypatch, capsys, "chat", "-m", model_dir, *GREEDY, stdin=b"\xef\xbb\xbfa b c d\r\n")
    assert (code, out) == (0, prompt)


def test_a_pipe_is_utf_8_whatever_the_console_is(monkeypatch, capsys, model_dir):
    seen = []
    monkeypatch.setattr(Chat, "answer", lambda self, text, show: seen.append(text))
    call(monkeypatch, capsys, "chat", "-m", model_dir, "--use-cpu", stdin="你好 🎉\nб\n".encode())
    call(monkeypatch, capsys, "chat", "-m", model_dir, "--use-cpu", stdin="caf\u00e9\n".encode("cp1252"))
    assert seen[0] == "你好 🎉\nб" and seen[1].startswith("caf")


def test_a_seed_repeats_an_answer(monkeypatch, capsys, model_dir):
    hot = ("chat", "-m", model_dir, "--temperature", "2", "--top-p", "1", "--max-new-tokens", "12", "--use-cpu")
    draws = [call(monkeypatch, capsys, *hot, "-p", "a b", "--seed", seed)[1] for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_a_run_brings_its_model_and_adapter(monkeypatch, capsys, run, model_dir):
    base, trained = (greedy(monkeypatch, capsys, *a) for a in (("-m", model_dir), ("--adapter", run)))
    assert base != trained
    assert greedy(monkeypatch, capsys, "--adapter", run / "adapter") == trained
    assert greedy(monkeypatch, capsys, "--adapter", run / "checkpoint-2") == trained
    assert greedy(monkeypatch, capsys, "--adapter", run, "-m", model_dir) == trained


def test_an_adapter_without_a_run_names_its_base(monkeypatch, capsys, run, tmp_path):
    trained = greedy(monkeypatch, capsys, "--adapter", run)
    shutil.copytree(run / "adapter", tmp_path / "elsewhere" / "mine")
    assert greedy(monkeypatch, capsys, "--adapter", tmp_path / "elsewhere" / "mine") == trained


def test_a_run_that_goes_on_is_talked_to_at_its_newest_checkpoint(monkeypatch, capsys, run):
    trained = greedy(monkeypatch, capsys, "--adapter", run)
    shutil.rmtree(run / "adapter")
    code, out, err = call(monkeypatch, capsys, "chat", "--adapter", run, *GREEDY, "-p", "a b c d")
    assert (code, out) == (0, trained) and "taking checkpoint-2" in err
    assert find_adapter(str(run))[0] == str(run / "checkpoint-2")


def test_a_run_without_an_adapter_says_so(monkeypatch, capsys, run):
    for folder in ("adapter", "checkpoint-1", "checkpoint-2"):
        shutil.rmtree(run / folder, ignore_errors=True)
    text = sentence(call(monkeypatch, capsys, "chat", "--adapter", run, "-p", "a"))
    assert "neither an adapter nor a whole checkpoint" in text and "--resume" in text


def test_a_model_that_moved_away_is_named(monkeypatch, capsys, run, model_dir):
    shutil.move(model_dir, model_dir + "-moved")
    text = sentence(call(monkeypatch, capsys, "chat", "--adapter", run, "-p", "a"))
    assert model_dir in text and "was trained on" in text and "pass --model" in text
    assert greedy(monkeypatch, capsys, "--adapter", run, "-m", model_dir + "-moved")


@pytest.mark.parametrize(
    "arguments,words",
    [
        ((), ["--model", "--adapter"]),
        (("-m", "/no/such/model"), ["/no/such/model"]),
        (("--adapter", "/no/such/run"), ["/no/such/run"]),
        (("--adapter", "{tmp}"), ["holds no adapter"]),
        (("-m", DEMO, "--temperature", "-1"), ["temperature is -1", "at least 0"]),
        (("-m", DEMO, "--top-p", "0"), ["top_p is 0"]),
        (("-m", DEMO, "--max-new-tokens", "0"), ["max_new_tokens is 0"]),
        (("-m", DEMO, "-p", "1+1=" * 12), ["48 positions", "shorten it"]),
        (("-m", DEMO, "--tempertaure", "1"), ["--tempertaure", "--temperature"]),
        (("-m", DEMO, "--quantization", "int3"), ["quantization", "nf4"]),
        (("-m", DEMO, "--system", "be brief"), ["--system", "--chat-template plain"]),
        (("-m", DEMO, "--chat-template", "none.jinja"), ["none.jinja"]),
    ],
)
def test_one_clear_sentence(monkeypatch, capsys, tmp_path, arguments, words):
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    text = sentence(call(monkeypatch, capsys, "chat", "-p", "1+1=", *arguments, "--use-cpu"))
    for word in words:
        assert word in text, text


def test_nothing_to_answer(monkeypatch, capsys):
    assert "nothing to answer" in sentence(call(monkeypatch, capsys, "chat", "-m", DEMO, stdin=b" \n"))


# At the terminal


@pytest.fixture
def policy(run):
    recipe = recipe_to_sample({"adapter": str(run), "use_cpu": True}, lambda text: None)
    tokenizer = load_tokenizer_of(recipe)
    tokenizer.chat_template = CHAT_TEMPLATE
    return load_policy(recipe, training_config(recipe, weights=[]), tokenizer, lambda text: None)


class Talk:
    """A person who types `lines`, and what was said to them."""

    def __init__(self, monkeypatch, policy, *lines, new_tokens=6):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        self.told: list[str] = []
        conversation = Conversation(policy.tokenizer, system=[], shots=[], positions=policy.positions)
        sampling = replace(policy.sampling, temperature=0.0, max_new_tokens=new_tokens)
        self.chat = Chat(policy, conversation, sampling, 0, self.told.append)
        self.chat.talk()

    @property
    def turns(self):
        return [turn["content"] for turn in self.chat.conversation.turns]


def test_a_conversation_is_kept_until_it_is_reset(monkeypatch, capsys, policy):
    talk = Talk(monkeypatch, policy, "a b", "c", "", "   ")
    assert talk.turns[::2] == ["a b", "c"] and all(talk.turns[1::2])
    assert sum("tokens/s" in text for text in talk.told) == 2
    assert all(answer in capsys.readouterr().out for answer in talk.turns[1:2])
    assert Talk(monkeypatch, policy, "a b", "/reset", "c").turns[0] == "c"


def test_base_switches_the_adapter_off_and_on_again(monkeypatch, policy):
    talk = Talk(monkeypatch, policy, "a b", "/reset", "/base", "a b")
    off = talk.turns[1]
    talk = Talk(monkeypatch, policy, "a b", "/reset", "/base", "/base", "a b")
    on = talk.turns[1]
    first = Talk(monkeypatch, policy, "a b").turns[1]
    assert on == first != off and talk.told[-2] == "adapter on."


def test_commands(monkeypatch, policy):
    talk = Talk(monkeypatch, policy, "/system be brief", "/help", "/nonsense", "/exit", "never read")
    assert talk.chat.conversation.system == [{"role": "system", "content": "be brief"}] and talk.turns == []
    assert "/reset" in talk.told[1] and "/nonsense is no command" in talk.told[2] and len(talk.told) == 3


def test_without_a_chat_template_there_is_no_system_prompt(monkeypatch, policy):
    policy.tokenizer.chat_template = None
    talk = Talk(monkeypatch, policy, "/system be brief")
    assert talk.chat.conversation.system == [] and "no place" in talk.told[0]


def test_an_answer_is_as_short_as_the_positions_allow(monkeypatch, policy):
    talk = Talk(monkeypatch, policy, "a " * 100, new_tokens=60)
    assert "room for an answer of 26 tokens" in talk.told[0] and talk.told[1].startswith(("26 ", "1 ", "2 "))


def test_several_lines_between_quotes_are_one_turn(monkeypatch, policy):
    assert Talk(monkeypatch, policy, '"""', "a", "", "b", '"""').turns[0] == "a\n\nb"


def test_ctrl_c_stops_an_answer_and_keeps_it(monkeypatch, capsys, policy):
    inner = RolloutEngine.stream

    def interrupted(self, *args, **kwargs):
        for number, token in enumerate(inner(self, *args, **kwargs)):
            if number == 3:
                raise KeyboardInterrupt
            yield token

    whole = Talk(monkeypatch, policy, "a b").turns[1]
    monkeypatch.setattr(RolloutEngine, "stream", interrupted)
    talk = Talk(monkeypatch, policy, "a b", KeyboardInterrupt)
    assert len(talk.turns) == 2 and whole.startswith(talk.turns[1]) and whole != talk.turns[1]
    assert "stopped" in talk.told[0] and "/exit" in talk.told[1]


def test_an_answer_ends_at_every_end_id(policy):
    tokens = policy.engine.stream([5, 6], seed=0, sampling=replace(policy.sampling, temperature=0.0, max_new_tokens=8))
    drawn = list(tokens)
    ends = replace(policy.sampling, temperature=0.0, max_new_tokens=8, eos_ids=(1, drawn[3]))
    answer = stream_answer(policy, [5, 6], ends, 0, lambda piece: None)
    at = drawn.index(drawn[3])
    assert answer.ended and answer.tokens == at + 1
    assert answer.text == policy.tokenizer.decode(drawn[:at], skip_special_tokens=True)


def test_the_oldest_turns_are_dropped_aloud(monkeypatch, policy):
    talk = Talk(monkeypatch, policy, *["a b c d e f g h"] * 12)
    assert any("128 positions" in text and "dropped" in text for text in talk.told)
    assert len(talk.turns) < 24


def test_a_text_that_is_too_long_is_not_kept(monkeypatch, policy):
    talk = Talk(monkeypatch, policy, "a " * 200, "b")
    assert talk.turns[0] == "b" and "128 positions" in talk.told[0]


def test_memory_that_runs_out_keeps_the_conversation(monkeypatch, policy):
    import torch

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        yield

    monkeypatch.setattr(RolloutEngine, "stream", full)
    talk = Talk(monkeypatch, policy, "a b")
    assert talk.turns == [] and "Out of GPU memory" in talk.told[0]


def test_a_runs_template_opens_the_conversation(monkeypatch, capsys, job, tmp_path):
    options = {
        **job,
        "--template": "tldr",
        "--chat-template": "plain",
        "--cold-start": "off",
        "--reward": "label",
    }
    code, _, err = call(monkeypatch, capsys, "train", *(part for pair in options.items() for part in pair))
    assert code == 0, err
    seen = []
    monkeypatch.setattr(Conversation, "ask", lambda self, text, new: seen.append(self) or Prompt([5, 6], 0, new))
    assert call(monkeypatch, capsys, "chat", "--adapter", tmp_path / "run", *GREEDY, "-p", "a")[0] == 0
    system, shots = seen[0].system, seen[0].shots
    assert "<answer></answer>" in system[0]["content"] and [m["role"] for m in shots] == ["user", "assistant"]
    given = ("--adapter", tmp_path / "run", "--system", "be brief", *GREEDY, "-p", "a")
    assert call(monkeypatch, capsys, "chat", *given)[0] == 0
    assert seen[1].system == [{"role": "system", "content": "be brief"}]
    assert json.dumps(seen[1].shots) == json.dumps(shots)
