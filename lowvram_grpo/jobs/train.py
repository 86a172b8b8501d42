"""A resolved recipe becomes a run: write down what is implied, read what it names, check what is cheap to check, plan,
load, train, leave an adapter. Each stage takes the value that the one before it has returned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import PrinterCallback

from lowvram_grpo.errors import CantWrite, Stopped, UserError, counted
from lowvram_grpo.faults import explain, note_phase
from lowvram_grpo.jobs.dry_run import show
from lowvram_grpo.jobs.here import export, settle
from lowvram_grpo.jobs.implied import IMPLIED, imply
from lowvram_grpo.jobs.job import Job, check, planned, read
from lowvram_grpo.jobs.loading import check_device, fresh_lora, load_model_of
from lowvram_grpo.jobs.resume import AfterFirstStep
from lowvram_grpo.jobs.start import Start, begin, reopen
from lowvram_grpo.jobs.task import guess_notice
from lowvram_grpo.plan.paper import ladder_for
from lowvram_grpo.recipe.not_applied import as_markdown, as_text
from lowvram_grpo.run.best import best_sentence
from lowvram_grpo.run.capture import Capture
from lowvram_grpo.run.completions import CompletionsLog
from lowvram_grpo.run.console import Console
from lowvram_grpo.run.interrupt import StopAfterStep
from lowvram_grpo.run.metrics import MetricsWriter
from lowvram_grpo.run.model_card import model_card
from lowvram_grpo.training.best_model import best_of, stopped_early
from lowvram_grpo.training.collect import SCORING
from lowvram_grpo.training.continuation import planned_steps, step_of
from lowvram_grpo.training.trainer import GRPOTrainer

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from lowvram_grpo.recipe.resolve import Recipe
    from lowvram_grpo.run.directory import RunDirectory


def run(recipe: Recipe, *, dry_run: bool = False) -> Path:
    """Train what `recipe` says and return the run directory. `dry_run` stops before anything is written or loaded
    beyond the tokenizer and the data, and prints what would run.

    Raises:
        UserError: anything a person can mend.
        Stopped: a signal asked for the end, and a checkpoint is there to go on from.
    """
    check_device(recipe)
    _check_named(recipe)
    said: list[str] = []
    with ExitStack() as locks:
        start = reopen(recipe, None if dry_run else locks, said.append) if recipe.resume else None
        if start is None:
            settle(recipe)
        export(recipe)
        imply(recipe, said.append)
        job = read(recipe, said.append)
        check(job, start, said.append)
        if start is None:
            job = planned(job, said.append)
        if dry_run:
            show(job, said)
            return Path(recipe.output_dir or "runs")
        if start is None:
            start = begin(job.recipe, locks)
            if job.recipe.not_applied:
                start.directory.write_not_applied(as_markdown(job.recipe.not_applied, job.args.notices()))
        _train(job, start, said)
        return start.directory.path


def _check_named(recipe: Recipe) -> None:
    if not recipe.model:
        raise UserError("No model given; pass --model with a folder or a hub id.")
    if not (recipe.data or recipe.dataset_mixture):
        raise UserError("No data given; pass --data with a folder, a json/jsonl/csv/parquet file or a hub id.")


class _Logs:
    """What a run writes down step by step.

    Until a resumed process has made a step the directory is the earlier one's. A new run's completions wait too: one
    that fails in its first step leaves nothing that stands in the way of the next.
    """

    def __init__(self, recipe: Recipe, start: Start):
        self._recipe, self._start = recipe, start
        self.metrics = MetricsWriter(start.directory.metrics_path, held=start.resumed)
        self.completions = CompletionsLog(start.directory.completions_path, held=True)

    def take_over(self) -> None:
        """From here on the directory is this process's."""
        if self._start.resumed:
            directory, checkpoint = self._start.directory, self._start.checkpoint
            directory.write_recipe(self._recipe.to_toml())
            directory.truncate_after(step_of(checkpoint) if checkpoint else -1)
        self.metrics.rows.release()
        self.completions.rows.release()


