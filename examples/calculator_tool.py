"""A model that learns to use a calculator: it calls the function, reads what comes back, and answers.

    python examples/calculator_tool.py

A tool is a function with types and a docstring: the model reads both, by its own chat template. What the tool answers
stands in the conversation, but is no part of the loss. EXAMPLE_MODEL and EXAMPLE_STEPS set other things than the usual
ones.
"""

import ast
import operator
import os
import random
import re

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> str:
    """
    Work out an arithmetic expression.

    Args:
        expression: Numbers with +, -, *, / and brackets, such as (17 + 25) * 3.

    Returns:
        The number that it comes to.
    """
    return f"{_value(ast.parse(expression, mode='eval').body):.12g}"


def _value(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only numbers, +, -, *, / and brackets can be worked out")


def right_number(completions, answer, **kwargs):
    """1 where the last number of the last message is the answer. A completion is a list of messages: the model's turns,
    and the tool's between them."""
    scores = []
    for completion, expected in zip(completions, answer):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", (completion[-1].get("content") or "").replace(",", ""))
        scores.append(float(bool(numbers) and float(numbers[-1]) == float(expected)))
    return scores


def sums(count, seed=0):
    """Products that a small model gets wrong in its head."""
    rng = random.Random(seed)
    for _ in range(count):
        a, b, c = rng.randint(100, 999), rng.randint(100, 999), rng.randint(10, 99)
        question = f"What is {a} * {b} + {c}? Use the calculator, and end with the number."
        yield {"prompt": [{"role": "user", "content": question}], "answer": str(a * b + c)}


def main():
    from datasets import Dataset
    from peft import LoraConfig

    from lowvram_grpo import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=os.environ.get("EXAMPLE_MODEL", "Qwen/Qwen3-0.6B"),
        reward_funcs=right_number,
        args=GRPOConfig(
            output_dir="calculator",
            learning_rate=1e-5,
            num_generations=8,
            max_completion_length=256,
            max_tool_calling_iterations=3,
            chat_template_kwargs={"enable_thinking": False},
            max_steps=int(os.environ.get("EXAMPLE_STEPS", 100)),
        ),
        train_dataset=Dataset.from_list(list(sums(1000))),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        tools=[calculate],
    )
    trainer.train()
    trainer.save_model("calculator/adapter")


if __name__ == "__main__":
    main()
