"""A resolved recipe becomes a run: check what is cheap to check, load, train, leave an adapter."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import CantWrite, Stopped, UserError, counted
from lowvram_grpo.faults import explain, given_settings, note_phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset

    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.recipe.resolve import Recipe
    from lowvram_grpo.training.trainer import GRPOTrainer


def run(recipe: Recipe, *, dry_run: bool = False) -> Path:
    """Train what `recipe` says and return the run directory. `dry_run` stops before anything is written or loaded
    beyond the tokenizer and the data, and prints what would run.

    Raises:
        UserError: anything a person can mend.
        Stopped: a signal asked for the end, and a checkpoint is there to go on from.
    """
    with ExitStack() as held:
        return _run(recipe, dry_run, held)


def _run(recipe: Recipe, dry_run: bool, held: ExitStack) -> Path:
    """`held` gets the lock of the run directory."""
    from lowvram_grpo.data.encoding import check_prompts, raw_text_notice
    from lowvram_grpo.data.load import load
    from lowvram_grpo.jobs.implied import adopt_adapter, imply_evaluation
    from lowvram_grpo.jobs.loading import check_device, load_tokenizer_of, training_config
    from lowvram_grpo.jobs.resume import check_changes, check_unfinished, newest_checkpoint, planned_steps
    from lowvram_grpo.jobs.task import reward_specs
    from lowvram_grpo.recipe.resolve import resolve
    from lowvram_grpo.recipe.settings import check_before_loading
    from lowvram_grpo.rewards.registry import resolve_reward
    from lowvram_grpo.run.directory import RunDirectory

    check_device(recipe)
    if not recipe.model:
        raise UserError("No model given; pass --model with a folder or a hub id.")
    if not recipe.data:
        raise UserError("No data given; pass --data with a folder, a json/jsonl/csv/parquet file or a hub id.")
    said: list[str] = []
    directory = checkpoint = None
    if recipe.resume:
        directory = RunDirectory.open(recipe.resume)
        if not dry_run:
            held.enter_context(directory.lock())
        checkpoint = newest_checkpoint(directory, said.append)
        said += check_changes(resolve({}, directory.recipe_path), recipe, directory, checkpoint)
    if recipe.adapter:
        adopt_adapter(recipe, said.append)
    imply_evaluation(recipe)
    tokenizer = load_tokenizer_of(recipe)
    raw = load(recipe.data, config=recipe.data_config, split=recipe.split)
    specs = reward_specs(recipe, raw.column_names)
    rewards = [resolve_reward(spec) for spec in specs]
    args = training_config(recipe, weights=[weight for _, weight in rewards])
    train_data, eval_data = _data(recipe, raw, said)
    if directory:
        check_unfinished(directory, checkpoint, planned_steps(args, train_data, checkpoint))
    # A chat template that is missing or does not fit is found here, before gigabytes are loaded.
    check_prompts(tokenizer, train_data, chat_template_kwargs=recipe.training.get("chat_template_kwargs"))
    if raw_text := raw_text_notice(tokenizer, train_data[:1]["prompt"]):
        said.append(raw_text)
    _check_reward_columns(recipe, [f for f, _ in rewards], train_data, eval_data)
    check_before_loading(args, [f for f, _ in rewards], eval_data)
    if not recipe.resume:
        recipe = _fitted(recipe, args, tokenizer, train_data, said.append)
        args = training_config(recipe, weights=[weight for _, weight in rewards])
    if dry_run:
        for sentence in said:
            print(f"note: {sentence}")
        _print_plan(recipe, args, specs, tokenizer, train_data, eval_data)
        return Path(recipe.output_dir or "runs")
    if directory is None:
        name = f"{Path(str(recipe.model)).name}-{Path(str(recipe.data)).stem}"
        directory = RunDirectory.create(recipe.output_dir, name)
        held.enter_context(directory.lock())
        directory.check_new()  # again, for another process may have been here until the lock was free
        directory.write_recipe(recipe.to_toml())
    args.output_dir = str(directory.path)
    _train(recipe, args, directory, checkpoint, [f for f, _ in rewards], tokenizer, train_data, eval_data, said)
    return directory.path


def _fitted(recipe: Recipe, args: GRPOConfig, tokenizer, train_data, tell: Callable[[str], None]) -> Recipe:
    """The recipe with what the memory plan makes of it, and without a quantization that the checkpoint has already."""
    from lowvram_grpo.data.encoding import prompt_length_report
    from lowvram_grpo.jobs.loading import adopt_stored_quantization, hub_arguments
    from lowvram_grpo.memory.devices import detect
    from lowvram_grpo.plan.fitting import fit
    from lowvram_grpo.policy.load import model_config
    from lowvram_grpo.training.cold_start import REFERENCE_COLUMN

    config = model_config(recipe.model, **hub_arguments(recipe))
    if not adopt_stored_quantization(recipe, config, tell):
        return recipe
    if args.device.type != "cuda":
        return recipe
    report = prompt_length_report(
        tokenizer,
        train_data,
        max_prompt_length=args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    return fit(
        recipe,
        config,
        detect(args.device.index or 0),
        tell,
        cold_start=str(args.cold_start) == "auto" and REFERENCE_COLUMN in train_data.column_names,
        longest_prompt=report.longest if report.counted == report.total and not recipe.eval_data else None,
    )


def _data(recipe: Recipe, raw: Dataset, said: list[str]) -> tuple[Dataset, Dataset | None]:
    from lowvram_grpo.data.load import load
    from lowvram_grpo.jobs.task import prepared

    train_data, evaluated = prepared(recipe, raw, said.append), None
    if recipe.eval_data or recipe.eval_split:
        place = recipe.eval_data or recipe.data
        raw = load(place, config=recipe.data_config, split=recipe.eval_split)
        evaluated = prepared(recipe, raw, lambda sentence: sentence in said or said.append(f"evaluation: {sentence}"))
    return train_data, evaluated


def _check_reward_columns(recipe: Recipe, rewards: list, train_data: Dataset, eval_data: Dataset | None) -> None:
    from lowvram_grpo.jobs.task import check_reward_columns

    check_reward_columns(recipe, rewards, train_data)
    if eval_data is not None:
        try:
            check_reward_columns(recipe, rewards, eval_data)
        except UserError as error:
            raise UserError(f"In the evaluation data: {error}") from error


def _lora(recipe: Recipe):
    from peft import LoraConfig

    if recipe.adapter:
        return None
    return LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def _train(recipe, args, directory, checkpoint, rewards, tokenizer, train_data, eval_data, said) -> None:
    from transformers.trainer_callback import PrinterCallback

    from lowvram_grpo.jobs.implied import IMPLIED
    from lowvram_grpo.jobs.loading import load_model_of
    from lowvram_grpo.jobs.resume import AfterFirstStep, planned_steps, step_of
    from lowvram_grpo.jobs.task import guess_notice
    from lowvram_grpo.plan.paper import ladder_for
    from lowvram_grpo.run.completions import CompletionsLog
    from lowvram_grpo.run.console import Console
    from lowvram_grpo.run.interrupt import StopAfterStep
    from lowvram_grpo.run.metrics import MetricsWriter
    from lowvram_grpo.training.trainer import GRPOTrainer

    # Until a resumed process has made a step the directory is the earlier one's. A new run's completions wait too: one
    # that fails in its first step leaves nothing that stands in the way of the next.
    metrics = MetricsWriter(directory.metrics_path, held=bool(recipe.resume))
    completions = CompletionsLog(directory.completions_path, held=True)

    def take_over() -> None:
        if recipe.resume:
            directory.write_recipe(recipe.to_toml())
            directory.truncate_after(step_of(checkpoint) if checkpoint else -1)
        metrics.rows.release()
        completions.rows.release()

    subtitle = f"{recipe.model} on {recipe.data}"
    with Console("lowvram-grpo", subtitle, plain=recipe.plain or None, log_completions=args.log_completions) as console:
        console.notice(f"run directory: {directory.path}")
        for sentence in said:
            console.notice(sentence)
        if guessed := guess_notice(recipe):
            console.notice(guessed)
        if eval_data and recipe.origin.get("eval_strategy") == IMPLIED:
            console.notice(
                f"evaluating on {len(eval_data)} prompts every {args.eval_steps:g} steps and at the end; "
                "set --eval-steps, or --eval-strategy no, to change that."
            )
        if recipe.resume:
            where = f"step {step_of(checkpoint)}" if checkpoint else "the beginning: no whole checkpoint was found"
            console.notice(f"resuming from {where}")
        console.phase("loading the model")
        interrupt = StopAfterStep(console.notice)
        trainer = GRPOTrainer(
            load_model_of(recipe, args, console.notice),
            rewards,
            args,
            train_data,
            eval_data,
            tokenizer,
            callbacks=[interrupt, AfterFirstStep(take_over)],
            peft_config=_lora(recipe),
            observer=console,
            ladder=ladder_for(recipe),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(metrics)
        trainer.add_callback(console)
        trainer.completions_log = completions
        if checkpoint and step_of(checkpoint) >= planned_steps(args, train_data, checkpoint):
            # An earlier process ended between the last checkpoint and the adapter.
            trainer._load_from_checkpoint(str(checkpoint))
            take_over()
        else:
            with interrupt.armed():
                _fit(trainer, checkpoint, directory, given_settings(recipe))
            if interrupt.requested and trainer.state.global_step < trainer.state.max_steps:
                console.notice(f"stopped at step {trainer.state.global_step}; go on with --resume {directory.path}")
                raise Stopped(interrupt.requested)
        _leave_adapter(recipe, trainer, directory)
        console.notice(f"adapter: {directory.adapter_dir}")


def _fit(trainer: GRPOTrainer, checkpoint: Path | None, directory, settings: dict[str, Any]) -> None:
    """Train; where a mistake in the data or a reward ends the run, keep the steps that were done. Behind a fault of the
    machine nothing in memory is trusted: the last checkpoint is what is kept."""
    from lowvram_grpo.jobs.resume import step_of

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except BrokenPipeError:  # nobody reads the screen any more, or a helper has ended: the boundary tells
        raise
    except Exception as fault:
        note_phase(fault, trainer.observer.doing)
        error = fault if isinstance(fault, UserError) else explain(fault, settings=settings)
        if error is None:
            raise
        whole = error is fault and not isinstance(error, CantWrite)
        if whole and trainer.state.global_step > step_of(directory.latest_checkpoint()):
            with suppress(CantWrite):  # the first error is the one to mend
                trainer._save_checkpoint(trainer.model, trial=None)
        kept = step_of(directory.latest_checkpoint())
        if kept:
            steps = f"{counted(kept, 'step')} {'is' if kept == 1 else 'are'}"
            raise UserError(f"{error} ({steps} kept: mend it and go on with --resume {directory.path})") from fault
        if trainer.state.global_step:
            raise UserError(
                f"{error} (no step is kept: mend it and begin anew with --resume {directory.path})"
            ) from fault
        if error is fault:
            raise
        raise error from fault


def _leave_adapter(recipe: Recipe, trainer: GRPOTrainer, directory) -> None:
    from lowvram_grpo.run.model_card import model_card

    def write(folder: Path) -> None:
        trainer._save(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)
        card = model_card(asdict(recipe), directory.metrics())
        (folder / "README.md").write_text(card, encoding="utf-8")

    directory.write_adapter(write)


def _print_plan(recipe: Recipe, args: GRPOConfig, specs: list[str], tokenizer, train_data, eval_data) -> None:
    from rich.console import Console as RichConsole
    from rich.markup import escape

    from lowvram_grpo.data.encoding import encode_prompts, prompt_length_report

    plan = args.batch_plan()
    ids, _ = encode_prompts(
        tokenizer,
        [train_data[0]["prompt"]],
        max_prompt_length=args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    report = prompt_length_report(
        tokenizer,
        train_data,
        max_prompt_length=args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    out = RichConsole(highlight=False)
    out.print("[bold]What would run[/bold] (nothing was loaded or written)\n")
    out.print(escape(recipe.to_toml()), soft_wrap=True)
    out.print(f"rewards: {', '.join(specs)}")
    out.print(f"data: {len(train_data)} prompts{f', {len(eval_data)} for evaluation' if eval_data else ''}")
    out.print(
        f"each step: {plan.prompts_per_rollout} prompts x {plan.num_generations} completions, at most "
        f"{plan.micro_batch_size} at once; device {args.device}"
    )
    if report.cut:
        out.print(f"note: {report.sentence(args.max_prompt_length)}")
    for notice in args.notices():
        out.print(f"note: {notice}")
    out.print("\nfirst prompt, as the model sees it:")
    out.print(escape(tokenizer.decode(ids[0])), soft_wrap=True)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        out.print("note: only one process is supported yet.")
