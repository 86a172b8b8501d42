"""Is the rollout engine right on real weights? Held against transformers' greedy generate and against scored log-probs.

    python benchmarks/rollout_check.py --model DIR --data DIR [--rows 8] [--length 48] [--out rows.jsonl]

With a LoRA adapter that says something, ragged prompts of the data and one of a single token, several end ids. Prints,
and writes as JSON lines, how many completions are token for token those of generate, and how far sampled log-probs are
from those of a forward pass (mean and maximum over all tokens of a sampled rollout), for each kind of KV
cache; for int8 without the prompt of a single token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowvram_grpo.bench.rows import Rows
from lowvram_grpo.data.load import load as load_data
from lowvram_grpo.rollout.batch import RolloutBatch, pad_left
from lowvram_grpo.rollout.engine import RolloutEngine, end_ids
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.training.scoring import score


def load(folder: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.005)
    return model.eval()


def greedy(model: torch.nn.Module, prompt: list[int], sampling: Sampling) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=sampling.max_new_tokens, do_sample=False,
        repetition_penalty=1.0, eos_token_id=list(sampling.eos_ids), pad_token_id=sampling.pad_id,
    )  # fmt: skip
    return found[0, len(prompt) :].tolist()


def differences(model: torch.nn.Module, batch: RolloutBatch, temperature: float) -> torch.Tensor:
    """|sampled - scored| log-prob of every token."""
    found = []
    for prompt, completion, logps in zip(batch.prompt_ids, batch.completion_ids, batch.sampling_per_token_logps):
        ids, mask = pad_left([prompt], 0, model.device)
        c = torch.tensor([completion], device=model.device)
        with torch.no_grad():
            scored = score(model, ids, mask, c, torch.ones_like(c), temperature=temperature, workspace_mib=64).logps[0]
        found.append((scored.cpu() - logps).abs())
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(args.model, getattr(torch, args.dtype), device), AutoTokenizer.from_pretrained(args.model)
    out = Rows(args.out or Path("/dev/null"), False, part="rollout_check")
    key = {"model": Path(args.model).name, "dtype": args.dtype, "rows": args.rows, "length": args.length}

    texts = [str(next(iter(row.values()))) for row in load_data(args.data).select(range(args.prompts))]
    prompts = [tokenizer(text)["input_ids"][-200 + 37 * i :] for i, text in enumerate(texts)]
    prompts.append([tokenizer.encode("The", add_special_tokens=False)[0]])
    # A frequent token ends completions too, so that some stop early.
    ends = (*end_ids(model, tokenizer), tokenizer.encode(".", add_special_tokens=False)[0])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    at = Sampling(args.length, ends, pad, temperature=0.0)
    batch = RolloutEngine(model, at, args.rows).generate(prompts, 2, seed=0)
    expected = [greedy(model, prompt, at) for prompt in prompts for _ in range(2)]
    same = sum(a == b for a, b in zip(batch.completion_ids, expected))
    stopped = batch.stop_reasons.count("stop")
    print(f"greedy: {same} of {len(expected)} completions equal generate's token for token; {stopped} ended early")
    out.add(check="greedy", equal=same, of=len(expected), ended_early=stopped, **key)
    # A single token tells an int8 cache nothing of the keys that will come.
    for kv, given in (("auto", prompts), ("int8", prompts[:-1])):
        free = Sampling(args.length, end_ids(model, tokenizer), pad, temperature=1.0)
        batch = RolloutEngine(model, free, args.rows, kv_dtype=kv).generate(given, args.group, seed=1)
        apart = differences(model, batch, 1.0)
        print(f"{kv:5} cache, {len(apart)} tokens: mean {apart.mean():.2e}, largest {apart.max():.2e}")
        out.add(check="logps", kv=kv, tokens=len(apart), mean=float(apart.mean()), largest=float(apart.max()), **key)


if __name__ == "__main__":
    main()
