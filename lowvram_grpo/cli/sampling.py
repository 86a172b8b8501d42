"""The options of `lowvram-grpo chat` and `lowvram-grpo eval`; their work is imported when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowvram_grpo.faults import boundary

_Model = Annotated[str | None, typer.Option("--model", "-m", help="As for train; default the run's.")]
_Adapter = Annotated[
    str | None, typer.Option("--adapter", "-a", help="Run directory, checkpoint or adapter folder, or hub id.")
]
_TopP = Annotated[float, typer.Option(help="Keep the most likely tokens that have this much of the mass.")]
_TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
_MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the most likely one.")]
_Penalty = Annotated[float, typer.Option(help="Above 1 discourages tokens already seen.")]
_Quantization = Annotated[str | None, typer.Option("--quantization", "-q", help="none, int8 or nf4.")]
_ChatTemplate = Annotated[str | None, typer.Option(help="`plain` (base models) or a .jinja file.")]


def chat(
    context: typer.Context,
    model: _Model = None,
    adapter: _Adapter = None,
    system: Annotated[str | None, typer.Option(help="System prompt; replaces the run's.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this, and stop; so does text piped in.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens; default 512.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.7,
    top_p: _TopP = 0.95,
    top_k: _TopK = 0,
    min_p: _MinP = 0.0,
    repetition_penalty: _Penalty = 1.0,
    quantization: _Quantization = None,
    chat_template: _ChatTemplate = None,
) -> None:
    """Talk to a model, or to what a run made of it; the answer streams from the sampler that trains. Takes the flags of
    GRPOConfig too (--seed, --use-cpu, --vram-gib)."""
    from lowvram_grpo.cli.chat import start

    flags = {
        "model": model,
        "adapter": adapter,
        "system_prompt": system,
        "quantization": quantization,
        "chat_template": chat_template,
    }
    flags = {key: value for key, value in flags.items() if value is not None}
    filters = _filters(temperature, top_p, top_k, min_p, repetition_penalty)
    with boundary({**flags, **filters}):
        start(flags, context.args, prompt=prompt, max_new_tokens=max_new_tokens, filters=filters)


def evaluate(
    context: typer.Context,
    model: _Model = None,
    adapter: _Adapter = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="As for train; default the run's evaluation data, else the run's data."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split, or a slice of one; default test, else validation, else train.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first so many prompts.")] = None,
    template: Annotated[str | None, typer.Option("--template", "-t", help="tldr, tldr-zh or r1.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompts.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column with the reference answers.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt; replaces the template's.")] = None,
    chat_template: _ChatTemplate = None,
    reward: Annotated[
        list[str] | None, typer.Option("--reward", "-r", help="As for train; repeatable. Default the run's.")
    ] = None,
    greedy: Annotated[bool, typer.Option(help="One greedy completion a prompt.")] = True,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Sampled completions a prompt; 0 for none.")] = 8,
    k: Annotated[str | None, typer.Option(help="pass@k for these k; default 1,4,8 up to --samples.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Total reward from which a completion passes; default: full marks.")
    ] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="The base model too: same prompts, same seeds, paired differences.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of the sampled completions.")] = 1.0,
    top_p: _TopP = 1.0,
    top_k: _TopK = 0,
    min_p: _MinP = 0.0,
    repetition_penalty: _Penalty = 1.0,
    max_completion_length: Annotated[
        int | None, typer.Option(help="Longest completion in tokens; default the run's, else 256.")
    ] = None,
    quantization: _Quantization = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for eval.json and completions.jsonl.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a dataset with the rewards: greedy, and several samples a prompt (pass@k). Takes the flags of train and
    GRPOConfig too (--few-shot, --max-prompt-length, --seed, --use-cpu)."""
    from lowvram_grpo.cli.eval import start

    flags = {
        "model": model,
        "adapter": adapter,
        "data": data,
        "split": split,
        "template": template,
        "prompt_column": prompt_column,
        "answer_column": answer_column,
        "system_prompt": system_prompt,
        "chat_template": chat_template,
        "reward": reward or None,
        "max_completion_length": max_completion_length,
        "quantization": quantization,
    }
    filters = _filters(temperature, top_p, top_k, min_p, repetition_penalty)
    flags = {key: value for key, value in flags.items() if value is not None}
    with boundary({**flags, **filters}):
        start(
            flags,
            context.args,
            greedy=greedy,
            samples=samples,
            k=k,
            threshold=threshold,
            limit=limit,
            compare_base=compare_base,
            filters=filters,
            out=out,
            as_json=as_json,
        )


def _filters(*values: float) -> dict[str, float]:
    """Under the names of `Sampling`."""
    return dict(zip(("temperature", "top_p", "top_k", "min_p", "repetition_penalty"), values))
