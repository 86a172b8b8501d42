"""Completions from the training weights themselves, as many at a time as fit into memory.

A step's prompts go through a queue. Each prompt is prefilled once and its keys and values are stored once; its G
completions attend to them, each with a row of its own for what it has said. Rows that end are refilled from the queue
at once, so nobody waits for the longest completion of another wave.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowvram_grpo.kernels.decode.attention import settle
from lowvram_grpo.kernels.runtime import HAS_TRITON
from lowvram_grpo.policy.attention import layout_attention
from lowvram_grpo.policy.attention_choice import kernel_of
from lowvram_grpo.policy.long_rope import settled_rotary
from lowvram_grpo.policy.quantized_experts import quantized_experts
from lowvram_grpo.policy.recurrent import recurrent_layers
from lowvram_grpo.policy.small_ops import fast_modules
from lowvram_grpo.policy.trials import usable
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.adapters import fast_adapters
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.rollout.conversation import Conversations
from lowvram_grpo.rollout.decode import Decoder, DecodeSettings, run
from lowvram_grpo.rollout.fallback import generate_in_waves, rehearse_waves
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.rollout.schedule import Scheduler, rows_within
from lowvram_grpo.rollout.support import why_not
from lowvram_grpo.rollout.turns import Reply, Turn, converse_anew

if TYPE_CHECKING:
    from lowvram_grpo.recipe.config import GRPOConfig


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for as long as the block runs.

    In train mode with activation checkpointing on, transformers drops the KV cache and still feeds only the last token:
    4 % of the tokens come out right.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class RolloutEngine:
    """Samples from the training weights through the head that scores them.

    Where the model cannot decode in the engine, or `generation_kwargs` ask for what only transformers knows,
    transformers' `generate` samples instead, and a warning says so.

    Args:
        model: causal language model, with or without PeftModel around it.
        sampling: how to draw, unless `generate` is told otherwise.
        rows: completions that decode at once; all where None. With `max_new_tokens` and the longest prompt it bounds
            the KV cache.
        group: completions a prompt that the memory plan counted with; a call with fewer holds more prompts, hence takes
            fewer rows. None: whatever is asked for.
        workspace_mib: for tiles of a quantized head.
        kv_dtype: `auto` or `int8`, see `GroupCache`.
        adapters: how LoRA layers run meanwhile, see `fast_adapters`.
        fused_ops: kernels for the small operations of a step (`auto`, `on`, `off`), see `fast_modules`.
        attention: of prefills (`auto`, `sdpa`, `xformers`), see `kernel_of`.
        graphs: decode steps in CUDA graphs, where there is CUDA and Triton.
        attention_path: of the decode attention, see `decode_attention`; what a ledger on meta tensors counts.
        on_prefilled: called when the first prompts are in the cache.

    Attributes:
        converses: rehearse `converse`, whose replies are prefilled beside a full cache.
        computed: tokens that went through the model in `generate` and `converse` so far, where it decodes in the
            engine: a prompt's once for its group, a completion's once.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling,
        rows: int | None = None,
        *,
        group: int | None = None,
        workspace_mib: int = 64,
        kv_dtype: str = "auto",
        adapters: str = "auto",
        fused_ops: str = "auto",
        attention: str = "auto",
        graphs: bool = True,
        attention_path: str | None = None,
        on_prefilled: Callable[[], None] = lambda: None,
    ):
        self.model, self.sampling, self.rows, self.group = model, sampling, rows, group
        self.workspace_mib, self.kv_dtype, self.graphs = workspace_mib, kv_dtype, graphs
        self.adapters, self.fused_ops, self.attention = adapters, fused_ops, attention
        self.attention_path, self.on_prefilled = attention_path, on_prefilled
        self.converses, self.computed = False, 0
        self._warned: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the model computes; its input embedding may be in host memory."""
        return next(self.model.parameters()).device

    def generate(
        self, prompt_ids: list[list[int]], num_generations: int, *, seed: int, sampling: Sampling | None = None
    ) -> RolloutBatch:
        """G completions of each prompt (at least one token each). The same seed, weights and prompts give the same
        completions, to rounding, whatever `rows` is and with or without graphs. The KV cache is gone afterwards."""
        sampling, batch = sampling or self.sampling, RolloutBatch([], [], [], [])
        if not prompt_ids:
            return batch
        ends = set(sampling.eos_ids)
        with eval_mode(self.model), torch.no_grad():
            if self._can_decode(sampling):
                rows = self._rows_for(prompt_ids, num_generations, sampling)
                with self._decoding(prompt_ids, num_generations, sampling, seed, rows) as decoder:
                    run(decoder)
                    self.computed += decoder.computed
                    found = zip(decoder.ids[:-1].tolist(), decoder.logps[:-1].cpu())
            else:
                found = generate_in_waves(
                    unwrap(self.model), sampling, prompt_ids, num_generations, self.rows, seed, self.device
                )
            for i, (ids, logps) in enumerate(found):
                batch.append(prompt_ids[i // num_generations], ids, logps, ends)
        return batch

    def converse(
        self,
        prompt_ids: list[list[int]],
        num_generations: int,
        *,
        seed: int,
        reply: Reply,
        sampling: Sampling | None = None,
    ) -> RolloutBatch:
        """G conversations of each prompt. Where the model's turn ends, `reply` says what comes behind it, and the model
        goes on, until `reply` says None or the completion, all turns and replies together, has max_new_tokens. A
        reply behind which no token has room is left out, and ends its conversation as truncated. `reply` is called
        with the gradient mode of the caller, once for each turn, while other rows wait.

        The same seed, weights, prompts and replies give the same completions, to rounding, however turns are grouped. A
        rollout that the engine leaves to transformers computes each turn from its beginning.

        Raises:
            UserError: replies that are not one a turn, or with ids that the model does not have.
        """
        sampling, grad = sampling or self.sampling, torch.is_grad_enabled()
        if not prompt_ids:
            return RolloutBatch([], [], [], [], [])
        if not self._can_decode(sampling):
            return converse_anew(self, prompt_ids, num_generations, seed=seed, reply=reply, sampling=sampling)

        def answered(turns: list[Turn]) -> list[list[int] | None]:
            with torch.set_grad_enabled(grad):
                return reply(turns)

        rows = self._rows_for(prompt_ids, num_generations, sampling)
        decoding = self._decoding(prompt_ids, num_generations, sampling, seed, rows)
        with eval_mode(self.model), torch.no_grad(), decoding as decoder:
            talks = Conversations(decoder, answered)
            run(decoder, ended=talks.ended)
            self.computed += decoder.computed
            return talks.batch()

    def _rows_for(self, prompts: list[list[int]], group: int, sampling: Sampling) -> int | None:
        if self.rows is None or self.group is None or group >= self.group:
            return self.rows
        longest = max(map(len, prompts))
        return rows_within(
            self.rows, self.group, group, len(prompts), longest, sampling.max_new_tokens,
            states=bool(recurrent_layers(unwrap(self.model))),
        )  # fmt: skip

    def stream(self, prompt_ids: list[int], *, seed: int, sampling: Sampling | None = None) -> Iterator[int]:
        """The ids of one completion as they are drawn, its end token included. The KV cache is gone when the iterator
        ends or is closed."""
        sampling = sampling or self.sampling
        if not self._can_decode(sampling):
            yield from self.generate([prompt_ids], 1, seed=seed, sampling=sampling).completion_ids[0]
            return
        with eval_mode(self.model), self._decoding([prompt_ids], 1, sampling, seed, 1) as decoder:
            finished = []
            while not finished:
                with torch.no_grad():  # not around a yield: the caller's grad mode is none of ours
                    if not decoder.scheduler.running:
                        decoder.admit()
                    decoder.step()
                    finished = decoder.finished_rows()
                yield int(decoder.tokens[0])

    @contextmanager
    def _decoding(
        self, prompts: list[list[int]], group: int, sampling: Sampling, seed: int, rows: int | None
    ) -> Iterator[Decoder]:
        """A decoder for these prompts, the model set up for it."""
        causal_lm = unwrap(self.model)
        if self.device.type == "cuda":
            settle(self.device, self._query_dtypes())
        # The host must see which of 4-bit experts were chosen.
        graphs = self.graphs and self.device.type == "cuda" and HAS_TRITON and not any(quantized_experts(causal_lm))
        settings = DecodeSettings(
            self.workspace_mib, self.kv_dtype, graphs, self.attention_path,
            usable("sample", self.device, self.fused_ops), usable("int8_head", self.device, self.fused_ops),
            kernel_of(self.attention, "prefill", getattr(causal_lm, causal_lm.base_model_prefix), self.device),
        )  # fmt: skip
        scheduler = Scheduler([len(p) for p in prompts], group, rows, sampling.max_new_tokens)
        decoder = Decoder(
            causal_lm, sampling, scheduler, prompts, group, seed=seed, device=self.device, settings=settings
        )
        try:
            with (
                settled_rotary(causal_lm, max(map(len, prompts)) + sampling.max_new_tokens),
                layout_attention(decoder.decoder),
                fast_adapters(self.model, self.adapters, self.fused_ops),
                fast_modules(self.model, self.fused_ops),
            ):
                yield decoder
        finally:
            self.graphs &= decoder.captures or not graphs  # what cannot be captured once is not tried again
            decoder.close()

    def _query_dtypes(self) -> set[torch.dtype]:
        found = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        if torch.is_autocast_enabled(self.device.type):
            found.add(torch.get_autocast_dtype(self.device.type))
        return found

    def _can_decode(self, sampling: Sampling) -> bool:
        """Whether our engine samples; says why where it does not."""
        if sampling.foreign:
            return self._fall_back(
                f"generation_kwargs {', '.join(sampling.foreign)}: completions are sampled by transformers' generate, "
                "which is slower, and what is drawn depends on rollout_batch_size."
            )
        with eval_mode(self.model):
            reason = why_not(unwrap(self.model))
        if reason:
            return self._fall_back(
                f"completions are sampled by transformers' generate, which is slower, because {reason}; what is drawn "
                "depends on rollout_batch_size."
            )
        return True

    def _fall_back(self, sentence: str) -> bool:
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, stacklevel=4)
        return False

    def rehearse(
        self, prompt_length: int, completion_length: int, rows: int, num_generations: int, prompts: int | None = None
    ) -> None:
        """The memory of a rollout without its time: the largest prefill, of replies too where the engine `converses`,
        and a decode step of `rows` rows whose own parts hold completion_length tokens by its end. Runs on meta tensors
        too.

        Args:
            prompt_length: tokens of every prompt; at least 2 are taken.
            num_generations: completions of a prompt.
            prompts: how many there are; as many as fill the rows if left out.
        """
        sampling = replace(self.sampling, max_new_tokens=completion_length)
        ids = [[0] * max(2, prompt_length)] * (prompts or -(-rows // num_generations))
        with eval_mode(self.model), torch.no_grad():
            if not self._can_decode(sampling):
                rehearse_waves(unwrap(self.model), rows, len(ids[0]), completion_length, self.device, self.on_prefilled)
                return
            with self._decoding(ids, num_generations, sampling, 0, rows) as decoder:
                decoder.continues = self.converses
                decoder.admit()
                if self.converses:
                    decoder.rehearse_insert()
                self.on_prefilled()
                # With graphs the first step runs as it is, and the second is captured.
                steps = min(2 if decoder.captures else 1, completion_length)
                decoder.skip(completion_length - steps)
                for _ in range(steps):
                    decoder.step()


def engine_of(args: GRPOConfig, model: nn.Module, sampling: Sampling, **more: Any) -> RolloutEngine:
    """The engine that a configuration asks for; `more` are further arguments of it."""
    return RolloutEngine(
        model, sampling, args.rollout_batch_size, group=args.num_generations, workspace_mib=args.workspace_mib,
        kv_dtype=args.kv_cache_dtype, adapters=args.rollout_adapters, fused_ops=args.fused_ops,
        attention=args.attention, **more,
    )  # fmt: skip


def end_ids(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """Every id that ends a completion: those of the model's generation_config and the tokenizer's own."""
    found = getattr(unwrap(model).generation_config, "eos_token_id", None)
    ids = list(found) if isinstance(found, (list, tuple)) else [found]
    return tuple(sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None}))
