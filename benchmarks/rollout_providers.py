"""Samplers that `bench_rollout.py` times, each a function of a model and a task.

All make exactly `length` tokens a completion, at temperature 1 without filters or greedily. End tokens are withheld by
`min_new_tokens`, in transformers' `generate` too, which then masks them at every step as ours does; its continuous
batching knows no minimum and gets no end token instead. Set-up that a call needs counts as part of it (our graphs are
captured in each), but for continuous batching, whose manager and graphs may outlive a call: there the clock runs from
the request to the last token.

transformers compiles the decode step where a static cache is used on a GPU, unless `disable_compile` is set. It is set
here: compiling takes minutes a shape, and needs a compiler that Windows lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from lowvram_grpo.kernels.runtime import HAS_TRITON
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from lowvram_grpo.bench.models import EOS, PAD
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy.wrapper import is_peft, unwrap
from lowvram_grpo.rollout.engine import RolloutEngine, eval_mode
from lowvram_grpo.rollout.fallback import seeded
from lowvram_grpo.rollout.graphs import StepGraphs
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.rollout.support import why_not

BASELINE = "hf-dynamic"


@dataclass
class Task:
    """`group` completions of `length` tokens of each prompt."""

    prompts: list[list[int]]
    group: int
    length: int
    greedy: bool
    seed: int = 0

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.group


@dataclass
class Made:
    """What a call made.

    Attributes:
        completions: ids, one list a completion.
        kv_bytes: of the cache at its end, where the provider tells.
        decode_steps: passes of one token a row.
        prefill_s: from the start to the first of them; None where there is no such moment.
        seconds: of the whole, where the provider keeps its own clock.
    """

    completions: list[list[int]]
    decode_steps: int
    kv_bytes: int | None = None
    prefill_s: float | None = None
    seconds: float | None = None


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class _Clock:
    started: float = field(default_factory=time.perf_counter)
    prefill_s: float | None = None


@contextmanager
def prefill_clock(causal_lm: nn.Module, device: torch.device) -> Iterator[_Clock]:
    """Seconds until the decoder is first given one token a row. The one wait for the device is part of the time."""
    clock = _Clock()

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        fed = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if clock.prefill_s is None and fed is not None and fed.shape[1] == 1:
            sync(device)
            clock.prefill_s = time.perf_counter() - clock.started

    hook = getattr(causal_lm, causal_lm.base_model_prefix).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield clock
    finally:
        hook.remove()


# Ours


def engine(model: nn.Module, task: Task, **settings) -> RolloutEngine:
    sampling = Sampling(
        task.length, (EOS,), PAD, temperature=0.0 if task.greedy else 1.0, extra={"min_new_tokens": task.length}
    )
    return RolloutEngine(model, sampling, **settings)


def ours(model: nn.Module, task: Task, **settings) -> Made:
    with prefill_clock(unwrap(model), device_of(model)) as clock:
        batch = engine(model, task, **settings).generate(task.prompts, task.group, seed=task.seed)
    return Made(batch.completion_ids, task.length, prefill_s=clock.prefill_s)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def cache_bytes(model: nn.Module, task: Task, **settings) -> int:
    """Bytes of our KV cache: what the ledger holds under that name when a task's prompts are in it."""
    found: dict[str, int] = {}
    with Ledger() as ledger:
        rehearsed = engine(model, task, on_prefilled=lambda: found.update(ledger.categories), **settings)
        rehearsed.rehearse(len(task.prompts[0]), task.length, task.rows, task.group, len(task.prompts))
    return found["KV cache"]


def replay_is_eager(model: nn.Module, task: Task) -> dict:
    """Completions that graph replay and the same steps without a graph make of the same seed. `graphs` counts those
    captured; without one there was nothing to compare."""
    captured: list[int] = []

    def capture(graphs: StepGraphs, rows: int) -> None:
        _capture(graphs, rows)
        captured.append(rows)

    _capture = StepGraphs._capture
    with patch.object(StepGraphs, "_capture", capture):
        replayed = ours(model, task).completions
    # The sizes of a graph, launched one by one.
    with patch.object(StepGraphs, "__call__", lambda graphs, rows: graphs.step(rows)):
        eager = ours(model, task).completions
    equal = sum(a == b for a, b in zip(replayed, eager))
    same = equal == len(eager) if captured else None
    return {"completions_equal": equal, "of": len(eager), "graphs": len(captured), "replay_equals_eager": same}


