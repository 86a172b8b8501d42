"""`lowvram-grpo chat`: talk to a model, or to what a run made of it. Answers go to stdout, all else to stderr."""

from __future__ import annotations

import contextlib
import locale
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from lowvram_grpo.cli.train import parse_extra, prepare_cuda
from lowvram_grpo.errors import UserError, counted, is_out_of_memory
from lowvram_grpo.run.quiet import hush

if TYPE_CHECKING:
    from lowvram_grpo.data.conversation import Conversation, Prompt
    from lowvram_grpo.jobs.inference import Answer, LoadedPolicy
    from lowvram_grpo.recipe.resolve import Recipe
    from lowvram_grpo.rollout.sampler import Sampling

_NEW_TOKENS = 512
_HELP = """\
/reset        forget the conversation
/system TEXT  another system prompt; without TEXT none
/base         adapter off, and on again: the model before training
/exit         the end, as Ctrl-D (Windows: Ctrl-Z, Enter)
Ctrl-C        stops an answer and keeps what there is of it
\"\"\"           on a line of its own begins and ends a text of several lines"""


def start(
    flags: dict[str, Any], extra: list[str], *, prompt: str | None, max_new_tokens: int | None, filters: dict[str, Any]
) -> None:
    """Load and talk: to a person at a terminal, else one answer to `prompt` or to what stdin holds.

    Args:
        flags: the recipe's settings that were given; `extra` has more of them as arguments.
        filters: temperature, top_p, top_k, min_p and repetition_penalty, as `Sampling` has them.

    Raises:
        UserError: as loading, or a prompt that is blank or too long.
    """
    notice = prepare_cuda()
    hush()
    from lowvram_grpo.jobs.inference import load_policy, recipe_to_sample
    from lowvram_grpo.jobs.loading import check_device, load_tokenizer_of, training_config

    check_filters(filters, max_new_tokens)
    console = Console(stderr=True, highlight=False)
    tell = lambda text: console.print(escape(text), style="dim", soft_wrap=not console.is_terminal)
    at_terminal = prompt is None and sys.stdin.isatty()
    if not at_terminal:
        prompt = _given(prompt)
    if notice:
        tell(notice)
    recipe = recipe_to_sample({**flags, **parse_extra(extra)}, tell)
    recipe.training.pop("reward_weights", None)
    check_device(recipe)
    tokenizer = load_tokenizer_of(recipe)
    args = training_config(recipe, weights=[])
    if "system_prompt" in flags and not tokenizer.chat_template:
        raise UserError(
            "--system needs a chat template, and this model's tokenizer has none; pass --chat-template plain, or a "
            ".jinja file."
        )
    with console.status(f"loading {escape(recipe.model)}"):
        policy = load_policy(recipe, args, tokenizer, tell)
    if max_new_tokens is None:
        max_new_tokens = min(_NEW_TOKENS, policy.positions // 2) if policy.positions else _NEW_TOKENS
    sampling = replace(policy.sampling, max_new_tokens=max_new_tokens, extra={}, **filters)
    chat = Chat(policy, _conversation(recipe, policy), sampling, args.seed, tell)
    if at_terminal:
        chat.introduce()
        chat.talk()
    else:
        chat.answer(prompt, lambda piece: print(piece, end="", flush=True))
        print()


def check_filters(filters: dict[str, Any], max_new_tokens: int | None) -> None:
    """Whether these can be sampled with.

    Raises:
        UserError: one is out of its range.
    """
    from lowvram_grpo.recipe.ranges import TRAINING_RANGES, Range, check_ranges

    ranges = {**TRAINING_RANGES, "temperature": Range(at_least=0), "max_new_tokens": Range(at_least=1)}
    check_ranges({**filters, "max_new_tokens": max_new_tokens}, ranges)


def _given(prompt: str | None) -> str:
    """The prompt of a call without a person: the option's, or all of stdin."""
    if prompt is None:
        raw = getattr(sys.stdin, "buffer", None)
        prompt = _text(raw.read()) if raw else sys.stdin.read()
    if not prompt.strip():
        raise UserError("There is nothing to answer; pass --prompt with a question, or pipe one in.")
    return prompt.rstrip("\r\n")


def _text(content: bytes) -> str:
    """UTF-8, else what the system writes (a pipe of PowerShell does)."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode(locale.getpreferredencoding(False), errors="replace")


def _conversation(recipe: Recipe, policy: LoadedPolicy) -> Conversation:
    """As the run's prompts began: its system prompt or template's, and worked examples."""
    from lowvram_grpo.data.conversation import Conversation
    from lowvram_grpo.data.load import opening_turns
    from lowvram_grpo.jobs.task import few_shot

    system, shots = opening_turns(recipe.template, recipe.system_prompt, few_shot(recipe.few_shot))
    return Conversation(
        policy.tokenizer,
        system=system,
        shots=shots,
        positions=policy.positions,
        chat_template_kwargs=policy.args.chat_template_kwargs,
    )


class Chat:
    """A conversation with a policy at a terminal.

    Args:
        tell: shows a sentence about the conversation, beside it.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        conversation: Conversation,
        sampling: Sampling,
        seed: int,
        tell: Callable[[str], None],
    ):
        self.policy, self.conversation, self.sampling, self.tell = policy, conversation, sampling, tell
        self.seed, self.adapter = seed, True

    def introduce(self) -> None:
        """What is there to talk to, and how it is sampled."""
        recipe, at = self.policy.recipe, self.sampling
        used = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        filters = [f"{name} {getattr(at, name):g}" for name, off in used.items() if getattr(at, name) != off]
        drawn = ", ".join([f"temperature {at.temperature:g}" if at.temperature else "greedy", *filters])
        adapter = f" with {recipe.adapter}" if recipe.adapter else ""
        self.tell(f"{recipe.model}{adapter} on {self.policy.args.device}; {drawn}, up to {at.max_new_tokens} tokens.")
        if self.conversation.templated:
            for message in self.conversation.system:
                self.tell(f"system: {message['content']}")
            if shots := self.conversation.shots:
                self.tell(f"{counted(len(shots) // 2, 'worked example')} of the run in front of the conversation.")
        else:
            self.tell(
                "This tokenizer has no chat template: each text is continued by itself (--chat-template plain makes "
                "a conversation of them)."
            )
        self.tell("/help lists the commands, Ctrl-D ends.")

    def talk(self) -> None:
        """Read, answer, and so on until the person leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for input()
        while True:
            try:
                line = self._read()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                self.tell("Ctrl-D or /exit ends.")
                continue
            if line.startswith("/"):
                if self._command(line) == "exit":
                    return
            elif line.strip():
                self._turn(line)

    def _read(self) -> str:
        line = input("> ")
        if line.strip() != '"""':
            return line
        lines: list[str] = []
        while (line := input("  ")).strip() != '"""':
            lines.append(line)
        return " " + "\n".join(lines) if lines and lines[0].startswith("/") else "\n".join(lines)

    def _command(self, line: str) -> str | None:
        name, _, rest = line[1:].partition(" ")
        if name in ("exit", "quit"):
            return "exit"
        if name == "reset":
            self.conversation.reset()
            self.tell("the conversation begins anew.")
        elif name == "system" and not self.conversation.templated:
            self.tell("without a chat template there is no place for a system prompt.")
        elif name == "system":
            self.conversation.set_system(rest.strip())
            self.tell(f"system: {rest.strip()}" if rest.strip() else "no system prompt.")
        elif name == "base":
            self._toggle()
        elif name == "help":
            self.tell(_HELP)
        else:
            self.tell(f"/{name} is no command (/help lists them); put a space in front to say it to the model.")
        return None

    def _toggle(self) -> None:
        if not self.policy.has_adapter:
            self.tell("there is no adapter: this is the base model.")
            return
        self.adapter = not self.adapter
        self.tell("adapter on." if self.adapter else "adapter off: the base model answers.")

    def _turn(self, text: str) -> None:
        from lowvram_grpo.run.view import clean

        try:
            answer = self.answer(text, lambda piece: print(clean(piece), end="", flush=True))
        except UserError as error:
            self.tell(str(error))
            return
        print()
        how = f"{answer.tokens / max(answer.seconds, 1e-9):.1f} tokens/s"
        why = "stopped" if answer.stopped else "" if answer.ended else "cut off"
        self.tell(", ".join(filter(None, (counted(answer.tokens, "token"), how, why))))

    def answer(self, text: str, show: Callable[[str], None]) -> Answer:
        """The model's answer to a person's turn, kept in the conversation.

        Raises:
            UserError: the turn does not fit, or memory ran out; it is not kept.
        """
        prompt = self.conversation.ask(text, self.sampling.max_new_tokens)
        near = f"the conversation has come near the model's {self.policy.positions} positions"
        if prompt.dropped:
            self.tell(f"{near}: its oldest {prompt.dropped} messages are dropped.")
        if prompt.room < self.sampling.max_new_tokens:
            self.tell(f"{near}: there is room for an answer of {prompt.room} tokens.")
        try:
            answer = self._sampled(prompt, show)
        except BaseException:
            self.conversation.take_back()
            raise
        self.seed += 1
        if answer.text:
            self.conversation.answer(answer.text)
        else:
            self.conversation.take_back()
        return answer

    def _sampled(self, prompt: Prompt, show: Callable[[str], None]) -> Answer:
        from lowvram_grpo.jobs.inference import stream_answer
        from lowvram_grpo.memory.guard import release

        try:
            sampling = replace(self.sampling, max_new_tokens=prompt.room)
            return stream_answer(self.policy, prompt.ids, sampling, self.seed, show, adapter=self.adapter)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release()  # outside of the except block: the frames of the failed attempt are gone, and their tensors
        raise UserError(
            f"Out of GPU memory at a prompt of {len(prompt.ids)} tokens; /reset the conversation, lower "
            "--max-new-tokens, or pass --quantization nf4."
        )
