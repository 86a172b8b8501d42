"""A run, an adapter or a bare model, loaded as training loads it and sampled from: what chat and evaluation do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowvram_grpo.data.conversation import TextStream
from lowvram_grpo.data.decoding import silent_ids
from lowvram_grpo.errors import UserError
from lowvram_grpo.jobs.loading import adopt_stored_quantization, load_model_of
from lowvram_grpo.policy.adapter import adapter_config
from lowvram_grpo.policy.attention_choice import check_asked
from lowvram_grpo.policy.build import stream_layers
from lowvram_grpo.policy.embeddings import place_embeddings
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.policy.hub import offline_where_unreachable
from lowvram_grpo.policy.load import model_config
from lowvram_grpo.policy.model_names import named
from lowvram_grpo.policy.overflow import computes_in_float16, keep_where_needed
from lowvram_grpo.policy.precision import slow_dtype
from lowvram_grpo.policy.wrapper import is_peft, unwrap
from lowvram_grpo.recipe.ranges import TRAINING_RANGES, Range, check_ranges
from lowvram_grpo.recipe.resolve import Recipe, resolve
from lowvram_grpo.rollout.engine import RolloutEngine, end_ids, engine_of
from lowvram_grpo.rollout.sampler import Sampling, sampling_of
from lowvram_grpo.run.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowvram_grpo.recipe.config import GRPOConfig

# What a model is run on once to see whether float16 is enough for it.
_SHOWN = "Which numbers below one hundred are prime? Think step by step, then answer in one sentence."
_ADAPTER_FILE, _MODEL_FILE = "adapter_config.json", "config.json"
# What of a run's training settings says how its policy is loaded, prompted and scored. The rest (optimizer, batches,
# logging) may not even be valid on the machine that only samples; temperature and filters are the caller's.
_KEPT = {
    "use_cpu", "bf16", "fp16", "trust_remote_code", "model_init_kwargs", "head_dtype", "embedding_offload",
    "weight_offload", "expert_offload", "vram_gib", "workspace_mib", "rollout_batch_size", "kv_cache_dtype",
    "rollout_adapters", "fused_ops", "max_prompt_length", "max_completion_length", "chat_template_kwargs",
    "generation_kwargs", "seed",
    "reward_weights", "reward_timeout", "remove_unused_columns", "oom_step_down",
}  # fmt: skip


def find_adapter(place: str) -> tuple[str, Path | None, str]:
    """The adapter that `--adapter` means.

    Args:
        place: a run directory (its adapter, or the newest whole checkpoint of one that is not finished), an adapter or
            checkpoint folder, or a hub id.

    Returns:
        the adapter's folder or hub id, the recipe of the run that it belongs to (None: of no run), and a sentence for
        people where a choice was made (else empty).

    Raises:
        UserError: the run has no adapter yet.
    """
    folder = Path(place)
    if not folder.is_dir():
        return place, None, ""
    if (folder / _ADAPTER_FILE).is_file():
        recipe = RunDirectory(folder.resolve().parent).recipe_path
        return place, recipe if recipe.is_file() else None, ""
    run = RunDirectory(folder)
    if not run.recipe_path.is_file():
        return place, None, ""
    if (run.adapter_dir / _ADAPTER_FILE).is_file():
        return str(run.adapter_dir), run.recipe_path, ""
    checkpoint = run.latest_checkpoint()
    if checkpoint is not None and (checkpoint / _ADAPTER_FILE).is_file():
        return str(checkpoint), run.recipe_path, f"{place} is not finished; taking {checkpoint.name}."
    raise UserError(
        f"The run {place} has left neither an adapter nor a whole checkpoint yet; wait for its first one, or go on "
        f"with --resume {place}."
    )


def find_whole_model(place: str) -> tuple[str, Path | None, str] | None:
    """The model that `--adapter` means where it names a run that trains all weights, or such a run's model or a
    checkpoint of it; None for all others. Otherwise as `find_adapter`."""
    folder = Path(place)
    if not folder.is_dir() or (folder / _ADAPTER_FILE).is_file():
        return None
    if (folder / _MODEL_FILE).is_file():
        recipe = RunDirectory(folder.resolve().parent).recipe_path
        return place, recipe if recipe.is_file() else None, ""
    run = RunDirectory(folder)
    if run.result_dir is not None:
        return (str(run.model_dir), run.recipe_path, "") if run.result_dir == run.model_dir else None
    checkpoint = run.latest_checkpoint()
    if checkpoint is None or not (checkpoint / _MODEL_FILE).is_file():
        return None
    return str(checkpoint), run.recipe_path, f"{place} is not finished; taking {checkpoint.name}."


def recipe_to_sample(flags: Mapping[str, Any], tell: Callable[[str], None]) -> Recipe:
    """The recipe of what `--adapter` names, or of a bare `--model`, with `flags` on top.

    Args:
        flags: as for `recipe.resolve`; `adapter` may be a run.
        tell: hears which checkpoint was taken, and what the model's name stands for.

    Raises:
        UserError: no such run, adapter or model, or none given.
    """
    flags, file = dict(flags), None
    place, said = flags.get("adapter"), ""
    if place and (whole := find_whole_model(place)):
        # Frozen from here on, so it may be quantized and kept in 16 bits.
        flags["model"], file, said = whole
        place = flags["adapter"] = None
        flags["use_peft"] = True
    elif place:
        flags["adapter"], file, said = find_adapter(place)
    if said:
        tell(said)
    recipe = resolve(flags, file)
    offline_where_unreachable([recipe.adapter, recipe.model, *recipe.places], tell)
    base = adapter_config(recipe.adapter).base_model_name_or_path if place else None
    recipe.model = recipe.model or base
    if not recipe.model:
        raise UserError("No model given; pass --model with a folder or a hub id, or --adapter with a run.")
    recipe.model = named(recipe.model, tell)
    offline_where_unreachable([recipe.model], tell)
    if os.path.isabs(recipe.model) and not os.path.exists(recipe.model):
        by = f", which {place} was trained on," if place and "model" not in flags else ""
        raise UserError(f"The model {recipe.model}{by} does not exist; pass --model with the place where it is.")
    recipe.training = {key: value for key, value in recipe.training.items() if key in _KEPT or key in flags}
    if not torch.cuda.is_available():
        recipe.training = {key: value for key, value in recipe.training.items() if key not in ("bf16", "fp16")}
    return recipe


def check_filters(filters: dict[str, Any], max_new_tokens: int | None) -> None:
    """Whether these can be sampled with.

    Raises:
        UserError: one is out of its range.
    """
    ranges = {**TRAINING_RANGES, "temperature": Range(at_least=0), "max_new_tokens": Range(at_least=1)}
    check_ranges({**filters, "max_new_tokens": max_new_tokens}, ranges)


@dataclass
class LoadedPolicy:
    """A model to sample from, with what belongs to it.

    Attributes:
        model: in eval mode when it is sampled from, frozen, with or without an adapter.
        engine: samples as `args` says unless told otherwise.
        positions: the longest prompt and completion together, in tokens; None where the model names no limit.
    """

    recipe: Recipe
    args: GRPOConfig
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    positions: int | None

    @property
    def sampling(self) -> Sampling:
        return self.engine.sampling

    @property
    def has_adapter(self) -> bool:
        return is_peft(self.model)

    def adapter(self, on: bool) -> AbstractContextManager:
        """The adapter on, or off: the base model as it was before training."""
        return nullcontext() if on or not self.has_adapter else self.model.disable_adapter()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """As the trainer samples: adapter weights are float32 under it whatever the base is in."""
        half = torch.float16 if self.args.fp16 else torch.bfloat16
        with torch.autocast(self.args.device.type, dtype=half, enabled=bool(self.args.fp16 or self.args.bf16)):
            yield


def load_policy(
    recipe: Recipe, args: GRPOConfig, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]
) -> LoadedPolicy:
    """Load what `recipe` names: quantization, head and host memory as in training, all weights frozen.

    Args:
        tell: hears what was made smaller, what of the checkpoint was left out, and what is slow here.

    Raises:
        UserError: missing or unfit model or adapter.
    """
    check_asked(args.attention, args.device)
    config = model_config(recipe.model, **recipe.hub_arguments)
    adopt_stored_quantization(recipe, config, tell)
    model = load_model_of(recipe, args, tell).requires_grad_(False)
    for sentence in place_embeddings(
        unwrap(model),
        head_dtype=args.head_dtype,
        embedding_offload=args.embedding_offload,
        device=args.device,
        workspace_mib=args.workspace_mib,
    ):
        tell(sentence)
    head_of(unwrap(model))
    stream_layers(model, args, tell)
    if slow := slow_dtype(model, args):
        tell(slow)
    if not getattr(unwrap(model), "is_quantized", False):
        model.to(args.device)  # where from_pretrained loaded it, it is still on the host
    engine = engine_of(args, model, sampling_of(args, end_ids(model, tokenizer), tokenizer))
    policy = LoadedPolicy(recipe, args, model, tokenizer, engine, _positions(model))
    if computes_in_float16(model, args.fp16):
        keep_where_needed(model, [tokenizer(_SHOWN).input_ids], policy.autocast, tell)
    return policy


def _positions(model: nn.Module) -> int | None:
    return getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)


@dataclass
class Answer:
    """`ended`: by an end token; `stopped`: by Ctrl-C."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    ended: bool = False
    stopped: bool = False


def stream_answer(
    policy: LoadedPolicy,
    ids: list[int],
    sampling: Sampling,
    seed: int,
    show: Callable[[str], None],
    *,
    adapter: bool = True,
) -> Answer:
    """Sample one answer to the prompt `ids`; `show` gets its text piece by piece. Ctrl-C ends it where it is."""
    answer, text, started = (
        Answer(),
        TextStream(policy.tokenizer, silent_ids(policy.tokenizer, (*sampling.eos_ids, sampling.pad_id))),
        perf_counter(),
    )

    def say(piece: str) -> None:
        answer.text += piece
        if piece:
            show(piece)

    tokens = policy.engine.stream(ids, seed=seed, sampling=sampling)
    try:
        with policy.autocast(), policy.adapter(adapter), closing(tokens):
            for token in tokens:
                answer.tokens += 1
                if token in sampling.eos_ids:
                    answer.ended = True
                    break
                say(text.push(token))
    except KeyboardInterrupt:
        answer.stopped = True
    say(text.finish())
    answer.seconds = perf_counter() - started
    return answer
