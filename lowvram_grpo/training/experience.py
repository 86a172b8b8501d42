"""From sampled completions to the micro-batches of the optimizer steps that learn from them.

A rollout is cut into updates (optimizer steps), an update into micro-batches. Advantages, masks and loss weights are
fixed for the whole update before it is cut, so that how it is cut cannot change the gradient.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from lowvram_grpo.memory.host import upload
from lowvram_grpo.objective import Advantages, token_weights
from lowvram_grpo.rollout.batch import RolloutBatch, pad_left
from lowvram_grpo.run.completions import as_text
from lowvram_grpo.training.as_mapping import AsMapping

_FILE = "rollout.pt"


@dataclass
class Rollout:
    """Scored completions of one rollout, B in all, groups adjacent.

    Attributes:
        batch: ids and sampled log-probs.
        prompts, completions: as the rewards saw them (strings or messages).
        rewards: (B,) float32 weighted sum, NaN where no reward applies.
        rewards_per_func: (B, F) float32, NaN for "not applicable".
        advantages: of the whole rollout.
        extras: columns that the rewards logged.
        seconds: what sampling and rewarding them took.
    """

    batch: RolloutBatch
    prompts: list
    completions: list
    rewards: Tensor
    rewards_per_func: Tensor
    advantages: Advantages
    extras: dict[str, list]
    seconds: float = 0.0

    @property
    def sampled_tokens(self) -> int:
        return sum(self.batch.sampled_lengths)

    @property
    def tokens(self) -> int:
        """Sampled ones, and those of the prompts once for each completion."""
        return self.sampled_tokens + sum(map(len, self.batch.prompt_ids))

    def columns(self, names: list[str]) -> dict[str, Any]:
        """What `CompletionsLog.write` takes, with the names of the reward functions; None where one does not apply."""
        none_for_nan = lambda column: [None if v != v else v for v in column.tolist()]
        return {
            "prompts": self.prompts,
            "completions": self.completions,
            "rewards": {name: none_for_nan(column) for name, column in zip(names, self.rewards_per_func.T)},
            "advantages": self.advantages.values.tolist(),
            "extras": self.extras,
        }

    def shown(self, count: int) -> list[tuple[str, str, float]]:
        """(prompt, completion, reward) of so many completions, as text: from the least advantage to the greatest, in
        even steps; the greatest alone where it is one."""
        order = sorted(range(len(self.rewards)), key=self.advantages.values.tolist().__getitem__)
        count = min(count, len(order))
        places = {len(order) - 1 - i * (len(order) - 1) // max(count - 1, 1) for i in range(count)}
        return [
            (as_text(self.prompts[i]), as_text(self.completions[i]), float(self.rewards[i]))
            for i in (order[place] for place in sorted(places))
        ]


@dataclass
class MicroBatch(AsMapping):
    """b completions that go through the model together. Trimmed to its own longest prompt and completion.

    Attributes:
        prompt_ids, prompt_mask: (b, P) left-padded.
        completion_ids, completion_mask: (b, T) right-padded; the mask marks what is no padding.
        loss_mask: (b, T) bool, tokens the loss counts (truncated completions may be left out).
        weights: (b, T) float32, see objective.token_weights.
        token_share: (b,) float32, 1 / the tokens that the update counts, in each row: of the entropy bonus's mean.
            None for an update of this one micro-batch.
        advantages: (b,) float32.
        sampling_per_token_logps: (b, T) float32; None where nobody knows them.
        old_per_token_logps, ref_per_token_logps: (b, T) float32, filled in by the trainer where the loss needs them.
        entropy_mask: (b, T) bool, the tokens of most entropy in the update, where that takes more than this one pass.
        prompt_lengths, completion_lengths: b numbers of tokens, on the host: what the masks say, without a wait.
        group_sizes: runs of adjacent rows that have the same prompt.
        tool_mask: (b, T) bool, the tokens that were sampled, where others were inserted between them.
        known_mask: (b, T) bool, of those the ones whose log-prob the sampler gave, where it did not give all.
        router_share: (b,) float32, each row's share of the update's tokens, prompts included: weighs the mean that a
            router's loss takes over them.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    loss_mask: Tensor
    weights: Tensor
    advantages: Tensor
    sampling_per_token_logps: Tensor | None
    token_share: Tensor | None = None
    old_per_token_logps: Tensor | None = None
    ref_per_token_logps: Tensor | None = None
    entropy_mask: Tensor | None = None
    prompt_lengths: list[int] | None = None
    completion_lengths: list[int] | None = None
    group_sizes: list[int] | None = None
    router_share: Tensor | None = None
    tool_mask: Tensor | None = None
    known_mask: Tensor | None = None

    @property
    def sampled_mask(self) -> Tensor:
        """(b, T), not 0 at the tokens whose log-probs can be held against the sampler's: it drew them, and said how
        likely they were."""
        if self.known_mask is not None:
            return self.known_mask
        return self.completion_mask if self.tool_mask is None else self.tool_mask

    def sequence(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `scoring.score`."""
        return self.prompt_ids, self.prompt_mask, self.completion_ids, self.completion_mask

    def lengths(self) -> dict[str, list[int] | None]:
        """What `scoring.score` need not count."""
        return {"prompt_lengths": self.prompt_lengths, "completion_lengths": self.completion_lengths}


def split(micro: MicroBatch, rows: int) -> list[MicroBatch]:
    """The same completions in micro-batches of at most `rows`, trimmed to their own longest prompt and completion."""
    count = len(micro.advantages)
    return [micro] if count <= rows else [_part(micro, slice(i, i + rows)) for i in range(0, count, rows)]


def _part(micro: MicroBatch, rows: slice) -> MicroBatch:
    part = {f.name: getattr(micro, f.name) for f in fields(micro) if f.name != "group_sizes"}
    part = {name: None if value is None else value[rows] for name, value in part.items()}
    longest = {side: max(_lengths(part, side)) for side in ("prompt", "completion")}
    for name, value in part.items():
        if isinstance(value, Tensor) and value.dim() == 2:
            prompt = name.startswith("prompt_")
            part[name] = value[:, value.shape[1] - longest["prompt"] :] if prompt else value[:, : longest["completion"]]
    if micro.group_sizes is not None:
        group_of = [i for i, size in enumerate(micro.group_sizes) for _ in range(size)]
        part["group_sizes"] = [len(list(run)) for _, run in groupby(group_of[rows])]
    return MicroBatch(**part)


def _lengths(part: dict[str, Any], side: str) -> list[int]:
    known = part[f"{side}_lengths"]
    return part[f"{side}_mask"].sum(1).tolist() if known is None else known


def pad_right(rows: list[Tensor], width: int, value: float) -> Tensor:
    """(b, width) of the rows' dtype."""
    out = rows[0].new_full((len(rows), width), value)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def split_evenly(n: int, parts: int) -> list[range]:
    """Cut range(n) into at most `parts` runs whose lengths differ by at most one; never an empty one."""
    parts = max(1, min(parts, n))
    edges = [n * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def updates_of(
    rollout: Rollout,
    *,
    updates: int,
    micro_batch_size: int,
    loss_type: str,
    max_completion_length: int,
    mask_truncated: bool,
    pad_id: int,
    device: torch.device,
) -> list[list[MicroBatch]]:
    """Cut a rollout into `updates` lists of micro-batches of at most `micro_batch_size` completions."""
    batch = rollout.batch
    width = max(map(len, batch.completion_ids))
    ids = [torch.tensor(row) for row in batch.completion_ids]
    completion_ids = pad_right(ids, width, pad_id)
    completion_mask = pad_right([torch.ones(len(row), dtype=torch.long) for row in ids], width, 0)
    logps = pad_right(batch.sampling_per_token_logps, width, 0.0)
    known_mask = None
    truncated = torch.tensor(batch.truncated)
    loss_mask, tool_mask = completion_mask.bool() & ~(truncated[:, None] & mask_truncated), None
    if batch.tool_mask is not None:
        tool_mask = pad_right([torch.tensor(row) for row in batch.tool_mask], width, 0).bool()
        loss_mask &= tool_mask
    if (unknown := logps.isnan()).numpy().any():  # in host memory: nothing is waited for
        known_mask = ~unknown & (completion_mask.bool() if tool_mask is None else tool_mask)
        logps = logps.nan_to_num(0.0) if bool(known_mask.any()) else None
    of_rows = lambda values, rows, t: None if values is None else values[rows, :t]
    cut = []
    for update in split_evenly(len(ids), updates):
        counted = loss_mask[update.start : update.stop]
        # Of the whole rollout's tokens those that fall to a step of so many completions: all steps weigh a token alike.
        tokens = loss_mask.sum() * (len(update) / len(ids))
        weights = token_weights(counted, loss_type, max_completion_length, tokens)
        token_share = torch.ones(len(update)) / counted.sum().clamp(min=1)
        router_share, micro = _share_of_tokens(batch, update), []
        for first in range(update.start, update.stop, micro_batch_size):
            rows = slice(first, min(first + micro_batch_size, update.stop))
            within = slice(rows.start - update.start, rows.stop - update.start)
            t = max(map(len, ids[rows]))
            prompt_ids, prompt_mask = pad_left(batch.prompt_ids[rows], pad_id, torch.device("cpu"))
            micro.append(
                MicroBatch(
                    prompt_ids,
                    prompt_mask,
                    completion_ids[rows, :t],
                    completion_mask[rows, :t],
                    loss_mask[rows, :t],
                    weights[within, :t],
                    rollout.advantages.values[rows],
                    of_rows(logps, rows, t),
                    token_share[within],
                    prompt_lengths=[len(prompt) for prompt in batch.prompt_ids[rows]],
                    completion_lengths=[len(row) for row in ids[rows]],
                    group_sizes=[len(list(run)) for _, run in groupby(batch.prompt_ids[rows])],
                    router_share=router_share[within],
                    tool_mask=of_rows(tool_mask, rows, t),
                    known_mask=of_rows(known_mask, rows, t),
                )
            )
        cut.append(micro)
    return _moved(cut, device)


def _share_of_tokens(batch: RolloutBatch, update: range) -> Tensor:
    """(len(update),) of all tokens that an update's rows have, prompts included."""
    lengths = [len(batch.prompt_ids[i]) + len(batch.completion_ids[i]) for i in update]
    return torch.tensor(lengths, dtype=torch.float32) / sum(lengths)


def _moved(cut: list[list[MicroBatch]], device: torch.device) -> list[list[MicroBatch]]:
    """All of a rollout goes to the device at once."""
    parts = [(micro, f.name) for update in cut for micro in update for f in fields(micro)]
    parts = [(micro, name) for micro, name in parts if isinstance(getattr(micro, name), Tensor)]
    for (micro, name), moved in zip(parts, upload([getattr(micro, name) for micro, name in parts], device)):
        setattr(micro, name, moved)
    return cut


def save_updates(updates: list[list[MicroBatch]], folder: str) -> None:
    """Into a checkpoint: the micro-batches of a rollout that has steps left to serve."""
    # Tensors of their own: those of a rollout share one piece of memory, which torch.save would write as a whole.
    own = lambda value: value.to("cpu", copy=True) if isinstance(value, Tensor) else value
    saved = [[{f.name: own(getattr(micro, f.name)) for f in fields(micro)} for micro in update] for update in updates]
    torch.save(saved, os.path.join(folder, _FILE))


def load_updates(folder: str, device: torch.device, notice: Callable[[str], None]) -> list[list[MicroBatch]] | None:
    """What `save_updates` left. None if that is nothing, or of a version that kept something else: the steps that the
    rollout has left to serve then sample anew, which is said."""
    path = os.path.join(folder, _FILE)
    if not os.path.isfile(path):
        return None
    saved = torch.load(path, map_location=device, weights_only=True)
    names = {f.name for f in fields(MicroBatch)}
    if any(micro.keys() != names for update in saved for micro in update):
        notice(
            f"{os.path.basename(folder)} is of another version, which kept something else of a rollout that has steps "
            "left to serve: they sample anew."
        )
        return None
    return [[MicroBatch(**micro) for micro in update] for update in saved]
