"""What the sweep costs and errs on real hidden states, on a CPU: FLOP by torch's counter, errors against float64.

    python benchmarks/real_profile.py MODEL [--problems problems.txt] [--temperature 1.0] [--rows 384] [--save FILE.pt]
    python benchmarks/real_profile.py --load FILE.pt

Samples completions of a local MODEL on word problems (a few are built in), keeps the hidden state before each sampled
token, and prints: the entropy of the rows, FLOP of forward and backward in units of N * V * H, the share of diffuse
rows, the error of the gradient's direction beside that of bfloat16 logits and beside its own bound, and the KL that an
int8 and an NF4 head cost. A file of states serves `bench_kernels.py --hidden` too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.linear_logps import linear_logps
from torch.utils.flop_counter import FlopCounterMode

PROBLEMS = [
    "A baker sells 48 rolls in the morning and half as many in the afternoon. How many rolls does she sell in a day?",
    "Tom has 3 boxes with 12 pencils each and gives 7 pencils away. How many pencils are left?",
    "A train covers 180 km in 2.5 hours. What is its average speed?",
    "Lena saves 15 dollars a week. How many weeks does she need for a bicycle of 240 dollars?",
    "A rectangle is 14 cm long and 9 cm wide. What are its area and its perimeter?",
    "Five friends share a bill of 86.50 dollars equally and add a tip of 10%. What does each pay?",
    "A tank holds 600 litres and loses 4 litres an hour. After how many hours is it two thirds full?",
    "Sara reads 22 pages on Monday, twice as many on Tuesday and 10 fewer on Wednesday. How many pages is that?",
]


def sample(name: str, problems: list[str], temperature: float, length: int) -> dict[str, torch.Tensor | float]:
    """h (N, H) float32, t (N,), W (V, H) bfloat16 of the model's own samples."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
    chats = [[{"role": "user", "content": p}] for p in problems]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    width = batch.input_ids.shape[1]
    with torch.no_grad():
        ids = model.generate(
            **batch, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=length
        )
        mask = torch.cat([batch.attention_mask, torch.ones_like(ids[:, width:])], 1)
        hidden = model.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state[:, width - 1 : -1]
    ended = ids[:, width:] == tokenizer.eos_token_id
    keep = ended.cumsum(1) - ended.long() == 0
    weight = model.get_output_embeddings().weight.detach().bfloat16()
    return {"h": hidden[keep].float(), "t": ids[:, width:][keep], "W": weight, "T": temperature}


def flops(run, unit: int) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / unit


def measure(states: dict, rows: int) -> dict[str, float]:
    order = torch.randperm(len(states["t"]), generator=torch.Generator().manual_seed(0))[:rows]
    h, t = states["h"][order], states["t"][order]
    w, temperature = states["W"].float(), states["T"]
    head, unit = Head(w), len(t) * w.numel()
    leaf = h.clone().requires_grad_()

    def step(direction: str):
        leaf.grad = None
        out = linear_logps(leaf, head, t, temperature=temperature, entropy=True, direction=direction)
        out.logps.sum().backward()
        return out

    found = {"rows": len(t)}
    out = step("sparse")
    ours, listed = leaf.grad.double(), torch.ones(len(t), dtype=torch.bool)
    listed[out.diffuse] = False
    found |= {"entropy_mean": float(out.entropy.mean()), "entropy_p95": float(out.entropy.quantile(0.95))}
    found["diffuse_share"] = len(out.diffuse) / len(t)
    found["flop_sparse"] = flops(lambda: step("sparse"), unit)
    found["flop_dense"] = flops(lambda: step("dense"), unit)
    with torch.no_grad():
        found["flop_no_grad"] = flops(lambda: linear_logps(h, head, t, temperature=temperature), unit)
    exact, rounded = torch.empty_like(ours), torch.empty_like(ours)
    for r in range(0, len(t), 32):
        block = slice(r, r + 32)
        p = torch.softmax(h[block].double() @ w.double().T / temperature, -1)
        exact[block] = (w[t[block]].double() - p @ w.double()) / temperature
        logits = (h[block].bfloat16() @ states["W"].T).float() / temperature
        rounded[block] = (w[t[block]] - logits.softmax(-1) @ w).double() / temperature
    wrong, noise = (ours - exact)[listed], (rounded - exact)[listed]
    found["direction_error_listed"] = float(wrong.norm() / exact[listed].norm())
    found["bf16_logits_error_listed"] = float(noise.norm() / exact[listed].norm())
    found["worst_error_over_bound"] = float((wrong.norm(dim=1) / out.bound[listed]).max())
    with torch.no_grad():
        full = linear_logps(h, head, t, temperature=temperature)
        for kind in ("int8", "nf4") if w.shape[1] % 64 == 0 else ("int8",):
            small = linear_logps(h, Head(states["W"].float()).quantized(kind), t, temperature=temperature)
            found[f"logp_gap_{kind}"] = float((small.logps - full.logps).abs().mean())
        half = torch.log_softmax((h.bfloat16() @ states["W"].T).float() / temperature, -1)
        found["logp_gap_bf16_logits"] = float((half.gather(1, t[:, None])[:, 0] - full.logps).abs().mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--problems", help="a text file, one problem a line")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--save")
    parser.add_argument("--load")
    args = parser.parse_args()
    if bool(args.model) == bool(args.load):
        parser.error("give a model folder or --load, one of the two")
    if args.load:
        states = torch.load(args.load, weights_only=True)
    else:
        problems = Path(args.problems).read_text().splitlines() if args.problems else PROBLEMS
        states = sample(args.model, problems, args.temperature, args.length)
    if args.save:
        torch.save(states, args.save)
    for name, value in measure(states, args.rows).items():
        print(f"{name:28s} {value:.4g}")


if __name__ == "__main__":
    main()
