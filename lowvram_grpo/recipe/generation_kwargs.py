"""`generation_kwargs`: which arguments of transformers' `generate` a rollout can have.

Those that change which token is drawn next can (n-gram bans, suppressed tokens, typical sampling ...). Refused by name
is what changes how many completions there are or what comes back, what replaces the sampler, what ends a completion
where no end token stands (it would count as cut off), and what the configuration has a field for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from lowvram_grpo.errors import UserError, did_you_mean

_ALLOWED = {
    "min_new_tokens", "min_length", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "exponential_decay_length_penalty", "sequence_bias",
    "forced_eos_token_id", "remove_invalid_values", "renormalize_logits", "encoder_repetition_penalty",
    "watermarking_config",
}  # fmt: skip
# Settled before sampling: see `sampler.sampling_of`.
_IDS = {"eos_token_id", "pad_token_id"}
# Values that ask for what happens anyway, as do None and False.
_NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "do_sample": True, "use_cache": True,
    "diversity_penalty": 0.0, "length_penalty": 1.0, "penalty_alpha": 0.0, "guidance_scale": 1.0, "temperature": None,
}  # fmt: skip
_FIELDS = {"max_new_tokens": "max_completion_length"} | {
    name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")
}
_BEAMS = "GRPO compares samples, and a beam search does not sample"
_BACK = "completions come back as ids, and their log-probs are kept anyway"
_OTHER_MODEL = "the log-probs have to be those of the model that is trained"
_REFUSED = {
    "num_beams": _BEAMS, "num_beam_groups": _BEAMS, "diversity_penalty": _BEAMS, "length_penalty": _BEAMS,
    "early_stopping": _BEAMS, "constraints": _BEAMS, "force_words_ids": _BEAMS,
    "num_return_sequences": "the number of completions is num_generations",
    "do_sample": "the completions of a group would all be the same, and nothing would be learned",
    "use_cache": "rollouts need their KV cache",
    "max_length": "it counts the prompt too; set max_completion_length",
    "max_time": "what is sampled would depend on the clock",
    "stop_strings": "a completion that ends without an end token counts as cut off; add the token's id to eos_token_id",
    "return_dict_in_generate": _BACK, "output_scores": _BACK, "output_logits": _BACK, "output_attentions": _BACK,
    "output_hidden_states": _BACK, "streamer": _BACK,
    "penalty_alpha": "contrastive search does not sample", "dola_layers": _OTHER_MODEL, "guidance_scale": _OTHER_MODEL,
    "assistant_model": _OTHER_MODEL, "prompt_lookup_num_tokens": _OTHER_MODEL, "custom_generate": _OTHER_MODEL,
    "logits_processor": "functions can't be written down in a recipe",
    "stopping_criteria": "functions can't be written down in a recipe",
}  # fmt: skip


def settle_generation_kwargs(kwargs: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those of `kwargs` that do something, None if none does.

    Args:
        settings: fields of the configuration, which may say the same.

    Raises:
        UserError: one that a rollout can't have, or that nobody knows.
    """
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    left = {}
    for name, value in (kwargs or {}).items():
        if name in _ALLOWED | _IDS:
            left[name] = value
        elif value is None or (name in known and _is_neutral(name, value)):
            continue
        elif name in _FIELDS:
            if value != settings.get(_FIELDS[name]):
                raise UserError(f"generation_kwargs has {name}; set {_FIELDS[name]} itself, which log-probs go by too.")
        elif name in _REFUSED:
            raise UserError(f"generation_kwargs has {name} {value!r}, which is not supported: {_REFUSED[name]}.")
        elif name in known:
            raise UserError(
                f"generation_kwargs has {name}, which is not supported; drop it, or choose from "
                f"{', '.join(sorted(_ALLOWED))}."
            )
        else:
            raise UserError(
                f"generation_kwargs has {name}{did_you_mean(name, known)}, which transformers' generate does not know."
            )
    return left or None


def _is_neutral(name: str, value: Any) -> bool:
    if name in _NEUTRAL:
        return value == _NEUTRAL[name]
    return value is False
