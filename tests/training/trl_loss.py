"""TRL's loss on given tensors: `GRPOTrainer._compute_loss` of TRL itself, on a stand-in for its trainer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

GROUP, T = 4, 6


@dataclass
class Tensors:
    """What a loss is a function of: B completions in groups of GROUP, right-padded to T.

    Attributes:
        lengths, truncated: of the completions.
        logps, old, ref, sampled: (B, T) float32 log-probs of the policy, of the policy as it sampled, of the reference,
            and of a sampler of its own.
        entropies: (B, T) float32 nats.
        advantages: (B,) float32.
        tool_mask: (B, T) int64, 0 where a tool's answer was inserted; None: nowhere.
    """

    lengths: list[int]
    truncated: list[bool]
    logps: Tensor
    old: Tensor
    ref: Tensor
    sampled: Tensor
    entropies: Tensor
    advantages: Tensor
    tool_mask: Tensor | None = None

    def mask(self, without_truncated: bool) -> Tensor:
        """(B, T) int64."""
        mask = (torch.arange(T)[None] < torch.tensor(self.lengths)[:, None]).long()
        return mask * (~torch.tensor(self.truncated))[:, None].long() if without_truncated else mask


def make_tensors(rows: int = 8, seed: int = 0, spread: float = 0.5, *, inserted: bool = False) -> Tensors:
    """Ratios far enough from 1 that every bound is passed on both sides, a dead group's advantages of 0, and a
    completion of one token. `inserted`: between the first and the last token of most others stand some that no model
    sampled."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=generator)
    lengths = torch.randint(1, T + 1, (rows,), generator=generator).tolist()
    lengths[0], lengths[1] = T, 1
    logps = -normal(rows, T).abs() - 0.1
    advantages = normal(rows)
    if rows > GROUP:
        advantages[-GROUP // 2 :] = 0.0
    tool_mask = None
    if inserted:
        tool_mask = (torch.rand(rows, T, generator=generator) < 0.5).long()
        tool_mask[:, 0] = 1
    return Tensors(
        lengths,
        [length == T for length in lengths],
        logps,
        (logps + spread * normal(rows, T)).clamp(max=0),
        (logps + spread * normal(rows, T)).clamp(max=0),
        (logps + spread * normal(rows, T)).clamp(max=0),
        normal(rows, T).abs() + 0.05,
        advantages,
        tool_mask,
    )


@dataclass
class Losses:
    """What a loss says of an optimizer step: its value, the gradients, and the metrics it noted."""

    loss: float
    logps: Tensor
    entropies: Tensor
    metrics: dict[str, float]


class _OneProcess:
    """The part of accelerate's Accelerator that a loss talks to."""

    num_processes = 1

    def __init__(self):
        self.sync_gradients = True

    def gather(self, value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value

    def pad_across_processes(self, value: Tensor, **kwargs: Any) -> Tensor:
        return value


class TRLLoss:
    """TRL's loss with the settings of a run; its adaptive entropy goes from step to step."""

    def __init__(self, **overrides: Any):
        from trl.trainer.grpo_trainer import GRPOTrainer

        settings = {**DEFAULTS, **overrides}
        self.settings, self._compute = settings, GRPOTrainer._compute_loss
        args = SimpleNamespace(**settings)
        self.trainer = SimpleNamespace(
            args=args, model=SimpleNamespace(training=True), accelerator=_OneProcess(), aux_loss_enabled=False,
            epsilon_low=args.epsilon, epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            current_gradient_accumulation_steps=args.gradient_accumulation_steps, _entropy_window_stats=None,
            _entropy_bonus_enabled=bool(args.entropy_coef) or args.use_adaptive_entropy,
            _last_world_entropy=float("inf"), get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
            get_gamma_weights=GRPOTrainer.get_gamma_weights, **{name: settings[name] for name in _READ},
        )  # fmt: skip
        self.trainer.get_high_entropy_mask = lambda *args: GRPOTrainer.get_high_entropy_mask(self.trainer, *args)

    def step(self, tensors: Tensors, *, off_policy: bool) -> Losses:
        """An optimizer step on all completions, in as many equal micro-batches as gradients are accumulated over."""
        trainer, rows, settings = self.trainer, len(tensors.lengths), self.settings
        logps, entropies = tensors.logps.clone().requires_grad_(), tensors.entropies.clone().requires_grad_()
        mask = tensors.mask(settings["mask_truncated_completions"])
        inputs = {
            "prompt_ids": torch.ones(rows, 1, dtype=torch.long), "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
            "completion_ids": torch.ones(rows, T, dtype=torch.long), "completion_mask": mask,
            "advantages": tensors.advantages, "ref_per_token_logps": tensors.ref,
        }  # fmt: skip
        if tensors.tool_mask is not None:  # as TRL's `_generate_and_score_completions` does it
            inputs["tool_mask"] = tensors.tool_mask
            mask = mask * tensors.tool_mask
        if off_policy or settings["use_vllm"]:
            inputs["old_per_token_logps"] = tensors.old if off_policy else tensors.logps
        if settings["use_vllm"]:
            inputs["sampling_per_token_logps"] = tensors.sampled
            gap = (inputs["old_per_token_logps"] - tensors.sampled) * mask
            if settings["vllm_importance_sampling_mode"].startswith("sequence"):
                gap = gap.sum(1, keepdim=True)
            inputs["importance_sampling_ratio"] = gap.exp().clamp(max=settings["vllm_importance_sampling_clip_max"])
        trainer._metrics = {"train": defaultdict(list)}
        parts = settings["gradient_accumulation_steps"]
        total, size = torch.zeros(()), rows // parts
        for part in range(parts):
            cut = slice(part * size, (part + 1) * size)
            trainer._get_per_token_logps_and_entropies = lambda *a, cut=cut, **k: (logps[cut], entropies[cut], None)
            trainer.accelerator.sync_gradients = part == parts - 1
            micro = {name: value[cut] for name, value in inputs.items()}
            # The number of tokens of the generation batch, which is as many such steps as it serves.
            micro["num_items_in_batch"] = mask.sum() * (settings["steps_per_generation"] // parts)
            total = total + self._compute(trainer, None, micro)
        total.backward()
        noted = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
        zero = lambda leaf: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return Losses(float(total.detach()), zero(logps), zero(entropies), noted)


# TRL's names and defaults, but for `beta` and a generation batch of one step.
DEFAULTS = {
    "loss_type": "grpo", "beta": 0.04, "epsilon": 0.2, "epsilon_high": None, "delta": None,
    "importance_sampling_level": "token", "use_bias_correction_kl": True, "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False, "entropy_coef_min": 0.0,
    "entropy_coef_max": 1.0, "entropy_coef_delta": 0.005, "entropy_target": 0.2, "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0, "mask_truncated_completions": False, "max_completion_length": 8, "use_vllm": False,
    "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0, "gradient_accumulation_steps": 1, "steps_per_generation": 1,
}  # fmt: skip
# Those that TRL's trainer keeps as its own attributes.
_READ = (
    "loss_type", "beta", "importance_sampling_level", "off_policy_mask_threshold", "top_entropy_quantile",
    "entropy_coef", "use_adaptive_entropy", "max_completion_length", "use_vllm", "vllm_importance_sampling_correction",
)  # fmt: skip


def trl_advantages(
    rewards: Tensor, weights: list[float], group: int = GROUP, **overrides: Any
) -> tuple[Tensor, dict[str, float]]:
    """TRL's (B,) advantages of (B, F) rewards in groups of `group`, and the metrics it notes of them: its
    `_generate_and_score_completions`, with completions of one token each."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    settings, rows = {**DEFAULTS, **overrides}, len(rewards)
    stub = SimpleNamespace(
        args=SimpleNamespace(**settings, per_device_train_batch_size=rows, gradient_checkpointing_kwargs=None),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda value: value, process_index=0),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False), environment_factories=None,
        environments=None, tools=None, mask_truncated_completions=False, pad_to_multiple_of=None, beta=0.0,
        _tokenizer=SimpleNamespace(pad_token_id=0), use_vllm=False, num_iterations=1, num_generations=group,
        reward_weights=torch.tensor(weights), reward_funcs=[None] * len(weights),
        reward_func_names=[f"r{i}" for i in range(len(weights))], _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)), _pending_extra_logs={},
        _pending_metrics={}, log_multimodal=False, scale_rewards=settings.get("scale_rewards", "group"),
        multi_objective_aggregation=settings.get("multi_objective_aggregation", "sum_then_normalize"),
        _calculate_rewards=lambda *args: rewards.clone(),
        _generate=lambda prompts: ([[3]] * rows, [[3]] * rows, None, ["x"] * rows, None, {}, None, []),
    )  # fmt: skip
    out = GRPOTrainer._generate_and_score_completions(stub, [{"prompt": "x"}] * rows)
    return out["advantages"], {name: values[-1] for name, values in stub._metrics["train"].items()}
