"""Conversations with the keys and values of earlier turns kept, beside every turn computed anew.

    python benchmarks/bench_turns.py [--model FOLDER_OR_NAME ...] [--prompt 96 1024] [--group 8] [--turns 4]
        [--turn 32] [--reply 48] [--rounds 5] [--weights none] [--lora 16]

Both are this package's engine: `converse`, and `converse_anew`, which is what vLLM and transformers' generate get: a
rollout for each turn, whose prompts are all that was said before. Prompts and replies are random ids. Drawn is at a
temperature at which all ids are alike, and one in `turn` ends a turn, so that lengths are geometric and turns end one
by one; the last one ends the conversation.

Both take turns in one process, in an order that alternates. A row has the median over the rounds of the ratio of
seconds (of the process's own CPU time on a CPU) a sampled token, and of tokens that went through the model.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from rollout_model import DRY_MODEL, load
from torch import nn

from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.rollout.turns import Turn, converse_anew


class Script:
    """Replies of `length` random ids, until a conversation has had so many turns of the model's."""

    def __init__(self, turns: int, length: int, vocab: int):
        self.turns, self.length, self.vocab = turns, length, vocab
        self._had: Counter[int] = Counter()

    def __call__(self, turns: list[Turn]) -> list[list[int] | None]:
        self._had.update(turn.row for turn in turns)
        return [self._answer(turn) if self._had[turn.row] < self.turns else None for turn in turns]

    def _answer(self, turn: Turn) -> list[int]:
        draw = random.Random(f"{turn.row} {len(turn.ids)}")
        return [draw.randrange(3, self.vocab) for _ in range(self.length)]


def measured(args: argparse.Namespace, model: nn.Module, prompts: list[list[int]], seed: int, kept: bool) -> dict:
    """Seconds a sampled token, and tokens computed a sampled token, of one rollout."""
    vocab = unwrap(model).get_output_embeddings().weight.shape[0]
    ends = random.Random(0).sample(range(3, vocab), vocab // args.turn)
    limit = args.turns * (4 * args.turn + args.reply)
    engine = RolloutEngine(model, Sampling(limit, tuple(ends), 0, temperature=1e4), args.rows)
    converse = engine.converse if kept else partial(converse_anew, engine)
    clock = time.process_time if args.device.type == "cpu" else time.perf_counter
    started = clock()
    batch: RolloutBatch = converse(
        prompts, args.group, seed=seed, reply=Script(args.turns, args.reply, vocab), sampling=engine.sampling
    )
    seconds, sampled = clock() - started, sum(map(sum, batch.tool_mask))
    return {"seconds": seconds / sampled, "computed": engine.computed / sampled, "sampled": sampled}


def case(args: argparse.Namespace, model: nn.Module, length: int) -> str:
    vocab = unwrap(model).get_output_embeddings().weight.shape[0]
    draw = random.Random(1)
    prompts = [[draw.randrange(3, vocab) for _ in range(length)] for _ in range(args.prompts)]
    measured(args, model, [prompt[:16] for prompt in prompts], 0, True)  # libraries choose their algorithms
    pairs = []
    for at in range(args.rounds):
        order = (True, False) if at % 2 else (False, True)
        found = {kept: measured(args, model, prompts, at, kept) for kept in order}
        pairs.append((found[True], found[False]))
    ratio = lambda key: statistics.median(anew[key] / kept[key] for kept, anew in pairs)
    each = [anew["seconds"] / kept["seconds"] for kept, anew in pairs]
    tokens = statistics.median(kept["sampled"] for kept, _ in pairs)
    return (
        f"| {length} | {args.turns} x {args.turn} + {args.reply} | {tokens:.0f} | {ratio('seconds'):.2f} "
        f"({min(each):.2f} to {max(each):.2f}) | {ratio('computed'):.2f} |"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[DRY_MODEL], help="a folder with weights, or a name")
    parser.add_argument("--weights", choices=("none", "nf4"), default="none")
    parser.add_argument("--lora", type=int, default=16, help="rank of the adapter; 0 for none")
    parser.add_argument("--prompt", type=int, nargs="+", default=[96, 1024], help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--rows", type=int, help="that decode at once; all")
    parser.add_argument("--turns", type=int, default=4, help="of the model, in a conversation")
    parser.add_argument("--turn", type=int, default=32, help="tokens of a turn, on average")
    parser.add_argument("--reply", type=int, default=48, help="tokens of a reply")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
    for name in args.model:
        model = load(name, args.weights, args.lora, dtype, args.device)
        print(f"\n{Path(name).name}, {torch.get_num_threads()} threads, {args.rounds} rounds\n")
        print("| prompt | turns | sampled tokens | seconds, anew / kept | tokens computed, anew / kept |")
        print("|---|---|---|---|---|")
        for length in args.prompt:
            with torch.autocast("cuda", dtype, enabled=args.device.type == "cuda"):
                print(case(args, model, length), flush=True)


if __name__ == "__main__":
    main()
