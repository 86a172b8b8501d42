"""`lowvram-grpo eval`: a dataset through sampler and rewards, greedy and sampled, an adapter and its base."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from lowvram_grpo.cli.eval_report import as_json as json_of
from lowvram_grpo.cli.eval_report import explained, found_of, settings_of, versions
from lowvram_grpo.cli.eval_screen import Progress, print_tables
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
from lowvram_grpo.errors import counted
from lowvram_grpo.faults import boundary
from lowvram_grpo.run.quiet import hush


def evaluate(
    context: typer.Context,
    model: Model = None,
    adapter: Adapter = None,
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
    chat_template: ChatTemplate = None,
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
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    max_completion_length: Annotated[
        int | None, typer.Option(help="Longest completion in tokens; default the run's, else 256.")
    ] = None,
    quantization: Quantization = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for eval.json and completions.jsonl.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a dataset with the rewards: greedy, and several samples a prompt (pass@k). Takes the flags of train and
    GRPOConfig too (--few-shot, --max-prompt-length, --seed, --use-cpu)."""
    flags = given(
        {
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
    )
    filters = filters_of(temperature, top_p, top_k, min_p, repetition_penalty)
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


def start(flags: dict[str, Any], extra: list[str], *, as_json: bool, **options: Any) -> None:
    """Evaluate, and show and write what was found.

    Args:
        flags: the recipe's settings that were given; `extra` has more of them as arguments.
        options: of `Wanted.checked`.

    Raises:
        UserError: whatever a person can mend, before the model is loaded where it can be known.
    """
    notice = prepare_cuda()
    hush()
    from lowvram_grpo.jobs.eval_job import Wanted, read
    from lowvram_grpo.jobs.inference import load_policy
    from lowvram_grpo.jobs.passes import Passes
    from lowvram_grpo.policy.reward_model import load_reward_model
    from lowvram_grpo.policy.visitor import Visitor
    from lowvram_grpo.rewards.runner import RewardRunner
    from lowvram_grpo.run.capture import Capture

    wanted = Wanted.checked(**options)
    console, tell = stderr_console()
    if notice:
        tell(notice)
    job = read({**flags, **parse_extra(extra)}, wanted, tell)
    recipe, args = job.recipe, job.args
    with console.status(f"loading {escape(recipe.model)}"):
        policy = load_policy(recipe, args, job.tokenizer, tell)
        rewards = RewardRunner(
            job.rewards.functions,
            weights=args.reward_weights,
            device=args.device,
            model_place=args.reward_model_device,
            timeout=args.reward_timeout,
            errors=args.reward_errors,
            tell=tell,
            load_model=load_reward_model,
            visitor=Visitor,
        )
        # stdout holds nothing but the results
        printed = (wanted.out or Path(tempfile.gettempdir())) / "lowvram-grpo-rewards.log"
        rewards.capture = Capture(printed, tell)
    adapter = f" with {recipe.adapter}" if recipe.adapter else ""
    tell(f"{recipe.model}{adapter} on {args.device}; {counted(len(job.data), 'prompt')} of {job.place}.")
    passes = Passes(policy, rewards, wanted, tell)
    with Progress(console, passes.completions(len(job.data))) as progress:
        scored = passes.run(job.data, progress)
    found = found_of(scored, wanted, job.threshold)
    found["settings"] = settings_of(job, wanted)
    found["versions"] = versions(args)
    if wanted.out:
        wanted.out.mkdir(parents=True, exist_ok=True)
        (wanted.out / "eval.json").write_text(json_of(found) + "\n", encoding="utf-8")
    if as_json:
        print(json_of(found))
    else:
        print_tables(found, Console(highlight=False))
        for sentence in explained(wanted, job, scored):
            tell(sentence)
    if wanted.out:
        tell(f"written: {wanted.out / 'eval.json'}, {wanted.out / 'completions.jsonl'}")
