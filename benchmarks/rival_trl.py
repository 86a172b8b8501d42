"""TRL's GRPOTrainer on the same model, prompts and completions, under the same cap: called by part_memory.py.

The base is the one that we train on, 4-bit with LoRA on all linear layers and a dense head; the settings are those in
which TRL needs the least: one completion at a time in training, one group at a time in sampling, recomputed activations
and the 8-bit optimizer. A step has as many completions as ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch

from lowvram_grpo.bench.measure import drawn, main
from lowvram_grpo.bench.models import random_model, word_prompts, word_tokenizer
from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.plan.planner import setting
from lowvram_grpo.policy.load import compute_dtype
from lowvram_grpo.recipe.resolve import Recipe


def train(recipe: Recipe, steps: int, device: torch.device, phase: Callable, limit: Callable[[], None]) -> dict:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    config, _ = resolve_config(recipe.model)
    vocab, cuda = config.get_text_config().vocab_size, device.type == "cuda"
    group, completion = setting(recipe, "num_generations"), setting(recipe, "max_completion_length")
    completions = group * (setting(recipe, "prompts_per_step") or 1)
    data = Dataset.from_dict({"prompt": word_prompts(64, setting(recipe, "max_prompt_length") or 512, vocab)})
    half = {"bf16": compute_dtype(device) == torch.bfloat16, "fp16": compute_dtype(device) == torch.float16}
    settings: dict[str, Any] = {
        "use_cpu": not cuda, "max_steps": steps, "num_generations": group, "max_completion_length": completion,
        "generation_kwargs": {"min_new_tokens": completion}, "per_device_train_batch_size": 1,
        "steps_per_generation": group, "gradient_accumulation_steps": completions,
        "gradient_checkpointing": True, "beta": setting(recipe, "beta"), "temperature": setting(recipe, "temperature"),
        "optim": "adamw_8bit" if cuda else "adamw_torch", "learning_rate": 1e-5, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, **half,
    }  # fmt: skip
    limit()
    with tempfile.TemporaryDirectory() as folder:
        with phase("load"):
            model = random_model(config, quantization=recipe.quantization, dtype=compute_dtype(device), device=device)
            lora = LoraConfig(
                r=recipe.lora_r, lora_alpha=recipe.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            trainer = GRPOTrainer(
                model, drawn, GRPOConfig(output_dir=folder, **settings), data, processing_class=word_tokenizer(vocab),
                peft_config=lora,
            )  # fmt: skip
        limit()
        trainer.train()
    logged = [row for row in trainer.state.log_history if "step_time" in row]
    seconds = [row["step_time"] for row in logged]
    lengths = logged[-1].get("completions/mean_length")
    tokens = completions * (lengths or 0)
    return {"step_s": seconds, "completion_length": lengths, "tokens_per_second": tokens / seconds[-1] or None}


if __name__ == "__main__":
    main(train)
