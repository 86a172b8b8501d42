"""Which prompts go into which step."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import DataLoader, Sampler


class PromptSampler(Sampler[list[int]]):
    """Batches of prompt indices, each repeated for the optimizer steps that share its rollout.

    The order is a function of (seed, epoch) alone, so a resumed run finds its place by counting. The last batch of an
    epoch may be smaller; groups are always whole, because a group is made from one prompt.
    """

    def __init__(self, data: Sized, *, prompts: int, repeats: int, shuffle: bool, seed: int):
        self.data, self.prompts, self.repeats, self.shuffle, self.seed = data, prompts, repeats, shuffle, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.data) // self.prompts) * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        n = len(self.data)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(n, generator=generator).tolist() if self.shuffle else list(range(n))
        for first in range(0, n, self.prompts):
            for _ in range(self.repeats):
                yield order[first : first + self.prompts]


class PromptLoader(DataLoader):
    """Yields lists of dataset rows. No workers: a row is a prompt, and Windows spawns them badly."""

    def __init__(self, data, sampler: PromptSampler):
        super().__init__(data, batch_sampler=sampler, collate_fn=list, generator=torch.Generator())

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
