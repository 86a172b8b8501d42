"""transformers.Trainer, with checkpoints that hold adapter, reference and rollout in progress and say what they were
made with, and a resume that follows the settings of today: what has changed takes effect at its place, and what is
unchanged goes on bit for bit."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from lowvram_grpo.errors import CantWrite, UserError, counted, why_unwritten
from lowvram_grpo.policy.adapter import restore_adapter
from lowvram_grpo.policy.wrapper import is_peft
from lowvram_grpo.run.checkpoints import STATE, seal
from lowvram_grpo.run.directory import RunDirectory
from lowvram_grpo.training import continuation
from lowvram_grpo.training.best_model import restore_callbacks
from lowvram_grpo.training.continuation import Made
from lowvram_grpo.training.experience import MicroBatch, load_updates, save_updates
from lowvram_grpo.training.overflow import save_kept
from lowvram_grpo.training.streaming import StreamProgress, found_place

if TYPE_CHECKING:
    from torch import nn

    from lowvram_grpo.data.stream_loader import Place
    from lowvram_grpo.policy.reference import Reference
    from lowvram_grpo.recipe.batch_plan import BatchPlan
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.rewards.runner import RewardRunner
    from lowvram_grpo.run.observer import Observer
    from lowvram_grpo.training.curriculum import Curriculum
    from lowvram_grpo.training.learner import Learner
    from lowvram_grpo.training.savers import TrainerGuard


class ResumableTrainer(Trainer):
    """Where steps are counted, checkpoints written and read. GRPOTrainer brings the parts named here without a value.

    Attributes:
        policy_adapter: name of the adapter that is trained; None where all weights are.
        shift: optimizer steps that `state.global_step` is ahead of the place in the data (`continuation.shift_of`).
        stream: where the training data is one.
        place: in it, to begin at.
        looked_at: the rows of the training data that stand for all.
    """

    grpo_args: GRPOConfig
    observer: Observer
    rewards: RewardRunner
    guard: TrainerGuard
    learner: Learner
    reference: Reference | None
    curriculum: Curriculum | None
    policy_adapter: str | None
    looked_at: Sequence[dict[str, Any]]
    shift = 0
    stream: StreamProgress | None = None
    place: Place | None = None
    _updates: list[list[MicroBatch]] | None = None  # of the rollout that steps learn from now
    _made: Made | None = None

    @property
    def plan(self) -> BatchPlan:
        """How a rollout becomes optimizer steps; its micro-batches get smaller where memory runs out."""
        return self.guard.plan

    # Counting

    def get_total_train_batch_size(self, args=None) -> int:
        """Completions a step, which transformers counts its samples by."""
        return self.plan.completions_per_rollout // self.plan.updates_per_rollout

    def floating_point_ops(self, inputs) -> int:
        """Not counted: transformers' estimate knows nothing of rollouts."""
        return 0

    def set_initial_training_values(self, args, dataloader):
        """transformers' counts, for a run whose earlier steps had batches of another size."""
        epochs, per_epoch, *counts, max_steps = super().set_initial_training_values(args, dataloader)
        if self.stream is not None:
            return epochs, per_epoch, *counts, max_steps  # passes, as many as max_steps take
        if args.max_steps > 0:
            epochs = max(1, math.ceil((max_steps - self.shift) / per_epoch))
        else:
            max_steps += self.shift
        return epochs, per_epoch, *counts, max_steps

    # Reading

    def checkpoint_of(self, resume_from_checkpoint: str | os.PathLike | bool | None) -> Path | None:
        """Where `train` goes on; True is the last whole checkpoint of output_dir.

        Raises:
            UserError: there is none.
        """
        if resume_from_checkpoint is True:
            # transformers would take the highest number, whole or not.
            latest = RunDirectory(Path(self.args.output_dir)).latest_checkpoint(self._tell_damage)
            if latest is None:
                raise UserError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
            return latest
        return Path(resume_from_checkpoint) if resume_from_checkpoint else None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        checkpoint = self.checkpoint_of(resume_from_checkpoint)
        self.shift, self._made, self.place = 0, None, None
        self.args.eval_on_start = self.grpo_args.eval_on_start and checkpoint is None
        if checkpoint is not None:
            self._find_place(checkpoint)
        return super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs)

    def _ended_at(self, checkpoint: Path) -> TrainOutput:
        """What `train` returns for a run that early stopping has ended there."""
        self.observer.notice(
            f"early_stopping {self.grpo_args.early_stopping} has ended the run at {checkpoint.name}: there is nothing "
            "left to do; raise it to go on."
        )
        self.take_up(checkpoint)
        return TrainOutput(self.state.global_step, 0.0, {})

    def take_up(self, checkpoint: Path) -> None:
        """What a run that ended at `checkpoint` leaves: the weights of then, or the best ones where it wants these."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        self._load_callback_state()
        self._find_best()
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def _tell_damage(self, checkpoint: Path, why: str) -> None:
        self.observer.notice(f"{checkpoint.name} is left out: {why}.")

    def _find_place(self, checkpoint: Path) -> None:
        try:
            step = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["global_step"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{checkpoint} is no whole checkpoint, as its {STATE} can't be read; resume from another."
            ) from error
        made, now = Made.load(checkpoint), self._made_with(None)
        self._made, serves = made, continuation.serves_on(made, now)
        self.shift = continuation.shift_of(made, step, now, serves=serves)
        if self.stream is not None:
            self.place, said = found_place(checkpoint, made, now, serves=serves)
            if said:
                self.observer.notice(said)
            return
        if made is not None and made.data[0] is None:
            self.observer.notice("the checkpoint was made on a stream: the data is begun at its first epoch.")
            return
        if made is None or (made.prompts, made.repeats, made.data[0]) == (now.prompts, now.repeats, now.data[0]):
            return
        per_epoch = continuation.steps_an_epoch(now.data[0], now.prompts, now.repeats)
        epoch, within = divmod(step - self.shift, per_epoch)
        self.observer.notice(
            f"a step had {counted(made.prompts, 'prompt')} of {made.data[0]}, and has {now.prompts} of {now.data[0]} "
            f"now: going on with prompt {within // now.repeats * now.prompts + 1} of epoch {epoch + 1}."
        )

    def _made_with(self, optimizer) -> Made:
        return continuation.made_with(
            self.grpo_args,
            self.looked_at,
            self.plan,
            list(self.rewards.names),
            self.shift,
            optimizer,
            whole=self.stream is None,
        )

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        trained, skipped = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return trained, skipped
        # transformers keeps the checkpoint's own logging_steps, eval_steps and save_steps.
        self.state.train_batch_size = self._train_batch_size
        self.state.compute_steps(self.args, max_steps)
        if not self._same("metric_for_best_model", "greater_is_better"):
            self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None
        self._find_best()
        if self.stream is not None:
            return (self.place.epoch if self.place else 0), 0  # its loader begins at its place
        trained, within = divmod(self.state.global_step - self.shift, num_update_steps_per_epoch)
        return trained, 0 if self.args.ignore_data_skip else within

    def _find_best(self) -> None:
        """The best checkpoint under the run's path of today: the state has that of the process that wrote it."""
        if self.state.best_global_step is not None:
            here = Path(self._get_output_dir(None)) / f"checkpoint-{self.state.best_global_step}"
            if here.is_dir():
                self.state.best_model_checkpoint = str(here)

    def _load_callback_state(self) -> None:
        """What callbacks have counted goes on, whether or not they are made anew from the checkpoint."""
        anew = bool(self.args.restore_callback_states_from_checkpoint)
        restore_callbacks(self.state, self.callback_handler.callbacks, arguments=anew)
        self.state.stateful_callbacks.setdefault("TrainerControl", self.control.state())

    def _determine_best_metric(self, metrics, trial) -> bool:
        """transformers', and a checkpoint of what is to be loaded at the end, even where none is due."""
        better = super()._determine_best_metric(metrics, trial)
        if better and self.args.load_best_model_at_end:
            self.control.should_save = True
        return better

    def _same(self, *names: str) -> bool:
        """Whether these settings are those that the checkpoint was made with, as far as it says."""
        if self._made is None:
            return True
        now = self._made_with(None).settings
        return all(self._made.settings.get(name) == now.get(name) for name in names)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._go_on_from(Path(checkpoint))
        self.guard.settle_moments()

    def _go_on_from(self, folder: Path) -> None:
        """The checkpoint's moments under today's settings, and today's schedule at the place where the run stands."""
        step = self.state.global_step
        moments = continuation.load_state(folder / "optimizer.pt")
        if moments is None:
            self.observer.notice(
                f"{folder.name} holds no optimizer state (save_only_model): its moments begin anew, and the learning "
                f"rate goes on at step {step} of its schedule."
            )
        else:
            continuation.load_moments(self.optimizer, moments, folder, self._made)
        schedule = continuation.load_state(folder / "scheduler.pt")
        same = self._same("lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate")
        if not continuation.place_schedule(self.lr_scheduler, schedule, step, same=same):
            self.observer.notice(
                f"lr_scheduler_type {self.args.lr_scheduler_type} follows the metrics, and {folder.name} has none for "
                f"these settings: it begins anew at learning rate {self._get_learning_rate():g}."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_peft(self.model):
            self._restore_adapter(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.reference is not None:
            self.reference.restore(resume_from_checkpoint)
        if self.learner.entropy is not None:
            self.learner.entropy.restore(resume_from_checkpoint)
        if self.curriculum is not None:
            self.curriculum.restore(resume_from_checkpoint)
        found = load_updates(resume_from_checkpoint, self.args.device, self.observer.notice)
        self._updates = found or self._updates

    def _restore_adapter(self, folder: str) -> None:
        if self.policy_adapter != "default":
            folder = os.path.join(folder, self.policy_adapter)
        restore_adapter(self.model, folder, self.policy_adapter)

    def _load_best_model(self) -> None:
        if not is_peft(self.model):
            return super()._load_best_model()
        self._restore_adapter(self.state.best_model_checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if getattr(self.accelerator, "scaler", None) is None:
            return  # the run went on from fp16 to another precision
        if checkpoint is not None and (state := continuation.load_state(Path(checkpoint) / "scaler.pt")) is not None:
            self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Of the global generators, which only dropout draws from."""
        try:
            super()._load_rng_state(checkpoint)
        except (*continuation.UNLOADABLE, pickle.UnpicklingError):
            self.observer.notice(
                f"rng_state.pth of {checkpoint} can't be read: dropout draws other numbers than it would."
            )

    # Writing

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """For an adapter: the policy's only, not the frozen reference beside it."""
        if not is_peft(self.model):
            return super()._save(output_dir, state_dict)
        output_dir = output_dir or self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        self.model.save_pretrained(output_dir, selected_adapters=[self.policy_adapter], save_embedding_layers=False)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """A whole checkpoint, or none and one sentence: what can't be finished is taken away again.

        Raises:
            CantWrite: the disk is full, or forbids it.
        """
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        # What is written over an earlier checkpoint would look whole at any moment.
        aside = folder.with_name(f"old-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            if folder.exists():
                folder.rename(aside)
            folder.mkdir(parents=True)
            self._save_beside(str(folder))
            super()._save_checkpoint(model, trial)
            seal(folder)
        except Exception as error:
            if isinstance(error, CantWrite) or why_unwritten(error) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                if aside.exists():
                    aside.rename(folder)
                raise CantWrite(folder, error.__cause__ if isinstance(error, CantWrite) else error) from error
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _save_beside(self, folder: str) -> None:
        """What a checkpoint has beside transformers' files; they come after: it is not taken for whole before."""
        self._made_with(self.optimizer).save(folder)
        save_kept(self.learner, folder)
        if self.stream is not None and self.stream.place is not None:
            self.stream.place.save(folder)
        if self.reference is not None and (self.reference.moved or self.grpo_args.sync_ref_model):
            self.reference.save(folder)
        if self.learner.entropy is not None:
            self.learner.entropy.save(folder)
        if self.curriculum is not None:
            self.curriculum.save(folder)
        if (self.state.global_step - self.shift) % self.plan.steps_per_rollout and self._updates:
            save_updates(self._updates, folder)
