"""What `lowvram-grpo chat` shows: a conversation with a policy at a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from lowvram_grpo.errors import UserError, counted

if TYPE_CHECKING:
    from lowvram_grpo.data.conversation import Conversation, Prompt
    from lowvram_grpo.jobs.inference import Answer, LoadedPolicy
    from lowvram_grpo.rollout.sampler import Sampling

_HELP = """\
/reset        forget the conversation
/system TEXT  another system prompt; without TEXT none
/base         adapter off, and on again: the model before training
/exit         the end, as Ctrl-D (Windows: Ctrl-Z, Enter)
Ctrl-C        stops an answer and keeps what there is of it
\"\"\"           on a line of its own begins and ends a text of several lines"""


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
        recipe, sampling = self.policy.recipe, self.sampling
        used = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        filters = [
            f"{name} {getattr(sampling, name):g}" for name, off in used.items() if getattr(sampling, name) != off
        ]
        drawn = ", ".join([f"temperature {sampling.temperature:g}" if sampling.temperature else "greedy", *filters])
        adapter = f" with {recipe.adapter}" if recipe.adapter else ""
        self.tell(
            f"{recipe.model}{adapter} on {self.policy.args.device}; {drawn}, up to {sampling.max_new_tokens} tokens."
        )
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
        from lowvram_grpo.errors import is_out_of_memory
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
