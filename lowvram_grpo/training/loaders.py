"""Which prompts a trainer's steps get: its data loaders, for datasets and for streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.data import Sampler
from transformers import Trainer

from lowvram_grpo.data.batching import Batched, PromptLoader, PromptSampler
from lowvram_grpo.data.load import check_dataset
from lowvram_grpo.data.stream_loader import StreamLoader
from lowvram_grpo.data.streams import is_stream

if TYPE_CHECKING:
    from datasets import Dataset

    from lowvram_grpo.data.stream_loader import Place
    from lowvram_grpo.recipe.batch_plan import BatchPlan
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.run.observer import Observer
    from lowvram_grpo.training.curriculum import Curriculum
    from lowvram_grpo.training.streaming import StreamProgress


class Loaders(Trainer):
    """To be named among a trainer's bases; it brings what is named here without a value.

    Attributes:
        place: where a stream is gone on with.
    """

    grpo_args: GRPOConfig
    observer: Observer
    plan: BatchPlan
    curriculum: Curriculum | None
    stream: StreamProgress | None
    place: Place | None
    shuffle_dataset: bool

    def get_train_dataloader(self) -> PromptLoader | StreamLoader:
        if self.stream is not None:
            self.stream.loader = self._stream_loader()
            return self.stream.loader
        sampler = self._get_train_sampler()
        if not isinstance(sampler, PromptSampler):
            sampler = Batched(sampler, self.plan.prompts_per_rollout, self.plan.steps_per_rollout)
        return PromptLoader(self.train_dataset, sampler, self.args.dataloader_num_workers)

    def _stream_loader(self) -> StreamLoader:
        loader = StreamLoader(
            self.train_dataset,
            prompts=self.plan.prompts_per_rollout,
            repeats=self.plan.steps_per_rollout,
            shuffle=self.shuffle_dataset,
            seed=self._data_seed,
            tell=self.observer.notice,
        )
        if self.place is not None:
            loader.go_on(self.place)
        return loader

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        """Which prompts go into which step. A subclass may return a sampler of single indices, each once an epoch."""
        data = self.train_dataset if train_dataset is None else train_dataset
        prompts, repeats = self.plan.prompts_per_rollout, self.plan.steps_per_rollout
        return PromptSampler(
            data, prompts=prompts, repeats=repeats, shuffle=self.shuffle_dataset, seed=self._data_seed,
            arrange=None if self.curriculum is None else self.curriculum.arrange,
        )  # fmt: skip

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> PromptLoader | StreamLoader:
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data
        check_dataset(data, "eval_dataset")
        prompts = max(1, self.args.per_device_eval_batch_size // self.generations_eval)
        if is_stream(data):
            return StreamLoader(data, prompts=prompts)
        sampler = PromptSampler(data, prompts=prompts, repeats=1, shuffle=False, seed=self.args.seed)
        return PromptLoader(data, sampler, self.args.dataloader_num_workers)

    @property
    def generations_eval(self) -> int:
        return self.grpo_args.num_generations_eval or self.plan.num_generations
