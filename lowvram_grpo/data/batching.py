"""Which prompts go into which step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from itertools import groupby

import torch
from torch.utils.data import DataLoader, Sampler


class PromptSampler(Sampler[list[int]]):
    """Batches of prompt indices, each repeated for the optimizer steps that share its rollout.

    The order is a function of (seed, epoch) alone, so a resumed run finds its place by counting. The last batch of an
    epoch may be smaller; groups are always whole, because a group is made from one prompt.

    Args:
        arrange: changes the order of an epoch, given with its number from 0 on; called when the epoch begins, and again
            where it is gone on with.
    """

    def __init__(
        self, data: Sized, *, prompts: int, repeats: int, shuffle: bool, seed: int,
        arrange: Callable[[list[int], int], list[int]] | None = None,
    ):  # fmt: skip
        self.data, self.prompts, self.repeats, self.shuffle, self.seed = data, prompts, repeats, shuffle, seed
        self.arrange, self.epoch = arrange, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.data) // self.prompts) * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        n = len(self.data)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(n, generator=generator).tolist() if self.shuffle else list(range(n))
        order = order if self.arrange is None else self.arrange(order, self.epoch)
        for first in range(0, n, self.prompts):
            for _ in range(self.repeats):
                yield order[first : first + self.prompts]


class Batched(Sampler[list[int]]):
    """Batches of prompts in the order of another sampler, each repeated as `PromptSampler` does. To go on from a
    checkpoint that order has to be the same whenever an epoch is begun.

    Args:
        order: yields single indices, each once an epoch; one that repeats them at once, as TRL's does for the
            completions of a group, counts once.
    """

    def __init__(self, order: Sampler[int], prompts: int, repeats: int):
        self.order, self.prompts, self.repeats = order, prompts, repeats

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.order) // self.prompts) * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index, _ in groupby(self.order):
            batch.append(index)
            if len(batch) == self.prompts:
                yield from (batch for _ in range(self.repeats))
                batch = []
        if batch:
            yield from (batch for _ in range(self.repeats))


class PromptLoader(DataLoader):
    """Yields lists of dataset rows, read by `workers` processes; by this one unless they are asked for."""

    def __init__(self, data, sampler: PromptSampler | Batched, workers: int = 0):
        super().__init__(data, batch_sampler=sampler, collate_fn=list, generator=torch.Generator(), num_workers=workers)

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
