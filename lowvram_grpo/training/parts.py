"""What a trainer conducts, made from its arguments: the policy, its learner, what samples and what rewards.

In the order in which GRPOTrainer calls them: what can be known before a model is loaded is looked at first.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lowvram_grpo.data.load import check_dataset
from lowvram_grpo.data.streams import is_stream, looked_at
from lowvram_grpo.errors import UserError, WrongType
from lowvram_grpo.memory.guard import Guard, cap
from lowvram_grpo.policy.attention_choice import check as check_attention
from lowvram_grpo.policy.build import build_policy
from lowvram_grpo.policy.load import check_tokens, compute_dtype, load_tokenizer_for
from lowvram_grpo.policy.model_names import named
from lowvram_grpo.policy.precision import slow_dtype
from lowvram_grpo.policy.reference import Reference
from lowvram_grpo.policy.reward_model import load_reward_model
from lowvram_grpo.policy.variants import check_adapter
from lowvram_grpo.policy.visitor import Visitor
from lowvram_grpo.policy.wrapper import is_peft, unwrap
from lowvram_grpo.recipe.batch_plan import BatchPlan
from lowvram_grpo.recipe.config import GRPOConfig
from lowvram_grpo.recipe.unknown_names import check_trainer_arguments
from lowvram_grpo.rewards.runner import RewardRunner
from lowvram_grpo.rewards.signatures import check_columns
from lowvram_grpo.rollout.engine import RolloutEngine, end_ids, engine_of
from lowvram_grpo.rollout.sampler import sampling_of
from lowvram_grpo.rollout.vllm import VLLMEngine, check_vllm, vllm_engine
from lowvram_grpo.training.agents import Agents
from lowvram_grpo.training.collect import Collector, reward_columns
from lowvram_grpo.training.early_checks import check_before_loading, check_evaluation
from lowvram_grpo.training.environments import EMPTY_PROMPT
from lowvram_grpo.training.learner import Learner, learner_of
from lowvram_grpo.training.loss import choose_kernels
from lowvram_grpo.training.router_loss import router_notice
from lowvram_grpo.training.streaming import check_streams

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig

    from lowvram_grpo.run.observer import Observer


def check_unknown(unknown: dict[str, Any], constructor: Callable) -> None:
    """Raises:
    UnknownSetting: `constructor`, GRPOTrainer's, has no such arguments."""
    known = [p.name for p in inspect.signature(constructor).parameters.values() if p.kind is not p.VAR_KEYWORD]
    check_trainer_arguments(unknown, known[1:], GRPOConfig.__dataclass_fields__)


def check_arguments(
    args: GRPOConfig,
    reward_funcs: list,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    peft_config: PeftConfig | None,
    agents: Agents | None = None,
) -> Sequence[dict[str, Any]]:
    """What costs nothing to know.

    Returns:
        the rows of the training data that stand for all of them: all, or the first of a stream.

    Raises:
        UserError: something that a person can mend.
    """
    check_streams(args, train_dataset, eval_dataset)
    rows = looked_at(train_dataset)
    check_dataset(rows, "train_dataset")
    check_evaluation(args, eval_dataset)
    if agents is None or not agents.samples_itself:  # whose fields are columns too, and not known before
        columns = reward_columns(rows[0], only_prompts=bool(args.remove_unused_columns))
        beside = ["environments"] if agents is not None and agents.environments is not None else []
        check_columns(reward_funcs, [*columns, *beside])
    check_before_loading(args, reward_funcs, eval_dataset)
    if peft_config is not None:
        from peft import PeftConfig

        if not isinstance(peft_config, PeftConfig):
            raise WrongType(
                f"peft_config must be a configuration of peft, as LoraConfig(), and is a {type(peft_config).__name__}."
            )
        # build_policy does so too, once a tokenizer has been fetched
        check_adapter(peft_config, fresh=True, reference=args.beta > 0)
    return rows


