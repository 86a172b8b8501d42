"""Rewards of your own: TRL's signature, in a file that the command line and a script can use.

    lowvram-grpo train --model Qwen2.5-0.5B-Instruct --data trl-lib/tldr \
        --reward examples/custom_reward.py:brevity --reward examples/custom_reward.py:own_words:0.5
    python examples/custom_reward.py

A reward gets every column of the data by its name, and returns a number a completion, or None where it has nothing to
say. EXAMPLE_MODEL, EXAMPLE_DATA and EXAMPLE_STEPS set other things than the usual ones.
"""

import os


def text_of(completion):
    """A completion is text, or a list of messages where the prompts are conversations."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def brevity(completions, completion_ids, **kwargs):
    """1 for a reply of up to 32 tokens, then falling to 0 at 64; 0 for nothing at all."""
    lengths = [len(ids) if text_of(completion).strip() else 64 for completion, ids in zip(completions, completion_ids)]
    return [min(1.0, max(0.0, (64 - length) / 32)) for length in lengths]


def own_words(prompts, completions, log_metric=None, **kwargs):
    """The share of a reply's words that do not stand in its prompt; None for a reply without words.

    `log_metric` puts a number of your own beside the others of a step.
    """
    scores = []
    for prompt, completion in zip(prompts, completions):
        known = set((prompt if isinstance(prompt, str) else prompt[-1]["content"]).lower().split())
        words = text_of(completion).lower().split()
        scores.append(sum(word not in known for word in words) / len(words) if words else None)
    if log_metric is not None:
        log_metric("replies_without_words", scores.count(None) / len(scores))
    return scores


def main():
    from datasets import load_dataset
    from peft import LoraConfig

    from lowvram_grpo import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=os.environ.get("EXAMPLE_MODEL", "Qwen/Qwen2.5-0.5B-Instruct"),
        reward_funcs=[brevity, own_words],
        args=GRPOConfig(
            output_dir="custom-reward",
            learning_rate=1e-5,
            reward_weights=[1.0, 0.5],
            max_completion_length=96,
            max_steps=int(os.environ.get("EXAMPLE_STEPS", 100)),
        ),
        train_dataset=load_dataset(os.environ.get("EXAMPLE_DATA", "trl-lib/tldr"), split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model("custom-reward/adapter")


if __name__ == "__main__":
    main()
