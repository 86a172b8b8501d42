"""TRL's GRPOTrainer and ours side by side: the same weights, the same prompts in the same order and completions."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import Quiet, make_tokenizer
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from lowvram_grpo import GRPOConfig, GRPOTrainer
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.training import parts

LENGTH, GROUP, EOS = 7, 4, 1
# The ids of what a completion may say: digits and letters, never padding, end or <unk>, which decode differently.
SPOKEN = range(3, 39)


def make_folder(folder: Path, *, mixture: bool = False) -> str:
    """A saved Qwen2 of two layers with its tokenizer, or a `mixture` of experts (Qwen3-MoE)."""
    import transformers

    torch.manual_seed(5)
    settings = {
        "vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, "bos_token_id": None,
        "eos_token_id": EOS, "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    if mixture:
        settings |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def prompts(count: int = 24, chat: bool = False) -> Dataset:
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [" ".join(letters[(5 * i + j) % 26] for j in range(1 + i % 4)) for i in range(count)]
    rows = [[{"role": "user", "content": row}] for row in rows] if chat else rows
    return Dataset.from_dict({"prompt": rows, "number": list(range(count))})


def _held_out(overrides: dict[str, Any]) -> Dataset | None:
    """Prompts to evaluate on, as many as fill one batch: TRL shuffles them."""
    size = overrides.get("per_device_eval_batch_size")
    return prompts(size // GROUP) if overrides.get("eval_strategy") else None


def written(prompt: list[int], step: int, count: int) -> list[list[int]]:
    """The completions of a prompt at an optimizer step: of all lengths, some ended and some cut; those of every third
    prompt have one and the same reward."""
    draw = random.Random(repr((prompt, step)))
    dead = draw.random() < 0.2
    rows = []
    for _ in range(count):
        length = draw.randint(1, LENGTH)
        ids = draw.choices(range(13, 39) if dead else SPOKEN, k=length)
        rows.append(ids if length == LENGTH and draw.random() < 0.5 else [*ids[: LENGTH - 1], EOS])
    return rows


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def digits(completions: list, **kwargs: Any) -> list[float]:
    """Share of digits."""
    completions = map(_text, completions)
    return [sum(w.isdigit() for w in text.split()) / max(len(text.split()), 1) for text in completions]


def length(completions: list[str], **kwargs: Any) -> list[float | None]:
    """Words; None, "not applicable", for a completion that begins with a digit."""
    return [None if text[:1].isdigit() else len(text.split()) / 3 for text in completions]


@dataclass
class Run:
    """What a trainer did.

    Attributes:
        log: a row a step, without those that end a run.
        evaluations: a row an evaluation.
        weights: what is trained by name, before the first step and after each.
    """

    log: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)

    def read(self, history: list[dict[str, float]]) -> Run:
        self.log = [row for row in history if "loss" in row]
        self.evaluations = [row for row in history if "eval_loss" in row]
        return self


class _Watch(TrainerCallback):
    def __init__(self, run: Run):
        self.run = run

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.run.weights.append(trained(model))


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Fields that both configurations have, with one meaning."""
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1, "num_generations": GROUP, "max_completion_length": LENGTH, "max_steps": 3,
        "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "beta": 0.04,
        "temperature": 1.0, "logging_steps": 1, "shuffle_dataset": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, "loss_type": "grpo", "scale_rewards": "group",
        "remove_unused_columns": False, "seed": 11, "use_vllm": False, "vllm_mode": "colocate", **overrides,
    }  # fmt: skip


def trl_run(
    folder: Path, model: str, rewards: list[Callable], adapter=None, *, chat: bool = False, **overrides: Any
) -> Run:  # fmt: skip
    """TRL's. A rollout's completions are not shuffled before it is cut into steps, as TRL does it: here a step has
    whole groups."""
    import trl.trainer.grpo_trainer as module

    run = Run()
    args = module.GRPOConfig(**settings(folder, **overrides))
    with patch.object(module, "VLLMGeneration", lambda **kwargs: None):
        trainer = module.GRPOTrainer(
            model, list(rewards), args, prompts(chat=chat), _held_out(overrides), processing_class=make_tokenizer(chat),
            callbacks=[_Watch(run)], peft_config=adapter,
        )  # fmt: skip

    def generate(prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        step, rows = trainer.state.global_step, []
        for first in range(0, len(prompt_ids), num_generations):
            rows += written(list(prompt_ids[first]), step, num_generations)
        if not args.use_vllm:
            return rows, None
        return rows, [log_probs(trainer.model, prompt, ids, args).tolist() for prompt, ids in zip(prompt_ids, rows)]

    trainer._generate_single_turn = generate
    run.weights.append(trained(trainer.model))
    with patch.object(module, "shuffle_sequence_dict", lambda batch: batch):
        trainer.train()
    return run.read(trainer.state.log_history)


def our_run(
    folder: Path, model: str, rewards: list[Callable], adapter=None, start: dict[str, Tensor] | None = None,
    *, chat: bool = False, **overrides: Any,
) -> Run:  # fmt: skip
    """Ours, from the weights `start`."""
    run = Run()
    args = GRPOConfig(**settings(folder, **overrides))
    with patch.object(parts, "check_vllm", lambda args: None), patch.object(parts, "vllm_engine", parts.engine_of):
        trainer = GRPOTrainer(
            model, list(rewards), args, prompts(chat=chat), _held_out(overrides), processing_class=make_tokenizer(chat),
            callbacks=[_Watch(run)], peft_config=adapter, observer=Quiet(),
        )  # fmt: skip
    policy = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, value in (start or {}).items():
            policy[name].copy_(value)

    def generate(prompt_ids, group, *, seed, **kwargs):
        batch, step = RolloutBatch([], [], [], []), trainer.state.global_step
        for prompt in prompt_ids:
            for ids in written(prompt, step, group):
                batch.append(prompt, ids, log_probs(trainer.model, prompt, ids, args), {EOS})
        return batch

    trainer.collector.engine.generate = generate
    run.weights.append(trained(trainer.model))
    trainer.train()
    return run.read(trainer.state.log_history)


@torch.no_grad()
def log_probs(model: torch.nn.Module, prompt: list[int], ids: list[int], args: Any) -> Tensor:
    """(T,) float32 as the sampler notes them: by a dense softmax, and for vLLM's part with a rounding of its own."""
    logits = model(torch.tensor([list(prompt) + ids])).logits[0, len(prompt) - 1 : -1].float() / args.temperature
    found = logits.log_softmax(1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    if not args.use_vllm:
        return found
    draw = random.Random(repr((list(prompt), ids)))
    return found + torch.tensor([draw.gauss(0, 0.3) for _ in ids])
