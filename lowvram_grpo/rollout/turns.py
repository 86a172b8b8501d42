"""Conversations while sampling: what an engine hands over when the model's turn has ended, and what comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lowvram_grpo.rollout.batch import RolloutBatch

if TYPE_CHECKING:
    from typing import Any

    from lowvram_grpo.rollout.sampler import Sampling


@dataclass(frozen=True)
class Turn:
    """A conversation whose model turn has just ended.

    Attributes:
        row: 0 .. B - 1, B = prompts * G, those of one prompt adjacent.
        ids: the whole completion so far: sampled and inserted tokens, in order.
        sampled: what this turn sampled, its end token included where one was drawn.
        ended: by an end token, not by a limit.
    """

    row: int
    ids: list[int]
    sampled: list[int]
    ended: bool


# The tokens to append behind each turn (a tool's answer as the template renders it, and the next assistant's header),
# or None where the conversation is over.
Reply = Callable[[list[Turn]], list[list[int] | None]]


def converse_anew(
    engine: Any,
    prompt_ids: list[list[int]],
    num_generations: int,
    *,
    seed: int,
    reply: Reply,
    sampling: Sampling | None = None,
) -> RolloutBatch:
    """Conversations by an engine that keeps nothing between turns: each turn is a `generate` of its own, whose prompt
    is all that was said before. Rows with as much room as each other go together, for a `generate` has one limit."""
    sampling = sampling or engine.sampling
    limit, total = sampling.max_new_tokens, len(prompt_ids) * num_generations
    prompts = [p for p in prompt_ids for _ in range(num_generations)]
    ids, mask, logps = [[] for _ in range(total)], [[] for _ in range(total)], [[] for _ in range(total)]
    truncated, open_rows, number = [False] * total, list(range(total)), 0
    while open_rows:
        turns, rooms = [], {}
        for row in open_rows:
            rooms.setdefault(limit - len(ids[row]), []).append(row)
        for room, rows in rooms.items():
            at, before = replace(sampling, max_new_tokens=room), [[*prompts[row], *ids[row]] for row in rows]
            if number:
                found = engine.generate(before, 1, seed=turn_seed(seed, number), sampling=at)
            else:
                found = engine.generate(prompt_ids, num_generations, seed=seed, sampling=at)
            number += 1
            drawn = zip(rows, found.completion_ids, found.sampling_per_token_logps, found.truncated)
            for row, sampled, likely, cut in drawn:
                ids[row] += sampled
                mask[row] += [1] * len(sampled)
                logps[row].append(likely.cpu())
                turns.append(Turn(row, list(ids[row]), sampled, not cut))
        turns.sort(key=lambda turn: turn.row)
        open_rows = []
        for turn, more in zip(turns, reply(turns), strict=True):
            truncated[turn.row] = not turn.ended
            if more is None:
                continue
            if len(turn.ids) + len(more) >= limit:
                truncated[turn.row] = True
                continue
            ids[turn.row] += more
            mask[turn.row] += [0] * len(more)
            logps[turn.row].append(torch.zeros(len(more)))
            open_rows.append(turn.row)
    return RolloutBatch(prompts, ids, [torch.cat(parts) for parts in logps], truncated, mask)


def turn_seed(seed: int, number: int) -> int:
    """Of the `number`-th `generate` (from 1 on) of a rollout, far from the seeds of the next rollouts."""
    digest = hashlib.blake2b(f"turn {seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
