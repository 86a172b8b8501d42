"""Names of TRL's GRPOTrainer, for scripts, callbacks and subclasses that were written for it: what they read, and the
masks and weights that they call. Nothing of this package needs them.

A setting is read off the configuration each time, so it is what the run goes by; it can't be set here, where that would
change nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowvram_grpo.objective import (
    Objective,
    high_entropy_mask,
    high_entropy_threshold,
    off_policy_mask,
    vespo_weight,
)
from lowvram_grpo.rewards.model import RewardModel
from lowvram_grpo.rollout.fallback import generation_config

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from lowvram_grpo.policy.reference import Reference
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.rewards.runner import RewardRunner
    from lowvram_grpo.training.experience import MicroBatch, Rollout
    from lowvram_grpo.training.learner import Learner
    from lowvram_grpo.training.metrics import MetricBook


class Setting:
    """An attribute that reads a field of the trainer's GRPOConfig: the one of its own name, unless told otherwise."""

    def __init__(self, field: str | None = None):
        self.field = field

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.field = name, self.field or name

    def __get__(self, trainer: TrlNames | None, owner: type | None = None) -> Any:
        return self if trainer is None else getattr(trainer.grpo_args, self.field)

    def __set__(self, trainer: TrlNames, value: Any) -> None:
        raise AttributeError(
            f"{self.name} can't be set on a trainer: the run goes by GRPOConfig; set {self.field} there, before the "
            "trainer is made."
        )


