"""TRL's first GRPO script with its import changed: one-sentence summaries, rewarded for their length.

    pip install lowvram-grpo
    python examples/tldr.py

Without a peft_config all weights of the model are trained, as in TRL; with one, a LoRA adapter, which takes a fraction
of the memory. EXAMPLE_MODEL, EXAMPLE_DATA and EXAMPLE_STEPS set other things than the usual ones.
"""

import os

from datasets import load_dataset
from peft import LoraConfig

from lowvram_grpo import GRPOConfig, GRPOTrainer  # was: from trl import GRPOConfig, GRPOTrainer

dataset = load_dataset(os.environ.get("EXAMPLE_DATA", "trl-lib/tldr"), split="train")


def near_fifty_characters(completions, **kwargs):
    """0 for a summary of 50 characters, less the farther it is from that."""
    return [-abs(50 - len(completion)) / 50 for completion in completions]


training_args = GRPOConfig(
    output_dir="tldr-grpo",
    learning_rate=1e-5,
    max_completion_length=64,
    max_steps=int(os.environ.get("EXAMPLE_STEPS", 200)),
    logging_steps=1,
)
trainer = GRPOTrainer(
    model=os.environ.get("EXAMPLE_MODEL", "Qwen/Qwen2.5-0.5B-Instruct"),
    reward_funcs=near_fifty_characters,
    args=training_args,
    train_dataset=dataset,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
trainer.save_model("tldr-grpo/adapter")
