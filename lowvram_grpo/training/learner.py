"""From a rollout to losses: what an optimizer step does between its sampler and its optimizer.

The trainer, the start-up probe and the memory ledger (which runs it on meta tensors) all call this one class.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_grpo.objective import Objective, high_entropy_mask, high_entropy_threshold
from lowvram_grpo.policy.dropout import training_mode
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.policy.reference import Reference
from lowvram_grpo.policy.shared_prefix import shared_groups
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.recipe.batch_plan import BatchPlan
from lowvram_grpo.recipe.config import GRPOConfig
from lowvram_grpo.training.correction import Correction
from lowvram_grpo.training.entropy_control import EntropyControl, entropy_control_of
from lowvram_grpo.training.experience import MicroBatch, Rollout, updates_of
from lowvram_grpo.training.loss import KernelChoice, LossSums, micro_loss
from lowvram_grpo.training.loss_settings import correction_of, objective_of, other_sampler
from lowvram_grpo.training.metrics import read, sampler_metrics
from lowvram_grpo.training.policy_factor import policy_factor, wanted_rows
from lowvram_grpo.training.router_loss import router_of
from lowvram_grpo.training.scoring import Scores, score, scored_states


class Learner:
    """Cuts rollouts into micro-batches, scores those under the policy and its reference, and makes their losses.

    Args:
        args: read anew at each pass: savers may be switched on in the middle of a run.
        steps_per_rollout: optimizer steps that a rollout serves.
        correction: weighs each token by how likely it is here and was to the sampler, where those differ.
        entropy: the weight of the entropy bonus, where the loss has one.
        autocast: makes the context in which sampler and scorer compute.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Reference | None,
        objective: Objective,
        kernels: KernelChoice,
        args: GRPOConfig,
        *,
        steps_per_rollout: int,
        autocast: Callable[[], AbstractContextManager],
        correction: Correction | None = None,
        entropy: EntropyControl | None = None,
    ):
        self.model, self.reference, self.objective, self.kernels, self.args = model, reference, objective, kernels, args
        self.steps_per_rollout, self.autocast, self.correction = steps_per_rollout, autocast, correction
        self.entropy = entropy
        self.router = router_of(args, unwrap(model))
        head = head_of(unwrap(model))
        if not head.trainable:
            # Known from now on; the first backward pass would find it out at its fullest moment.
            head.centre(next(p for p in model.parameters() if p.requires_grad).device)

    @property
    def joint_reference(self) -> bool:
        """Whether the reference rides along in the policy's own sweep: it has the same head, and one use of a rollout
        is not cheaper served by log-probs that are kept."""
        if self.reference is None or self.reference.kind == "frozen copy":
            return False
        return self.args.kl_estimator == "exact" or self.steps_per_rollout == 1

    def score(self, micro: MicroBatch, model: nn.Module | None = None, ref_states: Tensor | None = None) -> Scores:
        """Log-probs of a micro-batch under the policy, or under `model`; with `ref_states` those of the reference."""
        if self.model.training:
            training_mode(self.model)
        return score(
            model or self.model,
            *micro.sequence(),
            temperature=self.args.temperature or 1.0,
            workspace_mib=self.args.workspace_mib,
            path=self.kernels.path,
            wanted=self._wanted(micro) if torch.is_grad_enabled() else None,
            ref_states=ref_states,
            kl=ref_states is not None and self.args.kl_estimator == "exact",
            # Without a gradient too: the same tiles, so the same bits as the pass that has one.
            entropy_gradient=self.args.entropy_bonus,
            **self._sharing(micro, model or self.model),
            offload=self.args.activation_offload,
        )

    def _wanted(self, micro: MicroBatch) -> Tensor:
        return wanted_rows(micro, self.objective, self.entropy is not None)

    @property
    def may_drop_tokens(self) -> bool:
        """Whether something may take every token's policy term away, which then has a gradient of exactly 0."""
        objective = self.objective
        dropping = objective.off_policy_mask_threshold is not None or objective.top_entropy_quantile < 1
        return dropping or self.correction is not None or objective.loss_type == "vespo"

    def _sharing(self, micro: MicroBatch, model: nn.Module) -> dict[str, Any]:
        """Lengths, groups and attention of a micro-batch, as the functions of `scoring` take them."""
        lengths = micro.lengths()
        # A router's loss counts a prompt's tokens with each of its completions.
        setting = self.args.shared_prefix if self.router is None else "off"
        groups = shared_groups(setting, model, **lengths, group_sizes=micro.group_sizes)
        return {**lengths, "group_sizes": groups, "attention": self.args.attention}

    def loss(self, micro: MicroBatch) -> tuple[LossSums, Scores]:
        """This micro-batch's share of the update's loss, and the scores it was made from."""
        if self.router is None:
            return self._policy_loss(micro)
        with self.router.watched() as passes:
            sums, scores = self._policy_loss(micro)
        # The policy's own pass is the last: a reference that rides along goes before it.
        aux_loss = self.router.loss(passes[-1], torch.cat([micro.prompt_mask, micro.completion_mask], 1))
        if micro.router_share is not None:
            aux_loss = aux_loss * micro.router_share.sum()
        return sums._replace(loss=sums.loss + self.router.coefficient * aux_loss), scores._replace(aux_loss=aux_loss)

    def _policy_loss(self, micro: MicroBatch) -> tuple[LossSums, Scores]:
        ref_states = None
        if self.joint_reference and micro.ref_per_token_logps is None:
            states = lambda reference: scored_states(reference, *micro.sequence(), **self._sharing(micro, reference))
            ref_states = self.frozen(states, reference=True)
        scores = self.score(micro, ref_states=ref_states)
        now = scores.logps.detach(), scores.entropy.detach()
        parts = policy_factor(micro, *now, self.objective, self.correction, other_sampler(self.args))
        coef = None if self.entropy is None else self.entropy.applied
        return micro_loss(scores, micro, self.objective, self.kernels.fused, parts, coef), scores

    def with_entropy_masks(self, update: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches of an update, with the tokens of most entropy marked where only those count: the threshold
        is that of the whole update. One micro-batch finds it in its own pass; for several they are all scored once
        without gradient, before the first."""
        share = self.objective.top_entropy_quantile
        if share == 1 or len(update) == 1:
            return update
        found = [self.frozen(lambda model: self.score(micro, model).entropy) for micro in update]  # noqa: B023
        flat = lambda parts: torch.cat([part.flatten() for part in parts])
        threshold = high_entropy_threshold(flat(found), flat([micro.loss_mask for micro in update]), share)
        masks = [high_entropy_mask(entropy, micro.loss_mask, threshold) for entropy, micro in zip(found, update)]
        of_one = 1 / flat(masks).sum().clamp(min=1)
        return [
            replace(micro, entropy_mask=mask, token_share=of_one.expand_as(micro.token_share))
            for micro, mask in zip(update, masks)
        ]

    def need_gradients(self, update: list[MicroBatch]) -> list[bool]:
        """Which micro-batches need a gradient. One at least: the optimizer must see gradients of zero, not none, as
        its momentum moves the weights all the same."""
        if self.router is not None:  # whose loss has one wherever there are tokens
            return [True] * len(update)
        needed = torch.stack([self._wanted(micro).any() for micro in update]).tolist()
        if not any(needed):
            needed[0] = True
        return needed

    def cut(self, rollout: Rollout, plan: BatchPlan, pad_id: int, *, updates: int) -> list[list[MicroBatch]]:
        """As many `updates`, each a list of micro-batches of the size that `plan` has, on the device."""
        args = self.args
        return updates_of(
            rollout,
            updates=updates,
            micro_batch_size=plan.micro_batch_size,
            loss_type=args.loss_type,
            max_completion_length=args.max_completion_length,
            mask_truncated=args.mask_truncated_completions,
            pad_id=pad_id,
            device=args.device,
        )

    def learnable(
        self, rollout: Rollout, plan: BatchPlan, pad_id: int
    ) -> tuple[list[list[MicroBatch]], list[dict[str, float]]]:
        """The updates of a rollout, with what is computed once for all steps that it serves; and the `sampler_gap` of
        each micro-batch that was scored for that."""
        updates, gaps = self.cut(rollout, plan, pad_id, updates=plan.updates_per_rollout), []
        for micro in (micro for update in updates for micro in update):
            self.prepare(micro)
            if micro.old_per_token_logps is not None:
                gaps.append(self.sampler_gap(micro, micro.old_per_token_logps))
        return updates, read(gaps)

    def sampler_gap(self, micro: MicroBatch, logps: Tensor) -> dict[str, Tensor]:
        """How far `logps` (b, T), the policy's before its first update on these tokens, are from the sampler's; nothing
        where nobody knows these."""
        if micro.sampling_per_token_logps is None:
            return {}
        return sampler_metrics(logps, micro.sampling_per_token_logps, micro.sampled_mask, self.correction)

    def sync_reference(self, step: int) -> None:
        """Mix the policy into its reference where that is due after optimizer step `step`, counted from 1."""
        args = self.args
        if args.sync_ref_model and self.reference and step % args.ref_model_sync_steps == 0:
            self.reference.sync(args.ref_model_mixup_alpha)

    def prepare(self, micro: MicroBatch) -> None:
        """Fill in what is computed once a rollout: old log-probs where it serves several steps, and the reference's
        unless it rides along in each step's sweep."""
        if self.steps_per_rollout > 1:
            micro.old_per_token_logps = self.score_frozen(micro)
        self.add_reference(micro)

    def add_reference(self, micro: MicroBatch) -> None:
        if self.reference is not None and not self.joint_reference:
            micro.ref_per_token_logps = self.frozen(lambda model: self.score(micro, model).logps, reference=True)

    def score_frozen(self, micro: MicroBatch, model: nn.Module | None = None) -> Tensor:
        """(b, T) log-probs without gradient and without dropout."""
        return self.frozen(lambda policy: self.score(micro, model or policy).logps)

    @torch.no_grad()
    def frozen(self, run: Callable[[nn.Module], Tensor], reference: bool = False) -> Tensor:
        """What `run` makes of the policy, or of the reference, in evaluation mode and without gradient."""
        was_training = self.model.training
        self.model.eval()
        try:
            active = self.reference.active() if reference else nullcontext(self.model)
            with active as model, self.autocast():
                return run(model)
        finally:
            # Inside an outer autocast, weights that this pass has cast would stay cached without their graph.
            torch.clear_autocast_cache()
            self.model.train(was_training)


def learner_of(
    args: GRPOConfig,
    model: nn.Module,
    reference: Reference | None,
    kernels: KernelChoice,
    autocast: Callable[[], AbstractContextManager],
) -> Learner:
    """The learner that a training configuration asks for, to train by or to count the bytes of."""
    return Learner(
        model,
        reference,
        objective_of(args),
        kernels,
        args,
        steps_per_rollout=args.batch_plan().steps_per_rollout,
        autocast=autocast,
        correction=correction_of(args),
        entropy=entropy_control_of(args),
    )
