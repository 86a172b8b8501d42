"""The language model inside of a multimodal checkpoint: its configuration, and what its weights are called.

Qwen3.5, Gemma 3 and 4 and Ministral 3 are published as `...ForConditionalGeneration`: a language model and, beside it,
towers for images and sound that GRPO on text never runs. The language model alone is loaded. An adapter of it is saved
under the names that peft looks for on the published checkpoint: those of the whole model
(`model.language_model.layers...`), and its own of Qwen3.5, which transformers' AutoModelForCausalLM takes apart too.
One with either kind of names is taken up.
"""

from __future__ import annotations

import copy
import json
import os
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from lowvram_grpo.policy.wrapper import unwrap

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig

# What whole models call it; these the second.
_IDEFICS = ("idefics2", "idefics3", "smolvlm")
_PLACES = "language_model|text_model"
_INSIDE = re.compile(rf"^(?:model\.)?(?:{_PLACES})\.(?:model\.)?(.+)$")
#: The same for from_pretrained, which has its own names before these.
KEY_MAPPING = {
    rf"^(?:model\.)?(?:{_PLACES})\.lm_head\.": "lm_head.",
    rf"^(?:model\.)?(?:{_PLACES})\.(?:model\.)?": "model.",
}
#: Modules of a whole model that are none of its language model.
TOWERS = r"(?:.*\.)?(?:vision|visual|image|audio|speech|multi_modal|multimodal|embed_vision|embed_audio)\w*(?:\..*)?"
# Of an adapter's weights, behind peft's own prefix.
_ADAPTER_MAPPING = {rf"^model\.(?:{_PLACES})\.": "model."}
_PREFIX = "base_model.model.model."


def language_model(config: PretrainedConfig) -> PretrainedConfig | None:
    """The configuration of the language model inside of a multimodal one, as of a model of its own; None where there
    is none inside, or transformers has no class for it alone."""
    from transformers.models.auto import modeling_auto as auto

    text = config.get_text_config()
    if text is config or getattr(config, "is_encoder_decoder", False) or getattr(config, "auto_map", None):
        return None
    if type(text) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    text = copy.deepcopy(text)
    text._name_or_path = config._name_or_path
    # Which of the two says it differs between families; where that is wrong, the checkpoint's own lm_head shows it.
    text.tie_word_embeddings = any(getattr(c, "tie_word_embeddings", False) for c in (config, text))
    if getattr(text, "dtype", None) is None:
        text.dtype = config.dtype
    if (stored := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = _renamed_skips(stored)
    return text


def text_or_whole(config: PretrainedConfig) -> PretrainedConfig:
    """What is trained of a model of this configuration: `language_model`, or all of it."""
    return language_model(config) or config


def text_name(name: str) -> str | None:
    """What the language model alone calls a weight of the whole model; None for a weight of another part."""
    if name.startswith("lm_head."):
        return name
    found = _INSIDE.match(name)
    if found is None:
        return None
    return found[1] if found[1].startswith("lm_head.") else f"model.{found[1]}"


def _renamed_skips(stored: Any) -> Any:
    """A checkpoint's quantization, whose list of layers in 16 bits has the whole model's names."""
    stored = copy.deepcopy(stored)
    settings = stored if isinstance(stored, dict) else vars(stored)
    for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if settings.get(key):
            settings[key] = [text_name(name) or name for name in settings[key]]
    return stored


def mark_inside(model: nn.Module, whole: PretrainedConfig) -> None:
    """Note that `model` was taken out of one of the configuration `whole`."""
    from transformers.models.auto import modeling_auto as auto

    model.place_inside = "text_model" if whole.model_type in _IDEFICS else "language_model"
    # Of Qwen3.5, AutoModelForCausalLM makes the language model too: peft finds it under its own names.
    model.alone_elsewhere = auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(whole), None) is type(model)


def save_under_whole_names(model: PeftModel) -> None:
    """From here on `model.save_pretrained` gives an adapter's weights the names of the model that transformers'
    AutoModelForCausalLM makes of the base's checkpoint (or, where it makes none, of the whole model)."""
    base = unwrap(model)
    if hasattr(base, "place_inside") and not base.alone_elsewhere:
        model.save_pretrained = partial(_save, model, model.save_pretrained)


def _save(model: PeftModel, save: Any, save_directory: str, **kwargs: Any) -> None:
    save(save_directory, **kwargs)
    for adapter in kwargs.get("selected_adapters") or list(model.peft_config):
        rename_saved(save_directory if adapter == "default" else os.path.join(save_directory, adapter), model)


def rename_saved(folder: str | os.PathLike[str], model: nn.Module) -> None:
    """Give the adapter in `folder` the names of the whole model, if `model`'s base was taken out of one: vLLM takes an
    adapter under others without a word, and runs none of it."""
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import load_file, save_file

    place = getattr(unwrap(model), "place_inside", None)
    if place is None:
        return
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    renamed = {_whole_name(name, place): weight.clone() for name, weight in load_file(path).items()}
    # Aside first: what is read is mapped into memory, and a file that is half written is none.
    save_file(renamed, f"{path}.part", metadata={"format": "pt"})
    os.replace(f"{path}.part", path)
    _narrow(os.path.join(folder, CONFIG_NAME))


def _whole_name(name: str, place: str) -> str:
    rest = name.removeprefix(_PREFIX)
    return f"{_PREFIX}{place}.{rest}" if rest != name and not rest.startswith(f"{place}.") else name


def _narrow(path: str) -> None:
    """Have an adapter's configuration name layers of the language model alone: q_proj is in towers too, and of some of
    their layers peft can make none of its own."""
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or ""
    if isinstance(targets, list):
        config["target_modules"] = sorted(name.removeprefix("model.") for name in targets)
    if isinstance(excluded, list):
        excluded = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, excluded))})"
    if TOWERS not in excluded:
        config["exclude_modules"] = "|".join(filter(None, (excluded, TOWERS)))
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, sort_keys=True)
    os.replace(f"{path}.part", path)


def adapter_mapping(model: nn.Module) -> dict[str, str]:
    """peft's `key_mapping` for adapters of `model`, whichever names they were saved under."""
    return _ADAPTER_MAPPING if hasattr(unwrap(model), "place_inside") else {}
