"""GRPOTrainer: TRL's trainer interface on transformers.Trainer. It conducts; the work is done in the rooms it imports.

One HF "training step" is one optimizer step here: the data loader yields the prompts of a rollout, `training_step`
samples and scores them when a rollout is due, cuts them into micro-batches and accumulates their gradients.
"""

from __future__ import annotations

import copy
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from lowvram_grpo.data.streams import is_stream
from lowvram_grpo.memory.ladder import Rung
from lowvram_grpo.policy.dropout import training_mode
from lowvram_grpo.policy.wrapper import is_peft
from lowvram_grpo.recipe.config import GRPOConfig
from lowvram_grpo.recipe.settings import optimizer_error
from lowvram_grpo.rewards.signatures import log_by_name
from lowvram_grpo.run.completions import CompletionsLog
from lowvram_grpo.run.observer import Observer
from lowvram_grpo.training import parts
from lowvram_grpo.training.agents import agents_of
from lowvram_grpo.training.best_model import EarlyStopping, check_early_stopping, stopped_early
from lowvram_grpo.training.checks import RolloutChecks
from lowvram_grpo.training.collect import rollout_seed
from lowvram_grpo.training.completions_hub import upload_of
from lowvram_grpo.training.completions_tables import TAKERS, CompletionsTables
from lowvram_grpo.training.curriculum import curriculum_of
from lowvram_grpo.training.early_checks import check_best_metric
from lowvram_grpo.training.evaluating import Evaluates
from lowvram_grpo.training.experience import MicroBatch, Rollout, split
from lowvram_grpo.training.gradient_check import GradientCheck, could_teach
from lowvram_grpo.training.loaders import Loaders
from lowvram_grpo.training.metrics import MetricBook, UpdateSums, complete_row, rollout_metrics
from lowvram_grpo.training.overflow import restore_kept
from lowvram_grpo.training.pushing import HubPushes
from lowvram_grpo.training.reference_sync import ReferenceSync
from lowvram_grpo.training.resampling import resampling_of
from lowvram_grpo.training.resumable import ResumableTrainer
from lowvram_grpo.training.savers import TrainerGuard
from lowvram_grpo.training.sources import note_sources
from lowvram_grpo.training.streaming import StreamProgress
from lowvram_grpo.training.trackers import Trackers
from lowvram_grpo.training.trl_hooks import AskedRewards, TrlHooks
from lowvram_grpo.training.trl_names import LastCompletions, TrlNames
from lowvram_grpo.training.warmup import WarmUp

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


