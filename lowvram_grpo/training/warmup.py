"""What happens between a loaded model and its first GRPO step: length check, memory probe, signal check, cold start,
self-test.

The rollout that the checks look at is the very one that step 1 then learns from, so they cost nothing extra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError, counted
from lowvram_grpo.memory.optimizer import GuardedStep
from lowvram_grpo.policy.dropout import adapter_dropout
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rewards.registry import full_marks
from lowvram_grpo.training.checks import OtherSampler, Signal, endless_remedy, self_test, signal_of
from lowvram_grpo.training.cold_start import (
    FEWEST_REFERENCES,
    REFERENCE_COLUMN,
    ColdStart,
    batches_of,
    fitting_references,
    optimizer_class,
)
from lowvram_grpo.training.collect import Collector
from lowvram_grpo.training.continuation import planned_steps
from lowvram_grpo.training.early_checks import check_lengths, prompt_lengths
from lowvram_grpo.training.experience import Rollout
from lowvram_grpo.training.learner import Learner
from lowvram_grpo.training.overflow import look_for_overflow
from lowvram_grpo.training.pace import pace_of, timed
from lowvram_grpo.training.probe import probe
from lowvram_grpo.training.savers import TrainerGuard

if TYPE_CHECKING:
    from datasets import Dataset

    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.run.observer import Observer

Rows = list[dict[str, Any]]

_PROBE_EVERY = 4
_LOOKED_AT = 4
# Columns that rewards judge by, most likely first.
_ANSWERS = ("answer", "solution", "ground_truth", "target", "label", REFERENCE_COLUMN)


@dataclass(frozen=True)
class WarmUp:
    """Looks at settings and prompts, rehearses the longest step, checks the first rollout, warms the adapter up where
    that is asked for or needed, and tests the plumbing.

    Attributes:
        learner, collector, guard, observer: those of the run.
        data: the prompts, perhaps with references; the `whole` of them, or the first of a stream.
        roll_out: samples and rewards these rows of the data as step 1 would; metrics of the time before are forgotten.
        log: takes a row of metrics.
        save: keeps the adapter as the cold start leaves it.
    """

    learner: Learner
    collector: Collector
    guard: TrainerGuard
    observer: Observer
    data: Dataset
    roll_out: Callable[[Rows], Rollout]
    log: Callable[[dict[str, Any]], None]
    save: Callable[[], None]
    whole: bool = True

    def check_settings(self) -> int:
        """Say which settings have no effect, or another than one would think, and how many prompts are cut; stop where
        even a cut prompt and its completion exceed the model's positions.

        Returns:
            the tokens of the longest prompt, cut as it will be.
        """
        args, model, notice = self.learner.args, self.learner.model, self.observer.notice
        for sentence in args.notices():
            self.observer.warning(sentence)
        if dropped := adapter_dropout(model):
            notice(
                f"the adapter's dropout of {dropped:g} is on in training passes only, so ratio and kl carry its noise; "
                "set lora_dropout to 0, or disable_dropout, to switch it off."
            )
        lengths = prompt_lengths(args, self.collector.tokenizer, self.data, whole=self.whole)
        longest = check_lengths(args, lengths, unwrap(model).config, notice)
        agents = self.collector.agents
        if args.max_tool_calling_iterations is not None and (agents is None or agents.samples_itself):
            self.observer.warning("max_tool_calling_iterations has no effect: the model has no tools.")
        # Behind the first rows of a stream any length may come, and behind a prompt what an environment says.
        known = self.whole and (agents is None or agents.environments is None)
        return longest if known else max(longest, args.max_prompt_length or 0)

    def look_for_overflow(self) -> None:
        """Keep the layers in float32 that leave float16's range on the first prompts, before anything is sampled."""
        agents = self.collector.agents
        if agents is None or agents.environments is None:
            rows = [self.data[i] for i in range(min(_LOOKED_AT, len(self.data)))]
            prompts = self.collector.encode([row["prompt"] for row in rows])
            look_for_overflow(self.learner, prompts, self.observer.notice)

    def probe(self, longest_prompt: int, *, backward: Callable[[Tensor], None], moments: bool) -> None:
        """Rehearse the longest step, where `memory_probe` wants that; see `probe.probe`."""
        args = self.learner.args
        if args.memory_probe == "on" or (args.memory_probe == "auto" and args.device.type == "cuda"):
            probe(
                self.learner,
                self.guard,
                longest_prompt,
                backward=backward,
                observer=self.observer,
                moments=moments,
            )

    def first_rollout(self, loader: Iterable[Rows]) -> Rollout | None:
        """The rollout that step 1 is to learn from; None where nothing is asked of it before.

        Raises:
            UserError: the self-test failed, or a cold start was asked for that the data cannot feed.
        """
        args, notice = self.learner.args, self.observer.notice
        if not (args.signal_check or args.self_test or str(args.cold_start) != "off"):
            return None
        rows = next(iter(loader))
        references = fitting_references(
            self.data,
            self.collector.tokenizer,
            limit=args.max_completion_length,
            seed=args.seed,
            notice=None if str(args.cold_start) == "off" else notice,
        )
        rollout, signal = self._probed(rows)
        batch = rollout.batch
        whole = [prompt + ids for prompt, ids in zip(batch.prompt_ids, batch.completion_ids)]
        if look_for_overflow(self.learner, whole, notice):
            rollout, signal = self._probed(rows)
        if args.signal_check:
            notice(signal.sentence(has_references=len(references) >= FEWEST_REFERENCES))
        if steps := self._cold_steps(signal, references):
            self.log(_cold_row(0, signal))
            rollout = self._cold_start(rows, references, steps)
        scored = self._self_test(rollout) if args.self_test else None
        run = planned_steps(args, self.data)
        notice(pace_of(self.learner, self.guard.plan, rollout, scored, run=run).sentence())
        return rollout

    def _probed(self, rows: Rows) -> tuple[Rollout, Signal]:
        """The rollout of step 1 as the model stands, and what it says."""
        rollout, sampling = self.roll_out(rows), self.collector.engine.sampling
        names, funcs = self.collector.rewards.names, self.collector.rewards.funcs
        return rollout, signal_of(
            rollout,
            names,
            reference=next((rows[0][name] for name in _ANSWERS if rows[0].get(name) is not None), None),
            endless=endless_remedy(rollout, self.collector.tokenizer, sampling.eos_ids, sampling.max_new_tokens),
            masked=self.learner.args.mask_truncated_completions,
            penalties=[name for name, func in zip(names, funcs) if full_marks(func) <= 0],
        )

    def _cold_steps(self, signal: Signal, references: list[int]) -> int:
        """How many steps a cold start takes at most; 0: there is none."""
        args = self.learner.args
        cold = str(args.cold_start)
        if cold.isdigit():
            if int(cold) and not references:
                raise UserError(
                    f"cold_start is {int(cold)}, but the data has no {REFERENCE_COLUMN!r} column with references that "
                    "fit max_completion_length; use a template with references (--template tldr with an answer "
                    "column), raise max_completion_length, or pass --cold-start off."
                )
            return int(cold)
        if cold != "auto" or not signal.absent or signal.saturated or signal.unjudged or not references:
            return 0
        if len(references) >= FEWEST_REFERENCES:
            return args.cold_start_max_steps
        self.observer.notice(
            f"no automatic cold start: {counted(len(references), 'fitting reference')} would be learned by heart, it "
            f"takes {FEWEST_REFERENCES} or more; add references, raise max_completion_length where they are too "
            "long, or pass --cold-start N for N steps on what is there."
        )
        return 0

    def _cold_start(self, rows: Rows, references: list[int], steps: int) -> Rollout:
        """Supervised steps until there is a live signal, or nothing left to learn (or exactly `steps`); then the
        adapter is frozen as the reference."""
        args = self.learner.args
        stop_early = str(args.cold_start) == "auto"
        warm = ColdStart(
            self.learner.model,
            batches_of(self.data, references, self.collector.tokenizer, self.collector.encode),
            learning_rate=args.cold_start_learning_rate,
            guarded=lambda work, undo: self.guard.run(
                "forward", lambda: work(self.guard.plan.micro_batch_size, args.workspace_mib), undo
            ),
            pad_id=self.collector.pad_id,
            offload=lambda: args.activation_offload,
            optimizer=optimizer_class(str(args.optim)),
            fp16=args.fp16,
        )
        GuardedStep(warm.optimizer, self.guard, offload=args.optimizer_offload)
        self.observer.notice(
            f"cold start: {'up to ' if stop_early else ''}{counted(steps, 'supervised step')} on "
            f"{counted(len(references), 'reference')}."
        )
        rollout, signal = None, None
        for step in range(steps):
            self.observer.phase(f"cold start {step + 1}/{steps}")
            loss = warm.step(step, self.learner.autocast)
            probed = (step + 1) % _PROBE_EVERY == 0 or step + 1 == steps
            if probed:
                rollout, signal = self._probed(rows)
            self.log({"cold_start/loss": loss, **_cold_row(step + 1, signal if probed else None)})
            if stop_early and signal is not None and (signal.alive or signal.saturated):
                break
        outcome = "a live signal" if signal.alive else "still no live signal"
        if signal.saturated:
            outcome = "the same positive reward for every completion and nothing left to learn"
        self.observer.notice(
            f"cold start ended after {counted(step + 1, 'step')} with {outcome}: mean reward {signal.mean:.2f}, "
            f"{signal.dead:.0%} of the groups dead."
        )
        if self.learner.reference is not None:
            self.learner.reference.freeze()
        self.save()
        return rollout

    def _self_test(self, rollout: Rollout) -> tuple[int, float]:
        """Returns the tokens that were scored, and the seconds of one pass over them."""
        learner = self.learner
        micro = learner.cut(rollout, self.guard.plan, self.collector.pad_id, updates=1)[0][0]
        scored, seconds = timed(lambda: learner.score_frozen(micro), learner.args.device)
        reference = None
        if learner.reference is not None:
            with learner.reference.active() as model:
                reference = learner.score_frozen(micro, model)
        text = self_test(
            micro.sampling_per_token_logps,
            scored,
            reference,
            micro.sampled_mask,
            _coarsest_dtype(unwrap(learner.model), learner.args),
            other=self._other_sampler(),
        )
        self.observer.notice(text)
        return int(micro.prompt_mask.sum() + micro.completion_mask.sum()), seconds

    def _other_sampler(self) -> OtherSampler | None:
        """vLLM, or a function of the user's, where that samples; the policy's own engine needs no allowance."""
        if self.collector.agents is not None and self.collector.agents.samples_itself:
            return OtherSampler("rollout_func", rounded=False, filtered=True)
        if not self.learner.args.use_vllm:
            return None
        by = self.collector.engine.sampling
        filtered = by.top_p < 1 or bool(by.top_k) or bool(by.min_p) or by.repetition_penalty != 1 or bool(by.extra)
        quantized = bool(getattr(unwrap(self.learner.model), "is_quantized", False))
        return OtherSampler("vLLM", quantized, filtered)


def _cold_row(step: int, signal: Signal | None) -> dict[str, float]:
    row = {"cold_start/step": step}
    if signal is not None:
        row |= {"cold_start/reward": signal.mean, "cold_start/dead_groups": signal.dead}
    return row


def _coarsest_dtype(model: nn.Module, args: GRPOConfig) -> torch.dtype:
    """The dtype whose rounding separates a decode step from a full forward pass: that of quantized activations, of
    autocast, or of the weights. Quantized weights count as bfloat16: their decode and prefill kernels differ. So does
    an int8 KV cache, which rounds less than that."""
    if getattr(model, "is_loaded_in_8bit", False):
        return torch.int8
    rounded = getattr(model, "is_quantized", False) or args.kv_cache_dtype == "int8"
    if args.bf16 or rounded:
        return torch.bfloat16
    return torch.float16 if args.fp16 else model.dtype
