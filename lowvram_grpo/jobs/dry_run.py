"""What `--dry-run` shows: the job as it would run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console

from lowvram_grpo.data.encoding import encode_prompts, row_kwargs
from lowvram_grpo.data.tool_calls import name_of
from lowvram_grpo.policy.reference import ADAPTER_SHARES
from lowvram_grpo.recipe.not_applied import as_text
from lowvram_grpo.rewards.registry import is_model
from lowvram_grpo.training.early_checks import prompt_lengths

if TYPE_CHECKING:
    from lowvram_grpo.jobs.job import Job

_PLACES = {
    "auto": "the card; in host memory between rollouts if memory runs out",
    "cuda": "the card",
    "cpu": "the CPU",
    "in_turn": "the card while they score, in host memory otherwise",
}


def show(job: Job, said: Iterable[str]) -> None:
    """Print the recipe, the sizes of a step and the first prompt, after what was said about the job."""
    for sentence in said:
        print(f"note: {sentence}")
    if job.recipe.not_applied:
        print(f"not applied here:\n{as_text(job.recipe.not_applied)}")
    args, first, evaluation = job.told, job.train.first, job.evaluation
    ids, _ = encode_prompts(
        job.tokenizer,
        [first[0]["prompt"]],
        max_prompt_length=args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
        own=row_kwargs([first[0]]),
    )
    lengths, plan = prompt_lengths(args, job.tokenizer, first, whole=not job.train.streams), args.batch_plan()
    Console(highlight=False).print("[bold]What would run[/bold] (nothing was loaded or written)\n")
    # Not by rich, which would break lines at the width of the screen and take [words] for its own.
    print(job.recipe.to_toml())
    print(f"rewards: {', '.join(job.rewards.specs) or 'those of the environment'}")
    if job.acting.agents is not None:
        print(f"tools: {', '.join(name_of(tool) for tool in job.acting.agents.all_tools) or 'none'}")
    if any(map(is_model, job.rewards.specs)):
        place = "the CPU" if args.device.type == "cpu" else _PLACES[args.reward_model_device]
        print(f"reward models: on {place}")
    print(f"data: {job.train.count}{f', {evaluation.count} for evaluation' if evaluation else ''}")
    print(
        f"each step: {plan.prompts_per_rollout} prompts x {plan.num_generations} completions, at most "
        f"{plan.micro_batch_size} at once; device {args.device}"
    )
    if lengths.cut:
        print(f"note: {lengths.sentence(args.max_prompt_length)}")
    for notice in args.notices():
        print(f"note: {notice}")
    if args.reference_offload and args.beta:
        print(f"note: {ADAPTER_SHARES}")
    print("\nfirst prompt, as the model sees it:")
    print(job.tokenizer.decode(ids[0]))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        print("note: only one process is supported yet.")
