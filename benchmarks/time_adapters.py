"""What `fast_adapters` saves: one decode step of peft's layers beside the fused and the merged ones, interleaved.

    python benchmarks/time_adapters.py MODEL [--dtype bfloat16] [--device cuda] [--graph]

MODEL is a folder or a hub id. Times are medians of a step over rounds in which each mode has its turn; the ratio is the
median of each round's own. `--autocast` computes in DTYPE as training does; `--graph` replays a CUDA graph.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from timing import timed
from transformers import AutoModelForCausalLM, DynamicCache

from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.adapters import fast_adapters

MODES = ("off", "fused", "merged")


def with_adapter(name: str, device: torch.device, dtype: torch.dtype, rank: int):
    """A model with a LoRA on all linear layers whose B is not zero."""
    base = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if ".lora_B." in key:
                weight.normal_(0, 0.01, generator=generator)
    return model


def decode_step(model, rows: int, context: int, device: torch.device, graph: bool):
    """A call that feeds one token a row to the decoder behind `context` tokens, always the same step."""
    decoder = unwrap(model).model
    cache = DynamicCache(config=decoder.config)
    token, position = torch.full((2, rows, 1), context, device=device)
    decoder(token.expand(-1, context), past_key_values=cache)
    before = [(layer.keys, layer.values) for layer in cache.layers]

    def step():
        for layer, (keys, values) in zip(cache.layers, before):
            layer.keys, layer.values = keys, values
        return decoder(token, position_ids=position, past_key_values=cache).last_hidden_state

    if not graph:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return lambda kept=step: captured.replay()  # the graph reads tensors that only `step` holds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32")
    for flag in ("--autocast", "--graph"):
        parser.add_argument(flag, action="store_true")
    for name, value in {"rows": 8, "context": 64, "rank": 16, "rounds": 7, "steps": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args(arguments)
    dtype = getattr(torch, o.dtype)
    model = with_adapter(o.model, o.device, dtype, o.rank)
    found, around = {mode: [] for mode in MODES}, {mode: [] for mode in MODES}
    sync = torch.cuda.synchronize if o.device.type == "cuda" else lambda: None
    with torch.no_grad(), torch.autocast(o.device.type, dtype) if o.autocast else nullcontext():
        for _ in range(o.rounds):
            for mode in MODES:
                start = time.perf_counter()
                with fast_adapters(model, mode):
                    sync()
                    entered = time.perf_counter()
                    step = decode_step(model, o.rows, o.context, o.device, o.graph)
                    step()
                    found[mode].append(timed(step, o.device, 60.0, most=o.steps)["ms"])
                    left = time.perf_counter()
                sync()
                around[mode].append((time.perf_counter() - left + entered - start) * 1e3)
    for mode in MODES:
        ratio = statistics.median(b / a for a, b in zip(found["off"], found[mode]))
        ms, once = statistics.median(found[mode]), statistics.median(around[mode])
        print(f"{mode:7} {ms:9.3f} ms a step, {ratio:.3f} of peft's; {once:9.2f} ms to enter and leave")


if __name__ == "__main__":
    main()
