"""`lowvram-grpo chat`: talk to a model, or to what a run made of it. Answers go to stdout, all else to stderr."""

from __future__ import annotations

import locale
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from lowvram_grpo.cli.flags import parse_extra
from lowvram_grpo.cli.sampling import (
    Adapter,
    ChatTemplate,
    MinP,
    Model,
    Penalty,
    Quantization,
    TopK,
    TopP,
    filters_of,
    given,
)
from lowvram_grpo.cli.terminal import prepare_cuda, stderr_console
from lowvram_grpo.errors import UserError
from lowvram_grpo.faults import boundary
from lowvram_grpo.run.quiet import hush

if TYPE_CHECKING:
    from lowvram_grpo.data.conversation import Conversation
    from lowvram_grpo.jobs.inference import LoadedPolicy
    from lowvram_grpo.recipe.resolve import Recipe

_NEW_TOKENS = 512


def chat(
    context: typer.Context,
    model: Model = None,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="System prompt; replaces the run's.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this, and stop; so does text piped in.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens; default 512.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    quantization: Quantization = None,
    chat_template: ChatTemplate = None,
) -> None:
    """Talk to a model, or to what a run made of it; the answer streams from the sampler that trains. Takes the flags of
    GRPOConfig too (--seed, --use-cpu, --vram-gib)."""
    flags = given(
        {
            "model": model,
            "adapter": adapter,
            "system_prompt": system,
            "quantization": quantization,
            "chat_template": chat_template,
        }
    )
    filters = filters_of(temperature, top_p, top_k, min_p, repetition_penalty)
    with boundary({**flags, **filters}):
        start(flags, context.args, prompt=prompt, max_new_tokens=max_new_tokens, filters=filters)


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
    from lowvram_grpo.cli.chat_screen import Chat
    from lowvram_grpo.jobs.inference import check_filters, load_policy, recipe_to_sample
    from lowvram_grpo.jobs.loading import check_device, load_tokenizer_of, training_config

    check_filters(filters, max_new_tokens)
    console, tell = stderr_console()
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
    conversation = Chat(policy, _conversation(recipe, policy), sampling, args.seed, tell)
    if at_terminal:
        conversation.introduce()
        conversation.talk()
    else:
        conversation.answer(prompt, lambda piece: print(piece, end="", flush=True))
        print()


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
    from lowvram_grpo.data.few_shot import few_shot
    from lowvram_grpo.data.load import opening_turns

    system, shots = opening_turns(recipe.template, recipe.system_prompt, few_shot(recipe.few_shot))
    return Conversation(
        policy.tokenizer,
        system=system,
        shots=shots,
        positions=policy.positions,
        chat_template_kwargs=policy.args.chat_template_kwargs,
    )
