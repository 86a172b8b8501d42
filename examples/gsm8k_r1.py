"""Grade-school mathematics as DeepSeek-R1 learned it: think, then answer, and only the answer is checked.

    python examples/gsm8k_r1.py

The rewards are Open R1's: accuracy compares the answer with the reference by math-verify, format looks for the tags.
EXAMPLE_MODEL, EXAMPLE_DATA and EXAMPLE_STEPS set other things than the usual ones.
"""

import os

from datasets import load_dataset
from peft import LoraConfig

from lowvram_grpo import GRPOConfig, GRPOTrainer
from lowvram_grpo.rewards import accuracy_reward, format_reward  # was: from open_r1.rewards import ...

# The system prompt of Open R1's recipes, and where the answer has to stand so that it can be read as mathematics.
SYSTEM_PROMPT = (
    "You are a helpful AI Assistant that provides well-reasoned and detailed responses. You first think about the "
    "reasoning process as an internal monologue and then provide the user with the answer. Respond in the following "
    "format: <think>\n...\n</think>\n<answer>\n...\n</answer>"
)
IN_A_BOX = "\n\nPut the final number into \\boxed{} inside of <answer>."


def as_conversation(row):
    """GSM8K has `question`, and an `answer` whose last line is `#### number`."""
    number = row["answer"].split("####")[-1].strip().replace(",", "")
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": row["question"] + IN_A_BOX},
        ],
        "solution": f"${number}$",
    }


def main():
    place = os.environ.get("EXAMPLE_DATA")
    dataset = load_dataset(place, split="train") if place else load_dataset("openai/gsm8k", "main", split="train")
    dataset = dataset.map(as_conversation, remove_columns=["question", "answer"])

    training_args = GRPOConfig(
        output_dir="gsm8k-r1",
        learning_rate=1e-5,
        beta=0.0,
        temperature=1.0,
        prompts_per_step=4,
        num_generations=8,
        max_completion_length=512,
        reward_weights=[1.0, 0.5],
        max_steps=int(os.environ.get("EXAMPLE_STEPS", 500)),
    )
    trainer = GRPOTrainer(
        model=os.environ.get("EXAMPLE_MODEL", "Qwen/Qwen2.5-1.5B-Instruct"),
        reward_funcs=[accuracy_reward, format_reward],
        args=training_args,
        train_dataset=dataset,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model("gsm8k-r1/adapter")


if __name__ == "__main__":
    main()
