"""What happens between a loaded model and its first GRPO step: length check, signal check, cold start, self-test.

The rollout that the checks look at is the very one that step 1 then learns from, so they cost nothing extra.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from lowvram_grpo.data.encoding import prompt_length_report
from lowvram_grpo.errors import UserError, counted
from lowvram_grpo.memory.optimizer import GuardedStep
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.training.checks import Elsewhere, Signal, endless_remedy, self_test, signal_of
from lowvram_grpo.training.cold_start import REFERENCE_COLUMN, ColdStart, reference_ids
from lowvram_grpo.training.pace import pace_of, timed

if TYPE_CHECKING:
    from lowvram_grpo.training.experience import Rollout
    from lowvram_grpo.training.trainer import GRPOTrainer

_PROBE_EVERY = 4
# Columns that rewards judge by, most likely first.
_ANSWERS = ("answer", "solution", "ground_truth", "target", "label", REFERENCE_COLUMN)
_PAIRS_PER_STEP = 8
_MOST_REFERENCES = 5000
# Fewer than one batch of references would be repeated in every step: the adapter learns them by heart, not their form.
_FEWEST_REFERENCES = _PAIRS_PER_STEP


def before_first_step(trainer: GRPOTrainer) -> None:
    """Check the first rollout, warm the adapter up where that is asked for or needed, and test the plumbing.

    Raises:
        UserError: the self-test failed, or a cold start was asked for that the data cannot feed.
    """
    args = trainer.grpo_args
    cold, steps = str(args.cold_start), None
    if not (args.signal_check or args.self_test or cold != "off"):
        return
    rows = next(iter(trainer.get_train_dataloader()))
    pairs = _references(trainer)
    rollout, signal = _probe(trainer, rows)
    if args.signal_check:
        trainer.observer.notice(signal.sentence(has_references=len(pairs) >= _FEWEST_REFERENCES))
    if cold.isdigit():
        steps = int(cold)
        if steps and not pairs:
            raise UserError(
                f"cold_start is {steps}, but the data has no {REFERENCE_COLUMN!r} column with references that fit "
                "max_completion_length; use a template with references (--template tldr with an answer column), raise "
                "max_completion_length, or pass --cold-start off."
            )
    elif cold == "auto" and signal.absent and not (signal.saturated or signal.unjudged) and pairs:
        if len(pairs) >= _FEWEST_REFERENCES:
            steps = args.cold_start_max_steps
        else:
            trainer.observer.notice(
                f"no automatic cold start: {counted(len(pairs), 'fitting reference')} would be learned by heart, it "
                f"takes {_FEWEST_REFERENCES} or more; add references, raise max_completion_length where they are too "
                "long, or pass --cold-start N for N steps on what is there."
            )
    if steps:
        trainer.log(_cold_row(0, signal))
        rollout = _cold_start(trainer, rows, pairs, steps, stop_early=cold == "auto")
    scored = _self_test(trainer, rollout) if args.self_test else None
    trainer.observer.notice(pace_of(trainer, rollout, scored).sentence())
    trainer.pending_rollout = rollout


def check_lengths(trainer: GRPOTrainer) -> int:
    """Say how many prompts are cut; stop where even a cut prompt and its completion exceed the model's positions.

    Returns:
        the tokens of the longest prompt, cut as it will be.
    """
    args, tokenizer = trainer.grpo_args, trainer.processing_class
    report = prompt_length_report(
        tokenizer,
        trainer.train_dataset,
        max_prompt_length=args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    if report.cut:
        trainer.observer.notice(report.sentence(args.max_prompt_length))
    longest = min(report.longest, args.max_prompt_length or report.longest)
    limit = getattr(unwrap(trainer.model).config.get_text_config(), "max_position_embeddings", None)
    if limit and longest + args.max_completion_length > limit:
        raise UserError(
            f"The longest prompt ({longest} tokens) and max_completion_length {args.max_completion_length} do not fit "
            f"the model's {limit} positions; lower max_prompt_length or max_completion_length."
        )
    return longest


def _probe(trainer: GRPOTrainer, rows: list) -> tuple[Rollout, Signal]:
    """The rollout of step 1 as the model stands, and what it says. Metrics of an earlier probe are dropped."""
    trainer.metrics["train"].take()
    rollout = trainer.collect(rows, 0)
    sampling = trainer.collector.engine.sampling
    return rollout, signal_of(
        rollout,
        trainer.rewards.names,
        reference=next((rows[0][name] for name in _ANSWERS if rows[0].get(name) is not None), None),
        endless=endless_remedy(rollout, trainer.processing_class, sampling.eos_ids, sampling.max_new_tokens),
    )


def _references(trainer: GRPOTrainer) -> list[int]:
    """Rows, in a random order, whose reference fits into max_completion_length with its end token: one that is cut off
    would teach the model never to finish. At most _MOST_REFERENCES rows are looked at."""
    data, limit = trainer.train_dataset, trainer.grpo_args.max_completion_length
    if REFERENCE_COLUMN not in data[0]:
        return []
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(trainer.args.seed)).tolist()
    rows = [(i, text) for i in order[:_MOST_REFERENCES] if (text := data[i][REFERENCE_COLUMN])]
    if not rows:
        return []
    ids = trainer.processing_class([text for _, text in rows], add_special_tokens=False)["input_ids"]
    fitting = [i for (i, _), tokens in zip(rows, ids) if len(tokens) < limit]
    long = len(rows) - len(fitting)
    if long and str(trainer.grpo_args.cold_start) != "off":
        trainer.observer.notice(
            f"{long} of {counted(len(rows), 'reference')} {'is' if long == 1 else 'are'} longer than "
            f"max_completion_length {limit}; a cold start leaves {'it' if long == 1 else 'them'} out."
        )
    return fitting


def _cold_start(trainer: GRPOTrainer, rows: list, pairs: list[int], steps: int, *, stop_early: bool) -> Rollout:
    """Supervised steps until there is a live signal, or nothing left to learn (or exactly `steps`); then the adapter is
    frozen as the reference."""
    args, data, tokenizer = trainer.grpo_args, trainer.train_dataset, trainer.processing_class

    def batch(step: int) -> list[tuple[list[int], list[int]]]:
        picked = [
            data[pairs[(step * _PAIRS_PER_STEP + i) % len(pairs)]] for i in range(min(_PAIRS_PER_STEP, len(pairs)))
        ]
        prompts = trainer.collector.encode([row["prompt"] for row in picked])
        return [(p, reference_ids(tokenizer, row[REFERENCE_COLUMN])) for p, row in zip(prompts, picked)]

    warm = ColdStart(
        trainer.model,
        batch,
        learning_rate=args.cold_start_learning_rate,
        guarded=lambda work, undo: trainer.guard.run(
            "forward", lambda: work(trainer.plan.micro_batch_size, args.workspace_mib), undo
        ),
        pad_id=trainer.collector.engine.sampling.pad_id,
        offload=lambda: args.activation_offload,
        optimizer=_small_adamw if "8bit" in str(args.optim) else torch.optim.AdamW,
        fp16=args.fp16,
    )
    GuardedStep(warm.optimizer, trainer.guard, offload=args.optimizer_offload)
    trainer.observer.notice(
        f"cold start: {'up to ' if stop_early else ''}{counted(steps, 'supervised step')} on "
        f"{counted(len(pairs), 'reference')}."
    )
    rollout, signal = None, None
    for step in range(steps):
        trainer.observer.phase(f"cold start {step + 1}/{steps}")
        loss = warm.step(step, trainer.compute_loss_context_manager)
        probed = (step + 1) % _PROBE_EVERY == 0 or step + 1 == steps
        if probed:
            rollout, signal = _probe(trainer, rows)
        trainer.log({"cold_start/loss": loss, **_cold_row(step + 1, signal if probed else None)})
        if stop_early and signal is not None and (signal.alive or signal.saturated):
            break
    outcome = "a live signal" if signal.alive else "still no live signal"
    if signal.saturated:
        outcome = "the same positive reward for every completion and nothing left to learn"
    trainer.observer.notice(
        f"cold start ended after {counted(step + 1, 'step')} with {outcome}: mean reward {signal.mean:.2f}, "
        f"{signal.dead:.0%} of the groups dead."
    )
    if trainer.reference is not None:
        trainer.reference.freeze()
    trainer._save(os.path.join(trainer.args.output_dir, "cold_start"))
    return rollout


def _small_adamw(*args, **kwargs) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(*args, **kwargs)


def _cold_row(step: int, signal: Signal | None) -> dict[str, float]:
    row = {"cold_start/step": step}
    if signal is not None:
        row |= {"cold_start/reward": signal.mean, "cold_start/dead_groups": signal.dead}
    return row


def _self_test(trainer: GRPOTrainer, rollout: Rollout) -> tuple[int, float]:
    """Returns the tokens that were scored, and the seconds of one pass over them."""
    micro = trainer.cut(rollout, 1)[0][0]
    scored, seconds = timed(lambda: trainer.learner.score_frozen(micro), trainer.args.device)
    reference = None
    if trainer.reference is not None:
        with trainer.reference.active() as model:
            reference = trainer.learner.score_frozen(micro, model)
    text = self_test(
        micro.sampling_per_token_logps,
        scored,
        reference,
        micro.completion_mask,
        _coarsest_dtype(trainer),
        elsewhere=_elsewhere(trainer),
    )
    trainer.observer.notice(text)
    return int(micro.prompt_mask.sum() + micro.completion_mask.sum()), seconds


def _elsewhere(trainer: GRPOTrainer) -> Elsewhere | None:
    """vLLM, where that samples; the policy's own engine needs no allowance."""
    if not trainer.grpo_args.use_vllm:
        return None
    at = trainer.collector.engine.sampling
    filtered = at.top_p < 1 or bool(at.top_k) or bool(at.min_p) or at.repetition_penalty != 1 or bool(at.extra)
    return Elsewhere("vLLM", bool(getattr(unwrap(trainer.model), "is_quantized", False)), filtered)


def _coarsest_dtype(trainer: GRPOTrainer) -> torch.dtype:
    """The dtype whose rounding separates a decode step from a full forward pass: that of quantized activations, of
    autocast, or of the weights. Quantized weights count as bfloat16: their decode and prefill kernels differ. So does
    an int8 KV cache, which rounds less than that."""
    model = unwrap(trainer.model)
    if getattr(model, "is_loaded_in_8bit", False):
        return torch.int8
    rounded = getattr(model, "is_quantized", False) or trainer.grpo_args.kv_cache_dtype == "int8"
    if trainer.args.bf16 or rounded:
        return torch.bfloat16
    return torch.float16 if trainer.args.fp16 else model.dtype
