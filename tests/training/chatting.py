"""A model small enough to train in a test that speaks the bytes of `tests/data/chat_tokenizer.py`, and an engine that
says what it is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from conftest import make_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from chat_tokenizer import END, QWEN, calling, chat_tokenizer, ids_of

from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.rollout.turns import Turn

__all__ = ["END", "QWEN", "Scripted", "asked", "calling", "chat_tokenizer", "ids_of", "small_model"]


def small_model(tokenizer: Any, **overrides: Any) -> Any:
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "initializer_range": 0.1, **overrides}
    return make_model(eos_token_id=END, pad_token_id=0, **settings)


def asked(rows: int) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": f"Question {i}?"}], "answer": str(i)} for i in range(rows)]


class Scripted:
    """An engine in place of a trainer's own.

    Args:
        script: of each completion of a rollout, the texts of its turns.
    """

    def __init__(self, engine: Any, tokenizer: Any, script: list[list[str]]):
        self.sampling, self.model, self.converses = engine.sampling, engine.model, True
        self.rows, self.workspace_mib = None, 1
        self.script, self.tokenizer = script, tokenizer

    def generate(self, prompt_ids, num_generations, *, seed, sampling=None):
        return self.converse(prompt_ids, num_generations, seed=seed, reply=lambda turns: [None] * len(turns))

    def converse(self, prompt_ids, num_generations, *, seed, reply, sampling=None):
        limit, rows = (sampling or self.sampling).max_new_tokens, range(len(prompt_ids) * num_generations)
        ids, mask, cut, at, live = [[] for _ in rows], [[] for _ in rows], [False] * len(rows), [0] * len(rows), [*rows]
        while live:
            turns, behind = [], []
            for row in live:
                new = ids_of(self.tokenizer, self.script[row][at[row]])[: limit - len(ids[row])]
                at[row] += 1
                ids[row] += new
                mask[row] += [1] * len(new)
                cut[row] = new[-1] != END
                turns.append(Turn(row, list(ids[row]), new, new[-1] == END))
            for row, more in zip(live, reply(turns)):
                if more is not None and len(ids[row]) + len(more) < limit:
                    ids[row] += more
                    mask[row] += [0] * len(more)
                    behind.append(row)
                elif more is not None:
                    cut[row] = True
            live = behind
        prompts = [prompt for prompt in prompt_ids for _ in range(num_generations)]
        logps = [torch.tensor([-1.0 - 0.01 * t if by else 0.0 for t, by in enumerate(row)]) for row in mask]
        return RolloutBatch(prompts, ids, logps, cut, mask)
