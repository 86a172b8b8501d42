"""Our engine in the place of the `generate` that TRL's trainer samples with."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import GenerationConfig

from lowvram_grpo.policy.wrapper import is_peft, unwrap
from lowvram_grpo.rollout.engine import RolloutEngine, eval_mode
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.rollout.support import why_not

_KNOWN = {
    "do_sample", "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "eos_token_id", "pad_token_id",
}  # fmt: skip
# What changes no completion, or not here: prompts come with their first token, and max_new_tokens comes before
# max_length.
_NO_EFFECT = {
    "bos_token_id", "max_length", "use_cache", "cache_implementation", "cache_config", "disable_compile",
    "compile_config", "transformers_version", "return_dict_in_generate", "decoder_start_token_id",
}  # fmt: skip


class Turns:
    """Stands where the trainer looks for `_generate_single_turn`, with its arguments and results."""

    what = "Sampling"

    def __init__(self, trainer: Any, rows: int | None, workspace_mib: int):
        self.trainer, self.rows, self.workspace_mib = trainer, rows, workspace_mib
        self.engine: RolloutEngine | None = None
        self.theirs = trainer._generate_single_turn
        self._warned = False

    def why_not(self) -> str | None:
        """Why TRL's sampler has to stay, in words that follow "because"."""
        model = self.trainer.model
        if is_peft(model) and any(config.is_prompt_learning for config in model.peft_config.values()):
            return "the adapter learns a prompt, which the engine does not prefill"
        if reason := self._foreign():
            return reason
        with eval_mode(model), torch.no_grad(), self.trainer.accelerator.autocast():
            return why_not(unwrap(model))

    def put_in(self) -> None:
        self.engine = RolloutEngine(self.trainer.model, self.sampling(), self.rows, workspace_mib=self.workspace_mib)
        self.trainer._generate_single_turn = self

    def take_out(self) -> None:
        if vars(self.trainer).get("_generate_single_turn") is self:
            del self.trainer._generate_single_turn

    def __call__(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], None]:
        """One completion of each of `prompt_ids`, behind its first end token cut, and None for log-probs, which TRL
        takes from vLLM alone."""
        seen = images is not None or multimodal_fields or has_tool_images
        if reason := "these prompts have images" if seen else self._foreign():
            if not self._warned:
                self._warned = True
                warnings.warn(f"{self.what} is TRL's own, because {reason}.", stacklevel=2)
            return self.theirs(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
        prompts, group = _groups([list(ids) for ids in prompt_ids], num_generations)
        sampling = self.sampling()
        # From the generator that transformers' generate draws from, if it draws, so that seeds and checkpoints hold for
        # it as they do in TRL, and TRL's own draws behind it are the same where nothing is drawn.
        seed = int(torch.randint(2**31 - 1, ())) if sampling.temperature else 0
        with self.trainer.accelerator.autocast():
            batch = self.engine.generate(prompts, group, seed=seed, sampling=sampling)
        return batch.completion_ids, None

    def sampling(self) -> Sampling:
        """As the trainer's generation_config says now."""
        config = self._config()
        greedy = not config.get("do_sample")
        extra = {"min_new_tokens": config["min_new_tokens"]} if config.get("min_new_tokens") else {}
        return Sampling(
            max_new_tokens=config["max_new_tokens"],
            eos_ids=tuple(sorted(_ids(config["eos_token_id"]))),
            pad_id=config["pad_token_id"],
            temperature=0.0 if greedy else _given(config, "temperature", 1.0),
            top_p=_given(config, "top_p", 1.0),
            top_k=_given(config, "top_k", 0),
            min_p=_given(config, "min_p", 0.0),
            repetition_penalty=_given(config, "repetition_penalty", 1.0),
            extra=extra,
        )

    def _config(self) -> dict[str, Any]:
        """What transformers would sample with: what TRL leaves open comes from the model's generation_config."""
        model = unwrap(self.trainer.model).generation_config.to_dict()
        given = self.trainer.generation_config.to_dict()
        return {name: model.get(name) if given.get(name) is None else given[name] for name in {*model, *given}}

    def _foreign(self) -> str | None:
        config = self._config()
        if _ids(config["eos_token_id"]) != set(self.trainer.eos_token_ids):
            return "generation_kwargs have end tokens of their own, behind which TRL does not cut"
        blank = GenerationConfig()
        plain = blank.to_dict() | getattr(blank, "_get_default_generation_params", dict)()
        names = [
            name
            for name, value in config.items()
            if name not in _KNOWN | _NO_EFFECT and not name.startswith(("_", "output_"))
            and value is not None and value != plain.get(name)
        ]  # fmt: skip
        return f"transformers alone knows {', '.join(sorted(names))}" if names else None


def _given(config: dict[str, Any], name: str, plain: Any) -> Any:
    return plain if config.get(name) is None else config[name]


def _ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def _groups(prompts: list[list[int]], group: int) -> tuple[list[list[int]], int]:
    """(distinct prompts, completions of each): TRL repeats a prompt for each of its completions, except between
    turns with tools, where each conversation is another."""
    firsts = prompts[::group]
    if len(prompts) == len(firsts) * group and all(p == firsts[i // group] for i, p in enumerate(prompts)):
        return firsts, group
    return prompts, 1
