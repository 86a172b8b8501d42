"""GRPOTrainer: TRL's trainer interface on transformers.Trainer. It conducts; the work is done in the rooms it imports.

One HF "training step" is one optimizer step here: the data loader yields the prompts of a rollout, `training_step`
samples and scores them when a rollout is due, cuts them into micro-batches and accumulates their gradients.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from lowvram_grpo.data.batching import PromptLoader, PromptSampler
from lowvram_grpo.data.load import check_dataset
from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.guard import cap
from lowvram_grpo.memory.ladder import Rung
from lowvram_grpo.objective import objective_of
from lowvram_grpo.policy.adapter import restore_adapter
from lowvram_grpo.policy.attention_choice import check as check_attention
from lowvram_grpo.policy.build import build_policy
from lowvram_grpo.policy.dropout import adapter_dropout, training_mode
from lowvram_grpo.policy.known_models import named
from lowvram_grpo.policy.load import check_tokens, compute_dtype, load_tokenizer_for
from lowvram_grpo.policy.precision import slow_dtype
from lowvram_grpo.policy.reference import Reference
from lowvram_grpo.policy.variants import check_adapter
from lowvram_grpo.policy.wrapper import is_peft, unwrap
from lowvram_grpo.recipe.config import GRPOConfig
from lowvram_grpo.recipe.settings import check_before_loading, check_best_metric, check_evaluation, optimizer_error
from lowvram_grpo.rewards.runner import RewardRunner, check_columns, log_by_name
from lowvram_grpo.rollout.engine import RolloutEngine, end_ids, engine_of
from lowvram_grpo.rollout.sampler import Sampling, sampling_of
from lowvram_grpo.rollout.vllm import check_vllm, vllm_engine
from lowvram_grpo.rollout.vllm_base import VLLMEngine
from lowvram_grpo.run.completions import CompletionsLog, as_text
from lowvram_grpo.run.observer import Observer
from lowvram_grpo.training.checks import unjudged_row
from lowvram_grpo.training.collect import Collector, reward_columns
from lowvram_grpo.training.correction import correction_of
from lowvram_grpo.training.experience import MicroBatch, Rollout, load_updates, save_updates, split, updates_of
from lowvram_grpo.training.gradient_check import GradientCheck, could_teach
from lowvram_grpo.training.learner import Learner
from lowvram_grpo.training.loss import choose_kernels
from lowvram_grpo.training.metrics import (
    MetricBook,
    UpdateSums,
    length_metrics,
    peak_memory_gib,
    read,
    reward_metrics,
    sampler_metrics,
)
from lowvram_grpo.training.probe import probe
from lowvram_grpo.training.pushing import HubPushes
from lowvram_grpo.training.resumable import ResumableTrainer
from lowvram_grpo.training.savers import TrainerGuard
from lowvram_grpo.training.warmup import before_first_step, check_lengths

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


class GRPOTrainer(HubPushes, ResumableTrainer):
    """Trains a causal language model with GRPO. Arguments mean what they mean in TRL.

    Args:
        model: folder, hub id, PreTrainedModel or PeftModel. A PeftModel that already carries a trained adapter keeps a
            frozen copy of it as the reference.
        reward_funcs: one or a list of functions `f(prompts, completions, completion_ids, **columns)`, async functions,
            sequence-classification models, or ids of such models.
        args: GRPOConfig.
        train_dataset, eval_dataset: datasets with a `prompt` column (string or messages); the rewards get the others.
        processing_class: tokenizer; that of `model` when left out.
        reward_processing_classes: tokenizers of reward models.
        callbacks, optimizers: as in transformers.Trainer.
        peft_config: adapter to train; without one all weights are trained and the reference is a frozen copy.
        quantization_config: bitsandbytes configuration for loading `model` from a name.
        observer: receives notices, phases and sample completions; prints notices when left out.
        ladder: memory savers to take, in this order, before the usual ones when memory runs out.

    Raises:
        UserError: anything a person can mend, in one sentence.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        observer: Observer | None = None,
        ladder: tuple[Rung, ...] = (),
    ):
        args = args or GRPOConfig(output_dir="grpo")
        self.observer = observer or Observer(log_completions=args.log_completions)
        check_dataset(train_dataset, "train_dataset")
        check_evaluation(args, eval_dataset)
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        check_columns(reward_funcs, reward_columns(train_dataset[0], only_prompts=bool(args.remove_unused_columns)))
        check_before_loading(args, reward_funcs, eval_dataset)
        if peft_config is not None:  # build_policy does so too, once a tokenizer has been fetched
            check_adapter(peft_config, fresh=True, reference=args.beta > 0)
        set_seed(args.seed)
        if isinstance(model, str):
            model = named(model, self.observer.notice)
        tokenizer = processing_class or load_tokenizer_for(model, args)
        check_tokens(model, tokenizer, args)
        if args.use_vllm:
            check_vllm(args)
        cap(args)
        model = build_policy(model, args, quantization_config, peft_config, self.observer.notice)
        if slow := slow_dtype(model, args):
            self.observer.notice(slow)
        self.plan, self.grpo_args = args.batch_plan(), args
        super().__init__(
            model=model,
            args=_for_transformers(args),
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False
        self.policy_adapter = model.active_adapters[0] if is_peft(model) else None
        self.reference = Reference(model, follows=args.sync_ref_model) if args.beta > 0 else None
        if self.reference is not None and not is_peft(model) and args.kl_estimator == "exact":
            raise UserError(
                "kl_estimator exact sweeps policy and reference through one frozen lm_head, and here all weights are "
                "trained; pass a peft_config, or take k3."
            )
        kernels = choose_kernels(
            args.fused_loss, args.device, compute_dtype(args.device), unwrap(model).get_output_embeddings().in_features
        )
        with self.compute_loss_context_manager():
            causal_lm = unwrap(model)
            decoder = getattr(causal_lm, causal_lm.base_model_prefix)
            if partly := check_attention(args.attention, "training", decoder, args.device):
                self.observer.notice(partly)
        self.learner = Learner(
            model,
            self.reference,
            objective_of(args),
            kernels,
            args,
            steps_per_rollout=self.plan.steps_per_rollout,
            autocast=self.compute_loss_context_manager,
            correction=correction_of(args),
        )
        self.rewards = RewardRunner(
            reward_funcs,
            weights=args.reward_weights,
            processing_classes=reward_processing_classes
            if isinstance(reward_processing_classes, list) or reward_processing_classes is None
            else [reward_processing_classes],
            device=args.device,
            timeout=args.reward_timeout,
        )
        self.guard = TrainerGuard(self, ladder)
        self.collector = Collector(
            _engine(args, model, sampling_of(args, end_ids(model, tokenizer), tokenizer)),
            self.rewards,
            tokenizer,
            self.guard,
            max_prompt_length=args.max_prompt_length,
            chat_template_kwargs=args.chat_template_kwargs,
            scale_rewards=args.scale_rewards,
            only_prompts=bool(args.remove_unused_columns),
            tell=self.observer.phase,
        )
        self.metrics = {"train": MetricBook(), "eval": MetricBook()}
        self.completions_log: CompletionsLog | None = None
        if args.log_completions:
            self.completions_log = CompletionsLog(os.path.join(args.output_dir, "completions.jsonl"))
        self.pending_rollout: Rollout | None = None
        self._checked = self._rewards_called = self._unjudged_said = False
        self._early_log: list[dict[str, Any]] = []
        self._eval_prefix, self._eval_batches = "eval", 0
        self._updates: list[list[MicroBatch]] | None = None
        self._live, self._gradient_check = False, GradientCheck(str(args.optim))

    # Data

    def get_train_dataloader(self) -> PromptLoader:
        sampler = PromptSampler(
            self.train_dataset,
            prompts=self.plan.prompts_per_rollout,
            repeats=self.plan.steps_per_rollout,
            shuffle=self.grpo_args.shuffle_dataset,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        return PromptLoader(self.train_dataset, sampler)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> PromptLoader:
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data
        check_dataset(data, "eval_dataset")
        prompts = max(1, self.args.per_device_eval_batch_size // self.generations_eval)
        return PromptLoader(data, PromptSampler(data, prompts=prompts, repeats=1, shuffle=False, seed=self.args.seed))

    @property
    def generations_eval(self) -> int:
        return self.grpo_args.num_generations_eval or self.plan.num_generations

    def get_total_train_batch_size(self, args=None) -> int:
        """Completions a step, which transformers counts its samples by."""
        return self.plan.completions_per_rollout // self.plan.updates_per_rollout

    # The run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        for notice in self.grpo_args.notices():
            self.observer.notice(notice)
        if dropped := adapter_dropout(self.model):
            self.observer.notice(
                f"the adapter's dropout of {dropped:g} is on in training passes only, so ratio and kl carry its noise; "
                "set lora_dropout to 0, or disable_dropout, to switch it off."
            )
        longest = check_lengths(self)
        wanted = self.grpo_args.memory_probe
        if not self._checked and (wanted == "on" or (wanted == "auto" and self.args.device.type == "cuda")):
            probe(self, longest)
        if not resume_from_checkpoint and not self._checked:
            before_first_step(self)
            self._early_log = list(self.state.log_history)
        self._checked = True
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def compute_loss_context_manager(self):
        """Autocast for the sampler and the scorer alike. transformers leaves it to the wrapped `model.forward`, which
        the scorer does not call."""
        return self.accelerator.autocast()

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch=None) -> Tensor:
        """One optimizer step's gradients, on the rollout that is due or already there."""
        started = time.perf_counter()
        step, args = self.state.global_step, self.grpo_args
        if args.sync_ref_model and self.reference and step and step % args.ref_model_sync_steps == 0:
            self.reference.sync(args.ref_model_mixup_alpha)
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()  # schedule-free optimizers keep other weights for evaluation
        offset = (step - self.shift) % self.plan.steps_per_rollout
        tokens = 0
        if offset == 0 or self._updates is None:
            rollout = self.pending_rollout or self.collect(inputs, step)
            self.pending_rollout = None
            tokens = self._record(rollout)
            self._updates, self._live = self._learnable(rollout), could_teach(rollout)
        update = self._updates[offset % self.plan.updates_per_rollout % len(self._updates)]
        self.observer.phase("updating")
        training_mode(self.model)
        loss = self.guard.run("forward", lambda: self._gradients(update), self._redo_from_here())
        if self.args.torch_empty_cache_steps and step % self.args.torch_empty_cache_steps == 0:
            torch.cuda.empty_cache()
        sums = self._taken()
        seconds = time.perf_counter() - started  # now that the device has done it all
        self.metrics["train"].add({**sums, "step_time": seconds})
        if self.learner.correction is None:  # which may have taken every weight away
            self._gradient_check.look(self.model, update, live=self._live, clipped=sums["clip_ratio/region_mean"])
        if tokens:
            self.metrics["train"].add({"tokens_per_second": tokens / seconds})
        return loss

    def _gradients(self, update: list[MicroBatch]) -> Tensor:
        """Accumulate the update's gradients, in micro-batches as small as they have to be; its loss."""
        self.model.zero_grad()
        self._sums, loss = UpdateSums(), torch.zeros((), device=self.args.device)
        micros = [part for micro in update for part in split(micro, self.plan.micro_batch_size)]
        for micro, needs_gradient in zip(micros, self.learner.learning(micros)):
            with self.compute_loss_context_manager(), torch.set_grad_enabled(needs_gradient):
                share = self.compute_loss(self.model, micro)
            if needs_gradient:
                with self.guard.phase("backward"):
                    self.accelerator.backward(share)
            loss += share.detach()
            del share  # and with it what its graph holds, before the next forward pass
        return loss

    def _taken(self) -> dict[str, float]:
        """The update's metrics; those of its micro-batches go to the book."""
        sums = self._sums.take()
        for gap in self._sums.gaps:
            self.metrics["train"].add(gap)
        return sums

    def _redo_from_here(self) -> Callable[[], None]:
        """Brings back the random numbers (of dropout) as they are now."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        host, there = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]

        def undo() -> None:
            self.model.zero_grad()
            torch.set_rng_state(host)
            for device, state in zip(devices, there):
                torch.cuda.set_rng_state(state, device)

        return undo

    def compute_loss(self, model: nn.Module, inputs: MicroBatch, return_outputs: bool = False, **kwargs) -> Tensor:
        """This micro-batch's share of the update's loss."""
        sums, scores = self.learner.loss(inputs)
        first = inputs.old_per_token_logps is None and self.model.training
        self._sums.add(sums, scores, self._sampler_gap(inputs, scores.logps.detach()) if first else None)
        return (sums.loss, scores) if return_outputs else sums.loss

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
        except (ImportError, ValueError, TypeError) as error:
            raise optimizer_error(str(self.args.optim.value), error) from error
        self.guard.guard_step(optimizer)
        return optimizer

    def _sampler_gap(self, micro: MicroBatch, logps: Tensor) -> dict[str, Tensor]:
        return sampler_metrics(logps, micro.sampling_per_token_logps, micro.completion_mask, self.learner.correction)

    def collect(self, rows: list[dict[str, Any]], step: int, mode: str = "train") -> Rollout:
        """Sample and score the rollout of `step`; its random numbers depend on (seed, step) alone."""
        group = self.plan.num_generations if mode == "train" else self.generations_eval
        # Evaluation draws from seeds of its own, one a batch, the same at every evaluation.
        place = step if mode == "train" else -1 - self._eval_batches
        seed = (self.args.seed * 1_000_003 + place) % 2**63
        with self.compute_loss_context_manager():
            rollout, logged = self.collector.collect(rows, group, seed=seed, trainer_state=self.state)
        if mode == "train" and not self._rewards_called:
            self._rewards_called = True
            final = not log_by_name(self.rewards.funcs)
            check_best_metric(self.grpo_args, self.rewards.names, self.eval_dataset, logged, final=final)
        if not self._unjudged_said and (warning := unjudged_row(rollout, rows)):
            self._unjudged_said = True
            self.observer.notice(warning)
        lengths = [len(ids) for ids in rollout.batch.completion_ids]
        self.metrics[mode].add(logged)
        self.metrics[mode].add(length_metrics(lengths, rollout.batch.truncated))
        self.metrics[mode].add(
            reward_metrics(rollout.rewards, rollout.rewards_per_func, self.rewards.names, rollout.advantages.dead)
        )
        return rollout

    def _record(self, rollout: Rollout) -> int:
        """Count the rollout's tokens and hand its completions to whoever keeps them."""
        completed = sum(map(len, rollout.batch.completion_ids))
        self.state.num_input_tokens_seen += completed + sum(map(len, rollout.batch.prompt_ids))
        step, advantages = self.state.global_step + 1, rollout.advantages.values.tolist()
        if self.completions_log is not None:
            absent_for_nan = lambda column: [None if v != v else v for v in column.tolist()]
            per_func = {n: absent_for_nan(c) for n, c in zip(self.rewards.names, rollout.rewards_per_func.T)}
            self.completions_log.write(step, rollout.prompts, rollout.completions, per_func, advantages, rollout.extras)
        best = max(range(len(advantages)), key=advantages.__getitem__)
        prompt, completion = as_text(rollout.prompts[best]), as_text(rollout.completions[best])
        self.observer.sample(prompt, completion, float(rollout.rewards[best]), step)
        return completed

    def cut(self, rollout: Rollout, updates: int) -> list[list[MicroBatch]]:
        args = self.grpo_args
        return updates_of(
            rollout,
            updates=updates,
            micro_batch_size=self.plan.micro_batch_size,
            loss_type=args.loss_type,
            max_completion_length=args.max_completion_length,
            mask_truncated=args.mask_truncated_completions,
            pad_id=self.collector.engine.sampling.pad_id,
            device=self.args.device,
        )

    def _learnable(self, rollout: Rollout) -> list[list[MicroBatch]]:
        """Micro-batches with what is computed once a rollout."""
        return self.guard.run("score", lambda: self._prepared(rollout))

    def _prepared(self, rollout: Rollout) -> list[list[MicroBatch]]:
        updates = self.cut(rollout, self.plan.updates_per_rollout)
        gaps = []
        for micro in (micro for update in updates for micro in update):
            self.learner.prepare(micro)
            if micro.old_per_token_logps is not None:
                gaps.append(self._sampler_gap(micro, micro.old_per_token_logps))
        for gap in read(gaps):
            self.metrics["train"].add(gap)
        return updates

    # Evaluation and logging

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Remember under which name (`eval_NAME` for one of several datasets) the metrics go out."""
        self._eval_prefix, self._eval_batches = metric_key_prefix, 0
        return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Sample, reward and score a batch of evaluation prompts; metrics go out under eval_*."""
        rollout = self.collect(inputs, self.state.global_step, mode="eval")
        self._eval_batches += 1
        was_training = self.model.training
        self.model.eval()
        loss = self.guard.run("score", lambda: self._evaluated(rollout))
        self.model.train(was_training)
        self.metrics["eval"].add(self._taken())
        return loss, None, None

    @torch.no_grad()
    def _evaluated(self, rollout: Rollout) -> Tensor:
        self._sums, loss = UpdateSums(), torch.zeros((), device=self.args.device)
        for micro in self.cut(rollout, 1)[0]:
            with self.compute_loss_context_manager():
                self.learner.add_reference(micro)
                loss += self.compute_loss(self.model, micro)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.is_in_train and self._early_log:
            # transformers began a new state after the cold start; its rows belong to this run's history all the same.
            self.state.log_history[:0], self._early_log = self._early_log, []
        if any(key.startswith("eval_") for key in logs):
            logs.update({f"{self._eval_prefix}_{k}": v for k, v in self.metrics["eval"].take().items()})
        elif "loss" in logs or ("train_runtime" in logs and self.metrics["train"]):
            # As in TRL, the last row has what was measured since the last logged step.
            logs.update(self.metrics["train"].take())
            logs["num_tokens"] = self.state.num_input_tokens_seen
            memory = peak_memory_gib(self.args.device)
            if memory is not None:
                logs["memory/peak_gib"] = memory
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        """Not counted: transformers' estimate knows nothing of rollouts."""
        return 0

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """For an adapter: the policy's only, not the frozen reference beside it."""
        if not is_peft(self.model):
            return super()._save(output_dir, state_dict)
        output_dir = output_dir or self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        self.model.save_pretrained(output_dir, selected_adapters=[self.policy_adapter], save_embedding_layers=False)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _save_beside(self, folder: str) -> None:
        super()._save_beside(folder)
        if self.reference is not None and (self.reference.moved or self.grpo_args.sync_ref_model):
            self.reference.save(folder)
        if (self.state.global_step - self.shift) % self.plan.steps_per_rollout and self._updates:
            save_updates(self._updates, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.guard.settle_moments()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_peft(self.model):
            self._restore_adapter(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.reference is not None:
            self.reference.restore(resume_from_checkpoint)
        self._updates = load_updates(resume_from_checkpoint, self.args.device) or self._updates

    def _restore_adapter(self, folder: str) -> None:
        if self.policy_adapter != "default":
            folder = os.path.join(folder, self.policy_adapter)
        restore_adapter(self.model, folder, self.policy_adapter)

    def _load_best_model(self) -> None:
        if not is_peft(self.model):
            return super()._load_best_model()
        self._restore_adapter(self.state.best_model_checkpoint)


def _engine(args: GRPOConfig, model: nn.Module, sampling: Sampling) -> RolloutEngine | VLLMEngine:
    """What samples: the training weights, or vLLM."""
    if args.use_vllm:
        return vllm_engine(args, model, sampling)
    return engine_of(args, model, sampling)


def _for_transformers(args: GRPOConfig) -> GRPOConfig:
    """The copy that transformers.Trainer runs on: one loader batch is one optimizer step, and activation checkpointing
    is already switched on."""
    inner = copy.copy(args)
    inner.gradient_accumulation_steps = 1
    inner.gradient_checkpointing = inner.activation_checkpointing = False
    inner.remove_unused_columns = False
    inner.bf16_full_eval = inner.fp16_full_eval = False  # would cast the policy for good
    inner._n_gpu = min(args.n_gpu, 1)  # transformers would wrap the model in DataParallel where it sees two cards
    return inner