# transformers


def _hf_config(task: Task, **more) -> GenerationConfig:
    """Nothing but what the task asks for: a filter that does nothing would still be run at every step."""
    filters = {} if task.greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(max_new_tokens=task.length, do_sample=not task.greedy, pad_token_id=PAD, **filters, **more)


@contextmanager
def _undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """In eval mode with a seed. The model's generation_config is put aside, as what ours leaves out would be taken from
    it, and its attention is what it was afterwards."""
    causal_lm = unwrap(model)
    config, attention = causal_lm.generation_config, causal_lm.config._attn_implementation
    causal_lm.generation_config = GenerationConfig()
    try:
        with eval_mode(model), torch.no_grad(), seeded(seed, device_of(model)):
            yield
    finally:
        causal_lm.generation_config = config
        if causal_lm.config._attn_implementation != attention:
            causal_lm.set_attn_implementation(attention)


def hf(model: nn.Module, task: Task, **config) -> Made:
    """`generate` on each prompt G times."""
    causal_lm, device = unwrap(model), device_of(model)
    ids = torch.tensor(task.prompts, device=device).repeat_interleave(task.group, 0)
    asked = _hf_config(
        task, min_new_tokens=task.length, eos_token_id=EOS, return_dict_in_generate=True, disable_compile=True, **config
    )
    with _undisturbed(model, task.seed), prefill_clock(causal_lm, device) as clock:
        made = causal_lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=asked)
    layers = made.past_key_values.layers
    kv_bytes = sum(_bytes(x) for layer in layers for x in (layer.keys, layer.values))
    completions = made.sequences[:, ids.shape[1] :].tolist()
    return Made(completions, task.length - 1, kv_bytes, clock.prefill_s)


def _bytes(x: Tensor) -> int:
    return x.untyped_storage().nbytes()


def hf_continuous(model: nn.Module, task: Task) -> Made:
    """`generate_batch`: a paged cache as large as it must be, blocks of common prefixes shared, sdpa attention where
    there is no flash-attn."""
    length = len(task.prompts[0]) + task.length
    page = 256  # transformers' default
    pages = task.rows * (-(-length // page) + 1)
    batching = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=max(2048, task.rows))
    requests = [prompt for prompt in task.prompts for _ in range(task.group)]
    with _undisturbed(model, task.seed):
        found = unwrap(model).generate_batch(
            inputs=requests, generation_config=_hf_config(task, eos_token_id=-1),
            continuous_batching_config=batching, record_timestamps=True,
        ).values()  # fmt: skip
    errors = [one.error for one in found if one.error]
    if errors or len(found) != task.rows:
        raise RuntimeError(f"{len(found)} of {task.rows} requests came back; {next(iter(errors), 'no reason given')}")
    began = min(one.created_time for one in found)
    first, last = (max(one.timestamps[at] for one in found) for at in (0, -1))
    return Made([one.generated_tokens for one in found], task.length - 1, None, first - began, last - began)


PROVIDERS: dict[str, Callable[[nn.Module, Task], Made]] = {
    "ours": ours,
    "ours-eager": lambda model, task: ours(model, task, graphs=False),
    "ours-int8": lambda model, task: ours(model, task, kv_dtype="int8"),
    "ours-fused": lambda model, task: ours(model, task, fused_ops="on"),
    "ours-unfused": lambda model, task: ours(model, task, fused_ops="off"),
    "ours-merged": lambda model, task: ours(model, task, adapters="merged"),
    BASELINE: hf,
    "hf-static": lambda model, task: hf(model, task, cache_implementation="static"),
    "hf-continuous": hf_continuous,
}


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda" and HAS_TRITON


def missing(name: str, model: nn.Module, weights: str) -> str | None:
    """Why there is nothing to time; None where there is."""
    if name.startswith("ours"):
        with eval_mode(model), torch.no_grad():
            if why := why_not(unwrap(model)):
                return f"transformers' generate would sample, because {why}"
    if name == "ours-eager" and not has_graphs(device_of(model)):
        return "there are no graphs without CUDA and Triton, so it would be `ours`"
    if name == "ours-merged" and (weights != "none" or not is_peft(model)):
        return "only an adapter on unquantized weights can be merged"
    return None
