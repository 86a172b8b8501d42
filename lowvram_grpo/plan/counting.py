"""One step counted under the ledger, for a model that exists only as a configuration.

The policy is built on meta tensors by the code that loads real ones, with the engine and the learner that a trainer
would put around it; then the longest step is rehearsed, phase by phase.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lowvram_grpo.memory.host import locked_size
from lowvram_grpo.memory.ledger import ACTIVATIONS, Ledger, Peak
from lowvram_grpo.memory.overheads import Overheads, on
from lowvram_grpo.plan.four_bit import hidden_copy
from lowvram_grpo.plan.stand_in import StandIn
from lowvram_grpo.policy.weight_stream import layers_on_host, stream_of
from lowvram_grpo.policy.wrapper import is_peft
from lowvram_grpo.training.learner import Learner, learner_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from lowvram_grpo.memory.cards import Card
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.rollout.engine import RolloutEngine

_META = torch.device("meta")


@dataclass(frozen=True)
class Blueprint:
    """What is trained, apart from GRPOConfig.

    Attributes:
        config: of the model.
        quantization: none or nf4.
        dtype: of the weights that are not quantized, and of autocast; float32 runs without autocast.
        lora: arguments of peft.LoraConfig; None trains all weights, which are float32 then.
        device: cuda or cpu.
        follows: the reference has weights of its own (a given adapter, or a cold start).
        longest_prompt: in tokens, where the data is known.
        attention: attn_implementation; all but eager hold no scores.
        card: what the device can do, where it is known.
        converses: completions have several turns (tools), whose replies are prefilled.
    """

    config: PretrainedConfig
    quantization: str
    dtype: torch.dtype
    lora: dict[str, Any] | None
    device: str = "cuda"
    follows: bool = False
    longest_prompt: int | None = None
    attention: str = "sdpa"
    card: Card | None = None
    converses: bool = False

    @property
    def stored(self) -> torch.dtype:
        """Of the weights: those that are trained themselves are float32 under autocast (policy.build)."""
        return self.dtype if self.lora is not None else torch.float32

    @property
    def overheads(self) -> Overheads:
        return on(self.device, self.card)


class Counted(NamedTuple):
    """What a ledger has seen of a step, tensors only.

    Attributes:
        phases: the peak of each.
        host: bytes of host memory, by what they are.
        layers: of each decoder layer that is streamed, the bytes that it would take on the device, and takes at home.
    """

    phases: dict[str, Peak]
    host: dict[str, int]
    layers: tuple[tuple[int, int], ...]


def count(blueprint: Blueprint, args: GRPOConfig) -> dict[str, Peak]:
    """Peak of each phase as the ledger counts it."""
    return counted(blueprint, args).phases


def counted(blueprint: Blueprint, args: GRPOConfig) -> Counted:
    """The longest step of `args` under the ledger."""
    from lowvram_grpo.policy.stream import skeleton
    from lowvram_grpo.training.rehearsal import Rehearsal, workload

    half = str(blueprint.dtype).removeprefix("torch.")
    block = blueprint.overheads.block
    if blueprint.device == "cuda":
        ledger = Ledger(block=block, hidden=hidden_copy(blueprint.card, half), locked=locked_size)
    else:
        ledger = Ledger(block=block)
    stand_in = StandIn(blueprint.device, None if blueprint.dtype == torch.float32 else blueprint.dtype)
    work = workload(args, blueprint.config, blueprint.longest_prompt)
    # Else what transformers chooses: sdpa, or eager of a model that sdpa does not know enough for.
    asked = {"attn_implementation": "eager"} if blueprint.attention == "eager" else {}
    empty = skeleton(blueprint.config, blueprint.stored, **asked)
    args = copy.copy(args)
    args.gradient_checkpointing_kwargs = {"context_fn": stand_in.recompute}
    with stand_in, stand_in.for_libraries(), ledger:
        with ledger.phase("load"), ledger.making("base weights"):
            base = _base(empty, blueprint, args)
        with ledger.phase("adapter"):
            model = _adapted(base, blueprint, args, ledger)
            engine, learner = _around(model, blueprint, args, stand_in, ledger)
        rehearsal = Rehearsal(model, engine, learner, phase=ledger.phase, making=ledger.making)
        with _gradients_tagged(model, ledger):
            # The moments are made first: from the second step on they are there in every phase.
            optimizer = _optimizer(model, args, blueprint.device)
            rehearsal.blank_gradients()
            rehearsal.optimizer(optimizer)
            if args.optimizer_offload:
                moments = [x for state in optimizer.state.values() for x in state.values() if _many(x)]
                ledger.ignore(*moments)
                ledger.hold_on_host("moments", sum(x.nbytes for x in moments), locked=False)
            model.zero_grad()
            if args.use_vllm:  # completions come from elsewhere, and what is held in the meantime is still held
                for phase in ("prefill", "rollout"):
                    with ledger.phase(phase):
                        pass
            else:
                rehearsal.rollout(work)
            rehearsal.gradients(work)
            rehearsal.optimizer(optimizer)
    if blueprint.device == "cuda":
        _keep_the_graphs(ledger.phases)
    return Counted(ledger.phases, ledger.host, _streamed(model, ledger))


def _streamed(model: nn.Module, ledger: Ledger) -> tuple[tuple[int, int], ...]:
    """Of each streamed layer, what it would take on the device, and what it takes at home."""
    stream = stream_of(model)
    if stream is None:
        return ()
    alone = (sum(-(-size // ledger.block) * ledger.block for size in parts) for parts in stream.parts)
    return tuple(zip(alone, stream.sizes))


def _keep_the_graphs(phases: dict[str, Peak]) -> None:
    """A decode step's memory belongs to its CUDA graph for as long as the rollout lasts. What comes in the meantime
    needs its own beside it: prompts that are prefilled, and the first step of another number of rows."""
    moving = lambda name: {k: phases[name].categories.get(k, 0) for k in (ACTIVATIONS, "workspace")}
    rollout, more = phases["rollout"], max(moving("prefill"), moving("rollout"), key=lambda parts: sum(parts.values()))
    for name, size in more.items():
        rollout.bytes += size
        rollout.categories[name] = rollout.categories.get(name, 0) + size


def _base(empty: PreTrainedModel, blueprint: Blueprint, args: GRPOConfig) -> PreTrainedModel:
    """The base model as a run would have it: streamed in, embeddings left where `place_embeddings` wants them."""
    from lowvram_grpo.policy.embeddings import stays_on_host
    from lowvram_grpo.policy.stream import materialize, meta_source

    return materialize(
        empty,
        meta_source(empty),
        device=_META,
        dtype=blueprint.stored,
        quantization=blueprint.quantization,
        keep_on_host=stays_on_host(empty, args.head_dtype, args.embedding_offload),
        expert_offload=args.expert_offload,
        host_layers=layers_on_host(args.weight_offload, empty),
    )


def _adapted(base: PreTrainedModel, blueprint: Blueprint, args: GRPOConfig, ledger: Ledger) -> nn.Module:
    """The policy: adapter attached where one is trained, embeddings placed, checkpointing and tiles on."""
    from peft import LoraConfig

    from lowvram_grpo.policy.build import attach_lora, build_policy
    from lowvram_grpo.policy.embeddings import place_embeddings

    model: nn.Module = base
    if blueprint.lora is not None:
        with ledger.making("adapter"):
            model = attach_lora(base, LoraConfig(**blueprint.lora, task_type="CAUSAL_LM"))
    if args.head_dtype == "dense":
        # Not the input embedding: what waits in host memory must not be counted for as much as a moment.
        ledger.tag("head", base.get_output_embeddings().parameters())
    with ledger.making("head"):
        place_embeddings(
            base, head_dtype=args.head_dtype, embedding_offload=args.embedding_offload, device=_META,
            workspace_mib=args.workspace_mib,
        )  # fmt: skip
    for table in (base.get_output_embeddings(), base.get_input_embeddings()):
        ledger.tag("head", [*table.parameters(), *table.buffers()])
    return build_policy(model, args, None, None)


def _many(value: Any) -> bool:
    """A moment, not a step count."""
    return isinstance(value, Tensor) and value.dim() > 0


def _around(
    model: nn.Module, blueprint: Blueprint, args: GRPOConfig, stand_in: StandIn, ledger: Ledger
) -> tuple[RolloutEngine, Learner]:
    """The engine and the learner that a trainer would put around the model."""
    from lowvram_grpo.policy.reference import Reference
    from lowvram_grpo.rollout.engine import engine_of
    from lowvram_grpo.rollout.sampler import filters_of
    from lowvram_grpo.training.loss import KernelChoice

    reference, follows = None, blueprint.follows or args.sync_ref_model
    # peft makes a second adapter on the CPU, and moves it wherever the base is, but not to meta.
    with ledger.making("adapter" if is_peft(model) else "reference"), _META:
        if args.beta > 0:
            reference = Reference(model, follows=follows, offload=args.reference_offload)
    # Fewer known ids than the table has rows, as in most models: what forbids the others is counted.
    known = blueprint.config.get_text_config().vocab_size - 1
    sampling = filters_of(args, eos_ids=(0,), pad_id=0, known_ids=known)
    path = "torch" if blueprint.device == "cpu" else None
    engine = engine_of(args, model, sampling, attention_path=path, on_prefilled=lambda: ledger.cut("prefill"))
    engine.converses = blueprint.converses
    kernels = KernelChoice("torch" if blueprint.device == "cpu" else None, False, "counting bytes")
    return engine, learner_of(args, model, reference, kernels, stand_in.autocast)


@contextmanager
def _gradients_tagged(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: ledger.tag("gradients", [p.grad])) for p in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _optimizer_class(args: GRPOConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """As transformers chooses it. The usual ones are known here: importing its Trainer takes as long as a plan."""
    name = str(getattr(args.optim, "value", args.optim))
    if name in ("adamw_torch", "adamw_torch_fused"):
        return torch.optim.AdamW, {"fused": name.endswith("fused")}
    if name in ("adamw_8bit", "adamw_bnb_8bit"):
        from bitsandbytes.optim import AdamW

        return AdamW, {"optim_bits": 8}
    from transformers import Trainer

    return Trainer.get_optimizer_cls_and_kwargs(args)


def _optimizer(model: nn.Module, args: GRPOConfig, device: str) -> torch.optim.Optimizer:
    kind, kwargs = _optimizer_class(args)
    fused = kwargs.pop("fused", False)  # which needs a device, and no memory of its own
    if issubclass(kind, torch.optim.AdamW) and device == "cuda" and not fused:
        kwargs["foreach"] = True  # what it decides for itself where it sees CUDA tensors
    return kind([p for p in model.parameters() if p.requires_grad], **kwargs)