class TrlNames:
    """To be named among a trainer's bases; it brings what is named here without a value."""

    grpo_args: GRPOConfig
    learner: Learner
    reference: Reference | None
    rewards: RewardRunner
    metrics: dict[str, MetricBook]
    _updates: list[list[MicroBatch]] | None
    _given_processing_classes: list

    _name, _is_vlm = "GRPO", False
    _tag_names = ("grpo", "lowvram-grpo")

    beta = Setting()
    chat_template_kwargs = Setting()
    epsilon_low = Setting("epsilon")
    importance_sampling_level = Setting()
    log_completions = Setting()
    log_multimodal = Setting()
    log_unique_prompts = Setting()
    loss_type = Setting()
    mask_truncated_completions = Setting()
    max_completion_length = Setting()
    max_prompt_length = Setting()
    max_tool_calling_iterations = Setting()
    min_p = Setting()
    multi_objective_aggregation = Setting()
    num_completions_to_print = Setting()
    num_generations = Setting()
    num_iterations = Setting()
    off_policy_mask_threshold = Setting()
    pad_to_multiple_of = Setting()
    repetition_penalty = Setting()
    scale_rewards = Setting()
    shuffle_dataset = Setting()
    temperature = Setting()
    top_entropy_quantile = Setting()
    top_k = Setting()
    top_p = Setting()
    use_adaptive_entropy = Setting()
    use_transformers_continuous_batching = Setting()
    use_vllm = Setting()
    vllm_gpu_memory_utilization = Setting()
    vllm_importance_sampling_clip_max = Setting()
    vllm_importance_sampling_clip_min = Setting()
    vllm_importance_sampling_correction = Setting()
    vllm_importance_sampling_mode = Setting()
    vllm_mode = Setting()
    vllm_tensor_parallel_size = Setting()

    @property
    def epsilon_high(self) -> float:
        return self.learner.objective.upper

    @property
    def environments(self) -> list | None:
        """Of the last rollout, one a completion."""
        agents = self.collector.agents
        return None if agents is None else agents.instances

    @property
    def chat_template(self) -> str | None:
        return self.processing_class.chat_template

    @property
    def num_generations_eval(self) -> int:
        return self.generations_eval

    @property
    def entropy_coef(self) -> float:
        """Weight of the entropy bonus: of now, where it adapts."""
        control = self.learner.entropy
        return self.grpo_args.entropy_coef if control is None else control.coef

    @property
    def _entropy_bonus_enabled(self) -> bool:
        return self.grpo_args.entropy_bonus

    @property
    def _last_world_entropy(self) -> float:
        """Mean entropy of the step before, in nats, where the bonus adapts to it; infinite until there is one."""
        control = self.learner.entropy
        return math.inf if control is None else control.last_entropy

    # The reference and the rewards

    @property
    def ref_model(self) -> nn.Module | None:
        """The frozen copy of a policy whose weights are all trained; None where the reference is the policy without its
        adapter, or with a frozen one, and without a KL term."""
        return None if self.reference is None else self.reference.model

    @property
    def reward_func_names(self) -> list[str]:
        return self.rewards.names

    @property
    def reward_funcs(self) -> list:
        """What is called: functions, and models where models were given, or names of them."""
        return [func.model if isinstance(func, RewardModel) else func for func in self.rewards.funcs]

    @property
    def reward_weights(self) -> Tensor:
        """(F,) float32."""
        return self.rewards.weights

    @property
    def reward_processing_classes(self) -> list:
        """The tokenizer of each reward model; for a function what was given for it, None as a rule."""
        funcs, given = self.rewards.funcs, self._given_processing_classes
        return [f.tokenizer if isinstance(f, RewardModel) else own for f, own in zip(funcs, given)]

    # A mixture of experts

    @property
    def router_aux_loss_coef(self) -> float:
        """Weight of the load-balancing loss: the one that was set, else the model's own; 0 where it has none."""
        return 0.0 if self.learner.router is None else self.learner.router.coefficient

    @property
    def aux_loss_enabled(self) -> bool:
        return self.learner.router is not None

    # Sampling

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends a completion."""
        return list(self.collector.engine.sampling.eos_ids)

    @property
    def generation_config(self) -> GenerationConfig:
        """What transformers' `generate` has to be told to sample as rollouts do; a new one each time."""
        sampling = self.collector.engine.sampling
        config = generation_config(sampling)
        config.repetition_penalty = sampling.repetition_penalty
        return config

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        """The same as arguments."""
        return {k: v for k, v in self.generation_config.to_diff_dict().items() if k != "transformers_version"}

    # What a run has counted and kept

    @property
    def _step(self) -> int:
        """Optimizer steps; TRL counts micro-batches, which have no fixed number here."""
        return self.state.global_step

    @property
    def _total_train_tokens(self) -> int:
        return self.state.num_input_tokens_seen

    @property
    def _metrics(self) -> dict[str, dict[str, list[float]]]:
        """mode -> name -> values since the last log; what is appended to them is logged."""
        return {mode: book.values for mode, book in self.metrics.items()}

    @property
    def _buffered_inputs(self) -> list[MicroBatch] | None:
        """The micro-batches of the rollout that steps learn from now."""
        return None if self._updates is None else [micro for update in self._updates for micro in update]

    @property
    def _tokenizer(self) -> Any:
        return self.processing_class

    # What is written

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **more: Any,
    ) -> None:
        """README.md of output_dir; `more` are further arguments of transformers' own."""
        tags = [*([tags] if isinstance(tags, str) else tags or ()), *self._tag_names]
        named = {"model_name": model_name, "dataset": dataset_name, "tags": list(dict.fromkeys(tags))}
        super().create_model_card(**{**named, **more})

    # Masks and weights

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """(B, T) bool: tokens of `mask` whose entropy is at least the quantile `threshold` (0 to 1) of theirs."""
        return high_entropy_mask(entropies, mask, high_entropy_threshold(entropies, mask, 1 - threshold))

    @staticmethod
    def get_off_policy_mask(
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """(B, 1) of the dtype of `mask`: `objective.off_policy_mask`."""
        kept = off_policy_mask(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold)
        return kept.to(mask.dtype)

    @staticmethod
    def get_gamma_weights(
        advantages: Tensor,
        log_ratio_per_token: Tensor,
        mask: Tensor,
        importance_sampling_ratio: Tensor | None,
        k_pos: float = 2.0,
        lambda_pos: float = 3.0,
        k_neg: float = 3.0,
        lambda_neg: float = 2.0,
    ) -> Tensor:
        """(B, 1): `objective.vespo_weight`."""
        constants = Objective(
            vespo_k_pos=k_pos, vespo_lambda_pos=lambda_pos, vespo_k_neg=k_neg, vespo_lambda_neg=lambda_neg
        )
        return vespo_weight(advantages, log_ratio_per_token, mask, constants, importance_sampling_ratio)


class LastCompletions(dict):
    """TRL's `_logs`: columns of the last rollout's completions, of training or evaluation, `rewards` by function and
    `extra` by what rewards logged.

    Args:
        size: completions that are kept.
    """

    def __init__(self, size: int):
        columns = lambda: deque(maxlen=size)
        super().__init__(
            images=columns(), prompt=columns(), completion=columns(), rewards=defaultdict(columns),
            advantages=columns(), extra=defaultdict(columns),
        )  # fmt: skip

    def keep(self, rollout: Rollout, names: list[str]) -> None:
        """`names` are those of the reward functions. A reward that does not apply is NaN."""
        self["prompt"].extend(rollout.prompts)
        self["completion"].extend(rollout.completions)
        self["advantages"].extend(rollout.advantages.values.tolist())
        for name, column in zip(names, rollout.rewards_per_func.T):
            self["rewards"][name].extend(column.tolist())
        for name, values in rollout.extras.items():
            self["extra"][name].extend(values)