def _train(job: Job, start: Start, said: Sequence[str]) -> None:
    """Load the model, train it and leave its adapter, in sight of a person."""
    recipe, args, directory, checkpoint = job.recipe, job.args, start.directory, start.checkpoint
    args.output_dir = str(directory.path)
    args.run_name = args.run_name or directory.path.resolve().name  # what trackers call it, after a resume too
    logs = _Logs(recipe, start)
    subtitle = f"{recipe.model} on {', '.join(recipe.places)}"
    with Console("lowvram-grpo", subtitle, plain=recipe.plain or None, log_completions=args.log_completions) as console:
        for sentence in _opening(job, start, said):
            console.notice(sentence)
        if recipe.not_applied:
            console.notice(f"not applied here (also in {directory.not_applied_path}):")
            console.table(as_text(recipe.not_applied))
        interrupt = StopAfterStep(console.notice)
        trainer = _loaded(job, console, [interrupt, AfterFirstStep(logs.take_over)], logs)
        if checkpoint and _is_over(job, checkpoint):
            # An earlier process ended between the last checkpoint and the adapter.
            trainer.take_up(checkpoint)
            logs.take_over()
        else:
            with interrupt.armed():
                _fit(trainer, start, recipe.given_settings())
            if interrupt.requested and trainer.state.global_step < trainer.state.max_steps:
                console.notice(f"stopped at step {trainer.state.global_step}; go on with --resume {directory.path}")
                raise Stopped(interrupt.requested)
        if best := best_of(args, trainer.state, trainer.callback_handler.callbacks):
            logs.metrics.rows.append([best.row()])
        result = _leave_result(recipe, trainer, start)
        console.notice(f"{'adapter' if recipe.use_peft else 'model'}: {result}")
        if args.push_to_hub:
            trainer.push_folder(result, f"Trained for {counted(trainer.state.global_step, 'step')}")
        if best:
            console.notice(f"it is the best of the run: {best_sentence(best.row())}")


def _is_over(job: Job, checkpoint: Path) -> bool:
    done = step_of(checkpoint) >= planned_steps(job.args, job.train.first, checkpoint)
    return done or stopped_early(checkpoint, job.args.early_stopping)


def _opening(job: Job, start: Start, said: Sequence[str]) -> Iterator[str]:
    """What a person hears before the model is loaded; `said` are the sentences of the stages before."""
    yield f"run directory: {start.directory.path}"
    yield from said
    if guessed := guess_notice(job.recipe):
        yield guessed
    if job.evaluation is not None and job.recipe.origin.get("eval_strategy") == IMPLIED:
        yield (
            f"evaluating on {job.evaluation.count} every {job.args.eval_steps:g} steps and at the end; "
            "set --eval-steps, or --eval-strategy no, to change that."
        )
    if start.resumed:
        step = f"step {step_of(start.checkpoint)}"
        yield f"resuming from {step if start.checkpoint else 'the beginning: no whole checkpoint was found'}"


def _loaded(job: Job, console: Console, callbacks: Sequence[TrainerCallback], logs: _Logs) -> GRPOTrainer:
    """The trainer with its model on the device; `callbacks` go before those of logs and console."""
    console.phase("loading the model")
    model = load_model_of(job.recipe, job.args, console.notice)
    trainer = GRPOTrainer(
        model,
        job.rewards.functions,
        job.args,
        job.train_data,
        job.eval_data,
        job.tokenizer,
        callbacks=list(callbacks),
        peft_config=None if job.recipe.adapter or not job.recipe.use_peft else fresh_lora(job.recipe),
        tools=job.acting.tools,
        environment_factory=job.acting.environment,
        observer=console,
        ladder=ladder_for(job.recipe),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(logs.metrics)
    trainer.add_callback(console)
    trainer.completions_log = logs.completions
    trainer.card = lambda: model_card(asdict(job.recipe), logs.metrics.read())
    if console.covers_output:
        trainer.rewards.capture = Capture(job.args.output_dir / Path("rewards.log"), console.notice)
    return trainer


def _fit(trainer: GRPOTrainer, start: Start, settings: dict[str, Any]) -> None:
    """Train; where a mistake in the data or a reward ends the run, keep the steps that were done. Behind a fault of the
    machine nothing in memory is trusted: the last checkpoint is what is kept."""
    directory = start.directory
    try:
        trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
    except KeyboardInterrupt:
        if trainer.observer.doing == SCORING:  # a reward was waited for: nothing of this step is in the policy yet
            _keep_steps(trainer, directory)
        raise
    except BrokenPipeError:  # nobody reads the screen any more, or a helper has ended: the boundary tells
        raise
    except Exception as fault:
        note_phase(fault, trainer.observer.doing)
        error = fault if isinstance(fault, UserError) else explain(fault, settings=settings)
        if error is None:
            raise
        whole = error is fault and not isinstance(error, CantWrite)
        if whole:
            _keep_steps(trainer, directory)
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


def _keep_steps(trainer: GRPOTrainer, directory: RunDirectory) -> None:
    """A checkpoint of the steps that were done since the last one."""
    if trainer.state.global_step > step_of(directory.latest_checkpoint()):
        with suppress(CantWrite):  # what ended the run is what is to be mended
            trainer._save_checkpoint(trainer.model, trial=None)


def _leave_result(recipe: Recipe, trainer: GRPOTrainer, start: Start) -> Path:
    def write(folder: Path) -> None:
        trainer._save(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)
        (folder / "README.md").write_text(trainer.card(), encoding="utf-8")

    return start.directory.write_adapter(write, whole=not recipe.use_peft)
