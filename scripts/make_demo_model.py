"""Make what `lowvram-grpo demo` trains: a language model of 0.86 M parameters that half knows how to add, and its sums.

    python scripts/make_demo_model.py            # about six minutes on one core

The model reads `17+25=` and answers as its corpus does, whose replies come in several habits of mixed quality: a few
work the sum out (`7+5=12 10+20=30 <answer>42</answer>`) and are mostly right, more just blurt a number out and
are mostly wrong, some give up, and only a third use the tags. So it CAN add, but sampled at temperature 1 it is right
about a quarter of the time: there is something for GRPO to sharpen. The sums in prompts.jsonl are not in the corpus.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowvram_grpo.rewards.maths import accuracy
from lowvram_grpo.rewards.tags import answer_text, label

DEMO = Path(__file__).resolve().parents[1] / "lowvram_grpo" / "demo"
SEED = 17
PROMPTS = 512
OPERANDS = range(10, 100)
CONTEXT = 48
MAX_REPLY = 24
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
TAGS = ["<answer>", "</answer>"]
CHARACTERS = "0123456789+= abcdefghijklmnopqrstuvwxyz"

Sum = tuple[int, int]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and one for each tag; `<bos>` in front, no `<eos>` behind."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *TAGS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    # Not special: decoding must keep the tags, the rewards read them.
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def split_sums(rng: random.Random) -> tuple[list[Sum], list[Sum]]:
    """All sums of two operands in random order: those of the demo, and those of the corpus."""
    sums = [(a, b) for a in OPERANDS for b in OPERANDS]
    rng.shuffle(sums)
    return sums[:PROMPTS], sums[PROMPTS:]


def prompt_of(a: int, b: int) -> str:
    return f"{a}+{b}="


def _tagged(value: int) -> str:
    return f"<answer>{value}</answer>"


def _blurted(a: int, b: int, rng: random.Random) -> int:
    """A number that looks right: carry forgotten, a digit off, or (10 %) the sum itself."""
    total = a + b
    wrong = [total - 10, total + 10, total - 1, total + 1, total + rng.choice([-20, 20, -2, 2, 9, -9])]
    return total if rng.random() < 0.10 else rng.choice(wrong)


def _worked(a: int, b: int, rng: random.Random) -> tuple[str, int]:
    """Units, tens, and what they make; one in twenty slips in the last step."""
    units, tens = a % 10 + b % 10, a // 10 * 10 + b // 10 * 10
    steps = f"{a % 10}+{b % 10}={units} {a // 10 * 10}+{b // 10 * 10}={tens} "
    return steps, units + tens + (rng.choice([-10, -1, 1, 10]) if rng.random() < 0.05 else 0)


def _work_it_out(a: int, b: int, rng: random.Random) -> str:
    steps, value = _worked(a, b, rng)
    return steps + _tagged(value)


def _work_it_out_untagged(a: int, b: int, rng: random.Random) -> str:
    steps, value = _worked(a, b, rng)
    # Without a word between them, a reward that reads numbers takes `100 109` for 100,109.
    return f"{steps}so {value}"


def _blurt(a: int, b: int, rng: random.Random) -> str:
    return _tagged(_blurted(a, b, rng))


def _blurt_untagged(a: int, b: int, rng: random.Random) -> str:
    return str(_blurted(a, b, rng))


def _give_up(a: int, b: int, rng: random.Random) -> str:
    return rng.choice(["no idea", "a lot", "ask me later"])


# Share of each habit in the corpus, in percent.
HABITS: dict[Callable[[int, int, random.Random], str], int] = {
    _work_it_out: 10,
    _work_it_out_untagged: 8,
    _blurt: 24,
    _blurt_untagged: 36,
    _give_up: 22,
}


def reply(a: int, b: int, rng: random.Random) -> str:
    """What the corpus answers to a+b, in a habit drawn by its share."""
    (habit,) = rng.choices(list(HABITS), HABITS.values())
    return habit(a, b, rng)


def batches(
    tokenizer: PreTrainedTokenizerFast, sums: list[Sum], size: int, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, labels), int64 (B, T), padded on the right; labels are -100 outside the reply."""
    while True:
        rows, targets = [], []
        for a, b in rng.choices(sums, k=size):
            prompt = tokenizer(prompt_of(a, b))["input_ids"]
            answer = tokenizer(reply(a, b, rng), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            rows.append(prompt + answer)
            targets.append([-100] * len(prompt) + answer)
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in targets])
        yield ids, labels


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        do_sample=True,
        temperature=1.0,
        max_new_tokens=MAX_REPLY,
    )
    return model


def pretrain(model: LlamaForCausalLM, corpus: Iterator[tuple[Tensor, Tensor]], steps: int) -> None:
    """Next-token training on the replies with AdamW: linear warm-up over 5 % of the steps, then down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    shape = lambda step: min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    model.train()
    started = time.perf_counter()
    for step, (ids, labels) in zip(range(1, steps + 1), corpus):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sums: list[Sum], samples: int = 4) -> None:
    """Print how often replies sampled at temperature 1 are right and tagged, over all and by habit."""
    prompts = [prompt_of(a, b) for a, b in sums]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**inputs, num_return_sequences=samples, top_k=0)
    replies = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = accuracy(replies, [str(a + b) for a, b in sums for _ in range(samples)])
    tagged = [score > 0 for score in label(replies)]
    both = [r and t for r, t in zip(right, tagged)]
    n = len(replies)
    print(
        f"{n} replies: right {sum(right) / n:.1%}, tagged {sum(tagged) / n:.1%}, right and tagged {sum(both) / n:.1%}"
    )
    count, correct = Counter(), Counter()
    for text, ok in zip(replies, right):
        habit = ("worked" if "=" in text else "blurted" if any(map(str.isdigit, text)) else "gave up") + (
            " in tags" if answer_text(text) else ""
        )
        count[habit] += 1
        correct[habit] += ok
    for habit, times in count.most_common():
        print(f"  {habit:16} {times / n:6.1%}  right {correct[habit] / times:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEMO, help="folder for model/ and prompts.jsonl")
    parser.add_argument("--steps", type=int, default=900, help="pre-training steps")
    parser.add_argument("--batch-size", type=int, default=128, help="replies a step")
    options = parser.parse_args()
    rng = random.Random(SEED)
    torch.manual_seed(SEED)

    tokenizer = build_tokenizer()
    demo_sums, corpus_sums = split_sums(rng)
    model = build_model(tokenizer)
    pretrain(model, batches(tokenizer, corpus_sums, options.batch_size, rng), options.steps)
    model.half()
    model.save_pretrained(options.output / "model")
    tokenizer.save_pretrained(options.output / "model")
    with open(options.output / "prompts.jsonl", "w", encoding="utf-8", newline="\n") as file:
        for a, b in demo_sums:
            file.write(json.dumps({"prompt": prompt_of(a, b), "answer": str(a + b)}) + "\n")
    measure(model.float(), tokenizer, demo_sums)


if __name__ == "__main__":
    main()