def with_agents(
    agents: Agents | None,
    args: GRPOConfig,
    reward_funcs: Any,
    processing_classes: Any,
    train_dataset: Any,
    eval_dataset: Any,
) -> tuple[GRPOConfig, list, Any, Any, Any]:
    """(settings, reward functions, their tokenizers, data, evaluation data) with what agents bring of each: what
    prompts tell of tools, environments that judge, and, where an environment writes the prompts, rows to begin with.

    Raises:
        UserError: nothing judges, or nothing says how long to train.
    """
    funcs = [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    environments = None if agents is None else agents.environments
    own = [] if environments is None else environments.rewards()
    if not funcs and not own:
        raise UserError("There is no reward: pass reward_funcs, or an environment that has get_reward().")
    if environments is not None and train_dataset is None:
        train_dataset = _empty_prompts(args, environments.several)
    if environments is not None:
        train_dataset, eval_dataset = environments.prompted(train_dataset, eval_dataset)
    if own:
        args = copy.copy(args)
        if args.reward_weights is not None:
            args.reward_weights = [*args.reward_weights, *[1.0] * len(own)]
        processing_classes = [*one_each(processing_classes, len(funcs)), *[None] * len(own)]
    return with_schemas(agents, args), [*funcs, *own], processing_classes, train_dataset, eval_dataset


def with_schemas(agents: Agents | None, args: GRPOConfig) -> GRPOConfig:
    """Settings whose prompts tell the model of its tools."""
    if agents is None or not agents.schemas:
        return args
    args = copy.copy(args)
    args.chat_template_kwargs = {**(args.chat_template_kwargs or {}), "tools": agents.schemas}
    return args


def _empty_prompts(args: GRPOConfig, several: bool) -> Any:
    """A rollout's worth of prompts that an environment's `reset` writes."""
    from datasets import Dataset

    if several:
        raise UserError(
            "environment_factory is a dict, so the data has to say which row uses which: pass a train_dataset with a "
            "column 'environment'."
        )
    if args.max_steps <= 0:
        raise UserError(
            "There is no train_dataset, so environments write the prompts, and nothing says how long to train; set "
            "max_steps."
        )
    return Dataset.from_dict({"prompt": [EMPTY_PROMPT] * BatchPlan.of(args).prompts_per_rollout})


def check_agents(agents: Agents | None, args: GRPOConfig, tokenizer: PreTrainedTokenizerBase, rows: Any) -> None:
    """Raises:
    UserError: the prompts or the chat template leave no room for what agents do."""
    if agents is not None:
        kwargs = {name: value for name, value in (args.chat_template_kwargs or {}).items() if name != "tools"}
        agents.check(tokenizer, rows[0]["prompt"], kwargs)


def make_policy(
    model: str | nn.Module,
    args: GRPOConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    quantization_config: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
    observer: Observer,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """(policy, tokenizer), with the allocator held to what of the card is ours before weights are loaded."""
    notice = observer.notice
    if isinstance(model, str):
        model = named(model, notice)
    else:
        given = {"model_init_kwargs": args.model_init_kwargs, "quantization_config": quantization_config}
        for name in (name for name, value in given.items() if value):
            observer.warning(f"{name} will be ignored: it is for a model given by its name, and this one is loaded.")
    if tokenizer is None:
        tokenizer = load_tokenizer_for(model, args)
    elif not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise WrongType(f"processing_class must be a tokenizer, and is a {type(tokenizer).__name__}.")
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as one that is loaded; scripts read its pad_token_id
    check_tokens(model, tokenizer, args)
    if args.use_vllm:
        check_vllm(args)
    cap(args.device, args.vram_gib)
    model = build_policy(model, args, quantization_config, peft_config, notice)
    if slow := slow_dtype(model, args):
        notice(slow)
    return model, tokenizer


def for_transformers(args: GRPOConfig, train_dataset: Any = None, eval_dataset: Any = None) -> GRPOConfig:
    """The copy that transformers.Trainer runs on: one loader batch is one optimizer step, and activation checkpointing
    is already switched on. A stream is read by one process, in order."""
    inner = copy.copy(args)
    evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,)
    if any(map(is_stream, (train_dataset, *evaluated))):
        inner.accelerator_config = copy.copy(args.accelerator_config)
        inner.accelerator_config.dispatch_batches = False
    if is_stream(train_dataset):
        inner.dataloader_num_workers = 0
    inner.gradient_accumulation_steps = 1
    inner.gradient_checkpointing = inner.activation_checkpointing = False
    inner.remove_unused_columns = False
    inner.bf16_full_eval = inner.fp16_full_eval = False  # would cast the policy for good
    inner._n_gpu = min(args.n_gpu, 1)  # transformers would wrap the model in DataParallel where it sees two cards
    return inner


def make_learner(
    model: nn.Module,
    args: GRPOConfig,
    autocast: Callable[[], AbstractContextManager],
    notice: Callable[[str], None],
) -> Learner:
    """The learner of a policy, with the reference that it starts from."""
    if args.sync_ref_model and not args.beta:
        raise UserError(
            "sync_ref_model is on, but with beta 0 there is no reference to let follow; set beta above 0, or drop it."
        )
    reference = None
    if args.beta > 0:
        reference = Reference(
            model,
            follows=args.sync_ref_model,
            offload=args.reference_offload,
            resort=args.oom_step_down,
            tell=notice,
        )
    if reference is not None and not is_peft(model) and args.kl_estimator == "exact":
        raise UserError(
            "kl_estimator exact sweeps policy and reference through one frozen lm_head, and here all weights are "
            "trained; pass a peft_config, or take k3."
        )
    causal_lm = unwrap(model)
    width = causal_lm.get_output_embeddings().in_features
    kernels = choose_kernels(args.fused_loss, args.device, compute_dtype(args.device), width)
    with autocast():
        decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        if partly := check_attention(args.attention, "training", decoder, args.device):
            notice(partly)
    learner = learner_of(args, model, reference, kernels, autocast)
    if said := router_notice(args, learner.router):
        notice(said)
    return learner


def one_each(processing_classes: Any, functions: int) -> list:
    """Tokenizers of reward models, given as one, as one a function, or as None."""
    if processing_classes is None:
        return [None] * functions
    return processing_classes if isinstance(processing_classes, list) else [processing_classes]


def make_rewards(
    reward_funcs: list, args: GRPOConfig, processing_classes: list, notice: Callable[[str], None]
) -> RewardRunner:
    """`processing_classes`: a tokenizer or None a function."""
    return RewardRunner(
        reward_funcs,
        weights=args.reward_weights,
        processing_classes=processing_classes,
        device=args.device,
        model_place=args.reward_model_device,
        timeout=args.reward_timeout,
        errors=args.reward_errors,
        tell=notice,
        load_model=load_reward_model,
        visitor=Visitor,
    )


def make_engine(model: nn.Module, args: GRPOConfig, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine | VLLMEngine:
    """What samples: the training weights, or vLLM."""
    sampling = sampling_of(args, end_ids(model, tokenizer), tokenizer)
    return (vllm_engine if args.use_vllm else engine_of)(args, model, sampling)


def make_collector(
    engine: RolloutEngine | VLLMEngine,
    rewards: RewardRunner,
    tokenizer: PreTrainedTokenizerBase,
    guard: Guard,
    args: GRPOConfig,
    phase: Callable[[str], None],
    agents: Agents | None = None,
) -> Collector:
    engine.converses = agents is not None and not agents.samples_itself
    return Collector(
        engine,
        rewards,
        tokenizer,
        guard,
        max_prompt_length=args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
        scale_rewards=args.scale_rewards,
        only_prompts=bool(args.remove_unused_columns),
        tell=phase,
        aggregation=args.multi_objective_aggregation,
        agents=agents,
    )