class GRPOTrainer(TrlNames, TrlHooks, HubPushes, Evaluates, Loaders, ResumableTrainer):
    """Trains a causal language model with GRPO. Arguments mean what they mean in TRL.

    Args:
        model: folder, hub id, PreTrainedModel or PeftModel. A PeftModel that already carries a trained adapter keeps a
            frozen copy of it as the reference.
        reward_funcs: one or a list of functions `f(prompts, completions, completion_ids, **columns)`, async functions,
            sequence-classification models, or ids of such models.
        args: GRPOConfig.
        train_dataset, eval_dataset: datasets with a `prompt` column (string or messages), or streams of such rows
            (IterableDataset; to train on one takes max_steps); the rewards get the others.
        processing_class: tokenizer; that of `model` when left out.
        reward_processing_classes: tokenizers of reward models.
        callbacks, optimizers: as in transformers.Trainer.
        peft_config: adapter to train; without one all weights are trained and the reference is a frozen copy.
        quantization_config: bitsandbytes configuration for loading `model` from a name.
        observer: receives notices, phases and sample completions; prints notices when left out.
        ladder: memory savers to take, in this order, before the usual ones when memory runs out.
        tools: functions that the model may call while it answers, with type hints and a docstring.
        rollout_func: makes completions in place of the engine, as in TRL.
        environment_factory: makes environments that the model acts in, as in TRL; or such by name.

    Raises:
        UnknownSetting: an argument that there is not; a TypeError too, and it says what to write instead.
        UserError: anything a person can mend, in one sentence.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable[[list, GRPOTrainer], dict[str, list]] | None = None,
        environment_factory: Callable[[], Any] | dict[str, Callable[[], Any]] | None = None,
        *,
        observer: Observer | None = None,
        ladder: tuple[Rung, ...] = (),
        **unknown: Any,
    ):
        parts.check_unknown(unknown, GRPOTrainer.__init__)
        args = args or GRPOConfig(output_dir="grpo")
        call = None if rollout_func is None else lambda prompts: rollout_func(prompts, self)
        agents = agents_of(tools, environment_factory, call, args.max_tool_calling_iterations)
        self.tools, self.rollout_func = [] if agents is None else agents.all_tools, rollout_func
        acting = parts.with_agents(agents, args, reward_funcs, reward_processing_classes, train_dataset, eval_dataset)
        args, reward_funcs, reward_processing_classes, train_dataset, eval_dataset = acting
        self.grpo_args, self.observer = args, observer or Observer(log_completions=args.log_completions)
        notice = self.observer.notice
        check_early_stopping(args, callbacks or ())
        self.looked_at = parts.check_arguments(args, reward_funcs, train_dataset, eval_dataset, peft_config, agents)
        self.completions_upload = upload_of(args, notice)
        set_seed(args.seed)
        model, tokenizer = parts.make_policy(
            model, args, processing_class, quantization_config, peft_config, self.observer
        )
        super().__init__(
            model=model,
            args=parts.for_transformers(args, train_dataset, eval_dataset),
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False
        self.policy_adapter = model.active_adapters[0] if is_peft(model) else None
        self.learner = parts.make_learner(model, args, self.compute_loss_context_manager, notice)
        self.reference = self.learner.reference
        self.add_callback(ReferenceSync(self.learner))
        if is_stream(train_dataset):
            self.stream = StreamProgress(notice)
            self.add_callback(self.stream)
        if args.early_stopping:
            self.add_callback(EarlyStopping(args.early_stopping, args.early_stopping_threshold, notice))
        classes = parts.one_each(reward_processing_classes, len(reward_funcs))
        self.rewards = parts.make_rewards(reward_funcs, args, classes, notice)
        self._given_processing_classes = classes
        engine = parts.make_engine(model, args, tokenizer)
        self.guard = TrainerGuard(
            model, engine, args, ladder, notice=notice, log=lambda row: self.log(row), reference=self.reference,
            rewards=self.rewards,
        )  # fmt: skip
        asked = AskedRewards(self) if self.replaces("_calculate_rewards") else self.rewards
        parts.check_agents(agents, args, tokenizer, self.looked_at)
        self.collector = parts.make_collector(engine, asked, tokenizer, self.guard, args, self.observer.phase, agents)
        self.collector.made_by = self.made_by_generate if self.replaces("_generate") else None
        self.curriculum = curriculum_of(args.curriculum, train_dataset)
        if self.curriculum is not None:
            notice(f"curriculum {args.curriculum}: prompts are ordered by {self.curriculum.source}.")
        self.resampling = resampling_of(
            args.resample_dead_groups, train_dataset, self._sampled, self.collector, notice, self.curriculum
        )
        if self.completions_upload is not None:
            self.add_callback(self.completions_upload)
        self.trackers = Trackers(self.args, self.callback_handler.callbacks, notice)
        self._nothing_yet(args)

    def _nothing_yet(self, args: GRPOConfig) -> None:
        """What steps and logs are counted and kept in, before the first."""
        self.tables: CompletionsTables | None = None
        if args.log_completions and {*TAKERS} & {*args.report_to}:
            self.tables = CompletionsTables(args, self.callback_handler.callbacks, self.observer.notice)
            self.add_callback(self.tables)
        log = CompletionsLog(os.path.join(args.output_dir, "completions.jsonl")) if args.log_completions else None
        self.completions_log: CompletionsLog | None = log
        self.metrics = {"train": MetricBook(), "eval": MetricBook()}
        self.pending_rollout: Rollout | None = None
        self._logs = LastCompletions(self.plan.completions_per_rollout)
        self._extra_columns: dict[str, list] = defaultdict(list)
        self._rollout_checks = RolloutChecks(self._check_best_metric, self.observer.warning)
        self._gradient_check, self._teaches = GradientCheck(str(args.optim)), False
        self._checked, self._early_log = False, []
        self._eval_prefix, self._eval_batches = "eval", 0

    # The run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        checkpoint = self.checkpoint_of(resume_from_checkpoint)
        if checkpoint is not None and stopped_early(checkpoint, self.grpo_args.early_stopping):
            return self._ended_at(checkpoint)
        self.trackers.begin(self, checkpoint)
        warm_up = WarmUp(
            self.learner,
            self.collector,
            self.guard,
            self.observer,
            self.looked_at,
            whole=self.stream is None,
            roll_out=self._roll_out_anew,
            log=self.log,
            save=lambda: self._save(os.path.join(self.args.output_dir, "cold_start")),
        )
        longest = warm_up.check_settings()
        if checkpoint is None or not restore_kept(self.learner, checkpoint):
            warm_up.look_for_overflow()
        if not self._checked:
            warm_up.probe(longest, backward=self.accelerator.backward, moments=self.optimizer is not None)
            if checkpoint is None:
                self.pending_rollout = warm_up.first_rollout(self.get_train_dataloader()) or self.pending_rollout
                self._early_log = list(self.state.log_history)
        self._checked = True
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _roll_out_anew(self, rows: list[dict[str, Any]]) -> Rollout:
        self.metrics["train"].take()
        return self.collect(rows, 0)

    def compute_loss_context_manager(self):
        """Autocast for the sampler and the scorer alike. transformers leaves it to the wrapped `model.forward`, which
        the scorer does not call."""
        return self.accelerator.autocast()

    # A step: a rollout if one is due, its next update, that update's gradients. transformers then takes the step.

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch=None) -> Tensor:
        """One optimizer step's gradients, on the rollout that is due or already there."""
        started, step, metrics = time.perf_counter(), self.state.global_step, self.metrics["train"]
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers keep other weights for evaluation
        within, sampled = (step - self.shift) % self.plan.steps_per_rollout, 0
        if within == 0 or self._updates is None:
            sampled = self._roll_out(inputs, step)
        update = self._updates[within % self.plan.updates_per_rollout % len(self._updates)]
        self.observer.phase("updating")
        training_mode(self.model)
        loss = self.guard.accumulate(lambda: self._gradients(update))
        if self.args.torch_empty_cache_steps and step % self.args.torch_empty_cache_steps == 0:
            torch.cuda.empty_cache()
        means = metrics.add_update(self._sums)
        if self.learner.entropy is not None:
            metrics.add(self.learner.entropy.step(self._sums.acted_entropy))
        seconds = time.perf_counter() - started  # now that the device has done it all
        metrics.add({"step_time": seconds})
        if not self.learner.may_drop_tokens and not self.own_loss:
            clipped = means.get("clip_ratio/region_mean", 0.0)
            self._gradient_check.look(self.model, update, live=self._teaches, clipped=clipped)
        if sampled:
            metrics.add({"tokens_per_second": sampled / seconds})
        return loss

    def _roll_out(self, rows: list[dict[str, Any]], step: int) -> int:
        """Sample, reward, cut and score what the next steps learn from; the number of sampled tokens."""
        rollout, self.pending_rollout = self.pending_rollout, None
        if rollout is not None and self.resampling is not None:
            rollout = self._begun(rollout, rows, step)
        rollout = rollout or self.collect(rows, step)
        self._record(rollout)
        self._updates, self._teaches = self._learnable(rollout), could_teach(rollout)
        return rollout.sampled_tokens

    def _begun(self, rollout: Rollout, rows: list[dict[str, Any]], step: int) -> Rollout:
        """The rollout that was made before step 1, now that its dead groups may be replaced."""
        book, self._mode = self.metrics["train"], "train"
        noted = book.take()
        if self.replaces("_generate_and_score_completions"):
            return self.collect(rows, step)  # by the same random numbers; its advantages are the subclass's to make
        rollout = self._kept(rollout, rows, self._logged, rollout_seed(self.args.seed, step), "train")
        book.add({name: value for name, value in noted.items() if name not in book.values})
        return rollout

    def _collect(self, rows: list[dict[str, Any]], step: int, mode: str = "train") -> Rollout:
        """Sample and reward the rollout of `step`; its random numbers depend on (seed, step) alone."""
        training, group, self._mode = mode == "train", self._group(mode), mode
        # Evaluation draws from seeds of its own, one a batch, the same at every evaluation.
        seed = rollout_seed(self.args.seed, step if training else -1 - self._eval_batches)
        rollout, logged = self._sampled(rows, seed, group)
        if training:
            self._logged = logged
        return self._kept(rollout, rows, logged, seed, mode)

    def _sampled(self, rows: list[dict[str, Any]], seed: int, group: int | None = None) -> tuple[Rollout, dict]:
        """A rollout of `group` completions of each row, as the collector makes it."""
        with self.compute_loss_context_manager():
            rollout, logged = self.collector.collect(
                rows, group or self._group("train"), seed=seed, trainer_state=self.state
            )
        self._add_extras(rollout)
        return rollout, logged

    def _kept(self, rollout: Rollout, rows: list[dict[str, Any]], logged: dict, seed: int, mode: str) -> Rollout:
        """The rollout that is used, and what is said and kept of it. Before step 1 nothing is resampled: how many
        groups are dead is what is asked then."""
        training = mode == "train"
        if training and self.resampling is not None and self.is_in_train:
            rollout, rows, logged, cost = self.resampling(rollout, rows, logged, seed)
            self.metrics[mode].add(cost)
            self.state.num_input_tokens_seen += int(cost["resample/tokens_dropped"])
        self._rollout_checks.look(rollout, rows, logged, training=training)
        self.metrics[mode].add(logged)
        self.metrics[mode].add(rollout_metrics(rollout, self.rewards.names))
        self.metrics[mode].add(note_sources(rollout, rows, self._group(mode)))
        self._logs.keep(rollout, self.rewards.names)
        if self.tables is not None:
            self.tables.keep(mode, rollout.columns(self.rewards.names))
        self._rows = rows
        return rollout

    def _check_best_metric(self, logged: dict[str, float]) -> None:
        final = not log_by_name(self.rewards.funcs)
        check_best_metric(self.grpo_args, self.rewards.names, self.eval_dataset, logged, final=final)

    def _record(self, rollout: Rollout) -> None:
        """Count the rollout's tokens and hand its completions to whoever keeps them."""
        self.state.num_input_tokens_seen += rollout.tokens
        step = self.state.global_step + 1
        if self.curriculum is not None:
            self.curriculum.seen(rollout)
        for log in (self.completions_log, self.completions_upload):
            if log is not None:
                log.write(step, **rollout.columns(self.rewards.names))
        for shown in rollout.shown(self.grpo_args.num_completions_to_print or 1):
            self.observer.sample(*shown, step)

    def cut(self, rollout: Rollout, updates: int) -> list[list[MicroBatch]]:
        return self.learner.cut(rollout, self.plan, self.collector.pad_id, updates=updates)

    def _learnable(self, rollout: Rollout) -> list[list[MicroBatch]]:
        """Its updates, with what is computed once a rollout."""
        learnable = lambda: self.learner.learnable(rollout, self.plan, self.collector.pad_id)
        updates, gaps = self.guard.run("score", learnable)
        for gap in gaps:
            self.metrics["train"].add(gap)
        return updates

    def _gradients(self, update: list[MicroBatch]) -> Tensor:
        """Accumulate the update's gradients, in micro-batches as small as they have to be; its loss."""
        self.model.zero_grad()
        self._sums, loss = UpdateSums(self.learner.objective), torch.zeros((), device=self.args.device)
        micros = [part for micro in update for part in split(micro, self.plan.micro_batch_size)]
        with self.guard.phase("score"):
            micros = self.learner.with_entropy_masks(micros)
        self.current_gradient_accumulation_steps = len(micros)  # for losses of subclasses: micro-batches in this step
        needed = [True] * len(micros) if self.own_loss else self.learner.need_gradients(micros)
        micros = [copy.copy(micro) for micro in micros] if self.own_loss else micros  # which may write into them
        for micro, needs_gradient in zip(micros, needed):
            with self.compute_loss_context_manager(), torch.set_grad_enabled(needs_gradient):
                share = self.compute_loss(self.model, micro)
            if needs_gradient:
                with self.guard.phase("backward"):
                    self.accelerator.backward(share)
            loss += share.detach()
            del share  # and with it what its graph holds, before the next forward pass
        return loss

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
        except (ImportError, ValueError, TypeError) as error:
            raise optimizer_error(str(self.args.optim.value), error) from error
        self.guard.guard_step(optimizer)
        return optimizer

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.is_in_train and self._early_log:
            # transformers began a new state after the cold start; its rows belong to this run's history all the same.
            self.state.log_history[:0], self._early_log = self._early_log, []
        tokens = self.state.num_input_tokens_seen
        complete_row(logs, self.metrics, eval_prefix=self._eval_prefix, tokens=tokens, device=self.args.device)
        super().log(logs, start_time)
        for book in self.metrics.values():  # not before callbacks have read it, as `_metrics`
            book.forget()
        if "train_runtime" in logs:
            # The history's last row, where TRL's scripts look, has the metrics of the last step even if that is logged.
            last = {**self.metrics["train"].last, "num_tokens": tokens}
            self.state.log_history[-1] = {**last, **self.state.log_history[-1]}
